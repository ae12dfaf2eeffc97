"""Early checks for common training failures."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from itertools import islice
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset

from hf_disranker.data.collators import GroupCollator

logger = logging.getLogger(__name__)

_GROUP_COLUMNS = ("query", "doc_ids", "titles", "summaries")
_SAMPLE = 1000
_TRUNCATED_SHARE = 0.05
_COLLAPSED = 0.1


def sample_groups(groups: Dataset | IterableDataset) -> Dataset:
    """Return the rows to check before training: all rows of a data set, the first 1,000 of a stream."""
    if isinstance(groups, Dataset):
        return groups
    return Dataset.from_list(list(islice(groups, _SAMPLE)))


def check_dataset(groups: Any, name: str, args: Any) -> None:
    """Refuse paths and mappings of splits (TypeError), and rows without a needed column (ValueError)."""
    if isinstance(groups, str | os.PathLike):
        raise TypeError(f"{name} is the path {os.fspath(groups)!r}: read it by load_groups.")
    if isinstance(groups, Mapping):
        raise TypeError(f"{name} contains several sets, {sorted(groups)}: choose one.")
    columns = getattr(groups, "column_names", None)
    missing = [column for column in _GROUP_COLUMNS if columns is not None and column not in columns]
    if missing:
        raise ValueError(f"{name} lacks the columns {missing} of load_groups; it has {columns}.")
    strategy, length = args.train_sampling_strategy, args.length_column_name
    applies = strategy == "group_by_length" or (strategy == "batch_rebalance" and name == "train_dataset")
    if applies and isinstance(groups, Dataset) and length not in groups.column_names:
        raise ValueError(
            f"train_sampling_strategy {strategy!r} needs a column {length!r} in {name}; token_budget batches "
            "queries of similar length without one."
        )


def known_values(groups: Dataset, column: str) -> list[list[float]]:
    """Return the values of a list column, for each row, without None and NaN."""
    rows = groups[column] if column in groups.column_names else []
    return [[value for value in row or () if value is not None and value == value] for row in rows]


def check_target(groups: Dataset, target: str, reader: str) -> float:
    """Check that the rows rank documents, and warn about queries that do not.

    Returns:
        Standard deviation of the target within a query, averaged over the queries that have the target.

    Raises:
        ValueError: If the rows lack the target, or no query has two different values of it.
    """
    values = known_values(groups, target)
    if not any(values):
        raise ValueError(f"{reader} learns from '{target}', which is empty or missing in {groups.column_names}.")
    idle = sum(len(set(row)) == 1 for row in values)  # queries without this target have another one
    if all(len(set(row)) < 2 for row in values):
        raise ValueError(f"In every query all documents have the same {target}: there is no order to learn.")
    if idle:
        logger.warning("%d of %d queries have no pair of different %s.", idle, len(groups), target)
    return float(np.mean([np.std(row) for row in values if row]))


def warn_squashed(scores: np.ndarray) -> None:
    """Warn about teacher scores that look like probabilities, which compress large score differences."""
    if scores.min() >= 0 and scores.max() <= 1:
        logger.warning(
            "All teacher scores are between 0 and 1, as if passed through a sigmoid: store the teacher's raw logits, "
            "or apply the logit function to the scores."
        )


def warn_truncated(groups: Dataset, collate: GroupCollator) -> None:
    """Warn if more than 5% of the documents or queries of a sample are truncated."""
    rows = groups.select(range(min(_SAMPLE // 10, len(groups)))).to_list()
    encoded = collate.encode_pairs(rows)
    for what, cut, limit, other in (
        ("documents", encoded.documents_cut, "max_length", ", or split documents into passages"),
        ("queries", encoded.queries_cut, "max_query_length", ""),
    ):
        if cut > _TRUNCATED_SHARE * len(encoded.rows):
            share, length = 100 * cut / len(encoded.rows), getattr(collate.pairs, limit)
            raised = f"{limit} {length}: raise --{limit}{other}"
            logger.warning("%.0f%% of %s are truncated at %s.", share, what, raised)


class LossMonitor:
    """Check logged values: stop on a loss that is not finite, warn once if the scores collapse or never spread.

    `target_spread` is the standard deviation of the target within a query.
    """

    def __init__(self, target_spread: float) -> None:
        self.target_spread = target_spread
        self.highest = 0.0
        self.warned = False

    def check(self, step: int, logs: dict[str, Any]) -> None:
        """Check a log entry with the means of the loss terms and `score_spread`; FloatingPointError if not finite."""
        broken = [name for name, value in logs.items() if isinstance(value, float) and not math.isfinite(value)]
        if broken:
            raise FloatingPointError(
                f"Step {step}: {', '.join(broken)} not finite. Lower --learning_rate, train in bf16 or fp32 instead "
                "of fp16, and resume from the last checkpoint."
            )
        spread = logs["score_spread"]
        self.highest = max(self.highest, spread)
        if self.warned:
            return
        # Logged numbers have four decimals.
        if spread <= 1e-4:
            self._warn(step, "The model scores all documents of a query equally")
        elif spread < _COLLAPSED * min(self.highest, self.target_spread):
            self._warn(step, f"The scores within a query collapse: spread {spread}, down from {self.highest}")

    def check_end(self, step: int) -> None:
        """Warn if the scores within a query have hardly spread: training has not left its first plateau."""
        if not self.warned and 0 < self.highest < _COLLAPSED * self.target_spread:
            logger.warning(
                "Step %d: training ends on its first plateau: the scores within a query spread by %.4g, the target by "
                "%.4g. Train for more steps, or with less --point_weight, which delays the order.",
                step,
                self.highest,
                self.target_spread,
            )

    def _warn(self, step: int, what: str) -> None:
        self.warned = True
        logger.warning(
            "Step %d: %s. Lower --learning_rate, warm up longer, and check that the documents differ within "
            "--max_length.",
            step,
            what,
        )
