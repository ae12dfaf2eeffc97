"""ScoreStore: whole shards or none, and never two runs in one folder."""

import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from huggingface_hub import HfApi

from hf_disranker.scoring.store import ScoreStore, Summary, rate, teacher_of

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


def test_missing_pairs_are_counted_and_reported(store, rows, caplog):
    store.open(MANIFEST)
    assert store.missing() == 5 and store.shards() == set()
    store.write(1, rows[2:4])
    assert store.shards() == {1} and store.missing() == 3
    with caplog.at_level(logging.WARNING, "hf_disranker"):
        assert len(store.read()) == 2
    assert caplog.messages == [f"{store.path} lacks the scores of 3 pairs: the run is not finished."]
    store.write(2, rows[4:])
    assert store.missing() == 2


def test_the_same_run_can_resume(store, rows):
    store.open(MANIFEST)
    store.write(0, rows[:2])
    again = ScoreStore(store.path)
    again.open(dict(MANIFEST))
    assert again.shards() == {0} and again.manifest() == MANIFEST
    # The same weights from another place, or after an upgrade of this package, are the same teacher.
    again.open({**MANIFEST, "teacher": "org/teacher", "versions": {"torch": "9"}, "hf_disranker": "9.9"})
    assert again.shards() == {0}


def test_without_a_weights_digest_teachers_differ_by_name(store):
    served = {**MANIFEST, "weights": None, "engine": "tei"}
    store.open(served)
    with pytest.raises(ValueError, match="teacher: 'runs/teacher' there, 'org/other' now"):
        store.open({**served, "teacher": "org/other"})


def test_another_run_is_refused_with_the_differences(store):
    store.open(MANIFEST)
    with pytest.raises(ValueError) as error:
        store.open({**MANIFEST, "weights": "b2", "templates": {"query": "Q {query}"}, "dtype": "bfloat16"})
    assert str(error.value).splitlines() == [
        f"{store.path} contains the scores of another run; use a new folder.",
        "  dtype: not known there, 'bfloat16' now",
        "  templates: {'query': '{query}'} there, {'query': 'Q {query}'} now",
        "  weights: 'a1' there, 'b2' now",
    ]
    assert store.manifest() == MANIFEST


def test_differing_config_fields_are_listed(store):
    store.open({**MANIFEST, "config": {"model_type": "bert", "hidden_act": "relu", "vocab_size": 9}})
    with pytest.raises(ValueError) as error:
        store.open({**MANIFEST, "config": {"model_type": "bert", "layer_norm_eps": 0.1, "vocab_size": 8}})
    assert str(error.value).splitlines()[1:] == [
        "  config.hidden_act: 'relu' there, default now",
        "  config.layer_norm_eps: default there, 0.1 now",
        "  config.vocab_size: 9 there, 8 now",
    ]


def test_a_folder_with_other_tables_is_refused(tmp_path, rows):
    rows.to_parquet(tmp_path / "candidates.parquet")
    with pytest.raises(ValueError, match="contains parquet files and no manifest.json; use a new folder"):
        ScoreStore(tmp_path).open(MANIFEST)
    assert not (tmp_path / "manifest.json").exists()


def test_a_leftover_temporary_file_is_not_a_shard(tmp_path, rows):
    store = ScoreStore(tmp_path)
    store.open(MANIFEST)
    store.write(0, rows[:2])
    (tmp_path / "part-000001.parquet.0a1b.tmp").write_bytes(b"PAR1 torn")
    assert store.shards() == {0} and len(store.read()) == 2
    store.write(1, rows[2:4])
    assert len(store.read()) == 4
    assert sorted(file.name for file in tmp_path.glob("*t")) == ["part-000000.parquet", "part-000001.parquet"]


def test_a_shard_that_cannot_be_written_does_not_appear(tmp_path, rows):
    store = ScoreStore(tmp_path)
    store.open(MANIFEST)
    with pytest.raises(Exception, match="Conversion failed|Expected bytes|cannot be converted"):
        store.write(0, rows.assign(title=["text", 1, [2], {}, None]))
    assert store.shards() == set()


QUARANTINED = pa.table({"query_id": ["q0"], "doc_id": ["d0-9"], "reason": ["empty document"]})


def test_quarantined_pairs_are_kept_out_of_training(store, rows):
    store.open(MANIFEST)
    store.write(0, rows[:1], QUARANTINED)
    store.write(1, rows[2:4])
    store.write(2, rows[4:4], QUARANTINED.slice(0, 0))
    assert store.missing() == 0 and len(store.read()) == 3
    assert [group["query_id"] for group in store.groups()] == ["q0", "q1"]
    apart = pd.read_parquet(f"{store.path}/quarantine.parquet")
    assert apart.to_dict("records") == [{"query_id": "q0", "doc_id": "d0-9", "reason": "empty document"}]
    assert store.summary().quarantined == {"empty document": 1}


def test_a_pair_scored_later_leaves_the_quarantine(store, rows):
    store.open(MANIFEST)
    store.write(0, rows[:1], QUARANTINED)
    store.write(0, rows[:2])
    assert not list(Path(store.path).glob("quarantine.parquet/*")) and store.summary().quarantined == {}


