"""How sure a measure is, and whether rankers differ by more than chance: everything is drawn by query."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import norm

LEVEL = 0.05
# Below, a difference is shown with its interval and not called significant.
ENOUGH_QUERIES = 200
# A set on which BM25 reaches this much leaves too little to tell rankers apart.
NEARLY_SOLVED = 0.9
_BLOCKS = 10_000
_CHUNK = 1000  # sign patterns at a time: 1,000 x 10,000 queries are 80 MB

Interval = tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    """One ranker's measure less another's, on the same queries.

    Args:
        first: name of a ranker.
        second: name of the other.
        difference: mean over the queries that both define.
        interval: its 95% paired bootstrap interval.
        p: of the paired randomisation test.
        p_holm: the same, corrected for all comparisons that were made together.
        effect: mean over standard deviation of the differences (Cohen's d of paired values).
        queries: how many were compared.
        queries_needed: how many a difference of this size needs to be found four times out of five; None if it is 0.
        changed: by k, the share of queries whose first k documents, or their order, differ.
    """

    first: str
    second: str
    difference: float
    interval: Interval
    p: float
    p_holm: float
    effect: float
    queries: int
    queries_needed: int | None
    changed: Mapping[int, float] = field(default_factory=dict)


def bootstrap(
    numerator: ArrayLike, denominator: ArrayLike = 1, *, rounds: int = 1000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of sum(numerator) / sum(denominator), by resampling queries.

    Args:
        numerator: shape (queries,); for a mean its values, for PNR the concordant pairs.
        denominator: shape (queries,) or one number; for a mean 1, for PNR the discordant pairs.
        rounds: how many resamples.
        confidence: the share of resamples between low and high.
        seed: of the random draws.

    Returns:
        (low, high), both nan if there is nothing to draw from. Queries with a nan and resamples of 0 / 0 are left out;
        a resample of x / 0 is inf.

    Raises:
        ValueError: shapes that do not fit, rounds < 1, or confidence outside (0, 1).

    Source: Efron 1979.
    """
    if rounds < 1 or not 0 < confidence < 1:
        raise ValueError(f"rounds must be >= 1 and confidence between 0 and 1, got {rounds} and {confidence}")
    top = np.asarray(numerator, np.float64)
    bottom = np.broadcast_to(np.asarray(denominator, np.float64), top.shape)
    defined = ~np.isnan(top + bottom)
    top, bottom = top[defined], bottom[defined]
    generator = np.random.default_rng(seed)
    if top.size > _BLOCKS:
        # Sums over random blocks of queries are drawn instead: the same spread of the total, and no draw is long.
        order, starts = generator.permutation(top.size), np.linspace(0, top.size, _BLOCKS, False).astype(int)
        top, bottom = (np.add.reduceat(values[order], starts) for values in (top, bottom))
    draws = (generator.integers(top.size, size=top.size) for _ in range(rounds if top.size else 0))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.array([top[draw].sum() / bottom[draw].sum() for draw in draws])
    return _ends(ratios, confidence)


def randomisation_test(difference: ArrayLike, *, rounds: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value of a paired randomisation test: is the mean difference between two rankers chance?

    If the rankers were alike, each query's difference could as well have the other sign.

    Args:
        difference: shape (queries,), a measure of one ranker less that of the other; queries with a nan are left out.
        rounds: how many random sign patterns; the smallest possible p-value is 1 / (rounds + 1).
        seed: of the random signs.

    Returns:
        The share of patterns whose mean is at least as far from 0, the observed one among them; nan without a query.

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
        # The tolerance counts ties of equal sums that were added in another order.
        extreme += int((np.abs(signs @ values) >= observed * (1 - 1e-12)).sum())
    return (extreme + 1) / (rounds + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for having made several tests, in their order.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    order = np.argsort(p_values)
    steps = np.asarray(p_values)[order] * np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return corrected.tolist()


def queries_needed(effect: float, power: float = 0.8) -> int | None:
    """Queries on which a two-sided paired test at 5% finds an effect with the given probability; None for no effect.

    By the normal approximation ((z_0.975 + z_power) / effect)^2, which is a query or two too few where it gives few.
    """
    if not effect or math.isnan(effect):
        return None
    return math.ceil(((norm.ppf(1 - LEVEL / 2) + norm.ppf(power)) / effect) ** 2)


def compare(values: Mapping[str, ArrayLike], pairs: Iterable[tuple[str, str]] | None = None) -> list[Comparison]:
    """Compare rankers by a measure's values on the same queries.

    Args:
        values: by ranker, shape (queries,), the queries in one order; nan where a query does not define the measure.
        pairs: (first, second) names; None compares each with each, the later ranker first.

    Returns:
        A comparison for each pair, in their order.
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
        found.append((first, second, difference, mean, float(effect)))
    tests = [randomisation_test(difference) for _, _, difference, _, _ in found]
    return [
        Comparison(
            *(first, second, mean, bootstrap(difference), p, corrected),
            *(effect, difference.size, queries_needed(effect)),
        )
        for (first, second, difference, mean, effect), p, corrected in zip(found, tests, holm(tests), strict=True)
    ]


def refusal(queries: int, bm25: float | None) -> str | None:
    """Why no difference on these queries is called significant; None where one may be.

    Args:
        queries: how many were compared.
        bm25: what BM25 reaches on them, in NDCG or another measure between 0 and 1; None if not known.
    """
    if queries < ENOUGH_QUERIES:
        return f"{queries} queries are fewer than {ENOUGH_QUERIES}"
    if bm25 is None:
        return "no run is named bm25, so it is open whether BM25 nearly solves these queries"
    if bm25 >= NEARLY_SOLVED:
        return f"BM25 nearly solves these queries ({bm25:.3f})"
    return None


def marks(comparisons: Iterable[Comparison], letters: Mapping[str, str]) -> dict[str, str]:
    """For each ranker the letters of those that it beats significantly, as tables of information retrieval show it."""
    beaten: dict[str, list[str]] = {name: [] for name in letters}
    for one in comparisons:
        if one.p_holm < LEVEL:
            winner, loser = (one.first, one.second) if one.difference > 0 else (one.second, one.first)
            beaten[winner].append(letters[loser])
    return {name: "".join(sorted(found)) for name, found in beaten.items()}


def pooled(differences: Sequence[ArrayLike], *, rounds: int = 1000, seed: int = 0) -> tuple[float, Interval]:
    """One estimate from several data sets: the mean of their mean differences, and its 95% bootstrap interval.

    Every set counts the same, and its queries are drawn among themselves: the interval speaks of further queries of
    these sets, not of further sets.

    Args:
        differences: for each set a measure of one ranker less that of another, shape (queries of that set,).
        rounds: how many resamples.
        seed: of the random draws.
    """
    sets = [np.asarray(values, np.float64)[~np.isnan(values)] for values in differences]
    generator = np.random.default_rng(seed)
    draws = [
        np.mean([values[generator.integers(values.size, size=values.size)].mean() for values in sets])
        for _ in range(rounds)
    ]
    return float(np.mean([values.mean() for values in sets])), _ends(np.array(draws), 0.95)


def changed_tops(scores_a: ArrayLike, scores_b: ArrayLike, groups: ArrayLike, k: int) -> float:
    """Share of queries whose first k documents, or their order, differ: what an online test of b against a can see.

    Args:
        scores_a: shape (rows,); equal scores keep the order of the rows.
        scores_b: another scoring of the same rows.
        groups: query ids, shape (rows,).
        k: how many documents are looked at.
    """
    query = np.unique(np.asarray(groups), return_inverse=True)[1]
    a, b = (np.lexsort((-np.asarray(scores), query)) for scores in (scores_a, scores_b))
    ordered = query[a]  # the same for both, so place i is the same rank of the same query in both
    rank = np.arange(ordered.size) - np.searchsorted(ordered, ordered)
    changed = np.zeros(ordered[-1] + 1, bool)
    changed[ordered[(a != b) & (rank < k)]] = True
    return float(changed.mean())


def _ends(draws: np.ndarray, confidence: float) -> Interval:
    draws = draws[~np.isnan(draws)]
    if not draws.size:
        return math.nan, math.nan
    tail = (1 - confidence) / 2
    # Without interpolation, which has no answer between a number and inf.
    return float(np.quantile(draws, tail, method="lower")), float(np.quantile(draws, 1 - tail, method="higher"))
