"""Measures of a ranking of judged documents."""

import json
import logging
import re
import time
from math import log2

import ir_measures
import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from transformers import EvalPrediction

from hf_disranker.data.schema import TableError
from hf_disranker.data.tables import pair_texts
from hf_disranker.evaluation.evaluate import (
    best_passages,
    evaluate,
    interval_text,
    join_run,
    per_query,
    value_text,
)
from hf_disranker.recipes.evaluate import table_text
from hf_disranker.training.ranking_trainer import ranking_metrics

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
    assert measures["pair_accuracy_per_query"] == pytest.approx((2 / 3 + 0) / 2)
    assert (measures["mrr"], measures["queries"], measures["unjudged"]) == (pytest.approx((1 + 1 / 2 + 1) / 3), 3, 0)
    low, high = measures["intervals"]["ndcg@10"]
    assert 1 / log2(3) <= low < measures["ndcg@10"] < high <= 1
    json.dumps(measures, allow_nan=False)


def test_a_ranking_without_a_wrong_pair_has_no_finite_pnr():
    measures = evaluate(JUDGED, JUDGED["label"].to_numpy(float))
    assert measures["pnr"] is None and measures["ndcg@10"] == 1.0
    assert measures["intervals"]["pnr"][1] is None
    assert value_text(measures, "pnr") == "inf" and interval_text(measures, "pnr").endswith("inf")
    lines = [line.strip() for line in table_text(measures).split("\n")]
    assert any(re.fullmatch(r"pnr +inf  \[.*inf\]  \(no discordant pair\)", line) for line in lines)
    json.dumps(measures, allow_nan=False)


def test_measures_that_are_not_defined_are_printed_as_such():
    rows = JUDGED.assign(label=0)
    measures = evaluate(rows, np.arange(len(rows), dtype=float))
    assert value_text(measures, "pnr") == value_text(measures, "ndcg@10") == "n/a"
    assert interval_text(measures, "pnr") == interval_text(measures, "ndcg@10") == ""
    lines = [line.strip() for line in table_text(measures).split("\n")]
    assert any(re.fullmatch(r"pnr +n/a  \(no pair in order or out of it\)", line) for line in lines)
    assert any(re.fullmatch(r"ndcg@10 +n/a", line) for line in lines)


def test_the_order_of_the_rows_does_not_matter(judgments):
    scores = np.random.default_rng(0).normal(size=len(judgments))
    order = np.random.default_rng(1).permutation(len(judgments))
    expected, shuffled = evaluate(judgments, scores), evaluate(judgments.iloc[order], scores[order])
    assert shuffled == expected


def test_a_run_is_looked_up_by_query_and_document(caplog):
    with caplog.at_level(logging.WARNING, "hf_disranker"):
        rows = join_run(JUDGED, scores_table(1, 2, 3, 4, 5, 6)[::-1])
    assert rows["score"].tolist() == [1, 2, 3, 4, 5, 6] and not rows["missing"].any()
    assert not caplog.messages


@pytest.mark.parametrize("offset", [0, -3e8])  # in float32, -3e8 - 1 is -3e8
def test_a_judged_document_without_a_score_ranks_last_and_is_counted(caplog, offset):
    table = scores_table(*(np.array([1, 2, 3, 4, 5, 6]) * 64 + offset)).drop(index=[1, 3])
    with caplog.at_level(logging.WARNING, "hf_disranker"):
        rows = join_run(JUDGED, table)
    scores = rows["score"]
    assert scores[[1, 3]].max() < scores[[0, 2, 4, 5]].min()
    assert caplog.messages == ["2 of 6 judged documents are not in the run: they earn nothing, and rank last in PNR."]


def test_an_unjudged_document_is_grade_0_in_ndcg_and_no_pair(caplog):
    # In a, an unjudged document ranks first: 2, then 1, then 0 move down one place. That of query z is nobody's.
    extra = pd.DataFrame({"query_id": ["a", "z"], "doc_id": ["9", "9"], "teacher_score": [99.0, 99.0]})
    rows = join_run(JUDGED, pd.concat([scores_table(3, 2, 1, 1, 0, 1), extra]))
    assert "1 documents of the run are not judged" in caplog.text
    measures = evaluate(rows, rows["score"].to_numpy())
    a = (3 / log2(3) + 1 / log2(4)) / (3 + 1 / log2(3))
    assert measures["ndcg@10"] == pytest.approx((a + 1 + 1) / 3)
    assert measures["mrr"] == pytest.approx((1 / 2 + 1 + 1) / 3)
    assert (measures["concordant"], measures["discordant"], measures["unjudged"]) == (4, 0, 1)
    # Of the judged ones: relevant 3, 2, 1, 1 against irrelevant 1 and 0, two of the eight pairs tied.
    assert (measures["documents"], measures["auc"]) == (6, 7 / 8)


