"""Columns of a user's tables: read under other names, and ids made from the texts where there are none."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from typing import TypeAlias

import pandas as pd
import pyarrow as pa

from hf_disranker.data.schema import ID_TEXTS, KNOWN_COLUMNS, TABLES, TableError, ids_may_be_made

logger = logging.getLogger(__name__)

# Our column name to that of the user's tables.
Columns: TypeAlias = Mapping[str, str]


def with_columns(frame: pd.DataFrame, columns: Columns | None, table: str, source: str) -> pd.DataFrame:
    """Rename the columns of a table as read, and add the ids that it lacks.

    Args:
        frame: Unchecked rows.
        columns: The table's name of each of our columns that has another one; may name columns of other tables.
        table: Schema of the table, a key of `schema.TABLES`.
        source: Origin of the rows, named in errors.

    Raises:
        TableError: If `columns` names a column that is not there, a name that no table has, or one that is taken.
    """
    chosen = _chosen(frame.columns, columns, table, source)
    frame = frame.assign(**{ours: frame[theirs] for ours, theirs in chosen.items()}).drop(columns=_replaced(chosen))
    made = id_texts(frame.columns, table)
    if made:
        logger.warning("%s has no %s: ids are made from the texts.", source, " or ".join(made))
    return frame.assign(**{name: _ids(frame[list(texts)]) for name, texts in made.items()})


def with_arrow_columns(rows: pa.Table, columns: Columns | None, table: str, source: str) -> pa.Table:
    """Do the same as `with_columns` to an arrow table, without a message."""
    chosen = _chosen(rows.column_names, columns, table, source)
    for ours, theirs in chosen.items():
        rows = rows.append_column(ours, rows[theirs])
    rows = rows.drop_columns(_replaced(chosen))
    for name, texts in id_texts(rows.column_names, table).items():
        rows = rows.append_column(name, pa.array(_ids(rows.select(texts).to_pandas())))
    return rows


def id_texts(names: Iterable[object], table: str) -> dict[str, tuple[str, ...]]:
    """Return the ids to make for a table, each with the columns of its texts.

    None is made if `schema.ids_may_be_made` is False.
    """
    names = set(names)
    if not ids_may_be_made(names, table):
        return {}
    lacking = [name for name in ID_TEXTS if name in TABLES[table].required and name not in names]
    return {name: ID_TEXTS[name] for name in lacking if names.issuperset(ID_TEXTS[name])}


def _chosen(names: Iterable[object], columns: Columns | None, table: str, source: str) -> dict[str, str]:
    """Return the entries of `columns` that apply to a table with these names."""
    present, schema = [str(name) for name in names], TABLES[table]
    chosen = {}
    for ours, theirs in (columns or {}).items():
        if ours not in KNOWN_COLUMNS:
            raise TableError(
                f"There is no column '{ours}' to read '{theirs}' as; there are: {', '.join(sorted(KNOWN_COLUMNS))}."
            )
        found = [name for name in present if name == theirs] or [name for name in present if name.strip() == theirs]
        if found and ours in present and ours != found[0]:
            raise TableError(f"{source}: '{theirs}' cannot be read as '{ours}', since there is such a column already.")
        # Optional columns of clicks and judgments are expected too, those of other tables may be in another file.
        wanted = schema.required + (schema.optional if table in ("clicks", "judgments") else ())
        if not found and ours in wanted and ours not in present:
            raise TableError(f"{source}: no column '{theirs}' to read as '{ours}'; it has: {', '.join(present)}.")
        if found and found[0] != ours:
            chosen[ours] = found[0]
    return chosen


def _replaced(chosen: Columns) -> list[str]:
    """Return the columns that are renamed; one of our own names is copied: `query_id=query` keeps the query."""
    return sorted(set(chosen.values()) - KNOWN_COLUMNS)


def _ids(texts: pd.DataFrame) -> list[str]:
    """Make a stable id for each row of texts: the same text has the same id in every table."""
    rows = zip(*(texts[name].fillna("").astype(str) for name in texts), strict=True)
    return [hashlib.sha1("\n".join(row).encode(), usedforsecurity=False).hexdigest()[:16] for row in rows]
