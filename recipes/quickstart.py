"""All stages on real text, from nothing: a search over the Python documentation that is installed on this machine.

    disranker quickstart

A small language model is pre-trained on clicks, fitted to a few judgments and made to score an ocean of unlabelled
pairs; a small BERT learns from these scores. Two rivals, the same BERT without a teacher, show what that is worth.
Each stage is the recipe of that name with a config of configs/quickstart; finished stages are skipped.
"""

import functools
import importlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from trl import TrlParser

from hf_disranker import from_scratch, metrics, python_docs
from hf_disranker.data import bm25_scores, click_judgments, read_table, with_random_documents, write_table
from hf_disranker.evaluation import Scored, evaluate, score_with
from hf_disranker.ranker import Ranker
from hf_disranker.runs import recipe_parser, save_json

CONFIGS = Path(__file__).parent / "configs" / "quickstart"
FIRST_CANDIDATES, RANDOM_DOCUMENTS = 6, 2
RANKERS = ("label_student", "click_student", "teacher", "student")


@dataclass
class QuickstartArguments:
    """Where the quickstart works."""

    out: str = field(default="runs/quickstart", metadata={"help": "Folder for data, models, scores and report."})
    configs: str = field(default=str(CONFIGS), metadata={"help": "Folder with the config of each stage."})
    seed: int = field(default=0, metadata={"help": "Seed of the models' first weights."})


def make_parser() -> TrlParser:
    """The command line of the quickstart."""
    return recipe_parser("quickstart", __doc__, QuickstartArguments)


def main(args: QuickstartArguments) -> None:
    """Run every stage that is not finished, then show the results."""
    begin = time.perf_counter()
    out = Path(args.out)
    make_data(out / "data")
    make_base_models(out, args.seed)
    for name, recipe, arguments in stages(out, Path(args.configs)):
        run_stage(out / name, recipe, arguments)
    report(out)
    print(f"\nDone in {(time.perf_counter() - begin) / 60:.1f} minutes. All of it lies in {out}/.")


def make_data(folder: Path) -> None:
    """The tables of the embedded data set, and what the quickstart makes of them.

    Unlabelled pairs are a query's first candidates and two random documents; for the rival without a teacher the same
    pairs are judged by the clicks.
    """
    say("data", "reading the Python documentation installed here")
    print(", ".join(f"{rows:,} rows of {table}" for table, rows in python_docs.build(folder).items()))
    corpus = read_table(f"{folder}/corpus.parquet", "corpus")
    candidates = read_table(f"{folder}/candidates.parquet", "candidates", corpus=corpus)
    first = candidates[candidates["rank"] <= FIRST_CANDIDATES]
    pairs = with_random_documents(first, corpus[corpus["split"] == "train"], RANDOM_DOCUMENTS)
    write_table(pairs, f"{folder}/unlabelled.parquet")
    clicks = read_table(f"{folder}/clicks.parquet", "clicks")
    write_table(click_judgments(clicks, pairs), f"{folder}/click_judgments.parquet")


def make_base_models(out: Path, seed: int) -> None:
    """A decoder and a BERT with random weights; their vocabularies come from the training side alone."""
    if (out / "base" / "bert" / "config.json").exists():
        return
    say("base", "vocabularies and random weights, from the training side's texts")
    clicks = read_table(f"{out}/data/clicks.parquet", "clicks")
    texts = [" ".join(row) for row in clicks[["query", "title", "summary"]].itertuples(index=False)]
    torch.manual_seed(seed)
    decoder_tokens = from_scratch.train_bpe(texts, vocab_size=4000, max_length=48)
    bert_tokens = from_scratch.train_wordpiece(texts, vocab_size=4000, max_length=48)
    decoder = from_scratch.small_llama(decoder_tokens, layers=3, size=256)
    bert = from_scratch.small_bert(bert_tokens, layers=2, size=128)
    for name, model, tokenizer in (("decoder", decoder, decoder_tokens), ("bert", bert, bert_tokens)):
        tokenizer.save_pretrained(out / "base" / name)
        model.save_pretrained(out / "base" / name)


