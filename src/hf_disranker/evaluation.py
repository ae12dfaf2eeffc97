"""Stage 4: how good a ranking of judged documents is, with intervals by query."""

from __future__ import annotations

import logging
import time
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from hf_disranker import metrics
from hf_disranker.data import pair_texts
from hf_disranker.ranker import Ranker
from hf_disranker.schema import TableError

logger = logging.getLogger(__name__)


class Scored(NamedTuple):
    """Scores of rows, shape (rows,), and how fast they came (None if they were read from a file)."""

    scores: np.ndarray
    pairs_per_s: float | None = None


def score_with(ranker: Ranker, judgments: pd.DataFrame, progress: bool = True) -> Scored:
    """Score judged pairs with a ranker; the time includes tokenisation, and the machine is warm."""
    pairs = pair_texts(judgments)
    cut = ranker.queries_cut, ranker.documents_cut
    ranker.predict(pairs[:256])
    ranker.queries_cut, ranker.documents_cut = cut  # what warms the machine up is not counted
    start = time.perf_counter()
    scores = ranker.predict(pairs, progress=progress)
    return Scored(scores, len(pairs) / (time.perf_counter() - start))


def scores_of(judgments: pd.DataFrame, scores: pd.DataFrame) -> Scored:
    """Look judged pairs up in a scores table.

    A judged document that the table lacks ranks last of its query, below all that it holds, and is counted.

    Raises:
        TableError: no judged pair is in the table.
    """
    key = ["query_id", "doc_id"]
    found = judgments[key].merge(scores[[*key, "teacher_score"]], on=key, how="left")["teacher_score"]
    unknown = found.isna()
    if unknown.all():
        raise TableError("No judged (query_id, doc_id) is in the scores table: do the ids come from the same source?")
    if unknown.any():
        logger.warning("%d of %d judged documents are not in the scores; they rank last.", unknown.sum(), len(found))
    # float64: in float32 a large score less 1 is the score itself.
    values = found.to_numpy(np.float64)
    return Scored(np.where(unknown, np.nanmin(values) - 1.0, values))


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
    finite = {name: [end if np.isfinite(end) else None for end in ends] for name, ends in intervals.items()}
    return metrics.jsonable(metrics.evaluate(*columns)) | {"intervals": finite}
