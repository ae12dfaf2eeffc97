"""What the recipes share: resuming, and the json beside a result."""

from __future__ import annotations

import argparse
import json
import logging
import os
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import get_last_checkpoint
from trl import TrlParser

logger = logging.getLogger(__name__)


def resume_point(output_dir: str) -> str | None:
    """The newest checkpoint in a folder, to go on from; None to start afresh."""
    checkpoint = get_last_checkpoint(output_dir) if os.path.isdir(output_dir) else None
    if checkpoint:
        logger.warning("Resuming from %s; remove it or choose another --output_dir to start afresh.", checkpoint)
    return checkpoint


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output_dir: str) -> None:
    """Write model and tokenizer as any loader expects them; LoRA weights are merged into the model first."""
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


def save_json(content: Any, path: str) -> None:
    """Write json for people and programs, making the folder; the file appears whole or not at all."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")
    os.replace(f"{path}.tmp", path)


def recipe_parser(stage: str, description: str | None, *arguments: type) -> TrlParser:
    """The command line of a recipe: the fields of dataclasses, a YAML file by --config, the command line winning."""
    return TrlParser(
        arguments,
        prog=f"disranker {stage}",
        usage=f"disranker {stage} [--config FILE.yaml] [--option value ...]",
        description=description,
        formatter_class=_Formatter,
    )


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the line breaks of the description and shows defaults."""
