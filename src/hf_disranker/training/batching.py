"""What shares a forward pass: batches by token budget, of rows and of whole queries, from memory and from a stream.

A batch of whole queries is one flat batch of pairs, so what it costs is its pairs times its longest pair.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from datasets import Dataset
from torch.utils.data import IterableDataset
from tqdm.auto import tqdm
from transformers import TrainerCallback

from hf_disranker.data.collators import GroupCollator

logger = logging.getLogger(__name__)

# Groups measured at a time, and budgets of tokens among which a stream looks for queries of equal length.
_CHUNK = 256
_WINDOW = 16


def budget_groups(sizes: np.ndarray, lengths: np.ndarray, token_budget: int) -> list[np.ndarray]:
    """Cut groups, longest pairs first, into batches of at most `token_budget` tokens with their padding.

    Args:
        sizes: documents of each group, shape (groups,).
        lengths: tokens of each group's longest pair, shape (groups,).
        token_budget: pairs times longest pair of a batch; a group beyond it gets a batch of its own.

    Returns:
        Group numbers, an array per batch; every group once, groups of equal length in the order given.
    """
    batches: list[list[int]] = []
    pairs = 0
    for group in np.argsort(-lengths, kind="stable"):
        pairs += int(sizes[group])
        if not batches or pairs * lengths[batches[-1][0]] > token_budget:
            batches.append([])
            pairs = int(sizes[group])
        batches[-1].append(int(group))
    return [np.array(batch) for batch in batches]


def group_lengths(groups: Dataset, collate: GroupCollator) -> tuple[np.ndarray, np.ndarray]:
    """Documents and tokens of the longest pair of each group, shape (groups,) both; tokenises every pair once."""
    sizes: list[int] = []
    lengths: list[int] = []
    for start in tqdm(range(0, len(groups), _CHUNK), desc="Lengths", leave=False):
        for group in collate.encode(groups.select(range(start, min(start + _CHUNK, len(groups)))).to_list()):
            sizes.append(len(group["rows"]))
            lengths.append(_longest(group))
    return np.array(sizes), np.array(lengths)


class TokenBudgetSampler:
    """Batches of groups by token budget: the same batches in every epoch, in another order each time.

    Args:
        sizes: documents of each group.
        lengths: tokens of each group's longest pair.
        token_budget: tokens of a batch at most, padding included.
        processes: how many share an epoch; each gets equally many batches.
        seed: of the order; with the epoch it decides everything, so an epoch can be resumed.
    """

    def __init__(
        self, sizes: np.ndarray, lengths: np.ndarray, token_budget: int, processes: int = 1, seed: int = 0
    ) -> None:
        self.seed, self.epoch = seed, 0
        order = np.random.default_rng(seed).permutation(len(sizes))
        self.batches = [order[batch] for batch in budget_groups(sizes[order], lengths[order], token_budget)]
        while len(self.batches) % processes and max(map(len, self.batches)) > 1:
            longest = self.batches.pop(int(np.argmax([len(batch) for batch in self.batches])))
            self.batches += np.array_split(longest, 2)
        if beyond := int((sizes * lengths > token_budget).sum()):
            logger.warning(
                "%d of %d queries need more than %d tokens by themselves: raise token_budget or show fewer documents.",
                beyond,
                len(sizes),
                token_budget,
            )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in np.random.default_rng([self.seed, self.epoch]).permutation(len(self.batches)):
            yield self.batches[batch].tolist()


class BudgetStream(IterableDataset):
    """A stream of groups as a stream of batches by token budget; queries of like length share a batch.

    Args:
        groups: rows of `load_groups`.
        collate: how pairs are tokenised; its groups come out encoded.
        token_budget: tokens of a batch at most, padding included.
        seed: of the order of the batches within a window.
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
        """The one batch that a data loader of batch_size 1 hands over."""
        return self.collate(batches[0])

    def _batches(self, window: list[dict[str, Any]], rng: np.random.Generator) -> Iterator[list[dict[str, Any]]]:
        sizes = np.array([len(group["rows"]) for group in window])
        batches = budget_groups(sizes, np.array([_longest(group) for group in window]), self.token_budget)
        for batch in rng.permutation(len(batches)):
            yield [window[group] for group in batches[batch]]


class EpochOrder(TrainerCallback):
    """Tells `TokenBudgetSampler` which epoch it is.

    accelerate does so too, but does not reach it behind the batches that a resumed run skips on several processes.
    """

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any) -> None:
        """See `TrainerCallback`."""
        part = getattr(train_dataloader, "batch_sampler", None)
        while part is not None:
            if hasattr(part, "set_epoch"):
                part.set_epoch(int(state.epoch or 0))
            part = getattr(part, "batch_sampler", None) or getattr(part, "sampler", None)


def _longest(group: dict[str, Any]) -> int:
    return max(len(row["input_ids"]) for row in group["rows"])
