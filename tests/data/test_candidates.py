"""Candidates: rows of long tables, some at a time, checked before anything is spent."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_disranker.data.candidates import Candidates
from hf_disranker.data.schema import TableError
from hf_disranker.data.tables import read_table


@pytest.fixture
def files(tmp_path, candidates):
    """The candidates in three files of row groups of 4."""
    for number, start in enumerate((0, 20, 45)):
        part = candidates[start : [20, 45, 57][number]]
        part.to_parquet(tmp_path / f"{number}.parquet", index=False, row_group_size=4)
    return tmp_path


def test_any_slice_equals_that_of_the_whole_table(files, candidates, corpus):
    whole = read_table(candidates, "candidates", corpus=corpus)
    rows = Candidates(files, corpus)
    assert len(rows) == 57
    for start, stop in ((0, 57), (0, 1), (3, 9), (18, 47), (40, 57), (56, 80)):
        part = rows.read(start, stop)
        expected = whole[start:stop].reset_index(drop=True)
        pd.testing.assert_frame_equal(part.to_pandas(), expected, check_dtype=False)
        assert part.schema.field("rank").type == pa.int64()
    assert part.schema == rows.read(0, 1).schema


@pytest.mark.parametrize("kind", ["frame", "jsonl", "csv", "url"])
def test_every_kind_of_source_gives_the_same_rows_and_digest(kind, tmp_path, files, candidates, corpus):
    if kind == "jsonl":
        candidates.to_json(tmp_path / "c.jsonl", orient="records", lines=True)
    if kind == "csv":
        candidates.to_csv(tmp_path / "c.csv", index=False)
    if kind == "url":
        candidates.to_parquet(f"memory://{tmp_path.name}.parquet", index=False)
    paths = {"frame": candidates, "url": f"memory://{tmp_path.name}.parquet"}
    rows = Candidates(paths.get(kind, tmp_path / f"c.{kind}"), corpus)
    assert rows.read(50, 57)["doc_id"].to_pylist() == candidates["doc_id"][50:].tolist()
    assert rows.read(50, 57)["summary"].to_pylist() == corpus["summary"][50:].tolist()
    assert rows.check() == Candidates(files, corpus).check()


def test_the_digest_detects_every_change_of_ids_texts_and_order(candidates, corpus, judgments):
    texts = judgments[["query_id", "query", "doc_id", "title", "summary"]]
    moved = texts.copy()
    moved.loc[3, ["title", "summary"]] = [moved["title"][3] + " ", moved["summary"][3][1:]]
    digests = {
        name: Candidates(frame, words).check()
        for name, (frame, words) in {
            "texts": (texts, None),
            "order": (texts[::-1], None),
            "fewer": (texts[:50], None),
            "title": (texts.assign(title=["changed", *texts["title"][1:]]), None),
            "a letter from one column to the next": (moved, None),
            "joined": (candidates, corpus),
            "other corpus": (candidates, corpus.assign(summary=corpus["summary"] + ".")),
        }.items()
    }
    assert len(set(digests.values())) == len(digests)
    assert Candidates(texts.assign(market="fr")).check() == digests["texts"]


def test_texts_are_needed_and_documents_must_be_in_the_corpus(files, candidates, corpus):
    with pytest.raises(TableError, match="no title and summary; name the corpus"):
        Candidates(files)
    with pytest.raises(TableError, match=r"1 row\(s\) name a doc_id that is not in the corpus, first: d11-3"):
        Candidates(files, corpus[:-1]).check()


def test_a_duplicate_pair_is_found_anywhere_in_the_table(tmp_path, judgments, monkeypatch):
    monkeypatch.setattr("hf_disranker.data.candidates._CHUNK", 10)
    rows = tmp_path / "rows.parquet"
    pd.concat([judgments, judgments[4:5]]).to_parquet(rows, index=False)
    with pytest.raises(TableError, match=r"1 row\(s\) repeat a \(query_id, doc_id\); first: rows 4, 57"):
        Candidates(rows).check()


def test_errors_name_rows_of_the_whole_table(judgments, monkeypatch):
    monkeypatch.setattr("hf_disranker.data.candidates._CHUNK", 10)
    rows = judgments.assign(query_id=[None if at == 33 else name for at, name in enumerate(judgments["query_id"])])
    rows.to_parquet("memory://rows.parquet", index=False)
    with pytest.raises(TableError, match="column 'query_id' .* First: row 33"):
        Candidates("memory://rows.parquet").check()


@pytest.mark.parametrize("damage", ["cut off", "no parquet", "empty"])
def test_a_damaged_file_is_named_before_anything_is_read(files, corpus, damage):
    path = files / "1.parquet"
    content = path.read_bytes()
    path.write_bytes({"cut off": content[: len(content) // 2], "no parquet": b"x" * 5000, "empty": b""}[damage])
    with pytest.raises(TableError, match=r"1\.parquet: cannot be read as parquet"):
        Candidates(files, corpus)


def test_a_damaged_page_is_found_by_the_check(files, corpus):
    path = files / "1.parquet"
    content = bytearray(path.read_bytes())
    content[4:400] = bytes(396)
    path.write_bytes(content)
    with pytest.raises(TableError, match=r"1\.parquet: cannot be read as parquet"):
        Candidates(files, corpus).check()


def test_a_row_group_is_read_once_in_a_row(files, corpus, monkeypatch):
    rows, read = Candidates(files, corpus), []
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", _noting(read))
    for start in range(57):
        rows.read(start, start + 1)
    assert len(read) == 5 + 7 + 3 - 1  # the first was read for its columns


def _noting(read):
    original = pq.ParquetFile.read_row_group

    def read_row_group(self, number):
        read.append(number)
        return original(self, number)

    return read_row_group


def test_integer_ids_count_as_strings_and_zero_is_one(judgments):
    rows = judgments.assign(doc_id=np.arange(57))
    assert Candidates(rows).read(0, 2)["doc_id"].to_pylist() == ["0", "1"]
    assert Candidates(rows).check() == Candidates(rows.astype({"doc_id": str})).check()


def test_a_named_index_is_a_column_and_another_is_dropped(tmp_path, judgments):
    rows = judgments.drop(columns=["label", "split"])
    rows[::2].to_parquet(tmp_path / "rows.parquet")
    assert Candidates(tmp_path / "rows.parquet").read(0, 9).column_names == list(rows.columns)
    rows.set_index(["query_id", "doc_id"]).to_parquet(tmp_path / "rows.parquet")
    assert Candidates(tmp_path / "rows.parquet").check() == Candidates(rows).check()


def test_a_title_column_in_upper_case_is_refused(tmp_path, judgments):
    judgments.rename(columns={"title": "Title"}).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(TableError, match="the column 'Title' is called 'title' here"):
        Candidates(tmp_path / "rows.parquet")
