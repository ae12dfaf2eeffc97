"""Paired tests."""

import math

import numpy as np
import pytest
from scipy.stats import permutation_test

from hf_disranker.significance import randomisation_test


def test_the_p_value_is_the_share_of_sign_patterns():
    # Of the eight sign patterns of (1, 2, 3), sums +-6 are as far from 0 as 6: 2 of 8.
    assert randomisation_test([1.0, 2.0, 3.0], rounds=40_000) == pytest.approx(0.25, abs=0.01)


def test_agrees_with_scipy():
    difference = np.random.default_rng(3).normal(0.1, 0.5, 60)
    options = {"permutation_type": "samples", "n_resamples": 20_000, "rng": 1}
    expected = permutation_test((difference, np.zeros(60)), lambda a, b, axis: np.mean(a - b, axis=axis), **options)
    assert randomisation_test(difference, rounds=20_000) == pytest.approx(expected.pvalue, abs=0.015)


def test_no_difference_is_no_evidence_and_nan_queries_do_not_count():
    assert randomisation_test([0.0, 0.0]) == 1.0
    assert randomisation_test([1.0, 2.0, np.nan, 3.0], seed=5) == randomisation_test([1.0, 2.0, 3.0], seed=5)
    assert math.isnan(randomisation_test([np.nan]))
