"""Distil a pretrained language model, SmolLM2-135M, into BERTs that search the Python documentation of this machine.

    disranker showcase                                        # three seeds of a BERT of 0.8M parameters
    disranker showcase --students bert minilm3 minilm         # all-MiniLM-L6-v2 too: first `make models`

The teacher scores a pair by the probability of the query after the document, without training. Its scores are
shipped, without texts, and joined with the documentation installed here; changed texts are left out and counted. After
`make models` a sample is scored again and compared, and the teacher's speed is measured. A student learns from the
scores and, in the same batches, from clicks and labels; its rival is the same model trained on the same clicks and
labels alone. Finished stages are skipped.
"""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch

from hf_disranker.data.tables import read_table
from hf_disranker.recipes.command_line import RecipeParser, recipe_parser, run_stage
from hf_disranker.recipes.outputs import json_in, save_json
from hf_disranker.recipes.quickstart import from_scratch
from hf_disranker.recipes.quickstart.stages import MAX_LENGTH, fast_precision, make_data, run_recipe
from hf_disranker.recipes.showcase.models import MODELS
from hf_disranker.recipes.showcase.results import examine_teacher, show_results
from hf_disranker.recipes.showcase.shipped import SHIPPED, as_store, join
from hf_disranker.scoring.store import ScoreStore

CONFIGS = Path(__file__).parents[1] / "configs" / "showcase"
# Folder, recipe and arguments of one stage.
Stage = tuple[Path, str, list[str]]


@dataclass(frozen=True)
class Student:
    """A model to distil into.

    Args:
        config: First part of the names of its configs.
        base: Folder of its start in the folder of models; None for random weights.
        layers: Encoder layers to keep; None for all.
    """

    config: str
    base: str | None = None
    layers: str | None = None


STUDENTS = {
    "bert": Student("bert"),
    "minilm3": Student("minilm", "minilm", "0,2,4"),
    "minilm": Student("minilm", "minilm"),
}


