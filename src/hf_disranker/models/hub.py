"""Safe loading of rankers, and atomic pushes to the Hub."""

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

from hf_disranker.models.card import TEMPLATES, CardFacts, model_card, training_facts
from hf_disranker.models.checkpoint import LABEL_EXPECTATION, explain_failure
from hf_disranker.models.checks import check_weights

MODELING_FILE = "modeling_disranker.py"
# Loading a pickle can run code, and training_args.bin may contain secrets.
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
_NOT_PUSHED = [*_PICKLES, "_*", "checkpoint-*"]


class PushError(OSError):
    """Failed push; the message names the revision on the Hub and what to do."""


class TokenFreeArguments:
    """Training arguments without the token in their pickle, which Trainer writes into checkpoints and pushes."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "hub_token": None}


class RankerHubMixin:
    """Loading, saving and pushing of a ranker; mix it in before the class of transformers."""

    config: Any

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """Load as transformers does, but from safetensors only; `use_safetensors=False` accepts pickles.

        Raises:
            OSError: If there is no such folder or Hub repository, or the weights are pickles or damaged.
            ValueError: If weights other than a new head are missing, or do not fit the config.
        """
        name = pretrained_model_name_or_path
        kwargs.setdefault("use_safetensors", True)
        try:
            model, info = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        except Exception as error:  # many kinds, by version and by source
            explain_failure(error, name, kwargs)
            raise
        if model.was_marked and any(not key.startswith(f"{model.base_model_prefix}.") for key in info["missing_keys"]):
            raise ValueError(
                f"{name} is no trained ranker: it lacks {sorted(info['missing_keys'])[:4]}, which its config claims."
            )
        check_weights(name, info, None if model.config.marker.head == LABEL_EXPECTATION else model.base_model_prefix)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save as transformers does; `push_to_hub=True` pushes by the method `push_to_hub`."""
        hub = {key: kwargs.pop(key) for key in ("repo_id", "private", "revision", "commit_message") if key in kwargs}
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        if push_to_hub:
            repo_id = hub.pop("repo_id", os.path.basename(os.fspath(save_directory).rstrip("/")))
            self.push_to_hub(repo_id, token=kwargs.get("token"), **hub)

    def push_to_hub(  # noqa: PLR0913
        self,
        repo_id: str,
        *,
        tokenizer: Any = None,
        remote_code: bool = False,
        facts: CardFacts | None = None,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        token: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "50GB",
    ) -> CommitInfo:
        """Push the model in one commit.

        Args:
            repo_id: Hub id, owner/name, or the name alone for your own account.
            tokenizer: Tokenizer to push in the same commit.
            remote_code: If True, add a self-contained modelling file, so that `AutoModel` with
                `trust_remote_code=True` returns the ranker without this package.
            facts: Facts for the model card; None keeps an existing card.
            private: Visibility of a new repository; None for private teachers and the account's default for students.
            revision: Branch, created if it does not exist.
            commit_message: Message of the commit.
            token: Token for the Hub.
            create_pr: If True, open a pull request.
            max_shard_size: As in `save_pretrained`.

        Raises:
            PushError: If the push fails.
            ValueError: If a teacher pads with its end-of-sequence token, so that stock loaders would misread it.
        """
        check_padding(self.config)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            if remote_code:
                write_remote_code(folder, type(self).__name__)
            return push_folder(
                folder,
                repo_id,
                self.config,
                private=private,
                revision=revision,
                facts=facts,
                commit_message=commit_message,
                token=token,
                create_pr=create_pr,
            )


class TrainerHubMixin:
    """Pushing from a trainer of rankers; mix it in before the class of transformers."""

    args: Any
    model: Any
    hub_model_id: str | None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository as `Trainer` does; a teacher's is private unless `hub_private_repo` is False."""
        teacher = self.model.config.marker.role == "teacher"
        # By the arguments: transformers 5.19 has no parameter `private` here.
        if private is not None or (self.args.hub_private_repo is None and teacher):
            self.args.hub_private_repo = True if private is None else private
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        with pushing(HfApi(token=token or self.args.hub_token), name, self.args.hub_revision):
            super().init_hf_repo(token=token)  # type: ignore[misc]

    def create_model_card(self, model_name: str | None = None, results: Sequence[Any] = (), **_: Any) -> None:
        """Write README.md into the output folder.

        Args:
            model_name: Title if the model has no repository.
            results: Measures of baselines, as in `CardFacts`; those of the trained model precede them.
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
        """Save and push model, tokenizer and card; call it on every process.

        Args:
            commit_message: Message of the commit.
            results: As in `create_model_card`.
            remote_code: As in `RankerHubMixin.push_to_hub`.
            private: Visibility of a new repository; None for `hub_private_repo`, and private for a teacher.
            revision: Branch; None for `hub_revision`.
            token: Token for the Hub; None for `hub_token`.

        Raises:
            PushError: If the push fails; the output folder contains the whole model.
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
    """Push the model that a recipe saved, LoRA weights merged, to its trainer's repository."""
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
    """Raise ValueError for a teacher whose last token stock loaders and servers would not find."""
    eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if config.marker.role == "teacher" and config.pad_token_id in (None, *eos):
        raise ValueError(
            f"The model's pad_token_id is {config.pad_token_id} and its eos_token_id {config.eos_token_id}: stock "
            "loaders read the last token that is not padding, so they would miss the end. Use prepare_tokenizer, "
            "resize the embeddings and set config.pad_token_id."
        )


