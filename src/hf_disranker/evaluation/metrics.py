"""Ranking measures on flat numpy arrays: PNR, NDCG, MRR, MAP, AUC.

Inputs are the columns of a table with a row per query and document, in any order:

- labels: Shape (rows,), whole numbers >= 0; 0 is irrelevant.
- scores: Shape (rows,), finite; higher is better.
- groups: Shape (rows,), query ids of any hashable and sortable type.

Empty columns, columns of different lengths and invalid values raise a ValueError; ids that do not sort, a TypeError.
Results by query have shape (queries,), in the order of the sorted ids, nan where a query does not define the measure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.stats import kendalltau

Gain: TypeAlias = Literal["exp2", "linear"]
Ints: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]

_MAX_EXP2_LABEL = 1000  # 2^1024 overflows float64
PAIRS = ("concordant", "discordant", "tied")


class TeacherError(NamedTuple):
    """Distance of student from teacher scores, in units of the scores: rmse^2 = offset^2 + order^2."""

    rmse: float
    offset: float
    order: float


def ndcg(labels: ArrayLike, scores: ArrayLike, groups: ArrayLike, k: int | None = 10, gain: Gain = "exp2") -> Floats:
    """Compute normalised discounted cumulative gain by query, with the discount 1 / log2(1 + rank).

    Documents with equal scores share the mean gain of their ranks. `k` cuts off the ranking and the ideal ranking;
    None for all ranks. The gain is 2^label - 1 ("exp2") or the label ("linear").

    Returns:
        Shape (queries,), in [0, 1]; nan for a query without a relevant document.

    Raises:
        ValueError: If k < 1, the gain is unknown, or a label is too large for "exp2".

    Source: Järvelin and Kekäläinen 2002 (linear), Burges et al. 2005 (exp2), McSherry and Najork 2008 (ties); equals
        sklearn.metrics.ndcg_score(gains, scores, ignore_ties=False).
    """
    return _ndcg(_read(labels, scores, groups), k, gain)


def query_mean(values: Floats) -> float:
    """Average a measure over the queries that define it; nan if none does."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else math.nan


def kendall_tau(scores_a: ArrayLike, scores_b: ArrayLike, groups: ArrayLike) -> Floats:
    """Compute Kendall's tau-b by query between two scorings of the same documents, such as student and teacher.

    Returns:
        Shape (queries,), in [-1, 1]; nan for a query with one document, or with constant scores in a or b.

    Source: Kendall 1945.
    """
    a, b, query = _columns(groups, scores_a=scores_a, scores_b=scores_b)
    order = np.argsort(query, kind="stable")
    parts = np.split(order, _edges(query[order])[1:-1])
    return np.array([kendalltau(a[rows], b[rows]).statistic if len(rows) > 1 else math.nan for rows in parts])


def teacher_error(scores: ArrayLike, teacher_scores: ArrayLike, groups: ArrayLike) -> TeacherError:
    """Compute the root mean squared error of student against teacher scores, split into offset and order.

    With e = student - teacher and m the mean of e in the row's query, offset^2 is the mean of m^2 over the rows and
    order^2 the mean of (e - m)^2. PNR and NDCG do not depend on the offset.
    """
    student, teacher, query = _columns(groups, scores=scores, teacher_scores=teacher_scores)
    error = student - teacher
    offset = (np.bincount(query, weights=error) / np.bincount(query))[query]
    return TeacherError(*(math.sqrt(np.mean(part**2)) for part in (error, offset, error - offset)))


def by_query(
    labels: ArrayLike,
    scores: ArrayLike,
    groups: ArrayLike,
    ks: Iterable[int] = (1, 3, 5, 10),
    retrieved: ArrayLike | None = None,
) -> dict[str, NDArray[Any]]:
    """Compute all measures by query.

    `retrieved`, shape (rows,), is False for a judged document that a retrieval run lacks: it ranks last and earns
    nothing in NDCG, MRR and MAP, and a query without a relevant document counts 0 there, as in trec_eval. None is for
    re-ranking: all documents are ranked, and such a query is nan. `ks` are the cut-offs of NDCG.

    Returns:
        Columns of shape (queries,): "concordant", "discordant" and "tied" are numbers of document pairs with label_i >
        label_j and score_i > score_j, score_i < score_j or equal scores; "pair_accuracy" is the concordant share of
        concordant and discordant pairs; "ndcg@k"; "mrr" is 1 / rank of the first relevant document (label >= 1), where
        among equal scores the lowest label ranks first; "map" is the mean precision at the ranks of the relevant
        documents, with equal scores as in "mrr".
    """
    if retrieved is None:
        return _by_query(_read(labels, scores, groups), ks)
    values = _by_query(_read(labels, scores, groups, np.asarray(retrieved, np.bool_)), ks)
    return {name: np.nan_to_num(column) if name != "pair_accuracy" else column for name, column in values.items()}


