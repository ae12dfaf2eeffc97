"""The datatrove step of docs/how_to/score_a_billion_pairs.md, executed as it is on the page."""

import re
from pathlib import Path

import pytest

pytest.importorskip("datatrove")

from datatrove.executor import LocalPipelineExecutor

from hf_disranker.data.candidates import Candidates
from hf_disranker.scoring.engines import load_engine
from hf_disranker.scoring.run import ScoringRun
from hf_disranker.scoring.store import ScoreStore

PAGE = Path(__file__).parents[2] / "docs/how_to/score_a_billion_pairs.md"


def shard_bytes(path):
    return {file.name: file.read_bytes() for file in Path(path).glob("*.parquet")}


def test_local_tasks_share_the_shards(teacher_dir, candidates, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/teacher").symlink_to(teacher_dir)
    candidates.to_parquet("candidates.parquet")
    corpus.to_parquet("corpus.parquet")
    snippets = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)
    (snippet,) = [text for text in snippets if "LocalPipelineExecutor" in text]
    monkeypatch.setattr(ScoringRun.__init__, "__defaults__", (10,))  # six shards of these few pairs
    names = {"__name__": "page"}
    exec(compile(snippet.replace('dtype="bfloat16"', 'dtype="float32"'), str(PAGE), "exec"), names)
    pairs = Candidates("candidates.parquet", "corpus.parquet")
    ScoringRun(load_engine("runs/teacher"), pairs, ScoreStore("runs/expected")).run()
    expected = shard_bytes("runs/expected")
    assert len(expected) == 6 and shard_bytes("runs/cluster") == expected

    Path("runs/cluster/part-000003.parquet").unlink()  # left by a dead task, for any number of tasks
    options = {"workers": 1, "logging_dir": "runs/logs", "skip_completed": False}
    LocalPipelineExecutor([names["ScoreShards"]()], tasks=3, **options).run()
    assert shard_bytes("runs/cluster") == expected
    store = ScoreStore("runs/cluster")
    workers = {store._log(f"part-{shard:06d}.json")["worker"] for shard in range(6)}
    assert workers == {"0 of 2", "1 of 2", "0 of 3"}
