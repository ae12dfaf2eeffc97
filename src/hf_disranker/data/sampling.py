"""Which documents of a query a ranker is shown in training."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset

KINDS = ("all", "top", "stratified")
_LISTS = ("doc_ids", "titles", "summaries", "labels", "teacher_scores")


def sample_documents(
    groups: Dataset | IterableDataset, count: int, kind: str = "stratified", seed: int = 0
) -> Dataset | IterableDataset:
    """Keep some documents of each query, chosen by their teacher scores.

    Every query's draw depends on the seed and its id alone, so it is the same in every epoch, process and resumed
    run. Random negatives come in before the teacher scores, by `mining.with_random_documents`; here they are the low
    end of the scores.

    Args:
        groups: rows of `load_groups` with `teacher_scores`, in memory or streamed.
        count: documents to keep; a query with no more keeps all.
        kind: "all" keeps everything; "top" the best-scored; "stratified" cuts the query's scores into `count` parts
            of equal number and draws one document of each, so that the whole range is seen.
        seed: of the draws.

    Raises:
        ValueError: an unknown kind, or fewer than 2 documents asked for.

    Source: stratified as in Jang et al. 2026, arXiv 2604.04734, who found it better than the top.
    """
    if kind not in KINDS or (kind != "all" and count < 2):
        raise ValueError(f"Documents are sampled by one of {', '.join(KINDS)}, at least 2; got {count} by {kind!r}.")
    if kind == "all":
        return groups
    return groups.map(_sampled, fn_kwargs={"count": count, "kind": kind, "seed": seed})


def _sampled(group: dict[str, Any], count: int, kind: str, seed: int) -> dict[str, Any]:
    scores = np.asarray(group["teacher_scores"])
    if len(scores) <= count:
        return group
    order = np.argsort(-scores, kind="stable")
    if kind == "top":
        places = order[:count]
    else:
        rng = np.random.default_rng([seed, zlib.crc32(group["query_id"].encode())])
        places = np.array([rng.choice(part) for part in np.array_split(order, count)])
    kept = np.sort(places)
    return {
        name: [group[name][place] for place in kept] for name in _LISTS if name in group and group[name] is not None
    }
