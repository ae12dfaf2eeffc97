"""Scoring as a step of a datatrove pipeline, for its Local, Slurm and Ray executors; needs the extra `cluster`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

from hf_disranker.data.candidates import Candidates
from hf_disranker.scoring.engines import Engine
from hf_disranker.scoring.run import ScoringRun
from hf_disranker.scoring.store import ScoreStore

try:
    from datatrove.pipeline.base import PipelineStep
except ImportError as error:
    raise ImportError("Scoring on a cluster needs datatrove: pip install 'hf-disranker[cluster]'") from error


class ScoreShards(PipelineStep):
    """The shards of one task: shard i is task i mod n's.

    Rows go from file to file by `ScoringRun`, not through datatrove's documents, so ids and schemas stay as they are.
    The store knows what is done: run the executor with `skip_completed=False`, and each run, with any number of tasks,
    scores what is still missing.

    Args:
        make_engine: makes the engine within the task, such as `partial(load_engine, "runs/teacher")`.
        pairs: file, folder or URL of the candidates, readable from every node.
        out: folder or URL of the store, writable from every node.
        corpus: where texts come from when the candidates have ids only.
        shard_rows: pairs per shard.
    """

    name = "Teacher scores"
    type = "Ranking"

    def __init__(
        self,
        make_engine: Callable[[], Engine],
        pairs: str,
        out: str | os.PathLike[str],
        corpus: str | None = None,
        shard_rows: int = 10_000,
    ) -> None:
        super().__init__()
        self.make_engine = make_engine
        self.pairs, self.out, self.corpus, self.shard_rows = pairs, os.fspath(out), corpus, shard_rows

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Score this task's shards; passes on what comes from the step before."""
        candidates = Candidates(self.pairs, self.corpus)
        candidates.check()  # before the model loads
        run = ScoringRun(self.make_engine(), candidates, ScoreStore(self.out), self.shard_rows)
        self.stat_update("pairs", value=run.run(rank, world_size), unit="task")
        yield from data or ()
