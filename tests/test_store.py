"""ScoreStore: whole shards or none, and never two runs in one folder."""

import logging

import pytest

from hf_disranker.store import ScoreStore, teacher_of

MANIFEST = {
    "teacher": "runs/teacher",
    "revision": None,
    "weights": "a1",
    "pairs": 5,
    "shard_rows": 2,
    "templates": {"query": "{query}"},
}


@pytest.fixture
def rows(judgments):
    """A scores table of 5 pairs."""
    return judgments[:5].assign(teacher_score=[0.5, -1.0, 2.0, 3.25, 0.0])


@pytest.fixture(params=["folder", "url"])
def store(request, tmp_path):
    path = tmp_path / "runs" / "scores" if request.param == "folder" else f"memory://{tmp_path.name}/scores/"
    return ScoreStore(path)


def test_shards_read_back_as_one_table_in_their_order(store, rows):
    store.open(MANIFEST)
    for shard in (2, 0, 1):
        store.write(shard, rows[2 * shard : 2 * shard + 2])
    read = store.read()
    assert read["doc_id"].tolist() == rows["doc_id"].tolist()
    assert read["teacher_score"].tolist() == [0.5, -1.0, 2.0, 3.25, 0.0]
    assert read["split"].tolist() == rows["split"].tolist()


def test_what_is_missing_is_known_and_told(store, rows, caplog):
    store.open(MANIFEST)
    assert store.missing() == 5 and not store.has(1)
    store.write(1, rows[2:4])
    assert store.has(1) and not store.has(0) and store.missing() == 3
    with caplog.at_level(logging.WARNING, "hf_disranker"):
        assert len(store.read()) == 2
    assert caplog.messages == [f"{store.path} lacks the scores of 3 pairs: the run is not finished."]
    store.write(2, rows[4:])
    assert store.missing() == 2


def test_the_same_run_may_go_on(store, rows):
    store.open(MANIFEST)
    store.write(0, rows[:2])
    again = ScoreStore(store.path)
    again.open(dict(MANIFEST))
    assert again.has(0) and again.manifest() == MANIFEST
    # The same weights from another place, or after an upgrade of this package, are the same teacher.
    again.open({**MANIFEST, "teacher": "org/teacher", "hf_disranker": "9.9"})
    assert again.has(0)


def test_another_run_is_refused_with_the_differences(store):
    store.open(MANIFEST)
    with pytest.raises(ValueError) as error:
        store.open({**MANIFEST, "weights": "b2", "templates": {"query": "Q {query}"}, "dtype": "bfloat16"})
    assert str(error.value).splitlines() == [
        f"{store.path} holds the scores of another run; use a new folder.",
        "  dtype: None there, 'bfloat16' now",
        "  templates: {'query': '{query}'} there, {'query': 'Q {query}'} now",
        "  weights: 'a1' there, 'b2' now",
    ]
    assert store.manifest() == MANIFEST


def test_a_folder_with_other_tables_is_refused(tmp_path, rows):
    rows.to_parquet(tmp_path / "candidates.parquet")
    with pytest.raises(ValueError, match="holds parquet files and no manifest.json; use a new folder"):
        ScoreStore(tmp_path).open(MANIFEST)
    assert not (tmp_path / "manifest.json").exists()


def test_a_torn_file_of_a_crash_is_no_shard(tmp_path, rows):
    store = ScoreStore(tmp_path)
    store.open(MANIFEST)
    store.write(0, rows[:2])
    (tmp_path / "part-00001.parquet.tmp").write_bytes(b"PAR1 torn")
    assert not store.has(1) and len(store.read()) == 2
    store.write(1, rows[2:4])
    assert len(store.read()) == 4
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "manifest.json",
        "part-00000.parquet",
        "part-00001.parquet",
    ]


def test_a_shard_that_cannot_be_written_does_not_appear(tmp_path, rows):
    store = ScoreStore(tmp_path)
    store.open(MANIFEST)
    with pytest.raises(Exception, match="Conversion failed|Expected bytes|cannot be converted"):
        store.write(0, rows.assign(title=["text", 1, [2], {}, None]))
    assert not store.has(0)


def test_the_teacher_of_scores_is_known_where_a_manifest_tells(tmp_path, rows):
    store = ScoreStore(tmp_path / "scores")
    store.open(MANIFEST)
    with pytest.raises(ValueError, match="still lacks the scores of 5 pairs"):
        teacher_of(store.path)
    for shard in range(3):
        store.write(shard, rows[2 * shard : 2 * shard + 2])
    assert teacher_of(store.path) == {"id": "runs/teacher", "revision": None}
    rows.to_parquet(tmp_path / "scores.parquet")
    assert teacher_of(tmp_path / "scores.parquet") is None
