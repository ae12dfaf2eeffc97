"""Impression logs: what a row is, the forms that columns take, and logs that are refused."""

import datetime

import numpy as np
import pandas as pd
import pytest

from hf_disranker.data.schema import TableError
from hf_disranker.recipes import impressions
from hf_disranker.recipes.impressions import read_log

# Five pages of three users; the first two pages of u1 are of one day.
PAGES = pd.DataFrame(
    {
        "user_id": ["u1", "u1", "u1", "u2", "u3"],
        "bucket": ["old", "old", "old", "new", "new"],
        "query": ["a", "b", "a", "a", "b"],
        "clicked": [2, 0, 1, 0, 1],
        "dwell_seconds": [30.0, 0.0, np.nan, np.nan, 10.5],
        "day": ["2026-03-01", "2026-03-01", "2026-03-02", "2026-03-02", "2026-03-02"],
    }
)
# pages, clicked_pages, clicks, timed_clicks, seconds of each user
SUMS = {"u1": [3, 2, 3, 2, 30.0], "u2": [1, 0, 0, 0, 0.0], "u3": [1, 1, 1, 1, 10.5]}


def sums(log):
    names = ["pages", "clicked_pages", "clicks", "timed_clicks", "seconds"]
    return log.groupby("user")[names].sum().to_numpy().tolist()


def save(rows, path):
    if path.suffix == ".parquet":
        rows.to_parquet(path)
    elif path.suffix == ".csv":
        rows.to_csv(path, index=False)
    else:
        rows.to_json(path, orient="records", lines=True, date_format="iso")
    return str(path)


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_read_log_matches_hand_example(tmp_path, ending):
    log, excluded = read_log(save(PAGES, tmp_path / f"log.{ending}"))
    assert sums(log) == [*SUMS.values()] and excluded == 0
    assert log.groupby("user")["bucket"].first().tolist() == ["old", "new", "new"]
    assert log["day"].tolist() == ["2026-03-01", "2026-03-02", "2026-03-02", "2026-03-02"]


def by_document(pages):
    """The same log with a row for each of three documents of a page; the second click is on the last."""
    rows = pages.assign(page_id=range(len(pages))).loc[pages.index.repeat(3)].reset_index(drop=True)
    place = rows.groupby("page_id").cumcount()
    clicked = (place == 0) & (rows["clicked"] > 0) | (place == 2) & (rows["clicked"] > 1)
    seconds = rows["dwell_seconds"] / rows["clicked"].clip(lower=1)
    return rows.assign(clicked=clicked, dwell_seconds=seconds.where(clicked))


@pytest.mark.parametrize("pending", [2, 500_000])
def test_rows_of_one_page_id_are_one_page_in_any_order(tmp_path, pending, monkeypatch):
    monkeypatch.setattr(impressions, "_PENDING_ROWS", pending)
    rows = by_document(PAGES).sample(frac=1, random_state=0).sort_values("user_id", kind="stable")
    rows.to_parquet(tmp_path / "log.parquet", row_group_size=2)
    log, _ = read_log(str(tmp_path / "log.parquet"))
    assert sums(log) == [*SUMS.values()]


def test_a_page_over_midnight_counts_on_the_first_day(tmp_path):
    rows = by_document(PAGES)
    rows.loc[2, "day"] = "2026-03-02"  # the last document of the first page
    log, _ = read_log(save(rows, tmp_path / "log.parquet"))
    assert log.loc[log["user"] == 0, ["day", "pages"]].values.tolist() == [["2026-03-01", 2], ["2026-03-02", 1]]


@pytest.mark.parametrize("form", [bool, int, float, str, lambda value: str(bool(value)).lower()])
def test_clicked_accepts_booleans_numbers_and_their_texts(tmp_path, form):
    rows = PAGES.assign(clicked=[form(value) for value in (1, 0, 1, 0, 1)])
    log, _ = read_log(save(rows, tmp_path / "log.parquet"))
    assert log.groupby("user")["clicks"].sum().tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    "day",
    [
        pd.to_datetime(PAGES["day"]) + pd.Timedelta(hours=23),
        pd.to_datetime(PAGES["day"]).dt.date,
        PAGES["day"] + " 10:00:00",
        PAGES["day"] + "T10:00:00Z",
        PAGES["day"].astype("category"),
    ],
    ids=["timestamp", "date", "text", "iso", "category"],
)
def test_a_day_is_the_date(tmp_path, day):
    log, _ = read_log(save(PAGES.assign(day=day), tmp_path / "log.parquet"))
    assert log["day"].tolist() == ["2026-03-01", "2026-03-02", "2026-03-02", "2026-03-02"]


