"""Bootstrap intervals and paired significance tests, with queries as the unit of resampling."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import norm

LEVEL = 0.05
# With fewer queries, a difference is reported but not called significant.
ENOUGH_QUERIES = 200
# Where BM25 reaches this value, there is too little room for differences between rankers.
NEARLY_SOLVED = 0.9
_BLOCKS = 10_000
_CHUNK = 1000  # sign patterns at a time: 1,000 x 10,000 queries are 80 MB

Interval = tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    """Difference of a measure between two rankers on the same queries."""

    first: str
    second: str
    difference: float  # mean of first minus second over the queries that define both
    interval: Interval  # 95% paired bootstrap interval of the difference
    p: float  # of the paired randomisation test
    p_holm: float  # corrected for all comparisons of the call
    effect: float  # mean over standard deviation of the differences (Cohen's d of paired values)
    queries: int
    queries_needed: int | None  # to detect the difference with power 0.8; None if it is 0
    changed: Mapping[int, float] = field(default_factory=dict)  # by k, see `changed_tops`


def bootstrap(numerator: ArrayLike, denominator: ArrayLike = 1, *, rounds: int = 1000, seed: int = 0) -> Interval:
    """Compute the 95% percentile bootstrap interval of sum(numerator) / sum(denominator), resampling queries.

    The numerator, shape (queries,), is the values for a mean, the concordant pairs for PNR; the denominator, of the
    same shape or a number, is 1 for a mean, the discordant pairs for PNR.

    Returns:
        (low, high), both nan without a defined query. Queries with a nan and resamples of 0 / 0 are left out; a
        resample of x / 0 is inf.

    Source: Efron 1979.
    """
    top = np.asarray(numerator, np.float64)
    bottom = np.broadcast_to(np.asarray(denominator, np.float64), top.shape)
    defined = ~np.isnan(top + bottom)
    ratios = _resampled_ratios(top[defined], bottom[defined], rounds, seed)
    ratios = ratios[~np.isnan(ratios)]
    if not ratios.size:
        return math.nan, math.nan
    # No interpolation: it is undefined between a number and inf.
    low = np.quantile(ratios, LEVEL / 2, method="lower")
    return float(low), float(np.quantile(ratios, 1 - LEVEL / 2, method="higher"))


def _resampled_ratios(top: np.ndarray, bottom: np.ndarray, rounds: int, seed: int) -> np.ndarray:
    """Return sum(top) / sum(bottom) of bootstrap resamples, shape (rounds,); empty without queries."""
    generator = np.random.default_rng(seed)
    if top.size > _BLOCKS:
        # Resample sums over random blocks of queries: the total has the same spread at a lower cost.
        order, starts = generator.permutation(top.size), np.linspace(0, top.size, _BLOCKS, False).astype(int)
        top, bottom = (np.add.reduceat(values[order], starts) for values in (top, bottom))
    draws = (generator.integers(top.size, size=top.size) for _ in range(rounds if top.size else 0))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.array([top[draw].sum() / bottom[draw].sum() for draw in draws])


def randomisation_test(difference: ArrayLike, *, rounds: int = 10_000, seed: int = 0) -> float:
    """Compute the two-sided p-value of a paired randomisation test for the mean difference between two rankers.

    Under the null hypothesis, the difference of each query has a random sign. Differences have the shape (queries,);
    those that are nan are left out.

    Returns:
        Share of sign patterns, the observed one included, whose mean is at least as far from 0; nan without a query.

    Source: Smucker, Allan and Carterette 2007, "A comparison of statistical significance tests for information
    retrieval evaluation".
    """
    values = np.asarray(difference, np.float64)
    values = values[~np.isnan(values)]
    if not values.size:
        return float("nan")
    generator = np.random.default_rng(seed)
    observed, extreme = abs(values.sum()), 0
    for start in range(0, rounds, _CHUNK):
        signs = generator.choice([-1.0, 1.0], size=(min(_CHUNK, rounds - start), values.size))
        # The tolerance counts equal sums that differ by rounding.
        extreme += int((np.abs(signs @ values) >= observed * (1 - 1e-12)).sum())
    return (extreme + 1) / (rounds + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for multiple tests, keeping their order.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    order = np.argsort(p_values)
    steps = np.asarray(p_values)[order] * np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return corrected.tolist()


def queries_needed(effect: float) -> int | None:
    """Return the queries for a two-sided paired test at 5% to detect an effect with power 0.8; None for no effect.

    Uses the normal approximation ((z_0.975 + z_0.8) / effect)^2, which is one or two too low for small numbers.
    """
    if not effect or math.isnan(effect):
        return None
    return math.ceil(((norm.ppf(1 - LEVEL / 2) + norm.ppf(0.8)) / effect) ** 2)


def compare(values: Mapping[str, ArrayLike], pairs: Iterable[tuple[str, str]] | None = None) -> list[Comparison]:
    """Compare rankers by a measure on the same queries; by default all pairs, the later ranker first.

    The values of each ranker have the shape (queries,), in the same order, nan where the measure is undefined.
    """
    compared = [(b, a) for a, b in combinations(values, 2)] if pairs is None else list(pairs)
    columns = {name: np.asarray(column, np.float64) for name, column in values.items()}
    found = []
    for first, second in compared:
        difference = columns[first] - columns[second]
        difference = difference[~np.isnan(difference)]
        spread = difference.std(ddof=1) if difference.size > 1 else math.nan
        mean = float(difference.mean()) if difference.size else math.nan
        effect = 0.0 if mean == 0 else mean / spread if spread else math.copysign(math.inf, mean)
        p, needed = randomisation_test(difference), queries_needed(effect)
        one = Comparison(first, second, mean, bootstrap(difference), p, p, float(effect), difference.size, needed)
        found.append(one)
    corrected = holm([one.p for one in found])
    return [replace(one, p_holm=p) for one, p in zip(found, corrected, strict=True)]


def refusal(queries: int, bm25: float | None) -> str | None:
    """Return the reason not to call any difference on a query set significant, or None.

    `bm25` is its value on the queries, in NDCG or another measure between 0 and 1; None if unknown.
    """
    if queries < ENOUGH_QUERIES:
        return f"{queries} queries are fewer than {ENOUGH_QUERIES}"
    if bm25 is None:
        return "no run is named bm25, so whether BM25 nearly solves these queries is unknown"
    if bm25 >= NEARLY_SOLVED:
        return f"BM25 nearly solves these queries ({bm25:.3f})"
    return None


def marks(comparisons: Iterable[Comparison], letters: Mapping[str, str]) -> dict[str, str]:
    """Return, for each ranker, the letters of those that it beats significantly, as in tables of retrieval papers."""
    beaten: dict[str, list[str]] = {name: [] for name in letters}
    for one in comparisons:
        if one.p_holm < LEVEL:
            winner, loser = (one.first, one.second) if one.difference > 0 else (one.second, one.first)
            beaten[winner].append(letters[loser])
    return {name: "".join(sorted(found)) for name, found in beaten.items()}


def changed_tops(scores_a: ArrayLike, scores_b: ArrayLike, groups: ArrayLike, k: int) -> float:
    """Compute the share of queries whose top k documents, or their order, differ: all that an online test can see.

    Scores and query ids (`groups`) have the shape (rows,); equal scores keep the order of the rows.
    """
    query = np.unique(np.asarray(groups), return_inverse=True)[1]
    a, b = (np.lexsort((-np.asarray(scores), query)) for scores in (scores_a, scores_b))
    ordered = query[a]  # the same for a and b, so place i has the same query and rank in both
    rank = np.arange(ordered.size) - np.searchsorted(ordered, ordered)
    changed = np.zeros(ordered[-1] + 1, bool)
    changed[ordered[(a != b) & (rank < k)]] = True
    return float(changed.mean())
