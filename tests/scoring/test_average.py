"""Averaging the scores of several teachers."""

import numpy as np
import pyarrow as pa
import pytest

from hf_disranker.data.groups import load_groups
from hf_disranker.scoring.run import average
from hf_disranker.scoring.store import ScoreStore, teacher_of


@pytest.fixture
def stored(tmp_path, judgments):
    """Make a finished store of some judgments."""

    def stored(name, rows, scores, shard_rows=10, **manifest):
        store = ScoreStore(tmp_path / name)
        about = {"teacher": "a", "revision": None, "weights": name, "input": f"{rows.index[0]}-{rows.index[-1]}"}
        store.open({**about, "pairs": len(rows), "shard_rows": shard_rows, **manifest})
        rows = rows.assign(teacher_score=np.asarray(scores, np.float32))
        for shard, start in enumerate(range(0, len(rows), shard_rows)):
            store.write(shard, rows[start : start + shard_rows])
        return store

    return stored


def test_average_of_teachers_with_different_scales(stored, judgments, tmp_path):
    draw = np.random.default_rng(0)
    scores = [draw.normal(5, 10, 57).astype(np.float32), draw.normal(0, 0.1, 57).astype(np.float32)]
    stores = [stored("big", judgments, scores[0], teacher="big"), stored("small", judgments, scores[1], teacher="s")]
    mean = average(stores, tmp_path / "mean")
    standard = [(one.astype(np.float64) - one.mean(dtype=np.float64)) / one.std(dtype=np.float64) for one in scores]
    np.testing.assert_allclose(mean.read()["teacher_score"], np.mean(standard, axis=0), atol=1e-6)
    manifest = mean.manifest()
    assert teacher_of(mean.path) == {"id": "big + s", "revision": None}
    assert [one["weights"] for one in manifest["teachers"]] == ["big", "small"]
    assert manifest["scales"][0] == pytest.approx([scores[0].mean(dtype=np.float64), scores[0].std(dtype=np.float64)])
    assert len(load_groups(mean.path)) == 12

    plain = average(stores, tmp_path / "plain", standardise=False)
    np.testing.assert_allclose(plain.read()["teacher_score"], np.mean(scores, axis=0), atol=1e-5)
    with pytest.raises(ValueError, match="contains the scores of another run.*\n  scales: "):
        average(stores, tmp_path / "plain")


def test_average_quarantines_a_pair_that_one_teacher_lacks(stored, judgments, tmp_path):
    stores = [stored("a", judgments, np.arange(57)), stored("b", judgments, 2 * np.arange(57))]
    apart = pa.Table.from_pandas(judgments[3:4], preserve_index=False)
    apart = apart.append_column("reason", pa.array(["empty document"], pa.string()))
    lacking = judgments[:10].assign(teacher_score=np.arange(10, dtype=np.float32))
    stores[0].write(0, lacking.drop(index=3), apart)
    stores[1].write(0, lacking.drop(index=[5, 7]).assign(teacher_score=lambda rows: 2 * rows["teacher_score"]))
    mean = average(stores, tmp_path / "mean", standardise=False)
    read = mean.read()
    assert read["teacher_score"].tolist() == [1.5 * at for at in range(57) if at not in (3, 5, 7)]
    assert mean.summary().quarantined == {"empty document": 1, "not scored by every teacher": 2}
    assert mean.quarantined(0)["doc_id"].to_pylist() == [judgments["doc_id"][at] for at in (3, 5, 7)]


def test_average_refuses_different_inputs(stored, judgments, tmp_path):
    stores = [stored("a", judgments, np.zeros(57)), stored("b", judgments[:50], np.zeros(50))]
    with pytest.raises(ValueError, match="do not go together.\n  input: '0-56' there, '0-49' now\n  pairs: 57"):
        average(stores, tmp_path / "mean")
