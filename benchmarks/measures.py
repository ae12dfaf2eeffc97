"""Speed of the measures: NDCG@10 of a million rows against ir_measures and ranx.

    python benchmarks/measures.py       # pip install ranx, for its row

Prints CPU seconds in one thread, median over the rounds.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
from pathlib import Path

import ir_measures
import numpy as np
import pandas as pd
import torch
from speed import Scores, Variants, measure

from hf_disranker.evaluation import metrics, significance


def random_ranking(rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return labels, scores and query ids of queries with 20 documents each."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, rows)
    return labels, labels + rng.normal(0, 2, rows), np.arange(rows) // 20


def metric_rows(rows: int, rounds: int) -> dict[str, float]:
    """Measure the CPU seconds for NDCG@10 with linear gain; ours also with PNR and both intervals."""
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


def main() -> None:
    """Print and save the CPU seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", help="write the results to this JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seconds = metric_rows(args.rows, args.rounds)
    print("CPU seconds:", {name: round(value, 2) for name, value in seconds.items()})
    if args.out:
        Path(args.out).write_text(json.dumps({"CPU seconds": seconds}, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
