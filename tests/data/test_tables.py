"""Readers, and grouping by query."""

import gzip
import logging
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, DatasetDict

from hf_disranker.data import groups, tables
from hf_disranker.data.groups import load_groups
from hf_disranker.data.schema import TableError
from hf_disranker.data.tables import read_table, write_table

# The queries take turns, "0" and "007" are ids, "NA" is a text, and a row may hold whatever people write.
ROWS = pd.DataFrame(
    [
        ("0", "red car", "d1", "Car", "A red one.", 2, "train", "fr"),
        ("007", "東京 タワー 🗼", "d1", "Car", "A red one.", 0, "dev", "jp"),
        ("0", "red car", "007", "NA", 'He said: "no,\nnever".', 0, "train", ""),
        ("007", "東京 タワー 🗼", "0", "", "Ünï©ødé, שלום {title} 🚗" + "x" * 100_000, 1, "dev", "jp"),
        ("0", "red car", "d2", "None", "null", 1, "train", "de"),
    ],
    columns=["query_id", "query", "doc_id", "title", "summary", "label", "split", "market"],
)


def parquet(frame, folder):
    frame.to_parquet(folder / "rows.parquet")
    return str(folder / "rows.parquet")


def jsonl(frame, folder):
    frame.to_json(folder / "rows.jsonl", orient="records", lines=True, force_ascii=False)
    return str(folder / "rows.jsonl")


def csv(frame, folder):
    frame.to_csv(folder / "rows.csv", index=False)
    return str(folder / "rows.csv")


def folder_of_parquet(frame, folder):
    shards = folder / "scores [1]"
    shards.mkdir()
    frame[:2].to_parquet(shards / "part-00000.parquet")
    frame[2:].to_parquet(shards / "part-00001.parquet")
    (shards / "part-00002.parquet.tmp").write_bytes(b"torn")
    (shards / "manifest.json").write_text("{}")
    return str(shards)


def url(frame, folder):
    frame.to_csv("memory://tables/rows.csv", index=False)
    return "memory://tables/rows.csv"


SOURCES = {
    "parquet": parquet,
    "jsonl": jsonl,
    "csv": csv,
    "folder": folder_of_parquet,
    "url": url,
    "path object": lambda frame, folder: folder / parquet(frame, folder),
    "dataset": lambda frame, folder: Dataset.from_pandas(frame),
    "frame": lambda frame, folder: frame,
}


@pytest.fixture
def hub(monkeypatch):
    """A Hub that holds the data sets of this dict, and fails for others as the real one does."""
    sets = {}

    def load_dataset(name, streaming):
        if name not in sets:
            raise ConnectionError("cannot be reached")
        return sets[name]

    monkeypatch.setattr(tables, "load_dataset", load_dataset)
    return sets


@pytest.mark.parametrize("kind", SOURCES)
def test_every_format_gives_the_same_rows(kind, tmp_path):
    read = read_table(SOURCES[kind](ROWS, tmp_path), "judgments")
    assert read["label"].dtype == np.int64
    pd.testing.assert_frame_equal(read, ROWS, check_dtype=False)


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv", "dataset"])
def test_integer_ids_are_read_as_strings(kind, tmp_path):
    frame = ROWS.assign(query_id=[0, 7, 0, 7, 0], doc_id=[0, 0, 1, 1, 2**60 + 1])
    read = read_table(SOURCES[kind](frame, tmp_path), "judgments")
    assert read["query_id"].tolist() == ["0", "7", "0", "7", "0"]
    assert read["doc_id"].tolist() == ["0", "0", "1", "1", "1152921504606846977"]


def test_the_splits_of_a_hub_data_set_become_the_split_column(hub):
    rows = ROWS.drop(columns="split")
    train, dev = rows[ROWS["split"] == "train"], rows[ROWS["split"] == "dev"]
    hub["org/set"] = DatasetDict(
        {part: Dataset.from_pandas(frame, preserve_index=False) for part, frame in (("train", train), ("dev", dev))}
    )
    assert load_groups("org/set", split="dev")["query_id"] == ["007"]
    assert load_groups("org/set")["query_id"] == ["0", "007"]


def test_the_split_column_of_a_hub_data_set_is_kept(hub):
    hub["org/set"] = DatasetDict({"train": Dataset.from_pandas(ROWS)})
    assert load_groups("org/set", split="dev")["query_id"] == ["007"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/file.parquet", "no/such/file.parquet: no such file or folder."),
        ("no/file.csv", "no/file.csv: no such file or folder."),
        ("memory://no/file.csv", "memory://no/file.csv: no such file or folder."),
        ("s4://bucket/file.csv", "s4://bucket/file.csv: Protocol not known: s4"),
        ("org/no_set", "org/no_set: no such file or folder, and no such data set could be read from the Hub "),
    ],
)
def test_a_wrong_path_is_named(hub, source, message):
    with pytest.raises(FileNotFoundError) as error:
        read_table(source, "judgments")
    assert str(error.value).startswith(message)


