"""ScoreStore: a folder of parquet shards with teacher scores, and a manifest that says where they come from."""

from __future__ import annotations

import json
import logging
import os
from typing import Any

import pandas as pd
from fsspec.core import url_to_fs

from hf_disranker.data import read_table, write_table

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# The weights' digest says which teacher it is, wherever it lies.
_MAY_DIFFER = {"teacher", "revision", "hf_disranker"}


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
            if any(name.endswith(".parquet") for name in self._fs.ls(self._root, detail=False)):
                raise ValueError(f"{self.path} holds parquet files and no {MANIFEST}; use a new folder.")
            self._replace(MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False).encode())
            return
        there = self.manifest()
        names = (there.keys() | manifest.keys()) - _MAY_DIFFER
        keys = sorted(key for key in names if there.get(key) != manifest.get(key))
        if keys:
            lines = [f"  {key}: {there.get(key)!r} there, {manifest.get(key)!r} now" for key in keys]
            raise ValueError("\n".join([f"{self.path} holds the scores of another run; use a new folder.", *lines]))

    def is_store(self) -> bool:
        """Whether a run was begun here."""
        return self._fs.exists(f"{self._root}/{MANIFEST}")

    def manifest(self) -> dict[str, Any]:
        """What `open` wrote."""
        with self._fs.open(f"{self._root}/{MANIFEST}", "rb") as file:
            return json.load(file)

    def has(self, shard: int) -> bool:
        """Whether a shard is complete."""
        return self._fs.exists(f"{self._root}/{_name(shard)}")

    def write(self, shard: int, rows: pd.DataFrame) -> None:
        """Store a shard: rows of a scores table. It appears whole or not at all."""
        write_table(rows, f"{self.path}/{_name(shard)}.tmp")
        self._fs.mv(f"{self._root}/{_name(shard)}.tmp", f"{self._root}/{_name(shard)}")

    def missing(self) -> int:
        """How many pairs of the run are in no complete shard yet."""
        manifest = self.manifest()
        starts = enumerate(range(0, manifest["pairs"], manifest["shard_rows"]))
        return sum(min(manifest["shard_rows"], manifest["pairs"] - at) for shard, at in starts if not self.has(shard))

    def read(self) -> pd.DataFrame:
        """All complete shards as one scores table; warns when the run is not finished."""
        if missing := self.missing():
            logger.warning("%s lacks the scores of %d pairs: the run is not finished.", self.path, missing)
        return read_table(self.path, "scores")

    def _replace(self, name: str, content: bytes) -> None:
        with self._fs.open(f"{self._root}/{name}.tmp", "wb") as file:
            file.write(content)
        self._fs.mv(f"{self._root}/{name}.tmp", f"{self._root}/{name}")


def _name(shard: int) -> str:
    return f"part-{shard:05d}.parquet"


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
