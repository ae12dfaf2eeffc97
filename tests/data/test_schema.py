"""The table contracts: types in, plain words out."""

from datetime import datetime
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest

from hf_disranker.data.schema import TableError, validate


def rows(**columns):
    """Three sound judgments, with some columns replaced."""
    sound = {
        "query_id": ["q1", "q1", "q2"],
        "query": ["red", "red", "blue"],
        "doc_id": ["a", "b", "a"],
        "title": ["A", "B", "A"],
        "summary": ["one", "two", "one"],
        "label": [2, 0, 1],
    }
    return pd.DataFrame(sound | columns)


def error_of(frame, table="judgments"):
    with pytest.raises(TableError) as error:
        validate(frame, table, "my.csv")
    return str(error.value)


def test_columns_get_their_types_and_the_rest_passes_through():
    frame = rows(query_id=[0, 0, 7], label=["2", "0", "1"], title=["A", None, "A"], market=["fr", None, "de"])
    frame["split"] = pd.Categorical(["train", "train", "dev"])
    before = frame.copy()
    checked = validate(frame, "judgments", "my.csv")
    assert checked["query_id"].tolist() == ["0", "0", "7"]
    assert checked["label"].tolist() == [2, 0, 1] and checked["label"].dtype == np.int64
    assert checked["title"].tolist() == ["A", "", "A"]
    assert checked["split"].tolist() == ["train", "train", "dev"]
    assert list(checked.columns) == list(frame.columns)
    pd.testing.assert_series_equal(checked["market"], frame["market"])
    pd.testing.assert_frame_equal(frame, before)


def test_scores_become_float32_and_amounts_float64():
    scores = validate(rows(teacher_score=[1, "-2.5", 0.1]), "scores", "s")["teacher_score"]
    assert scores.tolist() == [1.0, -2.5, np.float32(0.1)] and scores.dtype == np.float32
    weights = validate(rows(weight=[0, 1, 2.5]), "clicks", "c")["weight"]
    assert weights.tolist() == [0.0, 1.0, 2.5] and weights.dtype == np.float64


def test_a_missing_column_error_lists_the_columns():
    assert error_of(rows().drop(columns=["summary", "label"])) == (
        "my.csv: a judgments table needs the column(s) summary, label; it has: query_id, query, doc_id, title. "
        "If yours have other names: --columns summary=YOURS,label=YOURS "
        "(in Python: columns={'summary': 'YOURS', 'label': 'YOURS'})."
    )


def test_a_table_without_rows_is_refused():
    assert error_of(rows().head(0)) == "my.csv: the judgments table has no rows."


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("label", [2, None, 1], "1 row(s) have no finite number. First: row 1: nan."),
        ("label", ["2", "good", "1"], "1 row(s) have no finite number. First: row 1: 'good'."),
        ("label", [2, -1, 1], "1 row(s) have no whole number >= 0. First: row 1: -1."),
        ("label", [2, 0.5, 1], "1 row(s) have no whole number >= 0. First: row 1: 0.5."),
        ("query_id", ["", "q1", "q2"], "1 row(s) have no id. First: row 0: ''."),
        ("doc_id", [1, None, 3], "1 row(s) have no id. First: row 1: nan."),
        ("doc_id", [1.0, 2.0, 3.0], "has decimal numbers; ids are strings or integers. First: row 0: 1.0; row 1: "),
        ("query", ["red", "red", " \t"], "1 row(s) have an empty query. First: row 2: ' \\t'."),
        ("query", ["red", "red", None], "1 row(s) have an empty query. First: row 2: "),
        ("label", [0, 2**63, 1], "1 row(s) have a number that is too large. First: row 1: 9223372036854775808."),
        ("label", ["0", "1e30", "1"], "1 row(s) have a number that is too large. First: row 1: '1e30'."),
        ("label", pd.to_datetime(["2026-01-01"] * 3), "3 row(s) have no finite number. First: row 0: Timestamp("),
        ("label", pd.to_timedelta([1, 2, 3]), "3 row(s) have no finite number."),
        ("label", [1, 2j, 0], "have no finite number."),
        ("label", [b"1", datetime(2026, 1, 1), [1]], "3 row(s) have no finite number. First: row 0: b'1'; row 1: "),
        ("doc_id", ["a", 1.5, None], "1 row(s) have no id."),
        ("doc_id", ["a", 1.5, b"c"], "2 row(s) have neither a string nor an integer. First: row 1: 1.5; row 2: b'c'."),
        ("doc_id", pd.to_datetime(["2026-01-01"] * 3), "3 row(s) have neither a string nor an integer."),
        ("title", ["A", 12, ["B"]], "2 row(s) have no text. First: row 1: 12; row 2: ['B']."),
    ],
)  # fmt: skip
def test_a_bad_value_is_named_with_file_column_and_rows(column, values, message):
    error = error_of(rows(**{column: values}))
    assert error.startswith(f"my.csv: column '{column}' of the judgments table")
    assert message in error


@pytest.mark.parametrize("score", [np.nan, np.inf, "high", 1e39])  # 1e39 is beyond float32
def test_a_score_that_is_not_finite_is_refused(score):
    error = error_of(rows(teacher_score=[0.5, score, 1.0]), "scores")
    assert "column 'teacher_score' of the scores table: 1 row(s) have no finite number. First: row 1: " in error


