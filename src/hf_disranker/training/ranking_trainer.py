"""Stage 2: RankingTrainer, a Trainer whose batch is whole queries with all their documents."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from hf_disranker.data.collators import GroupCollator
from hf_disranker.evaluation import metrics
from hf_disranker.models.hub import TokenFreeArguments, TrainerHubMixin
from hf_disranker.models.ranker import pair_collator
from hf_disranker.training.batching import BudgetStream, EpochOrder, TokenBudgetSampler, group_lengths
from hf_disranker.training.losses import LossTerm, hinge, ranknet, softmax
from hf_disranker.training.monitor import TrainingWatch, check_target, sample_groups, warn_cut

logger = logging.getLogger(__name__)

_GROUP_KEYS = ("mask", "labels", "teacher_scores")


@dataclass
class RankingConfig(TokenFreeArguments, TrainingArguments):
    """Training options of the ranking stages.

    A batch counts queries, each with all its documents, or tokens when `token_budget` is set. Defaults that differ
    from `TrainingArguments`: per_device_train_batch_size 8 and per_device_eval_batch_size 16, learning_rate 2e-5,
    warmup_steps 0.05 (a share of all steps), logging_steps 10, eval_strategy and save_strategy "epoch",
    save_total_limit 1, remove_unused_columns and ddp_find_unused_parameters False, dataloader_pin_memory only with a
    GPU.
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
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Search for weights without gradient at every step; rankers have none."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay False: texts are tokenised late."})
    max_length: int = field(default=256, metadata={"help": "Tokens of a query-document pair at most."})
    max_query_length: int = field(default=32, metadata={"help": "Tokens of a query at most."})
    token_budget: int | None = field(
        default=None,
        metadata={
            "help": "Tokens per step and device, padding included; queries of like length share a step. "
            "None goes by per_device_train_batch_size."
        },
    )
    shuffle_buffer: int = field(default=1000, metadata={"help": "Queries of a stream among which the next is drawn."})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Evaluations without a better metric_for_best_model before training stops."}
    )
    hinge_weight: float = field(default=1.0, metadata={"help": "Weight of the pairwise hinge on labels."})
    hinge_margin: float = field(
        default=1.0, metadata={"help": "Score difference wanted between grades. Ours: the paper's is not known."}
    )
    ranknet_weight: float = field(default=0.0, metadata={"help": "Weight of the pairwise logistic loss on labels."})
    softmax_weight: float = field(default=0.0, metadata={"help": "Weight of the listwise softmax loss on labels."})

    def __post_init__(self) -> None:
        super().__post_init__()
        # Batches have ragged shapes, which the first process cannot cut up for the others.
        if self.accelerator_config.dispatch_batches is None:
            self.accelerator_config.dispatch_batches = False
        weights = self.loss_weights()
        if min(weights.values()) < 0 or not any(weights.values()):
            raise ValueError(f"Weights of losses are not negative, and one is positive: {weights}.")

    def loss_weights(self) -> dict[str, float]:
        """The weight of each loss term by its name."""
        names = [name for name in self.__dataclass_fields__ if name.endswith("_weight")]
        return {name.removesuffix("_weight"): getattr(self, name) for name in names}


class RankingTrainer(TrainerHubMixin, Trainer):
    """Fit a ranker to graded labels, query by query: pairwise hinge, RankNet, listwise softmax, or a sum of them.

    Every loss is a mean over the whole optimizer step: with gradient accumulation, on several processes, and with
    groups of any sizes, the gradient is that of the one big batch. Each loss term and the spread of the scores
    within a query are logged; evaluation gives PNR and NDCG.

    Args:
        model: a `BertDistilledRanker` or an `LLMForLastTokenRanking` (also inside a peft model).
        args: the options.
        train_dataset: rows of `load_groups`, with `labels`. A stream is repeated without end and drawn from a
            shuffle buffer, so it needs `max_steps`; resuming reads again what was read.
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
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **options: Any,
    ) -> None:
        if processing_class is None:
            raise ValueError(f"{type(self).__name__} needs processing_class, the model's tokenizer.")
        if args.n_gpu > 1:
            logger.warning("Using one GPU of %d: start with `accelerate launch` to use them all.", args.n_gpu)
            args._n_gpu = 1
        self.args = args
        sample = None if train_dataset is None else sample_groups(train_dataset)
        if sample is not None:
            self.watch = TrainingWatch(self.check_groups(sample))
        if isinstance(train_dataset, IterableDataset):
            # Repeated first: each pass has its own order, and a step number says all about where a run stands.
            train_dataset = train_dataset.repeat(None).shuffle(seed=args.seed, buffer_size=args.shuffle_buffer)
        model.config.disranker |= self.marker()
        # CrossEncoder and the servers cut at the tokenizer's limit.
        processing_class.model_max_length = args.max_length
        options.setdefault("compute_metrics", ranking_metrics)
        collator = GroupCollator(pair_collator(model, processing_class))
        if sample is not None:
            warn_cut(sample, collator)
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **options,
        )
        self._logged: dict[str, LossTerm] = {}
        self.add_callback(EpochOrder())
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))

    def check_groups(self, groups: Dataset) -> float:
        """Refuse what teaches nothing; see `guards.check_target`."""
        return check_target(groups, self.target, type(self).__name__)

    def marker(self) -> dict[str, Any]:
        """What the checkpoint's marker says of this training."""
        return {"max_length": self.args.max_length, "max_query_length": self.args.max_query_length}

    def get_train_dataloader(self) -> DataLoader:
        """Batches of whole queries, by number or by token budget."""
        budget, collate, groups = self.args.token_budget, self.data_collator, self.train_dataset
        if budget is None:
            return super().get_train_dataloader()
        options = {"num_workers": self.args.dataloader_num_workers, "pin_memory": self.args.dataloader_pin_memory}
        if isinstance(groups, IterableDataset):
            stream = BudgetStream(groups, collate, budget, self.args.seed)
            loader = DataLoader(stream, batch_size=1, collate_fn=stream.collate_batch, **options)
        else:
            lengths = group_lengths(groups, collate)
            sampler = TokenBudgetSampler(*lengths, budget, self.args.world_size, self.args.seed)
            loader = DataLoader(groups, batch_sampler=sampler, collate_fn=collate, **options)
        return self.accelerator.prepare(loader)

    def loss_terms(self, scores: Tensor, batch: dict[str, Tensor]) -> dict[str, tuple[float, LossTerm]]:
        """The terms of the loss by name, each with its weight in the sum; only those that weigh.

        Args:
            scores: the model's, shape (queries, docs).
            batch: `mask`, `labels` and `teacher_scores` of the same shape.
        """
        labels, mask, args = batch["labels"], batch["mask"], self.args
        terms = {}
        if args.hinge_weight:
            terms["hinge"] = (args.hinge_weight, hinge(scores, labels, mask, args.hinge_margin))
        if args.ranknet_weight:
            terms["ranknet"] = (args.ranknet_weight, ranknet(scores, labels, mask))
        if args.softmax_weight:
            terms["softmax"] = (args.softmax_weight, softmax(scores, labels, mask))
        return terms

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """As in `Trainer`, but what is counted are the weights of our loss terms, over all micro-batches."""
        if self.state.global_step >= self.state.max_steps:
            return [], None  # resumed when all steps were done: Trainer would take one more
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
            self.watch.look(self.state.global_step, logs)
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
