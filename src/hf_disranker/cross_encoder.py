"""To and from sentence-transformers: our rows in the form that its cross-encoder losses read."""

from __future__ import annotations

import hashlib
import logging

import pandas as pd
from datasets import Dataset

from hf_disranker.data import group_rows
from hf_disranker.schema import validate
from hf_disranker.texts import STUDENT_TEMPLATES, Templates

logger = logging.getLogger(__name__)

_SCORES = ("scores", "score", "labels", "label")


def to_n_tuples(groups: Dataset, documents: int, templates: Templates = STUDENT_TEMPLATES) -> Dataset:
    """Rows of `load_groups` as n-tuples with scores: query, positive, negative_1, ..., scores.

    The positive is the query's best-scored document. A query with more documents gives several rows, in which the
    positive returns; the last of them is filled up with negatives of the one before, so that no document is lost.

    Args:
        groups: rows with `teacher_scores`, or `labels`, which are then the scores.
        documents: how many each row holds, at least 2; queries with fewer are left out and counted.
        templates: how query and document become text.

    Raises:
        ValueError: fewer than 2 documents asked for, or no query has as many.
    """
    if documents < 2:
        raise ValueError(f"An n-tuple holds at least 2 documents, got {documents}.")
    target = "teacher_scores" if "teacher_scores" in groups.column_names else "labels"
    names = ["positive", *(f"negative_{number}" for number in range(1, documents))]
    rows, short = [], 0
    for group in groups:
        texts = [templates.render_document(*pair) for pair in zip(group["titles"], group["summaries"], strict=True)]
        best, *others = sorted(range(len(texts)), key=lambda place: -group[target][place])
        short += len(texts) < documents
        width = documents - 1
        for start in range(0, len(others) if len(texts) >= documents else 0, width):
            end = min(start + width, len(others))
            places = [best, *others[end - width : end]]
            found = zip(names, places, strict=True)
            row = {"query": templates.render_query(group["query"])} | {name: texts[place] for name, place in found}
            rows.append(row | {"scores": [float(group[target][place]) for place in places]})
    if not rows:
        raise ValueError(f"No query has {documents} documents.")
    if short:
        logger.warning("%d of %d queries have fewer than %d documents: left out.", short, len(groups), documents)
    return Dataset.from_list(rows)


def from_n_tuples(rows: Dataset) -> Dataset:
    """N-tuples with scores as rows of `load_groups` with `teacher_scores`, a row for each query.

    The first text column is the query, the others its documents (title empty, the text as summary); rows of one query
    are joined, ids are digests of the texts.

    Raises:
        ValueError: no scores, or not one for each document (margins do not tell the scores that they came from).
        TableError: a document has two different scores for one query.
    """
    scores = next((name for name in _SCORES if name in rows.column_names), None)
    texts = [name for name in rows.column_names if name not in _SCORES]
    if scores is None or len(texts) < 2 or len(rows[0][scores]) != len(texts) - 1:
        raise ValueError(f"Not n-tuples with a score for each document: {rows.column_names}.")
    query, *documents = texts
    records = [
        (row[query], row[name], score) for row in rows for name, score in zip(documents, row[scores], strict=True)
    ]
    frame = pd.DataFrame(records, columns=["query", "summary", "teacher_score"]).drop_duplicates()
    frame = frame.assign(query_id=frame["query"].map(_digest), doc_id=frame["summary"].map(_digest), title="")
    return group_rows(validate(frame.reset_index(drop=True), "scores", "n-tuples"))


def _digest(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()[:16]
