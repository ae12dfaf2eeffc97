"""Distillation on three human-graded data sets with a pre-trained encoder, cross-validated.

    make models
    python benchmarks/human_graded.py run --data DATA --out runs/human_graded
    python benchmarks/human_graded.py show --data DATA --out runs/human_graded

DATA contains one folder per data set in benchmarks/configs/human_graded.yaml, with judgments.parquet and, optionally,
corpus.parquet. The encoder is all-MiniLM-L6-v2, 6 layers, Apache-2.0. For each fold of the queries (train and dev
combined):

- the teacher is MiniLM fine-tuned with `RankingTrainer` on the labels of the other folds (a BERT, not an LLM);
- each student keeps some of MiniLM's layers and trains for as many steps on the same labels, or on the teacher's
  scores of the same queries' BM25 candidates, without labels;
- MiniLM's cosine similarity and BM25 are baselines without training.

Every query is ranked by models that never saw its labels. `run` skips finished work; `show` prints markdown.
"""

import argparse
import json
import math
import re
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer, set_seed

from hf_disranker import BertDistilledRanker, DistillationConfig, DistillationTrainer, Ranker
from hf_disranker.data.bm25 import bm25_scores, mine_candidates
from hf_disranker.data.groups import load_groups
from hf_disranker.data.tables import pair_texts, read_table, write_table
from hf_disranker.evaluation.evaluate import evaluate, per_query
from hf_disranker.evaluation.significance import compare, refusal
from hf_disranker.recipes.outputs import save_json
from hf_disranker.recipes.quickstart.stages import bf16_is_faster
from hf_disranker.recipes.showcase.models import MODELS
from hf_disranker.training.ranking_trainer import RankingConfig, RankingTrainer

CONFIG = Path(__file__).parent / "configs" / "human_graded.yaml"
BASELINES = ("bm25", "MiniLM, cosine")


def encoder() -> Path:
    """Return the MiniLM folder written by `make models`."""
    folder = MODELS / "minilm"
    if not folder.is_dir():
        raise SystemExit(f"{folder} is missing: make models")
    return folder


