"""Tables of a user: columns under other names, and pairs without ids."""

import pandas as pd
import pytest

from hf_disranker.data.candidates import Candidates
from hf_disranker.data.groups import load_groups
from hf_disranker.data.schema import TableError
from hf_disranker.data.tables import read_table, usual_split
from hf_disranker.data.trec import read_judgments, read_run
from hf_disranker.evaluation.evaluate import join_run

NAMES = {"query": "search_term", "title": "product_name", "label": "grade", "split": "fold", "doc_id": "sku"}


@pytest.fixture
def export(judgments):
    """Judgments under a shop's names."""
    return judgments.rename(columns=NAMES).assign(market="de")


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_columns_are_read_under_other_names(tmp_path, export, judgments, ending):
    path = str(tmp_path / f"export.{ending}")
    export.to_csv(path, index=False) if ending == "csv" else export.to_parquet(path)
    assert usual_split(path, None, "dev") is None and usual_split(path, None, "dev", NAMES) == "dev"
    found = read_judgments(path, "dev", columns=NAMES)
    assert found["market"].unique() == ["de"] and "search_term" not in found.columns
    expected = read_table(judgments, "judgments", split="dev")
    pd.testing.assert_frame_equal(found[expected.columns], expected)
    groups = load_groups(path, columns=NAMES)
    assert groups.to_list() == load_groups(judgments).to_list()
    candidates = Candidates(path, columns=NAMES)
    assert candidates.check() == Candidates(judgments).check()


def test_a_corpus_is_renamed_too_and_other_tables_are_left_alone(tmp_path, judgments, corpus):
    pairs = judgments[["query_id", "query", "doc_id"]]
    goods = corpus.rename(columns=NAMES)
    names = {"title": "product_name", "doc_id": "sku", "label": "grade"}
    found = read_table(pairs, "candidates", corpus=goods, columns=names)
    assert found["title"].tolist() == judgments["title"].tolist()
    pairs.to_parquet(tmp_path / "pairs.parquet")
    assert Candidates(tmp_path / "pairs.parquet", goods, columns=names).read(0, 1)["title"][0].as_py()
    scores = judgments.drop(columns=["label", "split"]).assign(teacher_score=1.0)
    assert load_groups(scores, columns=NAMES).to_list() == load_groups(scores).to_list()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"query": "serch"}, "<DataFrame>: no column 'serch' to read as 'query'; it has: query_id, search_term, sku"),
        ({"split": "flod"}, "no column 'flod' to read as 'split'"),
        ({"search_term": "query"}, "There is no column 'search_term' to read 'query' as; there are: doc_id, label"),
        ({"summary": "product_name"}, "'product_name' cannot be read as 'summary', since there is such a column"),
    ],
)
def test_a_wrong_column_name_is_refused(export, names, message):
    with pytest.raises(TableError) as error:
        read_table(export, "judgments", columns={"query": "search_term"} | names)
    assert message in str(error.value)


def test_a_column_in_another_case_is_found_by_its_name(tmp_path, judgments):
    judgments.rename(columns={"query": "Query", "title": " Title "}).to_csv(tmp_path / "j.csv", index=False)
    with pytest.raises(TableError, match="--columns query=Query"):
        read_table(tmp_path / "j.csv", "judgments")
    found = read_table(tmp_path / "j.csv", "judgments", columns={"query": "Query", "title": "Title"})
    assert found["title"].tolist() == judgments["title"].tolist()


def test_a_mapped_column_of_the_schema_is_copied(judgments, clicks):
    found = read_table(judgments.drop(columns="query_id"), "judgments", columns={"query_id": "query"})
    assert (found["query_id"] == found["query"]).all()
    counted = clicks.drop(columns="weight").assign(users=range(1, len(clicks) + 1))
    assert read_table(counted, "clicks", columns={"weight": "users"})["weight"].sum() == counted["users"].sum()


def test_pairs_without_ids_get_them_from_their_texts(tmp_path, judgments, caplog):
    bare = judgments.drop(columns=["query_id", "doc_id"])
    bare.to_csv(tmp_path / "bare.csv", index=False)
    found = read_table(tmp_path / "bare.csv", "judgments")
    assert caplog.messages == [f"{tmp_path}/bare.csv has no query_id or doc_id: ids are made from the texts."]
    assert found["query_id"].nunique() == judgments["query_id"].nunique() and found["doc_id"].str.len().eq(16).all()
    bare.drop(columns="label").to_parquet(tmp_path / "pairs.parquet")
    pairs = Candidates(tmp_path / "pairs.parquet").read(0, len(bare)).to_pandas()
    assert pairs["doc_id"].tolist() == found["doc_id"].tolist()


def test_no_id_is_generated_if_another_column_may_contain_it(judgments):
    with pytest.raises(TableError, match=r"needs the column\(s\) query_id; it has: qid, .*--columns query_id=YOURS"):
        read_table(judgments.rename(columns={"query_id": "qid"}), "judgments")
    assert len(read_table(judgments.rename(columns={"query_id": "qid"}), "judgments", columns={"query_id": "qid"}))


def test_a_stream_is_renamed(tmp_path, export, judgments):
    export.to_parquet(tmp_path / "export.parquet")
    found = load_groups(str(tmp_path / "export.parquet"), split="train", streaming=True, columns=NAMES)
    assert list(found) == load_groups(judgments, split="train").to_list()


def test_a_stream_says_once_that_it_makes_ids(tmp_path, judgments, caplog, monkeypatch):
    monkeypatch.setattr("hf_disranker.data.groups._CHUNK", 10)
    judgments.drop(columns="query_id").to_parquet(tmp_path / "bare.parquet")
    assert len(list(load_groups(tmp_path / "bare.parquet", streaming=True))) == judgments["query_id"].nunique()
    assert caplog.messages == [f"{tmp_path}/bare.parquet has no query_id: ids are made from the texts."]


def test_the_hint_names_the_argument_of_python_too(judgments):
    with pytest.raises(TableError, match=r"--columns query=Query \(in Python: columns=\{'query': 'Query'\}\)"):
        load_groups(judgments.rename(columns={"query": "Query"}))


# Ids made from texts must not join what is not the same.


def test_two_documents_of_one_text_are_refused_without_ids(judgments):
    twice = pd.concat([judgments.head(2), judgments.head(1).assign(doc_id="other")])
    assert len(read_table(twice, "judgments")) == 3
    with pytest.raises(TableError, match="repeat a"):
        read_table(twice.drop(columns="doc_id"), "judgments")


@pytest.mark.parametrize("ids", ["query_id", "doc_id"])
def test_a_run_with_ids_of_another_source_is_refused(judgments, ids):
    made = read_table(judgments.drop(columns=ids), "judgments")
    run = judgments.assign(teacher_score=1.0)
    with pytest.raises(TableError, match="do the ids come from the same source"):
        join_run(made, read_run(run))


def test_a_corpus_without_ids_does_not_fit_pairs_with_ids(judgments, corpus):
    pairs = judgments[["query_id", "query", "doc_id"]]
    with pytest.raises(TableError, match="doc_id that is not in the corpus"):
        read_table(pairs, "candidates", corpus=corpus.drop(columns="doc_id"))


def test_teachers_with_and_without_ids_are_not_averaged(judgments):
    scores = judgments.drop(columns="label").assign(teacher_score=1.0)
    with pytest.raises(TableError, match="scores other pairs"):
        load_groups([scores, scores.drop(columns="doc_id")])
