"""Mining of candidates: BM25 and random documents."""

from __future__ import annotations

import re
from typing import Any

import bm25s
import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from hf_disranker.data.schema import TableError, rows_of, validate


def mine_candidates(queries: pd.DataFrame, corpus: pd.DataFrame, top_k: int = 20) -> pd.DataFrame:
    """Retrieve the candidates of each query by BM25 (Lucene's variant, k1 1.2, b 0.75) over title and summary.

    Args:
        queries: Columns query_id, query; one row per query.
        corpus: Columns doc_id, title, summary.
        top_k: Maximum number of documents per query; documents without a common word are not candidates.

    Returns:
        A candidates table: query_id, query, doc_id, rank (int, from 1) and bm25 (float32).

    Raises:
        TableError: If the queries or the corpus break their schema.
    """
    queries, corpus = validate(queries, "queries", "queries"), validate(corpus, "corpus", "corpus")
    index = bm25_index(corpus)
    doc_ids = corpus["doc_id"].to_numpy()
    tokens = [bm25_tokens(query) for query in queries["query"]]
    found, scores = index.retrieve(tokens, k=min(top_k, len(corpus)), show_progress=False)
    rank = np.broadcast_to(np.arange(1, found.shape[1] + 1), found.shape)
    kept = scores > 0
    row = np.nonzero(kept)[0]
    return pd.DataFrame(
        {
            "query_id": queries["query_id"].to_numpy()[row],
            "query": queries["query"].to_numpy()[row],
            "doc_id": doc_ids[found[kept]],
            "rank": rank[kept].astype(np.int32),
            "bm25": scores[kept].astype(np.float32),
        }
    )


def with_random_documents(
    candidates: pd.DataFrame, corpus: pd.DataFrame, per_query: int, seed: int = 0
) -> pd.DataFrame:
    """Add random documents of the corpus to each query's candidates, as easy negatives.

    Of the `per_query` drawn documents, those that are candidates already are not added. The others follow the query's
    own rows, with missing values in columns other than the texts.
    """
    queries = candidates.drop_duplicates("query_id")[["query_id", "query"]].reset_index(drop=True)
    drawn = queries.loc[queries.index.repeat(per_query)]
    places = np.random.default_rng(seed).integers(len(corpus), size=len(drawn))
    texts = corpus.iloc[places][["doc_id", "title", "summary"]]
    columns = texts.columns.intersection(candidates.columns)
    drawn = pd.concat([drawn.reset_index(drop=True), texts[columns].reset_index(drop=True)], axis=1)
    rows = pd.concat([candidates, drawn]).drop_duplicates(["query_id", "doc_id"], keep="first")
    order = np.argsort(pd.factorize(rows["query_id"])[0], kind="stable")
    return rows.iloc[order].reset_index(drop=True)


def bm25_scores(pairs: pd.DataFrame, corpus: pd.DataFrame | None = None) -> np.ndarray:
    """Score pairs by BM25, the baseline for every ranker.

    Args:
        pairs: Columns query_id, query, doc_id, title, summary.
        corpus: Documents for the word statistics; None uses the distinct documents of `pairs`.

    Returns:
        Scores, shape (len(pairs),), float64; 0 without a common word.

    Raises:
        TableError: If a document of `pairs` is not in `corpus`.
    """
    if corpus is None:
        corpus = pairs.drop_duplicates("doc_id")
    index = bm25_index(corpus)
    places = rows_of(pairs["doc_id"], pd.Index(corpus["doc_id"]), "pairs")
    scores = np.zeros(len(pairs))
    groups = pairs.groupby("query_id", sort=False).indices
    for rows in tqdm(groups.values(), desc="BM25", leave=False):
        tokens = [token for token in bm25_tokens(pairs["query"].iloc[rows[0]]) if token in index.vocab_dict]
        if tokens:
            scores[rows] = index.get_scores(tokens)[places[rows]]
    return scores


_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(f"[{_CJK}]+|[^\\W{_CJK}]+")


def bm25_tokens(text: str) -> list[str]:
    """Split into lower-case words; Chinese, Japanese and Korean into overlapping character pairs, as Lucene does."""
    tokens: list[str] = []
    for word in _WORD.findall(text.lower()):
        if re.match(f"[{_CJK}]", word) and len(word) > 1:
            tokens += [word[i : i + 2] for i in range(len(word) - 1)]
        else:
            tokens.append(word)
    return tokens


def bm25_index(corpus: pd.DataFrame) -> Any:
    """Build a bm25s index over title and summary; TableError if there is no word to index."""
    index = bm25s.BM25(method="lucene", k1=1.2, b=0.75)
    texts = tqdm(corpus["title"].fillna("") + " " + corpus["summary"].fillna(""), desc="BM25 index", leave=False)
    tokens = [bm25_tokens(text) for text in texts]
    if not any(tokens):
        raise TableError("No document has a word to index for BM25.")
    index.index(tokens, show_progress=False)
    return index
