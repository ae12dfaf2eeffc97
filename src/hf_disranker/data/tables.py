"""Readers of the tables, and grouping by query.

A source is the path of a parquet, jsonl or csv file, of a folder of parquet files (a score store) or of a BEIR folder,
their fsspec URL (`s3://`, `hf://datasets/...`; BEIR folders are local), a Hub data set id, a `datasets.Dataset` or
`DatasetDict`, or a `pandas.DataFrame`. The splits of a `DatasetDict` and of a Hub data set become the column `split`
where there is none.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from fsspec.core import url_to_fs

from hf_disranker.data.beir import is_beir, read_beir
from hf_disranker.data.files import is_table_file, read_file
from hf_disranker.data.schema import TableError, empty_queries, join_texts, unread_weight, validate, with_index

logger = logging.getLogger(__name__)

Source: TypeAlias = str | os.PathLike[str] | Dataset | DatasetDict | pd.DataFrame

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_CHUNK = 10_000
_REMEMBERED = 100_000


def read_table(
    source: Source, table: str, split: str | None = None, corpus: Source | None = None, texts: bool = True
) -> pd.DataFrame:
    """Read one table and check it.

    Args:
        source: see the module's text.
        table: which contract it follows: clicks, judgments, corpus, queries, candidates or scores.
        split: keep only the rows whose `split` column holds this value; None or "" keeps all.
        corpus: where texts come from when the table has ids only.
        texts: whether they are needed; False leaves a table of ids as it is.

    Returns:
        The checked rows, numbered from 0; with texts wherever a corpus was needed.

    Raises:
        FileNotFoundError: there is no such file, folder or data set.
        TableError: the table breaks its contract, or a document is not in the corpus.
    """
    frame, name = _read(source, table, split)
    return _checked(frame, name, table, split, corpus, texts)


def _checked(
    frame: pd.DataFrame, name: str, table: str, split: str | None, corpus: Source | None, texts: bool = True
) -> pd.DataFrame:
    if table == "clicks":
        if unread := unread_weight(frame.columns):
            logger.warning("%s: the column '%s' is not read. If it counts clicks, name it weight.", name, unread)
        if "query" in frame.columns:
            frame = _without_empty_queries(frame, name)
    frame = validate(frame, table, name)
    if "query" in frame.columns:
        _report_line_breaks(frame["query"], name)
    if split:
        frame = _only_split(frame, split, name)
    if texts and table in ("candidates", "scores") and not {"title", "summary"} <= set(frame.columns):
        if corpus is None:
            raise TableError(f"{name}: the rows have no title and summary; name the corpus that holds them.")
        frame = join_texts(frame, read_table(corpus, "corpus"), name)
    if {"title", "summary"} <= set(frame.columns):
        empty = int(((frame["title"].str.strip() == "") & (frame["summary"].str.strip() == "")).sum())
        if empty:
            logger.warning("%s: %d document(s) have neither title nor summary.", name, empty)
    return frame.reset_index(drop=True)


def _report_line_breaks(queries: pd.Series, name: str) -> None:
    """Nobody types a line break into a search box: a stray quote has joined lines of a csv."""
    broken = queries[queries.str.contains("[\r\n]")]
    if len(broken):
        logger.warning(
            "%s: %d quer(ies) hold a line break, as if a stray double quote had joined lines; first: %s %s: %.100r.",
            *(name, len(broken), broken.index.name or "row", broken.index[0], broken.iloc[0]),
        )


def load_groups(
    source: Source | Sequence[Source],
    split: str | None = None,
    corpus: Source | None = None,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """One row per query with all its documents, from a judgments or a scores table.

    Args:
        source: see the module's text; several scores tables over the same pairs give the mean of their teachers'
            scores, as they are: a teacher of wider scale counts for more.
        split: as in `read_table`.
        corpus: as in `read_table`.
        streaming: read as you go, for what does not fit into memory: a Hub data set id or a path or URL of parquet
            files, whose rows hold their texts and stand together by query.

    Returns:
        Rows {query_id, query, doc_ids, titles, summaries, labels?, teacher_scores?} in order of first appearance; the
        last five are lists of equal length in the order of the table.

    Raises:
        FileNotFoundError, TableError: as in `read_table`.
    """
    if streaming:
        if corpus is not None or not isinstance(source, str | os.PathLike):
            raise ValueError("Streaming takes the name of a table that holds its own texts, and no corpus.")
        if not _is_hub_id(os.fspath(source)) and not parquet_files(source):
            fs, path = _located(os.fspath(source))
            raise TableError(f"{source}: only parquet can be streamed.") if fs.exists(path) else _not_found(source)
        return IterableDataset.from_generator(_stream_groups, gen_kwargs={"source": os.fspath(source), "split": split})
    if isinstance(source, list | tuple):
        return group_rows(_mean_scores(source, split, corpus))
    frame, name = _read(source, "judgments", split)
    groups = group_rows(_checked(frame, name, _graded(frame), split, corpus))
    groups.info.dataset_name = source_name(source)
    return groups


def _mean_scores(sources: Sequence[Source], split: str | None, corpus: Source | None) -> pd.DataFrame:
    """The first table with the mean of all tables' scores, matched by query and document."""
    key = ["query_id", "doc_id"]
    first, *others = (read_table(source, "scores", split, corpus) for source in sources)
    total = first.set_index(key)["teacher_score"].astype(np.float64)
    for source, other in zip(sources[1:], others, strict=True):
        scores = other.set_index(key)["teacher_score"].reindex(total.index)
        if scores.isna().any() or len(other) != len(first):
            raise TableError(
                f"{source_name(source)} scores other pairs than {source_name(sources[0])}: averaging needs the same."
            )
        total = total + scores
    return first.assign(teacher_score=(total / len(sources)).to_numpy(np.float32))


