"""What the recipes share: the command line, resuming and saving."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.util
import inspect
import json
import logging
import os
import shutil
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from trl import TrlParser

from hf_disranker.data.files import beir_files
from hf_disranker.data.outputs import check_output_folder, json_in
from hf_disranker.data.tables import parquet_files

logger = logging.getLogger(__name__)

_PACKAGES = ("hf_disranker", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "numpy")


def check_output_dir(training_args: TrainingArguments, model: str) -> None:
    """Refuse to train into the folder of the model that is trained, or of one that another stage or program made.

    A stage's own folder holds its run.json or, of a run that was cut off, checkpoints.

    Args:
        training_args: with the output_dir; their class says which stage it is.
        model: where training starts: folder or Hub id.

    Raises:
        ValueError: the folder is refused.
    """
    folder = Path(training_args.output_dir)
    if (folder / "run.json").is_file():
        record = json_in(folder / "run.json")
        is_ours = isinstance(record, dict) and type(training_args).__name__ in record.get("options", {})
    else:
        is_ours = (folder / "started.json").is_file() or any(folder.glob("checkpoint-*/trainer_state.json"))
    check_output_folder(folder, is_ours, [model])


def resume_point(output_dir: str) -> str | None:
    """The newest whole checkpoint in a folder, to go on from; None to start afresh.

    What a killed run left half written is removed: it would be taken for the newest one whenever old ones are cleaned
    up.
    """
    while os.path.isdir(output_dir) and (checkpoint := get_last_checkpoint(output_dir)):
        if _is_whole(checkpoint):
            logger.warning("Resuming from %s; remove it or choose another --output_dir to start afresh.", checkpoint)
            return checkpoint
        logger.warning("%s is half written, by a run that was killed: removed.", checkpoint)
        shutil.rmtree(checkpoint, ignore_errors=True)  # several processes come here
    return None


def _is_whole(checkpoint: str) -> bool:
    """Whether the state, which is written last, can be read."""
    try:
        return bool(json.loads(Path(checkpoint, "trainer_state.json").read_text()))
    except (OSError, ValueError):
        return False


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output_dir: str) -> PreTrainedModel:
    """Write model and tokenizer as any loader expects them; LoRA weights are merged into the model first.

    Returns:
        The model that was written.
    """
    if hasattr(model, "merge_and_unload"):
        model = _merged(model)
        for adapter in Path(output_dir).glob("adapter_*"):
            adapter.unlink()  # from a push on the way; loaders would put it on the merged weights once more
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return model


def _merged(model: PeftModel) -> PreTrainedModel:
    """The model with its LoRA weights merged in; QLoRA's 4-bit weights are widened first, else the sum is rounded."""
    if getattr(model.base_model.model, "hf_quantizer", None):
        config, weights = model.peft_config[model.active_adapter], get_peft_model_state_dict(model)
        model = PeftModel(model.unload().dequantize(), config)
        set_peft_model_state_dict(model, weights)
    return model.merge_and_unload()


def save_json(content: Any, path: str) -> None:
    """Write json for people and programs, making the folder; the file appears whole or not at all."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    beside = f"{path}.{uuid.uuid4().hex}.tmp"  # a name that nobody else has given
    with open(beside, "x", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")
    os.replace(beside, path)


def refuse_foreign(path: str | None, made_by: str) -> None:
    """Raise a ValueError if there is a file at the path of a json that this command did not write."""
    if path and os.path.exists(path):
        try:
            ours = json.loads(Path(path).read_text(encoding="utf-8"))["made_by"] == made_by
        except (OSError, ValueError, KeyError, TypeError):
            ours = False
        if not ours:
            raise ValueError(f"{path}: `{made_by}` did not write this file and does not overwrite it.")


def save_record(output_dir: str, arguments: Sequence[Any], sources: Mapping[str, str | None]) -> None:
    """Write run.json: every option as it was resolved, what was read, package versions and the git revision.

    Args:
        output_dir: where the model lies.
        arguments: the dataclasses of the recipe; tokens are left out.
        sources: the tables that were read, by name; those that are None are left out.
    """
    options = {
        type(part).__name__: part.to_dict() if hasattr(part, "to_dict") else dataclasses.asdict(part)
        for part in arguments
    }
    versions = {name: metadata.version(name) for name in _PACKAGES if importlib.util.find_spec(name)}
    data = {name: {"source": source, "fingerprint": fingerprint(source)} for name, source in sources.items() if source}
    record = {"options": options, "data": data, "packages": versions, "git": _git_revision()}
    save_json(json.loads(json.dumps(record, default=str)), f"{output_dir}/run.json")


def fingerprint(source: str) -> str | None:
    """SHA-256 of a local file or of a folder's parquet or BEIR files, the commit of a Hub data set; else None."""
    fs, path = url_to_fs(source)
    files = [path] if fs.isfile(path) else beir_files(source) or parquet_files(source)
    if "file" in fs.protocol and files:
        digest = hashlib.sha256()
        for name in files:
            with open(name, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()
    try:
        return HfApi().dataset_info(source).sha
    except (HfHubHTTPError, HFValidationError, OSError):  # the model stands; a name unknown to the Hub is no failure
        return None


def _git_revision() -> str | None:
    """Commit of the working folder, with a + when it was changed; None outside of a repository."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def recipe_parser(stage: str, description: str | None, *arguments: type) -> TrlParser:
    """The command line of a recipe: the fields of dataclasses, a YAML file by --config, the command line winning.

    Its help has a group for each dataclass, ours before those of the libraries.
    """
    parser = TrlParser(
        arguments,
        prog=f"disranker {stage}",
        usage=f"disranker {stage} [--config FILE.yaml] [--option value ...]",
        description=description,
        formatter_class=_Formatter,
    )
    bases = dict.fromkeys(base for kind in arguments for base in kind.__mro__ if inspect.get_annotations(base))
    owner = {name: base for base in reversed(bases) for name in inspect.get_annotations(base)}
    options = parser._optionals._group_actions
    for base in sorted(bases, key=lambda base: not _is_ours(base)):
        title = (
            (base.__doc__ or "").split("\n")[0].rstrip(".")
            if _is_ours(base)
            else f"{base.__name__} of {_package(base)}"
        )
        group = parser.add_argument_group(title)
        group._group_actions += [action for action in options if owner.get(action.dest) is base]
    options[:] = [action for action in options if action.dest not in owner]
    return parser


def _package(kind: type) -> str:
    return kind.__module__.split(".")[0]


def _is_ours(kind: type) -> bool:
    return _package(kind) in ("hf_disranker", "recipes", "__main__")


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the line breaks of the description and shows defaults."""