def test_documents_missing_from_a_run_earn_nothing(caplog):
    # Of a, grade 2 was retrieved behind an unjudged document, and grades 1 and 0 were not; b and c got no answer.
    run = pd.DataFrame({"query_id": ["a", "a"], "doc_id": ["9", "1"], "teacher_score": [2.0, 1.0]})
    with caplog.at_level(logging.WARNING, "hf_disranker"):
        rows = join_run(JUDGED, run)
    assert "5 of 6 judged documents are not in the run: they earn nothing" in caplog.text
    assert "2 judged queries are not in the run: they count 0." in caplog.text
    measures = evaluate(rows, rows["score"].to_numpy(), ["AP", "P@10"])
    assert measures["ndcg@10"] == pytest.approx(3 / log2(3) / (3 + 1 / log2(3)) / 3)
    assert measures["map"] == measures["AP"] == pytest.approx(1 / 2 / 2 / 3)  # of two relevant documents one, second
    assert (measures["mrr"], measures["P@10"]) == (pytest.approx(1 / 2 / 3), pytest.approx(1 / 10 / 3))
    # PNR: what is missing ranks last, among itself tied.
    assert [measures[name] for name in ("concordant", "discordant", "tied")] == [2, 0, 2]
    assert (measures["queries"], measures["queries_without_relevant"]) == (3, 0)


def theirs(judged, run, names):
    """What ir_measures finds by itself, query by measure; its gain is the grade."""
    run = [ir_measures.ScoredDoc(*row) for row in run[["query_id", "doc_id", "teacher_score"]].itertuples(index=False)]
    qrels = [ir_measures.Qrel(*row) for row in judged[["query_id", "doc_id", "label"]].itertuples(index=False)]
    found = pd.DataFrame(ir_measures.iter_calc([ir_measures.parse_measure(name) for name in names], qrels, run))
    return found.assign(measure=found["measure"].map(str)).pivot(index="query_id", columns="measure", values="value")


@pytest.mark.parametrize("seed", range(6))
def test_measures_of_a_run_equal_ir_measures(seed):
    rng = np.random.default_rng(seed)
    places = [(f"{query}", f"d{doc}") for query in range(25) for doc in range(12)]
    table = pd.DataFrame(places, columns=["query_id", "doc_id"])
    # Grades 0 and 1, a third of the queries without a relevant document, and many pairs that nobody judged.
    relevant = rng.uniform(size=len(table)) < (table["query_id"].astype(int) % 3) / 4
    judged = table.assign(label=relevant.astype(int))[rng.uniform(size=len(table)) < 0.6]
    # Short rankings, queries without one, equal scores, and scores that float32 does not tell apart.
    found = (rng.uniform(size=len(table)) < 0.5) & ~table["query_id"].isin(["1", "2"])
    run = table.assign(teacher_score=rng.integers(0, 4, len(table)) + 1e-12 * rng.integers(0, 2, len(table)))[found]
    names = ["nDCG@10", "nDCG@5", "AP", "RR", "P@10", "R@5", "ERR@10", "RR@10"]
    rows = join_run(judged, run.sample(frac=1, random_state=seed))
    measured = per_query(rows, rows["score"].to_numpy(), names).set_index("query_id")
    expected = theirs(judged, run, names).loc[measured.index]
    for ours, name in [("ndcg@10", "nDCG@10"), ("ndcg@5", "nDCG@5"), ("map", "AP"), ("mrr", "RR")]:
        assert_allclose(measured[ours], expected[name], err_msg=name, atol=1e-12)
    assert_allclose(measured[names], expected[names])
    assert evaluate(rows, rows["score"].to_numpy())["ndcg@10"] == pytest.approx(expected["nDCG@10"].mean())


def test_measures_of_a_graded_run_equal_ir_measures(judgments):
    rng = np.random.default_rng(0)
    kept = judgments[rng.uniform(size=len(judgments)) < 0.6]
    run = judgments.assign(teacher_score=rng.permutation(len(judgments)).astype(float))[::2]
    rows = join_run(kept, run)
    measured = per_query(rows, rows["score"].to_numpy()).set_index("query_id")
    # Grades 0, 1 and 3 of theirs are ours of 0, 1 and 2.
    expected = theirs(kept.assign(label=2 ** kept["label"] - 1), run, ["nDCG@10", "AP"]).loc[measured.index]
    assert_allclose(measured["ndcg@10"], expected["nDCG@10"])
    assert_allclose(measured["map"], expected["AP"])


