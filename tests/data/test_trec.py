"""TREC and BEIR files."""

import gzip
import json

import numpy as np
import pandas as pd
import pytest

from hf_disranker.data.candidates import Candidates
from hf_disranker.data.groups import load_groups
from hf_disranker.data.schema import TableError
from hf_disranker.data.tables import column_names, read_table, usual_split
from hf_disranker.data.trec import (
    KEY,
    check_run_ids,
    judged_split,
    read_candidates,
    read_judgments,
    read_run,
    write_run,
)


@pytest.fixture
def beir(tmp_path, judgments, corpus):
    """The judgments as a BEIR folder."""
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    lines = [{"_id": row.doc_id, "title": row.title, "text": row.summary} for row in corpus.itertuples()]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, lines)))
    queries = judgments.drop_duplicates("query_id")
    lines = [{"_id": row.query_id, "text": row.query, "metadata": {}} for row in queries.itertuples()]
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for split, rows in judgments.groupby("split"):
        rows = rows[["query_id", "doc_id", "label"]].set_axis(["query-id", "corpus-id", "score"], axis=1)
        rows.to_csv(folder / "qrels" / f"{split}.tsv", sep="\t", index=False)
    return folder


def test_a_beir_folder_reads_as_judgments(beir, judgments):
    columns = ["query_id", "query", "doc_id", "title", "summary", "label"]
    expected = judgments[judgments["split"] == "dev"][columns].reset_index(drop=True)
    pd.testing.assert_frame_equal(read_judgments(str(beir), "dev")[columns], expected, check_dtype=False)
    assert len(read_table(str(beir), "corpus")) == len(judgments)
    with pytest.raises(TableError, match="no judgments of split 'test'; there are: dev, train"):
        read_judgments(beir, "test")


