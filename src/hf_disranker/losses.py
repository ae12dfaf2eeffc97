"""Ranking losses as sums with their denominators, always computed in fp32.

Every loss takes tensors of shape (queries, docs) and a mask of the documents that exist, and gives a `LossTerm`:
the sum over the batch and the weight that it must be divided by. Sums and weights add up over micro-batches and
processes, so a mean over any partition of a batch is the mean over the whole batch.

| function   | learns from    | what it does to a query's common offset of scores | weight of a query     |
|------------|----------------|---------------------------------------------------|-----------------------|
| point_mse  | teacher scores | learns it                                         | its documents         |
| margin_mse | teacher scores | cannot see it                                     | its documents less 1  |
| hinge      | graded labels  | cannot see it                                     | 1 if it has a pair    |
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LossTerm(NamedTuple):
    """A loss before its division: `total`, scalar fp32 with gradient, and `weight`, scalar fp32 without."""

    total: Tensor
    weight: Tensor

    @property
    def mean(self) -> Tensor:
        """The loss itself; 0 where nothing weighs."""
        return self.total / self.weight.clamp(min=1.0)


def point_mse(student: Tensor, teacher: Tensor, mask: Tensor) -> LossTerm:
    """Squared error between student and teacher scores, averaged over all documents.

    Args:
        student: scores, shape (queries, docs), any float dtype.
        teacher: scores, shape (queries, docs), any float dtype.
        mask: True where a document exists, shape (queries, docs).

    Returns:
        The mean equals `torch.nn.MSELoss` on the documents that exist.
    """
    return LossTerm(_error(student, teacher, mask).square().sum(), mask.sum().float())


def margin_mse(student: Tensor, teacher: Tensor, mask: Tensor) -> LossTerm:
    """Squared error between student and teacher score margins, over all document pairs of each query.

    With e = student - teacher over the n documents of a query, the mean of (e_i - e_j)^2 over its pairs is
    2 sum (e - mean e)^2 / (n - 1). A query weighs by its n - 1 independent margins, so the batch gives
    2 sum_q sum (e - mean e)^2 / sum_q (n_q - 1): linear in n, with no pair ever built.

    Args:
        student: scores, shape (queries, docs), any float dtype.
        teacher: scores, shape (queries, docs), any float dtype.
        mask: True where a document exists, shape (queries, docs).

    Returns:
        For one query of two documents the mean equals sentence-transformers' `MarginMSELoss`; a query with one
        document counts for nothing.

    Source: Hofstätter et al. 2020, arXiv 2010.02666, extended from (positive, negative) to all pairs.
    """
    error = _error(student, teacher, mask)
    documents = mask.sum(dim=1, keepdim=True)
    # Centred before it is squared: sum e^2 - (sum e)^2 / n loses every digit in fp32 when the offset is large.
    centred = torch.where(mask, error - error.sum(dim=1, keepdim=True) / documents.clamp(min=1), 0.0)
    return LossTerm(2.0 * centred.square().sum(), (documents - 1).clamp(min=0).sum().float())


def hinge(scores: Tensor, labels: Tensor, mask: Tensor, margin: float = 1.0) -> LossTerm:
    """Pairwise hinge: a document of a higher grade should score `margin` more than one of a lower grade.

    Each query's pairs with label_i > label_j are averaged, then the queries that have such a pair.

    Args:
        scores: shape (queries, docs), any float dtype.
        labels: grades, shape (queries, docs); read only where the mask is True.
        mask: True where a document exists, shape (queries, docs).
        margin: score difference that is wanted. The DisRanker paper publishes none; 1.0 is ours.
    """
    scores = torch.where(mask, scores.float(), 0.0)
    pairs = label_pairs(labels, mask)
    missing = (margin - (scores.unsqueeze(2) - scores.unsqueeze(1))).clamp(min=0.0)
    count = pairs.sum(dim=(1, 2))
    by_query = torch.where(pairs, missing, 0.0).sum(dim=(1, 2)) / count.clamp(min=1)
    return LossTerm(by_query.sum(), (count > 0).sum().float())


def label_pairs(labels: Tensor, mask: Tensor) -> Tensor:
    """Where document i has a higher grade than document j, shape (queries, docs, docs), bool."""
    return (labels.unsqueeze(2) > labels.unsqueeze(1)) & mask.unsqueeze(2) & mask.unsqueeze(1)


def _error(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Student minus teacher in fp32, 0 where no document is: masked before the arithmetic, so padding may be NaN."""
    return torch.where(mask, student.float(), 0.0) - torch.where(mask, teacher.float(), 0.0)
