"""Readers of tables from any source.

A source is the path of a parquet, jsonl or csv file, of a folder of parquet files (a score store) or of a BEIR folder,
an fsspec URL of these (`s3://`, `hf://datasets/...`; BEIR folders are local), a Hub data set id, a `datasets.Dataset`
or `DatasetDict`, or a `pandas.DataFrame`. The split names of a `DatasetDict` or Hub data set become the column `split`
if there is none.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import fsspec
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, load_dataset
from fsspec.core import url_to_fs

from hf_disranker.data.files import is_beir, is_table_file, read_beir, read_file
from hf_disranker.data.schema import (
    KNOWN_COLUMNS,
    TABLES,
    TableError,
    columns_hint,
    empty_queries,
    ids_to_make,
    join_texts,
    validate,
    with_index,
)

logger = logging.getLogger(__name__)

Source: TypeAlias = str | os.PathLike[str] | Dataset | DatasetDict | pd.DataFrame

# Our column name to that of the user's tables.
Columns: TypeAlias = Mapping[str, str]

# Names of a weight in click logs; a column with one of them is ignored with a warning.
_WEIGHT_NAMES = {"click", "clicks", "count", "counts", "freq", "frequency", "n", "num_clicks", "click_count"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def read_table(
    source: Source,
    table: str,
    split: str | None = None,
    corpus: Source | None = None,
    texts: bool = True,
    columns: Columns | None = None,
) -> pd.DataFrame:
    """Read and validate a table.

    Args:
        source: See the module docstring.
        table: Schema of the table: clicks, judgments, corpus, queries, candidates or scores.
        split: Keep the rows with this value in the column `split`; None or "" keeps all.
        corpus: Source of the texts for a table with ids only.
        texts: If False, do not join texts to a table with ids only.
        columns: The table's name of each column that has another one, such as {"query": "search_term"}. Where
            query_id or doc_id is missing and no other name ends with "id", it is made from the texts.

    Returns:
        The validated rows, numbered from 0.

    Raises:
        FileNotFoundError: If there is no such file, folder or data set.
        TableError: If the table breaks its schema, or a document is not in the corpus.
    """
    frame, name = read_rows(source, table, split, columns)
    return check_rows(frame, name, table, split, corpus, texts, columns)


def check_rows(
    frame: pd.DataFrame,
    name: str,
    table: str,
    split: str | None,
    corpus: Source | None,
    texts: bool = True,
    columns: Columns | None = None,
) -> pd.DataFrame:
    """Validate rows read from the source `name`; arguments as in `read_table`."""
    if table == "clicks":
        unread = [column for column in map(str, frame.columns) if column.strip().casefold() in _WEIGHT_NAMES]
        if unread and "weight" not in frame.columns:
            how = columns_hint({"weight": unread[0]})
            logger.warning("%s: the column '%s' is not read. If it counts clicks: %s.", name, unread[0], how)
        if "query" in frame.columns and (empty := empty_queries(frame["query"])).any():
            # Logs include pages that were reached without a search.
            logger.warning("%s: %d click(s) have no query and are left out.", name, int(empty.sum()))
            frame = frame[~empty]
    frame = validate(frame, table, name)
    if "query" in frame.columns and len(broken := frame["query"][frame["query"].str.contains("[\r\n]")]):
        logger.warning(
            "%s: %d quer(ies) have a line break, as if a stray double quote had joined lines; first: %s %s: %.100r.",
            *(name, len(broken), broken.index.name or "row", broken.index[0], broken.iloc[0]),
        )
    if split:
        frame = _only_split(frame, split, name)
    if texts and table in ("candidates", "scores") and not has_texts(frame.columns):
        frame = join_texts(frame, read_texts(corpus, name, columns), name)
    if has_texts(frame.columns):
        without_text = (frame["title"].str.strip() == "") & (frame["summary"].str.strip() == "")
        if without_text.any():
            logger.warning("%s: %d document(s) have neither title nor summary.", name, without_text.sum())
    return frame.reset_index(drop=True)


def has_texts(columns: Any) -> bool:
    """Return True if the columns include title and summary."""
    return {"title", "summary"} <= set(columns)


def read_texts(corpus: Source | None, name: str, columns: Columns | None = None) -> pd.DataFrame:
    """Read the corpus for a table `name` without texts; TableError if there is none."""
    if corpus is None:
        raise TableError(f"{name}: the rows have no title and summary; name the corpus with the texts.")
    return read_table(corpus, "corpus", columns=columns)[["doc_id", "title", "summary"]]


def _only_split(frame: pd.DataFrame, split: str, name: str) -> pd.DataFrame:
    if "split" not in frame.columns:
        raise TableError(f"{name}: there is no column 'split' to take '{split}' from; name no split to use all rows.")
    chosen = frame[frame["split"] == split].reset_index(drop=True)
    if chosen.empty:
        present = ", ".join(sorted(frame["split"].unique()))
        raise TableError(f"{name}: no row has split '{split}'; there are: {present}.")
    return chosen


def read_rows(
    source: Source, table: str, split: str | None = None, columns: Columns | None = None
) -> tuple[pd.DataFrame, str]:
    """Read unchecked rows and the source's name; arguments as in `read_table`."""
    frame, name = _rows_as_stored(source, table, split)
    return with_columns(frame, columns, groups_table(frame, columns) if table == "judgments" else table, name), name