def test_a_negative_weight_is_refused():
    assert "column 'weight' of the clicks table: 1 row(s) have a negative number. First: row 2: -1.0." in error_of(
        rows(weight=[1.0, 0.0, -1.0]), "clicks"
    )


@pytest.mark.parametrize(
    ("users", "message"),
    [
        (["3", "1.200", "7"], "1 row(s) may have thousands written with a dot: write 1200, not 1.200. First: row 1: "),
        (["3", "1.000", "7"], "1 row(s) may have thousands written with a dot"),
        (["3", "1,200", "7"], "1 row(s) have no finite number. First: row 1: '1,200'."),
        ([3, 1.2, 7], "1 row(s) have a fraction, not a number of users. First: row 1: 1.2."),
        ([3, -1, 7], "1 row(s) have a negative number. First: row 1: -1."),
        ([datetime(2026, 1, 1)] * 3, "3 row(s) have no finite number."),
    ],
)  # fmt: skip
def test_users_are_whole_numbers(users, message):
    assert f"column 'users' of the clicks table: {message}" in error_of(rows(users=users), "clicks")


def test_numbers_of_every_kind_are_read_exactly():
    labels = {
        "text": ["9007199254740993", "2.0", "0"],
        "large": [2**53 + 1, 2**62 + 1, 0],
        "bool": [True, False, True],
    }
    labels |= {"decimal": [Decimal("2.0"), 1, 0], "nullable": pd.array([2, 1, 0], "Int64")}
    labels |= {"unsigned": np.array([2, 2**62 + 1, 0], np.uint64), "category": pd.Categorical(["2", "0", "1"])}
    read = {kind: validate(rows(label=values), "judgments", "j")["label"].tolist() for kind, values in labels.items()}
    assert read["large"] == [2**53 + 1, 2**62 + 1, 0] and read["unsigned"] == [2, 2**62 + 1, 0]
    assert read["bool"] == [1, 0, 1] and read["decimal"] == read["nullable"] == [2, 1, 0]
    assert read["text"][1:] == [2, 0] and read["category"] == [2, 0, 1]
    assert validate(rows(users=["12", "2.0", 3]), "clicks", "c")["users"].tolist() == [12.0, 2.0, 3.0]


@pytest.mark.parametrize(("table", "column"), [("judgments", "Label "), ("clicks", "WEIGHT"), ("candidates", "Title")])
def test_a_column_with_other_case_or_whitespace_is_refused(table, column):
    known = column.strip().lower()
    error = error_of(rows(weight=1.0).rename(columns={known: column}), table)
    names = {known: column.strip()}
    how = f"rename it, or --columns {known}={column.strip()} (in Python: columns={names})"
    assert error == f"my.csv: the column {column!r} is called '{known}' here: {how}."
    validate(rows(weight=1.0).assign(**{column: "x"}), table, "my.csv")  # beside the real one it may be anything


def test_all_columns_with_another_spelling_are_named_at_once():
    error = error_of(rows().rename(columns={"query": "Query", "title": "TITLE "}))
    assert error == (
        "my.csv: the columns 'Query', 'TITLE ' are called 'query', 'title' here: rename them, or --columns "
        "query=Query,title=TITLE (in Python: columns={'query': 'Query', 'title': 'TITLE'})."
    )


def test_ids_need_no_columns():
    shop = rows().drop(columns=["query_id", "doc_id"]).rename(columns={"query": "search", "title": "product"})
    assert error_of(shop) == (
        "my.csv: a judgments table needs the column(s) query, title; it has: search, product, summary, label. "
        "If yours have other names: --columns query=YOURS,title=YOURS "
        "(in Python: columns={'query': 'YOURS', 'title': 'YOURS'}). "
        "Without query_id and doc_id, ids are made from the texts."
    )


def test_a_column_that_occurs_twice_is_refused():
    frame = pd.concat([rows(), rows()[["title"]]], axis=1)
    assert error_of(frame) == "my.csv: the column 'title' occurs 2 times; keep one."


def test_labels_of_candidates_are_checked_before_they_are_scored():
    assert "column 'label' of the candidates table" in error_of(rows(label=[1, None, 0]), "candidates")


def test_a_repeated_pair_is_refused():
    assert error_of(rows(query_id=["q1", "q1", "q1"], query="red")) == (
        "my.csv: judgments table: 1 row(s) repeat a (query_id, doc_id) seen above. "
        "First: row 2: {'query_id': 'q1', 'doc_id': 'a'}. Keep one row each."
    )
    assert "repeat a (doc_id)" in error_of(rows(), "corpus")


def test_one_query_id_has_one_text():
    assert error_of(rows(query=["red", "Red", "blue"])) == (
        "my.csv: judgments table: 1 row(s) have another query text than earlier rows of their query_id. "
        "First: row 1: {'query_id': 'q1', 'query': 'Red'}."
    )


def test_errors_stay_short():
    frame = pd.concat([rows(title=[["x" * 1000]] * 3)] * 5, ignore_index=True)
    error = error_of(frame)
    assert "15 row(s)" in error and error.count("row ") == 3 and len(error) < 500


def test_clicks_may_repeat():
    assert len(validate(pd.concat([rows(), rows()]), "clicks", "c")) == 6
