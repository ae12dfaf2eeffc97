"""Training groups: one row per query with all its documents, in memory or streamed, whole or sampled."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from datasets import Dataset, IterableDataset

from hf_disranker.data.files import parquet_batches
from hf_disranker.data.schema import TableError, with_index
from hf_disranker.data.tables import (
    Columns,
    Source,
    arrow_column,
    check_rows,
    groups_table,
    is_hub_id,
    load_splits,
    locate,
    parquet_files,
    read_rows,
    read_table,
    source_name,
    with_columns,
    with_split,
)

SAMPLINGS = ("all", "top", "stratified")
_LISTS = ("doc_ids", "titles", "summaries", "labels", "teacher_scores")
# Rows of a stream that are checked at a time.
_CHUNK = 10_000
_REMEMBERED = 100_000


def load_groups(
    source: Source | Sequence[Source],
    split: str | None = None,
    corpus: Source | None = None,
    streaming: bool = False,
    columns: Columns | None = None,
) -> Dataset | IterableDataset:
    """Load a judgments or scores table as one row per query with all its documents.

    Args:
        source: As in `read_table`. Several scores tables over the same pairs are averaged without standardisation:
            a teacher with a wider scale counts for more.
        split: As in `read_table`.
        corpus: As in `read_table`.
        streaming: If True, read lazily, for tables that do not fit into memory: a Hub data set id, or a path or URL of
            parquet files, with texts and with the rows of a query next to each other.
        columns: As in `read_table`.

    Returns:
        Rows {query_id, query, doc_ids, titles, summaries, labels?, teacher_scores?} in order of first appearance. The
        last five are lists of equal length in the order of the table.

    Raises:
        FileNotFoundError, TableError: As in `read_table`.
        ValueError: If `streaming` is combined with a corpus or with a table in memory.
    """
    if streaming:
        return _streamed(source, split, corpus, columns)
    if isinstance(source, list | tuple):
        return group_rows(_average(source, split, corpus, columns))
    frame, name = read_rows(source, "judgments", split, columns)
    groups = group_rows(check_rows(frame, name, groups_table(frame), split, corpus, columns=columns))
    groups.info.dataset_name = source_name(source)
    return groups


def _streamed(source: Any, split: str | None, corpus: Source | None, columns: Columns | None) -> IterableDataset:
    if corpus is not None or not isinstance(source, str | os.PathLike):
        raise ValueError("Streaming needs the path or id of a table with texts, and no corpus.")
    name = os.fspath(source)
    if not is_hub_id(name) and not parquet_files(name):
        fs, path = locate(name)
        if not fs.exists(path):
            raise FileNotFoundError(f"{name}: no such file or folder.")
        raise TableError(f"{name}: only parquet can be streamed.")
    options = {"source": name, "split": split, "columns": columns}
    return IterableDataset.from_generator(_stream_groups, gen_kwargs=options)


def _average(
    sources: Sequence[Source], split: str | None, corpus: Source | None, columns: Columns | None
) -> pd.DataFrame:
    tables = [read_table(source, "scores", split, corpus, columns=columns) for source in sources]
    for source, table in zip(sources, tables, strict=True):
        if len(table) != len(tables[0]) or mean_scores([tables[0], table]).isna().any():
            raise TableError(
                f"{source_name(source)} scores other pairs than {source_name(sources[0])}: averaging needs the same."
            )
    return tables[0].assign(teacher_score=mean_scores(tables).to_numpy(np.float32))


def mean_scores(tables: Sequence[pd.DataFrame], scales: Sequence[Sequence[float]] | None = None) -> pd.Series:
    """Average the scores of several teachers, matched by query_id and doc_id.

    Args:
        tables: A table per teacher with query_id, doc_id and teacher_score, in any order.
        scales: Mean and standard deviation of each teacher's scores, for averaging standardised scores so that no
            teacher outweighs the others by its scale; None averages the scores as they are.

    Returns:
        Mean scores of the pairs of the first table in their order, float64; NaN for a pair that another table lacks.
    """
    columns = [table.set_index(["query_id", "doc_id"])["teacher_score"].astype(np.float64) for table in tables]
    if scales is not None:
        columns = [(column - mean) / std for column, (mean, std) in zip(columns, scales, strict=True)]
    aligned = [column.reindex(columns[0].index) for column in columns]
    return pd.concat(aligned, axis=1).mean(axis=1, skipna=False)


def _stream_groups(source: str, split: str | None, columns: Columns | None) -> Iterator[dict[str, Any]]:
    """Yield the rows of `load_groups`, checking a few thousand table rows at a time."""
    seen: set[str] = set()
    rest: list[pd.DataFrame] = []
    for chunk in _stream_rows(source, split, columns):
        frame = pd.concat([*rest, chunk])
        frame = check_rows(frame, source, groups_table(frame), None, None).set_index(frame.index)
        last = frame["query_id"] == frame["query_id"].iloc[-1]  # may continue in the next chunk
        yield from _group_adjacent(frame[~last], seen, source)
        rest = [frame[last]]
    yield from _group_adjacent(pd.concat(rest), seen, source)


def _group_adjacent(frame: pd.DataFrame, seen: set[str], source: str) -> Iterator[dict[str, Any]]:
    """Yield the groups of some rows, whose queries are added to `seen`; TableError if a query was seen before."""
    starts = frame["query_id"][frame["query_id"] != frame["query_id"].shift()]
    scattered = starts[starts.duplicated() | starts.isin(seen)]
    if len(scattered):
        raise TableError(
            f"{source}: the rows of query '{scattered.iloc[0]}' are not adjacent: sort by query_id to stream it."
        )
    if len(seen) < _REMEMBERED:  # an unsorted table shows early, and memory stays flat
        seen.update(starts)
    yield from group_rows(frame)


def _stream_rows(source: str, split: str | None, columns: Columns | None) -> Iterator[pd.DataFrame]:
    """Yield the rows of a split, a few thousand at a time."""
    found, start = False, 0
    for frame in _chunks(source):
        frame = with_index(frame).set_axis(range(start, start + len(frame)))  # row numbers in errors
        frame = with_columns(frame, columns, groups_table(frame, columns), source, quiet=start > 0)
        start += len(frame)
        if split:
            frame = frame[frame["split"] == split] if "split" in frame else frame[:0]
        if len(frame):
            found = True
            yield frame
    if not found:
        raise TableError(f"{source}: no row has split '{split}'." if split else f"{source}: the table has no rows.")


def _chunks(source: str) -> Iterator[pd.DataFrame]:
    """Yield the rows of all splits, a few thousand at a time."""
    if is_hub_id(source):
        for split, part in load_splits(source, streaming=True).items():
            yield from (with_split(rows.to_pandas(), split) for rows in part.with_format("arrow").iter(_CHUNK))
        return
    fs, _ = locate(source)
    for path in parquet_files(source):
        yield from (rows.to_pandas() for rows in parquet_batches(fs, path, _CHUNK))


def group_rows(frame: pd.DataFrame) -> Dataset:
    """Group validated rows by query; see `load_groups`."""
    codes, _ = pd.factorize(frame["query_id"])
    frame = frame.iloc[np.argsort(codes, kind="stable")]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(codes))])
    first = frame.iloc[offsets[:-1]]
    columns = {name: arrow_column(first[name]) for name in ("query_id", "query")}
    for name, column in zip(_LISTS, ("doc_id", "title", "summary", "label", "teacher_score"), strict=True):
        if column in frame.columns:
            columns[name] = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), arrow_column(frame[column]))
    return Dataset(pa.table(columns))


def sample_documents(
    groups: Dataset | IterableDataset, count: int, kind: str = "stratified", seed: int = 0
) -> Dataset | IterableDataset:
    """Sample `count` documents of each query by their teacher scores; shorter queries keep all.

    The sample of a query depends only on the seed and its id, so it is the same in every epoch, process and resumed
    run. "all" keeps everything, "top" the best-scored documents, "stratified" one random document of each of `count`
    equal parts of the score ranking. Random negatives (`bm25.with_random_documents`) are the low end of the scores.

    Source: Stratified as in Jang et al. 2026, arXiv 2604.04734, who found it better than the top.
    """
    if kind not in SAMPLINGS or (kind != "all" and count < 2):
        raise ValueError(f"Sampling is one of {', '.join(SAMPLINGS)}, of at least 2 documents; got {count}, {kind!r}.")
    if kind == "all":
        return groups
    return groups.map(_sample, fn_kwargs={"count": count, "kind": kind, "seed": seed})


def _sample(group: dict[str, Any], count: int, kind: str, seed: int) -> dict[str, Any]:
    scores = np.asarray(group["teacher_scores"])
    if len(scores) <= count:
        return group
    order = np.argsort(-scores, kind="stable")
    if kind == "top":
        places = order[:count]
    else:
        rng = np.random.default_rng([seed, zlib.crc32(group["query_id"].encode())])
        places = np.array([rng.choice(part) for part in np.array_split(order, count)])
    kept = np.sort(places)
    return {
        name: [group[name][place] for place in kept] for name in _LISTS if name in group and group[name] is not None
    }