def test_a_folder_without_parquet_is_refused(tmp_path):
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"the folder has no parquet file; it has: state\.json\."):
        read_table(str(tmp_path), "judgments")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.parquet", b"", "empty.parquet: the file is empty."),
        ("empty.jsonl", b"", "empty.jsonl: the file is empty."),
        ("empty.csv", b"", "empty.csv: the file is empty."),
        ("torn.parquet", b"PAR1 and no more", "torn.parquet: cannot be read as parquet: "),
        ("torn.jsonl", b'{"doc_id": "1", "titl', "torn.jsonl: cannot be read as jsonl: "),
        ("latin.csv", "doc_id,title\n1,a\n2,é\n".encode("latin-1"), "line 3 is not UTF-8 but probably CP1252"),
        ("latin.jsonl", '{"doc_id": "1"}\n{"doc_id": "é"}\n'.encode("latin-1"), "latin.jsonl: line 2 is not UTF-8"),
        ("gbk.csv", "doc_id,title,summary\n1,如何,b\n".encode("gbk"), "2 is not UTF-8 but probably GB18030"),
        ("excel.csv", "doc_id,title,summary\n1,a,b\n".encode("utf-16"), "it is UTF-16: save it as UTF-8"),
        ("no_mark.csv", "标题,doc_id,title,summary\n".encode("utf-16-le"), "it is UTF-16: save it as UTF-8"),
        ("packed.csv", b"\x1f\x8b\x08\x00", "it is compressed by gzip: let its name end in .gz"),
        ("book.csv", b"PK\x03\x04\x14\x00\x06\x00", "it is a zip archive or an Excel workbook: export it as csv"),
        ("wide.csv", b"doc_id,title,summary\n1,a,b,\n2,c,d,\n", "csv: line 2 has 4 fields, the header 3: a text with"),
        ("uneven.csv", b"doc_id,title,summary\n1,a,b\n2,c,d,e\n", "uneven.csv: cannot be read as csv: line 3 has 4 "),
        ("short.csv", b'doc_id,title,summary\n\n1,"a\nb",c\n2,d\n', "line 5 has 2 fields, the header 3: is the row"),
        ("quote.csv", b'doc_id,title,summary\n1,a,b\n2,"c,d\n3,"e",f\n', "quotes of the row in line 3 do not match"),
        ("open.csv", b'doc_id,title,summary\n1,a,"b\n2,c,d\n', "double quotes of the row in line 2 do not match"),
        ("semicolon.csv", b"doc_id;title;summary\n1;a, b, c, d;b\n", "its fields are separated by semicolons: save"),
        ("tab.csv", b"doc_id\ttitle\tsummary\n1\ta\tb\n", "its fields are separated by tabs: save it with commas"),
        ("double.csv", b"doc_id,title,summary,title\n1,a,b,c\n", "its header names the column 'title' twice."),
        ("upper.csv", b"doc_id,title,SUMMARY\n1,a,b\n", "upper.csv: the column 'SUMMARY' is called 'summary' here: "),
        ("padded.csv", b"doc_id, title,summary\n1,a,b\n", "rename it, or --columns title=title (in Python: "),
        ("array.jsonl", b'[{"doc_id": "1"},\n{"doc_id": "2"}]\n', "line 1 is not JSON"),
        ("values.jsonl", b'{"doc_id": "1"}\n\n"2"\n', "line 3 is not a JSON object; each line is one."),
        ("notes.csv.gz", b"doc_id,title,summary\n", "notes.csv.gz: cannot be read as csv: Not a gzipped file"),
        ("head.csv", b"doc_id,title,summary\n", "head.csv: the corpus table has no rows."),
        ("names.csv", b"id,title,summary\n1,a,b\n", "a corpus table needs the column(s) doc_id; it has: id, title, "),
        ("twice.csv", b"doc_id,title,summary\n0,a,b\n007,c,d\n0,e,f\n", "First: line 4: {'doc_id': '0'}."),
        ("rows.xlsx", b"PK", "rows.xlsx: a table is one of .parquet, .jsonl, .csv, or a folder of parquet files."),
    ],
)  # fmt: skip
def test_a_bad_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TableError) as error:
        read_table(str(tmp_path / name), "corpus")
    assert name in str(error.value) and message in str(error.value)


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_errors_name_the_line_that_an_editor_shows(ending, tmp_path):
    text = {
        "csv": 'query,title,summary,weight\n,A,one,1\n\nred,"B\nb",two,1\nred,C,three,-1\n',
        "jsonl": '{"query": "", "title": "A", "summary": "", "weight": 1}\n\n'
        '{"query": "red", "title": "B", "summary": "", "weight": 1}\n'
        '{"query": "red", "title": "C", "summary": "", "weight": -1}\n',
    }
    (tmp_path / f"c.{ending}").write_text(text[ending])
    with pytest.raises(TableError, match=f"have a negative number. First: line {6 if ending == 'csv' else 4}: "):
        read_table(tmp_path / f"c.{ending}", "clicks")


