"""Measures of a ranking of judged documents."""

import json
import logging
from math import log2

import numpy as np
import pandas as pd
import pytest

from hf_disranker.data import pair_texts
from hf_disranker.evaluation import evaluate, score_with, scores_of
from hf_disranker.schema import TableError

JUDGED = pd.DataFrame(
    {"query_id": ["a", "a", "a", "b", "b", "c"], "doc_id": ["1", "2", "3", "1", "2", "1"], "label": [2, 1, 0, 1, 0, 1]}
)


def scores_table(*scores):
    return JUDGED[["query_id", "doc_id"]].assign(teacher_score=np.array(scores, dtype=np.float32))


def test_measures_match_hand_example():
    # a ranks its labels 1, 2, 0: pairs (2, 1) wrong, (2, 0) and (1, 0) right. b ranks 0, 1: wrong. c has one document.
    measures = evaluate(JUDGED, np.array([1.0, 2.0, 0.0, 0.0, 1.0, 5.0]))
    a = (1 + 3 / log2(3)) / (3 + 1 / log2(3))
    assert measures["pnr"] == pytest.approx(2 / 2)
    assert measures["ndcg@5"] == pytest.approx((a + 1 / log2(3) + 1) / 3)
    low, high = measures["intervals"]["ndcg@10"]
    assert 1 / log2(3) <= low < measures["ndcg@10"] < high <= 1
    json.dumps(measures, allow_nan=False)


def test_a_ranking_without_a_wrong_pair_has_no_finite_pnr():
    measures = evaluate(JUDGED, JUDGED["label"].to_numpy(float))
    assert measures["pnr"] is None and measures["ndcg@10"] == 1.0
    assert measures["intervals"]["pnr"][1] is None
    json.dumps(measures, allow_nan=False)


def test_the_order_of_the_rows_does_not_matter(judgments):
    scores = np.random.default_rng(0).normal(size=len(judgments))
    order = np.random.default_rng(1).permutation(len(judgments))
    expected, shuffled = evaluate(judgments, scores), evaluate(judgments.iloc[order], scores[order])
    for name in ("pnr", "ndcg@5", "ndcg@10"):
        assert shuffled[name] == pytest.approx(expected[name])


def test_scores_are_looked_up_by_query_and_document(caplog):
    table = scores_table(1, 2, 3, 4, 5, 6)[::-1]
    with caplog.at_level(logging.WARNING, "hf_disranker"):
        scored = scores_of(JUDGED, table)
    assert scored.scores.tolist() == [1, 2, 3, 4, 5, 6] and scored.pairs_per_s is None
    assert not caplog.messages


@pytest.mark.parametrize("offset", [0, -3e8])  # in float32, -3e8 - 1 is -3e8
def test_a_judged_document_without_a_score_ranks_last_and_is_counted(caplog, offset):
    table = scores_table(*(np.array([1, 2, 3, 4, 5, 6]) * 64 + offset)).drop(index=[1, 3])
    with caplog.at_level(logging.WARNING, "hf_disranker"):
        scores = scores_of(JUDGED, table).scores
    assert scores[[1, 3]].max() < scores[[0, 2, 4, 5]].min()
    assert caplog.messages == ["2 of 6 judged documents are not in the scores; they rank last."]


def test_scores_of_other_documents_are_refused():
    with pytest.raises(TableError, match=r"No judged \(query_id, doc_id\) is in the scores table"):
        scores_of(JUDGED, scores_table(1, 2, 3, 4, 5, 6).assign(doc_id="other"))


def test_scoring_for_evaluation_counts_each_cut_once(student_ranker, judgments):
    rows = judgments.assign(query="read " * 40)
    scored = score_with(student_ranker, rows, progress=False)
    assert np.array_equal(scored.scores, student_ranker.predict(pair_texts(rows)))
    assert scored.pairs_per_s > 0
    assert student_ranker.queries_cut == 2 * len(rows)  # once by score_with, once above