def read_set(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read the judgments of all splits and the corpus; without a corpus, use all judged documents."""
    rows = read_table(folder / "judgments.parquet", "judgments")
    index = folder / "corpus.parquet"
    corpus = read_table(index, "corpus") if index.exists() else rows.drop_duplicates("doc_id")
    return rows, corpus[["doc_id", "title", "summary"]]


def fold_of(queries: pd.Series, folds: int) -> np.ndarray:
    """Assign each row to a fold by its query; queries that differ only in spaces or a plural s share one."""
    return np.array([zlib.crc32(re.sub(r"\W|s\b", "", query.lower()).encode()) % folds for query in queries])


def labelled(rows: pd.DataFrame, documents: int) -> pd.DataFrame:
    """Keep at most `documents` relevant and `documents` irrelevant rows per query."""
    shuffled = rows.sample(frac=1, random_state=0)
    return shuffled.groupby(["query_id", shuffled["label"] > 0]).head(documents).sort_values(["query_id", "doc_id"])


def cosine(rows: pd.DataFrame, model: Path) -> np.ndarray:
    """Compute the cosine similarity of query and document embeddings, shape (len(rows),)."""
    embed = SentenceTransformer(str(model), device="cpu")
    texts = {"query": rows["query"], "document": (rows["title"] + " " + rows["summary"]).str.strip()}
    vectors = {}
    for name, column in texts.items():
        places, distinct = pd.factorize(column)
        found = embed.encode(list(distinct), normalize_embeddings=True, show_progress_bar=False)
        vectors[name] = found[places]
    return (vectors["query"] * vectors["document"]).sum(axis=1)


class Fold:
    """One cross-validation fold: trains each ranker and saves its scores of the held-out queries.

    Args:
        folder: Output folder for `RANKER.parquet` and its cost.
        rows: Judgments with the column `fold`.
        corpus: Corpus for BM25.
        number: Fold that is held out.
        model: Folder of the encoder.
        options: Config, including `steps`.
    """

    def __init__(
        self, folder: Path, rows: pd.DataFrame, corpus: pd.DataFrame, number: int, model: Path, options: dict[str, Any]
    ) -> None:
        self.folder, self.corpus, self.model, self.options = folder, corpus, model, options
        self.seen, self.held_out = rows[rows["fold"] != number], rows[rows["fold"] == number]

    def run(self) -> None:
        """Train all unfinished rankers."""
        students = self.options["students"]
        self.keep("teacher", partial(self.fit, range(6)), also=self.candidate_scores)
        for name, layers in students.items():
            self.keep(f"{name}, labels", partial(self.fit, layers))
            self.keep(f"{name}, distilled", partial(self.distil, layers))

    def keep(self, name: str, train: Callable[[], Ranker], also: Callable[[Ranker], None] | None = None) -> None:
        """Train a ranker and write its scores of the held-out queries, unless they exist."""
        path = self.folder / f"{name}.parquet"
        if path.exists():
            return
        begin = time.process_time()
        ranker = train()
        seconds = time.process_time() - begin
        if also:
            also(ranker)
        begin = time.process_time()
        scores = ranker.predict(pair_texts(self.held_out))
        speed = len(scores) / (time.process_time() - begin)
        save_json({"cpu_seconds": seconds, "pairs_per_cpu_s": speed}, str(path.with_suffix(".json")))
        write_table(self.held_out[["query_id", "doc_id"]].assign(score=scores), str(path))
        print(f"{self.folder.parent.name}, fold {self.folder.name}, {name}: {seconds:.0f} CPU seconds", flush=True)

    def candidate_scores(self, teacher: Ranker) -> None:
        """Score the BM25 candidates of the training queries."""
        queries = self.seen.drop_duplicates("query_id")[["query_id", "query"]]
        pairs = mine_candidates(queries, self.corpus, self.options["candidates"]).merge(self.corpus, on="doc_id")
        scores = teacher.predict(pair_texts(pairs))
        write_table(pairs.assign(teacher_score=scores), str(self.folder / "scores" / "part.parquet"))

    def fit(self, layers: Any) -> Ranker:
        """Train a ranker on labels."""
        student = self.start(layers)
        rows = load_groups(labelled(self.seen, self.options["documents"]))
        return self.trained(RankingTrainer, RankingConfig(**self.training()), student, rows)

    def distil(self, layers: Any) -> Ranker:
        """Train a ranker on the teacher's scores."""
        student = self.start(layers)
        rows = load_groups(self.folder / "scores")
        return self.trained(DistillationTrainer, DistillationConfig(**self.training()), student, rows)

    def start(self, layers: Any) -> BertDistilledRanker:
        """Load some layers of the encoder with a new head."""
        set_seed(0)
        return BertDistilledRanker.from_pretrained(self.model).keep_layers(list(layers))

    def training(self) -> dict[str, Any]:
        """Return the options shared by all trainers."""
        options = self.options
        names = ("max_length", "max_query_length", "learning_rate", "bf16")
        return {name: options[name] for name in names} | {
            "output_dir": str(self.folder / "work"),
            "max_steps": options["steps"],
            "per_device_train_batch_size": options["queries_per_step"],
            "eval_strategy": "no",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": not torch.cuda.is_available(),
        }

    def trained(self, kind: Any, args: RankingConfig, student: BertDistilledRanker, rows: Any) -> Ranker:
        """Train the student and return it as a ranker."""
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        kind(model=student, args=args, train_dataset=rows, processing_class=tokenizer).train()
        return Ranker(student, tokenizer)


def run(args: argparse.Namespace) -> None:
    """Run all unfinished rankers on every set, small sets first."""
    config = yaml.safe_load(args.config.read_text())
    config["bf16"] = torch.cuda.is_available() or bf16_is_faster()
    model = args.model or encoder()
    for name, options in config["sets"].items():
        rows, corpus = read_set(args.data / name)
        rows = rows.assign(fold=fold_of(rows["query"], config["folds"]))
        for baseline, score in zip(
            BASELINES, (partial(bm25_scores, rows, corpus), partial(cosine, rows, model)), strict=True
        ):
            path = args.out / name / f"{baseline}.parquet"
            if not path.exists():
                write_table(rows[["query_id", "doc_id"]].assign(score=score()), str(path))
        for number in range(config["folds"]):
            Fold(args.out / name / str(number), rows, corpus, number, model, config | options).run()


def rankings(folder: Path, names: list[str]) -> Iterator[tuple[str, pd.DataFrame, dict[str, float]]]:
    """Yield name, scores over all folds and mean cost of each finished ranker."""
    for name in names:
        files = [folder / f"{name}.parquet"] if name in BASELINES else sorted(folder.glob(f"[0-9]*/{name}.parquet"))
        costs = [json.loads(file.with_suffix(".json").read_text()) for file in files if name not in BASELINES]
        if files:
            scores = pd.concat([pd.read_parquet(file) for file in files])
            yield name, scores, {key: np.mean([cost[key] for cost in costs]) for key in (costs[0] if costs else ())}


def show(args: argparse.Namespace) -> None:
    """Print a table for each set, then the differences per set and pooled."""
    config = yaml.safe_load(args.config.read_text())
    students = [f"{name}, {how}" for name in config["students"] for how in ("labels", "distilled")]
    values: dict[str, dict[str, np.ndarray]] = {}
    for name in config["sets"]:
        rows, _ = read_set(args.data / name)
        values[name] = {}
        print(f"\n### {name}\n\n| ranker | NDCG@10 | PNR | pairs/CPU s | CPU s a fold |\n|---|---|---|---|---|")
        for ranker, scores, cost in rankings(args.out / name, [*BASELINES, "teacher", *students]):
            joined = rows.merge(scores, on=["query_id", "doc_id"])
            if len(joined) < len(rows):
                continue  # a fold is missing
            queries = per_query(joined, joined["score"].to_numpy())
            found = evaluate(joined, joined["score"].to_numpy(), queries=queries)
            values[name][ranker] = queries["ndcg@10"].to_numpy()
            low, high = found["intervals"]["ndcg@10"]
            costs = [f"{cost[key]:,.0f}" if key in cost else "" for key in ("pairs_per_cpu_s", "cpu_seconds")]
            cells = [
                ranker,
                f"{found['ndcg@10']:.3f} [{low:.3f}, {high:.3f}]",
                f"{found['pnr'] or math.inf:.2f}",
                *costs,
            ]
            print("| " + " | ".join(cells) + " |")
        print(f"\n{counted(values[name])}")
    print("\n### Differences\n\n" + differences(values, pairs_compared(list(config["students"]))))


def counted(rankers: dict[str, np.ndarray]) -> str:
    """Return the number of queries with a defined NDCG, and why significance is not claimed, if so."""
    queries = int((~np.isnan(rankers["bm25"])).sum())
    why_not = refusal(queries, float(np.nanmean(rankers["bm25"])))
    return f"{queries} queries." + (f" Nothing is called significant: {why_not}." if why_not else "")


def pairs_compared(students: list[str]) -> list[tuple[str, str]]:
    """Return the pairs of rankers to compare; the one expected to win comes first."""
    pairs = [("teacher", "MiniLM, cosine"), ("teacher", "bm25")]
    for name in students:
        pairs += [(f"{name}, distilled", other) for other in (f"{name}, labels", "teacher", "MiniLM, cosine", "bm25")]
    return pairs


def differences(values: dict[str, dict[str, np.ndarray]], pairs: list[tuple[str, str]]) -> str:
    """Format the differences: a row per pair of rankers, a column per set and a pooled one; p only where allowed."""
    lines = [
        f"| NDCG@10 of | less that of | {' | '.join(values)} | pooled |",
        "|---|---|" + "---|" * (len(values) + 1),
    ]
    tests = {}
    for name, rankers in values.items():
        known = [pair for pair in pairs if set(pair) <= rankers.keys()]
        tests[name] = {(one.first, one.second): one for one in compare(rankers, known)}
    for first, second in pairs:
        cells = []
        for name, rankers in values.items():
            one, bm25 = tests[name].get((first, second)), rankers["bm25"]
            claim = not refusal(int((~np.isnan(bm25)).sum()), float(np.nanmean(bm25)))
            p = f", p = {one.p_holm:.4f}" if one and claim else ""
            cells.append(f"{interval(one.difference, one.interval)}{p}" if one else "")
        if all(cells):
            cells.append(interval(*pooled([rankers[first] - rankers[second] for rankers in values.values()])))
        lines.append(f"| {first} | {second} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def pooled(differences: Sequence[np.ndarray], rounds: int = 1000) -> tuple[float, tuple[float, float]]:
    """Average the mean differences of several data sets, with a 95% bootstrap interval.

    All sets have equal weight and queries are resampled within each set, so the interval is about further queries of
    these sets, not about further sets.

    Args:
        differences: Per-query differences of two rankers for each set, shape (queries,); NaN is ignored.
        rounds: Number of bootstrap samples.
    """
    sets = [values[~np.isnan(values)] for values in differences]
    generator = np.random.default_rng(0)
    draws = [
        np.mean([values[generator.integers(values.size, size=values.size)].mean() for values in sets])
        for _ in range(rounds)
    ]
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(np.mean([values.mean() for values in sets])), (float(low), float(high))


def interval(difference: float, ends: tuple[float, float]) -> str:
    """Format a difference and its 95% interval."""
    return f"{difference:+.3f} [{ends[0]:+.3f}, {ends[1]:+.3f}]"


def main() -> None:
    """Run the experiments or show their results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "show"])
    parser.add_argument("--data", type=Path, required=True, help="folder with one folder per data set")
    parser.add_argument("--out", type=Path, default=Path("runs/human_graded"))
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--model", type=Path, help="folder of a BERT encoder to use instead of MiniLM")
    args = parser.parse_args()
    {"run": run, "show": show}[args.what](args)


if __name__ == "__main__":
    main()
