"""The evaluation loss as one mean over the whole set, whatever its batches and processes."""

from __future__ import annotations

from typing import Any

import torch

from hf_disranker.training.losses import LossTerm


class WholeSetLoss:
    """Replaces the mean of batch means that `Trainer` reports; put it before the class of transformers.

    `prediction_step` calls `add_terms` with what it computed; totals and weights are added up over batches and
    processes, and divided once.
    """

    accelerator: Any
    args: Any
    _summed: torch.Tensor | None = None
    _factors: tuple[float, ...] = ()

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """See `Trainer.evaluation_loop`; there is no loss where the rows lack what is learned from."""
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
        """Add the loss terms of a batch, each with its weight in the sum."""
        batch = torch.stack([torch.stack([term.total, term.weight]) for _, term in terms.values()], dim=1).detach()
        batch = batch.to(torch.float64 if batch.device.type != "mps" else torch.float32)
        self._factors = tuple(factor for factor, _ in terms.values())
        self._summed = batch if self._summed is None else self._summed + batch

    def real_rows(self, rows: int) -> int:
        """How many rows of an evaluation batch count: the last ones only fill the round of all processes."""
        state = self.accelerator.gradient_state
        filled = self.accelerator.num_processes > 1 and rows == self.args.per_device_eval_batch_size
        if not filled or not state.end_of_dataloader or state.remainder <= 0:
            return rows
        return min(rows, max(0, state.remainder - self.accelerator.process_index * rows))
