"""Options and preparation shared by the trainers: arguments, model, adapter, weights and tokenizer."""

from __future__ import annotations

import copy
import logging
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import EarlyStoppingCallback, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from hf_disranker.models.checkpoint import RankerConfigMixin, load_config, load_tokenizer
from hf_disranker.models.loading import ranker_class

logger = logging.getLogger(__name__)

WEIGHTS_DTYPES = ("float32", "bfloat16")
# Options of TrainingArguments that would be ignored or fail, with their only valid value.
_FIXED = {
    "remove_unused_columns": (False, "texts are tokenized in the collator"),
    "label_names": (None, "the label columns are labels and teacher_scores"),
    "label_smoothing_factor": (0.0, "grades and scores are not classes; override loss_terms for a custom loss"),
}


@dataclass
class StageArguments:
    """Options of all training stages."""

    eval_strategy: str = field(
        default="auto",
        metadata={"help": "When to evaluate: no, steps or epoch; auto: every epoch if there is an evaluation set."},
    )
    weights_dtype: str = field(
        default="float32",
        metadata={
            "help": "Type of the trained weights, independent of the checkpoint; --bf16 computes in bf16 and "
            "keeps this type. In bfloat16 most small updates are lost. Frozen weights, as under LoRA, keep theirs.",
            "choices": list(WEIGHTS_DTYPES),
        },
    )
    save_total_limit: int | None = field(default=1, metadata={"help": "Maximum number of checkpoints."})
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available, metadata={"help": "Pin memory for transfers; default: with a GPU."}
    )

    def __post_init__(self) -> None:
        if self.weights_dtype not in WEIGHTS_DTYPES:
            raise ValueError(f"weights_dtype is {' or '.join(WEIGHTS_DTYPES)}, got {self.weights_dtype!r}.")
        if getattr(self, "bf16_full_eval", False) or getattr(self, "fp16_full_eval", False):
            raise ValueError("Full evaluation in half precision would round the weights for good: use bf16 instead.")
        self.evaluates_by_default = self.eval_strategy == "auto"
        if self.evaluates_by_default:
            self.eval_strategy = "epoch"
        super().__post_init__()  # type: ignore[misc]
        options: Any = self
        if options.load_best_model_at_end and options.save_total_limit == 1:
            # Trainer would keep the best checkpoint alone, from which a finished run would train on when repeated.
            options.save_total_limit = 2

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the token: Trainer pickles its arguments into checkpoints and pushes them."""
        return {**self.__dict__, "hub_token": None}


@dataclass
class RankingConfig(StageArguments, TrainingArguments):
    """Training options of the ranking stages.

    A batch is a number of queries, each with all its documents, or of tokens if `token_budget` is set. The fields of
    `TrainingArguments` listed here have different defaults.
    """

    per_device_train_batch_size: int = field(default=8, metadata={"help": "Queries per step and device."})
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Queries per evaluation step and device."})
    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate of AdamW."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Warm-up steps; below 1, a share of all steps."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between log entries."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save a checkpoint: no, steps or epoch."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Search for weights without gradient in every step; rankers have none."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay False: the collator tokenizes."})
    max_length: int = field(default=256, metadata={"help": "Maximum tokens of a query-document pair."})
    max_query_length: int = field(default=32, metadata={"help": "Maximum tokens of a query."})
    token_budget: int | None = field(
        default=None,
        metadata={
            "help": "Tokens per step and device, including padding; queries of similar length share a step. "
            "None: use per_device_train_batch_size."
        },
    )
    shuffle_buffer: int = field(default=1000, metadata={"help": "Queries in the shuffle buffer of a stream."})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Evaluations without improvement of metric_for_best_model before stopping."}
    )
    hinge_weight: float = field(default=1.0, metadata={"help": "Weight of the pairwise hinge loss on labels."})
    hinge_margin: float = field(
        default=1.0, metadata={"help": "Target score difference of two grades. Our default: the paper's is unknown."}
    )
    ranknet_weight: float = field(default=0.0, metadata={"help": "Weight of the pairwise logistic loss on labels."})
    softmax_weight: float = field(default=0.0, metadata={"help": "Weight of the listwise softmax loss on labels."})

    def __post_init__(self) -> None:
        super().__post_init__()
        # Batches have ragged shapes, which the first process cannot split for the others.
        if self.accelerator_config.dispatch_batches is None:
            self.accelerator_config.dispatch_batches = False
        weights = self.loss_weights()
        if min(weights.values()) < 0 or not any(weights.values()):
            raise ValueError(f"Loss weights must not be negative, and at least one must be positive: {weights}.")
        for name, (value, reason) in _FIXED.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name} must stay {value}: {reason}.")

    def loss_weights(self) -> dict[str, float]:
        """Return the weight of each loss term by name."""
        names = [name for name in self.__dataclass_fields__ if name.endswith("_weight")]
        return {name.removesuffix("_weight"): getattr(self, name) for name in names}


class EarlyStopping(EarlyStoppingCallback):
    """`EarlyStoppingCallback` that keeps its count when a run resumes, so that a stopped run stays stopped."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the count of the checkpoint; a run from the first step counts from 0."""
        super().on_train_begin(args, state, control, **kwargs)
        resumed = state.stateful_callbacks if state.global_step else {}  # else they are those of the run before
        stored = resumed.get(type(self).__name__, {}).get("attributes", {})
        self.early_stopping_patience_counter = stored.get("early_stopping_patience_counter", 0)
        control.should_training_stop = self.early_stopping_patience_counter >= self.early_stopping_patience


