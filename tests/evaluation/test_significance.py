"""Intervals and paired tests."""

import math

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.stats import false_discovery_control, nct, permutation_test, ttest_rel
from scipy.stats import t as student_t

from hf_disranker.evaluation.significance import (
    bootstrap,
    changed_tops,
    compare,
    holm,
    marks,
    queries_needed,
    randomisation_test,
    refusal,
)


def test_the_p_value_is_the_share_of_sign_patterns():
    # Of the eight sign patterns of (1, 2, 3), sums +-6 are as far from 0 as 6: 2 of 8.
    assert randomisation_test([1.0, 2.0, 3.0], rounds=40_000) == pytest.approx(0.25, abs=0.01)


def test_agrees_with_scipy():
    difference = np.random.default_rng(3).normal(0.1, 0.5, 60)
    options = {"permutation_type": "samples", "n_resamples": 20_000, "random_state": 1}
    expected = permutation_test((difference, np.zeros(60)), lambda a, b, axis: np.mean(a - b, axis=axis), **options)
    assert randomisation_test(difference, rounds=20_000) == pytest.approx(expected.pvalue, abs=0.015)


def test_no_difference_is_no_evidence_and_nan_queries_do_not_count():
    assert randomisation_test([0.0, 0.0]) == 1.0
    # No random pattern has all twenty signs alike: what is left is the observed one, of 99 + 1.
    assert randomisation_test([1.0] * 20, rounds=99) == 0.01
    assert randomisation_test([1.0, 2.0, np.nan, 3.0], seed=5) == randomisation_test([1.0, 2.0, 3.0], seed=5)
    assert math.isnan(randomisation_test([np.nan]))


# Intervals


def test_bootstrap_matches_hand_example():
    # Two queries, drawn twice: the mean of 1 and 3 comes out as 1, 2 and 3 with probabilities 1/4, 1/2 and 1/4.
    assert bootstrap([1, 3]) == (1, 3)


def test_bootstrap_of_a_ratio_resamples_numerator_and_denominator_together():
    # Ratios 3/1, (3 + 1) / (1 + 1) and 1/1: never 3/2 / 1.
    assert bootstrap([3, 1], [1, 1]) == (1, 3)
    assert bootstrap([4, 40, 400], [2, 20, 200]) == (2, 2)


def test_bootstrap_of_a_mean_agrees_with_the_normal_interval():
    values = np.random.default_rng(0).normal(5, 2, size=1000)
    half = 1.96 * values.std() / math.sqrt(1000)
    assert_allclose(bootstrap(values, rounds=4000), [values.mean() - half, values.mean() + half], atol=0.1 * half)


def test_bootstrap_leaves_out_queries_without_a_value():
    values = np.random.default_rng(0).normal(size=50)
    assert bootstrap(np.r_[values[:20], math.nan, values[20:]]) == bootstrap(values)
    assert all(map(math.isnan, bootstrap([math.nan])))


def test_bootstrap_of_pnr_reaches_inf_and_is_nan_without_pairs():
    # Discordant pairs 0 and 1: the first query drawn twice gives inf, the second twice 1.
    assert bootstrap([1, 1], [0, 1]) == (1, math.inf)
    assert all(map(math.isnan, bootstrap([0, 0], [0, 0])))


def test_bootstrap_is_reproducible_by_seed():
    values = np.random.default_rng(0).normal(size=50)
    assert bootstrap(values, seed=1) == bootstrap(values, seed=1) != bootstrap(values, seed=2)


def test_bootstrap_of_a_ratio_equals_a_loop_of_resamples():
    rng = np.random.default_rng(4)
    right, wrong = rng.integers(0, 20, 300), rng.integers(0, 9, 300)
    draws = [rng.integers(300, size=300) for _ in range(4000)]
    expected = np.quantile([right[draw].sum() / wrong[draw].sum() for draw in draws], [0.025, 0.975])
    assert_allclose(bootstrap(right, wrong, rounds=4000), expected, rtol=0.02)


def test_bootstrap_of_one_query_is_its_value():
    assert bootstrap([3], [2]) == bootstrap([3, math.nan], [2, 1]) == (1.5, 1.5)
    assert bootstrap([3], [0]) == (math.inf, math.inf)


def test_many_queries_are_drawn_in_blocks_with_the_same_spread():
    values = np.random.default_rng(0).normal(5, 2, size=200_000)
    half = 1.96 * values.std() / math.sqrt(values.size)
    assert_allclose(bootstrap(values, rounds=4000), [values.mean() - half, values.mean() + half], atol=0.1 * half)


# Comparisons