def _graded(frame: pd.DataFrame) -> str:
    return "scores" if "teacher_score" in frame.columns else "judgments"


def _stream_groups(source: str, split: str | None) -> Iterator[dict[str, Any]]:
    """Rows of `load_groups`, checked some thousand table rows at a time."""
    seen: set[str] = set()
    rest: list[pd.DataFrame] = []
    for chunk in chain(_stream_frames(source, split), [None]):
        if chunk is not None:
            frame = pd.concat([*rest, chunk])
            frame = _checked(frame, source, _graded(frame), None, None).set_index(frame.index)
            last = frame["query_id"] == frame["query_id"].iloc[-1]  # may go on in the next chunk
            frame, rest = frame[~last], [frame[last]]
        else:
            frame, rest = pd.concat(rest), []
        starts = frame["query_id"][frame["query_id"] != frame["query_id"].shift()]
        apart = starts[starts.duplicated() | starts.isin(seen)]
        if len(apart):
            raise TableError(
                f"{source}: the rows of query '{apart.iloc[0]}' stand apart: sort by query_id to stream it."
            )
        if len(seen) < _REMEMBERED:  # a table that is not sorted shows it soon, and memory stays flat
            seen.update(starts)
        yield from group_rows(frame)


def _stream_frames(source: str, split: str | None) -> Iterator[pd.DataFrame]:
    """The rows of a split, some thousand at a time."""
    found, start = False, 0
    for frame in _stream_hub(source) if _is_hub_id(source) else _stream_parquet(source):
        frame = with_index(frame).set_axis(range(start, start + len(frame)))  # for places in errors
        start += len(frame)
        chosen = frame if not split else frame[frame["split"] == split] if "split" in frame else frame[:0]
        found |= len(chosen) > 0
        if len(chosen):
            yield chosen
    if not found:
        raise TableError(f"{source}: no row has split '{split}'.")


def _stream_hub(source: str) -> Iterator[pd.DataFrame]:
    for split, part in _load(source, streaming=True).items():
        for table in part.with_format("arrow").iter(_CHUNK):
            frame = table.to_pandas()
            yield frame if "split" in frame.columns else frame.assign(split=str(split))


def _stream_parquet(source: str) -> Iterator[pd.DataFrame]:
    fs, _ = url_to_fs(source)
    for name in parquet_files(source):
        with fs.open(name, "rb") as file:
            # Not through datasets, whose scanner reads ahead of a slow reader, up to the whole file; and a row group
            # at a time, because the reader keeps what it has read until its iteration ends.
            table = pq.ParquetFile(file)
            for number in range(table.num_row_groups):
                for batch in table.iter_batches(_CHUNK, row_groups=[number]):
                    yield batch.to_pandas()


def group_rows(frame: pd.DataFrame) -> Dataset:
    """Turn checked rows into one row per query; see `load_groups`."""
    codes, _ = pd.factorize(frame["query_id"])
    frame = frame.iloc[np.argsort(codes, kind="stable")]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(codes))])
    first = frame.iloc[offsets[:-1]]
    columns = {name: arrow_column(first[name]) for name in ("query_id", "query")}
    lists = {"doc_ids": "doc_id", "titles": "title", "summaries": "summary"}
    lists |= {"labels": "label", "teacher_scores": "teacher_score"}
    for name, column in lists.items():
        if column in frame.columns:
            columns[name] = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), arrow_column(frame[column]))
    return Dataset(pa.table(columns))


def arrow_column(values: pd.Series) -> pa.Array:
    """A checked column of any of the tables in its arrow type, which goes by its name."""
    # large_string: one column of a big table holds more than 2 GiB of text.
    kinds = {"label": pa.int64(), "teacher_score": pa.float32()}
    return pa.array(values, kinds.get(str(values.name), pa.large_string()))


def pair_texts(rows: pd.DataFrame) -> list[tuple[str, dict[str, str]]]:
    """The rows of a table with query, title and summary as `Ranker.predict` takes them."""
    columns = zip(rows["query"], rows["title"], rows["summary"], strict=True)
    return [(query, {"title": title, "summary": summary}) for query, title, summary in columns]


