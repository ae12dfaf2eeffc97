"""The tables that pass between the stages, and the plain-word errors for tables that are not what they should be.

| table      | columns                                                                              |
|------------|--------------------------------------------------------------------------------------|
| clicks     | query, title, summary; optional: weight >= 0, users >= 0                             |
| judgments  | query_id, query, doc_id, title, summary, label (int >= 0, 0 = irrelevant) [, split]  |
| corpus     | doc_id, title, summary                                                               |
| candidates | query_id, query, doc_id [, title, summary: else joined from a corpus]                |
| scores     | candidates + teacher_score (float32, raw logit)                                      |

Further columns pass through unread. Ids and texts are strings; integer ids are read as strings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

SHOWN_ROWS = 3


class TableError(ValueError):
    """A table breaks its contract; the message names the source, the column and the first offending rows."""


@dataclass(frozen=True)
class Table:
    """The columns of one table and what makes a row of it unique."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    key: tuple[str, ...] = ()


_PAIR = ("query_id", "query", "doc_id")
TABLES = {
    "clicks": Table(("query", "title", "summary"), ("query_id", "doc_id", "weight", "users", "split")),
    "judgments": Table(
        ("query_id", "query", "doc_id", "title", "summary", "label"), ("split",), ("query_id", "doc_id")
    ),
    "corpus": Table(("doc_id", "title", "summary"), ("split",), ("doc_id",)),
    "queries": Table(("query_id", "query"), (), ("query_id",)),
    "candidates": Table(_PAIR, ("title", "summary", "label", "split"), ("query_id", "doc_id")),
    "scores": Table((*_PAIR, "teacher_score"), ("title", "summary", "label", "split"), ("query_id", "doc_id")),
}


def validate(frame: pd.DataFrame, table: str, source: str) -> pd.DataFrame:
    """Check a table against its contract and give its columns their types.

    Args:
        frame: rows as read.
        table: a key of `TABLES`.
        source: where the rows come from; named in every error.

    Returns:
        A copy with text columns as str (a missing title or summary becomes ""), `label` as int64, `teacher_score`
        as float32, `weight` and `users` as float64; the row order and further columns as they were.

    Raises:
        TableError: a column is missing, a value is not what its column holds, a key occurs twice, one query_id has
            several query texts, or there are no rows.
    """
    contract = TABLES[table]
    missing = [column for column in contract.required if column not in frame.columns]
    if missing:
        found = ", ".join(map(str, frame.columns)) or "none"
        raise TableError(
            f"{source}: a {table} table needs the column(s) {', '.join(missing)}; it has: {found}. "
            f"Rename your columns to {', '.join(contract.required)}."
        )
    if frame.empty:
        raise TableError(f"{source}: the {table} table has no rows.")
    frame = frame.copy()
    for column in contract.required + contract.optional:
        if column in frame.columns:
            frame[column] = _READERS[column](frame[column], f"{source}: column '{column}' of the {table} table")
    _check_unique(frame, contract.key, f"{source}: {table} table")
    if "query_id" in contract.required:
        _check_one_text_per_query(frame, f"{source}: {table} table")
    return frame


def empty_queries(values: pd.Series) -> pd.Series:
    """Where nothing was asked: missing or blank."""
    return values.isna() | (values.astype(str).str.strip() == "")


def _read_id(values: pd.Series, where: str) -> pd.Series:
    _refuse(values, values.isna() | (values.astype(str) == ""), where, "hold no id")
    if pd.api.types.is_float_dtype(values.dtype):
        raise TableError(f"{where} holds decimal numbers; ids are strings or integers. {_shown(values)}")
    return values.astype(str).astype(object)


def _read_query(values: pd.Series, where: str) -> pd.Series:
    _refuse(values, empty_queries(values), where, "hold an empty query")
    return _read_text(values, where)


def _read_text(values: pd.Series, where: str) -> pd.Series:
    values = values.astype(object).where(values.notna(), "")
    _refuse(values, ~values.map(lambda value: isinstance(value, str)).astype(bool), where, "hold no text")
    return values


def _read_label(values: pd.Series, where: str) -> pd.Series:
    numbers = _numbers(values, where)
    _refuse(values, ~((numbers >= 0) & (numbers == np.floor(numbers))), where, "hold no whole number >= 0")
    return numbers.astype(np.int64)


def _read_score(values: pd.Series, where: str) -> pd.Series:
    return _numbers(values, where, np.float32)


def _read_amount(values: pd.Series, where: str) -> pd.Series:
    numbers = _numbers(values, where)
    _refuse(values, numbers < 0, where, "hold a negative number")
    return numbers


def _numbers(values: pd.Series, where: str, dtype: type[np.floating] = np.float64) -> pd.Series:
    """The values as finite numbers; one that is too large for the type is not finite."""
    with np.errstate(over="ignore"):
        numbers = pd.to_numeric(values, errors="coerce").astype(dtype)
    _refuse(values, ~np.isfinite(numbers), where, "hold no finite number")
    return numbers


_READERS: dict[str, Callable[[pd.Series, str], pd.Series]] = {
    "query_id": _read_id,
    "doc_id": _read_id,
    "query": _read_query,
    "title": _read_text,
    "summary": _read_text,
    "split": _read_text,
    "label": _read_label,
    "teacher_score": _read_score,
    "weight": _read_amount,
    "users": _read_amount,
}


def _check_unique(frame: pd.DataFrame, key: tuple[str, ...], where: str) -> None:
    if not key:
        return
    repeated = frame.duplicated(list(key), keep="first")
    if repeated.any():
        raise TableError(
            f"{where}: {int(repeated.sum())} row(s) repeat a ({', '.join(key)}) that stands above. "
            f"{_shown(frame.loc[repeated, list(key)])} Keep one row for each."
        )


def _check_one_text_per_query(frame: pd.DataFrame, where: str) -> None:
    other = frame["query"].to_numpy() != frame.groupby("query_id", sort=False)["query"].transform("first").to_numpy()
    if other.any():
        raise TableError(
            f"{where}: {int(other.sum())} row(s) give a query_id another query text than the rows above. "
            f"{_shown(frame.loc[other, ['query_id', 'query']])}"
        )


def _refuse(values: pd.Series, bad: pd.Series | np.ndarray, where: str, what: str) -> None:
    flags = np.asarray(bad, dtype=bool)
    if flags.any():
        raise TableError(f"{where}: {int(flags.sum())} row(s) {what}. {_shown(values[flags])}")


def _shown(rows: pd.Series | pd.DataFrame) -> str:
    """The first rows with their places, for an error message."""
    records = rows.head(SHOWN_ROWS)
    values = records.to_dict("records") if isinstance(records, pd.DataFrame) else records.tolist()
    return (
        "First: "
        + "; ".join(f"row {place}: {value!r:.100}" for place, value in zip(records.index, values, strict=True))
        + "."
    )
