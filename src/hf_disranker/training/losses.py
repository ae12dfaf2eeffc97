"""Ranking losses as sums with their denominators, always computed in fp32.

Every loss takes tensors of shape (queries, docs) and a mask of the documents that exist, and gives a `LossTerm`:
the sum over the batch and the weight that it must be divided by. Sums and weights add up over micro-batches and
processes, so a mean over any partition of a batch is the mean over the whole batch.

| function   | learns from    | what it does to a query's common offset of scores | weight of a query     |
|------------|----------------|---------------------------------------------------|-----------------------|
| point_mse  | teacher scores | learns it                                         | its documents         |
| margin_mse | teacher scores | cannot see it                                     | its documents less 1  |
| kl         | teacher scores | cannot see it                                     | 1 if it has two       |
| hinge      | graded labels  | cannot see it                                     | 1 if it has a pair    |
| ranknet    | graded labels  | cannot see it                                     | 1 if it has a pair    |
| softmax    | graded labels  | cannot see it                                     | 1 if it has a pair    |
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


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

    Examples:
        >>> student, teacher = torch.tensor([[3.0, 1.0, 9.0]]), torch.tensor([[1.0, 2.0, 0.0]])
        >>> margin_mse(student, teacher, torch.tensor([[True, True, False]])).mean  # (2 - -1)^2
        tensor(9.)

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
        margin: score difference that is wanted. The DisRanker paper's is not known; 1.0 is ours.
    """
    return _pair_mean((margin - _differences(scores, mask)).clamp(min=0.0), label_pairs(labels, mask))


def ranknet(scores: Tensor, labels: Tensor, mask: Tensor) -> LossTerm:
    """Pairwise logistic loss: log(1 + exp(s_j - s_i)) where document i has a higher grade than document j.

    Each query's pairs are averaged, then the queries that have one. Arguments as in `hinge`.

    Source: Burges et al. 2005, Learning to rank using gradient descent.
    """
    return _pair_mean(nn.functional.softplus(-_differences(scores, mask)), label_pairs(labels, mask))


def softmax(scores: Tensor, labels: Tensor, mask: Tensor) -> LossTerm:
    """Listwise softmax: cross-entropy of the scores' softmax against each document's share of the query's grades.

    With p_i = label_i / sum label it is -sum p_i log softmax(s)_i, averaged over the queries that have two different
    grades; a document of unknown grade (NaN) is left out. Arguments as in `hinge`.

    Source: Cao et al. 2007, ListNet, with the grades themselves for the target; as in Zhuang et al. 2022,
    arXiv 2210.10634, but each query's grades sum to 1.
    """
    known = mask & ~labels.isnan() if labels.is_floating_point() else mask
    grades = torch.where(known, labels.float(), 0.0)
    share = grades / grades.sum(dim=1, keepdim=True).clamp(min=1.0)
    usable = label_pairs(labels, mask).any(dim=2).any(dim=1)
    by_query = -(share * _log_softmax(scores, known)).sum(dim=1)
    return LossTerm(torch.where(usable, by_query, 0.0).sum(), usable.sum().float())


def kl(student: Tensor, teacher: Tensor, mask: Tensor, temperature: float = 1.0) -> LossTerm:
    """Listwise distillation: Kullback-Leibler divergence of the student's softmax from the teacher's.

    With p = softmax(teacher / T) and q = softmax(student / T) over a query's documents it is T^2 sum p log(p / q),
    averaged over the queries of two documents or more.

    Args:
        student: scores, shape (queries, docs), any float dtype.
        teacher: scores, shape (queries, docs), any float dtype.
        mask: True where a document exists, shape (queries, docs).
        temperature: T; a higher one looks further down the list, and T^2 keeps the gradient's size.

    Source: Hinton et al. 2015, arXiv 1503.02531, over a query's documents in place of classes.
    """
    log_p, log_q = (_log_softmax(scores / temperature, mask) for scores in (teacher.float(), student.float()))
    usable = mask.sum(dim=1) > 1
    by_query = temperature**2 * (log_p.exp() * (log_p - log_q) * mask).sum(dim=1)
    return LossTerm(torch.where(usable, by_query, 0.0).sum(), usable.sum().float())


def label_pairs(labels: Tensor, mask: Tensor) -> Tensor:
    """Where document i has a higher grade than document j, shape (queries, docs, docs), bool."""
    return (labels.unsqueeze(2) > labels.unsqueeze(1)) & mask.unsqueeze(2) & mask.unsqueeze(1)


def _differences(scores: Tensor, mask: Tensor) -> Tensor:
    """Score of document i less that of document j, fp32, shape (queries, docs, docs)."""
    scores = torch.where(mask, scores.float(), 0.0)
    return scores.unsqueeze(2) - scores.unsqueeze(1)


def _pair_mean(values: Tensor, pairs: Tensor) -> LossTerm:
    """Values averaged over each query's pairs; a query weighs 1 if it has one."""
    count = pairs.sum(dim=(1, 2))
    by_query = torch.where(pairs, values, 0.0).sum(dim=(1, 2)) / count.clamp(min=1)
    return LossTerm(by_query.sum(), (count > 0).sum().float())


def _log_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Log of the softmax over a query's documents, fp32, 0 where no document is."""
    # The dtype's lowest number, not -inf: a query without documents must have no NaN gradient.
    lowest = torch.finfo(torch.float32).min
    return torch.where(mask, torch.where(mask, scores.float(), lowest).log_softmax(dim=1), 0.0)


def _error(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Student minus teacher in fp32, 0 where no document is: masked before the arithmetic, so padding may be NaN."""
    return torch.where(mask, student.float(), 0.0) - torch.where(mask, teacher.float(), 0.0)
