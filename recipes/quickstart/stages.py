"""Run all stages on real text, from random weights: search over the Python documentation installed on this machine.

    disranker quickstart

A small language model is fine-tuned on clicks and a few judgments, once from scratch and once after continued
pre-training on the clicks. Both score many unlabelled pairs, and a small BERT is trained on their mean score.
Baselines show the effect of each step: the same BERT without a teacher, and each teacher alone. Each stage runs the
recipe of that name with a config from configs/quickstart; finished stages are skipped.
"""

import importlib
import json
import shutil
import time
import timeit
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pandas as pd
import torch

from hf_disranker.data.bm25 import click_judgments, with_random_documents
from hf_disranker.data.outputs import save_json
from hf_disranker.data.tables import read_table, write_table
from hf_disranker.recipes.command_line import RecipeParser, recipe_parser
from hf_disranker.recipes.quickstart import from_scratch, python_docs
from hf_disranker.recipes.quickstart.results import STUDENTS, TEACHERS, show_results

CONFIGS = Path(__file__).parents[1] / "configs"


@dataclass(frozen=True)
class Preset:
    """Configs and base checkpoints of a quickstart; without checkpoints small models are built from random weights."""

    configs: Path
    decoder: str | None = None
    bert: str | None = None


PRESETS = {
    "tiny": Preset(CONFIGS / "quickstart"),
    "hub": Preset(CONFIGS / "quickstart_hub", "Qwen/Qwen3-0.6B-Base", "sentence-transformers/all-MiniLM-L6-v2"),
}
# Training queries with clicks in addition to the judged ones; all other queries are unlabelled.
CLICKED_QUERIES = 2000
# For each clicked or relevant document: some of BM25's top 20 and one random document.
OTHERS = 3
# Unlabelled documents of a query: BM25's top ones, some from lower ranks and one random document.
FIRST, FURTHER = 3, 3
MAX_LENGTH = 48


@dataclass
class QuickstartArguments:
    """Arguments of the quickstart."""

    out: str = field(default="runs/quickstart", metadata={"help": "Folder for data, models, scores and report."})
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


def make_parser() -> RecipeParser:
    """Return the argument parser of the quickstart."""
    return recipe_parser("quickstart", __doc__, QuickstartArguments)


def main(args: QuickstartArguments) -> None:
    """Run all unfinished stages, then show the results."""
    begin = time.perf_counter()
    out = Path(args.out)
    check_folder(out)
    make_data(out / "data")
    preset = PRESETS[args.preset]
    decoder, bert = args.decoder or preset.decoder, args.bert or preset.bert
    if not (decoder and bert):
        make_base_models(out, args.seed)
    decoder, bert = decoder or str(out / "base" / "decoder"), bert or str(out / "base" / "bert")
    precision = fast_precision()
    for name, recipe, arguments in stages(out, Path(args.configs or preset.configs), decoder, bert):
        training = recipe != "score"
        run_recipe(
            out / name,
            recipe,
            [*arguments, "--seed", str(args.seed)] if training else arguments,
            precision if training else [],
        )
    show_results(out)
    print(f"\nDone in {(time.perf_counter() - begin) / 60:.1f} minutes. Everything is in {out}/.")


def check_folder(out: Path) -> None:
    """Raise ValueError if the folder contains stage folders that no quickstart created."""
    stages = ("base", "cpt", "scores", "scores_no_cpt", "report", *STUDENTS, *TEACHERS)
    foreign = [name for name in stages if (out / name).exists()]
    if foreign and not (out / "data" / "manifest.json").is_file():
        raise ValueError(f"{out / foreign[0]} exists and was not created by a quickstart: choose another --out.")


def make_data(folder: Path) -> None:
    """Build the embedded data set and derive the training tables from it."""
    print("== data: reading the Python documentation installed here", flush=True)
    print(", ".join(f"{rows:,} rows of {table}" for table, rows in python_docs.build(folder).items()))
    corpus = read_table(f"{folder}/corpus.parquet", "corpus")
    train = corpus[corpus["split"] == "train"]
    candidates = read_table(f"{folder}/candidates.parquet", "candidates", corpus=corpus)
    shuffled = candidates.sample(frac=1, random_state=0)

    clicks = read_table(f"{folder}/clicks.parquet", "clicks")
    judged = read_table(f"{folder}/judgments.parquet", "judgments", split="train")
    clicked = candidates["query_id"].drop_duplicates().head(CLICKED_QUERIES)
    clicks = clicks[clicks["query_id"].isin([*clicked, *judged["query_id"]])]
    others = shuffled[shuffled["query_id"].isin(clicked)].groupby("query_id").head(OTHERS)
    weak = click_judgments(clicks, with_random_documents(others, train, 1))
    # As many documents of grade 0 as for a click.
    others = judged[judged["label"] == 0].sample(frac=1, random_state=0).groupby("query_id").head(OTHERS + 1)
    labels = pd.concat([judged[judged["label"] > 0], others]).sort_values(["query_id", "doc_id"])
    pairs = pd.concat([candidates[candidates["rank"] <= FIRST], shuffled[shuffled["rank"] > FIRST]])
    pairs = pairs.groupby("query_id").head(FIRST + FURTHER).sort_values(["query_id", "rank"])

    write_table(clicks, f"{folder}/click_log.parquet")
    write_table(labels, f"{folder}/labels.parquet")
    write_table(pd.concat([weak, labels[weak.columns]]), f"{folder}/clicks_and_labels.parquet")
    write_table(with_random_documents(pairs, train, 1), f"{folder}/unlabelled.parquet")