def write_table(frame: pd.DataFrame, path: str) -> None:
    """Write rows as parquet to a path or fsspec URL, making its folder."""
    fs, inner = url_to_fs(path)
    fs.makedirs(fs._parent(inner), exist_ok=True)
    with fs.open(inner, "wb") as file:
        frame.to_parquet(file, index=False)


def _without_empty_queries(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """A log holds clicks on pages that were reached without a query; they are left out and counted."""
    empty = empty_queries(frame["query"])
    if empty.any():
        logger.warning("%s: %d click(s) have no query and are left out.", name, int(empty.sum()))
    return frame[~empty]


def _is_hub_id(source: str) -> bool:
    return bool(_HUB_ID.fullmatch(source)) and not os.path.exists(source) and not is_table_file(source)


def column_names(source: Source) -> list[str]:
    """The columns of a table as they stand; of parquet files without reading the rows."""
    if files := parquet_files(source):
        with _located(os.fspath(source))[0].open(files[0], "rb") as file:  # type: ignore[arg-type]
            return pq.read_schema(file).names
    return list(_read(source, "judgments")[0].columns)


def usual_split(source: Source, named: str | None, usual: str) -> str | None:
    """The split to read where none need be named.

    Args:
        source: see the module's text.
        named: what the user chose; "" is all rows.
        usual: the split of a table with a column `split` for which none was chosen; a table without one is read whole.
    """
    return named if named is not None else usual if "split" in column_names(source) else None


def source_name(source: Source) -> str:
    """What errors call a source: its path or id, or what kind of table in memory it is."""
    return os.fspath(source) if isinstance(source, str | os.PathLike) else f"<{type(source).__name__}>"


def _read(source: Source, table: str, split: str | None = None) -> tuple[pd.DataFrame, str]:
    """The rows as they are and what errors call them; `table` and `split` choose among the files of a BEIR folder."""
    if isinstance(source, Dataset):
        return source.to_pandas(), source_name(source)
    if isinstance(source, DatasetDict):
        return _with_splits(source), source_name(source)
    if isinstance(source, pd.DataFrame):
        return with_index(source), source_name(source)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"A table is a path, a Hub id, a Dataset, a DatasetDict or a DataFrame, not {type(source)}.")
    if is_beir(source):
        return read_beir(Path(source), table, split)
    source = os.fspath(source)
    fs, path = _located(source)
    if fs.isfile(path):
        return read_file(fs, path), source
    if fs.isdir(path):
        return pd.concat([read_file(fs, file) for file in parquet_files(source)], ignore_index=True), source
    if _is_hub_id(source):
        return _with_splits(_load(source)), source
    raise _not_found(source)


def _not_found(source: str | os.PathLike[str]) -> FileNotFoundError:
    return FileNotFoundError(f"{os.fspath(source)}: no such file or folder.")


def parquet_files(source: Source) -> list[str]:
    """The parquet files that a path or URL names, by name, for its own file system; none for any other source.

    Raises:
        FileNotFoundError: the folder holds no parquet file.
    """
    if not isinstance(source, str | os.PathLike):
        return []
    fs, path = _located(os.fspath(source))
    if not fs.isdir(path):
        return [path] if path.lower().endswith(".parquet") and fs.isfile(path) else []
    entries = fs.ls(path, detail=True)
    found = sorted(entry["name"] for entry in entries if entry["type"] == "file")
    files = [file for file in found if file.lower().endswith(".parquet")]
    if not files:
        others = ", ".join(file.rsplit("/", 1)[-1] for file in found[:5]) or "no file at all"
        raise FileNotFoundError(f"{os.fspath(source)}: the folder holds no parquet file; it holds: {others}.")
    return files


def _located(source: str) -> tuple[Any, str]:
    try:
        return url_to_fs(source)
    except (ValueError, ImportError) as error:
        raise FileNotFoundError(f"{source}: {error}") from error


def _load(name: str, **options: Any) -> Mapping[str, Any]:
    """The splits of a Hub data set."""
    try:
        splits: Mapping[str, Any] = load_dataset(name, **options)
    except Exception as error:  # of many kinds; the user first wants to know about the path
        raise FileNotFoundError(
            f"{name}: no such file or folder, and no such data set could be read from the Hub ({error})"
        ) from error
    return splits


def _with_splits(splits: Mapping[str, Dataset]) -> pd.DataFrame:
    """All splits; without a column `split`, it is made of their names."""
    return pd.concat(
        [
            part.to_pandas() if "split" in part.column_names else part.to_pandas().assign(split=str(split))
            for split, part in splits.items()
        ],
        ignore_index=True,
    )


def _only_split(frame: pd.DataFrame, split: str, name: str) -> pd.DataFrame:
    if "split" not in frame.columns:
        raise TableError(f"{name}: there is no column 'split' to take '{split}' from; name no split to use all rows.")
    chosen = frame[frame["split"] == split].reset_index(drop=True)
    if chosen.empty:
        present = ", ".join(sorted(frame["split"].unique()))
        raise TableError(f"{name}: no row has split '{split}'; there are: {present}.")
    return chosen