def groups_table(frame: pd.DataFrame, columns: Columns | None = None) -> str:
    """Return the table that training groups are read from: scores if there are any, else judgments."""
    return "scores" if "teacher_score" in {*frame.columns, *(columns or {})} else "judgments"


def with_columns(
    frame: pd.DataFrame, columns: Columns | None, table: str, source: str, quiet: bool = False
) -> pd.DataFrame:
    """Rename the columns of a table as read, and add the ids that it lacks.

    Args:
        frame: Unchecked rows.
        columns: The table's name of each of our columns that has another one; may name columns of other tables.
        table: Schema of the table, a key of `schema.TABLES`.
        source: Origin of the rows, named in errors.
        quiet: If True, do not report that ids are made.

    Raises:
        TableError: If `columns` names a column that is not there, a name that no table has, or one that is taken.
    """
    chosen = _chosen(frame.columns, columns, table, source)
    frame = frame.assign(**{ours: frame[theirs] for ours, theirs in chosen.items()}).drop(columns=_replaced(chosen))
    made = _ids_with_texts(frame.columns, table)
    if made and not quiet:
        logger.warning("%s has no %s: ids are made from the texts.", source, " or ".join(made))
    return frame.assign(**{name: _ids(frame[list(texts)]) for name, texts in made.items()})


def with_arrow_columns(rows: pa.Table, columns: Columns | None, table: str, source: str) -> pa.Table:
    """Apply `with_columns` to an arrow table, without a message."""
    chosen = _chosen(rows.column_names, columns, table, source)
    for ours, theirs in chosen.items():
        rows = rows.append_column(ours, rows[theirs])
    rows = rows.drop_columns(_replaced(chosen))
    for name, texts in _ids_with_texts(rows.column_names, table).items():
        rows = rows.append_column(name, pa.array(_ids(rows.select(texts).to_pandas())))
    return rows


def _ids_with_texts(names: Iterable[object], table: str) -> dict[str, tuple[str, ...]]:
    """Return those of `schema.ids_to_make` whose texts are there."""
    names = set(names)
    return {name: texts for name, texts in ids_to_make(names, table).items() if names.issuperset(texts)}


def _chosen(names: Iterable[object], columns: Columns | None, table: str, source: str) -> dict[str, str]:
    """Return the entries of `columns` that apply to a table with these names."""
    present, schema = [str(name) for name in names], TABLES[table]
    # Optional columns of clicks and judgments are expected too, those of other tables may be in another file.
    wanted = schema.required + (schema.optional if table in ("clicks", "judgments") else ())
    chosen = {}
    for ours, theirs in (columns or {}).items():
        if ours not in KNOWN_COLUMNS:
            raise TableError(
                f"There is no column '{ours}' to read '{theirs}' as; there are: {', '.join(sorted(KNOWN_COLUMNS))}."
            )
        found = theirs if theirs in present else next((name for name in present if name.strip() == theirs), None)
        if found is None and ours in wanted and ours not in present:
            raise TableError(f"{source}: no column '{theirs}' to read as '{ours}'; it has: {', '.join(present)}.")
        if found in (None, ours):
            continue
        if ours in present:
            raise TableError(f"{source}: '{theirs}' cannot be read as '{ours}', since there is such a column already.")
        chosen[ours] = found
    return chosen


def _replaced(chosen: Columns) -> list[str]:
    """Return the columns that are renamed; one of our own names is copied: `query_id=query` keeps the query."""
    return sorted(set(chosen.values()) - KNOWN_COLUMNS)


def _ids(texts: pd.DataFrame) -> list[str]:
    """Make a stable id for each row of texts: the same text has the same id in every table."""
    rows = zip(*(texts[name].fillna("").astype(str) for name in texts), strict=True)
    return [hashlib.sha1("\n".join(row).encode(), usedforsecurity=False).hexdigest()[:16] for row in rows]


