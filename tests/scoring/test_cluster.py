"""Scoring as a step of datatrove, under its executors."""

import inspect
import sys
from functools import partial

import pytest

pytest.importorskip("datatrove")

from datatrove.executor import LocalPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor

from hf_disranker.data.candidates import Candidates
from hf_disranker.scoring.cluster import ScoreShards
from hf_disranker.scoring.engines import load_engine
from hf_disranker.scoring.run import ScoringRun
from hf_disranker.scoring.store import ScoreStore


@pytest.fixture
def step(teacher_dir, candidates, corpus, tmp_path):
    """The step over 57 pairs in 6 shards; one document has the id 0."""
    first = candidates["doc_id"][0]
    candidates.assign(doc_id=candidates["doc_id"].replace(first, "0")).to_parquet(tmp_path / "pairs.parquet")
    corpus.assign(doc_id=corpus["doc_id"].replace(first, "0")).to_parquet(tmp_path / "corpus.parquet")
    files = {"pairs": str(tmp_path / "pairs.parquet"), "corpus": str(tmp_path / "corpus.parquet")}
    return ScoreShards(partial(load_engine, teacher_dir), out=tmp_path / "scores", shard_rows=10, **files)


def expected(step, teacher_dir, tmp_path):
    store = ScoreStore(tmp_path / "expected")
    ScoringRun(load_engine(teacher_dir), Candidates(step.pairs, step.corpus), store, 10).run()
    return shard_bytes(store)


def shard_bytes(store):
    return [store._fs.cat_file(f"{store.path}/part-{shard:06d}.parquet") for shard in sorted(store.shards())]


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])  # more than 1 start processes
def test_local_tasks_share_the_shards(step, teacher_dir, tmp_path, workers):
    executor = {"pipeline": [step], "logging_dir": str(tmp_path / "logs"), "skip_completed": False}
    LocalPipelineExecutor(tasks=2, workers=workers, **executor).run()
    store = ScoreStore(tmp_path / "scores")
    assert store.missing() == 0 and store.read()["doc_id"][0] == "0"
    assert shard_bytes(store) == expected(step, teacher_dir, tmp_path)
    (tmp_path / "scores" / "part-000003.parquet").unlink()  # what a dead task left, for any number of tasks
    LocalPipelineExecutor(tasks=3, workers=1, **executor).run()
    assert shard_bytes(store) == expected(step, teacher_dir, tmp_path)
    workers = {ScoreStore(tmp_path / "scores")._log(f"part-{shard:06d}.json")["worker"] for shard in range(6)}
    assert workers == {"0 of 2", "1 of 2", "0 of 3"}


@pytest.mark.skipif(
    "gpus_per_task" not in inspect.signature(SlurmPipelineExecutor).parameters,
    reason="datatrove 0.10 needs numpy 2; the lowest versions have numpy 1.26",
)
def test_the_slurm_script_runs_the_tasks_as_an_array(step, tmp_path):
    executor = SlurmPipelineExecutor(
        pipeline=[step],
        tasks=64,
        time="24:00:00",
        partition="gpu",
        workers=16,
        cpus_per_task=8,
        gpus_per_task=1,
        venv_path="/opt/venv/bin/activate",
        logging_dir=str(tmp_path / "logs"),
        skip_completed=False,
    )
    script = executor.get_launch_file_contents(executor.get_sbatch_args(), "srun -l launch_pickled_pipeline step.pik")
    lines = script.splitlines()
    for line in ("#SBATCH --partition=gpu", "#SBATCH --cpus-per-task=8", "#SBATCH --time=24:00:00"):
        assert line in lines
    assert any(line.startswith("#SBATCH --array=0-") and line.endswith("%16") for line in lines)
    assert "source /opt/venv/bin/activate" in script and "launch_pickled_pipeline step.pik" in script


@pytest.mark.slow
def test_ray_tasks_share_the_shards(step, teacher_dir, tmp_path):
    ray = pytest.importorskip("ray")
    from datatrove.executor import RayPipelineExecutor

    ray.init(num_cpus=4, include_dashboard=False)  # with 2, the actors wait for one another for ever
    try:
        logs = str(tmp_path / "logs")
        RayPipelineExecutor([step], tasks=2, workers=2, logging_dir=logs, skip_completed=False).run()
    finally:
        ray.shutdown()
    store = ScoreStore(tmp_path / "scores")
    assert store.missing() == 0 and shard_bytes(store) == expected(step, teacher_dir, tmp_path)


def test_without_datatrove_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datatrove.pipeline.base", None)
    monkeypatch.delitem(sys.modules, "hf_disranker.scoring.cluster")
    with pytest.raises(ImportError, match=r"pip install 'hf-disranker\[cluster\]'"):
        import hf_disranker.scoring.cluster  # noqa: F401
