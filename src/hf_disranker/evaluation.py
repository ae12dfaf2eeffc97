"""Stage 4: how good a ranking of judged documents is, with intervals by query."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from hf_disranker import metrics
from hf_disranker.ranker import Ranker
from hf_disranker.schema import TableError
from hf_disranker.scoring import pair_texts


class Scored(NamedTuple):
    """Scores of rows, shape (rows,), and how fast they came (None if they were read from a file)."""

    scores: np.ndarray
    pairs_per_s: float | None = None


def score_with(ranker: Ranker, judgments: pd.DataFrame, progress: bool = True) -> Scored:
    """Score judged pairs with a ranker; the time includes tokenisation, and the machine is warm."""
    pairs = pair_texts(judgments)
    ranker.predict(pairs[:256])
    start = time.perf_counter()
    scores = ranker.predict(pairs, progress=progress)
    return Scored(scores, len(pairs) / (time.perf_counter() - start))


def scores_of(judgments: pd.DataFrame, scores: pd.DataFrame) -> Scored:
    """Look judged pairs up in a scores table.

    Raises:
        TableError: no judged pair is in the table.

    A judged document that the table lacks ranks last of its query, below all that it holds.
    """
    key = ["query_id", "doc_id"]
    found = judgments[key].merge(scores[[*key, "teacher_score"]], on=key, how="left")["teacher_score"].to_numpy()
    if np.isnan(found).all():
        raise TableError("No judged (query_id, doc_id) is in the scores table: do the ids come from the same source?")
    return Scored(np.where(np.isnan(found), np.nanmin(found) - 1.0, found))


def evaluate(judgments: pd.DataFrame, scores: np.ndarray) -> dict[str, Any]:
    """Measure a ranking.

    Args:
        judgments: a judgments table.
        scores: shape (len(judgments),); higher is better.

    Returns:
        Json-friendly: every measure of `metrics.evaluate`, and under "intervals" the 95% bootstrap intervals by query
        of pnr, ndcg@5 and ndcg@10.
    """
    columns = judgments["label"].to_numpy(), scores, judgments["query_id"].to_numpy()
    pairs = metrics.query_pair_counts(*columns)
    intervals = {"pnr": metrics.bootstrap(pairs.concordant, pairs.discordant)}
    intervals |= {f"ndcg@{k}": metrics.bootstrap(metrics.ndcg(*columns, k=k)) for k in (5, 10)}
    finite = {
        name: [None if np.isinf(end) or np.isnan(end) else end for end in ends] for name, ends in intervals.items()
    }
    return metrics.jsonable(metrics.evaluate(*columns)) | {"intervals": finite}
