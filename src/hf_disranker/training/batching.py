"""Token-budget batching of whole queries, for data sets and streams.

A batch of queries is one flat batch of pairs, so its cost is the number of pairs times the longest pair.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from datasets import Dataset
from torch.utils.data import IterableDataset
from tqdm.auto import tqdm

from hf_disranker.data.collators import GroupCollator, budget_batches

logger = logging.getLogger(__name__)

# Groups tokenized at a time, and size of a stream's sorting window in token budgets.
_CHUNK = 256
_WINDOW = 16


def group_lengths(groups: Dataset, collate: GroupCollator) -> tuple[np.ndarray, np.ndarray]:
    """Tokenize all pairs; return documents and tokens of the longest pair per group, both of shape (groups,)."""
    sizes: list[int] = []
    lengths: list[int] = []
    for start in tqdm(range(0, len(groups), _CHUNK), desc="Lengths", leave=False):
        for group in collate.encode(groups.select(range(start, min(start + _CHUNK, len(groups)))).to_list()):
            sizes.append(len(group["rows"]))
            lengths.append(_longest(group))
    return np.array(sizes), np.array(lengths)


class TokenBudgetSampler:
    """Token-budget batch sampler: the same batches in every epoch, in a different order.

    `sizes` and `lengths` are those of `group_lengths`. All processes of an epoch get the same number of batches. The
    order depends only on seed and epoch, so that an epoch can be resumed; `epoch` returns the current one, since
    accelerate's wrappers hide a `set_epoch` method from the trainer.
    """

    def __init__(  # noqa: PLR0913
        self,
        sizes: np.ndarray,
        lengths: np.ndarray,
        token_budget: int,
        processes: int = 1,
        seed: int = 0,
        epoch: Callable[[], int] = int,
    ) -> None:
        self.seed, self.epoch = seed, epoch
        order = np.random.default_rng(seed).permutation(len(sizes))
        self.batches = [order[batch] for batch in budget_batches(lengths[order], token_budget, sizes[order])]
        while len(self.batches) % processes and max(map(len, self.batches)) > 1:
            longest = self.batches.pop(int(np.argmax([len(batch) for batch in self.batches])))
            self.batches += np.array_split(longest, 2)
        if beyond := int((sizes * lengths > token_budget).sum()):
            message = "%d of %d queries need more than %d tokens each: raise token_budget or use fewer documents."
            logger.warning(message, beyond, len(sizes), token_budget)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in np.random.default_rng([self.seed, self.epoch()]).permutation(len(self.batches)):
            yield self.batches[batch].tolist()


class BudgetStream(IterableDataset):
    """Token-budget batches of a stream of rows of `load_groups`; queries of similar length share a batch.

    `collate` tokenizes the pairs, so the batches contain encoded groups; `seed` is that of the order within a window.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], collate: GroupCollator, token_budget: int, seed: int) -> None:
        self.groups, self.collate, self.token_budget, self.seed = groups, collate, token_budget, seed

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        window: list[dict[str, Any]] = []
        rng = np.random.default_rng(self.seed)
        tokens = 0
        for group in self.groups:
            window += self.collate.encode([group])
            tokens += len(window[-1]["rows"]) * _longest(window[-1])
            if tokens >= _WINDOW * self.token_budget:
                yield from self._batches(window, rng)
                window, tokens = [], 0
        if window:
            yield from self._batches(window, rng)

    def collate_batch(self, batches: list[list[dict[str, Any]]]) -> dict[str, Any]:
        """Collate the single batch of a data loader with batch_size 1."""
        return self.collate(batches[0])

    def _batches(self, window: list[dict[str, Any]], rng: np.random.Generator) -> Iterator[list[dict[str, Any]]]:
        sizes = np.array([len(group["rows"]) for group in window])
        batches = budget_batches(np.array([_longest(group) for group in window]), self.token_budget, sizes)
        for batch in rng.permutation(len(batches)):
            yield [window[group] for group in batches[batch]]


def _longest(group: dict[str, Any]) -> int:
    return max(len(row["input_ids"]) for row in group["rows"])