def evaluate(
    labels: ArrayLike, scores: ArrayLike, groups: ArrayLike, ks: Iterable[int] = (1, 3, 5, 10)
) -> dict[str, float | int]:
    """Compute all measures; arguments as in `by_query`.

    Takes O(rows * (log rows + distinct labels)) time and O(rows) memory.

    Returns:
        Python numbers. "pnr" (concordant / discordant, inf without discordant pairs), "pair_accuracy", "concordant",
        "discordant" and "tied" are over the pairs of all queries; "pair_accuracy_per_query", "ndcg@k", "mrr" and "map"
        are means over the queries that define them; "auc" and "cross_query_pair_accuracy" compare scores across
        queries, AUC being the probability that a document with label >= 1 scores higher than one with label 0, ties
        counting half; "queries", "queries_without_relevant" and "documents" are counts.

    Source: Zou et al. 2021, arXiv 2105.11108, for PNR; counting over all queries (micro) is our choice. Mann and
        Whitney 1947 for AUC, equal to sklearn.metrics.roc_auc_score.
    """
    rows = _read(labels, scores, groups)
    queries = _by_query(rows, ks)
    concordant, discordant, tied = (int(queries[name].sum()) for name in PAIRS)
    everywhere = _count_pairs(rows.pooled)[:, 0]
    across = everywhere - (concordant, discordant, tied)
    relevant = _count_pairs(replace(rows.pooled, labels=np.minimum(rows.pooled.labels, 1)))[:, 0]
    return {
        "pnr": float(_ratio(concordant, discordant)),
        "pair_accuracy": float(_ratio(concordant, concordant + discordant)),
        "pair_accuracy_per_query": query_mean(queries["pair_accuracy"]),
        "concordant": concordant,
        "discordant": discordant,
        "tied": tied,
        **{name: query_mean(queries[name]) for name in queries if name.startswith(("ndcg@", "mrr", "map"))},
        "auc": float(_ratio(relevant[0] + relevant[2] / 2, relevant.sum())),
        "cross_query_pair_accuracy": float(_ratio(across[0], across[:2].sum())),
        "queries": queries["map"].size,
        "queries_without_relevant": int(np.isnan(queries["map"]).sum()),
        "documents": rows.labels.size,
    }


@dataclass(frozen=True)
class _Rows:
    """Validated rows, sorted by query, falling score and rising label.

    Rows that were not retrieved are last in their query.
    """

    labels: Ints
    scores: Floats
    query: Ints
    retrieved: NDArray[np.bool_]

    @cached_property
    def query_edges(self) -> Ints:
        return _edges(self.query)

    @cached_property
    def tie_edges(self) -> Ints:
        return _edges(self.query, self.retrieved, np.where(self.retrieved, self.scores, 0))

    @cached_property
    def rank(self) -> Ints:
        """Rank of each row in its query, from 1."""
        return np.arange(1, self.query.size + 1) - _starts(self.query_edges)

    @cached_property
    def ideal_labels(self) -> Ints:
        """Labels in falling order within each query."""
        return self.labels[np.lexsort((-self.labels, self.query))]

    @cached_property
    def pooled(self) -> _Rows:
        """Rows as documents of a single query."""
        return _sort(self.labels, self.scores, np.zeros_like(self.query), self.retrieved)

    def sum(self, values: NDArray[Any]) -> NDArray[Any]:
        """Sum values of shape (..., rows) by query."""
        return np.add.reduceat(values, self.query_edges[:-1], axis=-1)


def _read(
    labels: ArrayLike, scores: ArrayLike, groups: ArrayLike, retrieved: NDArray[np.bool_] | None = None
) -> _Rows:
    grades, values, query = _columns(groups, labels=labels, scores=scores)
    _refuse("labels", (grades < 0) | (grades % 1 != 0), "not whole numbers >= 0")
    everything = np.ones(query.shape, np.bool_)
    return _sort(grades.astype(np.int64), values, query, everything if retrieved is None else retrieved)


def _sort(labels: Ints, scores: Floats, query: Ints, retrieved: NDArray[np.bool_]) -> _Rows:
    order = np.lexsort((labels, np.where(retrieved, -scores, 0), ~retrieved, query))
    return _Rows(labels[order], scores[order], query[order], retrieved[order])


def _columns(groups: ArrayLike, **numbers: ArrayLike) -> tuple[NDArray[Any], ...]:
    """Validate columns; return the numbers as float64, then the ids as their ranks in sorted order."""
    columns = {name: np.asarray(column) for name, column in (*numbers.items(), ("groups", groups))}
    shapes = {name: column.shape for name, column in columns.items()}
    ids = columns.pop("groups")
    if ids.ndim != 1 or not ids.size or len(set(shapes.values())) > 1:
        raise ValueError(f"columns must be one-dimensional, of one length and not empty, got shapes {shapes}")
    for name, column in columns.items():
        if column.dtype.kind not in "biuf":
            raise ValueError(f"{name} must be numbers, got {column.dtype}")
        _refuse(name, ~np.isfinite(column), "not finite")
    places, _ = pd.factorize(ids, sort=True)  # several times faster than np.unique on strings
    _refuse("groups", places < 0, "missing (None or nan)")
    return *(column.astype(np.float64) for column in columns.values()), places