@pytest.mark.parametrize("form", [int, str])
def test_day_numbers_sort_numerically(tmp_path, form):
    log, _ = read_log(save(PAGES.assign(day=[form(day) for day in (9, 9, 10, 10, 10)]), tmp_path / "log.parquet"))
    assert [day.strip() for day in sorted(log["day"].unique())] == ["9", "10"]


def test_slices_and_covariates_are_kept(tmp_path):
    rows = PAGES.assign(device=["phone", "desk", "phone", None, "desk"], before=[4, 4, 4, np.nan, 1.5])
    log, _ = read_log(save(rows, tmp_path / "log.parquet"), ["device"], ["before"])
    assert log.groupby("device")["pages"].sum().to_dict() == {"(none)": 1, "desk": 2, "phone": 2}
    assert log.groupby("user")["before"].first().fillna(-1).tolist() == [4, -1, 1.5]


def test_a_folder_of_parquet_is_one_log(tmp_path):
    for number, part in enumerate((PAGES[:2], PAGES[2:])):
        save(part, tmp_path / f"part-{number}.parquet")
    assert sums(read_log(str(tmp_path))[0]) == [*SUMS.values()]


MIXED = PAGES.assign(bucket=["old", "new", "old", "new", "new"])


def test_users_in_several_buckets_are_refused_or_left_out_and_counted(tmp_path):
    path = save(MIXED, tmp_path / "log.parquet")
    with pytest.raises(TableError, match=r"column 'bucket': 1 user\(s\) are in several buckets. First: 'u1'"):
        read_log(path)
    log, excluded = read_log(path, exclude_mixed=True)
    assert excluded == 1 and sums(log) == [SUMS["u2"], SUMS["u3"]]


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("user_id", ["u1", None, "u1", "u2", "u3"], r"'user_id': 1 row\(s\) have no value. First: row 1: None"),
        ("bucket", [np.nan, 1.0, np.nan, 2.0, 2.0], r"'bucket': 2 row\(s\) have no value. First: row 0: None; row 2"),
        ("clicked", ["yes", "no", "1", "0", "1"], r"'clicked': 2 row\(s\) have no finite number. First: row 0: 'yes'"),
        ("clicked", [2, 0, -1, 0, 1], r"'clicked': 1 row\(s\) have no number of clicks. First: row 2: -1"),
        ("clicked", [2, 0.5, 1, 0, 1], r"'clicked': 1 row\(s\) have no number of clicks. First: row 1: 0.5"),
        ("clicked", [2, None, 1, 0, 1], r"'clicked': 1 row\(s\) have no number of clicks. First: row 1: None"),
        ("dwell_seconds", [-3, 0, 0, 0, 1], r"'dwell_seconds': 1 row\(s\) have a negative time. First: row 0: -3"),
        ("dwell_seconds", [3, 9, 0, 0, 1], r"'dwell_seconds': 1 row\(s\) have a time without a click. First: row 1"),
        ("dwell_seconds", [np.inf, 0, 0, 0, 1], r"'dwell_seconds': 1 row\(s\) have no finite number. First: row 0"),
        ("dwell_seconds", ["3s", "", "", "", "1"], r"'dwell_seconds': . row\(s\) have no finite number. First: row"),
        ("day", ["1.3.2026"] * 5, r"'day': 5 row\(s\) have no date, timestamp or number of a day. First: row 0"),
        ("day", [1772323200 + step for step in range(5)], r"'day': 5 row\(s\) have no date"),
        ("before", [1, 2, 1, 1, 1], r"'before': 1 user\(s\) have several values"),
        ("before", ["few"] * 5, r"'before': 5 row\(s\) have no finite number"),
        ("before", [None] * 5, "'before' has no number"),
    ],
)
def test_a_bad_value_is_named_with_its_column_and_rows(tmp_path, column, values, message):
    path = save(PAGES.assign(before=1.0).assign(**{column: values}), tmp_path / "log.parquet")
    with pytest.raises(TableError, match=f"{path}: column {message}"):
        read_log(path, covariates=["before"])


