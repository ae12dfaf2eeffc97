"""Results of the quickstart: table, picture and example searches."""

from xml.etree import ElementTree

import numpy as np
import pandas as pd

from hf_disranker.recipes.quickstart.results import results_picture, results_table, search_examples
from hf_disranker.recipes.rankings import Evaluation

INTERVALS = {"ndcg@5": [0.1, 0.2], "ndcg@10": [0.601, 0.673], "pnr": [2.36, None]}
BM25 = {"ndcg@5": 0.619, "ndcg@10": 0.638, "pnr": 2.79, "concordant": 279, "intervals": INTERVALS}
STUDENT = {"ndcg@5": 0.5, "ndcg@10": 1.0, "pnr": None, "concordant": 300, "intervals": INTERVALS}


def test_results_picture_is_a_standalone_svg(judgments):
    rng = np.random.default_rng(0)
    about = {
        "bm25": {"role": "bm25"},
        "teacher": {"role": "teacher", "pairs_per_s": 2000.0},
        "student": {"role": "student", "teacher": "t"},
    }
    evaluations = [
        Evaluation.of(name, judgments.assign(score=rng.normal(size=len(judgments))), **facts)
        for name, facts in about.items()
    ]
    root = ElementTree.fromstring(results_picture(evaluations))
    circles = root.findall(".//{*}circle")
    assert len(circles) == 3 and circles[2].attrib["class"] == "f0" and circles[0].attrib["class"] == "f5"
    assert "2,000 pairs/s" in [text.text for text in root.findall(".//{*}text")]


def test_table_shows_every_number_in_aligned_columns():
    rows = queries = pd.DataFrame()
    about = {"parameters": 912_345, "pairs_per_s": 1704.4}
    evaluations = Evaluation("bm25", rows, queries, BM25), Evaluation("student", rows, queries, STUDENT, about)
    head, bm25, student = results_table(evaluations).split("\n")
    assert bm25.split() == ["BM25", "-", "0.619", "0.638", "[0.601,", "0.673]", "2.79", "[2.36,", "inf]", "-"]
    assert student.split()[-7:] == ["1.000", "[0.601,", "0.673]", "inf", "[2.36,", "inf]", "1,704"]
    assert "0.9M" in student and student.startswith("BERT, distilled")
    assert len(head) == len(bm25) == len(student)
    assert bm25.index("0.638") + 5 == head.index("NDCG@10") + 7


def test_a_search_shows_what_the_ranker_makes_of_the_first_documents():
    class ByLength:
        def predict(self, pairs):
            return np.array([float(len(document["title"])) for _, document in pairs])

    corpus = pd.DataFrame(
        {
            "doc_id": ["1", "2", "3", "4"],
            "title": ["json", "json.load", "json.load.everything", "smtplib.sendmail.with.a.long.name"],
            "summary": ["json json", "read json", "read a json file", "send mail"],
        }
    )
    first, second = search_examples(["read json", "send"], corpus, ByLength(), top=2)
    assert "send mail" not in first and second.startswith("Query: send\n")
    lines = first.split("\n")
    assert lines[0] == "Query: read json" and lines[1].split() == ["BM25", "BERT,", "distilled"]
    # The mail shares no word with the query, so BM25 never finds it, long as its name is.
    assert [line.split()[2] for line in lines[2:]] == ["json.load.everything", "json.load"]
    assert lines[2].split()[1] == "json.load"
