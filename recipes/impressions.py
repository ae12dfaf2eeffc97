"""Impression logs of search, aggregated in batches as they are read.

Formats are parquet (a file or a folder), csv and jsonl. A row is a result page or, with `page_id`, a document of it.

| column        | content                                                           |
|---------------|-------------------------------------------------------------------|
| user_id       | unit of randomisation                                             |
| bucket        | ranker that the user saw; one per user                            |
| clicked       | clicks on the row: a number, true or false                        |
| dwell_seconds | total time on the clicked documents; null if unknown              |
| page_id       | optional: page of the user; its rows are counted as one page      |
| day           | optional: date, timestamp or number of the day                    |

`columns` is the log's name of each of these columns that has another one, such as {"user_id": "visitor"}.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.dataset

from hf_disranker.data.schema import SHOWN_ROWS, TableError, columns_hint

_MOST_DAYS, _PENDING_ROWS = 400, 1_000_000
_FORMATS = {".parquet": "parquet", ".csv": "csv", ".jsonl": "json"}


def read_log(
    source: str,
    slices: Sequence[str] = (),
    covariates: Sequence[str] = (),
    exclude_mixed: bool = False,
    columns: Mapping[str, str] | None = None,
) -> tuple[pd.DataFrame, int]:
    """Sum an impression log by user; memory grows with users and pages, not with rows.

    Args:
        source: Path to a log; see the module docstring.
        slices: Columns with one value per page.
        covariates: Numeric columns measured before the test, with one value per user.
        exclude_mixed: If True, drop users with several buckets instead of refusing the log.
        columns: See the module docstring.

    Returns:
        A row per user, day and combination of slices, with user (int), bucket, day (if any), slices, covariates,
        pages, clicked_pages, clicks, timed_clicks and seconds; and the number of dropped users.

    Raises:
        TableError: If a column is missing or has an invalid value; the message shows the first rows.
    """
    required = ["user_id", "bucket", "clicked", "dwell_seconds", *slices, *covariates]
    log, fields = _open(source, required, ["page_id", "day"], columns or {})
    page, day = ([name] if name in fields else [] for name in ("page_id", "day"))
    unit = ["user_id", "bucket", *covariates, *slices]
    rows_of = _batches(log, fields, source)
    parts: Iterator[pa.Table] = (_events(rows, first, source, covariates) for first, rows in rows_of)
    if page:
        pages = _add_up(parts, [*unit, *page])
        if several := pages.num_rows - pages.group_by(["user_id", "bucket", *page]).aggregate([]).num_rows:
            changing = ", ".join([*slices, *covariates])
            raise TableError(f"{source}: {several:,} page(s) have several values in {changing}.")
        parts = iter([pages.drop_columns(page)])
    table = _add_up(map(_with_pages, parts), [*unit, *day]).to_pandas()
    table.insert(0, "user", pd.factorize(table["user_id"])[0])
    _check_users(table, covariates, source)
    mixed = table["user"].map(table.groupby("user")["bucket"].nunique() > 1)
    names = table.loc[mixed, "user_id"].drop_duplicates()
    if len(names) and not exclude_mixed:
        shown = ", ".join(map(repr, names.head(SHOWN_ROWS)))
        raise TableError(f"{source}: column 'bucket': {len(names):,} user(s) are in several buckets. First: {shown}.")
    texts = dict.fromkeys([*day, *slices, "bucket"], "category")
    return table[~mixed].drop(columns="user_id").astype(texts), len(names)


def read_credit(source: str, lists: pd.DataFrame, columns: Mapping[str, str] | None = None) -> pd.DataFrame:
    """Compute the winner of each page of an interleaving: the ranker whose documents got more clicks.

    A row of the log is a shown document, with user_id, query_id, draft, doc_id, clicked [, page_id]; `lists` is the
    result of `online.draft_lists`, and `columns` as in the module docstring.

    Returns:
        A row per page with user_id and credit: 1 if the second ranker won, -1 if the first did, 0 for a tie.

    Raises:
        TableError: If a document is not on its list, a column is missing, or a value is invalid.
    """
    required = ["user_id", "query_id", "draft", "doc_id", "clicked"]
    log, fields = _open(source, required, ["page_id"], columns or {})
    page = ["user_id", "query_id", "draft", *(["page_id"] if "page_id" in fields else [])]
    key = ["query_id", "draft", "doc_id"]
    team = lists.astype(dict.fromkeys(key, str)).set_index(key)["team"]

    def parts() -> Iterator[pa.Table]:
        for first, rows in _batches(log, fields, source):
            clicks, where = _numbers(rows["clicked"]), (source, first)
            for name in page:
                _refuse(rows, name, _missing(rows[name]), "have no value", where)
            _refuse(rows, "clicked", ~(clicks >= 0), "have no number of clicks", where)
            shown = pd.MultiIndex.from_frame(rows.select(key).to_pandas().astype(str))
            picks = team.reindex(shown).to_numpy(np.float64)
            _refuse(rows, "doc_id", np.isnan(picks), "are not on the list of their query_id and draft", where)
            yield rows.select(page).append_column("credit", [np.where(clicks > 0, 2 * picks - 1, 0)])

    pages = _add_up(parts(), page).to_pandas()
    return pages[["user_id"]].assign(credit=np.sign(pages["credit"]).astype(int))


def _open(
    source: str, required: Sequence[str], optional: Sequence[str], columns: Mapping[str, str]
) -> tuple[pa.dataset.Dataset, dict[str, pc.Expression]]:
    """Open a log; return it with the field of each column to read, by our name."""
    kind = "parquet" if os.path.isdir(source) else _FORMATS.get(Path(source).suffix)
    if kind is None or not os.path.exists(source):
        raise TableError(f"{source}: {'no such file or folder' if kind else 'a log is .parquet, .csv or .jsonl'}.")
    try:
        log = pa.dataset.dataset(source, format=kind)
        names = log.schema.names
        if kind == "csv":  # as text: types inferred from the first rows may not fit the rest
            types = pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True)
            parse = pa.csv.ParseOptions(newlines_in_values=True)
            log = pa.dataset.dataset(source, format=pa.dataset.CsvFileFormat(parse, convert_options=types))
        elif kind == "json" and (seconds := columns.get("dwell_seconds", "dwell_seconds")) in names:
            place = log.schema.get_field_index(seconds)
            log = log.replace_schema(log.schema.set(place, pa.field(seconds, pa.float64())))
    except pa.ArrowInvalid as error:
        raise TableError(f"{source}: cannot be read: {error}") from error
    return log, _fields(source, names, required, optional, columns)


def _fields(
    source: str, names: Sequence[str], required: Sequence[str], optional: Sequence[str], columns: Mapping[str, str]
) -> dict[str, pc.Expression]:
    """Return the field of each column, by our name; TableError if `columns` or the log does not fit."""
    for ours, theirs in columns.items():
        if ours not in (*required, *optional):
            known = ", ".join([*required, *optional])
            raise TableError(f"There is no column '{ours}' to read '{theirs}' as; there are: {known}.")
        if theirs not in names:
            raise TableError(f"{source}: no column '{theirs}' to read as '{ours}'; it has: {', '.join(names)}.")
        if ours in names and ours != theirs:
            raise TableError(f"{source}: '{theirs}' cannot be read as '{ours}', since there is such a column already.")
    found = {name: columns.get(name, name) for name in (*required, *optional)}
    if missing := [name for name in required if found[name] not in names]:
        raise TableError(
            f"{source}: the log needs the column(s) {', '.join(missing)}; it has: {', '.join(names)}. "
            f"If yours have other names: {columns_hint(dict.fromkeys(missing, 'YOURS'))}."
        )
    return {ours: pc.field(theirs) for ours, theirs in found.items() if theirs in names}


def _batches(log: pa.dataset.Dataset, fields: dict[str, pc.Expression], source: str) -> Iterator[tuple[int, pa.Table]]:
    """Yield (number of the first row, rows) for each batch."""
    first = 0
    try:
        for batch in log.to_batches(columns=fields):
            # Decode categories, whose codes may differ between batches.
            plain = [part.dictionary_decode() if pa.types.is_dictionary(part.type) else part for part in batch.columns]
            yield first, pa.table(plain, names=batch.schema.names)
            first += len(batch)
    except pa.ArrowInvalid as error:
        raise TableError(f"{source}: cannot be read: {error}") from error
    if not first:
        raise TableError(f"{source}: the log has no rows.")


def _refuse(rows: pa.Table, name: str, bad: np.ndarray, what: str, where: tuple[str, int]) -> None:
    """Raise TableError with the first bad rows; `where` is the source and the number of the first row."""
    if bad.any():
        (source, first), places = where, np.flatnonzero(bad)[:SHOWN_ROWS]
        shown = "; ".join(f"row {first + place}: {rows[name][place].as_py()!r:.100}" for place in places)
        raise TableError(f"{source}: column '{name}': {int(bad.sum()):,} row(s) {what}. First: {shown}.")


def _events(rows: pa.Table, first: int, source: str, covariates: Sequence[str]) -> pa.Table:
    """Validate rows; return their grouping keys, clicks, timed_clicks and seconds."""
    where, found = (source, first), {}
    for name in rows.column_names:
        column = rows[name]
        if name in ("user_id", "bucket", "page_id", "day"):
            _refuse(rows, name, _missing(column), "have no value", where)
        if name in ("clicked", "dwell_seconds", *covariates):
            found[name] = _numbers(column)
            _refuse(rows, name, ~np.isfinite(found[name]) & ~_missing(column), "have no finite number", where)
        elif name == "day":
            texts = (column.cast(pa.date32()) if pa.types.is_temporal(column.type) else column).cast(pa.string())
            readable = pc.match_substring_regex(texts, r"^(\d{1,8}$|\d{4}-\d\d-\d\d)").to_numpy()
            _refuse(rows, name, ~readable, "have no date, timestamp or number of a day", where)
            found[name] = pc.utf8_lpad(pc.utf8_slice_codeunits(texts, 0, 10), 10)  # text sorts like numbers
        else:
            found[name] = column if name in ("user_id", "page_id") else column.cast(pa.string()).fill_null("(none)")
    clicks, seconds = found.pop("clicked"), found.pop("dwell_seconds")
    _refuse(rows, "clicked", ~((clicks >= 0) & (clicks == np.floor(clicks))), "have no number of clicks", where)
    _refuse(rows, "dwell_seconds", seconds < 0, "have a negative time", where)
    _refuse(rows, "dwell_seconds", (seconds > 0) & (clicks == 0), "have a time without a click", where)
    found |= {name: pa.array(found[name], from_pandas=True) for name in covariates}
    timed = np.where(np.isnan(seconds), 0, clicks)
    return pa.table(found | {"clicks": clicks, "timed_clicks": timed, "seconds": np.nan_to_num(seconds)})


def _missing(column: pa.ChunkedArray) -> np.ndarray:
    return column.is_null(nan_is_null=True).to_numpy()


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """Convert to float64; true is 1, false is 0, anything but a number is nan."""
    try:
        return column.cast(pa.float64()).to_numpy()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        texts = column.to_pandas().astype(str).str.strip().str.lower().replace({"true": "1", "false": "0"})
        return pd.to_numeric(texts, errors="coerce").to_numpy(np.float64)


def _check_users(table: pd.DataFrame, covariates: Sequence[str], source: str) -> None:
    """Raise TableError for a covariate with several values per user, or a `day` that is no day."""
    for name in covariates:
        if table[name].isna().all():
            raise TableError(f"{source}: column '{name}' has no number.")
        if several := int((table.groupby("user")[name].nunique(dropna=False) > 1).sum()):
            raise TableError(f"{source}: column '{name}': {several:,} user(s) have several values.")
    if "day" in table and (days := table["day"].nunique()) > _MOST_DAYS:
        raise TableError(f"{source}: column 'day' has {days:,} values; days are dates, timestamps or numbers.")


def _with_pages(rows: pa.Table) -> pa.Table:
    """Count each row as a page."""
    clicks = rows["clicks"].to_numpy()
    return rows.append_column("pages", [np.ones(len(clicks))]).append_column("clicked_pages", [(clicks > 0) * 1.0])


def _add_up(parts: Iterable[pa.Table], keys: Sequence[str]) -> pa.Table:
    """Sum a stream of tables by keys; a `day` that is not a key becomes the first day."""
    keys, rows, limit = list(dict.fromkeys(keys)), 0, _PENDING_ROWS
    waiting: list[pa.Table] = []

    def added() -> pa.Table:
        table = pa.concat_tables(waiting)
        how = [(name, "min" if name == "day" else "sum") for name in table.column_names if name not in keys]
        table = table.group_by(keys, use_threads=False).aggregate(how)
        return table.select([*keys, *map("_".join, how)]).rename_columns([*keys, *(name for name, _ in how)])

    for part in parts:
        waiting.append(part)
        rows += len(part)
        if rows > limit:
            waiting = [added()]
            rows = len(waiting[0])
            limit = rows + max(rows, _PENDING_ROWS)
    return added()