def test_the_row_is_counted_from_the_beginning_of_the_log(tmp_path):
    rows = pd.concat([PAGES] * 3, ignore_index=True)
    rows.loc[13, "clicked"] = -1
    rows.to_parquet(tmp_path / "log.parquet", row_group_size=4)
    with pytest.raises(TableError, match="First: row 13: -1"):
        read_log(str(tmp_path / "log.parquet"))


def test_too_many_days_are_refused(tmp_path):
    first = datetime.date(2026, 3, 1)
    rows = pd.DataFrame({"user_id": range(500), "bucket": "a", "clicked": 0, "dwell_seconds": 0.0})
    rows = rows.assign(day=[first + datetime.timedelta(days) for days in range(500)])
    with pytest.raises(TableError, match="column 'day' has 500 values"):
        read_log(save(rows, tmp_path / "log.parquet"))


def test_a_slice_has_one_value_per_page(tmp_path):
    rows = by_document(PAGES).assign(kind=["image", *["text"] * 14])
    with pytest.raises(TableError, match=r"1 page\(s\) have several values in kind"):
        read_log(save(rows, tmp_path / "log.parquet"), ["kind"])


YOURS = {"user_id": "visitor", "dwell_seconds": "time", "day": "date", "device": "kind"}


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_a_log_with_other_names_is_the_same_log(tmp_path, ending):
    rows = PAGES.assign(device="phone")
    expected = read_log(save(rows, tmp_path / f"ours.{ending}"), ["device"])[0]
    theirs = save(rows.rename(columns=YOURS), tmp_path / f"theirs.{ending}")
    pd.testing.assert_frame_equal(read_log(theirs, ["device"], columns=YOURS)[0], expected)


def test_a_column_may_be_read_under_two_names(tmp_path):
    log, _ = read_log(save(PAGES, tmp_path / "log.parquet"), ["date"], columns={"date": "day"})
    assert log["date"].tolist() == log["day"].tolist() == ["2026-03-01", "2026-03-02", "2026-03-02", "2026-03-02"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"user_id": "visitor"}, "log.parquet: no column 'visitor' to read as 'user_id'; it has: user_id, bucket"),
        ({"user_id": "query"}, "log.parquet: 'query' cannot be read as 'user_id', since there is such a column"),
        ({"user": "query"}, "There is no column 'user' to read 'query' as; there are: user_id, bucket, .*, day"),
    ],
)
def test_invalid_columns_are_named(tmp_path, columns, message):
    with pytest.raises(TableError, match=message):
        read_log(save(PAGES, tmp_path / "log.parquet"), columns=columns)


def test_an_invalid_log_is_refused(tmp_path):
    message = r"needs the column\(s\) clicked, market; it has: user_id, .*names: --columns clicked=YOURS,market=YOURS"
    with pytest.raises(TableError, match=message):
        read_log(save(PAGES.drop(columns="clicked"), tmp_path / "log.parquet"), ["market"])
    with pytest.raises(TableError, match="the log has no rows"):
        read_log(save(PAGES[:0], tmp_path / "empty.parquet"))
    with pytest.raises(TableError, match="no such file or folder"):
        read_log(str(tmp_path / "missing.parquet"))
    with pytest.raises(TableError, match=r"a log is .parquet, .csv or .jsonl"):
        read_log(str(tmp_path / "log.xlsx"))
    (tmp_path / "broken.parquet").write_text("nothing")
    with pytest.raises(TableError, match="cannot be read"):
        read_log(str(tmp_path / "broken.parquet"))


def test_csv_types_are_inferred_from_all_rows(tmp_path):
    # The first block alone would make whole numbers of the seconds and of the ids.
    lines = ["user_id,bucket,clicked,dwell_seconds", *["007,a,1,3"] * 200_000, "x7,b,true,2.5", "x8,b,false,"]
    (tmp_path / "log.csv").write_text("\n".join(lines) + "\n")
    log, _ = read_log(str(tmp_path / "log.csv"))
    assert sums(log) == [[200_000, 200_000, 200_000, 200_000, 600_000], [1, 1, 1, 1, 2.5], [1, 0, 0, 0, 0]]
