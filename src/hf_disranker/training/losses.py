"""Ranking losses as sums with their denominators, always computed in fp32.

Every loss accepts scores of any float dtype, targets and a mask, True where a document exists, all of shape (queries,
docs), and returns a `LossTerm`: the sum over the batch and its denominator. Both add up over micro-batches and
processes, so the mean does not depend on how a batch is split.

| function   | target         | a query's common score offset | weight of a query       |
|------------|----------------|-------------------------------|-------------------------|
| point_mse  | teacher scores | learned                       | number of documents     |
| margin_mse | teacher scores | ignored                       | number of documents - 1 |
| kl         | teacher scores | ignored                       | 1 with two documents    |
| hinge      | graded labels  | ignored                       | 1 with a pair           |
| ranknet    | graded labels  | ignored                       | 1 with a pair           |
| softmax    | graded labels  | ignored                       | 1 with a pair           |
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class LossTerm(NamedTuple):
    """Undivided loss: `total`, scalar fp32 with gradient, and its denominator `weight`, scalar fp32 without."""

    total: Tensor
    weight: Tensor

    @property
    def mean(self) -> Tensor:
        """Loss value; 0 if the weight is 0."""
        return self.total / self.weight.clamp(min=1.0)


def point_mse(student: Tensor, teacher: Tensor, mask: Tensor) -> LossTerm:
    """Compute the mean squared error between student and teacher scores over all documents, as `torch.nn.MSELoss`."""
    return LossTerm(_error(student, teacher, mask).square().sum(), mask.sum().float())


def margin_mse(student: Tensor, teacher: Tensor, mask: Tensor) -> LossTerm:
    """Compute the mean squared error between student and teacher score margins over all document pairs of a query.

    With e = student - teacher over the n documents of a query, the mean of (e_i - e_j)^2 over its pairs is
    2 sum (e - mean e)^2 / (n - 1). Queries are weighted by their n - 1 independent margins, so the batch loss is
    2 sum_q sum (e - mean e)^2 / sum_q (n_q - 1), computed in O(n) without forming pairs.

    Args:
        student: Scores, shape (queries, docs), any float dtype.
        teacher: Scores, shape (queries, docs), any float dtype.
        mask: True where a document exists, shape (queries, docs).

    Returns:
        A term whose mean equals sentence-transformers' `MarginMSELoss` for a query of two documents; queries with one
        document are ignored.

    Examples:
        >>> student, teacher = torch.tensor([[3.0, 1.0, 9.0]]), torch.tensor([[1.0, 2.0, 0.0]])
        >>> margin_mse(student, teacher, torch.tensor([[True, True, False]])).mean  # (2 - -1)^2
        tensor(9.)

    Source: Hofstätter et al. 2020, arXiv 2010.02666, extended from (positive, negative) to all pairs.
    """
    error = _error(student, teacher, mask)
    documents = mask.sum(dim=1, keepdim=True)
    # Center before squaring: sum e^2 - (sum e)^2 / n cancels in fp32 when the offset is large.
    centered = torch.where(mask, error - error.sum(dim=1, keepdim=True) / documents.clamp(min=1), 0.0)
    return LossTerm(2.0 * centered.square().sum(), (documents - 1).clamp(min=0).sum().float())


def hinge(scores: Tensor, labels: Tensor, mask: Tensor, margin: float = 1.0) -> LossTerm:
    """Compute the pairwise hinge loss: higher grades should score at least `margin` above lower ones.

    Averaged over the pairs of a query with label_i > label_j, then over the queries with such a pair. The DisRanker
    paper's margin is unknown; 1.0 is our default.
    """
    return _pair_mean((margin - _differences(scores, mask)).clamp(min=0.0), label_pairs(labels, mask))


def ranknet(scores: Tensor, labels: Tensor, mask: Tensor) -> LossTerm:
    """Compute the pairwise logistic loss log(1 + exp(s_j - s_i)) where document i has a higher grade than j.

    Averaged over the pairs of a query, then over the queries with a pair.

    Source: Burges et al. 2005, Learning to rank using gradient descent.
    """
    return _pair_mean(nn.functional.softplus(-_differences(scores, mask)), label_pairs(labels, mask))


def softmax(scores: Tensor, labels: Tensor, mask: Tensor) -> LossTerm:
    """Compute the listwise softmax cross-entropy between scores and normalized grades.

    With p_i = label_i / sum label, the loss is -sum p_i log softmax(s)_i, averaged over the queries with two different
    grades; documents of unknown grade (NaN) are ignored.

    Source: Cao et al. 2007, ListNet, with the grades as targets; as in Zhuang et al. 2022, arXiv 2210.10634, but
    normalized to sum to 1 per query.
    """
    known = mask & ~labels.isnan() if labels.is_floating_point() else mask
    grades = torch.where(known, labels.float(), 0.0)
    share = grades / grades.sum(dim=1, keepdim=True).clamp(min=1.0)
    usable = label_pairs(labels, mask).any(dim=2).any(dim=1)
    by_query = -(share * _log_softmax(scores, known)).sum(dim=1)
    return LossTerm(torch.where(usable, by_query, 0.0).sum(), usable.sum().float())


def kl(student: Tensor, teacher: Tensor, mask: Tensor, temperature: float = 1.0) -> LossTerm:
    """Compute the listwise Kullback-Leibler divergence of the student's softmax from the teacher's.

    With the temperature T, p = softmax(teacher / T) and q = softmax(student / T) over the documents of a query, the
    loss is T^2 sum p log(p / q), averaged over the queries with at least two documents. A higher T weights the tail
    more; T^2 keeps the gradient scale.

    Source: Hinton et al. 2015, arXiv 1503.02531, with the documents of a query as classes.
    """
    log_p, log_q = (_log_softmax(scores / temperature, mask) for scores in (teacher.float(), student.float()))
    usable = mask.sum(dim=1) > 1
    by_query = temperature**2 * (log_p.exp() * (log_p - log_q) * mask).sum(dim=1)
    return LossTerm(torch.where(usable, by_query, 0.0).sum(), usable.sum().float())


def label_pairs(labels: Tensor, mask: Tensor) -> Tensor:
    """Return where document i has a higher grade than document j, shape (queries, docs, docs), bool."""
    return (labels.unsqueeze(2) > labels.unsqueeze(1)) & mask.unsqueeze(2) & mask.unsqueeze(1)


def _differences(scores: Tensor, mask: Tensor) -> Tensor:
    """Return the score of document i minus that of document j, fp32, shape (queries, docs, docs)."""
    scores = torch.where(mask, scores.float(), 0.0)
    return scores.unsqueeze(2) - scores.unsqueeze(1)


def _pair_mean(values: Tensor, pairs: Tensor) -> LossTerm:
    """Average values over the pairs of each query; queries with a pair have weight 1."""
    count = pairs.sum(dim=(1, 2))
    by_query = torch.where(pairs, values, 0.0).sum(dim=(1, 2)) / count.clamp(min=1)
    return LossTerm(by_query.sum(), (count > 0).sum().float())


def _log_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Return the log-softmax over the documents of a query, fp32, 0 where the mask is False."""
    # The lowest finite number instead of -inf: a query without documents must not have NaN gradients.
    lowest = torch.finfo(torch.float32).min
    return torch.where(mask, torch.where(mask, scores.float(), lowest).log_softmax(dim=1), 0.0)


