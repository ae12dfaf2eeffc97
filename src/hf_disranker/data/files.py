"""Files: atomic writes, and strict readers of csv, jsonl (optionally gzipped), parquet and BEIR folders.

Rows of a text file are indexed by their line, counted from 1 as in an editor, so that errors can name it.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from hf_disranker.data.schema import (
    KNOWN_COLUMNS,
    TableError,
    grades_from_zero,
    join_queries,
    join_texts,
    validate,
    with_index,
)

csv.field_size_limit(2**31 - 1)  # texts may be longer than the default of 128 KiB
# Rows that are Python objects at the same time.
_BLOCK = 50_000
_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}
_IS_UTF16 = "it is UTF-16: save it as UTF-8, as by iconv -f UTF-16 -t UTF-8."
# First bytes of files that are not UTF-8.
_OTHER_FILES = {
    b"\xff\xfe": _IS_UTF16,
    b"\xfe\xff": _IS_UTF16,
    b"\x1f\x8b": "it is compressed by gzip: let its name end in .gz.",
    b"PK\x03\x04": "it is a zip archive or an Excel workbook: export it as csv.",
}
_READ_ERRORS = (ValueError, OSError, EOFError, zlib.error, pa.ArrowException)
# Column names of BEIR and of the tables.
_BEIR_CORPUS = {"_id": "doc_id", "title": "title", "text": "summary"}
_BEIR_QUERIES = {"_id": "query_id", "text": "query"}
_BEIR_QRELS = {"query-id": "query_id", "corpus-id": "doc_id", "score": "label"}


def read_file(fs: Any, path: str, kind: str | None = None) -> pd.DataFrame:
    """Read a file unchecked: csv columns are str, those of jsonl and parquet have the types of the file.

    Args:
        fs: The fsspec file system of the file.
        path: Path of the file in `fs`.
        kind: ".csv", ".jsonl", ".parquet", ".tsv" or ".trec" (columns by number); None infers it from the path.

    Raises:
        TableError: If the format is unknown, or the file is empty or broken. The message says how to repair it.
    """
    if kind is None and not is_table_file(path):
        raise TableError(f"{path}: a table is one of {', '.join(FORMATS)}, or a folder of parquet files.")
    kind = kind or _ending(path)
    if fs.size(path) == 0:
        raise TableError(f"{path}: the file is empty.")
    try:
        with fs.open(path, "rb", compression="infer") as file:
            return _READERS[kind](file)
    except UnicodeDecodeError:
        raise TableError(f"{path}: {_not_utf8(fs, path)}") from None
    except _READ_ERRORS as error:
        raise TableError(f"{path}: cannot be read as {kind[1:]}: {error}") from error


def is_table_file(path: str) -> bool:
    """Return True if the file name has the extension of a supported format."""
    return _ending(path) in FORMATS


def _ending(path: str) -> str:
    return "." + path.lower().removesuffix(".gz").rsplit(".", 1)[-1]


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file in an existing folder by a rename, so that no reader sees a part of it."""
    temporary = f"{os.fspath(path)}.{uuid.uuid4().hex}.tmp"  # two processes never write to the same file
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


# Parquet


# Named index levels are columns; unnamed ones, internal to pandas, are dropped. A damaged file raises TableError.


def row_group_sizes(fs: Any, path: str) -> list[int]:
    """Return the number of rows of each row group of a parquet file, from its footer."""
    with _parquet(fs, path) as file:
        return [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]


def read_row_group(fs: Any, path: str, number: int) -> pa.Table:
    """Read a row group of a parquet file."""
    with _parquet(fs, path) as file:
        return _without_index(file.read_row_group(number))


def parquet_batches(fs: Any, path: str, size: int) -> Iterator[pa.Table]:
    """Yield the rows of a parquet file, at most `size` at a time."""
    # Not by datasets, whose scanner prefetches up to the whole file. A row group at a time, since the reader keeps
    # what it has read until its iteration ends.
    with _parquet(fs, path) as file:
        for number in range(file.num_row_groups):
            for batch in file.iter_batches(size, row_groups=[number]):
                yield _without_index(pa.Table.from_batches([batch]))


@contextmanager
def _parquet(fs: Any, path: str) -> Iterator[pq.ParquetFile]:
    try:
        with fs.open(path, "rb") as file:
            yield pq.ParquetFile(file)
    except _READ_ERRORS as error:
        raise TableError(f"{path}: cannot be read as parquet: {error}") from error


