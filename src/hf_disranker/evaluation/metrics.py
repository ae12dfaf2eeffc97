"""Ranking measures on flat numpy arrays: PNR, NDCG, MRR, MAP, and what compares raw scores across queries.

Inputs are the columns of one table with a row per query and document, in any order:

- labels: shape (rows,), whole numbers >= 0; 0 is irrelevant;
- scores: shape (rows,), finite, higher is better;
- groups: shape (rows,), the query ids: ints, strings, whatever hashes and sorts.

Columns that are empty, differ in length or hold anything else raise a ValueError; ids that do not sort, a TypeError.
Results by query have shape (queries,), in the order of the sorted ids, and are nan where a query does not define the
measure. The order of the rows does not matter.
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

Gain: TypeAlias = Literal["exp2", "linear"]
Ints: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]

MAX_EXP2_LABEL = 1000  # 2^1024 is beyond float64


class PairCounts(NamedTuple):
    """Pairs of documents with label_i > label_j: score_i > score_j, score_i < score_j, or equal scores.

    Source: Zou et al. 2021, arXiv 2105.11108, for PNR; that we count over all queries (micro) is our choice.
    """

    concordant: int
    discordant: int
    tied: int

    @property
    def decided(self) -> int:
        """Pairs whose scores differ."""
        return self.concordant + self.discordant

    @property
    def pnr(self) -> float:
        """Positive-negative ratio, concordant / discordant: inf without discordant pairs, nan without decided ones."""
        return float(_ratio(self.concordant, self.discordant))

    @property
    def pair_accuracy(self) -> float:
        """Concordant share of the decided pairs, PNR / (1 + PNR): nan without decided pairs."""
        return float(_ratio(self.concordant, self.decided))


class QueryPairCounts(NamedTuple):
    """The counts of `PairCounts` by query, each of shape (queries,)."""

    concordant: Ints
    discordant: Ints
    tied: Ints

    @property
    def pair_accuracy(self) -> Floats:
        """By query; averaged over queries instead of PNR, which is infinite for every perfectly ranked query."""
        return _ratio(self.concordant, self.concordant + self.discordant)

    @property
    def total(self) -> PairCounts:
        """The counts over all queries."""
        return PairCounts(*(int(counts.sum()) for counts in self))


class TeacherError(NamedTuple):
    """Distance of student from teacher scores, in units of the score: rmse^2 = offset^2 + order^2."""

    rmse: float
    offset: float
    order: float


def pair_counts(labels: ArrayLike, scores: ArrayLike, groups: ArrayLike) -> PairCounts:
    """Count the pairs of documents of one query, summed over the queries.

    Takes O(rows * (log rows + distinct labels)) time and O(rows) memory.
    """
    return query_pair_counts(labels, scores, groups).total


def query_pair_counts(labels: ArrayLike, scores: ArrayLike, groups: ArrayLike) -> QueryPairCounts:
    """Count the pairs of documents of one query, for each query."""
    return _count_pairs(_read(labels, scores, groups))


def cross_query_pair_counts(labels: ArrayLike, scores: ArrayLike, groups: ArrayLike) -> PairCounts:
    """Count the pairs of documents of two different queries: does one score mean one thing for every query?"""
    rows = _read(labels, scores, groups)
    return _cross_query(rows, _count_pairs(rows).total)


def auc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Area under the ROC curve of label >= 1 against label 0, over all rows whatever their query.

    Returns:
        P(score of a relevant row > score of an irrelevant row), ties counting half; nan if either kind is missing.

    Source: Mann and Whitney 1947; equals sklearn.metrics.roc_auc_score.
    """
    return _auc(_read(labels, scores, np.zeros(np.shape(labels), np.int64)))


