"""Stage 3a: score candidates shard by shard, and verify score stores."""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from tqdm.auto import tqdm

from hf_disranker.data.candidates import TEXT_COLUMNS, Candidates
from hf_disranker.data.collators import prefetch_map
from hf_disranker.data.schema import TableError
from hf_disranker.data.tables import pair_texts
from hf_disranker.scoring.engines import Engine
from hf_disranker.scoring.store import INPUT, ScoreStore, differences
from hf_disranker.version import __version__

logger = logging.getLogger(__name__)

# Longer documents are indexing errors and take minutes to tokenise.
MAX_CHARACTERS = 500_000
# This many pairs without a single score mean a broken teacher, not bad rows.
_MANY = 10


@dataclass
class ScoringRun:
    """Scoring of one table of candidates by one teacher into a store."""

    engine: Engine
    candidates: Candidates
    store: ScoreStore
    shard_rows: int = 10_000  # pairs per shard, which is the most work that a crash can lose
    quarantined: int = field(default=0, init=False)  # pairs that this worker could not score

    def run(self, rank: int = 0, world_size: int = 1) -> int:
        """Check the whole input, then score this worker's shards that are missing.

        Shard i belongs to worker i mod world_size. A shard whose input cannot be read is logged and left for the next
        run; any other failure ends the run.

        Returns:
            Number of pairs in the shards that were completed, quarantined pairs included.

        Raises:
            TableError: If the input breaks its contract, or no pair of a shard of 10 or more got a score.
            ValueError: If the store belongs to another run.
        """
        manifest = {"format": 2, **self.engine.describe(), "pairs": len(self.candidates)}
        manifest |= {"input": self.candidates.check(), "shard_rows": self.shard_rows, "hf_disranker": __version__}
        self.store.open(manifest)
        complete = self.store.shards()
        shards = range(rank, -(-len(self.candidates) // self.shard_rows), world_size)
        missing = [shard for shard in shards if shard not in complete]
        pairs = sum(min(self.shard_rows, len(self.candidates) - shard * self.shard_rows) for shard in missing)
        done, failures = 0, []
        with _progress_bar(pairs) as bar:
            for shard, rows in prefetch_map(self._read, missing):
                before = bar.n
                try:
                    record = self._score(shard, rows, bar)
                except Exception as error:
                    bar.update(before - bar.n)
                    self._log(shard, {"error": str(error)})
                    if not isinstance(error, TableError):
                        raise
                    failures.append(f"shard {shard}: {error}")
                    continue
                bar.update(before + record["pairs"] - bar.n)
                done += record["pairs"]
                self._log(shard, record | {"worker": f"{rank} of {world_size}", "host": socket.gethostname()})
        if failures:
            raise TableError("\n".join([f"{len(failures)} shard(s) failed; run again for them.", *failures]))
        return done

    def _read(self, shard: int) -> tuple[int, pa.Table | TableError]:
        try:
            return shard, self.candidates.read(shard * self.shard_rows, (shard + 1) * self.shard_rows)
        except TableError as error:
            return shard, error

    def _score(self, shard: int, rows: pa.Table | TableError, bar: tqdm[Any]) -> dict[str, Any]:
        """Score and store one shard, rows without a score in quarantine; return its log record."""
        if isinstance(rows, TableError):
            raise rows
        started, tokens = time.time(), self.engine.tokens
        frame = rows.select(TEXT_COLUMNS).to_pandas()
        reasons, scores = _unreadable(frame), np.full(len(rows), np.nan, np.float32)
        if len(todo := np.flatnonzero(reasons == "")):
            scores[todo] = self.engine.predict(pair_texts(frame.iloc[todo]), bar.update)
            reasons[todo[~np.isfinite(scores[todo])]] = "the teacher returned no finite score"
            if len(todo) >= _MANY and (reasons[todo] != "").all():
                raise TableError(f"The teacher returned no finite score for any of {len(todo)} pairs.")
        good = reasons == ""
        scored = rows.filter(pa.array(good)).append_column("teacher_score", pa.array(scores[good], pa.float32()))
        quarantined = rows.filter(pa.array(~good)).append_column("reason", pa.array(reasons[~good], pa.string()))
        self.store.write(shard, scored, quarantined)
        self.quarantined += len(quarantined)
        record = {"shard": shard, "pairs": len(rows), "tokens": self.engine.tokens - tokens}
        return record | {"started": started, "ended": time.time()}

    def _log(self, shard: int, record: dict[str, Any]) -> None:
        """Write the log; without it the run continues, since the disk may be full of the shard itself."""
        try:
            self.store.log(shard, record)
        except OSError as error:
            logger.warning("The log of shard %d could not be written: %s", shard, error)


def _progress_bar(pairs: int) -> tqdm[Any]:
    """Return the progress bar of a machine's first worker; in a log file it is printed once a minute."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    # With miniters=1 a shard that failed may move the bar back.
    return tqdm(
        total=pairs, unit=" pairs", mininterval=0.1 if sys.stderr.isatty() else 60, miniters=1, disable=not first
    )


def _unreadable(frame: pd.DataFrame) -> np.ndarray:
    """Return why each row cannot be scored; "" if it can."""
    document = frame["title"] + frame["summary"]
    reasons = np.full(len(frame), "", dtype=object)
    reasons[(document.str.strip() == "").to_numpy()] = "empty document"
    reasons[(document.str.len() > MAX_CHARACTERS).to_numpy()] = f"document of more than {MAX_CHARACTERS:,} characters"
    return reasons


def verify(engine: Engine, store: ScoreStore, pairs: int = 256, seed: int = 0) -> float:
    """Score a sample of a store again, drawn from at most 8 shards.

    Returns:
        The largest absolute difference from the stored scores; inf if a pair has no finite score now.

    Raises:
        ValueError: If the store belongs to another teacher (the message lists the differences) or has no scores.
    """
    if lines := differences(store.manifest(), {"format": 2, **engine.describe()}, INPUT):
        raise ValueError("\n".join([f"{store.path} contains the scores of another teacher.", *lines]))
    generator = np.random.default_rng(seed)
    if not (shards := sorted(store.shards())):
        raise ValueError(f"{store.path} contains no scores yet.")
    sampled = generator.choice(shards, min(8, len(shards)), replace=False)
    largest = 0.0
    for shard in sampled:
        rows = store.rows(int(shard))
        rows = rows.take(np.sort(generator.permutation(len(rows))[: -(-pairs // len(sampled))]))
        scores = engine.predict(pair_texts(rows.select(TEXT_COLUMNS).to_pandas()))
        difference = np.abs(scores - rows["teacher_score"].to_numpy())
        largest = max(largest, float(np.where(np.isfinite(difference), difference, np.inf).max(initial=0)))
    return largest