def _without_index(rows: pa.Table) -> pa.Table:
    unnamed = [name for name in rows.column_names if name.startswith("__index_level_")]
    return rows.replace_schema_metadata(None).drop_columns(unnamed)


# csv and jsonl


def _read_csv(file: IO[bytes], separator: str = ",") -> pd.DataFrame:
    # strict: otherwise a stray quote would silently join lines.
    reader = csv.reader(_text(file), delimiter=separator, strict=True)
    records = _records(reader)
    _, names = next(records, (1, []))
    if separator == "," and len(names) == 1 and (found := [mark for mark in _SEPARATORS if mark in names[0]]):
        raise ValueError(f"its fields are separated by {_SEPARATORS[found[0]]}: save it with commas between them.")
    names = [name or f"Unnamed: {place}" for place, name in enumerate(names)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"its header names the column '{twice[0]}' twice.")
    return _frame(records, names)


def _records(reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of a csv, header first, and the line where each starts, skipping empty lines."""
    line, width = 1, 0
    try:
        for row in reader:
            width = width or len(row)  # of the header
            if row and len(row) != width:
                why = "is the row truncated?" if len(row) < width else "a text with the separator needs double quotes."
                raise ValueError(f"line {line} has {len(row)} fields, the header {width}: {why}")
            if row:
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"the double quotes of the row in line {line} do not match ({error}, line {reader.line_num}). Put a text "
            "that contains a quote into double quotes and double its own quotes."
        ) from error


def _objects(lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} is not JSON ({error.msg}); each line is one object.") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is not a JSON object; each line is one.")
        yield number, row


def _frame(rows: Iterator[tuple[int, Any]], names: list[str] | None = None) -> pd.DataFrame:
    """Build a frame from (line, row) pairs, where a row is a list of the values of `names`, or a dict."""
    blocks = []
    while block := list(islice(rows, _BLOCK)):
        index = pd.Index([line for line, _ in block], name="line")
        blocks.append(pd.DataFrame([row for _, row in block], index, names, dtype=object if names else None))
    return pd.concat(blocks) if blocks else pd.DataFrame(columns=names)


def _read_trec(file: IO[bytes]) -> pd.DataFrame:
    """Read columns that are separated by whitespace, without a header."""
    rows = pd.read_csv(
        _text(file),
        sep=r"\s+",
        header=None,
        dtype=str,
        quoting=csv.QUOTE_NONE,
        keep_default_na=False,
        skip_blank_lines=False,
    )
    rows = rows.set_axis(pd.RangeIndex(1, len(rows) + 1, name="line"))
    return rows[rows[0] != ""]


def _text(file: IO[bytes]) -> io.TextIOWrapper:
    """Decode a file as UTF-8 without its byte order mark, keeping its line ends."""
    start = file.read(4)
    file.seek(0)
    if other := [what for mark, what in _OTHER_FILES.items() if start.startswith(mark)]:
        raise ValueError(other[0])
    if b"\0" in start:
        raise ValueError(_IS_UTF16)
    return io.TextIOWrapper(file, encoding="utf-8-sig", newline="")


def _not_utf8(fs: Any, path: str) -> str:
    """Describe where a text file that cannot be decoded is not UTF-8, and what it probably is."""
    with fs.open(path, "rb", compression="infer") as file:
        content = file.read()
    if b"\0" in content:
        return _IS_UTF16
    text = content.decode(errors="surrogateescape")
    bad = next(place for place, letter in enumerate(text) if "\udc80" <= letter <= "\udcff")
    # Bytes above 127 come in pairs in GBK; in Latin-1 most are alone.
    runs = re.findall(rb"[\x80-\xff]+", content)
    code = "GB18030" if 2 * sum(len(run) > 1 for run in runs) > len(runs) else "CP1252"
    line = text.count("\n", 0, bad) + 1
    return f"line {line} is not UTF-8 but probably {code}: save it as UTF-8, as by iconv -f {code} -t UTF-8."


_READERS: dict[str, Callable[[IO[bytes]], pd.DataFrame]] = {
    ".parquet": lambda file: with_index(pd.read_parquet(file)),
    # Types are left to the schema: "007" and "NA" are ids and texts like any other.
    ".jsonl": lambda file: _frame(_objects(_text(file))),
    ".csv": _read_csv,
    ".tsv": lambda file: _read_csv(file, "\t"),
    ".trec": _read_trec,
}
# Formats of a table. A .tsv is read in BEIR folders only; elsewhere it is a TREC file.
FORMATS = (".parquet", ".jsonl", ".csv")


# BEIR folders: corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv, optionally gzipped


def is_beir(source: Any) -> bool:
    """Return True if the source is the path of a BEIR folder."""
    if not isinstance(source, str | os.PathLike):
        return False
    return Path(source, "qrels").is_dir() or _packed_or_not(Path(source, "corpus.jsonl")) is not None


def beir_files(source: Any) -> list[str]:
    """Return the sorted files of a BEIR folder; none for any other source."""
    folder = Path(source)
    found = [*folder.glob("*.jsonl*"), *folder.glob("qrels/*.tsv*")] if is_beir(source) else []
    return sorted(map(str, found))


def beir_splits(folder: Path) -> dict[str, Path]:
    """Return the file with the judgments of each split of a BEIR folder."""
    qrels = sorted([*folder.glob("qrels/*.tsv"), *folder.glob("qrels/*.tsv.gz")])
    return {path.name.split(".tsv")[0]: path for path in qrels}


def read_beir(folder: Path, table: str, split: str | None = None) -> tuple[pd.DataFrame, str]:
    """Read a table of a BEIR folder.

    Args:
        folder: Path of the folder.
        table: judgments, corpus or queries.
        split: Split of the judgments; None reads all.

    Returns:
        The unchecked rows, for judgments with texts and a column `split`, and the file to name in errors.

    Raises:
        FileNotFoundError: If a file is missing.
        TableError: If there is no such table or split, a file is malformed, or a query or document has no text.
    """
    if table == "judgments":
        return _beir_judgments(folder, split)
    if table not in ("corpus", "queries"):
        raise TableError(
            f"{folder}: a BEIR folder has judgments, corpus and queries, no {table} table. To score a TREC run "
            f"over it: disranker score --pairs RUN --queries {folder} --corpus {folder}."
        )
    path = _packed_or_not(folder / f"{table}.jsonl")
    if path is None:
        raise FileNotFoundError(f"{folder / table}.jsonl: no such file.")
    rows = read_file(LocalFileSystem(), str(path))
    if table == "corpus" and "title" not in rows.columns:
        rows["title"] = ""
    return _renamed(rows, _BEIR_CORPUS if table == "corpus" else _BEIR_QUERIES, path), str(path)


def _beir_judgments(folder: Path, split: str | None) -> tuple[pd.DataFrame, str]:
    paths = beir_splits(folder)
    if not paths or (split and split not in paths):
        raise TableError(
            f"{folder}: there are no judgments of split '{split}'; there are: {', '.join(paths) or 'none'}. "
            "Name one: --split to evaluate, --eval_split to train."
        )
    chosen = {split: paths[split]} if split else paths
    parts = [
        _renamed(read_file(LocalFileSystem(), str(path), ".tsv"), _BEIR_QRELS, path).assign(split=name)
        for name, path in chosen.items()
    ]
    rows = pd.concat(parts, ignore_index=not split)
    rows = rows.assign(label=grades_from_zero(rows["label"]))
    name = str(chosen[split] if split else folder / "qrels")
    tables = {table: read_beir(folder, table) for table in ("queries", "corpus")}
    queries, corpus = (validate(frame, table, file) for table, (frame, file) in tables.items())
    return join_texts(join_queries(rows, queries, name), corpus, name), name


def _renamed(rows: pd.DataFrame, names: Mapping[str, str], path: Path) -> pd.DataFrame:
    """Rename BEIR's columns, dropping other columns whose names have a meaning in our tables."""
    if missing := [name for name in names if name not in rows.columns]:
        raise TableError(f"{path}: the rows lack {', '.join(missing)}; they have: {', '.join(rows.columns)}.")
    return rows.drop(columns=(KNOWN_COLUMNS - set(names)) & set(rows.columns)).rename(columns=names)


def _packed_or_not(path: Path) -> Path | None:
    """Return the file or its gzipped form; None if neither exists."""
    return next((file for file in (path, path.with_name(f"{path.name}.gz")) if file.is_file()), None)