def test_a_query_with_a_line_break_is_reported(tmp_path, caplog):
    (tmp_path / "c.csv").write_text('query,title,summary\nred,A,one\n"blue,B,two\ngreen",C,three\n')
    assert len(read_table(tmp_path / "c.csv", "clicks")) == 2
    assert "1 quer(ies) have a line break, as if a stray double quote had joined lines; first: line 3: " in caplog.text


@pytest.mark.parametrize("name", ["clicks", "Count"])
def test_a_weight_of_another_name_is_reported(clicks, caplog, name):
    read_table(clicks.rename(columns={"weight": name}), "clicks")
    message = f"<DataFrame>: the column '{name}' is not read. If it counts clicks: --columns weight={name} ("
    message += f"in Python: columns={ {'weight': name} })."
    assert caplog.messages == [message]
    caplog.clear()
    read_table(clicks.assign(count=1), "clicks")
    assert not caplog.messages


@pytest.mark.parametrize("name", ["ROWS.CSV", "rows.csv.gz", "rows.jsonl.gz", "bom.csv", "bom.jsonl", "dos.csv"])
def test_endings_gzip_marks_and_line_ends_do_not_matter(name, tmp_path):
    write = jsonl if "jsonl" in name else csv
    content = Path(write(ROWS, tmp_path)).read_bytes()
    content = content.replace(b"\n", b"\r\n") if name == "dos.csv" else content
    content = gzip.compress(content) if name.endswith(".gz") else content
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" * ("bom" in name) + content)
    expected = ROWS if name != "dos.csv" else ROWS.assign(summary=ROWS["summary"].str.replace("\n", "\r\n"))
    pd.testing.assert_frame_equal(read_table(tmp_path / name, "judgments"), expected, check_dtype=False)


def test_a_named_index_is_a_column(tmp_path, corpus, candidates):
    corpus.set_index("doc_id").to_parquet(tmp_path / "corpus.parquet")
    expected = corpus.reset_index(drop=True)
    for source in (tmp_path / "corpus.parquet", corpus.set_index("doc_id")):
        pd.testing.assert_frame_equal(read_table(source, "corpus"), expected, check_dtype=False)
    rows = candidates.assign(teacher_score=1.0, title="", summary="").set_index(["query_id", "doc_id"])
    rows.to_parquet(tmp_path / "scores.parquet")
    assert list(load_groups(tmp_path / "scores.parquet", streaming=True)) == load_groups(rows).to_list()


def test_a_dict_of_splits_reads_as_one_table():
    rows = Dataset.from_pandas(ROWS.drop(columns="split"))
    parts = DatasetDict(train=rows.select([0, 1]), test=rows.select([2, 3, 4]))
    assert read_table(parts, "judgments", split="test")["doc_id"].tolist() == ["007", "0", "d2"]
    with pytest.raises(TypeError, match="A table is a path, a Hub id, a Dataset, a DatasetDict or a DataFrame, not "):
        read_table([ROWS], "judgments")


