"""Stage 2: RankingTrainer, a Trainer whose batch is whole queries with all their documents."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from hf_disranker import metrics
from hf_disranker.collators import GroupCollator
from hf_disranker.hub import TokenFreeArguments, TrainerHubMixin
from hf_disranker.losses import LossTerm, hinge
from hf_disranker.ranker import pair_collator

logger = logging.getLogger(__name__)

_GROUP_KEYS = ("mask", "labels", "teacher_scores")


@dataclass
class RankingConfig(TokenFreeArguments, TrainingArguments):
    """Training options of the ranking stages.

    A batch counts queries, each with all its documents. Defaults that differ from `TrainingArguments`:
    per_device_train_batch_size 8 and per_device_eval_batch_size 16, learning_rate 2e-5, warmup_steps 0.05 (a share of
    all steps), logging_steps 10, eval_strategy and save_strategy "epoch", save_total_limit 1, remove_unused_columns
    False, dataloader_pin_memory only with a GPU.
    """

    per_device_train_batch_size: int = field(default=8, metadata={"help": "Queries per step and device."})
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Queries per evaluation step and device."})
    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate of AdamW."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Warm-up steps; below 1, a share of all steps."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two log lines."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints to keep."})
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available, metadata={"help": "Pin memory for the way to a GPU."}
    )
    save_strategy: str = field(default="epoch", metadata={"help": "When to save a checkpoint: no, steps or epoch."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay False: texts are tokenised late."})
    max_length: int = field(default=256, metadata={"help": "Tokens of a query-document pair at most."})
    max_query_length: int = field(default=32, metadata={"help": "Tokens of a query at most."})
    hinge_margin: float = field(
        default=1.0, metadata={"help": "Score difference wanted between grades. Ours: the paper publishes none."}
    )


class RankingTrainer(TrainerHubMixin, Trainer):
    """Fit a ranker to graded labels, query by query, with a pairwise hinge loss.

    Every loss is a mean over the whole optimizer step: with gradient accumulation, on several processes, and with
    groups of any sizes, the gradient is that of the one big batch. Each loss term and the spread of the scores
    within a query are logged; evaluation gives PNR and NDCG.

    Args:
        model: a `BertDistilledRanker` or an `LLMForLastTokenRanking` (also inside a peft model).
        args: the options.
        train_dataset: rows of `load_groups`, with `labels`.
        eval_dataset: rows of `load_groups`, with `labels` for the measures.
        processing_class: the model's tokenizer.
        options: go to `Trainer`.

    Raises:
        ValueError: the rows lack what is learned from, or hold nothing to learn.
    """

    target = "labels"
    # compute_loss divides by the weights of the whole accumulated batch.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel,
        args: RankingConfig,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **options: Any,
    ) -> None:
        if processing_class is None:
            raise ValueError(f"{type(self).__name__} needs processing_class, the model's tokenizer.")
        if args.n_gpu > 1:
            logger.warning("Using one GPU of %d: start with `accelerate launch` to use them all.", args.n_gpu)
            args._n_gpu = 1
        if isinstance(train_dataset, Dataset):
            self.check_groups(train_dataset)
        model.config.disranker |= {"max_length": args.max_length, "max_query_length": args.max_query_length}
        # CrossEncoder and the servers cut at the tokenizer's limit.
        processing_class.model_max_length = args.max_length
        options.setdefault("compute_metrics", ranking_metrics)
        super().__init__(
            model=model,
            args=args,
            data_collator=GroupCollator(pair_collator(model, processing_class)),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **options,
        )
        self._logged: dict[str, LossTerm] = {}

    def check_groups(self, groups: Dataset) -> None:
        """Raise ValueError when there is nothing to learn from; say how many queries teach nothing."""
        if self.target not in groups.column_names:
            raise ValueError(
                f"{type(self).__name__} learns from '{self.target}'; the rows have {groups.column_names}."
            )
        idle = sum(len(set(values)) < 2 for values in groups[self.target])
        if idle == len(groups):
            raise ValueError(f"In every query all documents have the same {self.target}: there is no order to learn.")
        if idle:
            logger.warning("%d of %d queries hold no pair of different %s.", idle, len(groups), self.target)

    def loss_terms(self, scores: Tensor, batch: dict[str, Tensor]) -> dict[str, tuple[float, LossTerm]]:
        """The terms of the loss by name, each with its factor in the sum.

        Args:
            scores: the model's, shape (queries, docs).
            batch: `mask`, `labels` and `teacher_scores` of the same shape.
        """
        return {"hinge": (1.0, hinge(scores, batch["labels"], batch["mask"], self.args.hinge_margin))}

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """As in `Trainer`, but what is counted are the weights of our loss terms, over all micro-batches."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        # The weights depend on labels and mask alone, so any scores will do.
        counts = [self._weights(self.loss_terms(torch.zeros_like(batch["labels"]), batch)) for batch in batches]
        if not counts:
            return batches, None
        return batches, self.accelerator.reduce(torch.stack(counts).sum(dim=0).to(self.args.device), "sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """The sum of the loss terms; see `Trainer.compute_loss`. `num_items_in_batch` holds each term's weight."""
        scores = self.group_scores(model, inputs)
        terms = self.loss_terms(scores, inputs)
        weights = self._weights(terms) if num_items_in_batch is None else num_items_in_batch
        loss = sum(
            factor * term.total / weight.clamp(min=1.0)
            for (factor, term), weight in zip(terms.values(), weights, strict=True)
        )
        if model.training:
            self._remember(terms, scores.detach(), inputs["mask"])
            # Processes average their gradients, and `weights` counts what all of them saw.
            loss = loss * self.accelerator.num_processes
        return (loss, scores) if return_outputs else loss

    def group_scores(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Scores of a batch of `GroupCollator`, fp32, shape (queries, docs); 0 where no document is."""
        pairs = {key: value for key, value in inputs.items() if key not in _GROUP_KEYS}
        flat = model(**pairs).logits.squeeze(-1).float()
        mask = inputs["mask"]
        return torch.zeros(mask.shape, device=flat.device).masked_scatter(mask, flat)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss (where the rows hold what is learned from), scores and labels, the last two NaN where there is none."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, scores = self.compute_loss(model, inputs, return_outputs=True)
        known = inputs["mask"] & inputs[self.target].isnan()
        return (None if known.any() else loss), scores, inputs["labels"]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean of each loss term and of the score spread since the last line."""
        if "loss" in logs and self._logged:
            for name, term in self._logged.items():
                total, weight = self.accelerator.reduce(torch.stack([term.total, term.weight]), "sum")
                logs[name] = round((total / weight.clamp(min=1.0)).item(), 4)
            self._logged = {}
        super().log(logs, *args, **kwargs)

    def _weights(self, terms: dict[str, tuple[float, LossTerm]]) -> Tensor:
        return torch.stack([term.weight for _, term in terms.values()])

    def _remember(self, terms: dict[str, tuple[float, LossTerm]], scores: Tensor, mask: Tensor) -> None:
        seen = {name: term for name, (_, term) in terms.items()} | {"score_spread": score_spread(scores, mask)}
        for name, (total, weight) in seen.items():
            before = self._logged.get(name, (0.0, 0.0))
            self._logged[name] = LossTerm(before[0] + total.detach(), before[1] + weight)


def score_spread(scores: Tensor, mask: Tensor) -> LossTerm:
    """Standard deviation of a query's scores, summed over queries, with their number; 0 means a collapsed ranker."""
    count = mask.sum(dim=1).clamp(min=1)
    centred = torch.where(mask, scores - (scores * mask).sum(dim=1, keepdim=True) / count.unsqueeze(1), 0.0)
    return LossTerm((centred.square().sum(dim=1) / count).sqrt().sum(), torch.ones_like(count).sum().float())


def ranking_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """PNR, pair accuracy, NDCG@5, NDCG@10 and MRR, of columns of shape (queries, docs); empty without labels."""
    labels, scores = np.asarray(prediction.label_ids), np.asarray(prediction.predictions)
    known = labels >= 0
    if not known.any():
        return {}
    queries = np.broadcast_to(np.arange(len(labels))[:, None], labels.shape)
    values = metrics.evaluate(labels[known], scores[known], queries[known], ks=(5, 10))
    return {name: values[name] for name in ("pnr", "pair_accuracy", "ndcg@5", "ndcg@10", "mrr")}