def write_remote_code(folder: str | os.PathLike, name: str) -> None:
    """Add the modelling file to a saved ranker and to its config."""
    path = Path(folder, "config.json")
    config = json.loads(path.read_text(encoding="utf-8"))
    code = string.Template((TEMPLATES / "modeling_disranker.txt").read_text(encoding="utf-8"))
    Path(folder, MODELING_FILE).write_text(
        code.substitute(base=config["architectures"][0], name=name), encoding="utf-8"
    )
    config["auto_map"] = {"AutoModel": f"{MODELING_FILE.removesuffix('.py')}.{name}"}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def push_folder(  # noqa: PLR0913
    folder: str | os.PathLike,
    repo_id: str,
    config: Any,
    *,
    private: bool | None = None,
    revision: str | None = None,
    facts: CardFacts | None = None,
    commit_message: str | None = None,
    token: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Push a saved ranker: all files and a card in one commit, no pickles.

    Args:
        folder: Folder of `save_pretrained`.
        repo_id: Hub id, owner/name, or the name alone for your own account.
        config: Config of the ranker.
        private: Visibility of a new repository; None for private teachers.
        revision: Branch, created if it does not exist; None for the main branch.
        facts: Facts for the card; None keeps an existing card.
        commit_message: Message of the commit.
        token: Token for the Hub.
        create_pr: If True, open a pull request.

    Raises:
        PushError: If the push fails.
    """
    api = HfApi(token=token)
    if private is None and config.marker.role == "teacher":
        private = True
    with pushing(api, repo_id, revision):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        if not Path(folder, "README.md").exists():
            card = _card_there(api, repo_id, revision) if facts is None else None
            (card or model_card(config, repo_id, facts)).save(Path(folder, "README.md"))
        # Loaders would apply an adapter that was pushed during training to the merged weights again.
        stale = [*_PICKLES, *([] if Path(folder, "adapter_config.json").exists() else ["adapter_*"])]
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=os.fspath(folder),
            revision=revision,
            commit_message=commit_message or f"Upload {config.marker.role}",
            ignore_patterns=_NOT_PUSHED,
            delete_patterns=stale,
            create_pr=create_pr,
        )


def _card_there(api: HfApi, repo_id: str, revision: str | None) -> ModelCard | None:
    if not api.file_exists(repo_id, "README.md", revision=revision):
        return None
    return ModelCard.load(api.hf_hub_download(repo_id, "README.md", revision=revision))


@contextlib.contextmanager
def pushing(api: HfApi, repo_id: str, revision: str | None, repo_type: str = "model") -> Iterator[None]:
    """Turn any failure of a push into a PushError that names the revision on the Hub and what to do."""
    try:
        yield
    except Exception as error:  # from transport, client or Hub
        wrong_call = isinstance(error, TypeError | ValueError | LookupError | AttributeError)
        if isinstance(error, PushError) or (wrong_call and not isinstance(error, HfHubHTTPError)):
            raise
        reason = str(error.__cause__ or error)
        shown = _without_token(reason, api.token)
        why = shown.splitlines()[0] if shown else type(error).__name__
        branch = revision or "main"
        try:
            head = api.repo_info(repo_id, revision=revision, repo_type=repo_type)
            state = f"{branch} of {repo_id} is at {head.sha} and loads as before"
        except Exception:  # unreachable or missing
            state = f"the previous content of {branch} of {repo_id} loads as before"
        hint = "check the token (`hf auth login`) and its right to write, then " if _refused(error) else ""
        raise PushError(
            f"The push to {repo_id} failed ({why}). A push is one commit, which was not made: {state}. "
            f"To continue, {hint}push again; uploaded files are not sent twice."
        ) from (error if shown == reason else None)  # a traceback shows the text of the cause as well


def _refused(error: Exception) -> bool:
    return isinstance(error, HfHubHTTPError) and getattr(error.response, "status_code", None) in (401, 403)


def _without_token(text: str, token: str | bool | None) -> str:
    secret = ((token if isinstance(token, str) else get_token()) or "").strip()
    return text.replace(secret, "***") if secret else text
