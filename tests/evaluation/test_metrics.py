from __future__ import annotations

import itertools
import math
import time

import ir_measures
import numpy as np
import pytest
from ir_measures import AP, RR, nDCG
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import kendalltau
from sklearn.metrics import ndcg_score, roc_auc_score

from hf_disranker.evaluation.metrics import by_query, evaluate, kendall_tau, ndcg, query_mean, teacher_error

# Query a: the pairs (2, 1) and (2, 0) are concordant, (1, 0) is discordant.
# Query b: one pair (1, 0) is tied, the other discordant. Query c: one concordant pair. Query d: one document.
LABELS = [2, 1, 0, 1, 0, 0, 1, 0, 0]
SCORES = [3.0, 1.0, 2.0, 0.5, 0.5, 0.9, 5.0, 4.0, 2.5]
GROUPS = list("aaabbbccd")


def random_rows(seed=0, rows=400, queries=25, grades=4, score_values=8):
    """Rows in no order, with many equal scores, and queries of many sizes."""
    random = np.random.default_rng(seed)
    groups = (queries * random.random(rows) ** 2).astype(int)
    return random.integers(grades, size=rows), random.integers(score_values, size=rows) / 4 - 1, groups


def untied_rows(seed=1, rows=300, queries=20, grades=4):
    """Rows without an equal score, and a relevant document in every query."""
    random = np.random.default_rng(seed)
    labels, groups = random.integers(grades, size=rows), np.arange(rows) % queries
    labels[:queries] = 3
    return labels, random.permutation(rows).astype(float), groups


def loop_pair_counts(labels, scores, groups, same_query):
    concordant = discordant = tied = 0
    for i, j in itertools.permutations(range(len(labels)), 2):
        if labels[i] > labels[j] and (groups[i] == groups[j]) == same_query:
            concordant += scores[i] > scores[j]
            discordant += scores[i] < scores[j]
            tied += scores[i] == scores[j]
    return concordant, discordant, tied


def pair_counts(measures):
    return tuple(measures[name] for name in ("concordant", "discordant", "tied"))


def each_query(function, *columns, groups):
    """Apply another library's function of one query to each query."""
    return [function(*(np.asarray(column)[groups == query] for column in columns)) for query in np.unique(groups)]


# Pairs


def test_pnr_matches_hand_example():
    measures = evaluate(LABELS, SCORES, GROUPS)
    assert pair_counts(measures) == (3, 2, 1)
    assert measures["pnr"] == 3 / 2
    assert measures["pair_accuracy"] == 3 / 5


def test_pair_counts_by_query_match_hand_example():
    measures = by_query(LABELS, SCORES, GROUPS)
    assert_array_equal(pair_counts(measures), [[2, 0, 1, 0], [1, 1, 0, 0], [0, 1, 0, 0]])
    assert_array_equal(measures["pair_accuracy"], [2 / 3, 0, 1, math.nan])
    assert query_mean(measures["pair_accuracy"]) == pytest.approx((2 / 3 + 0 + 1) / 3)


@pytest.mark.parametrize("seed", range(3))
def test_pair_counts_equal_the_double_loop(seed):
    labels, scores, groups = random_rows(seed)
    measures = evaluate(labels, scores, groups)
    assert pair_counts(measures) == loop_pair_counts(labels, scores, groups, same_query=True)
    concordant, discordant, _ = loop_pair_counts(labels, scores, groups, same_query=False)
    assert measures["cross_query_pair_accuracy"] == concordant / (concordant + discordant)


def test_cross_query_pair_accuracy_matches_hand_example():
    # Grade 2 in a (3.0): 3 concordant in b, 2 discordant in c, 1 concordant in d.
    # Grade 1 in a (1.0): 2 concordant in b, 1 discordant in c, 1 discordant in d.
    # Grade 1 in b (0.5): 3 discordant, in a, c and d. Grade 1 in c (5.0): 4 concordant, in a, b (two) and d.
    assert evaluate(LABELS, SCORES, GROUPS)["cross_query_pair_accuracy"] == 10 / (10 + 7)


