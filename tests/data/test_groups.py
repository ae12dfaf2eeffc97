"""Groups and document sampling."""

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset

from hf_disranker.data.groups import mean_scores, sample_documents


def group(query_id, scores):
    ids = [f"d{place}" for place in range(len(scores))]
    return {
        "query_id": query_id,
        "query": "q",
        "doc_ids": ids,
        "titles": ids,
        "summaries": ids,
        "teacher_scores": scores,
    }


def test_top_keeps_the_best_in_their_order():
    rows = Dataset.from_list([group("a", [1.0, 5.0, 3.0, 4.0]), group("b", [1.0, 2.0])])
    found = sample_documents(rows, 2, "top").to_list()
    assert found[0]["doc_ids"] == found[0]["titles"] == ["d1", "d3"] and found[0]["teacher_scores"] == [5.0, 4.0]
    assert found[1]["doc_ids"] == ["d0", "d1"]


def test_stratified_takes_one_document_per_score_stratum():
    scores = np.random.default_rng(0).permutation(100).astype(float).tolist()
    rows = Dataset.from_list([group(str(number), scores) for number in range(30)])
    found = sample_documents(rows, 10, "stratified", seed=1).to_list()
    for row in found:
        assert sorted(int(score // 10) for score in row["teacher_scores"]) == list(range(10))
        assert [scores[int(doc_id[1:])] for doc_id in row["doc_ids"]] == row["teacher_scores"]
    assert len({tuple(row["doc_ids"]) for row in found}) > 20  # every query has a draw of its own


def test_the_draw_is_the_same_in_a_stream_and_another_with_another_seed():
    rows = Dataset.from_list([group(str(number), list(map(float, range(40)))) for number in range(5)])
    first = sample_documents(rows, 4, seed=1).to_list()
    assert list(sample_documents(rows.to_iterable_dataset(), 4, seed=1)) == first
    assert sample_documents(rows, 4, seed=2).to_list() != first
    assert sample_documents(rows, 4, "all") is rows


def test_invalid_sampling_options_are_refused():
    for count, kind in ((4, "best"), (1, "top")):
        with pytest.raises(ValueError, match="all, top, stratified"):
            sample_documents(Dataset.from_list([group("a", [1.0])]), count, kind)


def test_mean_scores_match_hand_example():
    first = pd.DataFrame({"query_id": ["a", "a", "b"], "doc_id": ["x", "y", "x"], "teacher_score": [1.0, 2.0, 6.0]})
    second = pd.DataFrame({"query_id": ["b", "a"], "doc_id": ["x", "x"], "teacher_score": [10.0, 30.0]})
    assert mean_scores([first, second]).tolist()[::2] == [15.5, 8.0]
    assert np.isnan(mean_scores([first, second]).iloc[1])
    # (1 - 3) / 2 = -1 and (30 - 20) / 10 = 1; (6 - 3) / 2 = 1.5 and (10 - 20) / 10 = -1.
    assert mean_scores([first, second], [(3.0, 2.0), (20.0, 10.0)]).tolist()[::2] == [0.0, 0.25]
