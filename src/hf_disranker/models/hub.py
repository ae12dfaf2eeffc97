"""In and out of the Hub: loading that refuses what cannot be trusted, pushing that leaves nothing half done."""

from __future__ import annotations

import contextlib
import json
import os
import string
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError

from hf_disranker.models.card import TEMPLATES, CardFacts, model_card, training_facts
from hf_disranker.models.checkpoint import HUB_OPTIONS, check_weights, explain_absence, load_config

MODELING_FILE = "modeling_disranker.py"
# Pickles run code when they are read, and training_args.bin holds whatever the arguments held.
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
_NOT_PUSHED = [*_PICKLES, "_*", "checkpoint-*"]


class PushError(OSError):
    """A push did not arrive; the message says what stands on the Hub and what to do."""


class TokenFreeArguments:
    """Training arguments whose pickle, which Trainer writes beside every checkpoint and pushes, holds no token."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "hub_token": None}


class RankerHubMixin:
    """Loading, saving and publishing of a ranker; put it before the class of transformers."""

    config: Any

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """As in transformers; reads safetensors only, unless `use_safetensors=False` says otherwise.

        Raises:
            OSError: neither a folder nor on the Hub, or the weights are pickles, or cut off.
            ValueError: a checkpoint that lacks more than a head, a marked one that lacks its head, or weights that do
                not fit their config.
        """
        name = pretrained_model_name_or_path
        kwargs.setdefault("use_safetensors", True)
        try:
            model, info = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        except Exception as error:  # of many kinds, by version and by where the files lie
            _explain(error, name, kwargs)
            raise
        if model.was_marked and any(key.split(".")[0] in ("classifier", "score") for key in info["missing_keys"]):
            raise ValueError(
                f"{name} is no trained ranker: it lacks {sorted(info['missing_keys'])[:4]}, which its config claims."
            )
        check_weights(name, info)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As in transformers; with `push_to_hub`, what is saved goes the way of `push_to_hub`."""
        hub = {key: kwargs.pop(key) for key in ("repo_id", "private", "revision", "commit_message") if key in kwargs}
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        if push_to_hub:
            repo_id = hub.pop("repo_id", os.path.basename(os.fspath(save_directory).rstrip("/")))
            self.push_to_hub(repo_id, token=kwargs.get("token"), **hub)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        tokenizer: Any = None,
        remote_code: bool = False,
        facts: CardFacts | None = None,
        **options: Any,
    ) -> CommitInfo:
        """Publish the model, in one commit.

        Args:
            repo_id: owner/name, or name alone for your own.
            tokenizer: goes into the same commit; it also has a `push_to_hub` of its own.
            remote_code: add one self-contained modelling file, so that `AutoModel` gives the ranker without this
                package to who says `trust_remote_code=True`.
            facts: for the model card, which is written where the repository has none.
            options: `private` (None: teachers are, students follow the account), `revision` (a branch, made if new),
                `commit_message`, `token`, `create_pr`, and `max_shard_size` of `save_pretrained`.

        Raises:
            PushError: the push was cut off.
            ValueError: a teacher that stock loaders would read wrongly, since it pads with its end-of-sequence token.
        """
        check_padding(self.config)
        options.pop("tags", None)
        with tempfile.TemporaryDirectory() as folder:
            shards = {key: options.pop(key) for key in ("max_shard_size",) if key in options}
            self.save_pretrained(folder, **shards)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            if remote_code:
                write_remote_code(folder, type(self).__name__)
            return push_folder(folder, repo_id, self.config, facts=facts, **options)


