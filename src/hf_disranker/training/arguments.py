"""Options of the training stages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from hf_disranker.models.hub import TokenFreeArguments

WEIGHTS_DTYPES = ("float32", "bfloat16")
# Options of TrainingArguments that would be ignored or fail, with the only value that they may have.
_FIXED = {
    "remove_unused_columns": (False, "texts are tokenised when a batch is made"),
    "label_names": (None, "labels and teacher_scores are known by these names"),
    "label_smoothing_factor": (0.0, "grades and scores are no classes; override loss_terms for a loss of your own"),
}


@dataclass
class StageArguments(TokenFreeArguments):
    """Options of all training stages."""

    eval_strategy: str = field(
        default="auto",
        metadata={"help": "When to evaluate: no, steps or epoch; auto: every epoch if there is an evaluation set."},
    )
    weights_dtype: str = field(
        default="float32",
        metadata={
            "help": "Type of the weights that are trained, whatever the checkpoint was stored in; --bf16 computes in "
            "bf16 and keeps them. In bfloat16 most small updates are lost. Frozen weights, as under LoRA, stay as "
            "loaded.",
            "choices": list(WEIGHTS_DTYPES),
        },
    )

    def __post_init__(self) -> None:
        if self.weights_dtype not in WEIGHTS_DTYPES:
            raise ValueError(f"weights_dtype is {' or '.join(WEIGHTS_DTYPES)}, got {self.weights_dtype!r}.")
        if getattr(self, "bf16_full_eval", False) or getattr(self, "fp16_full_eval", False):
            raise ValueError("A full_eval in half precision would round the weights for good: take bf16 instead.")
        self.evaluates_by_default = self.eval_strategy == "auto"
        if self.evaluates_by_default:
            self.eval_strategy = "epoch"
        super().__post_init__()  # type: ignore[misc]


def check_arguments(trainer: str, model: Any, model_init: Any, optimizers: Any, refused: list[Any]) -> None:
    """Refuse what a trainer of rankers cannot honour.

    Args:
        trainer: name of the trainer, for messages.
        model: as passed.
        model_init: as passed.
        optimizers: as passed.
        refused: `data_collator` and `compute_loss_func`, as passed.

    Raises:
        TypeError: a collator or a loss function.
        ValueError: not one of model and model_init, or optimizers for a model that is still to be made.
    """
    if any(argument is not None for argument in refused):
        raise TypeError(
            f"{trainer} takes no data_collator and no compute_loss_func: it scores whole queries. Override loss_terms "
            "for a loss of your own; the model's templates say what a pair reads like."
        )
    if (model is None) == (model_init is None):
        raise ValueError(f"{trainer} needs a model or a model_init, one of them.")
    if model_init is not None and optimizers != (None, None):
        raise ValueError("optimizers belong to one model: with model_init pass optimizer_cls_and_kwargs.")


def settle_arguments(args: Any, kind: Any, trainer: str, has_eval_dataset: bool) -> Any:
    """Fill in default arguments and decide whether the trainer evaluates.

    Args:
        args: what the user passed; None takes the defaults of `kind`.
        kind: class of the arguments that the trainer needs.
        trainer: name of the trainer, for messages.
        has_eval_dataset: whether there is something to evaluate on.

    Raises:
        TypeError: arguments of another class.
        ValueError: options that need an evaluation set without one.
    """
    args = kind() if args is None else args
    if not isinstance(args, kind):
        raise TypeError(
            f"{trainer} takes args of {kind.__name__}, which has every option of TrainingArguments and its own; got "
            f"{type(args).__name__}."
        )
    if args.evaluates_by_default:
        args.eval_strategy = IntervalStrategy.EPOCH if has_eval_dataset else IntervalStrategy.NO
    for name in ("load_best_model_at_end", "early_stopping_patience"):
        if getattr(args, name, None) and not has_eval_dataset:
            raise ValueError(f"{name} needs an eval_dataset.")
    return args


@dataclass
class RankingConfig(StageArguments, TrainingArguments):
    """Training options of the ranking stages.

    A batch counts queries, each with all its documents, or tokens when `token_budget` is set. Defaults that differ
    from `TrainingArguments`: per_device_train_batch_size 8 and per_device_eval_batch_size 16, learning_rate 2e-5,
    warmup_steps 0.05 (a share of all steps), logging_steps 10, eval_strategy "auto" (every epoch if there is an
    eval_dataset), save_strategy "epoch", save_total_limit 1, remove_unused_columns and ddp_find_unused_parameters
    False, dataloader_pin_memory only with a GPU.
    """

    per_device_train_batch_size: int = field(default=8, metadata={"help": "Queries per step and device."})
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Queries per evaluation step and device."})
    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate of AdamW."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Warm-up steps; below 1, a share of all steps."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two log lines."})
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
        for name, (value, reason) in _FIXED.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name} must stay {value}: {reason}.")

    def loss_weights(self) -> dict[str, float]:
        """The weight of each loss term by its name."""
        names = [name for name in self.__dataclass_fields__ if name.endswith("_weight")]
        return {name.removesuffix("_weight"): getattr(self, name) for name in names}
