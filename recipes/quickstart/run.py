"""Run all stages on real text, from random weights: search over the Python documentation installed on this machine.

    disranker quickstart

A small language model is pre-trained briefly on clicks, then fine-tuned on clicks and a few judgments. It scores many
unlabelled pairs, and a small BERT is trained on the scores. Two baselines show the effect: the same BERT trained on
the judgments alone, and on clicks and judgments, the teacher's own training data. Each stage runs the recipe of that
name with a config from configs/quickstart and writes its output to a log file; finished stages are skipped.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TextIO

from hf_disranker.recipes.command_line import RecipeParser, recipe_parser, run_stage
from hf_disranker.recipes.outputs import json_in

CONFIGS = Path(__file__).parents[1] / "configs"


@dataclass(frozen=True)
class Preset:
    """Configs, size and base checkpoints of a quickstart; without checkpoints small models are built from the texts.

    Args:
        configs: Folder with a config for each stage.
        sizes: Numbers of judged queries, unlabelled queries, documents of an unlabelled query and development queries,
            with commas.
        decoder: Base language model.
        bert: Base model of the student.
    """

    configs: Path
    sizes: str
    decoder: str | None = None
    bert: str | None = None


PRESETS = {
    "tiny": Preset(CONFIGS / "quickstart", "1500,3000,5,500"),
    "hub": Preset(
        CONFIGS / "quickstart_hub",
        "1500,8000,7,1000",
        decoder="Qwen/Qwen3-0.6B-Base",
        bert="sentence-transformers/all-MiniLM-L6-v2",
    ),
}


@dataclass
class QuickstartArguments:
    """Arguments of the quickstart."""

    out: str = field(default="runs/quickstart", metadata={"help": "Folder for data, models, scores, logs and report."})
    preset: Literal["tiny", "hub"] = field(
        default="tiny",
        metadata={
            "help": "tiny: small models from random weights, on two CPU cores. hub: pre-trained LLM and BERT, on GPU."
        },
    )
    configs: str | None = field(
        default=None, metadata={"help": "Folder with a config for each stage; by default that of the preset."}
    )
    decoder: str | None = field(
        default=None, metadata={"help": "Base LLM: folder or Hub id; by default that of the preset."}
    )
    bert: str | None = field(
        default=None, metadata={"help": "Base model of the student: folder or Hub id; by default that of the preset."}
    )
    seed: int = field(default=0, metadata={"help": "Seed for weight initialisation and training order."})


@dataclass(frozen=True)
class Stage:
    """A stage of the quickstart.

    Args:
        name: Folder of its output and name of its log file.
        recipe: Module in `hf_disranker.recipes`, or name of a function in `quickstart.stages`.
        purpose: What it does, for the line on the console.
        needs: Stages whose output it reads; it runs again after them.
        options: Command line of the recipe, beginning with `--config FILE`, or numbers for the function; names in
            braces are filled in by `plan`.
    """

    name: str
    recipe: str
    purpose: str
    needs: tuple[str, ...]
    options: tuple[str, ...]


def _stage(name: str, recipe: str, purpose: str, needs: str, options: str) -> Stage:
    return Stage(name, recipe, purpose, tuple(needs.split()), tuple(options.split()))


STAGES = (
    _stage("data", "data", "search over the Python documentation of this machine", "", "{sizes}"),
    _stage("base", "base", "vocabularies and initial weights from the texts", "data", "{seed}"),
    _stage(
        "cpt",
        "cpt",
        "1   LLM: pre-train on clicks",
        "data base",
        "--config {configs}/cpt.yaml --model {decoder} --clicks {data}/click_log.parquet "
        "--eval_clicks {data}/heldout_clicks.parquet --out {out}/cpt --seed {seed}",
    ),
    _stage(
        "teacher",
        "fit_teacher",
        "2   LLM: learn to rank from clicks and judgments",
        "data cpt",
        "--config {configs}/teacher.yaml --model {out}/cpt --judgments {sample}/clicks_and_labels.parquet "
        "--out {out}/teacher --seed {seed}",
    ),
    _stage(
        "scores",
        "score",
        "3a  LLM: score unlabelled pairs",
        "data teacher",
        "--config {configs}/score.yaml --model {out}/teacher --pairs {sample}/unlabelled.parquet --out {out}/scores",
    ),
    _stage(
        "student",
        "distill",
        "3b  BERT: learn the scores",
        "base scores",
        "--config {configs}/distill.yaml --model {bert} --scores {out}/scores --out {out}/student --seed {seed}",
    ),
    _stage(
        "label_student",
        "fit_teacher",
        "    baseline: BERT on the judgments alone",
        "data base",
        "--config {configs}/fit_student.yaml --model {bert} --judgments {sample}/labels.parquet "
        "--out {out}/label_student --seed {seed}",
    ),
    _stage(
        "click_student",
        "fit_teacher",
        "    baseline: BERT on clicks and judgments",
        "data base",
        "--config {configs}/fit_student.yaml --model {bert} --judgments {sample}/clicks_and_labels.parquet "
        "--out {out}/click_student --seed {seed}",
    ),
    _stage(
        "report",
        "report",
        "4   all of them on the same development queries",
        "data cpt teacher student label_student click_student",
        "",
    ),
)


def make_parser() -> RecipeParser:
    """Return the argument parser of the quickstart."""
    return recipe_parser("quickstart", __doc__, QuickstartArguments)


def main(args: QuickstartArguments) -> None:
    """Run all unfinished stages with a line for each, then print the results."""
    out, begin = Path(args.out), time.perf_counter()
    stages = plan(args)
    check_folder(out, stages)
    if not all(is_finished(out, stage) for stage in stages):
        print(f"{len(stages)} stages into {out}/, with a log of each in {out}/logs/", flush=True)
        # Only now torch is imported: a finished run answers at once.
        work = importlib.import_module("hf_disranker.recipes.quickstart.stages")
        for number, stage in enumerate(stages, 1):
            print(f"{number}/{len(stages)} {stage.name:13} {stage.purpose:64}", end="", flush=True)
            print(run_logged(work, out, stage), flush=True)
        print(f"{(time.perf_counter() - begin) / 60:.1f} minutes in all")
    print("\n" + (out / "report" / "results.txt").read_text(encoding="utf-8"))
    print(f"All stages are finished. Use another --out or --seed, or, to repeat a stage, remove {out}/STAGE.")


def run_logged(work: Any, out: Path, stage: Stage) -> str:
    """Run a stage unless it is finished, its output in a log file; return the end of its line."""
    if is_finished(out, stage):
        return "    done"
    begin, log = time.perf_counter(), out / "logs" / f"{stage.name}.log"
    try:
        with output_to(log):
            work.run_stage(out, stage)
    except BaseException:
        print(f"  stopped, see {log}", flush=True)
        raise
    return f"{time.perf_counter() - begin:6.0f} s"


def plan(args: QuickstartArguments) -> list[Stage]:
    """Return the stages in order, with their options."""
    preset, out = PRESETS[args.preset], Path(args.out)
    decoder, bert = args.decoder or preset.decoder, args.bert or preset.bert
    names = {stage.name for stage in STAGES} - ({"base"} if decoder and bert else set())
    given: dict[str, object] = {"configs": args.configs or preset.configs, "seed": args.seed, "out": out}
    given |= {"data": out / "data", "sample": out / "data" / "sample", "sizes": preset.sizes}
    given |= {"decoder": decoder or out / "base" / "decoder", "bert": bert or out / "base" / "bert"}
    return [
        replace(
            stage,
            needs=tuple(name for name in stage.needs if name in names),
            options=tuple(option.format_map(given) for option in stage.options),
        )
        for stage in STAGES
        if stage.name in names
    ]


def check_folder(out: Path, stages: list[Stage]) -> None:
    """Raise ValueError if the folder contains stage folders that no quickstart created."""
    folders = [out / stage.name for stage in stages if stage.name != "data"]
    foreign = [folder for folder in folders if folder.exists() and not (folder / "started.json").exists()]
    if foreign and not (out / "data" / "manifest.json").is_file():
        raise ValueError(f"{foreign[0]} exists and was not created by a quickstart: choose another --out.")


def is_finished(out: Path, stage: Stage) -> bool:
    """Return whether a stage has run with its arguments, its config and the current output of the stages it needs."""
    return has_finished(out / stage.name, record(stage.recipe, stage.options, inputs(out, stage)))


def inputs(out: Path, stage: Stage) -> dict[str, object]:
    """Return when each stage that this one needs has finished, None if it has not."""
    return {name: (json_in(out / name / "finished.json") or {}).get("at") for name in stage.needs}


def record(recipe: str, arguments: Sequence[str], after: Mapping[str, object]) -> dict[str, Any]:
    """Describe a run: recipe, command line, text of the config, and the runs whose output it reads."""
    config = Path(arguments[1]).read_text() if "--config" in arguments[:1] else ""
    return {"recipe": recipe, "arguments": list(arguments), "config": config, "after": dict(after)}


def has_finished(folder: Path, run: Mapping[str, Any]) -> bool:
    """Return whether the run described has finished in a folder."""
    found = json_in(folder / "finished.json") or {}
    return all(found.get(key) == value for key, value in run.items())


@contextlib.contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Append what is printed and logged to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    console = (sys.stderr, sys.stdout)
    with open(path, "a", encoding="utf-8") as log:
        try:
            _move_handlers(console, log)
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                yield
        finally:
            _move_handlers((log,), console[0])


def _move_handlers(streams: tuple[TextIO, ...], to: TextIO) -> None:
    """Let handlers of all loggers that write to one of the streams write to another; libraries bring their own."""
    loggers = (one for one in logging.root.manager.loggerDict.values() if isinstance(one, logging.Logger))
    for handler in (handler for logger in (logging.root, *loggers) for handler in logger.handlers):
        if type(handler) is logging.StreamHandler and handler.stream in streams:
            handler.setStream(to)


if __name__ == "__main__":
    run_stage("quickstart", make_parser, main)
