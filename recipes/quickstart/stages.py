"""Stages of the quickstart: the data, the models to start from, and a recipe as a stage that runs once."""

from __future__ import annotations

import importlib
import shutil
import statistics
import time
import timeit
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from hf_disranker.data.bm25 import with_random_documents
from hf_disranker.data.tables import read_table, write_table
from hf_disranker.recipes.outputs import json_in, save_json
from hf_disranker.recipes.quickstart import from_scratch, python_docs
from hf_disranker.recipes.quickstart.results import show_results
from hf_disranker.recipes.quickstart.run import Stage, has_finished, inputs, record

# Training queries with clicks in addition to the judged ones; all other queries are unlabelled.
CLICKED_QUERIES = 2000
# For each clicked or relevant document: some of BM25's top 20 and one random document.
OTHERS = 3
# Unlabelled documents of a query: BM25's top ones, some from lower ranks and one random document.
FIRST, FURTHER = 3, 3
MAX_LENGTH = 48
# Characters of a summary that vocabularies and initial weights are made of: more than the models read.
_CHARACTERS = 300
_THREADS = torch.get_num_threads()


def run_stage(out: Path, stage: Stage) -> None:
    """Run a stage that is not finished, with as many threads as are fastest now."""
    torch.set_num_threads(choose_threads(_THREADS))
    print(f"{torch.get_num_threads()} of {_THREADS} threads", flush=True)
    arguments, after = list(stage.options), inputs(out, stage)
    if arguments[:1] == ["--config"]:
        passing = [] if stage.recipe == "score" else fast_precision()
        run_recipe(out / stage.name, stage.recipe, arguments, passing, after)
        return
    functions: dict[str, Callable[..., None]] = {"data": data, "base": make_base_models, "report": show_results}
    given = [int(number) for option in arguments for number in option.split(",")]
    _run_once(out / stage.name, record(stage.recipe, arguments, after), lambda: functions[stage.recipe](out, *given))


def data(out: Path, judged: int, unlabelled: int, documents: int, dev: int) -> None:
    """Build the data set and the sample of it that the quickstart uses."""
    make_data(out / "data")
    make_sample(out / "data", judged, unlabelled, documents, dev)


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


def click_judgments(clicks: pd.DataFrame, candidates: pd.DataFrame) -> pd.DataFrame:
    """Turn clicks with ids into weak labels: 1 for a query's clicked documents, 0 for its other candidates with texts.

    Returns:
        A judgments table of the queries in both, sorted by ids so that the order of documents does not leak labels.
    """
    clicked = clicks[clicks["query_id"].isin(candidates["query_id"])].assign(label=1)
    others = candidates[candidates["query_id"].isin(clicked["query_id"])].assign(label=0)
    columns = ["query_id", "query", "doc_id", "title", "summary", "label"]
    rows = pd.concat([clicked[columns], others[columns]]).drop_duplicates(["query_id", "doc_id"], keep="first")
    return rows.sort_values(["query_id", "doc_id"], ignore_index=True)


def make_sample(data: Path, judged: int, unlabelled: int, documents: int, dev: int) -> None:
    """Write the first queries of the data set in hash order, as many as a few minutes allow, to its folder `sample`.

    Args:
        data: Folder of `make_data`.
        judged: Number of judged training queries.
        unlabelled: Number of unlabelled queries.
        documents: Number of documents of an unlabelled query, drawn from all that it has.
        dev: Number of development queries.
    """
    labels = read_table(f"{data}/labels.parquet", "judgments")
    pairs = read_table(f"{data}/clicks_and_labels.parquet", "judgments")
    left_out = labels["query_id"].drop_duplicates()[judged:]
    candidates = _first(read_table(f"{data}/unlabelled.parquet", "candidates"), unlabelled)
    drawn = candidates.sample(frac=1, random_state=0).groupby("query_id").head(documents)
    write_table(_first(labels, judged), f"{data}/sample/labels.parquet")
    write_table(pairs[~pairs["query_id"].isin(left_out)], f"{data}/sample/clicks_and_labels.parquet")
    write_table(drawn.sort_index(), f"{data}/sample/unlabelled.parquet")
    judgments = read_table(f"{data}/judgments.parquet", "judgments", split="dev")
    write_table(_first(judgments, dev), f"{data}/sample/judgments.parquet")