def _refuse(name: str, bad: NDArray[np.bool_], what: str) -> None:
    if bad.any():
        raise ValueError(f"{name}: {bad.sum()} of {bad.size} values are {what}, the first at index {bad.argmax()}")


def _by_query(rows: _Rows, ks: Iterable[int]) -> dict[str, NDArray[Any]]:
    pairs = _count_pairs(rows)
    return {
        **dict(zip(PAIRS, pairs, strict=True)),
        "pair_accuracy": _ratio(pairs[0], pairs[0] + pairs[1]),
        **{f"ndcg@{k}": _ndcg(rows, k) for k in ks},
        "mrr": _reciprocal_rank(rows),
        "map": _average_precision(rows),
    }


def _count_pairs(rows: _Rows) -> Ints:
    """Count concordant, discordant and tied pairs, shape (3, queries)."""
    # For each document: the lower-labelled ones that score below, above and like it.
    counts = np.zeros((3, rows.labels.size), np.int64)
    query_start, query_end = _starts(rows.query_edges), _ends(rows.query_edges)
    tie_start, tie_end = _starts(rows.tie_edges), _ends(rows.tie_edges)
    for label in np.unique(rows.labels)[1:]:
        lower_before = np.concatenate(([0], np.cumsum(rows.labels < label)))
        at = np.flatnonzero(rows.labels == label)
        counts[0, at] = lower_before[query_end[at]] - lower_before[tie_end[at]]
        counts[1, at] = lower_before[tie_start[at]] - lower_before[query_start[at]]
        counts[2, at] = lower_before[tie_end[at]] - lower_before[tie_start[at]]
    return rows.sum(counts)


def _ndcg(rows: _Rows, k: int | None, gain: Gain = "exp2") -> Floats:
    if k is not None and k < 1:
        raise ValueError(f"k must be at least 1 or None, got {k}")
    discount = np.where(rows.rank <= (math.inf if k is None else k), 1 / np.log2(1 + rows.rank), 0)
    # Sharing the mean discount among equal scores has the same sum as sharing their mean gain.
    sizes = np.diff(rows.tie_edges)
    shared = np.repeat(np.add.reduceat(discount, rows.tie_edges[:-1]) / sizes, sizes)
    found = _gains(rows.labels, gain) * shared * rows.retrieved
    ideal = _gains(rows.ideal_labels, gain) * discount
    return _ratio(rows.sum(found), rows.sum(ideal))


def _gains(labels: Ints, gain: Gain) -> Floats:
    if gain == "linear":
        return labels.astype(np.float64)
    if gain != "exp2":
        raise ValueError(f"gain must be 'exp2' or 'linear', got {gain!r}")
    if labels.max() > _MAX_EXP2_LABEL:
        raise ValueError(f"gain 'exp2' supports labels up to {_MAX_EXP2_LABEL}, got {labels.max()}; use 'linear'")
    return np.exp2(labels) - 1


def _reciprocal_rank(rows: _Rows) -> Floats:
    relevant = rows.labels >= 1
    best = np.maximum.reduceat(np.where(relevant & rows.retrieved, 1 / rows.rank, 0), rows.query_edges[:-1])
    return np.where(rows.sum(relevant.astype(np.int64)) > 0, best, np.nan)


def _average_precision(rows: _Rows) -> Floats:
    relevant = (rows.labels >= 1).astype(np.int64)
    found = np.cumsum(relevant)
    found_before_query = (found - relevant)[_starts(rows.query_edges)]
    precision = (found - found_before_query) / rows.rank
    return _ratio(rows.sum(relevant * precision * rows.retrieved), rows.sum(relevant))


def _edges(*columns: NDArray[Any]) -> Ints:
    """Return the starts of runs of equal rows, then the number of rows, shape (runs + 1,)."""
    changes = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return np.concatenate(([0], np.flatnonzero(changes) + 1, [columns[0].size]))


def _starts(edges: Ints) -> Ints:
    """Return the start of each row's run."""
    return np.repeat(edges[:-1], np.diff(edges))


def _ends(edges: Ints) -> Ints:
    """Return the end of each row's run, exclusive."""
    return np.repeat(edges[1:], np.diff(edges))


def _ratio(numerator: ArrayLike, denominator: ArrayLike) -> Any:
    """Divide as IEEE 754 does: x / 0 is inf, 0 / 0 is nan."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.true_divide(numerator, denominator)
