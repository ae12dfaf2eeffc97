"""What a run has to show, as plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

TITLES = {
    "bm25": "BM25",
    "label_student": "BERT, labels alone",
    "click_student": "BERT, clicks, labels",
    "teacher": "LLM teacher",
    "student": "BERT, distilled",
}


def results_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Rankers side by side; the brackets are 95% intervals by query.

    Args:
        results: a mapping for each ranker: name, parameters, ndcg@5, ndcg@10, pnr, pairs_per_s and intervals; None
            where something has no meaning.
    """
    head = f"{'':22}{'parameters':>11}{'NDCG@5':>9}{'NDCG@10':>9}{'':16}{'PNR':>7}{'':15}{'pairs/s':>8}"
    return "\n".join([head, *map(_line, results)])


def _line(row: Mapping[str, Any]) -> str:
    parameters, speed = row["parameters"], row["pairs_per_s"]
    return (
        f"{TITLES[row['name']]:22}"
        + (f"{parameters / 1e6:10.1f}M" if parameters else f"{'-':>11}")
        + f"{row['ndcg@5']:9.3f}{row['ndcg@10']:9.3f}{_interval(row, 'ndcg@10', 3):>16}"
        + (f"{row['pnr']:7.2f}" if row["pnr"] is not None else f"{'inf':>7}")
        + f"{_interval(row, 'pnr', 2):>15}"
        + (f"{speed:8,.0f}" if speed else f"{'-':>8}")
    )


def _interval(row: Mapping[str, Any], measure: str, digits: int) -> str:
    return "[" + ", ".join("inf" if end is None else f"{end:.{digits}f}" for end in row["intervals"][measure]) + "]"


def query_example(judgments: pd.DataFrame, scores: Mapping[str, np.ndarray], query_id: str, top: int = 3) -> str:
    """The first documents of one query by several rankers, with their grades.

    Args:
        judgments: a judgments table.
        scores: by ranker, shape (len(judgments),).
        query_id: which query.
        top: documents to show for each ranker.
    """
    rows = judgments[judgments["query_id"] == query_id]
    lines = [f"Query: {rows['query'].iloc[0]}"]
    for name, values in scores.items():
        order = np.argsort(-values[judgments["query_id"] == query_id], kind="stable")[:top]
        for place, document in enumerate(rows.iloc[order].itertuples(), start=1):
            lines.append(f"  {TITLES.get(name, name):22} {place}. [grade {document.label}] {document.title}")
    return "\n".join(lines)
