"""Measures and growth: a million rows against ir_measures and ranx, and what each job costs as it grows thirtyfold.

    python benchmarks/measures.py       # pip install ranx, for its row

CPU seconds in one thread, the median of the rounds for the peers, the best of three for the growth. A job that grows
linearly costs the same for each pair, document or row.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import tempfile
from functools import partial
from pathlib import Path

import ir_measures
import numpy as np
import pandas as pd
import torch
from speed import MAX_LENGTH, SHAPES, Scores, Variants, measure, read_pairs, time_of
from transformers import BertConfig

from hf_disranker import BertDistilledRanker, Ranker
from hf_disranker.evaluation import metrics, significance
from hf_disranker.recipes.quickstart.from_scratch import train_wordpiece
from hf_disranker.training.losses import margin_mse


def random_ranking(rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, scores and query ids of queries with 20 documents."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, rows)
    return labels, labels + rng.normal(0, 2, rows), np.arange(rows) // 20


def metric_rows(rows: int, rounds: int) -> dict[str, float]:
    """CPU seconds for NDCG@10, linear gain, theirs in their own tables; ours with PNR and both intervals too."""
    labels, scores, queries = random_ranking(rows)
    names = [f"q{query}" for query in queries], [f"d{row}" for row in range(rows)]
    qrels = pd.DataFrame({"query_id": names[0], "doc_id": names[1], "relevance": labels})
    run = pd.DataFrame({"query_id": names[0], "doc_id": names[1], "score": scores})

    def everything() -> Scores:
        pairs = metrics.by_query(labels, scores, names[0], ks=())
        significance.bootstrap(pairs["concordant"], pairs["discordant"])
        values = metrics.ndcg(labels, scores, names[0], gain="linear")
        significance.bootstrap(values)
        return values

    variants: Variants = {
        "ours": lambda: metrics.ndcg(labels, scores, names[0], gain="linear"),
        "ours, with PNR and intervals": everything,
        "ir_measures": lambda: np.array([v.value for v in ir_measures.iter_calc([ir_measures.nDCG @ 10], qrels, run)]),
    }
    if importlib.util.find_spec("ranx"):
        import ranx

        theirs = ranx.Qrels.from_df(
            qrels.astype({"query_id": object, "doc_id": object}), "query_id", "doc_id", "relevance"
        )
        ranked = ranx.Run.from_df(run.astype({"query_id": object, "doc_id": object}), "query_id", "doc_id", "score")
        variants["ranx"] = lambda: ranx.evaluate(theirs, ranked, "ndcg@10", return_mean=False)
    found = measure(variants, rounds)
    means = {name: float(np.nanmean(values)) for name, (_, values) in found.items()}
    print(f"\nNDCG@10 of {rows:,} rows:", {name: round(mean, 6) for name, mean in means.items()})
    return {name: statistics.median(seconds) for name, (seconds, _) in found.items()}


def growth(ranker: Ranker, pairs: list[tuple[str, str]]) -> dict[str, dict[int, float]]:
    """CPU microseconds per pair, per document of a loss and per row, as the work grows thirtyfold."""
    jobs: dict[str, dict[int, float]] = {
        "scored pairs": {},
        "documents of a query in the loss": {},
        "rows measured": {},
    }
    for count in (32, 100, 320, 1000):
        some = (pairs * 2)[:count]
        jobs["scored pairs"][count] = 1e6 * min(time_of(partial(ranker.predict, some)) for _ in range(3)) / count
    for count in (8, 24, 80, 240):
        scores, mask = torch.randn(2, 1000, count), torch.ones(1000, count, dtype=torch.bool)
        seconds = min(time_of(partial(margin_mse, scores[0], scores[1], mask)) for _ in range(3))
        jobs["documents of a query in the loss"][count] = 1e6 * seconds / (1000 * count)
    for count in (30_000, 100_000, 300_000, 1_000_000):
        columns = random_ranking(count)
        seconds = min(time_of(partial(metrics.evaluate, *columns)) for _ in range(3))
        jobs["rows measured"][count] = 1e6 * seconds / count
    return jobs


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", help="json file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seconds = metric_rows(args.rows, args.rounds)
    print("CPU seconds:", {name: round(value, 2) for name, value in seconds.items()})
    with tempfile.TemporaryDirectory() as folder:
        pairs = read_pairs(1024, Path(folder))
    tokenizer = train_wordpiece([text for pair in pairs for text in pair], 30_522, MAX_LENGTH)
    shape = SHAPES["minilm"] | {"num_hidden_layers": 2}
    ranker = Ranker(BertDistilledRanker(BertConfig(vocab_size=len(tokenizer), **shape)), tokenizer)
    grown = growth(ranker, pairs)
    for job, costs in grown.items():
        print(f"CPU microseconds each, {job}:", {count: round(cost, 3) for count, cost in costs.items()}, flush=True)
    if args.out:
        found = {"CPU seconds": seconds, "CPU microseconds each": grown}
        Path(args.out).write_text(json.dumps(found, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