def test_invalid_beir_files_are_refused(beir):
    (beir / "qrels" / "dev.tsv").write_text("q0\td0-0\t1\n")
    with pytest.raises(TableError, match="the rows lack query-id, corpus-id, score; they have: q0, d0-0, 1"):
        read_judgments(beir, "dev")
    (beir / "queries.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"queries.jsonl: no such file"):
        read_judgments(beir, "train")


def test_a_beir_folder_reads_wherever_a_table_does(beir, judgments, candidates):
    groups = load_groups(beir, split="dev")
    assert groups.to_list() == load_groups(judgments, split="dev").to_list()
    assert len(load_groups(str(beir))) == judgments["query_id"].nunique()
    joined = read_table(candidates, "candidates", corpus=beir)
    assert joined["title"].tolist() == judgments["title"].tolist()
    with pytest.raises(TableError, match="a BEIR folder has judgments, corpus and queries, no clicks table"):
        read_table(beir, "clicks")
    assert usual_split(beir, None, "train") == "train" and "split" in column_names(beir)
    with pytest.raises(TableError, match="only parquet can be streamed"):
        load_groups(beir, streaming=True)


def rewrite(path, change):
    rows = [change(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("\n".join(map(json.dumps, rows)))


def test_extra_beir_columns_do_not_override_ours(beir, judgments):
    expected = read_judgments(beir, "dev")
    rewrite(beir / "corpus.jsonl", lambda row: row | {"summary": "wrong", "doc_id": "wrong", "metadata": {"a": 1}})
    rewrite(beir / "queries.jsonl", lambda row: row | {"query": "wrong", "title": "wrong", "query_id": "wrong"})
    qrels = pd.read_csv(beir / "qrels" / "dev.tsv", sep="\t").assign(query="wrong", label=7, split="test", market="fr")
    qrels.to_csv(beir / "qrels" / "dev.tsv", sep="\t", index=False)
    found = read_judgments(beir, "dev")
    pd.testing.assert_frame_equal(found[expected.columns], expected)
    assert set(found["market"]) == {"fr"}


def test_beir_files_may_be_gzipped_or_start_with_a_bom(beir):
    expected = read_judgments(beir, "dev")
    for number, path in enumerate([*beir.glob("*.jsonl"), *beir.glob("qrels/*.tsv")]):
        content = b"\xef\xbb\xbf" + path.read_bytes()
        path.write_bytes(content)
        if number % 2 == 0:
            path.unlink()
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
    pd.testing.assert_frame_equal(read_judgments(beir, "dev"), expected)


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("queries.jsonl", {"_id": "q3", "text": "again"}, r"queries\.jsonl: .*First: line 13: {'query_id': 'q3'}"),
        ("queries.jsonl", {"_id": "q99", "text": " "}, r"queries\.jsonl: .*have an empty query\. First: line 13: ' '"),
        ("corpus.jsonl", {"_id": "d0-0", "text": "x"}, r"corpus\.jsonl: .*First: line 58: {'doc_id': 'd0-0'}"),
        ("corpus.jsonl", {"id": "d0-0"}, r"corpus\.jsonl: .*1 row\(s\) have no id\. First: line 58"),
    ],
)
def test_a_bad_line_of_beir_is_named_with_its_file(beir, name, line, message):
    with (beir / name).open("a") as file:
        file.write("\n" + json.dumps(line))
    with pytest.raises(TableError, match=message):
        read_judgments(beir, "dev")


def test_qrels_read_with_and_without_texts(tmp_path, judgments, corpus):
    path = tmp_path / "robust.qrels"
    path.write_text("301 0 FR-1 2\n301 0 FR-2 -2\n302\t0\tFR-1\t0\n")
    plain = read_judgments(path, "dev")
    assert plain[["query_id", "doc_id", "label"]].values.tolist() == [
        ["301", "FR-1", 2],
        ["301", "FR-2", 0],
        ["302", "FR-1", 0],
    ]
    assert "title" not in plain
    texts = pd.DataFrame({"doc_id": ["FR-1", "FR-2"], "title": ["A", "B"], "summary": ["one", "two"]})
    queries = pd.DataFrame({"query_id": [301, 302], "query": ["red", "blue"]})
    rows = read_judgments(path, None, texts, queries)
    assert rows["query"].tolist() == ["red", "red", "blue"] and rows["title"].tolist() == ["A", "B", "A"]
    with pytest.raises(TableError, match="1 row.s. name a query_id that is not among the queries, first: 302"):
        read_judgments(path, None, texts, queries[:1])
    with pytest.raises(TableError, match="not in the corpus, first: FR-2"):
        read_judgments(path, None, texts[:1], queries)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("301 0 FR-1\n", "rows have 3 columns, not the 4"),
        ("301 0 FR-1 good\n", "column 'label' .* First: line 1: 'good'"),
        ("301 0 FR-1 1\n\n302 0 FR-1\n", "line 3 has fewer columns than query_id iteration doc_id label"),
        ("301 0 FR-1 1\n301 0 FR-1 1\n", "repeat a"),
        ("", "the file is empty"),
        ("301 0 FR-1 1\n301 0 café 1\n".encode("cp1252"), "line 2 is not UTF-8 but probably CP1252: save it as UTF-8"),
        ("301 0 FR-1 1\n".encode("utf-16"), "it is UTF-16: save it as UTF-8"),
    ],
)
def test_broken_qrels_are_refused(tmp_path, text, message):
    (tmp_path / "broken.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(TableError, match=message):
        read_judgments(tmp_path / "broken.txt")


def test_a_run_keeps_its_scores_in_full(tmp_path):
    path = tmp_path / "bm25.run"
    path.write_text('1 Q0 a"b 1 16777217.5 tag\n1 Q0 c 2 16777217.25 tag\n')
    run = read_run(path)
    assert run["doc_id"].tolist() == ['a"b', "c"]
    assert run["teacher_score"].tolist() == [16777217.5, 16777217.25]  # equal in float32
    path.write_text("1 Q0 a 1 nan tag\n")
    with pytest.raises(TableError, match="no finite number"):
        read_run(path)


def test_a_written_run_is_in_trec_order(tmp_path):
    rows = pd.DataFrame(
        {"query_id": ["9", "10", "9", "9"], "doc_id": ["a", "b", "c", "d"], "score": [1.0, 5.0, 2.5, 1.0]}
    )
    write_run(rows, tmp_path / "out.run", "two words")
    lines = (tmp_path / "out.run").read_text().splitlines()
    assert lines[:2] == ["9 Q0 c 1 2.5 two_words", "9 Q0 a 2 1.0 two_words"] and lines[3].startswith("10 Q0 b 1 5.0")
    back = read_run(tmp_path / "out.run").set_index(["query_id", "doc_id"])["teacher_score"]
    assert np.array_equal(back.loc[list(zip(rows["query_id"], rows["doc_id"], strict=True))], rows["score"])


@pytest.mark.parametrize("bad", ["a b", " a", "a\tb", "a\u3000b", "a\xa0b", "a\n", ""])
def test_ids_invalid_in_a_run_are_refused_with_their_rows(tmp_path, bad):
    rows = pd.DataFrame({"query_id": ["1", "1"], "doc_id": ["a", bad], "score": [1.0, 2.0]})
    with pytest.raises(TableError, match=r"column 'doc_id': 1 row\(s\) are empty or contain .* First: row 1: "):
        check_run_ids(rows)
    with pytest.raises(TableError, match="column 'query_id': 2 row"):
        write_run(rows.assign(query_id=bad, doc_id=["a", "b"]), tmp_path / "no.run", "x")
    assert not (tmp_path / "no.run").exists()


def test_any_id_without_whitespace_round_trips_through_a_run(tmp_path):
    ids = ['"', 'a"b', '"a"', "'", "a,b", "\\", "#1", "NA", "007", "東京", "é", "1e5", "a;b"]
    scores = np.random.default_rng(0).standard_normal(len(ids))
    rows = pd.DataFrame({"query_id": ids[::-1], "doc_id": ids, "score": scores})
    write_run(rows, tmp_path / "out.run", 'the "tag"')
    back = read_run(tmp_path / "out.run").rename(columns={"teacher_score": "score"})
    pd.testing.assert_frame_equal(back[["query_id", "doc_id", "score"]], rows, check_dtype=False)


def test_candidates_bring_texts_and_the_columns_of_the_query(tmp_path, judgments, corpus):
    judged = judgments.assign(market=judgments["query_id"].map(lambda one: "de" if one < "q3" else "en"))
    (tmp_path / "first.run").write_text("q0 Q0 d5-1 1 3.0 x\nq4 Q0 d0-0 1 2.0 x\nother Q0 d0-0 1 2.0 x\n")
    rows = read_candidates(tmp_path / "first.run", judged, corpus).set_index("query_id")
    assert rows["market"].to_dict() == {"q0": "de", "q4": "en"} and "label" not in rows
    assert rows.loc["q0", "title"] == corpus.set_index("doc_id").loc["d5-1", "title"]
    with pytest.raises(TableError, match="no row is of a judged query"):
        read_candidates(tmp_path / "first.run", judged[judged["query_id"] == "q7"], corpus)


def test_the_usual_split_is_read_where_there_are_splits(tmp_path, judgments):
    whole = judgments.drop(columns="split")
    for name, table, usual in (("split", judgments, "dev"), ("whole", whole, None)):
        table.to_parquet(tmp_path / f"{name}.parquet")
        table.to_csv(tmp_path / f"{name}.csv", index=False)
        for source in (table, tmp_path / f"{name}.parquet", str(tmp_path / f"{name}.csv")):
            assert judged_split(source, None) == usual
            assert (judged_split(source, ""), judged_split(source, "test")) == ("", "test")
    (tmp_path / "judged.qrels").write_text("q0 0 d0-0 1\n")
    assert judged_split(tmp_path / "judged.qrels", None) is None
    (tmp_path / "beir" / "qrels").mkdir(parents=True)
    assert judged_split(tmp_path / "beir", None) == "test"
    for name in ("dev.tsv", "dev.tsv.gz"):
        file = tmp_path / "beir" / "qrels" / name
        file.touch()
        assert judged_split(tmp_path / "beir", None) == "dev"
        file.unlink()


def test_a_run_is_read_as_pairs_with_the_texts_of_a_beir_folder(beir, tmp_path):
    judged = read_judgments(beir, "dev")
    rows = [f"{query} Q0 {doc} {rank} {-rank} bm25" for rank, (query, doc) in enumerate(judged[KEY].to_numpy())]
    (tmp_path / "bm25.run").write_text("\n".join(rows))
    candidates = Candidates(tmp_path / "bm25.run", beir, queries=beir)
    names = [*KEY, "query", "title", "summary"]
    assert candidates.read(0, len(rows)).to_pandas()[names].to_numpy().tolist() == judged[names].to_numpy().tolist()
    with pytest.raises(TableError, match="a TREC run has ids only: --queries TABLE --corpus TABLE"):
        Candidates(tmp_path / "bm25.run")
    with pytest.raises(TableError, match="no title and summary; name the corpus"):
        Candidates(tmp_path / "bm25.run", queries=beir)
    with pytest.raises(TableError, match=f"disranker score --pairs RUN --queries {beir} --corpus {beir}"):
        Candidates(beir)
    with pytest.raises(TableError, match="only a TREC run needs queries"):
        Candidates(judged, queries=beir)
