"""What the recipes share: the command line, resuming, saving, and running one as a stage of a longer run."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import shutil
import time
import timeit
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import get_last_checkpoint
from trl import TrlParser

logger = logging.getLogger(__name__)


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
        model = model.merge_and_unload()
        for adapter in Path(output_dir).glob("adapter_*"):
            adapter.unlink()  # from a push on the way; loaders would put it on the merged weights once more
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return model


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


def run_recipe(folder: Path, recipe: str, arguments: list[str], passing: list[str]) -> None:
    """Run a recipe as a stage of a longer run, unless it has finished before.

    Args:
        folder: the stage's; `finished.json` in it tells what ran.
        recipe: name of a module of `hf_disranker.recipes`.
        arguments: its command line, beginning with `--config FILE`. When they or the file change, the stage runs again
            from its beginning.
        passing: further arguments that change nothing about the result's meaning, such as the precision.
    """
    run = {"recipe": recipe, "arguments": arguments, "config": Path(arguments[1]).read_text()}
    finished = folder / "finished.json"
    if finished.exists() and json.loads(finished.read_text()).items() >= run.items():
        print(f"\n== {folder}: finished before, skipped", flush=True)
        return
    print(f"\n== {folder}: disranker {recipe} {' '.join(arguments)}", flush=True)
    started = folder / "started.json"
    if not started.exists() or json.loads(started.read_text()) != run:
        # Checkpoints of other options are no point to go on from.
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        save_json(run, str(started))
    begin = time.perf_counter()
    module = importlib.import_module(f"hf_disranker.recipes.{recipe}")
    module.main(*module.make_parser().parse_args_and_config(arguments + passing))
    save_json({**run, "seconds": round(time.perf_counter() - begin, 1)}, str(finished))


def fast_precision() -> list[str]:
    """Options that train in bf16 where the CPU multiplies clearly faster in it, else not; none where a GPU is."""
    if torch.accelerator.is_available():
        return []
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.randn(1024, 1024).to(dtype)
        seconds[dtype] = min(timeit.repeat("matrix @ matrix", globals={"matrix": matrix}, number=1, repeat=5))
    faster = 1.5 * seconds[torch.bfloat16] < seconds[torch.float32]
    return ["--bf16", "true", "--use_cpu", "true"] if faster else ["--bf16", "false"]
