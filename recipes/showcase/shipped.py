"""Teacher scores without texts, small enough to ship: pairs are named by digests of query and document.

A reader joins them with texts of its own; a pair of which it has no equal text is left out and counted.

scores.parquet    query, document (uint64, see `text_digests`), score (float32)
manifest.json     the teacher, described as in the manifest of a score store
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from hf_disranker.recipes.outputs import save_json
from hf_disranker.scoring.store import ScoreStore

SHIPPED = Path(__file__).parent / "scores"
# Scores are rounded to multiples of this, in nats per token: far below the rounding of a model in bfloat16.
STEP = 1 / 4096
_KEY = ["query", "document"]


class Joined(NamedTuple):
    """Shipped scores of the texts at hand.

    Args:
        rows: A scores table: query_id, query, doc_id, title, summary, teacher_score.
        left_out: Number of shipped pairs of which a text is missing or has changed.
    """

    rows: pd.DataFrame
    left_out: int


def text_digests(table: pd.DataFrame, columns: list[str]) -> np.ndarray:
    """Return the first 64 bits of the BLAKE2b digest of each row's texts, shape (len(table),), uint64."""
    rows = table[columns].itertuples(index=False)
    digests = [hashlib.blake2b("\0".join(row).encode(), digest_size=8).digest() for row in rows]
    return np.frombuffer(b"".join(digests), "<u8")


def pack(scores: pd.DataFrame, manifest: Mapping[str, Any], folder: Path) -> int:
    """Write the scores of a scores table with texts to a folder; return the size of the file in bytes.

    Raises:
        ValueError: If two pairs with different scores have the same digests.
    """
    packed = pd.DataFrame({"query": text_digests(scores, ["query"])})
    packed["document"] = text_digests(scores, ["title", "summary"])
    packed["score"] = (np.round(scores["teacher_score"].to_numpy(np.float64) / STEP) * STEP).astype(np.float32)
    packed = packed.drop_duplicates().sort_values(_KEY)
    if packed.duplicated(_KEY).any():
        raise ValueError("Two pairs have the same digests and other scores: one pair was scored twice.")
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.Table.from_pandas(packed, preserve_index=False),
        folder / "scores.parquet",
        compression="zstd",
        compression_level=19,
        use_dictionary=_KEY,  # a digest is written once, a pair is two numbers
        column_encoding={"score": "BYTE_STREAM_SPLIT"},
    )
    save_json({**manifest, "pairs": len(packed)}, str(folder / "manifest.json"))
    return (folder / "scores.parquet").stat().st_size


def join(folder: Path, queries: pd.DataFrame, corpus: pd.DataFrame) -> Joined:
    """Join shipped scores with texts.

    Args:
        folder: Folder that `pack` wrote.
        queries: Columns query_id and query.
        corpus: Columns doc_id, title and summary.
    """
    packed = pd.read_parquet(folder / "scores.parquet")
    asked = queries[["query_id", "query"]].drop_duplicates("query_id")
    asked = asked.assign(key=text_digests(asked, ["query"]))
    documents = corpus[["doc_id", "title", "summary"]]
    documents = documents.assign(document=text_digests(documents, ["title", "summary"]))
    known = packed["query"].isin(asked["key"]) & packed["document"].isin(documents["document"])
    rows = packed[known].rename(columns={"query": "key", "score": "teacher_score"}).merge(asked).merge(documents)
    rows = rows.sort_values(["query_id", "doc_id"], ignore_index=True)
    columns = ["query_id", "query", "doc_id", "title", "summary", "teacher_score"]
    return Joined(rows[columns], int((~known).sum()))


def as_store(rows: pd.DataFrame, folder: Path, path: Path, shard_rows: int = 100_000) -> ScoreStore:
    """Write joined rows as a score store, which `disranker distill` and `disranker score --verify` read.

    A store of other rows at the same path is replaced.

    Args:
        rows: Rows of `join`.
        folder: Folder that `pack` wrote, for the manifest.
        path: Folder of the store.
        shard_rows: Pairs per shard.

    Raises:
        ValueError: If the path is a folder of something else.
    """
    about = {**json.loads((folder / "manifest.json").read_text()), "pairs": len(rows), "shard_rows": shard_rows}
    about["input"] = hashlib.sha256(pd.util.hash_pandas_object(rows, index=False).to_numpy().tobytes()).hexdigest()
    store = ScoreStore(path)
    if store.is_store() and (store.manifest() != about or store.missing()):
        shutil.rmtree(path)
    store.open(about)
    complete = store.shards()
    for shard, start in enumerate(range(0, len(rows), shard_rows)):
        if shard not in complete:
            store.write(shard, rows.iloc[start : start + shard_rows])
    return store
