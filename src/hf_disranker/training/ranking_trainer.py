"""Stage 2: trainer for rankers on graded labels; a batch is whole queries with all their documents."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)

from hf_disranker.data.collators import GroupCollator
from hf_disranker.evaluation import metrics
from hf_disranker.models.checks import check_length
from hf_disranker.models.hub import TrainerHubMixin
from hf_disranker.models.loading import fit_tokenizer
from hf_disranker.models.ranker import pair_collator
from hf_disranker.training.batching import BudgetStream, TokenBudgetSampler, group_lengths
from hf_disranker.training.losses import LossTerm, TrainerMixin, hinge, ranknet, score_spread, softmax
from hf_disranker.training.monitor import LossMonitor, check_dataset, check_target, sample_groups, warn_truncated
from hf_disranker.training.setup import (
    EarlyStopping,
    RankingConfig,
    add_adapter,
    as_ranker,
    cast_weights,
    check_arguments,
    own_tokenizer,
    resolve_arguments,
)

logger = logging.getLogger(__name__)

_GROUP_KEYS = ("mask", "labels", "teacher_scores")


def ranking_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Compute PNR, pair accuracy, NDCG@5, NDCG@10 and MRR; empty without labels.

    Scores and labels are arrays of shape (queries, docs) or lists of such arrays, one per batch.
    """
    parts = [
        [np.asarray(part) for part in (column if isinstance(column, list) else [column])]
        for column in (prediction.label_ids, prediction.predictions)
    ]
    known = [labels >= 0 for labels in parts[0]]
    labels, scores = (
        np.concatenate([part[mask] for part, mask in zip(column, known, strict=True)]) for column in parts
    )
    if not len(labels):
        return {}
    documents = np.concatenate([mask.sum(axis=1) for mask in known])
    values = metrics.evaluate(labels, scores, np.repeat(np.arange(len(documents)), documents), ks=(5, 10))
    return {name: values[name] for name in ("pnr", "pair_accuracy", "ndcg@5", "ndcg@10", "mrr")}