def make_base_models(out: Path, seed: int) -> None:
    """Build a decoder and a BERT whose initial weights encode word similarity and exact word matching."""
    if (out / "base" / "bert" / "config.json").exists():
        return
    print("\n== base: vocabularies and initial weights, from the training documents", flush=True)
    corpus = read_table(f"{out}/data/corpus.parquet", "corpus")
    train = corpus[corpus["split"] == "train"]
    texts = (train["title"] + " " + train["summary"]).tolist()
    torch.manual_seed(seed)
    decoder_tokens = from_scratch.train_bpe(texts, vocab_size=4000, max_length=MAX_LENGTH)
    decoder = from_scratch.small_llama(decoder_tokens, layers=3, size=192, initializer_range=0.05)
    bert_tokens = from_scratch.train_wordpiece(texts, vocab_size=4000, max_length=MAX_LENGTH)
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    bert = from_scratch.small_bert(bert_tokens, layers=2, size=128, initializer_range=0.06, **no_dropout)
    for name, model, tokenizer in (("decoder", decoder, decoder_tokens), ("bert", bert, bert_tokens)):
        from_scratch.embed_by_svd(model, tokenizer, texts)
        from_scratch.match_words(model, tokenizer)
        tokenizer.save_pretrained(out / "base" / name)
        model.save_pretrained(out / "base" / name)


def stages(out: Path, configs: Path, decoder: str, bert: str) -> Iterator[tuple[str, str, list[str]]]:
    """Yield the name, recipe and command line of each stage, in order."""
    data = out / "data"

    def stage(name: str, recipe: str, config: str, *options: object) -> tuple[str, str, list[str]]:
        to = "--out" if recipe == "score" else "--output_dir"
        return name, recipe, ["--config", f"{configs}/{config}.yaml", *map(str, options), to, str(out / name)]

    def fit(name: str, config: str, start: str | Path, judgments: str) -> tuple[str, str, list[str]]:
        return stage(name, "fit_teacher", config, "--model_name_or_path", start, "--judgments", data / judgments)

    clicks = ["--clicks", data / "click_log.parquet", "--eval_clicks", data / "heldout_clicks.parquet"]
    yield stage("cpt", "cpt", "cpt", "--model_name_or_path", decoder, *clicks)
    yield fit("teacher", "teacher", out / "cpt", "clicks_and_labels.parquet")
    yield fit("teacher_no_cpt", "teacher", decoder, "clicks_and_labels.parquet")
    pairs = ["--pairs", data / "unlabelled.parquet"]
    yield stage("scores", "score", "score", "--model", out / "teacher", *pairs)
    yield stage("scores_no_cpt", "score", "score", "--model", out / "teacher_no_cpt", *pairs)
    both = ["--scores", out / "scores", "--more_scores", out / "scores_no_cpt"]
    yield stage("student", "distill", "distill", "--student", bert, *both)
    yield fit("click_student", "fit_student", bert, "clicks_and_labels.parquet")
    yield fit("label_student", "fit_student", bert, "labels.parquet")


def run_recipe(folder: Path, recipe: str, arguments: list[str], passing: list[str]) -> None:
    """Run a recipe as one stage, unless it has already finished.

    Args:
        folder: Folder of the stage; `finished.json` in it records what was run.
        recipe: Name of a module in `hf_disranker.recipes`.
        arguments: Command line, beginning with `--config FILE`. If it or the file changes, the stage restarts from
            scratch.
        passing: Additional arguments that do not trigger a restart, such as the precision.
    """
    run = {"recipe": recipe, "arguments": arguments, "config": Path(arguments[1]).read_text()}
    finished = folder / "finished.json"
    if finished.exists() and json.loads(finished.read_text()).items() >= run.items():
        print(f"\n== {folder}: already finished, skipped", flush=True)
        return
    print(f"\n== {folder}: disranker {recipe} {' '.join(arguments)}", flush=True)
    started = folder / "started.json"
    if not started.exists() or json.loads(started.read_text()) != run:
        # Never resume from checkpoints of other options.
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        save_json(run, str(started))
    begin = time.perf_counter()
    module = importlib.import_module(f"hf_disranker.recipes.{recipe}")
    module.main(*module.make_parser().parse_args_and_config(arguments + passing))
    save_json({**run, "seconds": round(time.perf_counter() - begin, 1)}, str(finished))


def fast_precision() -> list[str]:
    """Return the options for bf16 training if the CPU is faster in bf16, for fp32 if not, and none with a GPU."""
    if torch.accelerator.is_available():
        return []
    return ["--bf16", "true", "--use_cpu", "true"] if bf16_is_faster() else ["--bf16", "false"]


def bf16_is_faster() -> bool:
    """Return True if the CPU multiplies matrices at least 1.5 times as fast in bf16 as in fp32."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.randn(1024, 1024).to(dtype)
        seconds[dtype] = min(timeit.repeat("matrix @ matrix", globals={"matrix": matrix}, number=1, repeat=5))
    return 1.5 * seconds[torch.bfloat16] < seconds[torch.float32]


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
