"""Score store: parquet shards of teacher scores with a manifest of their provenance.

manifest.json                    facts about the whole run; written once, before the first shard
part-000003.parquet              a shard; its footer counts and summarises its scores
quarantine.parquet/part-...      pairs of that shard without a score, each with the reason
log/part-000003.json             when, where and how fast it was scored: the only file with times
"""

from __future__ import annotations

import io
import json
import logging
import os
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import IterableDataset
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from tqdm.auto import tqdm

from hf_disranker.data.files import write_atomically
from hf_disranker.data.groups import load_groups
from hf_disranker.data.tables import read_table

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
QUARANTINE = "quarantine.parquet"
# Manifest keys that describe the input; all others describe how it was scored.
INPUT = frozenset({"pairs", "input", "shard_rows"})
_FOOTER = b"disranker"
# The digest of the weights identifies a teacher in any folder, and other versions change scores by rounding at most.
_MAY_DIFFER = {"hf_disranker", "versions"}
_NAMES_OF_WEIGHTS = {"teacher", "revision"}
# Number of log records from which the current rate is computed.
_RECENT = 50


@dataclass
class Summary:
    """Number of scores of one or more shards, their mean and standard deviation (0 without scores).

    `quarantined` counts the pairs without a score by reason.
    """

    scored: int = 0
    mean: float = 0.0
    std: float = 0.0
    quarantined: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, scores: np.ndarray, quarantined: dict[str, int]) -> Summary:
        """Summarise the scores of one shard, shape (pairs,), in float64."""
        if not len(scores):
            return cls(quarantined=quarantined)
        values = scores.astype(np.float64)
        return cls(len(values), float(values.mean()), float(values.std()), quarantined)

    @classmethod
    def add(cls, parts: Sequence[Summary]) -> Summary:
        """Combine the summaries of several shards."""
        total = cls(quarantined=dict(sum((Counter(part.quarantined) for part in parts), Counter())))
        counts, means, stds = (np.array([getattr(part, name) for part in parts]) for name in ("scored", "mean", "std"))
        if counts.sum():
            total.scored, total.mean = int(counts.sum()), float(np.average(means, weights=counts))
            total.std = float(np.sqrt(np.average(stds**2 + (means - total.mean) ** 2, weights=counts)))
        return total