def two_rankers(shift, queries=400, seed=0):
    rng = np.random.default_rng(seed)
    hardness = rng.uniform(size=queries)
    worse, better = (hardness + rng.normal(0, 0.2, queries) for _ in range(2))
    return {"worse": worse, "better": better + shift}


@pytest.mark.parametrize("shift", [0.0, 0.02, 0.1])
def test_compare_agrees_with_scipy(shift):
    values = two_rankers(shift)
    (one,) = compare(values)
    assert (one.first, one.second, one.queries) == ("better", "worse", 400)
    difference = values["better"] - values["worse"]
    expected = ttest_rel(values["better"], values["worse"])
    assert one.p == one.p_holm == pytest.approx(expected.pvalue, abs=0.02)
    assert one.effect == pytest.approx(expected.statistic / math.sqrt(400))
    assert one.difference == pytest.approx(difference.mean())
    assert_allclose(one.interval, expected.confidence_interval(), atol=0.006)


def test_compare_agrees_with_ranx():
    tests = pytest.importorskip("ranx.statistical_tests")  # brings numba, so it is not among the dev dependencies
    values = two_rankers(0.02)
    (one,) = compare(values)
    theirs, _ = tests.fisher_randomization_test(values["worse"], values["better"], n_permutations=20_000)
    assert one.p == pytest.approx(theirs, abs=0.015) and 0.02 < one.p < 0.5


def test_queries_that_one_ranker_does_not_define_are_left_out():
    values = two_rankers(0.1)
    values["worse"][:10] = np.nan
    (one,) = compare(values)
    (cut,) = compare({name: column[10:] for name, column in values.items()})
    assert one == cut and one.queries == 390


def test_equal_rankers_have_no_effect():
    (one,) = compare({"a": [0.5, 0.7], "b": [0.5, 0.7]})
    assert (one.difference, one.p, one.effect, one.queries_needed) == (0.0, 1.0, 0.0, None)


def test_pairs_choose_what_is_compared():
    values = {"a": [0.1, 0.2, 0.4], "b": [0.3, 0.3, 0.3], "c": [0.9, 0.8, 0.9]}
    assert [(one.first, one.second) for one in compare(values)] == [("b", "a"), ("c", "a"), ("c", "b")]
    assert [(one.first, one.second) for one in compare(values, [("a", "c")])] == [("a", "c")]


def test_holm_matches_hand_example():
    # Sorted 0.01, 0.02, 0.03, 0.5 times 4, 3, 2, 1: 0.04, 0.06, 0.06, 0.5, each at least the one before.
    assert_allclose(holm([0.03, 0.01, 0.5, 0.02]), [0.06, 0.04, 0.5, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []
    p = np.random.default_rng(0).uniform(size=20) ** 3
    assert (np.array(holm(p)) >= false_discovery_control(p) - 1e-12).all()  # Holm is the stricter one


@pytest.mark.parametrize("effect", [0.05, -0.2, 0.5])
def test_queries_needed_give_80_percent_power(effect):
    queries = queries_needed(effect)
    limit = student_t.ppf(0.975, queries - 1)
    power = nct.sf(limit, queries - 1, abs(effect) * math.sqrt(queries))
    assert power == pytest.approx(0.8, abs=0.02)
    assert queries_needed(0.0) is None and queries_needed(math.nan) is None


def test_small_and_solved_sets_allow_no_claim():
    assert refusal(200, 0.88) is None
    assert refusal(199, 0.5) == "199 queries are fewer than 200"
    assert "nearly solves" in refusal(1000, 0.93) and "no run is named bm25" in refusal(1000, None)


def test_marks_name_the_beaten_rankers():
    rng = np.random.default_rng(0)
    base = rng.uniform(size=300)
    values = {"low": base, "mid": base + 0.1 + rng.normal(0, 0.1, 300), "alike": base + 0.1 + rng.normal(0, 0.1, 300)}
    found = marks(compare(values), {"low": "a", "mid": "b", "alike": "c"})
    assert found == {"low": "", "mid": "a", "alike": "a"}


def test_changed_tops_match_hand_example():
    # a: the order of the first two turns. b: equal scores keep the order of the rows. c: place 3 changes alone.
    groups = list("aaabbccc")
    first = [3, 2, 1, 5, 5, 3, 2, 1]
    second = [2, 3, 1, 1, 1, 9, 5, 6]
    assert changed_tops(first, second, groups, 1) == pytest.approx(1 / 3)
    assert changed_tops(first, second, groups, 2) == pytest.approx(2 / 3)
    assert changed_tops(first, first, groups, 3) == 0
    turned = np.random.default_rng(0).permutation(8)
    shuffled = [np.array(column)[turned] for column in (first, second, groups)]
    assert changed_tops(*shuffled, 1) == pytest.approx(1 / 3)
