"""Several score stores to one: of several inputs (`merge`), or of several teachers (`average`)."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from hf_disranker.data.candidates import Candidates
from hf_disranker.scoring.store import INPUT, ScoreStore, differences

_KEY = ["query_id", "doc_id"]


def merge(stores: Sequence[ScoreStore], path: str | os.PathLike[str], shard_rows: int = 100_000) -> ScoreStore:
    """One store of several with the same teacher, such as those of several months or markets.

    Args:
        stores: finished, without a pair in common; their quarantines stay where they are.
        path: of the new store; a merge that was cut off goes on there.
        shard_rows: pairs per shard of the new store.

    Raises:
        ValueError: a store is not finished, or of another teacher; the differences are spelled out.
        TableError: two of them hold the same pair.
    """
    how = _common(stores, INPUT)
    rows = Candidates([store.path for store in stores], table="scores")
    merged = ScoreStore(path)
    merged.open({**how, "pairs": len(rows), "input": rows.check(), "shard_rows": shard_rows})
    there = merged.shards()
    for shard, start in enumerate(range(0, len(rows), shard_rows)):
        if shard not in there:
            merged.write(shard, rows.read(start, start + shard_rows))
    return merged


def average(stores: Sequence[ScoreStore], path: str | os.PathLike[str], standardise: bool = True) -> ScoreStore:
    """The mean of several teachers' scores; a pair that one of them could not score goes to the quarantine.

    Args:
        stores: finished, of the same input and shard size.
        path: of the new store; it goes on there when it was cut off.
        standardise: bring each teacher's scores to mean 0 and standard deviation 1 over all its pairs first, so that
            none outweighs the others by its scale.

    Raises:
        ValueError: a store is not finished, or of another input; the differences are spelled out.
    """
    manifests = [store.manifest() for store in stores]
    how = set().union(*manifests) - INPUT
    common = _common(stores, how)
    summaries = [store.summary() for store in stores]
    scales = [[one.mean, one.std or 1.0] if standardise else [0.0, 1.0] for one in summaries]
    mean = ScoreStore(path)
    mean.open(
        common
        | {
            "teacher": " + ".join(str(one["teacher"]) for one in manifests),
            "revision": None,
            "engine": "mean of several teachers",
            "teachers": [{key: one[key] for key in sorted(one.keys() & how)} for one in manifests],
            "scales": scales,
        }
    )
    for shard in sorted(stores[0].shards() - mean.shards()):
        rows, apart = _mean([store.rows(shard) for store in stores], scales)
        before = stores[0].quarantined(shard)
        mean.write(
            shard, rows, apart if before is None else pa.concat_tables([before, apart], promote_options="default")
        )
    return mean


def _common(stores: Sequence[ScoreStore], ignoring: Collection[str]) -> dict[str, Any]:
    """What the manifests of finished stores share; ValueError where they differ in anything but what is ignored."""
    first = stores[0].manifest()
    for store in stores:
        if missing := store.missing():
            raise ValueError(f"{store.path} still lacks the scores of {missing} pairs: finish it first.")
        if lines := differences(first, store.manifest(), ignoring):
            raise ValueError("\n".join([f"{stores[0].path} and {store.path} do not go together.", *lines]))
    return {key: value for key, value in first.items() if key not in ignoring}


def _mean(tables: Sequence[pa.Table], scales: Sequence[Sequence[float]]) -> tuple[pa.Table, pa.Table]:
    """One shard: the rows of the first table with the mean score, and those that another table lacks."""
    keys = [pd.MultiIndex.from_frame(table.select(_KEY).to_pandas()) for table in tables]
    places = [key.get_indexer(keys[0]) for key in keys]
    everywhere = np.all([place >= 0 for place in places], axis=0)
    total = np.zeros(int(everywhere.sum()))
    for table, place, (mean, std) in zip(tables, places, scales, strict=True):
        total += (table["teacher_score"].to_numpy()[place[everywhere]] - mean) / std
    column = tables[0].column_names.index("teacher_score")
    rows = tables[0].filter(pa.array(everywhere))
    rows = rows.set_column(column, "teacher_score", pa.array((total / len(tables)).astype(np.float32)))
    apart = tables[0].filter(pa.array(~everywhere)).drop_columns("teacher_score")
    return rows, apart.append_column("reason", pa.array(["not scored by every teacher"] * len(apart), pa.string()))
