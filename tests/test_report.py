"""The quickstart's text report."""

import numpy as np
import pandas as pd

from hf_disranker.report import query_example, results_table

INTERVALS = {"ndcg@5": [0.1, 0.2], "ndcg@10": [0.601, 0.673], "pnr": [2.36, None]}
BM25 = {"name": "bm25", "parameters": None, "ndcg@5": 0.619, "ndcg@10": 0.638, "pnr": 2.79, "pairs_per_s": None}
STUDENT = {"name": "student", "parameters": 912_345, "ndcg@5": 0.5, "ndcg@10": 1.0, "pnr": None, "pairs_per_s": 1704.4}


def test_table_shows_every_number_in_aligned_columns():
    head, bm25, student = results_table([BM25 | {"intervals": INTERVALS}, STUDENT | {"intervals": INTERVALS}]).split(
        "\n"
    )
    assert bm25.split() == ["BM25", "-", "0.619", "0.638", "[0.601,", "0.673]", "2.79", "[2.36,", "inf]", "-"]
    assert student.split()[-7:] == ["1.000", "[0.601,", "0.673]", "inf", "[2.36,", "inf]", "1,704"]
    assert "0.9M" in student and student.startswith("BERT, distilled")
    assert len(head) == len(bm25) == len(student)
    assert bm25.index("0.638") + 5 == head.index("NDCG@10") + 7


def test_query_example_shows_the_best_documents_of_one_query():
    judgments = pd.DataFrame(
        {
            "query_id": ["a", "b", "a", "a"],
            "query": ["first", "second", "first", "first"],
            "title": ["low", "other", "high", "middle"],
            "label": [0, 2, 1, 2],
        }
    )
    lines = query_example(judgments, {"bm25": np.array([1.0, 9.0, 3.0, 2.0])}, "a", top=2).split("\n")
    assert lines[0] == "Query: first"
    assert [line.split(". ")[1] for line in lines[1:]] == ["[grade 1] high", "[grade 2] middle"]
