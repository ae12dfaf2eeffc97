"""Judgments and rankings from our tables, TREC qrels and runs, and BEIR folders."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pandas as pd

from hf_disranker.data.beir import is_beir
from hf_disranker.data.files import is_table_file
from hf_disranker.data.schema import (
    TableError,
    grades_from_zero,
    join_queries,
    join_texts,
    refuse,
    refuse_unknown_documents,
    validate,
)
from hf_disranker.data.tables import Source, read_table, usual_split

KEY = ["query_id", "doc_id"]
_QRELS = ["query_id", "iteration", "doc_id", "label"]
_RUN = ["query_id", "q0", "doc_id", "rank", "teacher_score", "tag"]


def read_judgments(
    source: Source, split: str | None = None, corpus: Source | None = None, queries: Source | None = None
) -> pd.DataFrame:
    """Read judgments from one of our tables, a TREC qrels file or a BEIR folder.

    Args:
        source: what `read_table` reads; a file of any other ending is read as TREC qrels; a folder with a folder
            `qrels` is read as BEIR's (corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv).
        split: keep the rows of this split; TREC qrels have none. BEIR's usual ones are train, dev, test.
        corpus: for qrels, the table with the documents' texts.
        queries: for qrels, a table with query_id and query.

    Returns:
        A judgments table. Qrels without corpus or queries give one without title and summary, their ids as queries:
        enough to measure a run. TREC's labels below 0 (spam) become 0.

    Raises:
        FileNotFoundError: there is no such file.
        TableError: the file breaks its format, or a judged document or query has no text.
    """
    if is_beir(source):
        return read_table(source, "judgments", split=split or "test")
    if (path := _trec_file(source)) is None:
        return read_table(source, "judgments", split=split)
    rows = _read_columns(path, _QRELS).drop(columns="iteration")
    rows = rows.assign(label=grades_from_zero(rows["label"]), query=rows["query_id"], title="", summary="")
    rows = validate(rows, "judgments", str(path)).drop(columns=["title", "summary"]).reset_index(drop=True)
    if queries is not None:
        rows = join_queries(rows, read_table(queries, "queries"), str(path))
    return rows if corpus is None else join_texts(rows, read_table(corpus, "corpus"), str(path))


def judged_split(source: Source, named: str | None, usual: str = "dev") -> str | None:
    """The split of judgments to read, as `data.usual_split`; of a BEIR folder the usual one where it is there."""
    if named is not None or _trec_file(source) is not None:
        return named
    if isinstance(source, str | os.PathLike) and Path(source, "qrels").is_dir():
        return usual if Path(source, "qrels", f"{usual}.tsv").is_file() else "test"
    return usual_split(source, named, usual)


def read_corpus(source: Source) -> pd.DataFrame:
    """Documents of a corpus table or of a BEIR folder."""
    return read_table(source, "corpus")


def read_run(source: Source) -> pd.DataFrame:
    """A ranking as a scores table without texts: a score store, a table of scores, or a TREC run (any other ending).

    Raises:
        TableError: a row does not have the six columns of a run, a score is not finite, a document occurs twice.
    """
    if (path := _trec_file(source)) is None:
        return read_table(source, "scores", texts=False)
    rows = _read_columns(path, _RUN)[[*KEY, "teacher_score"]]
    # Kept in full: scores of a run can be closer than float32 tells apart.
    scores = pd.to_numeric(rows["teacher_score"], errors="coerce").astype("float64")
    checked = validate(rows.assign(query=rows["query_id"]), "scores", str(path))
    return checked.drop(columns="query").assign(teacher_score=scores).reset_index(drop=True)


def check_run_ids(table: pd.DataFrame) -> None:
    """Refuse ids that a TREC run cannot hold: its columns are told apart by blanks.

    Raises:
        TableError: a query_id or doc_id is empty or holds a blank; the message has the first rows.
    """
    for name in KEY:
        several = table[name].map(lambda value: str(value).split() != [str(value)])
        what = "are empty or hold a blank, which a TREC run cannot hold; take ids without, such as a hash of the text"
        refuse(table[name], several, f"column '{name}'", what)


def read_candidates(source: Source, judgments: pd.DataFrame, corpus: pd.DataFrame) -> pd.DataFrame:
    """A first stage's documents of the judged queries, with their texts and the columns of the query.

    Args:
        source: a candidates table or what `read_run` reads.
        judgments: a judgments table with query texts.
        corpus: a corpus table.

    Raises:
        TableError: no document is of a judged query, or one is not in the corpus.
    """
    rows = (read_run(source) if _trec_file(source) else read_table(source, "candidates", texts=False))[KEY]
    documents = {"doc_id", "title", "summary", "label"}
    by_query = judgments.drop_duplicates("query_id")[[name for name in judgments if name not in documents]]
    rows = rows.merge(by_query, on="query_id")
    if rows.empty:
        raise TableError(f"{source}: no row is of a judged query.")
    refuse_unknown_documents(rows["doc_id"], pd.Index(corpus["doc_id"]), str(source))
    return rows.merge(corpus[["doc_id", "title", "summary"]], on="doc_id")


def write_run(rows: pd.DataFrame, path: str | os.PathLike[str], tag: str) -> None:
    """Write a TREC run.

    Args:
        rows: columns query_id, doc_id, score; in the column `missing`, if there is one, True for rows to leave out.
        path: the file.
        tag: names the run; its blanks become underscores.

    Raises:
        TableError: as in `check_run_ids`.
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
    """The path of a source that is a file of TREC's: one that has not the ending of a table."""
    path = Path(source) if isinstance(source, str | os.PathLike) else Path()
    return path if path.is_file() and not is_table_file(path.name) else None


def _read_columns(path: Path, names: list[str]) -> pd.DataFrame:
    """A file of columns between blanks, without a header; its lines, from 1, as index."""
    try:
        rows = pd.read_csv(
            path,
            sep=r"\s+",
            header=None,
            dtype=str,
            quoting=csv.QUOTE_NONE,
            keep_default_na=False,
            skip_blank_lines=False,
            encoding="utf-8-sig",
        )
    except (ValueError, OSError, EOFError) as error:
        raise TableError(f"{path}: cannot be read as TREC's columns: {error}") from error
    rows = rows.set_axis(pd.RangeIndex(1, len(rows) + 1, name="line"))
    rows = rows[rows[0] != ""]
    if rows.shape[1] != len(names):
        raise TableError(f"{path}: rows have {rows.shape[1]} columns, not the {len(names)} of {' '.join(names)}.")
    if (short := rows.iloc[:, -1] == "").any():
        raise TableError(f"{path}: line {rows.index[short][0]} has fewer columns than {' '.join(names)}.")
    return rows.set_axis(names, axis=1)
