"""Candidates: a table of pairs of any length, read in slices."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from hf_disranker.data.files import read_row_group, row_group_sizes
from hf_disranker.data.schema import TABLES, TableError, check_names, rows_of, validate
from hf_disranker.data.tables import (
    Columns,
    Source,
    arrow_column,
    has_texts,
    locate,
    parquet_files,
    read_texts,
    source_name,
    with_arrow_columns,
)
from hf_disranker.data.trec import read_pairs

TEXT_COLUMNS = ("query", "title", "summary")
_TABLE = "candidates"
# Rows checked at a time.
_CHUNK = 100_000


class Candidates:
    """Pairs to score; sources as in `read_table`, or a TREC run with a table of its queries.

    Parquet stays on disk, except for one row group; other sources, and the corpus for rows with ids only, are loaded.
    `columns` as in `read_table`.

    Raises:
        FileNotFoundError, TableError: As in `read_table`, for errors visible before the rows are read.
    """

    def __init__(
        self,
        source: Source,
        corpus: Source | None = None,
        columns: Columns | None = None,
        queries: Source | None = None,
    ) -> None:
        self.name = source_name(source)
        self._parts = list(_parts(source, columns, queries))
        self._starts = np.cumsum([0, *(rows for rows, _ in self._parts)])
        self._held: tuple[int, pa.Table] | None = None
        self._digest = ""
        if not len(self):
            raise TableError(f"{self.name}: the candidates table has no rows.")
        self._texts: pa.Table | None = None
        check_names(self._part(0).column_names, _TABLE, self.name)
        if not has_texts(self._part(0).column_names):
            texts = read_texts(corpus, self.name, columns)
            self._texts, self._corpus_ids = _arrow(texts), pd.Index(texts["doc_id"])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> pa.Table:
        """Read and validate the rows from `start` to before `stop`, with texts; other columns are unchanged.

        Raises:
            TableError: If the rows break the schema or cannot be read.
        """
        rows = self._rows(start, stop)
        if self._texts is None:
            return rows
        texts = self._texts.take(pa.array(rows_of(rows["doc_id"].to_pandas(), self._corpus_ids, self.name)))
        rows = rows.drop_columns([name for name in ("title", "summary") if name in rows.column_names])
        return rows.append_column("title", texts["title"]).append_column("summary", texts["summary"])

    def check(self) -> str:
        """Read and validate all rows before any of them is scored.

        Duplicate pairs are found over all rows, with 8 bytes of memory per row; a query_id with two query texts only
        within 100,000 rows.

        Returns:
            SHA-256 of all ids and texts, corpus included, in their order, however they are divided into files.

        Raises:
            TableError: As in `read`, or if a (query_id, doc_id) occurs twice.
        """
        if self._digest:
            return self._digest
        keys = np.empty(len(self), np.uint64)
        digests: dict[str, Any] = {}
        for start in range(0, len(self), _CHUNK):
            rows = self._rows(start, start + _CHUNK)
            _update(digests, rows)
            ids = rows.select(["query_id", "doc_id"]).to_pandas()
            keys[start : start + _CHUNK] = pd.util.hash_pandas_object(ids, index=False)
        _refuse_repeated(keys, f"{self.name}: {_TABLE} table")
        if self._texts is not None:
            _update(digests, self._texts.rename_columns({name: f"corpus {name}" for name in self._texts.column_names}))
        whole = "".join(f"{name} {digest.hexdigest()}\n" for name, digest in sorted(digests.items()))
        self._digest = hashlib.sha256(whole.encode()).hexdigest()
        return self._digest

    def _rows(self, start: int, stop: int) -> pa.Table:
        pieces = []
        for number in range(int(np.searchsorted(self._starts, start, "right")) - 1, len(self._parts)):
            offset = int(self._starts[number])
            if offset >= stop:
                break
            pieces.append(self._part(number).slice(max(0, start - offset), stop - max(offset, start)))
        return self._validated(pa.concat_tables(pieces, promote_options="permissive"), start)

    def _part(self, number: int) -> pa.Table:
        if self._held is None or self._held[0] != number:
            self._held = (number, self._parts[number][1]())
        return self._held[1]

    def _validated(self, rows: pa.Table, start: int) -> pa.Table:
        schema = TABLES[_TABLE]
        known = [name for name in schema.required + schema.optional if name in rows.column_names]
        frame = rows.select(known).to_pandas().set_axis(range(start, start + len(rows)))  # row numbers in errors
        frame = validate(frame, _TABLE, self.name)
        if self._texts is not None:
            rows_of(frame["doc_id"], self._corpus_ids, self.name)
        for name, column in zip(known, _arrow(frame).columns, strict=True):
            rows = rows.set_column(rows.column_names.index(name), name, column)
        return rows


def _parts(
    source: Source, columns: Columns | None, queries: Source | None
) -> Iterator[tuple[int, Callable[[], pa.Table]]]:
    """Yield the length and reader of each row group; a source other than parquet is one part."""
    files = parquet_files(source)
    if not files:
        rows = pa.Table.from_pandas(read_pairs(source, queries, columns), preserve_index=False)
        yield len(rows), lambda: rows
    for path in files:
        fs, _ = locate(os.fspath(source))  # type: ignore[arg-type]
        for number, size in enumerate(row_group_sizes(fs, path)):
            yield size, partial(_read_part, fs, path, number, columns)


def _read_part(fs: Any, path: str, number: int, columns: Columns | None) -> pa.Table:
    return with_arrow_columns(read_row_group(fs, path, number), columns, _TABLE, path)


def _arrow(frame: pd.DataFrame) -> pa.Table:
    return pa.table({name: arrow_column(frame[name]) for name in frame.columns})


def _update(digests: dict[str, Any], rows: pa.Table) -> None:
    """Update the digest of each id and text column with lengths and bytes."""
    for name, column in zip(rows.column_names, rows.columns, strict=True):
        if name.split(" ")[-1] in ("query_id", "doc_id", *TEXT_COLUMNS):
            _, offsets, content = pa.array(column.to_pandas(), pa.large_string()).buffers()
            digest = digests.setdefault(name, hashlib.sha256())
            digest.update(np.diff(np.frombuffer(offsets, np.int64)[: len(column) + 1]).tobytes())
            digest.update(content or b"")


def _refuse_repeated(keys: np.ndarray, where: str) -> None:
    ordered = np.sort(keys)
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(repeated):
        places = ", ".join(map(str, np.flatnonzero(np.isin(keys, repeated))[:3]))
        raise TableError(
            f"{where}: {len(repeated)} row(s) repeat a (query_id, doc_id); first: rows {places}. Keep one of each."
        )