def test_pair_counts_of_one_long_query_need_no_pair_matrix():
    # Scores rise along the rows, grades alternate 0, 1: the j-th relevant document (from 1) beats j irrelevant ones.
    half = 100_000
    measures = evaluate(np.tile([0, 1], half), np.arange(2 * half), np.zeros(2 * half, int))
    assert pair_counts(measures) == (half * (half + 1) // 2, half * (half - 1) // 2, 0)


def test_perfect_ranking_has_infinite_pnr_and_full_pair_accuracy():
    measures = evaluate([1, 0], [2.0, 1.0], ["q", "q"])
    assert measures["pnr"] == math.inf
    assert measures["pair_accuracy"] == 1


@pytest.mark.parametrize(
    ("labels", "scores", "groups", "tied"),
    [
        ([1, 0, 2], [0.1, 0.2, 0.3], ["a", "b", "c"], 0),  # one document in each query
        ([2, 2, 2], [0.1, 0.2, 0.3], ["a", "a", "a"], 0),  # equal labels
        ([2, 1, 0], [0.1, 0.1, 0.1], ["a", "a", "a"], 3),  # constant scores
    ],
)
def test_pnr_is_nan_without_a_decided_pair(labels, scores, groups, tied):
    measures = evaluate(labels, scores, groups)
    assert pair_counts(measures) == (0, 0, tied)
    assert math.isnan(measures["pnr"])
    assert math.isnan(measures["pair_accuracy"])


# NDCG


def test_ndcg_matches_hand_example():
    # Ranking 2, 0, 1. exp2: (3 + 0 + 1 / 2) / (3 + 1 / log2(3)); linear: (2 + 0 + 1 / 2) / (2 + 1 / log2(3)).
    rows = [2, 1, 0], [0.9, 0.7, 0.8], ["q"] * 3
    assert_allclose(ndcg(*rows), 3.5 / (3 + 1 / math.log2(3)))
    assert_allclose(ndcg(*rows, gain="linear"), 2.5 / (2 + 1 / math.log2(3)))
    # The first two ranks only: the document of grade 1 counts in the ideal ranking alone.
    assert_allclose(ndcg(*rows, k=2), 3 / (3 + 1 / math.log2(3)))


def test_tied_scores_share_the_mean_gain_of_their_places():
    # Gains 1 and 0 share ranks 1 and 2: 1/2 * (1 + 1 / log2(3)). With k = 1 they share the one rank that counts: 1/2.
    rows = [1, 0], [0.3, 0.3], ["q", "q"]
    assert_allclose(ndcg(*rows), (1 + 1 / math.log2(3)) / 2)
    assert_allclose(ndcg(*rows, k=1), 1 / 2)


@pytest.mark.parametrize("k", [1, 3, 10, None])
def test_ndcg_equals_sklearn_with_ties(k):
    labels, scores, groups = random_rows()
    labels[groups == 7] = 0

    def sklearn_ndcg(gains, scores):
        return ndcg_score([gains], [scores], k=k) if gains.any() else math.nan

    values = ndcg(labels, scores, groups, k)
    assert math.isnan(values[7])
    assert_allclose(values, each_query(sklearn_ndcg, 2.0**labels - 1, scores, groups=groups))
    assert_allclose(
        ndcg(labels, scores, groups, k, gain="linear"), each_query(sklearn_ndcg, labels, scores, groups=groups)
    )


def test_ndcg_refuses_what_it_cannot_compute():
    with pytest.raises(ValueError, match="k must be at least 1 or None, got 0"):
        ndcg([1, 0], [1.0, 2.0], [1, 1], k=0)
    with pytest.raises(ValueError, match="gain must be 'exp2' or 'linear', got 'exp'"):
        ndcg([1, 0], [1.0, 2.0], [1, 1], gain="exp")
    with pytest.raises(ValueError, match="labels up to 1000, got 5000"):
        ndcg([5000, 0], [1.0, 2.0], [1, 1])


# The first and all relevant documents


def test_mrr_and_map_match_hand_example():
    # Ranking 0, 1, 0, 2. Relevant at ranks 2 and 4: precisions 1/2 and 2/4.
    measures = by_query([2, 0, 1, 0], [0.1, 0.2, 0.3, 0.4], ["q"] * 4)
    assert_array_equal(measures["mrr"], [1 / 2])
    assert_array_equal(measures["map"], [(1 / 2 + 2 / 4) / 2])


def test_among_equal_scores_the_irrelevant_document_ranks_first():
    # Ranking 0, then 0 and 1 with one score: the relevant document is at rank 3.
    for labels in [[0, 1, 0], [0, 0, 1]]:
        measures = by_query(labels, [0.9, 0.5, 0.5], ["q"] * 3)
        assert_allclose(measures["mrr"], 1 / 3)
        assert_allclose(measures["map"], 1 / 3)


def test_queries_without_a_relevant_document_are_left_out():
    measures = by_query([0, 1, 0, 1], [2.0, 1.0, 1.0, 2.0], ["a", "a", "b", "c"])
    for name in ("mrr", "map"):
        assert_array_equal(measures[name], [1 / 2, math.nan, 1])
        assert query_mean(measures[name]) == 3 / 4
    assert math.isnan(query_mean(by_query([0], [1.0], ["a"])["mrr"]))


def test_measures_equal_ir_measures_without_ties():
    labels, scores, groups = rows = untied_rows()
    for measure, grades, ours in [
        (nDCG @ 10, 2**labels - 1, ndcg(*rows)),  # pytrec_eval's gain is the grade
        (nDCG @ 5, labels, ndcg(*rows, k=5, gain="linear")),
        (nDCG, labels, ndcg(*rows, k=None, gain="linear")),
        (RR, labels, by_query(*rows)["mrr"]),
        (AP, labels, by_query(*rows)["map"]),
    ]:
        keys = [(f"{group:02}", str(row)) for row, group in enumerate(groups)]
        qrels = [ir_measures.Qrel(*key, int(grade)) for key, grade in zip(keys, grades, strict=True)]
        run = [ir_measures.ScoredDoc(*key, score) for key, score in zip(keys, scores, strict=True)]
        theirs = {result.query_id: result.value for result in ir_measures.iter_calc([measure], qrels, run)}
        assert_allclose(ours, [theirs[query] for query in sorted(theirs)], rtol=1e-6, err_msg=str(measure))


# Scores across queries and against the teacher


def test_auc_matches_hand_example():
    # Relevant 3, 1, 0.5, 5 against irrelevant 2, 0.5, 0.9, 4, 2.5: they beat 4, 2, 0 (and tie 1) and 5 of 20 pairs.
    assert evaluate(LABELS, SCORES, GROUPS)["auc"] == 11.5 / 20


def test_auc_equals_sklearn_with_ties():
    labels, scores, groups = random_rows()
    assert evaluate(labels, scores, groups)["auc"] == pytest.approx(roc_auc_score(labels >= 1, scores))
    assert math.isnan(evaluate([1, 2], [0.1, 0.2], [1, 2])["auc"])


def test_teacher_error_matches_hand_example():
    # e = 1, 3 in query a (mean 2) and -1 in query b (mean -1): rmse^2 = (1 + 9 + 1) / 3,
    # offset^2 = (4 + 4 + 1) / 3, order^2 = (1 + 1 + 0) / 3.
    error = teacher_error([5.0, 1.0, 4.0], [4.0, 2.0, 1.0], ["a", "b", "a"])
    assert_allclose(error, np.sqrt([11 / 3, 9 / 3, 2 / 3]))


def test_order_error_survives_a_large_offset():
    random = np.random.default_rng(0)
    groups, teacher = np.arange(1000) % 10, random.normal(size=1000)
    student = teacher + random.normal(size=1000)
    near, far = teacher_error(student, teacher, groups), teacher_error(student + 1e6, teacher, groups)
    assert far.order == pytest.approx(near.order)
    assert far.offset == pytest.approx(1e6)
    assert near.rmse**2 == pytest.approx(near.offset**2 + near.order**2)


def test_kendall_tau_matches_hand_example():
    # Of the 6 pairs one is swapped: (5 - 1) / 6. With a tie on one side: (2 - 0) / sqrt(3 * 2).
    assert_allclose(kendall_tau([1, 2, 3, 4], [1, 3, 2, 4], [0] * 4), 4 / 6)
    assert_allclose(kendall_tau([1, 2, 3], [1, 2, 2], [0] * 3), 2 / math.sqrt(6))


def test_kendall_tau_equals_scipy_with_ties():
    _, a, groups = random_rows(0, score_values=5)
    _, b, _ = random_rows(1, score_values=5)
    b = a + b
    assert_allclose(
        kendall_tau(a, b, groups), each_query(lambda a, b: kendalltau(a, b).statistic, a, b, groups=groups), atol=1e-12
    )


def test_kendall_tau_is_nan_for_one_document_and_for_constant_scores():
    groups = ["one", "flat", "flat", "turned", "turned"]
    assert_array_equal(kendall_tau([1, 1, 1, 1, 2], [1, 1, 2, 2, 1], groups), [math.nan, math.nan, -1])


# All of it


def test_evaluate_matches_hand_example():
    # Rankings by grade: a 2 0 1, b 0 {0 1}, c 1 0, d 0 (left out of the means).
    third = 1 / math.log2(3)
    assert evaluate(LABELS, SCORES, GROUPS, ks=(1, 3)) == pytest.approx(
        {
            "pnr": 3 / 2,
            "pair_accuracy": 3 / 5,
            "pair_accuracy_per_query": (2 / 3 + 0 + 1) / 3,
            "concordant": 3,
            "discordant": 2,
            "tied": 1,
            "ndcg@1": (1 + 0 + 1) / 3,
            "ndcg@3": (3.5 / (3 + third) + (third + 1 / 2) / 2 + 1) / 3,
            "mrr": (1 + 1 / 3 + 1) / 3,
            "map": ((1 + 2 / 3) / 2 + 1 / 3 + 1) / 3,
            "auc": 11.5 / 20,
            "cross_query_pair_accuracy": 10 / 17,
            "queries": 4,
            "queries_without_relevant": 1,
            "documents": 9,
        }
    )


def test_row_order_does_not_matter():
    labels, scores, groups = random_rows()
    turned = np.random.default_rng(3).permutation(len(labels))
    shuffled = labels[turned], scores[turned], groups[turned]
    assert evaluate(*shuffled) == evaluate(labels, scores, groups)
    for name, values in by_query(labels, scores, groups).items():
        assert_array_equal(by_query(*shuffled)[name], values)
    assert_array_equal(kendall_tau(*shuffled), kendall_tau(labels, scores, groups))
    assert_allclose(teacher_error(*shuffled), teacher_error(labels, scores, groups))


@pytest.mark.parametrize("dtype", [str, object])
def test_query_ids_may_be_strings(dtype):
    labels, scores, groups = random_rows()
    names = np.array([f"query {group:03}" for group in groups], dtype)
    assert evaluate(labels, scores, names) == evaluate(labels, scores, groups)
    assert_array_equal(ndcg(labels, scores, names), ndcg(labels, scores, groups))


def test_labels_may_be_whole_floats():
    assert evaluate(np.array(LABELS, float), SCORES, GROUPS) == evaluate(LABELS, SCORES, GROUPS)


@pytest.mark.parametrize(
    ("labels", "scores", "groups", "message"),
    [
        ([], [], [], "not empty"),
        ([1, 0], [1.0, 2.0], [1], r"'labels': \(2,\), 'scores': \(2,\), 'groups': \(1,\)"),
        ([[1, 0]], [[1.0, 2.0]], [[1, 1]], "one-dimensional"),
        (
            [1, 0, 1],
            [1.0, math.nan, math.inf],
            [1, 1, 1],
            "scores: 2 of 3 values are not finite, the first at index 1",
        ),
        ([1, 0], ["1.0", "2.0"], [1, 1], "scores must be numbers"),
        ([0, 1, -1], [1.0, 2.0, 3.0], [1, 1, 1], "labels: 1 of 3 values are not whole numbers >= 0, .* index 2"),
        ([0.5, 1.0], [1.0, 2.0], [1, 1], "labels: 1 of 2 values are not whole numbers >= 0, .* index 0"),
        ([1, 0], [1.0, 2.0], ["q", None], "groups: 1 of 2 values are missing .* index 1"),
        ([1, 0], [1.0, 2.0], [math.nan, 1.0], "groups: 1 of 2 values are missing .* index 0"),
    ],
)
def test_broken_columns_raise_plain_errors(labels, scores, groups, message):
    with pytest.raises(ValueError, match=message):
        evaluate(labels, scores, groups)


@pytest.mark.slow
def test_two_million_rows_evaluate_in_seconds():
    random = np.random.default_rng(0)
    rows = 2_000_000
    labels, scores, groups = random.integers(5, size=rows), random.normal(size=rows), random.integers(10**5, size=rows)
    start = time.process_time()
    metrics = evaluate(labels, scores, groups)
    assert time.process_time() - start < 30  # about 2 s
    assert metrics["documents"] == rows
    assert metrics["auc"] == pytest.approx(0.5, abs=0.005)  # the scores are noise
