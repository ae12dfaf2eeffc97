"""Stage 3a: a teacher's scores for unlabelled pairs, shard by shard."""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
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
from hf_disranker.scoring.summary import duration, rates
from hf_disranker.version import __version__

logger = logging.getLogger(__name__)

# A document of this many characters is a fault of the index, and takes minutes of tokenising.
MAX_CHARACTERS = 500_000
# So many pairs without a single score are no poisoned rows but a broken teacher.
_MANY = 10
# Seconds between two lines of progress in a log file.
_QUIET = 60


@dataclass
class ScoringRun:
    """One teacher over one table of candidates, as far as one worker goes.

    Args:
        engine: who computes the scores.
        candidates: the pairs.
        store: where the scores go.
        shard_rows: pairs per shard: what a crash can cost at most.
        old: scores of the same teacher that are taken over where the texts are the same.
    """

    engine: Engine
    candidates: Candidates
    store: ScoreStore
    shard_rows: int = 10_000
    old: OldScores | None = None

    def run(self, worker: int = 0, workers: int = 1) -> int:
        """Check the whole input, then score the shards that are this worker's and not there yet.

        Shard i is worker i mod n's. One whose input cannot be read is noted and left for the next run; any other
        failure ends the run.

        Returns:
            How many pairs this call took on.

        Raises:
            TableError: the input breaks its contract, or no pair of a shard of 10 and more got a score.
            ValueError: the store holds another run, or the old scores are another teacher's.
        """
        self._open()
        shards = range(worker, -(-len(self.candidates) // self.shard_rows), workers)
        there = self.store.shards()
        todo = [shard for shard in shards if shard not in there]
        first_here = os.environ.get("LOCAL_RANK", "0") == "0"
        progress = Progress(sum(self._length(shard) for shard in todo), shown=first_here)
        failures = []
        for shard, rows in prefetch_map(self._read, todo):
            try:
                record = self._score(shard, rows, progress)
            except Exception as error:
                self._note(shard, {"error": str(error)})
                if not isinstance(error, TableError):
                    raise
                failures.append(f"shard {shard}: {error}")
                continue
            self._note(shard, record | {"worker": f"{worker} of {workers}", "host": socket.gethostname()})
            progress.store(shard, record["pairs"], record["tokens"])
        progress.close()
        if failures:
            raise TableError("\n".join([f"{len(failures)} shard(s) failed; run again for them.", *failures]))
        return progress.done

    def _open(self) -> None:
        manifest = {"format": 2, **self.engine.describe(), "pairs": len(self.candidates)}
        manifest |= {"input": self.candidates.check(), "shard_rows": self.shard_rows, "hf_disranker": __version__}
        if self.old and (lines := differences(self.old.manifest, manifest, INPUT)):
            raise ValueError("\n".join(["The old scores are those of another teacher.", *lines]))
        self.store.open(manifest)

    def _score(self, shard: int, rows: pa.Table | TableError, progress: Progress) -> dict[str, Any]:
        """Score and store one shard; gives what the log shall know of it."""
        if isinstance(rows, TableError):
            raise rows
        started, tokens = time.time(), self.engine.tokens
        done = 0

        def show(pairs: int) -> None:
            nonlocal done
            done += pairs
            progress.show(shard, done, self.engine.tokens - tokens)

        scored = score_shard(self.engine, rows, self.old, show)
        self.store.write(shard, scored.rows, scored.quarantined, scored.reused)
        record = {"shard": shard, "pairs": len(rows), "tokens": self.engine.tokens - tokens}
        return record | {"started": started, "ended": time.time()}

    def _length(self, shard: int) -> int:
        return min(self.shard_rows, len(self.candidates) - shard * self.shard_rows)

    def _read(self, shard: int) -> tuple[int, pa.Table | TableError]:
        try:
            return shard, self.candidates.read(shard * self.shard_rows, (shard + 1) * self.shard_rows)
        except TableError as error:
            return shard, error

    def _note(self, shard: int, record: dict[str, Any]) -> None:
        """Write the log, without which a run goes on: a disk may be full of the shard itself."""
        try:
            self.store.log(shard, record)
        except OSError as error:
            logger.warning("The log of shard %d could not be written: %s", shard, error)


@dataclass
class ScoredShard:
    """What became of the rows of a shard: scored or quarantined, each once."""

    rows: pa.Table
    quarantined: pa.Table
    reused: int


def score_shard(
    engine: Engine, rows: pa.Table, old: OldScores | None = None, callback: Callable[[int], None] | None = None
) -> ScoredShard:
    """Score the rows of one shard; what cannot be scored is set apart with the reason.

    Args:
        engine: who computes the scores.
        rows: a candidates table with texts.
        old: scores to take over.
        callback: called with the number of pairs that were scored since the last call.

    Raises:
        TableError: of many rows that could be read none got a score: that is no fault of the rows.
    """
    frame = rows.select(TEXT_COLUMNS).to_pandas()
    reasons = _unreadable(frame)
    scores = old.look_up(frame) if old else np.full(len(rows), np.nan, np.float32)
    reused = (reasons == "") & np.isfinite(scores)
    todo = np.flatnonzero((reasons == "") & ~reused)
    if len(todo):
        scores[todo] = engine.predict(pair_texts(frame.iloc[todo]), callback)
        reasons[todo[~np.isfinite(scores[todo])]] = "the teacher gave no finite score"
        if len(todo) >= _MANY and (reasons[todo] != "").all():
            raise TableError(f"The teacher gave no finite score for any of {len(todo)} pairs.")
    good = reasons == ""
    apart = rows.filter(pa.array(~good)).append_column("reason", pa.array(reasons[~good], pa.string()))
    scored = rows.filter(pa.array(good)).append_column("teacher_score", pa.array(scores[good], pa.float32()))
    return ScoredShard(scored, apart, int(reused.sum()))


def _unreadable(frame: pd.DataFrame) -> np.ndarray:
    """Why a row is not given to the teacher; "" where it is."""
    document = frame["title"] + frame["summary"]
    reasons = np.full(len(frame), "", dtype=object)
    reasons[(document.str.strip() == "").to_numpy()] = "empty document"
    reasons[(document.str.len() > MAX_CHARACTERS).to_numpy()] = f"document of more than {MAX_CHARACTERS:,} characters"
    return reasons


class OldScores:
    """The scores of a finished or unfinished store, found by the texts of a pair; 12 bytes of memory for each.

    Args:
        store: where they lie.

    Raises:
        ValueError: the store holds no shard.
    """

    def __init__(self, store: ScoreStore) -> None:
        self.manifest = store.manifest()
        if not store.shards():
            raise ValueError(f"{store.path} holds no scores yet.")
        parts = [store.rows(shard) for shard in sorted(store.shards())]
        keys = [_keys(part.select(TEXT_COLUMNS).to_pandas()) for part in parts]
        scores = [part["teacher_score"].to_numpy() for part in parts]
        self._keys, self._scores = np.concatenate(keys), np.concatenate(scores)
        order = np.argsort(self._keys)
        self._keys, self._scores = self._keys[order], self._scores[order]

    def look_up(self, frame: pd.DataFrame) -> np.ndarray:
        """The scores of rows with these texts, shape (rows,), float32; NaN where there is none."""
        keys = _keys(frame)
        places = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where(self._keys[places] == keys, self._scores[places], np.nan).astype(np.float32)


def _keys(frame: pd.DataFrame) -> np.ndarray:
    return pd.util.hash_pandas_object(frame[list(TEXT_COLUMNS)], index=False).to_numpy()


def verify(engine: Engine, store: ScoreStore, pairs: int = 256, seed: int = 0) -> float:
    """Score a sample of a store again.

    Args:
        engine: the teacher.
        store: with at least one shard.
        pairs: how many at most, drawn from at most 8 shards.
        seed: of the draw.

    Returns:
        The largest difference to what is stored; inf where a pair has no finite score now.

    Raises:
        ValueError: the store is another teacher's; the differences are spelled out. Or it holds no shard.
    """
    there, now = store.manifest(), {"format": 2, **engine.describe()}
    unknown = set() if "tokenizer" in there else now.keys() - there.keys()  # an earlier version wrote it
    if lines := differences(there, now, INPUT | unknown):
        raise ValueError("\n".join([f"{store.path} holds the scores of another teacher.", *lines]))
    draw = np.random.default_rng(seed)
    shards = sorted(store.shards())
    if not shards:
        raise ValueError(f"{store.path} holds no scores yet.")
    largest = 0.0
    for shard in draw.choice(shards, min(8, len(shards)), replace=False):
        rows = store.rows(int(shard))
        taken = rows.take(np.sort(draw.permutation(len(rows))[: -(-pairs // min(8, len(shards)))]))
        again = engine.predict(pair_texts(taken.select(TEXT_COLUMNS).to_pandas()))
        apart = np.abs(again - taken["teacher_score"].to_numpy())
        largest = max(largest, float(np.where(np.isfinite(apart), apart, np.inf).max(initial=0)))
    return largest


@dataclass
class Progress:
    """A bar on a terminal; in a log file a line a minute.

    Args:
        total: pairs that this worker has to score.
        shown: whether this worker speaks at all.
    """

    total: int
    shown: bool = True
    done: int = 0
    tokens: int = 0

    def __post_init__(self) -> None:
        self._started = self._spoke = time.monotonic()
        self._bar = tqdm(total=self.total, unit=" pairs", disable=not (self.shown and sys.stderr.isatty()))

    def show(self, shard: int, pairs: int, tokens: int) -> None:
        """Tell how far the run is.

        Args:
            shard: under way.
            pairs: of it that are scored so far.
            tokens: of it that were read so far.
        """
        done, read = self.done + pairs, self.tokens + tokens
        now = time.monotonic()
        seconds = max(1e-9, now - self._started)
        self._bar.set_postfix_str(f"{read / seconds:,.0f} tokens/s, shard {shard}", refresh=False)
        self._bar.update(done - self._bar.n)  # backwards where a shard failed
        if self.shown and self._bar.disable and done and (now - self._spoke >= _QUIET or self.done == self.total):
            self._spoke = now
            share = f"{done / self.total:.1%} of {self.total:,} pairs"
            left = duration((self.total - done) * seconds / done)
            logger.info("%s, %s, %s to go, shard %d", share, rates(done / seconds, read / seconds), left, shard)

    def store(self, shard: int, pairs: int, tokens: int) -> None:
        """Count a shard that is stored, with all its pairs and tokens."""
        self.done, self.tokens = self.done + pairs, self.tokens + tokens
        self.show(shard, 0, 0)

    def close(self) -> None:
        """The worker has no more shards."""
        self._bar.close()