def stages(out: Path, configs: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Each stage's folder, recipe and command line, in order."""
    data, judgments = out / "data", ["--judgments", f"{out}/data/judgments.parquet"]

    def arguments(config: str, *options: object) -> list[str]:
        return ["--config", f"{configs}/{config}.yaml", *map(str, options)]

    clicks = ["--clicks", data / "clicks.parquet", "--eval_clicks", data / "heldout_clicks.parquet"]
    start, to, bert = "--model_name_or_path", "--output_dir", out / "base" / "bert"
    yield "cpt", "cpt", arguments("cpt", start, out / "base" / "decoder", *clicks, to, out / "cpt")
    yield "teacher", "fit_teacher", arguments("fit_teacher", start, out / "cpt", *judgments, to, out / "teacher")
    pairs = ["--pairs", data / "unlabelled.parquet", "--out", out / "scores"]
    yield "scores", "score", arguments("score", "--model", out / "teacher", *pairs)
    scores = ["--student", bert, "--scores", out / "scores", *judgments]
    yield "student", "distill", arguments("distill", *scores, to, out / "student")
    yield "label_student", "fit_teacher", arguments("labels", start, bert, *judgments, to, out / "label_student")
    positives = ["--judgments", data / "click_judgments.parquet", "--eval_judgments", data / "judgments.parquet"]
    clicked = out / "click_student" / "clicks"
    yield "click_student/clicks", "fit_teacher", arguments("clicks", start, bert, *positives, to, clicked)
    yield "click_student", "fit_teacher", arguments("labels", start, clicked, *judgments, to, out / "click_student")


def run_stage(folder: Path, recipe: str, arguments: list[str]) -> None:
    """Run a recipe unless it has finished with these arguments and this config."""
    run = {"recipe": recipe, "arguments": arguments, "config": Path(arguments[1]).read_text()}
    finished = folder / "finished.json"
    if finished.exists() and {**json.loads(finished.read_text()), "seconds": None} == {**run, "seconds": None}:
        say(folder.name, "finished before, skipped")
        return
    say(folder.name, f"disranker {recipe} {' '.join(arguments)}")
    begin = time.perf_counter()
    module = importlib.import_module(f"hf_disranker.recipes.{recipe}")
    precision = [] if recipe == "score" else fast_precision()
    module.main(*module.make_parser().parse_args_and_config(arguments + precision))
    save_json({**run, "seconds": round(time.perf_counter() - begin, 1)}, str(finished))


@functools.cache
def fast_precision() -> list[str]:
    """Train in bf16 where this machine's CPU multiplies clearly faster in it; on a GPU these models need no hurry."""
    if torch.accelerator.is_available():
        return []
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.randn(1024, 1024).to(dtype)
        runs = []
        for _ in range(5):
            begin = time.perf_counter()
            matrix @ matrix
            runs.append(time.perf_counter() - begin)
        seconds[dtype] = min(runs)
    return ["--bf16", "true", "--use_cpu", "true"] if 1.5 * seconds[torch.bfloat16] < seconds[torch.float32] else []


def report(out: Path) -> None:
    """Measure every ranker on the development queries and show what there is to see."""
    say("report", "every ranker on the same development queries")
    dev = read_table(f"{out}/data/judgments.parquet", "judgments", split="dev")
    corpus = read_table(f"{out}/data/corpus.parquet", "corpus")
    scored = {"bm25": Scored(bm25_scores(dev, corpus[corpus["split"] == "dev"]))}
    rankers = {name: Ranker.from_pretrained(out / name) for name in RANKERS}
    scored |= {name: score_with(ranker, dev, progress=False) for name, ranker in rankers.items()}
    results = []
    for name, (scores, speed) in scored.items():
        measures = evaluate(dev, scores)
        row = {"name": name, "parameters": rankers[name].model.num_parameters() if name in rankers else None}
        row |= {measure: measures[measure] for measure in ("ndcg@5", "ndcg@10", "pnr")}
        results.append(row | {"pairs_per_s": speed, "intervals": measures["intervals"]})
    save_json(results, f"{out}/report/results.json")
    show_table(results)
    show_method(out, dev, {name: scores for name, (scores, _) in scored.items()})
    show_query(dev, scored)
    print(f"""
The student is a plain BERT classifier; sentence-transformers loads it as it is:

    from sentence_transformers import CrossEncoder
    ranker = CrossEncoder("{out}/student")
    print(ranker.rank("read a json file", ["json.load: read a document from a file", "os.remove: delete a file"]))""")


def show_table(results: list[dict]) -> None:
    """The rankers side by side; the brackets are 95% intervals by query."""
    titles = {
        "bm25": "BM25",
        "label_student": "BERT, labels alone",
        "click_student": "BERT, clicks then labels",
        "teacher": "LLM teacher",
        "student": "BERT, distilled",
    }
    print(f"\n{'':26}{'parameters':>11}{'NDCG@5':>9}{'NDCG@10':>9}{'':18}{'PNR':>7}{'':16}{'pairs/s':>8}")
    for row in results:
        low, high = row["intervals"]["ndcg@10"]
        pnr_low, pnr_high = row["intervals"]["pnr"]
        size = f"{row['parameters'] / 1e6:.1f}M" if row["parameters"] else "-"
        speed = f"{row['pairs_per_s']:,.0f}" if row["pairs_per_s"] else "-"
        print(
            f"{titles[row['name']]:26}{size:>11}{row['ndcg@5']:9.3f}{row['ndcg@10']:9.3f}  [{low:.3f}, {high:.3f}]"
            f"{row['pnr']:9.2f}  [{pnr_low:.2f}, {pnr_high:.2f}]{speed:>10}"
        )


def show_method(out: Path, dev: pd.DataFrame, scores: dict[str, np.ndarray]) -> None:
    """What each stage did: the loss of the pre-training, and who agrees with the teacher."""
    losses = json.loads((out / "cpt" / "cpt.json").read_text())
    print(
        f"\nHeld-out title + summary loss: {losses['loss_before']:.2f} -> {losses['loss_after']:.2f} nats per token."
    )
    taus = {
        name: metrics.kendall_tau(scores[name], scores["teacher"], dev["query_id"].to_numpy())
        for name in ("label_student", "click_student", "student")
    }
    agreement = ", ".join(f"{name} {metrics.query_mean(values):.3f}" for name, values in taus.items())
    low, high = metrics.bootstrap(taus["student"] - taus["label_student"])
    print(f"Kendall tau with the teacher, mean over queries: {agreement}.")
    print(f"Distilled minus labels alone, on the same queries: 95% interval [{low:+.3f}, {high:+.3f}].")
    save_json({name: metrics.query_mean(values) for name, values in taus.items()}, f"{out}/report/agreement.json")


def show_query(dev: pd.DataFrame, scored: dict[str, Scored]) -> None:
    """The first three documents of one query, by BM25 and by the student."""
    query = dev["query_id"].iloc[0]
    rows = (dev["query_id"] == query).to_numpy()
    print(f"\nQuery: {dev['query'].iloc[0]}")
    for name in ("bm25", "student"):
        best = np.argsort(-scored[name].scores[rows], kind="stable")[:3]
        for place, row in enumerate(best, start=1):
            document = dev[rows].iloc[row]
            print(f"  {name:8} {place}. [{document['label']}] {document['title']}")


def say(stage: str, what: str) -> None:
    """One plain line that a stage begins with."""
    print(f"\n== {stage}: {what}", flush=True)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