def test_unstreamable_tables_are_refused_before_the_first_row(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no/such/scores.parquet: no such file or folder\."):
        load_groups("no/such/scores.parquet", streaming=True)
    with pytest.raises(TableError, match=r"rows\.csv: only parquet can be streamed\."):
        load_groups(csv(ROWS, tmp_path), streaming=True)


def test_errors_of_a_stream_count_all_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(groups, "_CHUNK", 2)
    rows = ROWS.sort_values("query_id").assign(label=[1, 1, 0, 0, -1])
    with pytest.raises(TableError, match=r"First: row 4: -1\."):
        list(load_groups(parquet(rows, tmp_path), streaming=True))


def test_a_split_selects_its_rows_and_an_unknown_one_is_refused():
    assert read_table(ROWS, "judgments", split="dev")["query_id"].tolist() == ["007", "007"]
    assert len(read_table(ROWS, "judgments", split="")) == len(ROWS)
    with pytest.raises(TableError, match="no row has split 'test'; there are: dev, train."):
        read_table(ROWS, "judgments", split="test")
    with pytest.raises(TableError, match="there is no column 'split' to take 'dev' from"):
        read_table(ROWS.drop(columns="split"), "judgments", split="dev")


def test_a_split_of_any_table_is_a_text():
    with pytest.raises(TableError, match="column 'split' of the candidates table: 5 row.s. have no text"):
        read_table(ROWS.assign(split=1), "candidates", split="dev")


def test_candidates_take_their_texts_from_the_corpus(candidates, corpus, judgments):
    joined = read_table(candidates, "candidates", corpus=corpus.sample(frac=1, random_state=0))
    expected = judgments[["query_id", "query", "doc_id", "title", "summary"]]
    pd.testing.assert_frame_equal(joined[list(expected.columns)], expected, check_dtype=False)
    assert joined["rank"].tolist() == candidates["rank"].tolist()


def test_a_document_missing_from_the_corpus_is_named(candidates, corpus):
    with pytest.raises(TableError, match=r"2 row\(s\) name a doc_id that is not in the corpus, first: d0-1, d3-2\."):
        read_table(candidates, "candidates", corpus=corpus[~corpus["doc_id"].isin(["d0-1", "d3-2"])])
    with pytest.raises(TableError, match="the rows have no title and summary; name the corpus with the texts"):
        read_table(candidates, "candidates")


def test_documents_without_any_text_are_kept_and_counted(caplog):
    frame = ROWS.assign(title=["", " ", "x", "", ""], summary=["", "\n", "", "y", ""])
    with caplog.at_level(logging.WARNING, "hf_disranker"):
        assert len(read_table(frame, "judgments")) == len(ROWS)
    assert caplog.messages == ["<DataFrame>: 3 document(s) have neither title nor summary."]


def test_groups_match_hand_example():
    groups = load_groups(ROWS)
    assert groups.column_names == ["query_id", "query", "doc_ids", "titles", "summaries", "labels"]
    assert groups[0] == {
        "query_id": "0",
        "query": "red car",
        "doc_ids": ["d1", "007", "d2"],
        "titles": ["Car", "NA", "None"],
        "summaries": ["A red one.", 'He said: "no,\nnever".', "null"],
        "labels": [2, 0, 1],
    }
    assert groups[1]["doc_ids"] == ["d1", "0"]
    assert len(groups[1]["summaries"][1]) > 100_000 and groups[1]["labels"] == [0, 1]
    assert len(groups) == 2


def test_groups_of_scores_have_teacher_scores_in_float32():
    scores = [0.1, -7, 2.5, 3, 4]
    groups = load_groups(ROWS.drop(columns="label").assign(teacher_score=scores))
    assert "labels" not in groups.column_names
    assert groups["teacher_scores"] == [[np.float32(0.1), 2.5, 4.0], [-7.0, 3.0]]
    assert groups.features["teacher_scores"].feature.dtype == "float32"
    assert "labels" in load_groups(ROWS.assign(teacher_score=scores)).column_names


def test_a_query_with_one_document_is_a_group():
    groups = load_groups(ROWS.iloc[[0, 1, 2]])
    assert groups["doc_ids"] == [["d1", "007"], ["d1"]]


@pytest.mark.parametrize("start", ["{tmp}/new/folder/", "memory://written/"])
def test_a_written_table_round_trips(tmp_path, start):
    path = start.format(tmp=tmp_path) + "rows.parquet"
    write_table(ROWS.iloc[[3, 1]], path)
    pd.testing.assert_frame_equal(
        read_table(path, "judgments"), ROWS.iloc[[3, 1]].reset_index(drop=True), check_dtype=False
    )
    assert fsspec.core.url_to_fs(path)[0].exists(path)


def test_clicks_without_a_query_are_left_out_and_counted(clicks, caplog):
    rows = pd.concat([clicks, clicks[:2].assign(query=[" ", None])])
    read = read_table(rows, "clicks")
    pd.testing.assert_frame_equal(read, clicks, check_dtype=False)
    assert caplog.messages == ["<DataFrame>: 2 click(s) have no query and are left out."]


def test_scores_of_several_teachers_are_averaged(judgments):
    first = judgments.assign(teacher_score=np.arange(len(judgments), dtype=np.float32))
    second = first.assign(teacher_score=first["teacher_score"] * 3).sample(frac=1, random_state=0)
    groups = load_groups([first, second])
    expected = load_groups(first.assign(teacher_score=first["teacher_score"] * 2))
    assert groups.to_list() == expected.to_list()
    with pytest.raises(TableError, match="scores other pairs"):
        load_groups([first, second[1:]])
    with pytest.raises(TableError, match="scores other pairs"):
        load_groups([first[1:], second])
