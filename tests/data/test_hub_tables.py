"""Tables that are data sets on the Hub, and streams of them."""

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from hf_disranker import load_groups, read_table
from hf_disranker.data.schema import TableError


@pytest.fixture
def scores(judgments):
    rows = judgments.drop(columns=["label", "split"])
    return rows.assign(teacher_score=np.linspace(-2, 2, len(rows)).astype("float32"))


@pytest.fixture
def tables(judgments, clicks, corpus, candidates, scores):
    return {"judgments": judgments, "clicks": clicks, "corpus": corpus, "candidates": candidates, "scores": scores}


def push(frame, repo):
    Dataset.from_pandas(frame, preserve_index=False).push_to_hub(repo, private=True)


@pytest.mark.parametrize("table", ["judgments", "clicks", "corpus", "candidates", "scores"])
def test_a_table_round_trips_with_its_types(tables, table, corpus, hub):
    repo, frame = f"tester/{table}", tables[table].reset_index(drop=True)
    push(frame, repo)
    texts = corpus if table == "candidates" else None
    expected = read_table(frame, table, corpus=texts)
    pd.testing.assert_frame_equal(read_table(repo, table, corpus=texts)[list(expected.columns)], expected)


def test_splits_become_a_column(judgments, hub):
    parts = {name: rows.drop(columns="split") for name, rows in judgments.groupby("split")}
    parts = {name: Dataset.from_pandas(rows, preserve_index=False) for name, rows in parts.items()}
    DatasetDict(parts).push_to_hub("tester/splits")
    dev = judgments[judgments["split"] == "dev"].reset_index(drop=True)
    found = read_table("tester/splits", "judgments", split="dev")[list(judgments.columns)]
    pd.testing.assert_frame_equal(found, read_table(dev, "judgments"))


def test_groups_load_by_split_and_streaming(judgments, hub):
    push(judgments, "tester/groups")
    whole = load_groups(judgments, split="dev")
    loaded = load_groups("tester/groups", split="dev")
    assert loaded.to_list() == whole.to_list() and loaded.info.dataset_name == "tester/groups"
    assert list(load_groups("tester/groups", split="dev", streaming=True)) == whole.to_list()
    assert list(load_groups("tester/groups", streaming=True)) == load_groups(judgments).to_list()


def test_streaming_reads_parquet_and_hub_addresses_in_chunks(scores, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_disranker.data.groups._CHUNK", 10)
    scores.to_parquet(tmp_path / "scores.parquet")
    push(scores, "tester/streamed")
    expected = load_groups(scores).to_list()
    address = "hf://datasets/tester/streamed/data/train-00000-of-00001.parquet"
    for source in (tmp_path, tmp_path / "scores.parquet", "tester/streamed", address):
        assert list(load_groups(source, streaming=True)) == expected
    assert load_groups(address).to_list() == expected


def test_a_stream_reads_no_further_than_it_is_asked(scores, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_disranker.data.groups._CHUNK", 10)
    scores.to_parquet(tmp_path / "scores.parquet")
    read, original = [], pq.ParquetFile.iter_batches

    def iter_batches(self, size, row_groups):
        for batch in original(self, size, row_groups=row_groups):
            read.append(len(batch))
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    groups = iter(load_groups(tmp_path / "scores.parquet", streaming=True))
    first = next(groups)
    assert first["query_id"] == scores["query_id"].iloc[0] and sum(read) <= 20 < len(scores)
    assert len(list(groups)) == scores["query_id"].nunique() - 1 and sum(read) == len(scores)


def test_unstreamable_tables_are_refused(scores, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_disranker.data.groups._CHUNK", 2)
    scores.iloc[::-1].sort_values("doc_id", key=lambda ids: ids.str[-1]).to_parquet(tmp_path / "apart.parquet")
    with pytest.raises(TableError, match="are not adjacent: sort by query_id"):
        list(load_groups(tmp_path / "apart.parquet", streaming=True))
    with pytest.raises(ValueError, match="a table with texts"):
        load_groups(scores, streaming=True)
    with pytest.raises(TableError, match="no row has split 'nowhere'"):
        list(load_groups(tmp_path / "apart.parquet", split="nowhere", streaming=True))
    scores.iloc[:0].to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(TableError, match="empty.parquet: the table has no rows"):
        list(load_groups(tmp_path / "empty.parquet", streaming=True))