def _rows_as_stored(source: Source, table: str, split: str | None = None) -> tuple[pd.DataFrame, str]:
    """Read rows and the source's name; `table` and `split` choose the files of a BEIR folder."""
    if isinstance(source, Dataset):
        return source.to_pandas(), source_name(source)
    if isinstance(source, DatasetDict):
        return _joined(source), source_name(source)
    if isinstance(source, pd.DataFrame):
        return with_index(source), source_name(source)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"A table is a path, a Hub id, a Dataset, a DatasetDict or a DataFrame, not {type(source)}.")
    if is_beir(source):
        return read_beir(Path(source), table, split)
    source = os.fspath(source)
    fs, path = locate(source)
    if fs.isfile(path):
        return read_file(fs, path), source
    if fs.isdir(path):
        return pd.concat([read_file(fs, file) for file in parquet_files(source)], ignore_index=True), source
    if is_hub_id(source):
        return _joined(load_splits(source)), source
    raise FileNotFoundError(f"{source}: no such file or folder.")


def source_name(source: Source) -> str:
    """Return the name of a source in errors: its path or id, or the type of a table in memory."""
    return os.fspath(source) if isinstance(source, str | os.PathLike) else f"<{type(source).__name__}>"


def locate(source: str) -> tuple[Any, str]:
    """Return the file system of a path or URL, and its path there; FileNotFoundError for an unknown protocol."""
    try:
        return url_to_fs(source)
    except (ValueError, ImportError) as error:
        raise FileNotFoundError(f"{source}: {error}") from error


def parquet_files(source: Source) -> list[str]:
    """Return the sorted parquet files of a path or URL, as paths in its file system; none for any other source.

    Raises:
        FileNotFoundError: If a folder has no parquet file.
    """
    if not isinstance(source, str | os.PathLike) or is_beir(source):
        return []
    fs, path = locate(os.fspath(source))
    if not fs.isdir(path):
        return [path] if path.lower().endswith(".parquet") and fs.isfile(path) else []
    entries = fs.ls(path, detail=True)
    names = sorted(entry["name"] for entry in entries if entry["type"] == "file")
    files = [file for file in names if file.lower().endswith(".parquet")]
    if not files:
        others = ", ".join(file.rsplit("/", 1)[-1] for file in names[:5]) or "no files"
        raise FileNotFoundError(f"{os.fspath(source)}: the folder has no parquet file; it has: {others}.")
    return files


def column_names(source: Source) -> list[str]:
    """Return the columns of a table; for parquet, from the schema of the first file."""
    if files := parquet_files(source):
        with locate(os.fspath(source))[0].open(files[0], "rb") as file:  # type: ignore[arg-type]
            return pq.read_schema(file).names
    return list(_rows_as_stored(source, "judgments")[0].columns)


def usual_split(source: Source, named: str | None, usual: str, columns: Columns | None = None) -> str | None:
    """Choose the split to read.

    Args:
        source: See the module docstring.
        named: The user's choice; "" means all rows.
        usual: Default for a table with a column `split`. A table without one is read whole.
        columns: As in `read_table`.
    """
    if named is not None:
        return named
    return usual if is_beir(source) or "split" in {*column_names(source), *(columns or {})} else None


def is_hub_id(source: str) -> bool:
    """Return True if a source can only be the id of a Hub data set."""
    return bool(_HUB_ID.fullmatch(source)) and not os.path.exists(source) and not is_table_file(source)


def load_splits(name: str, streaming: bool = False) -> Mapping[str, Any]:
    """Load the splits of a Hub data set; FileNotFoundError if it cannot be read."""
    try:
        splits: Mapping[str, Any] = load_dataset(name, streaming=streaming)
    except Exception as error:  # of many kinds; a wrong path is the likeliest cause
        raise FileNotFoundError(
            f"{name}: no such file or folder, and no such data set could be read from the Hub ({error})"
        ) from error
    return splits


def with_split(frame: pd.DataFrame, split: object) -> pd.DataFrame:
    """Add the name of a split as the column `split`, unless there is one."""
    return frame if "split" in frame.columns else frame.assign(split=str(split))


def _joined(splits: Mapping[str, Dataset]) -> pd.DataFrame:
    return pd.concat([with_split(part.to_pandas(), name) for name, part in splits.items()], ignore_index=True)


def arrow_column(values: pd.Series) -> pa.Array:
    """Convert a validated column to the arrow type of its name."""
    # large_string: a column of a big table exceeds 2 GiB of text.
    kinds = {"label": pa.int64(), "teacher_score": pa.float32()}
    return pa.array(values, kinds.get(str(values.name), pa.large_string()))


def pair_texts(rows: pd.DataFrame) -> list[tuple[str, dict[str, str]]]:
    """Convert rows with query, title and summary to the input of `Ranker.predict`."""
    columns = zip(rows["query"], rows["title"], rows["summary"], strict=True)
    return [(query, {"title": title, "summary": summary}) for query, title, summary in columns]


def write_table(frame: pd.DataFrame, path: str) -> None:
    """Write rows as parquet to a path or fsspec URL, creating its folder."""
    with fsspec.open(path, "wb") as file:
        frame.to_parquet(file, index=False)