def test_reranked_queries_without_a_relevant_document_are_left_out():
    rows = pd.DataFrame({"query_id": ["a", "a", "b", "b"], "doc_id": ["1", "2", "1", "2"], "label": [1, 0, 0, 0]})
    measures = evaluate(rows, np.array([1.0, 1.0, 2.0, 1.0]))
    assert measures["ndcg@10"] == pytest.approx((1 + 1 / log2(3)) / 2)  # the equal scores share the gain
    assert (measures["map"], measures["queries_without_relevant"]) == (0.5, 1)
    as_run = join_run(rows, rows.assign(teacher_score=[1.0, 1.0, 2.0, 1.0]))
    measures = evaluate(as_run, as_run["score"].to_numpy())
    assert measures["ndcg@10"] == pytest.approx(1 / log2(3) / 2)  # the last id first, and b counts 0


def test_scores_of_other_documents_are_refused():
    with pytest.raises(TableError, match=r"No judged \(query_id, doc_id\) is in the run"):
        join_run(JUDGED, scores_table(1, 2, 3, 4, 5, 6).assign(doc_id="other"))


def test_any_measure_by_its_ir_measures_name():
    scores = np.array([1.0, 2.0, 0.0, 0.0, 1.0, 5.0])
    measures = evaluate(JUDGED, scores, ["P@1", "ERR@10"])
    # First documents: grade 1, 0, 1. ERR with grades up to 4: a stops with (2^1 - 1) / 16, then (2^2 - 1) / 16.
    assert measures["P@1"] == pytest.approx(2 / 3)
    a = 1 / 16 + 15 / 16 * 3 / 16 / 2
    assert measures["ERR@10"] == pytest.approx((a + 1 / 16 / 2 + 1 / 16) / 3, abs=1e-4)
    assert measures["intervals"]["P@1"] == [0.0, 1.0]
    with pytest.raises(ValueError, match="no such measure"):
        evaluate(JUDGED, scores, ["nDGC@10"])


def test_slices_are_measured_separately(judgments):
    rows = judgments.assign(market=np.where(judgments["query_id"] < "q3", "de", "en"))
    scores = np.random.default_rng(0).normal(size=len(rows))
    slices = evaluate(rows, scores, by="market")["slices"]
    assert list(slices) == ["de", "en"]
    part = (rows["market"] == "de").to_numpy()
    assert slices["de"] == evaluate(rows[part], scores[part]) | {"few": True}
    many = pd.concat([rows.assign(query_id=rows["query_id"] + f"-{n}") for n in range(12)], ignore_index=True)
    assert not evaluate(many, np.tile(scores, 12), by="market")["slices"]["de"]["few"]
    by_length = evaluate(rows, scores, by="query_words")["slices"]
    assert list(by_length) == ["2"] and by_length["2"]["queries"] == 12
    with pytest.raises(TableError, match="no column 'country'"):
        evaluate(rows, scores, by="country")


def test_a_document_gets_the_score_of_its_best_passage():
    passages = pd.DataFrame(
        {
            "query_id": ["a", "a", "a", "a"],
            "doc_id": ["x-0", "x-1", "y-0", "lone"],
            "page": ["x", "x", "y", None],
            "label": [0, 2, 1, 0],
            "score": [3.0, -1.0, 2.0, 1.0],
        }
    )
    rows = best_passages(passages, "page")
    assert rows[["doc_id", "label", "score"]].values.tolist() == [["x", 2, 3.0], ["y", 1, 2.0], ["lone", 0, 1.0]]
    assert evaluate(rows, rows["score"].to_numpy())["pnr"] is None  # no wrong pair
    with pytest.raises(TableError, match="no column 'url'"):
        best_passages(passages, "url")


def test_training_and_evaluation_agree(student_ranker, judgments):
    expected = evaluate(judgments, student_ranker.predict(pair_texts(judgments)))
    # What RankingTrainer hands over: columns of queries and documents, filled up with NaN.
    groups = [part for _, part in judgments.groupby("query_id")]
    shape = len(groups), max(map(len, groups))
    labels, scores = np.full(shape, np.nan), np.full(shape, np.nan)
    for place, part in enumerate(groups):
        labels[place, : len(part)] = part["label"]
        scores[place, : len(part)] = student_ranker.predict(pair_texts(part))
    logged = ranking_metrics(EvalPrediction(scores, labels))
    assert logged == pytest.approx({name: expected[name] for name in logged})


def test_a_million_rows_with_intervals_take_seconds():
    rng = np.random.default_rng(0)
    rows = 1_000_000
    frame = pd.DataFrame(
        {"query_id": np.arange(rows) // 20, "doc_id": np.arange(rows), "label": rng.integers(4, size=rows)}
    )
    start = time.process_time()
    measures = evaluate(frame, rng.normal(size=rows))
    assert time.process_time() - start < 30
    low, high = measures["intervals"]["pair_accuracy"]
    assert low < 0.5 < high and high - low < 0.002
    assert_array_equal(measures["queries"], rows // 20)