def _first(table: pd.DataFrame, queries: int) -> pd.DataFrame:
    return table[table["query_id"].isin(table["query_id"].drop_duplicates()[:queries])]


def make_base_models(out: Path, seed: int) -> None:
    """Build a decoder and a BERT whose initial weights encode word similarity and exact word matching."""
    corpus = read_table(f"{out}/data/corpus.parquet", "corpus")
    train = corpus[corpus["split"] == "train"]
    texts = (train["title"] + " " + train["summary"].str[:_CHARACTERS]).tolist()
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


def run_recipe(
    folder: Path, recipe: str, arguments: list[str], passing: list[str], after: Mapping[str, object] | None = None
) -> None:
    """Run a recipe as one stage, unless it has already finished.

    Args:
        folder: Folder of the stage; `finished.json` in it records what was run.
        recipe: Name of a module in `hf_disranker.recipes`.
        arguments: Command line, beginning with `--config FILE`. If it, the file or `after` changes, the stage restarts
            from scratch.
        passing: Additional arguments that do not trigger a restart, such as the precision.
        after: Runs of other stages whose output it reads, see `inputs`.
    """
    run = record(recipe, arguments, after or {})
    if has_finished(folder, run):
        print(f"\n== {folder}: already finished, skipped", flush=True)
        return
    print(f"\n== {folder}: disranker {recipe} {' '.join(arguments)}", flush=True)

    def work() -> None:
        module = importlib.import_module(f"hf_disranker.recipes.{recipe}")
        module.main(*module.make_parser().parse_args_and_config(arguments + passing))

    _run_once(folder, run, work)


def _run_once(folder: Path, run: Mapping[str, Any], work: Callable[[], None]) -> None:
    """Run a stage and record it with its time, resuming only what was started with the same options."""
    started = folder / "started.json"
    if json_in(started) != run:
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        if run["recipe"] == "score" and started.exists():
            shutil.rmtree(folder)  # the store of another teacher
        save_json(run, str(started))
    begin, cpu = time.perf_counter(), time.process_time()
    work()
    seconds = {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - cpu}
    facts = {name: round(value, 1) for name, value in seconds.items()} | {"threads": torch.get_num_threads()}
    save_json({**run, **facts, "at": time.time()}, str(folder / "finished.json"))


def choose_threads(most: int) -> int:
    """Return `most`, or 1 if it is as fast: another program keeps the cores busy, or the layers are too small.

    A forward and backward pass of layers like those of the quickstart is timed, a third of a second in all.
    """
    if most == 1:
        return 1
    layers = torch.nn.Sequential(torch.nn.Linear(192, 384), torch.nn.GELU(), torch.nn.Linear(384, 192))
    inputs, seconds = torch.randn(1024, 192), {}
    for threads in (1, most):
        torch.set_num_threads(threads)
        times = timeit.repeat(lambda: layers(inputs).square().sum().backward(), number=1, repeat=9)
        seconds[threads] = statistics.median(times)
    return most if 1.2 * seconds[most] < seconds[1] else 1


def fast_precision() -> list[str]:
    """Return the options for bf16 training if the CPU is faster in bf16, for fp32 if not, and none with a GPU."""
    if torch.accelerator.is_available():
        return []
    return ["--bf16", "true", "--use_cpu", "true"] if bf16_is_faster() else ["--bf16", "false"]


def bf16_is_faster() -> bool:
    """Return True if the CPU multiplies matrices at least 1.5 times as fast in bf16 as in fp32."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.randn(512, 512).to(dtype)
        seconds[dtype] = min(timeit.repeat("matrix @ matrix", globals={"matrix": matrix}, number=1, repeat=3))
    return 1.5 * seconds[torch.bfloat16] < seconds[torch.float32]
