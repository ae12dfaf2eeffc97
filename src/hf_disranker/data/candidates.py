"""Candidates: a table of pairs that is read some rows at a time, however long it is."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from hf_disranker.data.schema import TABLES, TableError, check_names, refuse_unknown_documents, validate
from hf_disranker.data.tables import Source, arrow_column, parquet_files, read_table, source_name

TEXT_COLUMNS = ("query", "title", "summary")
# Rows that are checked at a time.
_CHUNK = 100_000


class Candidates:
    """Pairs to score. Parquet stays on disk: memory holds one row group, and the corpus where one is named.

    Args:
        source: as in `read_table`, or a list of such. What is not parquet is read whole.
        corpus: where texts come from when the rows have ids only; held in memory.
        table: the contract of the rows: candidates, or scores.

    Raises:
        FileNotFoundError, TableError: as in `read_table`, as far as it shows before the rows are read.
    """

    def __init__(self, source: Source | list[str], corpus: Source | None = None, table: str = "candidates") -> None:
        sources = source if isinstance(source, list) else [source]
        self.name = ", ".join(source_name(one) for one in sources)
        self._contract = table
        self._parts = [part for one in sources for part in _parts(one, table)]
        self._starts = np.cumsum([0, *(rows for rows, _ in self._parts)])
        self._held: tuple[int, pa.Table] | None = None
        self._digest = ""
        if not len(self):
            raise TableError(f"{self.name}: the {table} table has no rows.")
        self._texts: pa.Table | None = None
        check_names(self._part(0).column_names, table, self.name)
        if not {"title", "summary"} <= set(self._part(0).column_names):
            if corpus is None:
                raise TableError(f"{self.name}: the rows have no title and summary; name the corpus that holds them.")
            texts = read_table(corpus, "corpus")[["doc_id", "title", "summary"]]
            self._texts, self._places = _arrow(texts), pd.Index(texts["doc_id"])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> pa.Table:
        """Some rows, checked, with texts; further columns as they are.

        Args:
            start: the first row, from 0.
            stop: the row behind the last.

        Raises:
            TableError: the rows break the contract, or cannot be read.
        """
        rows = self._rows(start, stop)
        if self._texts is None:
            return rows
        places = self._places.get_indexer(rows["doc_id"].to_pandas())
        texts = self._texts.take(pa.array(places))
        rows = rows.drop_columns([name for name in ("title", "summary") if name in rows.column_names])
        return rows.append_column("title", texts["title"]).append_column("summary", texts["summary"])

    def check(self) -> str:
        """Read every row once, so that what is wrong shows before money is spent.

        Pairs that occur twice are found over all rows, by 8 bytes for each; a query_id with two query texts only where
        its rows stand within 100,000 of one another.

        Returns:
            A digest of all ids and texts, corpus included, in their order: the same for the same rows in other files.

        Raises:
            TableError: as in `read`, or a (query_id, doc_id) occurs twice.
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
        _refuse_repeated(keys, f"{self.name}: {self._contract} table")
        if self._texts is not None:
            _update(digests, self._texts.rename_columns({name: f"corpus {name}" for name in self._texts.column_names}))
        whole = "".join(f"{name} {digest.hexdigest()}\n" for name, digest in sorted(digests.items()))
        self._digest = hashlib.sha256(whole.encode()).hexdigest()
        return self._digest

    def _rows(self, start: int, stop: int) -> pa.Table:
        pieces = []
        for number in range(int(np.searchsorted(self._starts, start, "right")) - 1, len(self._parts)):
            begin = int(self._starts[number])
            if begin >= stop:
                break
            pieces.append(self._part(number).slice(max(0, start - begin), stop - max(begin, start)))
        return self._validated(pa.concat_tables(pieces, promote_options="permissive"), start)

    def _part(self, number: int) -> pa.Table:
        if self._held is None or self._held[0] != number:
            self._held = (number, self._parts[number][1]())
        return self._held[1]

    def _validated(self, rows: pa.Table, start: int) -> pa.Table:
        contract = TABLES[self._contract]
        known = [name for name in contract.required + contract.optional if name in rows.column_names]
        frame = rows.select(known).to_pandas().set_axis(range(start, start + len(rows)))  # for places in errors
        frame = validate(frame, self._contract, self.name)
        if self._texts is not None:
            refuse_unknown_documents(frame["doc_id"], self._places, self.name)
        for name, column in zip(known, _arrow(frame).columns, strict=True):
            rows = rows.set_column(rows.column_names.index(name), name, column)
        return rows


def _parts(source: Source, table: str) -> Iterator[tuple[int, Callable[[], pa.Table]]]:
    """For each row group its length and how to read it; a source that is not parquet is one part."""
    files = parquet_files(source)
    if not files:
        rows = pa.Table.from_pandas(read_table(source, table, texts=False), preserve_index=False)
        yield len(rows), lambda: rows
    for path in files:
        fs = url_to_fs(os.fspath(source))[0]  # type: ignore[arg-type]
        footer = _read(fs, path, lambda file: file.metadata)
        for group in range(footer.num_row_groups):
            yield footer.row_group(group).num_rows, partial(_read, fs, path, partial(_read_group, group=group))


def _read_group(file: pq.ParquetFile, group: int) -> pa.Table:
    rows = file.read_row_group(group).replace_schema_metadata(None)
    # A named index is a column like any other; one without a name is pandas' own business.
    return rows.drop_columns([name for name in rows.column_names if name.startswith("__index_level_")])


def _read(fs: Any, path: str, what: Callable[[pq.ParquetFile], Any]) -> Any:
    try:
        with fs.open(path, "rb") as file:
            return what(pq.ParquetFile(file))
    except (ValueError, OSError, pa.ArrowException) as error:
        raise TableError(f"{path}: cannot be read as parquet: {error}") from error


def _arrow(frame: pd.DataFrame) -> pa.Table:
    return pa.table({name: arrow_column(frame[name]) for name in frame.columns})


def _update(digests: dict[str, Any], rows: pa.Table) -> None:
    """Go on digesting ids and texts, by column: their lengths and their bytes."""
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
