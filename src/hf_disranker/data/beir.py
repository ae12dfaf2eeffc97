"""BEIR folders: corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv, each also packed by gzip."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from fsspec.implementations.local import LocalFileSystem

from hf_disranker.data.files import read_file
from hf_disranker.data.schema import TABLES, TableError, grades_from_zero, join_queries, join_texts, validate

# What BEIR calls our columns.
_CORPUS = {"_id": "doc_id", "title": "title", "text": "summary"}
_QUERIES = {"_id": "query_id", "text": "query"}
_QRELS = {"query-id": "query_id", "corpus-id": "doc_id", "score": "label"}


def is_beir(source: Any) -> bool:
    """Whether a source is the path of a BEIR folder."""
    if not isinstance(source, str | os.PathLike):
        return False
    return Path(source, "qrels").is_dir() or _file(Path(source), "corpus.jsonl") is not None


def read_beir(folder: Path, table: str, split: str | None = None) -> tuple[pd.DataFrame, str]:
    """Read one of the tables of a BEIR folder.

    Args:
        folder: the folder.
        table: judgments, corpus or queries.
        split: which of the judgments; None reads all of them.

    Returns:
        The rows, to be checked; judgments have their texts and a column `split`. And the file, to be named in errors.

    Raises:
        FileNotFoundError: the folder lacks a file.
        TableError: there is no such table or split, a file breaks its format, or a query or document has no text.
    """
    if table == "judgments":
        return _judgments(folder, split)
    if table not in ("corpus", "queries"):
        raise TableError(f"{folder}: a BEIR folder holds judgments, corpus and queries, no {table} table.")
    path = _file(folder, f"{table}.jsonl")
    if path is None:
        raise FileNotFoundError(f"{folder / table}.jsonl: no such file.")
    names = _CORPUS if table == "corpus" else _QUERIES
    rows = read_file(LocalFileSystem(), str(path))
    if table == "corpus" and "title" not in rows.columns:
        rows["title"] = ""
    return _renamed(rows, names, path), str(path)


def beir_files(source: Any) -> list[str]:
    """The files of a BEIR folder, by name; none for any other source."""
    folder = Path(source)
    found = [*folder.glob("*.jsonl*"), *folder.glob("qrels/*.tsv*")] if is_beir(source) else []
    return sorted(map(str, found))


def _judgments(folder: Path, split: str | None) -> tuple[pd.DataFrame, str]:
    qrels = sorted([*folder.glob("qrels/*.tsv"), *folder.glob("qrels/*.tsv.gz")])
    paths = {path.name.split(".tsv")[0]: path for path in qrels}
    if not paths or (split and split not in paths):
        raise TableError(
            f"{folder}: there are no judgments of split '{split}'; there are: {', '.join(paths) or 'none'}."
        )
    chosen = {split: paths[split]} if split else paths
    rows = pd.concat([_qrels(path).assign(split=name) for name, path in chosen.items()], ignore_index=not split)
    name = str(chosen[split] if split else folder / "qrels")
    queries, corpus = (validate(*_named(folder, table)) for table in ("queries", "corpus"))
    return join_texts(join_queries(rows, queries, name), corpus, name), name


def _named(folder: Path, table: str) -> tuple[pd.DataFrame, str, str]:
    rows, name = read_beir(folder, table)
    return rows, table, name


def _qrels(path: Path) -> pd.DataFrame:
    rows = _renamed(read_file(LocalFileSystem(), str(path), ".tsv"), _QRELS, path)
    return rows.assign(label=grades_from_zero(rows["label"]))


def _renamed(rows: pd.DataFrame, names: Mapping[str, str], path: Path) -> pd.DataFrame:
    """Rows with our names; a further column that has one of ours already is not what BEIR means, and is dropped."""
    if missing := [name for name in names if name not in rows.columns]:
        raise TableError(f"{path}: the rows lack {', '.join(missing)}; they have: {', '.join(rows.columns)}.")
    ours = {column for table in TABLES.values() for column in table.required + table.optional}
    return rows.drop(columns=(ours - set(names)) & set(rows.columns)).rename(columns=names)


def _file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
