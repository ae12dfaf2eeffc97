"""Judgments and rankings in the formats of information retrieval: TREC qrels and runs, BEIR folders."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from hf_disranker.data import Source, join_texts, read_table, refuse_unknown_documents, usual_split
from hf_disranker.schema import TableError, validate

logger = logging.getLogger(__name__)

KEY = ["query_id", "doc_id"]
_TABLES = (".parquet", ".jsonl", ".csv")
_QRELS = ["query_id", "iteration", "doc_id", "label"]
_RUN = ["query_id", "q0", "doc_id", "rank", "teacher_score", "tag"]
# What BEIR calls our columns.
_BEIR_CORPUS = {"_id": "doc_id", "text": "summary"}
_BEIR_QUERIES = {"_id": "query_id", "text": "query"}


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
    if isinstance(source, str | os.PathLike) and Path(source, "qrels").is_dir():
        return _read_beir(Path(source), split or "test")
    if (path := _trec_file(source)) is None:
        return read_table(source, "judgments", split=split)
    rows = _read_columns(path, _QRELS).drop(columns="iteration")
    return _with_texts(rows, str(path), None if corpus is None else read_table(corpus, "corpus"), _queries(queries))


def judged_split(source: Source, named: str | None, usual: str = "dev") -> str | None:
    """The split of judgments to read, as `data.usual_split`; of a BEIR folder the usual one where it is there."""
    if named is not None or _trec_file(source) is not None:
        return named
    if isinstance(source, str | os.PathLike) and Path(source, "qrels").is_dir():
        return usual if Path(source, "qrels", f"{usual}.tsv").is_file() else "test"
    return usual_split(source, named, usual)


def read_corpus(source: Source) -> pd.DataFrame:
    """Documents of a corpus table or of a BEIR folder."""
    if isinstance(source, str | os.PathLike) and (Path(source) / "corpus.jsonl").is_file():
        return validate(_read_jsonl(Path(source) / "corpus.jsonl", _BEIR_CORPUS), "corpus", os.fspath(source))
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
    return checked.drop(columns="query").assign(teacher_score=scores)


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
        TableError: an id holds a blank, which would break the format.
    """
    if "missing" in rows.columns:
        rows = rows[~rows["missing"]]
    check_run_ids(rows)
    places = pd.factorize(rows["query_id"])[0]
    rows = rows.assign(place=places).sort_values(["place", "score", "doc_id"], ascending=[True, False, True])
    rank = rows.groupby("place").cumcount() + 1
    columns = {"query_id": rows["query_id"], "q0": "Q0", "doc_id": rows["doc_id"], "rank": rank}
    run = pd.DataFrame(columns | {"score": rows["score"], "tag": "_".join(tag.split()) or "run"})
    run.to_csv(path, sep=" ", header=False, index=False)


def check_run_ids(table: pd.DataFrame) -> None:
    """Raise TableError where a query_id or doc_id cannot stand in a TREC run."""
    for name in KEY:
        blank = table[name].str.contains(r"\s")
        if blank.any():
            raise TableError(f"A TREC run holds no {name} with a blank, such as {table[name][blank].iloc[0]!r}.")


def _trec_file(source: Source) -> Path | None:
    """The path of a source that is a file of TREC's: one that has not the ending of a table."""
    path = Path(source) if isinstance(source, str | os.PathLike) else Path()
    return path if path.is_file() and path.suffix not in _TABLES else None


def _read_beir(folder: Path, split: str) -> pd.DataFrame:
    qrels = folder / "qrels" / f"{split}.tsv"
    if not qrels.is_file():
        there = ", ".join(sorted(path.stem for path in qrels.parent.glob("*.tsv"))) or "none"
        raise TableError(f"{folder}: there are no judgments of split '{split}'; there are: {there}.")
    rows = pd.read_csv(qrels, sep="\t", dtype=str, keep_default_na=False)
    names = {"query-id": "query_id", "corpus-id": "doc_id", "score": "label"}
    if not set(names) <= set(rows.columns):
        raise TableError(f"{qrels}: the header is {', '.join(rows.columns)}, not {', '.join(names)}.")
    texts = _read_jsonl(folder / "queries.jsonl", _BEIR_QUERIES)
    return _with_texts(rows.rename(columns=names), str(qrels), read_corpus(folder), texts)


def _read_jsonl(path: Path, names: Mapping[str, str]) -> pd.DataFrame:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    rows = pd.read_json(path, lines=True, dtype=False).rename(columns=names)
    if missing := set(names.values()) - set(rows.columns):
        raise TableError(f"{path}: the rows lack {', '.join(sorted(missing))}.")
    return rows.assign(title=rows.get("title", ""))


def _read_columns(path: Path, names: list[str]) -> pd.DataFrame:
    """A file of columns between blanks, without a header."""
    try:
        rows = pd.read_csv(path, sep=r"\s+", header=None, dtype=str, quoting=3, keep_default_na=False)
    except (ValueError, UnicodeDecodeError) as error:
        raise TableError(f"{path}: cannot be read as TREC's columns: {error}") from error
    if rows.shape[1] != len(names):
        raise TableError(f"{path}: rows have {rows.shape[1]} columns, not the {len(names)} of {' '.join(names)}.")
    return rows.set_axis(names, axis=1)


def _queries(source: Source | None) -> pd.DataFrame | None:
    if source is None:
        return None
    return read_table(source, "queries")[["query_id", "query"]]


def _with_texts(
    rows: pd.DataFrame, name: str, corpus: pd.DataFrame | None, queries: pd.DataFrame | None
) -> pd.DataFrame:
    labels = pd.to_numeric(rows["label"], errors="coerce")
    rows = rows.assign(label=labels.clip(lower=0), query=rows["query_id"], title="", summary="")
    rows = validate(rows, "judgments", name)
    if queries is not None:
        rows["query"] = rows["query_id"].map(queries.astype(str).set_index("query_id")["query"])
        if (unknown := rows["query"].isna()).any():
            raise TableError(f"{name}: query '{rows['query_id'][unknown].iloc[0]}' has no text.")
    return rows.drop(columns=["title", "summary"]) if corpus is None else join_texts(rows, corpus, name)
