"""BM25 against numbers worked out by hand, and random documents."""

from math import log

import pandas as pd
import pytest

from hf_disranker.data.bm25 import bm25_scores, bm25_tokens, mine_candidates, with_random_documents
from hf_disranker.data.schema import TableError
from hf_disranker.data.tables import read_table

# Words: a = red apple apple pie, b = green pear, c = a red red car; mean length 10/3.
FRUIT = pd.DataFrame(
    {
        "doc_id": ["a", "b", "c"],
        "title": ["Red apple", "green", ""],
        "summary": ["apple: pie", "pear", "a red red car"],
    }
)
RED, APPLE = log(1 + 1.5 / 2.5), log(1 + 2.5 / 1.5)  # in 2 and in 1 of 3 documents
NORM = 1.2 * (0.25 + 0.75 * 4 / (10 / 3))  # of a and c
BM25 = {"a": RED * 1 / (1 + NORM) + APPLE * 2 / (2 + NORM), "b": 0.0, "c": RED * 2 / (2 + NORM)}


def test_bm25_matches_hand_example():
    pairs = FRUIT.assign(query_id="q", query="RED apple, please")
    assert bm25_scores(pairs).tolist() == pytest.approx(list(BM25.values()), rel=1e-6)
    reversed_scores = bm25_scores(pairs[::-1], corpus=FRUIT)
    assert reversed_scores.tolist() == pytest.approx(list(BM25.values())[::-1], rel=1e-6)


def test_bm25_counts_words_over_the_corpus():
    pairs = FRUIT.assign(query_id="q", query="red apple")
    corpus = pd.concat([FRUIT, pd.DataFrame({"doc_id": ["e"], "title": ["red"], "summary": ["wine from home"]})])
    # Mean length 14/4, red in 3 and apple in 1 of 4 documents.
    norm = 1.2 * (0.25 + 0.75 * 4 / 3.5)
    expected = log(1 + 1.5 / 3.5) * 2 / (2 + norm)
    assert bm25_scores(pairs, corpus)[2] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(TableError, match=r"pairs: . row\(s\) name a doc_id that is not in the corpus"):
        bm25_scores(pairs, FRUIT[1:])


def test_mined_candidates_match_hand_example():
    queries = pd.DataFrame({"query_id": ["1", "2", "3", "4"], "query": ["red apple", "???", "pear red", "plum"]})
    mined = mine_candidates(queries, FRUIT, top_k=2)
    # Queries 2 and 4 share no word with a document. b is short, and pear is rarer than red.
    assert mined[["query_id", "query", "doc_id", "rank"]].to_numpy().tolist() == [
        ["1", "red apple", "a", 1],
        ["1", "red apple", "c", 2],
        ["3", "pear red", "b", 1],
        ["3", "pear red", "c", 2],
    ]
    assert mined["bm25"].tolist()[:2] == pytest.approx([BM25["a"], BM25["c"]], rel=1e-6)
    assert read_table(mined, "candidates", corpus=FRUIT)["title"].tolist() == ["Red apple", "", "green", ""]


def test_missing_texts_are_empty_and_bad_tables_are_refused():
    queries = pd.DataFrame({"query_id": [1], "query": ["red apple"]})
    holes = FRUIT.assign(title=["Red apple", None, float("nan")])
    mined = mine_candidates(queries, holes)
    pd.testing.assert_frame_equal(mined, mine_candidates(queries, holes.fillna("")))
    assert bm25_scores(holes.assign(query_id="1", query="none nan")).tolist() == [0.0, 0.0, 0.0]
    with pytest.raises(TableError, match="queries: queries table: 1 row.s. repeat a .query_id."):
        mine_candidates(pd.concat([queries, queries]), FRUIT)
    with pytest.raises(TableError, match="corpus: corpus table: 1 row.s. repeat a .doc_id."):
        mine_candidates(queries, FRUIT.assign(doc_id=["a", "b", "a"]))


def test_bm25_without_a_word_says_so():
    silent = FRUIT.assign(title="", summary="🍎 ...")
    with pytest.raises(TableError, match="No document has a word to index"):
        bm25_scores(silent.assign(query_id="q", query="red"))


def test_words_and_cjk_pairs():
    assert bm25_tokens("Read_CSV, 3.5 times!") == ["read_csv", "3", "5", "times"]
    assert bm25_tokens("東京タワーのiPhone") == ["東京", "京タ", "タワ", "ワー", "ーの", "iphone"]
    assert bm25_tokens("山 서울시") == ["山", "서울", "울시"]
    assert bm25_tokens("🗼 … ") == []


def test_a_chinese_query_finds_its_document():
    corpus = pd.DataFrame({"doc_id": ["x", "y"], "title": ["北京大学", "京北风光"], "summary": ["", ""]})
    mined = mine_candidates(pd.DataFrame({"query_id": ["1"], "query": ["北京"]}), corpus)
    assert mined["doc_id"].tolist() == ["x"]


def test_random_documents_follow_the_candidates_of_their_query(candidates, corpus):
    rows = with_random_documents(candidates, corpus, per_query=4, seed=1)
    assert not rows.duplicated(["query_id", "doc_id"]).any()
    kept = rows[rows["rank"].notna()].reset_index(drop=True)
    assert kept[["query_id", "doc_id"]].equals(candidates[["query_id", "doc_id"]])
    drawn = rows[rows["rank"].isna()].groupby("query_id").size()
    assert drawn.max() <= 4 and drawn.sum() > 3 * candidates["query_id"].nunique()
    assert set(rows["doc_id"]) <= set(corpus["doc_id"])
    assert rows["query_id"].tolist() == sorted(rows["query_id"], key=list(dict.fromkeys(rows["query_id"])).index)
    assert rows.equals(with_random_documents(candidates, corpus, per_query=4, seed=1))
    assert rows.equals(with_random_documents(candidates.set_index("rank", drop=False), corpus, per_query=4, seed=1))