@dataclass
class ShowcaseArguments:
    """Students, seeds and folders."""

    students: list[str] = field(
        default_factory=lambda: ["bert"],
        metadata={"help": "bert: 0.8M parameters, from random weights. minilm, minilm3: 6 and 3 layers of MiniLM."},
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of each student."})
    out: str = field(default="runs/showcase", metadata={"help": "Folder for data, models and report."})
    models: str = field(default=str(MODELS), metadata={"help": "Folder of `make models`."})
    shipped: str | None = field(default=None, metadata={"help": "Folder of packed scores; default: those shipped."})
    configs: str | None = field(default=None, metadata={"help": "Folder of configs; default: those of the package."})
    workers: int | None = field(
        default=None, metadata={"help": "Models trained at the same time; default: one on each core."}
    )


def make_parser() -> RecipeParser:
    """Return the argument parser of the showcase."""
    return recipe_parser("showcase", __doc__, ShowcaseArguments)


def main(args: ShowcaseArguments) -> None:
    """Run all unfinished stages, then show the results."""
    begin = time.perf_counter()
    out, shipped = Path(args.out), Path(args.shipped or SHIPPED)
    check(args)
    make_data(out / "data")
    forget_finished(out, [out / "data" / "manifest.json", shipped / "scores.parquet"])
    make_scores(out, shipped)
    teacher = examine_teacher(out, Path(args.models, "smollm2"))
    print(teacher.verdict, flush=True)
    precision = fast_precision()
    stages = [stage for name in args.students for seed in args.seeds for stage in training_stages(args, name, seed)]
    train(stages, precision, max(1, min(args.workers or cores(), len(stages))))
    show_results(out, args.students, args.seeds, teacher)
    print(f"\nDone in {(time.perf_counter() - begin) / 60:.1f} minutes. Everything is in {out}/.")


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check(args: ShowcaseArguments) -> None:
    """Raise ValueError if a student is unknown, its model is missing, or the folder is that of something else."""
    if unknown := [name for name in args.students if name not in STUDENTS]:
        raise ValueError(f"There is no student {unknown[0]!r}; there are: {', '.join(STUDENTS)}.")
    for name in args.students:
        base = STUDENTS[name].base
        if base and not Path(args.models, base, "config.json").is_file():
            raise ValueError(f"The student {name} needs {args.models}/{base}, which `make models` downloads.")
    out = Path(args.out)
    if {path.name for path in out.glob("*")} - {"data"} and not (out / "data" / "manifest.json").is_file():
        raise ValueError(f"{out} is not empty and was not made by the showcase: choose another --out.")


def forget_finished(out: Path, inputs: Sequence[Path]) -> None:
    """Restart all stages if an input has changed since the last call."""
    now = [hashlib.sha256(path.read_bytes()).hexdigest() for path in inputs]
    if json_in(out / "inputs.json") != now:
        for record in [*out.glob("*/finished.json"), *out.glob("*/started.json")]:
            record.unlink()
        save_json(now, str(out / "inputs.json"))


def make_scores(out: Path, shipped: Path) -> tuple[ScoreStore, ScoreStore]:
    """Join the shipped scores with the texts here: `scores` to train on, `dev_scores` of the development queries."""
    names = ("judgments", "candidates", "clicks")
    tables = {name: read_table(f"{out}/data/{name}.parquet", name, texts=False) for name in names}
    queries = pd.concat([table[["query_id", "query"]] for table in tables.values() if "query_id" in table])
    found = join(shipped, queries, read_table(f"{out}/data/corpus.parquet", "corpus"))
    judgments = tables["judgments"]
    dev = found.rows["query_id"].isin(judgments.loc[judgments["split"] == "dev", "query_id"])
    print(
        f"\n== scores: {(~dev).sum():,} pairs of SmolLM2 to train on, {dev.sum():,} of development queries; "
        f"{found.left_out:,} left out, since their texts are not the same here",
        flush=True,
    )
    if not (dev.any() and (~dev).any()):
        raise ValueError(f"{shipped} has no scores of the texts here: make them with `make showcase-scores`.")
    return as_store(found.rows[~dev], shipped, out / "scores"), as_store(found.rows[dev], shipped, out / "dev_scores")


def training_stages(args: ShowcaseArguments, name: str, seed: int) -> Iterator[Stage]:
    """Yield the stages of a student: with clicks and labels, by the scores alone, and the rival without a teacher."""
    student, out, data = STUDENTS[name], Path(args.out), Path(args.out, "data")
    base = str(Path(args.models, student.base)) if student.base else str(make_bert(out, seed))
    cut = ["--student_layers", student.layers] if student.layers else []
    scores, labels = ["--scores", str(out / "scores")], str(data / "clicks_and_labels.parquet")

    def stage(kind: str, recipe: str, *options: str) -> Stage:
        folder = out / f"{name}-{kind}-{seed}"
        to = ["--model", base, "--seed", str(seed), "--out", str(folder)]
        return (
            folder,
            recipe,
            ["--config", f"{args.configs or CONFIGS}/{student.config}_{kind}.yaml", *to, *options, *cut],
        )

    yield stage("student", "distill", *scores, "--labels", labels)
    yield stage("likelihood", "distill", *scores)
    yield stage("rival", "fit_teacher", "--judgments", labels)


def make_bert(out: Path, seed: int) -> Path:
    """Build the quickstart's BERT, 2 layers of 128, from random weights that match equal words; return its folder."""
    folder = out / f"bert-base-{seed}"
    if not (folder / "config.json").exists():
        corpus = read_table(f"{out}/data/corpus.parquet", "corpus")
        train = corpus[corpus["split"] == "train"]
        texts = (train["title"] + " " + train["summary"]).tolist()
        torch.manual_seed(seed)
        tokenizer = from_scratch.train_wordpiece(texts, vocab_size=4000, max_length=MAX_LENGTH)
        no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = from_scratch.small_bert(tokenizer, layers=2, size=128, initializer_range=0.06, **no_dropout)
        from_scratch.embed_by_svd(model, tokenizer, texts)
        from_scratch.match_words(model, tokenizer)
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    return folder


def train(stages: Sequence[Stage], precision: list[str], workers: int) -> None:
    """Run the stages, `workers` at the same time with an equal share of the threads."""
    print(f"\n== training: {len(stages)} models, {workers} at a time", flush=True)
    if workers == 1:
        for folder, recipe, arguments in stages:
            run_recipe(folder, recipe, arguments, precision)
        return
    threads = max(1, torch.get_num_threads() // workers)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(run_in_worker, stage, precision, threads) for stage in stages]
        for (folder, _, _), future in zip(stages, futures, strict=True):
            print(f"{folder.name}: {future.result():.0f} s", flush=True)


def run_in_worker(stage: Stage, precision: list[str], threads: int) -> float:
    """Run a stage in a process of its own, with its output in log.txt in its folder; return the seconds."""
    begin = time.perf_counter()
    folder, recipe, arguments = stage
    torch.set_num_threads(threads)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    run_recipe(folder, recipe, arguments, precision)
    return time.perf_counter() - begin


if __name__ == "__main__":
    run_stage("showcase", make_parser, main)