def ndcg(labels: ArrayLike, scores: ArrayLike, groups: ArrayLike, k: int | None = 10, gain: Gain = "exp2") -> Floats:
    """Normalised discounted cumulative gain by query; the discount is 1 / log2(1 + rank).

    Documents with equal scores share the mean gain of their places.

    Args:
        labels: grades, shape (rows,).
        scores: shape (rows,).
        groups: query ids, shape (rows,).
        k: how many ranks count, in the ranking and in the ideal one; None for all.
        gain: "exp2" for 2^label - 1, "linear" for the label.

    Returns:
        Shape (queries,), in [0, 1]; nan for a query without a relevant document.

    Raises:
        ValueError: k < 1, an unknown gain, or a label too large for "exp2".

    Source: Järvelin and Kekäläinen 2002 (linear), Burges et al. 2005 (exp2), McSherry and Najork 2008 (ties); equals
        sklearn.metrics.ndcg_score(gains, scores, ignore_ties=False).
    """
    return _ndcg(_read(labels, scores, groups), k, gain)


def reciprocal_rank(
    labels: ArrayLike, scores: ArrayLike, groups: ArrayLike, k: int | None = None, min_label: int = 1
) -> Floats:
    """1 / rank of a query's first relevant document (label >= min_label), or 0 if it ranks below k.

    Among equal scores the lowest label ranks first: the pessimistic value.

    Returns:
        Shape (queries,), in [0, 1]; nan for a query without a relevant document.
    """
    return _reciprocal_rank(_read(labels, scores, groups), k, min_label)


def average_precision(labels: ArrayLike, scores: ArrayLike, groups: ArrayLike, min_label: int = 1) -> Floats:
    """Mean precision at the ranks of a query's relevant documents (label >= min_label).

    Among equal scores the lowest label ranks first: the pessimistic value.

    Returns:
        Shape (queries,), in (0, 1]; nan for a query without a relevant document.
    """
    return _average_precision(_read(labels, scores, groups), min_label)


def query_mean(values: Floats) -> float:
    """Mean of a measure over the queries that define it; nan if none does."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else math.nan


def kendall_tau(scores_a: ArrayLike, scores_b: ArrayLike, groups: ArrayLike) -> Floats:
    """Rank correlation tau-b by query of two scorings of the same documents, such as student and teacher.

    Tau-b is the cosine between the signs of the score differences, taken over all pairs of documents. Takes
    O(sum of n^2) time for queries of n documents and O(rows) memory.

    Returns:
        Shape (queries,), in [-1, 1]; nan for a query with one document, or with constant scores in a or b.

    Source: Kendall 1945; equals scipy.stats.kendalltau.
    """
    a, b, query = _columns(groups, scores_a=scores_a, scores_b=scores_b)
    order = np.argsort(query, kind="stable")
    a, b, edges = a[order], b[order], _edges(query[order])
    left = np.arange(a.size)
    furthest = _ends(edges) - 1 - left
    products = np.zeros((3, a.size))
    for distance in range(1, np.diff(edges).max()):
        left = left[furthest[left] >= distance]
        sign_a, sign_b = (np.sign(x[left] - x[left + distance]) for x in (a, b))
        products[:, left] += sign_a * sign_b, sign_a**2, sign_b**2
    both, untied_a, untied_b = np.add.reduceat(products, edges[:-1], axis=1)
    return _ratio(both, np.sqrt(untied_a * untied_b))


def teacher_error(scores: ArrayLike, teacher_scores: ArrayLike, groups: ArrayLike) -> TeacherError:
    """Root mean squared error of student against teacher scores, split into offset and order.

    With e = student - teacher and m the mean of e in the row's query, offset^2 is the mean of m^2 over the rows and
    order^2 the mean of (e - m)^2. PNR and NDCG see nothing of the offset.
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
    """What labels and scores define for each query.

    Args:
        labels: grades, shape (rows,).
        scores: shape (rows,).
        groups: query ids, shape (rows,).
        ks: the cut-offs of NDCG.
        retrieved: False for a judged document that a retrieval run lacks, shape (rows,). It ranks last and earns
            nothing in NDCG, MRR and MAP, and a query without a relevant document counts 0 there, as in trec_eval.
            None re-ranks given documents: all are there, and such a query is nan.

    Returns:
        Columns of shape (queries,): "concordant", "discordant", "tied", "pair_accuracy", "ndcg@k", "mrr" and "map" (a
        query's reciprocal rank and average precision).
    """
    if retrieved is None:
        return _by_query(_read(labels, scores, groups), ks)
    found = _by_query(_read(labels, scores, groups, np.asarray(retrieved, np.bool_)), ks)
    return {name: np.nan_to_num(values) if name != "pair_accuracy" else values for name, values in found.items()}