class ScoreStore:
    """Scores of one teacher over one input, shard by shard.

    A shard's file exists only when it is complete, so an interrupted run resumes where it stopped. A folder (or fsspec
    URL) with the scores of another teacher, template or input is refused.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path).rstrip("/")
        self._fs, self._root = url_to_fs(self.path)

    def open(self, manifest: dict[str, Any]) -> None:
        """Start a run, or resume the one in the folder; `manifest` has the facts about the whole run, for json.

        Raises:
            ValueError: If the folder contains a run with another manifest (the message lists the differences), a
                manifest.json of another program, or parquet files without a manifest, which would be read as scores.
        """
        self._fs.makedirs(self._root, exist_ok=True)
        if not self.is_store():
            if any(name.endswith(".parquet") for name in self._names()):
                raise ValueError(f"{self.path} contains parquet files and no {MANIFEST}; use a new folder.")
            self._put(MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False).encode())
        # Read back even what was just written: another run may have started here at the same moment.
        if lines := differences(self.manifest(), manifest):
            raise ValueError("\n".join([f"{self.path} contains the scores of another run; use a new folder.", *lines]))

    def is_store(self) -> bool:
        """Return whether the folder has a manifest."""
        return self._fs.exists(f"{self._root}/{MANIFEST}")

    def manifest(self) -> dict[str, Any]:
        """Return what `open` wrote.

        Raises:
            ValueError: If there is no manifest, or it was written by another program.
        """
        if not self.is_store():
            raise ValueError(f"{self.path} is not a score store: it has no {MANIFEST}.")
        with self._fs.open(f"{self._root}/{MANIFEST}", "rb") as file:
            try:
                content = json.load(file)
            except ValueError:
                content = None
        if not isinstance(content, dict) or not {"teacher", "pairs", "shard_rows"} <= content.keys():
            raise ValueError(f"{self.path}/{MANIFEST} is not the manifest of a score store; use another folder.")
        return content

    def shards(self) -> set[int]:
        """Return the numbers of the complete shards."""
        names = (name for name in self._names() if name.startswith("part-") and name.endswith(".parquet"))
        return {int(name[5:-8]) for name in names}

    def write(self, shard: int, rows: pd.DataFrame | pa.Table, quarantined: pa.Table | None = None) -> None:
        """Store the rows of a shard atomically, and its pairs without a score with the reason in `reason`."""
        rows = pa.Table.from_pandas(rows, preserve_index=False) if isinstance(rows, pd.DataFrame) else rows
        reasons: dict[str, int] = {}
        path = f"{QUARANTINE}/{_name(shard)}"
        # Before the shard itself, so that a shard that exists is complete.
        if quarantined is not None and len(quarantined):
            reasons = {one["values"]: one["counts"] for one in pc.value_counts(quarantined["reason"]).to_pylist()}
            self._put(path, _parquet(quarantined))
        elif self._fs.exists(f"{self._root}/{path}"):  # left by an interrupted attempt
            self._fs.rm(f"{self._root}/{path}")
        footer = json.dumps(asdict(Summary.of(rows["teacher_score"].to_numpy(), reasons)))
        self._put(_name(shard), _parquet(rows.replace_schema_metadata({_FOOTER: footer})))

    def log(self, shard: int, record: dict[str, Any]) -> None:
        """Record how a shard was scored; a record with the key `error` marks it as failed."""
        failed = f"log/{_name(shard, 'failed.json')}"
        if "error" not in record and self._fs.exists(f"{self._root}/{failed}"):
            self._fs.rm(f"{self._root}/{failed}")
        name = failed if "error" in record else f"log/{_name(shard, 'json')}"
        self._put(name, json.dumps(record, ensure_ascii=False).encode())

    def missing(self) -> int:
        """Return the number of pairs that are in no complete shard."""
        manifest, complete = self.manifest(), self.shards()
        pairs, size = manifest["pairs"], manifest["shard_rows"]
        return sum(min(size, pairs - at) for shard, at in enumerate(range(0, pairs, size)) if shard not in complete)

    def summary(self) -> Summary:
        """Summarise all complete shards from their footers."""
        footers = []
        for shard in sorted(self.shards()):
            with self._fs.open(f"{self._root}/{_name(shard)}", "rb") as file:
                footer = json.loads(pq.read_metadata(file).metadata[_FOOTER])
            footers.append(Summary(**{one.name: footer[one.name] for one in fields(Summary)}))
        return Summary.add(footers)

    def failures(self) -> dict[int, str]:
        """Return the error message of each failed shard."""
        names = [name for name in self._names("log") if name.endswith(".failed.json")]
        return {int(name[5:-12]): self._log(name)["error"] for name in sorted(names)}

    def status(self) -> str:
        """Describe progress, rate, scores and failures for an operator, one line each."""
        manifest, missing, summary = self.manifest(), self.missing(), self.summary()
        pairs = manifest["pairs"]
        lines = [f"{self.path}: {pairs - missing:,} of {pairs:,} pairs, {1 - missing / pairs:.1%}"]
        lines.append(f"teacher    {manifest['teacher']}, {manifest.get('engine', 'engine not known')}")
        logs = sorted(name for name in self._names("log") if not name.endswith(".failed.json"))
        if records := [self._log(name) for name in logs[-_RECENT:]]:
            last, per_s, tokens_per_s = rate(records)
            left = f"{tqdm.format_interval(missing / per_s)} to go" if missing else "finished"
            lines.append(
                f"rate       {per_s:,.{0 if per_s >= 10 else 1}f} pairs/s, {tokens_per_s:,.0f} tokens/s, {left}"
            )
            lines.append(f"last       shard {last['shard']} by worker {last['worker']}")
        if summary.scored:
            lines.append(f"scores     {summary.scored:,}, mean {summary.mean:.3f}, std {summary.std:.3f}")
        lines += [f"quarantine {count:,}: {reason}" for reason, count in sorted(summary.quarantined.items())]
        lines += [f"failed     shard {shard}: {error}" for shard, error in self.failures().items()]
        return "\n".join(lines)

    def read(self) -> pd.DataFrame:
        """Read all complete shards as one scores table; warn if the run is not finished."""
        if missing := self.missing():
            logger.warning("%s lacks the scores of %d pairs: the run is not finished.", self.path, missing)
        return read_table(self.path, "scores")

    def rows(self, shard: int) -> pa.Table:
        """Read one complete shard."""
        with self._fs.open(f"{self._root}/{_name(shard)}", "rb") as file:
            return pq.read_table(file)

    def groups(self) -> IterableDataset:
        """Stream the groups of `load_groups`; the rows of a query must be consecutive."""
        return load_groups(self.path, streaming=True)

    def _names(self, folder: str = "") -> list[str]:
        self._fs.invalidate_cache()  # other processes write here too
        try:
            names = self._fs.ls(f"{self._root}/{folder}".rstrip("/"), detail=False)
        except FileNotFoundError:
            return []
        return [name.rsplit("/", 1)[-1] for name in names]

    def _log(self, name: str) -> dict[str, Any]:
        with self._fs.open(f"{self._root}/log/{name}", "rb") as file:
            return json.load(file)

    def _put(self, name: str, content: bytes) -> None:
        """Write a file atomically: by a rename on a local disk, else by one upload."""
        path = f"{self._root}/{name}"
        self._fs.makedirs(os.path.dirname(path), exist_ok=True)
        if isinstance(self._fs, LocalFileSystem):
            write_atomically(path, content)
        else:
            self._fs.pipe_file(path, content)


def _name(shard: int, extension: str = "parquet") -> str:
    return f"part-{shard:06d}.{extension}"


def _parquet(rows: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(rows, buffer, compression="zstd")
    return buffer.getvalue()


def differences(
    stored: dict[str, Any], now: dict[str, Any], ignoring: Collection[str] = (), absent: str = "not known"
) -> list[str]:
    """List the relevant differences of two manifests, one line for each key and each field of the config."""
    # With a digest of the weights, their location does not matter.
    ignored = _MAY_DIFFER | set(ignoring) | (_NAMES_OF_WEIGHTS if stored.get("weights") else set())
    lines = []
    for key in sorted((stored.keys() | now.keys()) - ignored):
        if key == "config" and stored.get(key) and now.get(key):
            lines += [f"  config.{line.strip()}" for line in differences(stored[key], now[key], absent="default")]
        elif stored.get(key) != now.get(key):
            before, after = (repr(one[key]) if key in one else absent for one in (stored, now))
            lines.append(f"  {key}: {before} there, {after} now")
    return lines


def teacher_of(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return id and revision of the teacher of a store; None if the path has no manifest.

    Raises:
        ValueError: If the scoring run is not finished.
    """
    store = ScoreStore(path)
    if not store.is_store():
        return None
    if missing := store.missing():
        raise ValueError(f"{path} still lacks the scores of {missing} pairs: finish `disranker score` first.")
    manifest = store.manifest()
    return {"id": manifest["teacher"], "revision": manifest.get("revision")}


def rate(records: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], float, float]:
    """Return the latest of the log records, and pairs and tokens per second of all workers together."""
    last = max(records, key=lambda record: record["ended"])
    # Seconds of work, so that a pause between two runs does not count.
    seconds = max(1e-3, sum(record["ended"] - record["started"] for record in records))
    workers = int(last["worker"].split(" of ")[1])
    pairs, tokens = (sum(record[key] for record in records) * workers / seconds for key in ("pairs", "tokens"))
    return last, pairs, tokens
