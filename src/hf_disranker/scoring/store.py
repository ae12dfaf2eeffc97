"""ScoreStore: a folder of parquet shards with teacher scores, and a manifest that says where they come from.

manifest.json                    what is true of the whole run; written once, before the first shard
part-000003.parquet              a shard, its footer saying how many scores it holds and how they lie
quarantine.parquet/part-...      the pairs of that shard that got no score, each with its reason
log/part-000003.json             when, where and how fast it was scored: the only file with times
"""

from __future__ import annotations

import io
import json
import logging
import os
import uuid
from collections.abc import Collection
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import IterableDataset
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from hf_disranker.data.groups import load_groups
from hf_disranker.data.tables import read_table
from hf_disranker.scoring.summary import Status, Summary, rate

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
QUARANTINE = "quarantine.parquet"
_FOOTER = b"disranker"
# What the scores were computed from; all else in a manifest says how.
INPUT = frozenset({"pairs", "input", "shard_rows"})
# The weights' digest says which teacher it is, wherever it lies, and other versions round differently at most.
_MAY_DIFFER = {"hf_disranker", "versions"}
_NAMES_OF_WEIGHTS = {"teacher", "revision"}
# Shards of the log that tell the present rate.
_RECENT = 50


class ScoreStore:
    """Scores of one teacher over one input, shard by shard.

    A shard's file exists only when it is complete, so a run that was cut off goes on where it stopped. A folder that
    holds the scores of another teacher, template or input is refused.

    Args:
        path: folder or fsspec URL.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path).rstrip("/")
        self._fs, self._root = url_to_fs(self.path)

    def open(self, manifest: dict[str, Any]) -> None:
        """Begin a run or go on with the one that is there.

        Args:
            manifest: what is true of the whole run, as json-friendly data.

        Raises:
            ValueError: the folder holds a run with another manifest; the differences are spelled out. Or it holds
                parquet files of no run: they would be read as scores.
        """
        self._fs.makedirs(self._root, exist_ok=True)
        if not self.is_store():
            if any(name.endswith(".parquet") for name in self._names()):
                raise ValueError(f"{self.path} holds parquet files and no {MANIFEST}; use a new folder.")
            self._put(MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False).encode())
        # Read back even what was just written: another run may have begun here at the same moment.
        if lines := differences(self.manifest(), manifest):
            raise ValueError("\n".join([f"{self.path} holds the scores of another run; use a new folder.", *lines]))

    def is_store(self) -> bool:
        """Whether a run was begun here."""
        return self._fs.exists(f"{self._root}/{MANIFEST}")

    def manifest(self) -> dict[str, Any]:
        """What `open` wrote."""
        with self._fs.open(f"{self._root}/{MANIFEST}", "rb") as file:
            return json.load(file)

    def shards(self) -> set[int]:
        """The numbers of the complete shards."""
        names = (name for name in self._names() if name.startswith("part-") and name.endswith(".parquet"))
        return {int(name[5:-8]) for name in names}

    def write(
        self, shard: int, rows: pd.DataFrame | pa.Table, quarantined: pa.Table | None = None, reused: int = 0
    ) -> None:
        """Store a shard; it appears whole or not at all.

        Args:
            shard: its number.
            rows: rows of a scores table.
            quarantined: the pairs of the shard that got no score, and in the column `reason` why.
            reused: how many of the scores were taken from another store.
        """
        rows = pa.Table.from_pandas(rows, preserve_index=False) if isinstance(rows, pd.DataFrame) else rows
        reasons: dict[str, int] = {}
        apart = f"{QUARANTINE}/{_name(shard)}"
        # First, so that a shard that is there has all that belongs to it.
        if quarantined is not None and len(quarantined):
            reasons = {one["values"]: one["counts"] for one in pc.value_counts(quarantined["reason"]).to_pylist()}
            self._put(apart, _parquet(quarantined))
        elif self._fs.exists(f"{self._root}/{apart}"):  # of an attempt that was cut off
            self._fs.rm(f"{self._root}/{apart}")
        footer = Summary.of(rows["teacher_score"].to_numpy(), reasons, reused)
        self._put(_name(shard), _parquet(rows.replace_schema_metadata({_FOOTER: footer.to_json()})))

    def log(self, shard: int, record: dict[str, Any]) -> None:
        """Note how a shard was scored; a record with the key `error` notes that it was not."""
        failed = f"log/{_name(shard, 'failed.json')}"
        if "error" not in record and self._fs.exists(f"{self._root}/{failed}"):
            self._fs.rm(f"{self._root}/{failed}")
        name = failed if "error" in record else f"log/{_name(shard, 'json')}"
        self._put(name, json.dumps(record, ensure_ascii=False).encode())

    def missing(self) -> int:
        """How many pairs of the run are in no complete shard yet."""
        pairs, size, there = self.manifest()["pairs"], self.manifest()["shard_rows"], self.shards()
        return sum(min(size, pairs - at) for shard, at in enumerate(range(0, pairs, size)) if shard not in there)

    def summary(self) -> Summary:
        """What the footers of all complete shards say together."""
        footers = []
        for shard in sorted(self.shards()):
            with self._fs.open(f"{self._root}/{_name(shard)}", "rb") as file:
                footers.append(Summary.from_json(pq.read_metadata(file).metadata[_FOOTER]))
        return Summary.add(footers)

    def status(self) -> Status:
        """How far the run is, how fast it goes, what failed."""
        logs = sorted(self._names("log"))
        failures = {int(name[5:-12]): self._log(name)["error"] for name in logs if name.endswith(".failed.json")}
        done = [name for name in logs if not name.endswith(".failed.json")]
        recent = [self._log(name) for name in done[-_RECENT:]]
        return Status(self.path, self.manifest(), self.missing(), self.summary(), rate(recent), failures)

    def read(self) -> pd.DataFrame:
        """All complete shards as one scores table; warns when the run is not finished."""
        if missing := self.missing():
            logger.warning("%s lacks the scores of %d pairs: the run is not finished.", self.path, missing)
        return read_table(self.path, "scores")

    def rows(self, shard: int) -> pa.Table:
        """One complete shard."""
        with self._fs.open(f"{self._root}/{_name(shard)}", "rb") as file:
            return pq.read_table(file)

    def quarantined(self, shard: int) -> pa.Table | None:
        """The pairs of a shard that got no score, with the reason; None where all have one."""
        path = f"{self._root}/{QUARANTINE}/{_name(shard)}"
        if not self._fs.exists(path):
            return None
        with self._fs.open(path, "rb") as file:
            return pq.read_table(file)

    def groups(self) -> IterableDataset:
        """The groups of `load_groups`, read as you go; the rows of a query have to stand together."""
        return load_groups(self.path, streaming=True)

    def _names(self, folder: str = "") -> list[str]:
        where = f"{self._root}/{folder}".rstrip("/")
        self._fs.invalidate_cache()  # others write here too
        try:
            return [name.rsplit("/", 1)[-1] for name in self._fs.ls(where, detail=False)]
        except FileNotFoundError:
            return []

    def _log(self, name: str) -> dict[str, Any]:
        with self._fs.open(f"{self._root}/log/{name}", "rb") as file:
            return json.load(file)

    def _put(self, name: str, content: bytes) -> None:
        """Write a file whole or not at all: by a rename where that is atomic, else by one upload."""
        path = f"{self._root}/{name}"
        self._fs.makedirs(os.path.dirname(path), exist_ok=True)
        if not isinstance(self._fs, LocalFileSystem):
            self._fs.pipe_file(path, content)
            return
        beside = f"{path}.{uuid.uuid4().hex}.tmp"  # two workers never write into one file
        try:
            with open(beside, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:
            if os.path.exists(beside):
                os.unlink(beside)
            raise


def _name(shard: int, kind: str = "parquet") -> str:
    return f"part-{shard:06d}.{kind}"


def _parquet(rows: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(rows, buffer, compression="zstd")
    return buffer.getvalue()


def differences(
    there: dict[str, Any], now: dict[str, Any], ignoring: Collection[str] = (), absent: str = "not known"
) -> list[str]:
    """In what two manifests differ that matters, a line for each key and for each field of the config."""
    # Where a digest tells the weights apart, it does not matter from where they came.
    ignored = _MAY_DIFFER | set(ignoring) | (_NAMES_OF_WEIGHTS if there.get("weights") else set())
    lines = []
    for key in sorted((there.keys() | now.keys()) - ignored):
        if key == "config" and there.get(key) and now.get(key):
            lines += [f"  config.{line.strip()}" for line in differences(there[key], now[key], absent="default")]
        elif there.get(key) != now.get(key):
            before, after = (repr(one[key]) if key in one else absent for one in (there, now))
            lines.append(f"  {key}: {before} there, {after} now")
    return lines


def teacher_of(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Id and revision of the teacher whose scores lie at a path; None where no manifest tells.

    Raises:
        ValueError: the run that writes the scores is not finished.
    """
    store = ScoreStore(path)
    if not store.is_store():
        return None
    if missing := store.missing():
        raise ValueError(f"{path} still lacks the scores of {missing} pairs: finish `disranker score` first.")
    manifest = store.manifest()
    return {"id": manifest["teacher"], "revision": manifest["revision"]}
