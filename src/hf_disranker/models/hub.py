"""Atomic pushes to the Hub, by one commit."""

from __future__ import annotations

import contextlib
import json
import os
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError

from hf_disranker.models.card import TEMPLATES, CardFacts, model_card, training_facts

MODELING_FILE = "modeling_disranker.py"
# Loading a pickle can run code, and training_args.bin may contain secrets.
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
_NOT_PUSHED = [*_PICKLES, "_*", "checkpoint-*"]


class PushError(OSError):
    """Failed push; the message names the revision on the Hub and what to do."""


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

        `model_name` is the title if the model has no repository; `results` are measures of baselines, as in
        `CardFacts`, after those of the trained model.
        """
        if self.is_world_process_zero():  # type: ignore[attr-defined]
            repo_id = self.hub_model_id or model_name or Path(self.args.output_dir).name
            adapter = hasattr(self.model, "peft_config")
            card = model_card(self.model.config, repo_id, training_facts(self, results), adapter)
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
        """Save and push model, tokenizer and card in one commit; call it on every process.

        Arguments as in `Trainer.push_to_hub`, `create_model_card` (`results`) and `PreTrainedRanker.push_to_hub`
        (`remote_code`). A new repository is private if `hub_private_repo` says so, and by default for a teacher.

        Raises:
            PushError: If the push fails; the output folder contains the whole model.
        """
        trainer: Any = self
        token = token or self.args.hub_token
        if not hasattr(self.model, "peft_config"):
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
        revision, repo_id = revision or self.args.hub_revision, str(self.hub_model_id)
        options: dict[str, Any] = {"revision": revision, "commit_message": commit_message, "token": token}
        return push_folder(self.args.output_dir, repo_id, self.model.config, **options)


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


def push_folder(
    folder: str | os.PathLike, repo_id: str, config: Any, facts: CardFacts | None = None, **options: Any
) -> CommitInfo:
    """Push a folder of `save_pretrained`: all files and a card in one commit, no pickles.

    `config` is that of the ranker; other arguments and errors as in `PreTrainedRanker.push_to_hub`.
    """
    api, private = HfApi(token=options.pop("token", None)), options.pop("private", None)
    revision = options.get("revision")
    if private is None and config.marker.role == "teacher":
        private = True
    with pushing(api, repo_id, revision):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        if not Path(folder, "README.md").exists():
            if facts is None and api.file_exists(repo_id, "README.md", revision=revision):
                card = ModelCard.load(api.hf_hub_download(repo_id, "README.md", revision=revision))
            else:
                card = model_card(config, repo_id, facts)
            card.save(Path(folder, "README.md"))
        # Loaders would apply an adapter that was pushed during training to the merged weights again.
        stale = [*_PICKLES, *([] if Path(folder, "adapter_config.json").exists() else ["adapter_*"])]
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=os.fspath(folder),
            ignore_patterns=_NOT_PUSHED,
            delete_patterns=stale,
            **options,
        )


@contextlib.contextmanager
def pushing(api: HfApi, repo_id: str, revision: str | None, repo_type: str = "model") -> Iterator[None]:
    """Turn any failure of a push into a PushError that names the revision on the Hub and what to do."""
    try:
        yield
    except Exception as error:  # from transport, client or Hub
        wrong_call = isinstance(error, TypeError | ValueError | LookupError | AttributeError)
        if isinstance(error, PushError) or (wrong_call and not isinstance(error, HfHubHTTPError)):
            raise
        reason, branch = str(error.__cause__ or error), revision or "main"
        secret = ((api.token if isinstance(api.token, str) else get_token()) or "").strip()
        shown = reason.replace(secret, "***") if secret else reason
        why = shown.splitlines()[0] if shown else type(error).__name__
        try:
            head = api.repo_info(repo_id, revision=revision, repo_type=repo_type)
            state = f"{branch} of {repo_id} is at {head.sha} and loads as before"
        except Exception:  # unreachable or missing
            state = f"the previous content of {branch} of {repo_id} loads as before"
        refused = isinstance(error, HfHubHTTPError) and getattr(error.response, "status_code", None) in (401, 403)
        hint = "check the token (`hf auth login`) and its right to write, then " if refused else ""
        raise PushError(
            f"The push to {repo_id} failed ({why}). A push is one commit, which was not made: {state}. "
            f"To continue, {hint}push again; uploaded files are not sent twice."
        ) from (error if shown == reason else None)  # a traceback shows the text of the cause as well
