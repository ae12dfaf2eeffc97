"""Scores of different queries compared: AUC over all pairs, with intervals, of what benchmarks/quality.py left behind.

    python benchmarks/across.py --quickstart runs/quickstart --results runs/quality

`show` of quality.py prints AUC without intervals, for it is no mean over queries: each pair of a relevant and an
irrelevant document belongs to two of them. Here queries are resampled with all pairs of their documents.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from hf_disranker.data.tables import read_table
from hf_disranker.data.trec import KEY, read_run

CONFIG = Path(__file__).parent / "configs" / "quality.yaml"
ROUNDS = 1000


def pairs_in_order(labels: np.ndarray, scores: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Pairs of a relevant document of one query and an irrelevant one of another, or the same, in the right order.

    Args:
        labels: grades, shape (rows,); 0 is irrelevant.
        scores: shape (rows,).
        query: from 0, shape (rows,).

    Returns:
        Shape (queries, queries), relevant by irrelevant; ties count half.
    """
    count = query.max() + 1
    low = labels == 0
    order = np.argsort(query[low], kind="stable")
    owner, others = query[low][order], scores[low][order]
    found = np.zeros((count, count))
    for row in np.flatnonzero(~low):
        right = (scores[row] > others) + 0.5 * (scores[row] == others)
        found[query[row]] += np.bincount(owner, weights=right, minlength=count)
    return found


def resampled(found: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """The share of pairs in order, of all queries and then of `ROUNDS` resamples of them."""
    count = len(found)
    draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=ROUNDS)
    weights = np.concatenate([np.ones((1, count)), draws])
    return ((weights @ found) * weights).sum(axis=1) / ((weights @ pairs) * weights).sum(axis=1)


def cell(draws: np.ndarray, form: str) -> str:
    """The value of all queries and the interval of the resamples."""
    low, high = np.quantile(draws[1:], [0.025, 0.975])
    return f"{draws[0]:{form}} [{low:{form}}, {high:{form}}]"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--results", type=Path, default=Path("runs/quality"))
    args = parser.parse_args()
    config = yaml.safe_load(CONFIG.read_text())
    dev = read_table(args.quickstart / "data" / "judgments.parquet", "judgments", split="dev")
    labels, query = dev["label"].to_numpy(), pd.factorize(dev["query_id"])[0]
    pairs = np.outer(*(np.bincount(query, weights=kind) for kind in (labels > 0, labels == 0)))
    cells = {name: args.results / "cells" / name.replace("/", "_") for name in config["cells"]}
    files = {name: sorted(folder.glob("*/eval.json.run")) for name, folder in cells.items()}
    files |= {name: [args.results / f"{name}.json.run"] for name in ("teacher", "bm25")}
    found = {}
    for name, runs in files.items():
        tables = [dev[KEY].merge(read_run(run), on=KEY, how="left")["teacher_score"].to_numpy() for run in runs]
        if tables:
            right = np.mean([pairs_in_order(labels, scores, query) for scores in tables], axis=0)
            found[name] = resampled(right, pairs)
    reference = config["reference"]
    print(f"| student | seeds | AUC | less {reference} |\n|---|---|---|---|")
    for name, draws in found.items():
        less = "" if name == reference else cell(draws - found[reference], "+.3f")
        print(f"| {name} | {len(files[name])} | {cell(draws, '.3f')} | {less} |")


if __name__ == "__main__":
    main()
