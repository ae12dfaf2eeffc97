"""Stage 3a: a teacher's scores for unlabelled pairs, shard by shard."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from hf_disranker.data import pair_texts
from hf_disranker.ranker import Ranker
from hf_disranker.schema import TableError
from hf_disranker.store import ScoreStore
from hf_disranker.version import __version__


def score_pairs(ranker: Ranker, pairs: pd.DataFrame, store: ScoreStore, teacher: str, shard_rows: int = 10_000) -> int:
    """Score every pair once; shards that are already in the store are skipped.

    Args:
        ranker: the teacher.
        pairs: a candidates table with texts; further columns pass through.
        store: where the scores go.
        teacher: the teacher's name, for the manifest.
        shard_rows: pairs per shard: what a crash can cost at most.

    Returns:
        How many pairs this call scored.

    Raises:
        ValueError: the store holds another run.
        TableError: the teacher gave a score that is not finite.
    """
    store.open(manifest_of(ranker, pairs, teacher, shard_rows))
    starts = [(shard, start) for shard, start in enumerate(range(0, len(pairs), shard_rows)) if not store.has(shard)]
    done = 0
    with tqdm(total=len(pairs), initial=len(pairs) - store.missing(), unit=" pairs") as bar:
        for shard, start in starts:
            rows = pairs.iloc[start : start + shard_rows]
            store.write(shard, rows.assign(teacher_score=_finite(ranker.predict(pair_texts(rows)), rows)))
            done += len(rows)
            bar.update(len(rows))
    return done


def manifest_of(ranker: Ranker, pairs: pd.DataFrame, teacher: str, shard_rows: int) -> dict[str, Any]:
    """What is true of a whole scoring run: the teacher, how it reads, and what it reads."""
    texts = pairs[["query_id", "query", "doc_id", "title", "summary"]]
    return {
        "format": 1,
        "teacher": teacher,
        "revision": getattr(ranker.model.config, "_commit_hash", None),
        "weights": weights_digest(ranker.model),
        "dtype": str(ranker.model.dtype).removeprefix("torch."),
        "templates": ranker.collator.templates.to_dict(),
        "max_length": ranker.collator.max_length,
        "max_query_length": ranker.collator.max_query_length,
        "pairs": len(pairs),
        "input": hashlib.sha256(pd.util.hash_pandas_object(texts, index=False).to_numpy().tobytes()).hexdigest(),
        "shard_rows": shard_rows,
        "hf_disranker": __version__,
    }


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 over all weights, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _finite(scores: np.ndarray, rows: pd.DataFrame) -> np.ndarray:
    bad = ~np.isfinite(scores)
    if bad.any():
        first = rows.loc[bad, ["query_id", "doc_id"]].head(3).to_dict("records")
        raise TableError(f"The teacher gave {int(bad.sum())} score(s) that are not finite, first: {first}.")
    return scores