def _error(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Return student minus teacher in fp32, 0 where the mask is False; padding may be NaN."""
    return torch.where(mask, student.float(), 0.0) - torch.where(mask, teacher.float(), 0.0)


def score_spread(scores: Tensor, mask: Tensor) -> LossTerm:
    """Compute the standard deviation of the scores of a query, averaged over queries; 0 for a collapsed ranker."""
    count = mask.sum(dim=1).clamp(min=1)
    centered = torch.where(mask, scores - (scores * mask).sum(dim=1, keepdim=True) / count.unsqueeze(1), 0.0)
    return LossTerm((centered.square().sum(dim=1) / count).sqrt().sum(), torch.ones_like(count).sum().float())


class TrainerMixin:
    """Trainer mixin: no step after the last one, and an evaluation loss over the whole set, not a mean of batch means.

    `prediction_step` calls `add_terms`; totals and weights are summed over batches and processes and divided once.
    """

    accelerator: Any
    args: Any
    control: Any
    state: Any
    _summed: Tensor | None = None
    _factors: tuple[float, ...] = ()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """See `Trainer.get_batch_samples`."""
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            return [], None  # resumed after the last step or an early stop: Trainer would take one more
        return super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """See `Trainer.evaluation_loop`; reports no loss if the rows lack the target."""
        self._summed = None
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)  # type: ignore[misc]
        if self._summed is not None:
            totals, weights = self.accelerator.reduce(self._summed, "sum").cpu().unbind()
            output.metrics.pop(f"{metric_key_prefix}_loss", None)
            if weights.any():
                means = totals / weights.clamp(min=1.0)
                output.metrics[f"{metric_key_prefix}_loss"] = float(torch.tensor(self._factors).double() @ means)
        return output

    def add_terms(self, terms: dict[str, tuple[float, LossTerm]]) -> None:
        """Add the loss terms of a batch, each with its factor in the sum."""
        batch = torch.stack([torch.stack([term.total, term.weight]) for _, term in terms.values()], dim=1).detach()
        batch = batch.to(torch.float64 if batch.device.type != "mps" else torch.float32)
        self._factors = tuple(factor for factor, _ in terms.values())
        self._summed = batch if self._summed is None else self._summed + batch

    def real_rows(self, rows: int) -> int:
        """Return how many rows of an evaluation batch count; the others pad the last round of all processes."""
        state = self.accelerator.gradient_state
        filled = self.accelerator.num_processes > 1 and rows == self.args.per_device_eval_batch_size
        if not filled or not state.end_of_dataloader or state.remainder <= 0:
            return rows
        return min(rows, max(0, state.remainder - self.accelerator.process_index * rows))
