"""Files of rows: csv, jsonl and parquet, the first two also packed by gzip.

Rows of a text file have their lines as index, counted from 1 as an editor does, so that errors can name them.
"""

from __future__ import annotations

import csv
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import IO, Any

import pandas as pd
import pyarrow as pa

from hf_disranker.data.schema import TableError, with_index

csv.field_size_limit(2**31 - 1)  # a text may be longer than the module's 128 KiB
# Rows that are held as Python objects at a time.
_BLOCK = 50_000
_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def read_file(fs: Any, path: str, kind: str | None = None) -> pd.DataFrame:
    """Read a file as it is: the types of csv are str, those of jsonl and parquet are the file's.

    Args:
        fs: the fsspec file system that holds it.
        path: its path there.
        kind: ".csv", ".jsonl", ".parquet" or ".tsv"; None goes by the path's ending.

    Raises:
        TableError: it is of no such kind, empty, or broken; the message says what to do.
    """
    if kind is None and not is_table_file(path):
        raise TableError(f"{path}: a table is one of {', '.join(FORMATS)}, or a folder of parquet files.")
    kind = kind or ending(path)
    if fs.size(path) == 0:
        raise TableError(f"{path}: the file is empty.")
    try:
        with _opened(fs, path) as file:
            return _READERS[kind](file)
    except UnicodeDecodeError:
        with _opened(fs, path) as file:
            raise TableError(f"{path}: {_not_utf8(file)}") from None
    except (ValueError, OSError, EOFError, zlib.error, pa.ArrowException) as error:
        raise TableError(f"{path}: cannot be read as {kind[1:]}: {error}") from error


def is_table_file(path: str) -> bool:
    """Whether the name ends like one of the formats."""
    return ending(path) in FORMATS


def ending(path: str) -> str:
    """The ending in lower case, without that of gzip."""
    return "." + path.lower().removesuffix(".gz").rsplit(".", 1)[-1]


def _opened(fs: Any, path: str) -> IO[bytes]:
    file: IO[bytes] = fs.open(path, "rb", compression="gzip" if path.lower().endswith(".gz") else None)
    return file


def _read_csv(file: IO[bytes], separator: str = ",") -> pd.DataFrame:
    # strict: a stray quote would join lines in silence.
    reader = csv.reader(_text(file), delimiter=separator, strict=True)
    _, names = next(_records(reader), (1, []))
    if separator == "," and len(names) == 1 and (found := [sign for sign in _SEPARATORS if sign in names[0]]):
        raise ValueError(f"its fields are separated by {_SEPARATORS[found[0]]}: save it with commas between them.")
    names = [name or f"Unnamed: {place}" for place, name in enumerate(names)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"its header names the column '{twice[0]}' twice.")
    return _frame(_full_rows(reader, names), names)


def _full_rows(reader: Any, names: list[str]) -> Iterator[tuple[int, list[str]]]:
    for line, row in _records(reader):
        if len(row) != len(names):
            why = (
                "is the row cut short?" if len(row) < len(names) else "a text with the separator needs double quotes."
            )
            raise ValueError(f"line {line} has {len(row)} fields, the header {len(names)}: {why}")
        yield line, row


def _records(reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Rows of a csv with their first lines; empty lines are passed over."""
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(
                f"the double quotes of the row in line {line} do not match ({error}, line {reader.line_num}). Put a "
                "text that holds a quote into double quotes and write its own quotes twice."
            ) from error
        if row:
            yield line, row


def _read_jsonl(file: IO[bytes]) -> pd.DataFrame:
    return _frame(_objects(_text(file)))


def _objects(lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} is no JSON ({error.msg}); each line holds one object.") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is no JSON object; each line holds one.")
        yield number, row


def _frame(rows: Iterator[tuple[int, Any]], names: list[str] | None = None) -> pd.DataFrame:
    """Rows with their lines as one frame; `names` belong to lists, None to dicts."""
    blocks = []
    while block := list(islice(rows, _BLOCK)):
        lines, values = zip(*block, strict=True)
        columns: Any = list(values) if names is None else dict(zip(names, zip(*values, strict=True), strict=True))
        index = pd.Index(lines, name="line")
        blocks.append(pd.DataFrame(columns, index, dtype=None if names is None else object))
    return pd.concat(blocks) if blocks else pd.DataFrame(columns=names)


def _text(file: IO[bytes]) -> io.TextIOWrapper:
    """The file as UTF-8 with its line breaks as they are; a byte order mark is passed over."""
    start = file.read(4)
    file.seek(0)
    if start.startswith(_UTF16) or b"\0" in start:
        raise ValueError("it is UTF-16: save it as UTF-8.")
    return io.TextIOWrapper(file, encoding="utf-8-sig", newline="")


def _not_utf8(file: IO[bytes]) -> str:
    """Where a file is not UTF-8."""
    try:
        file.read().decode()
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        return f"line {line} is not UTF-8 (byte {error.object[error.start]:#04x}): save the file as UTF-8."
    raise AssertionError("it was not UTF-8 a moment ago")


_READERS: dict[str, Callable[[IO[bytes]], pd.DataFrame]] = {
    ".parquet": lambda file: with_index(pd.read_parquet(file)),
    # Types are the schema's business: "007" and "NA" are ids and texts like any other.
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": lambda file: _read_csv(file, "\t"),
}
# What a table may be; a .tsv is for BEIR's qrels, elsewhere the ending of TREC's files.
FORMATS = (".parquet", ".jsonl", ".csv")