class RankingTrainer(TrainerMixin, TrainerHubMixin, Trainer):
    """Fit a ranker to graded labels, query by query: pairwise hinge, RankNet, listwise softmax, or a sum of them.

    Every loss is a mean over the whole optimizer step: with gradient accumulation, several processes and groups of any
    size, the gradient equals that of one large batch. Logs contain each loss term and the spread of the scores within
    a query; evaluation reports PNR, NDCG and the loss over the whole set. Override `loss_terms` for a custom loss.

    Args:
        model: `DistilledRanker` or `LLMForLastTokenRanking` (also inside a peft model), stock sequence classifier
            with one label, whose weights are shared, or folder or Hub id.
        args: Training options; None uses the defaults.
        train_dataset: Rows of `load_groups` with `labels`. A stream is repeated and sampled from a shuffle buffer, so
            it needs `max_steps`; resuming reads the stream again up to its position.
        eval_dataset: Rows of `load_groups`, with `labels` for the measures.
        processing_class: Tokenizer of the model, which is copied; None loads it from the model's checkpoint.
        model_init: Function that builds the model for every training and for `hyperparameter_search`, instead of
            `model`.
        compute_metrics: As in `Trainer`, like the following; None computes the loss only.
        peft_config: Adapter to add to the model; the head is trained too.
        data_collator: Refused: the model's templates render the pairs of whole queries.
        compute_loss_func: Refused: override `loss_terms`.

    Raises:
        TypeError: If the model, the arguments or the rows are of another kind.
        ValueError: If the rows lack the target or rank nothing, or if an option has no effect here.
    """

    target = "labels"
    config_class: type[RankingConfig] = RankingConfig
    _own_tokenizer: Any = None
    # compute_loss divides by the term weights of the whole accumulated batch.
    loss_is_scaled_for_ga = True

    def __init__(  # noqa: PLR0913
        self,
        model: PreTrainedModel | nn.Module | str | os.PathLike | None = None,
        args: RankingConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        model_init: Callable[..., PreTrainedModel] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = ranking_metrics,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        peft_config: PeftConfig | None = None,
        data_collator: None = None,
        compute_loss_func: None = None,
    ) -> None:
        check_arguments(type(self).__name__, model, model_init, optimizers, [data_collator, compute_loss_func])
        self.args = args = self._resolve_arguments(args, eval_dataset is not None, compute_metrics)
        self.model_init, self.peft_config, self.processing_class = model_init, peft_config, processing_class
        self._logged: dict[str, LossTerm] = {}
        ranker, collator, train_dataset = self._prepare(model, train_dataset, eval_dataset)
        super().__init__(
            model=ranker,
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=self._own_tokenizer,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self.model_init = model_init  # not passed to Trainer, which would build the first model again
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStopping(args.early_stopping_patience))

    def call_model_init(self, trial: Any = None) -> Any:
        """Build the model and prepare it for training; see `Trainer.call_model_init`."""
        return self._prepare_model(super().call_model_init(trial))

    def _resolve_arguments(self, args: Any, has_eval_dataset: bool, compute_metrics: Any) -> Any:
        """Apply defaults and refuse options without effect; use one GPU per process."""
        args = resolve_arguments(args, self.config_class, type(self).__name__, has_eval_dataset)
        if args.batch_eval_metrics and compute_metrics is ranking_metrics:
            raise ValueError("batch_eval_metrics needs another compute_metrics: ranking_metrics needs the whole set.")
        if args.n_gpu > 1:
            logger.warning("Using one GPU of %d: use `accelerate launch` for all of them.", args.n_gpu)
            args._n_gpu = 1
        return args

    def _prepare(self, model: Any, train_dataset: Any, eval_dataset: Any) -> tuple[Any, GroupCollator, Any]:
        """Check the data sets; return the ranker, its collator and the training rows."""
        eval_sets = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
        for name, groups in {"train_dataset": train_dataset, **eval_sets}.items():
            check_dataset(groups, name, self.args)
        sample = None if train_dataset is None else sample_groups(train_dataset)
        if sample is not None:
            self.monitor = LossMonitor(self.check_groups(sample))
        if isinstance(train_dataset, IterableDataset):
            # Repeat first: each pass has its own order, and the step number defines the position in the stream.
            buffer_size = self.args.shuffle_buffer
            train_dataset = train_dataset.repeat(None).shuffle(seed=self.args.seed, buffer_size=buffer_size)
        set_seed(self.args.seed)  # same new head or adapter in every run and process
        ranker = self.call_model_init() if model is None else self._prepare_model(model)
        collator = GroupCollator(pair_collator(ranker, self._own_tokenizer))
        if sample is not None:
            warn_truncated(sample, collator)
        return ranker, collator, train_dataset

    def _prepare_model(self, model: Any) -> Any:
        """Build the ranker to train, with its limits in its config, and prepare the tokenizer once."""
        model = as_ranker(model, frozen=self.peft_config is not None)
        self.start_head(model)
        check_length(model.config, self.args.max_length or 1)
        if self._own_tokenizer is None:
            self._own_tokenizer = own_tokenizer(self.processing_class, model.config._name_or_path)
            # CrossEncoder and the servers truncate at the tokenizer's limit.
            self._own_tokenizer.model_max_length = self.args.max_length
        fit_tokenizer(model, self._own_tokenizer)
        model.config.update_marker(**self.marker())
        if self.peft_config is not None:
            model = add_adapter(model, self.peft_config)
        cast_weights(model, self.args.weights_dtype)
        return model

    def check_groups(self, groups: Dataset) -> float:
        """Check the target of the rows and return its spread; see `monitor.check_target`."""
        return check_target(groups, self.target, type(self).__name__)

    def start_head(self, ranker: Any) -> None:
        """Initialise a new head; nothing to do for losses on labels, which ignore a common offset."""

    def marker(self) -> dict[str, Any]:
        """Return the entries of the checkpoint's marker that depend on the training."""
        return {"max_length": self.args.max_length, "max_query_length": self.args.max_query_length}

    def get_train_dataloader(self) -> DataLoader:
        """Return batches of whole queries, by number or by token budget."""
        budget, collate, groups = self.args.token_budget, self.data_collator, self.train_dataset
        if budget is None:
            return super().get_train_dataloader()
        options = {"num_workers": self.args.dataloader_num_workers, "pin_memory": self.args.dataloader_pin_memory}
        if isinstance(groups, IterableDataset):
            stream = BudgetStream(groups, collate, budget, self.args.seed)
            loader = DataLoader(stream, batch_size=1, collate_fn=stream.collate_batch, **options)
        else:
            sampler = TokenBudgetSampler(
                *group_lengths(groups, collate),
                token_budget=budget,
                processes=self.args.world_size,
                seed=self.args.seed,
                epoch=lambda: int(self.state.epoch or 0),
            )
            loader = DataLoader(groups, batch_sampler=sampler, collate_fn=collate, **options)
        return self.accelerator.prepare(loader)

    def loss_terms(self, scores: Tensor, batch: dict[str, Tensor]) -> dict[str, tuple[float, LossTerm]]:
        """Compute the loss terms by name, each with its factor in the sum; terms of factor 0 are left out.

        The scores have the shape (queries, docs), like `mask`, `labels` and `teacher_scores` of the batch.
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
        """Return the micro-batches of a step, and the weight of each loss term over all of them and all processes."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        # The weights depend only on labels and mask, so zeros suffice as scores.
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
        """Compute the sum of the loss terms; `num_items_in_batch` is the weight of each term over the whole step."""
        scores = self.group_scores(model, inputs)
        terms = self.loss_terms(scores, inputs)
        weights = self._weights(terms) if num_items_in_batch is None else num_items_in_batch
        loss = sum(
            factor * term.total / weight.clamp(min=1.0)
            for (factor, term), weight in zip(terms.values(), weights, strict=True)
        )
        if model.training:
            self._accumulate_logs(terms, scores.detach(), inputs["mask"])
            # Gradients are averaged over processes, while `weights` are sums over all of them.
            loss = loss * self.accelerator.num_processes
        return (loss, scores) if return_outputs else loss

    def group_scores(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Score a batch of `GroupCollator`: fp32, shape (queries, docs), 0 where the mask is False."""
        pairs = {key: value for key, value in inputs.items() if key not in _GROUP_KEYS}
        mask = inputs["mask"]
        # The common prefix of a query's pairs is computed once; not measured on a GPU.
        if self.model.config.marker.role == "teacher" and mask.device.type == "cpu":
            pairs["groups"] = mask.nonzero()[:, 0].tolist()
        flat = model(**pairs).logits.squeeze(-1).float()
        return torch.zeros(mask.shape, device=flat.device).masked_scatter(mask, flat)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return loss, scores and labels (NaN where unknown) of a batch; see also `TrainerMixin`."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, scores = self.compute_loss(model, inputs, return_outputs=True)
            if type(self).compute_loss is RankingTrainer.compute_loss:
                rows = slice(self.real_rows(len(scores)))
                self.add_terms(self.loss_terms(scores[rows], {key: inputs[key][rows] for key in _GROUP_KEYS}))
        return (loss, None, None) if prediction_loss_only else (loss, scores, inputs["labels"])

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the mean of each loss term and of the score spread since the last entry."""
        if "loss" in logs and self._logged:
            for name, term in self._logged.items():
                total, weight = self.accelerator.reduce(torch.stack([term.total, term.weight]), "sum")
                logs[name] = round((total / weight.clamp(min=1.0)).item(), 4)
            self._logged = {}
            self.monitor.check(self.state.global_step, logs)
        elif "train_loss" in logs:
            self.monitor.check_end(self.state.global_step)
        super().log(logs, *args, **kwargs)

    def _weights(self, terms: dict[str, tuple[float, LossTerm]]) -> Tensor:
        if not terms:
            raise ValueError(f"All losses of {type(self).__name__} have weight 0: {self.args.loss_weights()}.")
        return torch.stack([term.weight for _, term in terms.values()])

    def _accumulate_logs(self, terms: dict[str, tuple[float, LossTerm]], scores: Tensor, mask: Tensor) -> None:
        seen = {name: term for name, (_, term) in terms.items()} | {"score_spread": score_spread(scores, mask)}
        for name, (total, weight) in seen.items():
            before = self._logged.get(name, (0.0, 0.0))
            self._logged[name] = LossTerm(before[0] + total.detach(), before[1] + weight)