def check_arguments(trainer: str, model: Any, model_init: Any, optimizers: Any, refused: list[Any]) -> None:
    """Refuse arguments of `Trainer` that a trainer of rankers cannot use; `refused` are collator and loss function."""
    if any(argument is not None for argument in refused):
        raise TypeError(
            f"{trainer} accepts no data_collator and no compute_loss_func: a batch is whole queries, rendered by the "
            "model's templates. Override loss_terms for a custom loss."
        )
    if (model is None) == (model_init is None):
        raise ValueError(f"{trainer} needs either a model or a model_init.")
    if model_init is not None and optimizers != (None, None):
        raise ValueError("optimizers belong to one model: with model_init pass optimizer_cls_and_kwargs.")


def resolve_arguments(args: Any, kind: Any, trainer: str, has_eval_dataset: bool) -> Any:
    """Apply the default arguments of class `kind`, resolve the evaluation strategy and check both."""
    args = kind() if args is None else args
    if not isinstance(args, kind):
        raise TypeError(
            f"{trainer} needs args of {kind.__name__}, which extends TrainingArguments; got {type(args).__name__}."
        )
    if args.evaluates_by_default:
        args.eval_strategy = IntervalStrategy.EPOCH if has_eval_dataset else IntervalStrategy.NO
    for name in ("load_best_model_at_end", "early_stopping_patience"):
        if getattr(args, name, None) and not has_eval_dataset:
            raise ValueError(f"{name} needs an eval_dataset.")
    return args


def as_ranker(model: Any, frozen: bool = False) -> Any:
    """Return the ranker to train, with its own config, since the trainers write limits into it.

    If `frozen`, the weights of a folder are loaded in their stored type, since only an adapter is trained.
    """
    if isinstance(model, str | os.PathLike):
        model = ranker_class(load_config(model).model_type).from_pretrained(
            model, dtype="auto" if frozen else torch.float32
        )
    elif not isinstance(getattr(model, "config", None), RankerConfigMixin):
        model = _shared(model)
    return with_own_config(model)


def with_own_config(model: Any) -> Any:
    """Replace the config of a model by a copy, so that training does not change a shared config."""
    old = model.config
    config = copy.deepcopy(old)
    for module in model.modules():
        if vars(module).get("config") is old:
            module.config = config
    return model


def _shared(model: Any) -> Any:
    """Build a ranker that shares the weights of a stock sequence classifier."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) or not name.endswith("ForSequenceClassification"):
        raise TypeError(
            f"A {name} is not a ranker: pass a DistilledRanker, an LLMForLastTokenRanking, a stock "
            "...ForSequenceClassification with num_labels=1, or the folder or Hub id of a checkpoint."
        )
    kind = ranker_class(model.config.model_type)
    if getattr(model, "is_quantized", False):
        raise ValueError(f"The {name} is quantized: load it with {kind.__name__}.")
    if model.config.num_labels != 1:
        raise ValueError(
            f"The {name} has {model.config.num_labels} labels; a ranker has one: load it with num_labels=1."
        )
    config = kind.config_class.from_dict(model.config.to_dict())
    config._name_or_path = model.config._name_or_path
    with torch.device("meta"):
        ranker = kind(config)
    for part, module in model.named_children():
        setattr(ranker, part, module)
    return ranker.train(model.training)


def own_tokenizer(tokenizer: PreTrainedTokenizerBase | None, source: str | None) -> PreTrainedTokenizerBase:
    """Copy the tokenizer of the user, or load the one of the model's checkpoint; ValueError if there is neither."""
    if tokenizer is not None:
        return copy.deepcopy(tokenizer)
    if not source:
        raise ValueError("The model was not loaded from a checkpoint: pass processing_class, its tokenizer.")
    return load_tokenizer(source)


def add_adapter(model: Any, peft_config: PeftConfig) -> Any:
    """Add an adapter to a ranker; the head is trained too, which a config for another task would freeze."""
    if not isinstance(peft_config, PeftConfig):
        raise TypeError(f"peft_config must be a config of peft, such as LoraConfig; got {type(peft_config).__name__}.")
    if hasattr(model, "peft_config"):
        raise ValueError("The model has an adapter already: leave peft_config out.")
    if peft_config.task_type not in (None, "SEQ_CLS"):
        raise ValueError(f"The task_type of peft_config is {peft_config.task_type}; a ranker's is SEQ_CLS.")
    peft_config = copy.deepcopy(peft_config)
    peft_config.task_type = "SEQ_CLS"
    return get_peft_model(model, peft_config)


def cast_weights(model: nn.Module, dtype: str) -> None:
    """Cast the weights to the requested type.

    With an adapter or quantized weights only the trainable weights are cast, since frozen layers must match the rest.
    """
    partly = hasattr(model, "peft_config") or getattr(model, "is_quantized", False)
    wanted = getattr(torch, dtype)
    weights = [
        weight
        for weight in model.parameters()
        # DeepSpeed ZeRO-3 partitions the weights and keeps fp32 copies itself.
        if weight.is_floating_point() and (weight.requires_grad or not partly) and not hasattr(weight, "ds_id")
    ]
    found = {str(weight.dtype).removeprefix("torch.") for weight in weights if weight.dtype != wanted}
    for weight in weights:
        weight.data = weight.data.to(wanted)
    if partly and found:
        for layer in model.modules():
            if isinstance(layer, nn.Linear) and layer.weight.requires_grad:
                # The trained head receives hidden states in the type of the frozen layers.
                layer.register_forward_pre_hook(_cast_input)
    if found:
        stored = " and ".join(sorted(found))
        logger.warning("The weights are %s and are trained in %s; see weights_dtype.", stored, dtype)
    else:
        logger.info("Training %s weights in %s.", f"{sum(weight.numel() for weight in weights):,}", dtype)


def _cast_input(layer: nn.Linear, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return inputs[0].to(layer.weight.dtype), *inputs[1:]