class TrainerHubMixin:
    """Publishing from a trainer of rankers; put it before the class of transformers."""

    args: Any
    model: Any
    hub_model_id: str | None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As in `Trainer`; a new repository of a teacher is private unless `hub_private_repo` is False."""
        teacher = self.model.config.disranker["role"] == "teacher"
        # Not handed on: transformers 5.19 takes no `private` here.
        if private is not None or (self.args.hub_private_repo is None and teacher):
            self.args.hub_private_repo = True if private is None else private
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        with pushing(HfApi(token=token or self.args.hub_token), name, self.args.hub_revision):
            super().init_hf_repo(token=token)  # type: ignore[misc]

    def create_model_card(self, model_name: str | None = None, results: Sequence[Any] = (), **_: Any) -> None:
        """Write README.md into the output folder.

        Args:
            model_name: shown where the model has no repository.
            results: measures of baselines, as in `CardFacts`; the trained model's own stand before them.
        """
        if self.is_world_process_zero():  # type: ignore[attr-defined]
            repo_id = self.hub_model_id or model_name or Path(self.args.output_dir).name
            card = model_card(
                self.model.config, repo_id, training_facts(self, results), adapter=_is_adapter(self.model)
            )
            card.save(Path(self.args.output_dir, "README.md"))

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        *,
        results: Sequence[Any] = (),
        remote_code: bool = False,
        private: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
        **_: Any,
    ) -> CommitInfo | None:
        """Save and publish model, tokenizer and card; call it on every process.

        Args:
            commit_message: of the commit.
            results: as in `create_model_card`.
            remote_code: as in `RankerHubMixin.push_to_hub`.
            private: of a new repository; None takes `hub_private_repo`, and private for a teacher.
            revision: branch; None takes `hub_revision`.
            token: None takes `hub_token`.

        Raises:
            PushError: the push was cut off; the model lies whole in the output folder.
        """
        trainer: Any = self
        token = token or self.args.hub_token
        if not _is_adapter(self.model):
            check_padding(self.model.config)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        trainer.save_model(_internal_call=True)
        if not trainer.is_world_process_zero():
            return None
        trainer._finish_current_push()
        self.create_model_card(results=results)
        if remote_code:
            write_remote_code(self.args.output_dir, type(trainer.accelerator.unwrap_model(self.model)).__name__)
        return push_folder(
            self.args.output_dir,
            str(self.hub_model_id),
            self.model.config,
            revision=revision or self.args.hub_revision,
            commit_message=commit_message,
            token=token,
        )


def publish(trainer: Any, model: Any, tokenizer: Any) -> CommitInfo:
    """Publish what a recipe has saved, where its trainer pushed on the way: the whole model, LoRA weights merged."""
    return model.push_to_hub(
        trainer.hub_model_id,
        tokenizer=tokenizer,
        facts=training_facts(trainer),
        commit_message="End of training",
        revision=trainer.args.hub_revision,
        token=trainer.args.hub_token,
    )


def _is_adapter(model: Any) -> bool:
    return hasattr(model, "peft_config")


def check_padding(config: Any) -> None:
    """Raise ValueError for a decoder that stock classes and servers would read at another token than we do."""
    eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if config.disranker["role"] == "teacher" and config.pad_token_id in (None, *eos):
        raise ValueError(
            f"The model's pad_token_id is {config.pad_token_id} and its eos_token_id {config.eos_token_id}: stock "
            "loaders take the last token that is not padding, and would not read the end. Use prepare_tokenizer, "
            "resize the embeddings and set config.pad_token_id."
        )


def write_remote_code(folder: str | os.PathLike, name: str) -> None:
    """Add the modelling file to a saved ranker and name it in its config."""
    path = Path(folder, "config.json")
    config = json.loads(path.read_text(encoding="utf-8"))
    code = string.Template((TEMPLATES / "modeling_disranker.txt").read_text(encoding="utf-8"))
    Path(folder, MODELING_FILE).write_text(
        code.substitute(base=config["architectures"][0], name=name), encoding="utf-8"
    )
    config["auto_map"] = {"AutoModel": f"{MODELING_FILE.removesuffix('.py')}.{name}"}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    config: Any,
    *,
    private: bool | None = None,
    revision: str | None = None,
    facts: CardFacts | None = None,
    **options: Any,
) -> CommitInfo:
    """Publish a saved ranker: all its files in one commit, a card with them, no pickles.

    Args:
        folder: what `save_pretrained` wrote.
        repo_id: owner/name, or name alone for your own.
        config: the ranker's.
        private: None makes a new repository private if it is a teacher's.
        revision: branch, made if new; None for the main one.
        facts: for the card; None keeps a card that is there.
        options: `token`, `commit_message`, `create_pr`.

    Raises:
        PushError: the push was cut off.
    """
    api = HfApi(token=options.pop("token", None))
    if private is None and config.disranker["role"] == "teacher":
        private = True
    with pushing(api, repo_id, revision):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        if not Path(folder, "README.md").exists():
            card = _card_there(api, repo_id, revision) if facts is None else None
            (card or model_card(config, repo_id, facts)).save(Path(folder, "README.md"))
        # Loaders would put an adapter that was pushed on the way onto the merged weights once more.
        stale = [*_PICKLES, *([] if Path(folder, "adapter_config.json").exists() else ["adapter_*"])]
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=os.fspath(folder),
            revision=revision,
            commit_message=options.pop("commit_message", None) or f"Upload {config.disranker['role']}",
            ignore_patterns=_NOT_PUSHED,
            delete_patterns=stale,
            **options,
        )


def _card_there(api: HfApi, repo_id: str, revision: str | None) -> ModelCard | None:
    if not api.file_exists(repo_id, "README.md", revision=revision):
        return None
    return ModelCard.load(api.hf_hub_download(repo_id, "README.md", revision=revision))


@contextlib.contextmanager
def pushing(api: HfApi, repo_id: str, revision: str | None, repo_type: str = "model") -> Iterator[None]:
    """Turn whatever cuts a push off into a PushError that says what stands and what to do."""
    try:
        yield
    except Exception as error:  # of the transport, of the client, of the Hub
        wrong_call = isinstance(error, TypeError | ValueError | LookupError | AttributeError)
        if isinstance(error, PushError) or (wrong_call and not isinstance(error, HfHubHTTPError)):
            raise
        reason = str(error.__cause__ or error)
        shown = _without_token(reason, api.token)
        why = shown.splitlines()[0] if shown else type(error).__name__
        branch = revision or "main"
        try:
            head = api.repo_info(repo_id, revision=revision, repo_type=repo_type)
            stands = f"{branch} of {repo_id} stands at {head.sha} and loads as before"
        except Exception:  # unreachable, or never made
            stands = f"what {branch} of {repo_id} held before loads as before"
        hint = "check the token (`hf auth login`) and its right to write, then " if _refused(error) else ""
        raise PushError(
            f"The push to {repo_id} was cut off ({why}). A push is one commit, which was not made: {stands}. To "
            f"go on, {hint}push again; what was uploaded is not sent twice."
        ) from (error if shown == reason else None)  # a traceback shows the cause's text too


def _refused(error: Exception) -> bool:
    return isinstance(error, HfHubHTTPError) and getattr(error.response, "status_code", None) in (401, 403)


def _without_token(text: str, token: str | bool | None) -> str:
    secret = ((token if isinstance(token, str) else get_token()) or "").strip()
    return text.replace(secret, "***") if secret else text


def _explain(error: Exception, name: str | os.PathLike, kwargs: dict[str, Any]) -> None:
    """Raise in plain words what is known to be behind an error of transformers; return where nothing is."""
    if name is None:  # the weights were given
        return
    if isinstance(error, SafetensorError):
        raise OSError(
            f"The weights of {name} cannot be read ({error}): the file is cut off or damaged. Download it again, with "
            "force_download=True, or copy it again."
        ) from error
    if isinstance(error, RuntimeError) and "mismatch" in str(error):
        config = load_config(name, **{key: kwargs[key] for key in HUB_OPTIONS if key in kwargs})
        if config.num_labels != 1 and str(config.architectures).endswith("ForSequenceClassification']"):
            raise ValueError(
                f"{name} is a classifier with {config.num_labels} labels; a ranker has one score. To train a new head "
                f"on its layers, save them alone: AutoModel.from_pretrained({str(name)!r}).save_pretrained(FOLDER), "
                "with the tokenizer."
            ) from error
        raise ValueError(f"The weights of {name} do not fit what its config claims: {error}") from error
    files = _files(name, kwargs) if kwargs["use_safetensors"] and isinstance(error, OSError) else []
    pickles = [file for file in files if file.endswith((".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack"))]
    if pickles and not any(file.endswith(".safetensors") for file in files):
        raise OSError(
            f"{name} holds its weights as {pickles[0]} and not as safetensors. Refused, since reading a pickle can "
            "run code. If you trust it: load it with use_safetensors=False, and save_pretrained writes safetensors."
        ) from error
    explain_absence(name, error)


def _files(name: str | os.PathLike, kwargs: dict[str, Any]) -> list[str]:
    if os.path.isdir(name):
        return os.listdir(name)
    try:
        return HfApi(token=kwargs.get("token")).list_repo_files(os.fspath(name), revision=kwargs.get("revision"))
    except Exception:  # of the transport, of the client, of the Hub: the first error says more
        return []
