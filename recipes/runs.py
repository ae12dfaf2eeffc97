"""Run directories: resume a training run, save its model and record its options."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from datasets import IterableDataset
from fsspec.core import url_to_fs
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import get_last_checkpoint

from hf_disranker.data.files import beir_files
from hf_disranker.data.tables import parquet_files
from hf_disranker.models.card import model_card, training_facts
from hf_disranker.models.families import is_encoder
from hf_disranker.models.hub import TrainerHubMixin
from hf_disranker.models.loading import ranker_class, with_text_template
from hf_disranker.recipes.outputs import check_output_folder, json_in, save_json

logger = logging.getLogger(__name__)

_PACKAGES = ("hf_disranker", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "numpy")


def check_output_dir(training_args: TrainingArguments, model: str) -> None:
    """Raise ValueError if the output folder is that of the start model, or another stage or program wrote it.

    A stage recognizes its folder by run.json, with the class of its options, or by checkpoints of an interrupted run.
    """
    folder = Path(training_args.output_dir)
    if (folder / "run.json").is_file():
        record = json_in(folder / "run.json")
        is_ours = isinstance(record, dict) and type(training_args).__name__ in record.get("options", {})
    else:
        is_ours = (folder / "started.json").is_file() or any(folder.glob("checkpoint-*/trainer_state.json"))
    check_output_folder(folder, is_ours, [model])


def starting_config(
    config: PreTrainedConfig, model: str, student_layers: str | None, text_template: str | None
) -> PreTrainedConfig:
    """Return the config of a ranker to train, with its text template.

    Raises:
        ValueError: If its family is not supported, or has no use for one of the options.
    """
    if student_layers and not is_encoder(config.model_type):
        raise ValueError(f"--student_layers is for an encoder; {model} is a {config.model_type}.")
    ranker_class(config.model_type)
    return with_text_template(config, text_template) if text_template else config


def resume_point(output_dir: str) -> str | None:
    """Return the newest complete checkpoint in a folder, or None to start from scratch.

    Incomplete checkpoints of a killed run are removed: checkpoint rotation would count them as the newest.
    """
    while os.path.isdir(output_dir) and (checkpoint := get_last_checkpoint(output_dir)):
        if json_in(Path(checkpoint, "trainer_state.json")):  # written last
            logger.warning("Resuming from %s; remove it or choose another --out to start from scratch.", checkpoint)
            return checkpoint
        logger.warning("%s is incomplete, from a killed run: removed.", checkpoint)
        shutil.rmtree(checkpoint, ignore_errors=True)  # several processes may remove it at once
    return None


class _OneBar(ProgressCallback):
    """Progress bar of training without a bar for each evaluation in it."""

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        if self.training_bar is None:
            super().on_prediction_step(*args, **kwargs)


def report_data(stage: str, train_dataset: Any, eval_dataset: Any) -> None:
    """Log the size of the groups to train and evaluate on."""
    parts = [f"training on {_size(train_dataset)}"]
    parts.append(f"evaluating on {_size(eval_dataset)}" if eval_dataset is not None else "no evaluation")
    logger.info("%s: %s.", stage, ", ".join(parts))


def _size(groups: Any) -> str:
    if isinstance(groups, IterableDataset):
        return "a stream of queries"
    return f"{len(groups):,} queries with {sum(map(len, groups['doc_ids'])):,} documents"


def warn_shared_queries(train: Iterable[str], held_out: Iterable[str]) -> None:
    """Warn about evaluation queries that are also trained on, ignoring case and whitespace."""
    seen = set(map(_normalized, train))
    measured = {_normalized(query): query for query in held_out}
    shared = [query for spelling, query in measured.items() if spelling in seen]
    if shared:
        logger.warning(
            "%d of %d evaluation queries are also trained on, up to case and whitespace, first '%.100s': the measures "
            "will be too high. Split by query.strip().casefold().",
            len(shared),
            len(measured),
            shared[0],
        )


def _normalized(query: str) -> str:
    return " ".join(query.casefold().split())


def train(trainer: Any) -> dict[str, float]:
    """Train, resuming from the newest checkpoint, and return the evaluation measures; empty without an eval set."""
    if any(isinstance(callback, ProgressCallback) for callback in trainer.callback_handler.callbacks):
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(_OneBar)
    checkpoint = resume_point(trainer.args.output_dir)
    trainer.train(resume_from_checkpoint=checkpoint)
    if checkpoint and checkpoint.endswith(f"-{trainer.state.global_step}"):
        logger.warning("The run in %s was finished already: nothing was trained.", trainer.args.output_dir)
    return trainer.evaluate() if trainer.eval_dataset is not None else {}


def save_run(
    trainer: Any,
    arguments: Sequence[Any],
    sources: Mapping[str, str | None],
    measures: Mapping[str, float],
    next_step: str,
    measures_name: str = "eval.json",
) -> None:
    """Save the model, its measures and a record of the run on the main process; publish a ranker if asked to.

    `arguments` are the dataclasses of the recipe, `sources` the tables that were read, by name; `next_step` is the
    command to run next, for the log.
    """
    if not trainer.is_world_process_zero():
        return
    out, tokenizer = trainer.args.output_dir, trainer.processing_class
    model = save_model(trainer.accelerator.unwrap_model(trainer.model), tokenizer, out)
    if measures:
        save_json(measures, f"{out}/{measures_name}")
    save_record(out, arguments, sources)
    if isinstance(trainer, TrainerHubMixin):
        model_card(model.config, out, training_facts(trainer)).save(f"{out}/README.md")
    else:
        trainer.create_model_card()
    if trainer.args.push_to_hub and isinstance(trainer, TrainerHubMixin):
        model.push_to_hub(
            trainer.hub_model_id,
            tokenizer=tokenizer,
            facts=training_facts(trainer),
            commit_message="End of training",
            revision=trainer.args.hub_revision,
            token=trainer.args.hub_token,
        )
    if shown := _headline(measures):
        logger.info("Evaluation: %s.", shown)
    logger.info("Model saved to %s. Next: %s", out, next_step)


def _headline(measures: Mapping[str, float]) -> str:
    """Format the measures that are looked at first; empty if there are none."""
    names = ("eval_ndcg@10", "eval_pnr", "perplexity_before", "perplexity_after")
    found = {name.removeprefix("eval_").replace("_", " "): measures[name] for name in names if name in measures}
    return ", ".join(f"{name} {value:.4g}" for name, value in found.items())


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output_dir: str) -> PreTrainedModel:
    """Save model and tokenizer for stock loaders, with LoRA weights merged, and return the saved model."""
    if hasattr(model, "merge_and_unload"):
        model = _merged(model)
        for adapter in Path(output_dir).glob("adapter_*"):
            adapter.unlink()  # left by a push during training; loaders would apply it to the merged weights again
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return model


def _merged(model: PeftModel) -> PreTrainedModel:
    """Merge LoRA weights; 4-bit weights of QLoRA are dequantized first, so that the sum is not rounded."""
    if getattr(model.base_model.model, "hf_quantizer", None):
        config, weights = model.peft_config[model.active_adapter], get_peft_model_state_dict(model)
        model = PeftModel(model.unload().dequantize(), config)
        set_peft_model_state_dict(model, weights)
    return model.merge_and_unload()


def save_record(output_dir: str, arguments: Sequence[Any], sources: Mapping[str, str | None]) -> None:
    """Write run.json: resolved options without tokens, fingerprints of the tables, versions and git revision."""
    options = {
        type(part).__name__: part.to_dict() if hasattr(part, "to_dict") else dataclasses.asdict(part)
        for part in arguments
    }
    versions = {name: metadata.version(name) for name in _PACKAGES if importlib.util.find_spec(name)}
    data = {name: {"source": source, "fingerprint": fingerprint(source)} for name, source in sources.items() if source}
    record = {"options": options, "data": data, "packages": versions, "git": _git_revision()}
    save_json(record, f"{output_dir}/run.json", default=str)


def fingerprint(source: str) -> str | None:
    """Return a table's SHA-256 (a file, or a folder's parquet or BEIR files) or Hub commit; None if unknown."""
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
    except (HfHubHTTPError, HFValidationError, OSError):  # the model is trained: a missing commit is no reason to fail
        return None


def _git_revision() -> str | None:
    """Return the commit of the working directory, with a + if modified; None outside a repository."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
