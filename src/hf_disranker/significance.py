"""Whether two rankings of the same queries differ by more than chance."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

_CHUNK = 1000  # sign patterns at a time: 1,000 x 10,000 queries are 80 MB


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
