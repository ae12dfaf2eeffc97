"""Tables as data sets on the Hub."""

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from hub_server import Handler
from huggingface_hub import DatasetCard, HfApi

from hf_disranker import load_groups, push_table, read_table
from hf_disranker.hub import PushError
from hf_disranker.schema import TableError


@pytest.fixture
def scores(judgments):
    rows = judgments.drop(columns=["label", "split"])
    return rows.assign(teacher_score=np.linspace(-2, 2, len(rows)).astype("float32"))


@pytest.fixture
def tables(judgments, clicks, corpus, candidates, scores):
    return {"judgments": judgments, "clicks": clicks, "corpus": corpus, "candidates": candidates, "scores": scores}


@pytest.mark.parametrize("table", ["judgments", "clicks", "corpus", "candidates", "scores"])
def test_a_table_comes_back_with_its_types(tables, table, corpus, hub):
    repo, frame = f"tester/{table}", tables[table].reset_index(drop=True)
    push_table(frame, table, repo, private=None)
    texts = corpus if table == "candidates" else None
    expected = read_table(frame, table, corpus=texts)
    found = read_table(repo, table, corpus=texts)[list(expected.columns)]
    pd.testing.assert_frame_equal(found, expected)
    assert HfApi().dataset_info(repo).private is (table in ("clicks", "scores"))
    push_table(frame, table, f"{repo}-open", private=False)
    assert not HfApi().dataset_info(f"{repo}-open").private
    features = next(iter(load_dataset(repo).values())).features
    wanted = {"label": "int64", "teacher_score": "float32", "weight": "float64", "rank": "int64"}
    assert {name: kind.dtype for name, kind in features.items()} == {
        name: wanted.get(name, "string") for name in frame.columns
    }
    card = DatasetCard.load(repo)
    assert {"hf-disranker", table} <= set(card.data.tags) and card.data.task_categories == ["text-ranking"]
    assert card.data["dataset_info"]["features"] and f'read_table("{repo}", "{table}")' in card.text


def test_groups_load_by_split_and_streaming(judgments, hub):
    push_table(judgments, "judgments", "tester/groups")
    whole = load_groups(judgments, split="dev")
    loaded = load_groups("tester/groups", split="dev")
    assert loaded.to_list() == whole.to_list() and loaded.info.dataset_name == "tester/groups"
    assert list(load_groups("tester/groups", split="dev", streaming=True)) == whole.to_list()
    assert list(load_groups("tester/groups", streaming=True)) == load_groups(judgments).to_list()


def test_streaming_reads_parquet_and_hub_addresses_in_chunks(scores, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_disranker.data._CHUNK", 10)
    scores.to_parquet(tmp_path / "scores.parquet")
    push_table(scores, "scores", "tester/streamed")
    expected = load_groups(scores).to_list()
    address = "hf://datasets/tester/streamed/data/train-00000-of-00001.parquet"
    for source in (tmp_path, tmp_path / "scores.parquet", "tester/streamed", address):
        assert list(load_groups(source, streaming=True)) == expected
    assert load_groups(address).to_list() == expected


def test_a_stream_reads_no_further_than_it_is_asked(scores, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_disranker.data._CHUNK", 10)
    scores.to_parquet(tmp_path / "scores.parquet")
    read = []
    monkeypatch.setattr("hf_disranker.data.pq.ParquetFile", lambda file: Counted(file, read))
    groups = iter(load_groups(tmp_path / "scores.parquet", streaming=True))
    first = next(groups)
    assert first["query_id"] == scores["query_id"].iloc[0] and sum(read) <= 20 < len(scores)
    assert len(list(groups)) == scores["query_id"].nunique() - 1 and sum(read) == len(scores)


class Counted:
    stock = pq.ParquetFile

    def __init__(self, file, read):
        self.file, self.read = self.stock(file), read

    @property
    def num_row_groups(self):
        return self.file.num_row_groups

    def iter_batches(self, size, row_groups):
        for batch in self.file.iter_batches(size, row_groups=row_groups):
            self.read.append(len(batch))
            yield batch


def test_what_cannot_be_streamed_is_said(scores, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_disranker.data._CHUNK", 2)
    scores.iloc[::-1].sort_values("doc_id", key=lambda ids: ids.str[-1]).to_parquet(tmp_path / "apart.parquet")
    with pytest.raises(TableError, match="stand apart: sort by query_id"):
        list(load_groups(tmp_path / "apart.parquet", streaming=True))
    with pytest.raises(ValueError, match="holds its own texts"):
        load_groups(scores, streaming=True)
    with pytest.raises(TableError, match="no row has split 'nowhere'"):
        list(load_groups(tmp_path / "apart.parquet", split="nowhere", streaming=True))


def test_a_card_of_another_origin_is_kept(judgments, hub):
    HfApi().create_repo("tester/described", repo_type="dataset")
    card = b"---\ntags: [mine]\n---\n# What we learned\n"
    HfApi().upload_file(
        repo_id="tester/described", repo_type="dataset", path_in_repo="README.md", path_or_fileobj=card
    )
    push_table(judgments, "judgments", "tester/described")
    found = DatasetCard.load("tester/described")
    assert "# What we learned" in found.text and found.data["dataset_info"]["features"]
    for rows in (judgments, judgments[judgments["split"] == "dev"]):
        push_table(rows, "judgments", "tester/described-here")
    assert f"{len(rows):,} rows in dev. " in DatasetCard.load("tester/described-here").text


def test_a_wrong_table_is_not_pushed(judgments, hub):
    with pytest.raises(TableError, match="needs the column"):
        push_table(judgments.drop(columns="label"), "judgments", "tester/wrong")
    assert ("dataset", "tester/wrong") not in hub.repos


def test_a_push_that_is_cut_off_leaves_the_last_rows(scores, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    push_table(scores, "scores", "tester/rows")
    with monkeypatch.context() as context:
        context.setattr(Handler, "do_PUT", lambda self: self.connection.close())
        with pytest.raises(PushError, match="rows was cut off .* loads as before. To go on, push again") as error:
            push_table(scores.assign(teacher_score=1.0), "scores", "tester/rows", token=hub.token)
    assert hub.token not in str(error.value)
    assert read_table("tester/rows", "scores")["teacher_score"].tolist() == scores["teacher_score"].tolist()