def evaluate(
    labels: ArrayLike, scores: ArrayLike, groups: ArrayLike, ks: Iterable[int] = (1, 3, 5, 10)
) -> dict[str, float | int]:
    """Every measure that labels and scores define; arguments as for `by_query`.

    Returns:
        Python numbers. "pnr", "pair_accuracy", "concordant", "discordant", "tied" are over the pairs of all queries;
        "pair_accuracy_per_query", "ndcg@k", "mrr", "map" are means over the queries that define them; "auc" and
        "cross_query_pair_accuracy" compare raw scores across queries; the rest are counts.
    """
    rows = _read(labels, scores, groups)
    queries = _by_query(rows, ks)
    pairs = PairCounts(*(int(queries[name].sum()) for name in PairCounts._fields))
    return {
        "pnr": pairs.pnr,
        "pair_accuracy": pairs.pair_accuracy,
        "pair_accuracy_per_query": query_mean(queries["pair_accuracy"]),
        **pairs._asdict(),
        **{name: query_mean(queries[name]) for name in queries if name.startswith(("ndcg@", "mrr", "map"))},
        "auc": _auc(rows),
        "cross_query_pair_accuracy": _cross_query(rows, pairs).pair_accuracy,
        "queries": queries["map"].size,
        "queries_without_relevant": int(np.isnan(queries["map"]).sum()),
        "documents": rows.labels.size,
    }


