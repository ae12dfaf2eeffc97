"""Schemas of the tables that pass between stages, and their validation.

| table      | columns                                                                              |
|------------|--------------------------------------------------------------------------------------|
| clicks     | query, title, summary; optional: weight >= 0, users >= 0                             |
| judgments  | query_id, query, doc_id, title, summary, label (int >= 0, 0 = irrelevant) [, split]  |
| corpus     | doc_id, title, summary                                                               |
| candidates | query_id, query, doc_id [, title, summary: else joined from a corpus]                |
| scores     | candidates + teacher_score (float32, raw logit)                                      |

Other columns pass through unread. Ids and texts are strings; integer ids are read as strings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from numbers import Real

import numpy as np
import pandas as pd

SHOWN_ROWS = 3
_THOUSANDS = re.compile(r"\s*\d{1,3}(\.\d{3})+\s*")


class TableError(ValueError):
    """Error of a table that breaks its schema; the message names source, column and the first offending rows."""


@dataclass(frozen=True)
class Table:
    """Columns and unique key of a table."""

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

KNOWN_COLUMNS = {column for table in TABLES.values() for column in table.required + table.optional}
# Texts that identify a query or a document without an id.
ID_TEXTS = {"query_id": ("query",), "doc_id": ("title", "summary")}


def validate(frame: pd.DataFrame, table: str, source: str) -> pd.DataFrame:
    """Check a table against its schema and convert its columns.

    Args:
        frame: Rows as read. Errors locate a row by its index and the index's name ("line" for a file, else "row").
        table: A key of `TABLES`.
        source: Origin of the rows, named in every error.

    Returns:
        A copy with text columns as str (a missing title or summary becomes ""), `label` as int64, `teacher_score`
        as float32, `weight` and `users` as float64. Row order and other columns are unchanged.

    Raises:
        TableError: If a column is missing or misspelt, a value has the wrong type, a key occurs twice, a query_id
            has several query texts, or there are no rows.
    """
    schema = TABLES[table]
    check_names(frame.columns, table, source)
    _check_complete(frame.columns, table, source)
    if frame.empty:
        raise TableError(f"{source}: the {table} table has no rows.")
    frame = frame.copy()
    for column in schema.required + schema.optional:
        if column in frame.columns:
            frame[column] = _READERS[column](frame[column], f"{source}: column '{column}' of the {table} table")
    where = f"{source}: {table} table"
    if schema.key:
        keys = frame[list(schema.key)]
        refuse(keys, keys.duplicated(), where, f"repeat a ({', '.join(schema.key)}) seen above", " Keep one row each.")
    if "query_id" in schema.required:
        first = frame.groupby("query_id", sort=False)["query"].transform("first")
        what = "have another query text than earlier rows of their query_id"
        refuse(frame[["query_id", "query"]], frame["query"] != first, where, what)
    return frame


def check_names(columns: Iterable[object], table: str, source: str) -> None:
    """Raise TableError for a duplicate column, or one that differs from the schema in case or spaces only."""
    names = list(columns)
    expected = TABLES[table].required + TABLES[table].optional
    for name in expected:
        if names.count(name) > 1:
            raise TableError(f"{source}: the column '{name}' occurs {names.count(name)} times; keep one.")
    alike = {str(name).strip().casefold(): str(name) for name in reversed(names)}
    spelt = {name: alike[name] for name in expected if name not in names and name in alike}
    if spelt:
        found, ours = ", ".join(map(repr, spelt.values())), ", ".join(map(repr, spelt))
        what, them = (f"column {found} is", "it") if len(spelt) == 1 else (f"columns {found} are", "them")
        how = columns_hint({known: name.strip() for known, name in spelt.items()})
        raise TableError(f"{source}: the {what} called {ours} here: rename {them}, or {how}.")


def _check_complete(columns: Iterable[object], table: str, source: str) -> None:
    """Raise TableError for missing columns, except ids that can be made from texts."""
    names = list(columns)
    missing = [column for column in TABLES[table].required if column not in names]
    if not missing:
        return
    made = [name for name, texts in ids_to_make(names, table).items() if not {*texts} <= {*names}]
    needed = [name for name in missing if name not in made]
    ids = f" Without {' and '.join(made)}, ids are made from the texts." if made else ""
    raise TableError(
        f"{source}: a {table} table needs the column(s) {', '.join(needed)}; it has: "
        f"{', '.join(map(str, names)) or 'none'}. "
        f"If yours have other names: {columns_hint(dict.fromkeys(needed, 'YOURS'))}.{ids}"
    )


def columns_hint(names: Mapping[str, str]) -> str:
    """Return how to read columns under other names, in a command and in Python."""
    return f"--columns {','.join(f'{ours}={theirs}' for ours, theirs in names.items())} (in Python: columns={names})"


def ids_to_make(columns: Iterable[object], table: str) -> dict[str, tuple[str, ...]]:
    """Return the missing ids of a table, each with the columns of the texts from which it is made.

    None is made if a column of another name ends with "id": it may be the one to read.
    """
    names = set(columns)
    if table == "queries" or any(str(name).strip().casefold().endswith("id") for name in names - KNOWN_COLUMNS):
        return {}
    return {name: ID_TEXTS[name] for name in ID_TEXTS if name in TABLES[table].required and name not in names}


def with_index(frame: pd.DataFrame) -> pd.DataFrame:
    """Turn the named index levels into columns."""
    names = [name for name in frame.index.names if name is not None and name not in frame.columns]
    return frame.reset_index(names) if names else frame


def empty_queries(values: pd.Series) -> pd.Series:
    """Return a mask of missing or whitespace-only queries."""
    return values.isna() | (values.astype(str).str.strip() == "")


def _read_id(values: pd.Series, where: str) -> pd.Series:
    refuse(values, values.isna() | (values.astype(str) == ""), where, "have no id")
    if pd.api.types.is_float_dtype(values.dtype):
        raise TableError(f"{where} has decimal numbers; ids are strings or integers. {_shown(values)}")
    refuse(values, ~_instances(values, (str, int, np.integer)), where, "have neither a string nor an integer")
    return values.astype(str).astype(object)


def _read_query(values: pd.Series, where: str) -> pd.Series:
    refuse(values, empty_queries(values), where, "have an empty query")
    return _read_text(values, where)


def _read_text(values: pd.Series, where: str) -> pd.Series:
    values = values.astype(object).where(values.notna(), "")
    refuse(values, ~_instances(values, (str,)), where, "have no text")
    return values


def _read_label(values: pd.Series, where: str) -> pd.Series:
    numbers = _numbers(values, where)
    refuse(values, ~((numbers >= 0) & (numbers == np.floor(numbers))), where, "have no whole number >= 0")
    refuse(values, numbers >= 2**63, where, "have a number that is too large")
    return numbers.astype(np.int64)


def _read_weight(values: pd.Series, where: str) -> pd.Series:
    numbers = _numbers(values, where)
    refuse(values, numbers < 0, where, "have a negative number")
    return numbers.astype(np.float64)


def _read_users(values: pd.Series, where: str) -> pd.Series:
    numbers = _read_weight(values, where)
    grouped = values.astype(object).map(lambda value: isinstance(value, str) and bool(_THOUSANDS.fullmatch(value)))
    refuse(values, grouped, where, "may have thousands written with a dot: write 1200, not 1.200")
    refuse(values, numbers != np.floor(numbers), where, "have a fraction, not a number of users")
    return numbers


def _numbers(values: pd.Series, where: str, dtype: type[np.floating] | None = None) -> pd.Series:
    """Convert to finite numbers: integers exactly, others to `dtype`, refusing those that overflow it."""
    # pandas would convert dates, complex numbers and bytes.
    refuse(values, ~_instances(values, (str, Real, Decimal)), where, "have no finite number")
    numbers: pd.Series = pd.to_numeric(values, errors="coerce")
    if dtype or numbers.isna().any() or not pd.api.types.is_integer_dtype(numbers.dtype):
        with np.errstate(over="ignore"):
            numbers = numbers.astype(dtype or np.float64)
    refuse(values, ~np.isfinite(numbers), where, "have no finite number")
    return numbers


def _instances(values: pd.Series, kinds: tuple[type, ...]) -> pd.Series:
    """Return a mask of the values of given types, without a scan where the dtype decides."""
    if isinstance(values.dtype, pd.StringDtype) or values.dtype.kind in "iubf":
        return pd.Series(True, values.index)
    return values.astype(object).map(lambda value: isinstance(value, kinds)).astype(bool)


_READERS: dict[str, Callable[[pd.Series, str], pd.Series]] = {
    "query_id": _read_id,
    "doc_id": _read_id,
    "query": _read_query,
    "title": _read_text,
    "summary": _read_text,
    "split": _read_text,
    "label": _read_label,
    "teacher_score": partial(_numbers, dtype=np.float32),
    "weight": _read_weight,
    "users": _read_users,
}


def refuse(
    values: pd.Series | pd.DataFrame, bad: pd.Series | np.ndarray, where: str, what: str, hint: str = ""
) -> None:
    """Raise TableError with the first bad values or rows, if any."""
    flags = np.asarray(bad, dtype=bool)
    if flags.any():
        raise TableError(f"{where}: {int(flags.sum())} row(s) {what}. {_shown(values[flags])}{hint}")


def _shown(rows: pd.Series | pd.DataFrame) -> str:
    """Format the first rows and their positions for an error message."""
    records = rows.head(SHOWN_ROWS)
    values = records.to_dict("records") if isinstance(records, pd.DataFrame) else records.tolist()
    place = records.index.name or "row"
    shown = (f"{place} {number}: {value!r:.100}" for number, value in zip(records.index, values, strict=True))
    return f"First: {'; '.join(shown)}."


def grades_from_zero(labels: pd.Series) -> pd.Series:
    """Replace negative TREC labels (spam) by 0. Values that are not numbers are left for `validate` to refuse."""
    return labels.astype(object).where(~(pd.to_numeric(labels, errors="coerce") < 0), 0)


def rows_of(ids: pd.Series, known: pd.Index, name: str, place: str = "in the corpus") -> np.ndarray:
    """Return the row of each id among the unique known ones, shape (len(ids),); TableError if one is not there."""
    rows = known.get_indexer(pd.Index(ids))
    unknown = rows < 0
    if unknown.any():
        first = ", ".join(ids[unknown].unique()[:SHOWN_ROWS])
        raise TableError(f"{name}: {int(unknown.sum())} row(s) name a {ids.name} that is not {place}, first: {first}.")
    return rows


def join_texts(frame: pd.DataFrame, corpus: pd.DataFrame, name: str) -> pd.DataFrame:
    """Add the title and summary of each row's doc_id from a corpus table; TableError if the corpus lacks one."""
    rows = rows_of(frame["doc_id"], pd.Index(corpus["doc_id"]), name)
    texts = {column: corpus[column].to_numpy()[rows] for column in ("title", "summary")}
    return frame.drop(columns=["title", "summary"], errors="ignore").assign(**texts)


def join_queries(frame: pd.DataFrame, queries: pd.DataFrame, name: str) -> pd.DataFrame:
    """Add the text of each row's query_id from a queries table; TableError if it lacks one."""
    rows = rows_of(frame["query_id"], pd.Index(queries["query_id"]), name, "among the queries")
    return frame.assign(query=queries["query"].to_numpy()[rows])
