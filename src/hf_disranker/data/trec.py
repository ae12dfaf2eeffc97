"""Readers of judgments and rankings: tables, TREC qrels and runs, BEIR folders; writer of TREC runs."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pandas as pd
from fsspec.implementations.local import LocalFileSystem

from hf_disranker.data.files import beir_splits, is_beir, is_table_file, read_file
from hf_disranker.data.schema import TableError, grades_from_zero, join_queries, join_texts, refuse, validate
from hf_disranker.data.tables import Columns, Source, read_table, usual_split

KEY = ["query_id", "doc_id"]
_QRELS = ["query_id", "iteration", "doc_id", "label"]
_RUN = ["query_id", "q0", "doc_id", "rank", "teacher_score", "tag"]


def read_judgments(
    source: Source,
    split: str | None = None,
    corpus: Source | None = None,
    queries: Source | None = None,
    columns: Columns | None = None,
) -> pd.DataFrame:
    """Read judgments from a table, a TREC qrels file or a BEIR folder.

    Args:
        source: As in `read_table`. A file with any other extension is read as TREC qrels, a folder with a subfolder
            `qrels` as BEIR (corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv).
        split: Keep the rows of this split, by default "test" for BEIR; TREC qrels have no splits.
        corpus: For qrels, source of the documents' texts; None for no title and summary, enough to evaluate a run.
        queries: For qrels, source of the queries' texts; None uses their ids.
        columns: As in `read_table`, for tables.

    Returns:
        A judgments table. Negative TREC labels (spam) become 0.

    Raises:
        FileNotFoundError: If there is no such file.
        TableError: If the file is malformed, or a judged document or query has no text.
    """
    if is_beir(source):
        return read_table(source, "judgments", split=split or "test")
    if (path := _trec_file(source)) is None:
        return read_table(source, "judgments", split=split, columns=columns)
    rows = _read_columns(path, _QRELS).drop(columns="iteration")
    rows = rows.assign(label=grades_from_zero(rows["label"]), query=rows["query_id"], title="", summary="")
    rows = validate(rows, "judgments", str(path)).drop(columns=["title", "summary"]).reset_index(drop=True)
    if queries is not None:
        rows = join_queries(rows, read_table(queries, "queries", columns=columns), str(path))
    return rows if corpus is None else join_texts(rows, read_table(corpus, "corpus", columns=columns), str(path))


def judged_split(source: Source, named: str | None, columns: Columns | None = None) -> str | None:
    """Choose the split of judgments as `tables.usual_split` does, by default "dev"; for BEIR, "test" without one."""
    if named is not None or _trec_file(source) is not None:
        return named
    if is_beir(source):
        return "dev" if "dev" in beir_splits(Path(source)) else "test"  # type: ignore[arg-type]
    return usual_split(source, named, "dev", columns)


def read_run(source: Source, columns: Columns | None = None) -> pd.DataFrame:
    """Read a ranking as a scores table without texts: a score store or table, or a TREC run (any other extension).

    Raises:
        TableError: If a row of a run does not have six columns, a score is not finite, or a document occurs twice.
    """
    if (path := _trec_file(source)) is None:
        return read_table(source, "scores", texts=False, columns=columns)
    rows = _read_columns(path, _RUN)[[*KEY, "teacher_score"]]
    # float64: scores of a run may differ by less than the precision of float32.
    scores = pd.to_numeric(rows["teacher_score"], errors="coerce").astype("float64")
    checked = validate(rows.assign(query=rows["query_id"]), "scores", str(path))
    return checked.drop(columns="query").assign(teacher_score=scores).reset_index(drop=True)


def read_pairs(source: Source, queries: Source | None = None, columns: Columns | None = None) -> pd.DataFrame:
    """Read candidates without texts of documents: a candidates table or a TREC run (any other extension).

    Args:
        source: As in `read_table`.
        queries: For a run, source of the queries' texts; may be a BEIR folder.
        columns: As in `read_table`.

    Raises:
        TableError: If the file is malformed, or the queries of a run have no texts.
    """
    if (path := _trec_file(source)) is None:
        if queries is not None:
            raise TableError(f"{source}: only a TREC run needs queries; a candidates table has its own.")
        return read_table(source, "candidates", texts=False, columns=columns)
    if queries is None:
        raise TableError(
            f"{path}: a TREC run has ids only: --queries TABLE --corpus TABLE name the texts, also of a BEIR folder."
        )
    return join_queries(read_run(path)[KEY], read_table(queries, "queries", columns=columns), str(path))


def check_run_ids(table: pd.DataFrame) -> None:
    """Refuse ids that a TREC run cannot represent, since whitespace separates its columns.

    Raises:
        TableError: If a query_id or doc_id is empty or contains whitespace; the message shows the first rows.
    """
    for name in KEY:
        several = table[name].map(lambda value: str(value).split() != [str(value)])
        what = "are empty or contain whitespace, which a TREC run cannot represent; use other ids, such as a hash"
        refuse(table[name], several, f"column '{name}'", what)


def read_candidates(
    source: Source, judgments: pd.DataFrame, corpus: pd.DataFrame, columns: Columns | None = None
) -> pd.DataFrame:
    """Read a first stage's documents (candidates table or TREC run) for the judged queries.

    Texts are joined from the corpus, the query and its other columns from the judgments; `columns` as in `read_table`.

    Raises:
        TableError: If there is no document for a judged query, or a document is not in the corpus.
    """
    is_run = _trec_file(source) is not None
    rows = (read_run(source) if is_run else read_table(source, "candidates", texts=False, columns=columns))[KEY]
    documents = {"doc_id", "title", "summary", "label"}
    by_query = judgments.drop_duplicates("query_id")[[name for name in judgments if name not in documents]]
    rows = rows.merge(by_query, on="query_id")
    if rows.empty:
        raise TableError(f"{source}: no row is of a judged query.")
    return join_texts(rows, corpus, str(source))


def write_run(rows: pd.DataFrame, path: str | os.PathLike[str], tag: str) -> None:
    """Write the columns query_id, doc_id and score as a TREC run, without rows where an optional `missing` is True.

    `tag` is the name of the run; whitespace becomes underscores. Ids are checked by `check_run_ids`.
    """
    if "missing" in rows.columns:
        rows = rows[~rows["missing"]]
    check_run_ids(rows)
    places = pd.factorize(rows["query_id"])[0]
    rows = rows.assign(place=places).sort_values(["place", "score", "doc_id"], ascending=[True, False, True])
    rank = rows.groupby("place").cumcount() + 1
    columns = {"query_id": rows["query_id"], "q0": "Q0", "doc_id": rows["doc_id"], "rank": rank}
    run = pd.DataFrame(columns | {"score": rows["score"], "tag": "_".join(tag.split()) or "run"})
    run.to_csv(path, sep=" ", header=False, index=False, quoting=csv.QUOTE_NONE)


def _trec_file(source: Source) -> Path | None:
    """Return the path of a TREC file, that is one without the extension of a table; None for other sources."""
    path = Path(source) if isinstance(source, str | os.PathLike) else Path()
    return path if path.is_file() and not is_table_file(path.name) else None


def _read_columns(path: Path, names: list[str]) -> pd.DataFrame:
    """Read a file of whitespace-separated columns without a header, indexed by line from 1."""
    rows = read_file(LocalFileSystem(), str(path), ".trec")
    if rows.shape[1] != len(names):
        hint = " Save a tab-separated table as .csv." if path.suffix == ".tsv" else ""
        raise TableError(
            f"{path}: rows have {rows.shape[1]} columns, not the {len(names)} of {' '.join(names)}.{hint}"
        )
    if (short := rows.iloc[:, -1] == "").any():
        raise TableError(f"{path}: line {rows.index[short][0]} has fewer columns than {' '.join(names)}.")
    return rows.set_axis(names, axis=1)
