"""What a run has to show, as plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from hf_disranker.data import mine_candidates, pair_texts
from hf_disranker.ranker import Ranker

TITLES = {
    "bm25": "BM25",
    "label_student": "BERT, labels alone",
    "click_student": "BERT, clicks, labels",
    "teacher_no_cpt": "LLM teacher, no CPT",
    "teacher": "LLM teacher",
    "student": "BERT, distilled",
}


def results_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Rankers side by side; the brackets are 95% intervals by query.

    Args:
        results: a mapping for each ranker: name, parameters, ndcg@5, ndcg@10, pnr, pairs_per_s and intervals; None
            where something has no meaning.
    """
    head = f"{'':22}{'parameters':>11}{'NDCG@5':>9}{'NDCG@10':>9}{'':16}{'PNR':>7}{'':15}{'pairs/s':>8}"
    return "\n".join([head, *map(_line, results)])


def _line(row: Mapping[str, Any]) -> str:
    parameters, speed = row["parameters"], row["pairs_per_s"]
    return (
        f"{TITLES[row['name']]:22}"
        + (f"{parameters / 1e6:10.1f}M" if parameters else f"{'-':>11}")
        + f"{row['ndcg@5']:9.3f}{row['ndcg@10']:9.3f}{_interval(row, 'ndcg@10', 3):>16}"
        + (f"{row['pnr']:7.2f}" if row["pnr"] is not None else f"{'inf':>7}")
        + f"{_interval(row, 'pnr', 2):>15}"
        + (f"{speed:8,.0f}" if speed else f"{'-':>8}")
    )


def _interval(row: Mapping[str, Any], measure: str, digits: int) -> str:
    return "[" + ", ".join("inf" if end is None else f"{end:.{digits}f}" for end in row["intervals"][measure]) + "]"


def search_examples(
    queries: Sequence[str], corpus: pd.DataFrame, ranker: Ranker, depth: int = 20, top: int = 3
) -> list[str]:
    """The first documents of typed queries, by BM25 and by a ranker that sorts BM25's first ones anew.

    Args:
        queries: as somebody would type them.
        corpus: columns doc_id, title, summary.
        ranker: sorts the candidates.
        depth: how many candidates BM25 finds.
        top: documents to show for each.

    Returns:
        A few lines of text for each query.
    """
    typed = pd.DataFrame({"query_id": [str(place) for place in range(len(queries))], "query": list(queries)})
    found = mine_candidates(typed, corpus, top_k=depth).merge(corpus, on="doc_id").sort_values("rank")
    by_query = (found[found["query_id"] == query_id].reset_index(drop=True) for query_id in typed["query_id"])
    return [_search(query, rows, ranker, top) for query, rows in zip(queries, by_query, strict=True)]


def _search(query: str, rows: pd.DataFrame, ranker: Ranker, top: int) -> str:
    order = np.argsort(-ranker.predict(pair_texts(rows)), kind="stable")
    before, after = rows["title"][:top].tolist(), rows["title"].iloc[order[:top]].tolist()
    width = max(map(len, [TITLES["bm25"], *before]))
    lines = [f"Query: {query}", f"     {TITLES['bm25']:{width}}   {TITLES['student']}"]
    lines += [
        f"  {place}. {old:{width}}   {new}" for place, (old, new) in enumerate(zip(before, after, strict=True), 1)
    ]
    return "\n".join(lines)