@dataclass(frozen=True)
class _Rows:
    """Checked rows by query, in each query by falling score, among equal scores by rising label.

    Rows that were not retrieved are the last of their query.
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
        """From 1, by row."""
        return np.arange(1, self.query.size + 1) - _starts(self.query_edges)

    @cached_property
    def ideal_labels(self) -> Ints:
        """The labels with the highest first in each query."""
        return self.labels[np.lexsort((-self.labels, self.query))]

    @cached_property
    def pooled(self) -> _Rows:
        """The same rows as documents of one query."""
        return _sort(self.labels, self.scores, np.zeros_like(self.query), self.retrieved)

    def sum(self, values: NDArray[Any]) -> NDArray[Any]:
        """By query."""
        return np.add.reduceat(values, self.query_edges[:-1])


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
    """Check the columns of a call; the numbers come back as float64, then the ids as their places in sorted order."""
    columns = {name: np.asarray(column) for name, column in (*numbers.items(), ("groups", groups))}
    shapes = {name: column.shape for name, column in columns.items()}
    ids = columns.pop("groups")
    if ids.ndim != 1 or not ids.size or len(set(shapes.values())) > 1:
        raise ValueError(f"columns must be one-dimensional, of one length and not empty, got shapes {shapes}")
    for name, column in columns.items():
        if column.dtype.kind not in "biuf":
            raise ValueError(f"{name} must be numbers, got {column.dtype}")
        _refuse(name, ~np.isfinite(column), "not finite")
    return *(column.astype(np.float64) for column in columns.values()), _places(ids)


def _places(ids: NDArray[Any]) -> Ints:
    """The place of each id among the sorted ids, from 0."""
    found, distinct = pd.factorize(ids)  # by hashing: several times faster than np.unique on strings
    _refuse("groups", found < 0, "missing (None or nan)")
    place = {i: n for n, i in enumerate(sorted(distinct.tolist()))}
    return np.array([place[i] for i in distinct.tolist()])[found]


def _refuse(name: str, bad: NDArray[np.bool_], what: str) -> None:
    if bad.any():
        raise ValueError(f"{name}: {bad.sum()} of {bad.size} values are {what}, the first at index {bad.argmax()}")


def _by_query(rows: _Rows, ks: Iterable[int]) -> dict[str, NDArray[Any]]:
    pairs = _count_pairs(rows)
    return {
        **pairs._asdict(),
        "pair_accuracy": pairs.pair_accuracy,
        **{f"ndcg@{k}": _ndcg(rows, k) for k in ks},
        "mrr": _reciprocal_rank(rows),
        "map": _average_precision(rows),
    }


def _count_pairs(rows: _Rows) -> QueryPairCounts:
    """Count, for each document, the lower-labelled ones that score below, above and like it."""
    counts = np.zeros((3, rows.labels.size), np.int64)
    query_start, query_end = _starts(rows.query_edges), _ends(rows.query_edges)
    tie_start, tie_end = _starts(rows.tie_edges), _ends(rows.tie_edges)
    for label in np.unique(rows.labels)[1:]:
        lower_before = np.concatenate(([0], np.cumsum(rows.labels < label)))
        at = np.flatnonzero(rows.labels == label)
        counts[0, at] = lower_before[query_end[at]] - lower_before[tie_end[at]]
        counts[1, at] = lower_before[tie_start[at]] - lower_before[query_start[at]]
        counts[2, at] = lower_before[tie_end[at]] - lower_before[tie_start[at]]
    return QueryPairCounts(*np.add.reduceat(counts, rows.query_edges[:-1], axis=1))


def _cross_query(rows: _Rows, within: PairCounts) -> PairCounts:
    """All pairs less those of one query."""
    return PairCounts(*(every - inside for every, inside in zip(_count_pairs(rows.pooled).total, within, strict=True)))


def _auc(rows: _Rows) -> float:
    pairs = _count_pairs(replace(rows.pooled, labels=np.minimum(rows.pooled.labels, 1))).total
    return float(_ratio(pairs.concordant + pairs.tied / 2, pairs.decided + pairs.tied))


def _ndcg(rows: _Rows, k: int | None, gain: Gain = "exp2") -> Floats:
    discount = np.where(rows.rank <= _cutoff(k), 1 / np.log2(1 + rows.rank), 0)
    # Sharing the mean discount among equal scores gives the same sum as sharing their mean gain.
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
    if labels.max() > MAX_EXP2_LABEL:
        raise ValueError(f"gain 'exp2' takes labels up to {MAX_EXP2_LABEL}, got {labels.max()}; use 'linear'")
    return np.exp2(labels) - 1


def _reciprocal_rank(rows: _Rows, k: int | None = None, min_label: int = 1) -> Floats:
    relevant = rows.labels >= min_label
    earned = np.where(relevant & rows.retrieved & (rows.rank <= _cutoff(k)), 1 / rows.rank, 0)
    best = np.maximum.reduceat(earned, rows.query_edges[:-1])
    return np.where(rows.sum(relevant.astype(np.int64)) > 0, best, np.nan)


def _average_precision(rows: _Rows, min_label: int = 1) -> Floats:
    relevant = (rows.labels >= min_label).astype(np.int64)
    found = np.cumsum(relevant)
    found_before_query = (found - relevant)[_starts(rows.query_edges)]
    precision = (found - found_before_query) / rows.rank
    return _ratio(rows.sum(relevant * precision * rows.retrieved), rows.sum(relevant))


def _cutoff(k: int | None) -> float:
    if k is not None and k < 1:
        raise ValueError(f"k must be at least 1 or None, got {k}")
    return math.inf if k is None else k


def _edges(*columns: NDArray[Any]) -> Ints:
    """First rows of the runs of rows that agree in all columns, then the number of rows: shape (runs + 1,)."""
    changes = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return np.concatenate(([0], np.flatnonzero(changes) + 1, [columns[0].size]))


def _starts(edges: Ints) -> Ints:
    """By row, the first row of its run."""
    return np.repeat(edges[:-1], np.diff(edges))


def _ends(edges: Ints) -> Ints:
    """By row, the first row after its run."""
    return np.repeat(edges[1:], np.diff(edges))


def _ratio(numerator: ArrayLike, denominator: ArrayLike) -> Any:
    """IEEE division: x / 0 is inf, 0 / 0 is nan."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.true_divide(numerator, denominator)