def test_the_footers_add_up(store, judgments):
    scores = np.random.default_rng(0).normal(2, 3, 57).astype(np.float32)
    store.open({**MANIFEST, "pairs": 57, "shard_rows": 20})
    for shard in range(3):
        part = slice(20 * shard, 20 * shard + 20)
        store.write(shard, judgments[part].assign(teacher_score=scores[part]))
    summary = store.summary()
    assert (summary.scored, summary.quarantined) == (57, {})
    assert summary.mean == pytest.approx(scores.mean(), abs=1e-6)
    assert summary.std == pytest.approx(scores.std(), abs=1e-6)


def record(shard, started, ended, worker="0 of 1"):
    return {"shard": shard, "pairs": 2, "tokens": 40, "started": started, "ended": ended, "worker": worker}


def test_the_status_reports_progress_rate_and_failures(store, rows):
    store.open(MANIFEST)
    assert store.status().splitlines() == [
        f"{store.path}: 0 of 5 pairs, 0.0%",
        "teacher    runs/teacher, engine not known",
    ]
    store.write(0, rows[:2])
    store.log(0, record(0, 100.0, 110.0))
    store.log(1, {"error": "no memory"})
    store.log(2, {"error": "no disk"})
    store.write(2, rows[4:], QUARANTINED)
    store.log(2, record(2, 110.0, 120.0, "1 of 2"))
    assert store.failures() == {1: "no memory"}
    assert store.status().splitlines()[2:] == [
        "rate       0.4 pairs/s, 8 tokens/s, 00:05 to go",
        "last       shard 2 by worker 1 of 2",
        "scores     3, mean -0.167, std 0.624",
        "quarantine 1: empty document",
        "failed     shard 1: no memory",
    ]


def test_a_store_on_the_hub(hub, rows):
    HfApi().create_repo("org/scores-store", repo_type="dataset", private=True, exist_ok=True)
    store = ScoreStore("hf://datasets/org/scores-store/run")
    store.open(MANIFEST)
    store.write(0, rows[:2])
    again = ScoreStore(store.path)
    assert again.shards() == {0} and again.missing() == 3 and again.manifest() == MANIFEST
    again.write(1, rows[2:4])
    assert len(again.read()) == 4


def test_teacher_of_reads_the_manifest(tmp_path, rows):
    store = ScoreStore(tmp_path / "scores")
    store.open(MANIFEST)
    with pytest.raises(ValueError, match="still lacks the scores of 5 pairs"):
        teacher_of(store.path)
    for shard in range(3):
        store.write(shard, rows[2 * shard : 2 * shard + 2])
    assert teacher_of(store.path) == {"id": "runs/teacher", "revision": None}
    rows.to_parquet(tmp_path / "scores.parquet")
    assert teacher_of(tmp_path / "scores.parquet") is None


@pytest.mark.parametrize("content", [b"[1, 2]", b'{"builder": 1}', b"not json", b'"text"'])
def test_a_foreign_manifest_is_refused(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    store = ScoreStore(tmp_path)
    for use in (
        store.manifest,
        store.missing,
        store.status,
        lambda: store.open(MANIFEST),
        lambda: teacher_of(tmp_path),
    ):
        with pytest.raises(ValueError, match="manifest.json is not the manifest of a score store"):
            use()
    assert (tmp_path / "manifest.json").read_bytes() == content


def test_a_folder_without_manifest_has_no_status(tmp_path):
    with pytest.raises(ValueError, match="is not a score store: it has no manifest.json"):
        ScoreStore(tmp_path).status()


def test_summary_matches_hand_example():
    summary = Summary.of(np.array([1.0, 3.0], np.float32), {"empty document": 1})
    assert summary == Summary(2, 2.0, 1.0, {"empty document": 1})


def test_summaries_of_parts_add_up_to_the_whole():
    generator = np.random.default_rng(0)
    parts = [generator.normal(at, 1 + at, size).astype(np.float32) for at, size in enumerate((500, 2000, 0, 3000))]
    whole = np.concatenate(parts)
    summary = Summary.add([Summary.of(part, {"a": 1} if at else {}) for at, part in enumerate(parts)])
    assert (summary.scored, summary.quarantined) == (5500, {"a": 3})
    assert summary.mean == pytest.approx(whole.mean(dtype=np.float64), abs=1e-9)
    assert summary.std == pytest.approx(whole.std(dtype=np.float64), abs=1e-9)


def test_summary_of_nothing_is_empty():
    assert Summary.add([]) == Summary.add([Summary.of(np.array([]), {})]) == Summary()


def test_rate_adds_up_workers():
    both = [record(0, at, at + 10, worker) for at in (0, 10, 20) for worker in ("0 of 2", "1 of 2")]
    assert rate(both)[1:] == pytest.approx((12 / 30, 240 / 30))


def test_rate_ignores_a_pause():
    records = [record(0, 0, 10), record(1, 10, 20), record(2, 100_000, 100_010)]
    last, pairs, _ = rate(records)
    assert last["shard"] == 2 and pairs == pytest.approx(0.2)
