"""Stage 1: continued pre-training of a language model on clicks with trl's `SFTTrainer`.

The model reads a query and learns to generate the clicked title and summary.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset, IterableDataset
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftConfig
from torch.nn.utils.rnn import pad_sequence
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from hf_disranker.data.schema import TableError
from hf_disranker.data.tables import is_hub_id
from hf_disranker.data.templates import TEACHER_TEMPLATES, Templates
from hf_disranker.models.card import TEMPLATES
from hf_disranker.models.checks import check_length
from hf_disranker.models.teacher import fit_embeddings, prepare_tokenizer
from hf_disranker.training.losses import LossTerm, TrainerMixin
from hf_disranker.training.setup import StageArguments, cast_weights, own_tokenizer, resolve_arguments, with_own_config

logger = logging.getLogger(__name__)

_CHUNK = 10_000
_PROMPT, _TITLE, _SUMMARY = range(3)
_CARD_OPTIONS = ("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "max_length", "seed")


@dataclass
class CptConfig(StageArguments, SFTConfig):
    """Options of the continued pre-training.

    The fields of trl's `SFTConfig` listed here have different defaults. Repositories are private, since the model
    may memorize clicks.
    """

    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of AdamW."})
    max_length: int | None = field(default=256, metadata={"help": "Maximum tokens of query, title and summary."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Warm-up steps; below 1, a share of all steps."})
    completion_only_loss: bool | None = field(default=True, metadata={"help": "Loss on title and summary only."})
    # None instead of False: newer versions of transformers warn about any value, since the option is renamed.
    gradient_checkpointing: bool | None = field(default=None, metadata={"help": "Trade time for memory."})
    bf16: bool | None = field(default=False, metadata={"help": "Compute in bf16."})
    report_to: str = field(default="none", metadata={"help": "Experiment tracker: none, trackio, tensorboard ..."})
    hub_private_repo: bool | None = field(default=True, metadata={"help": "If True, create a private repository."})


class ClickTrainer(TrainerMixin, SFTTrainer):
    """trl's `SFTTrainer`; on a CPU it uses the model's own loss.

    trl computes the loss in chunks of the vocabulary to save GPU memory; on a CPU this took three to eight times as
    long (32 x 48 tokens, vocabulary of 4,000). The evaluation loss is the mean over all tokens of the set.

    Arguments as in `SFTTrainer`: the data sets are rows of `click_dataset`; the tokenizer is copied and prepared for a
    teacher, and loaded from the model's checkpoint by default.

    Raises:
        TypeError: If the arguments are of another class.
        ValueError: If `packing` is on and the model attends across packed samples, or if max_length exceeds the
            model's positions.
    """

    def __init__(  # noqa: PLR0913
        self,
        model: PreTrainedModel | torch.nn.Module | str | os.PathLike,
        args: CptConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        compute_loss_func: Callable[..., torch.Tensor] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        peft_config: PeftConfig | None = None,
    ) -> None:
        args = resolve_arguments(args, CptConfig, type(self).__name__, eval_dataset is not None)
        chosen: Any = os.fspath(model) if isinstance(model, str | os.PathLike) else with_own_config(model)
        source = chosen if isinstance(chosen, str) else chosen.config._name_or_path
        tokenizer = own_tokenizer(processing_class, source)
        super().__init__(
            model=chosen,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=prepare_tokenizer(tokenizer),
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            peft_config=peft_config,
        )
        check_length(self.model.config, args.max_length or 1)
        fit_embeddings(self.model, tokenizer)
        if peft_config is None:  # trl chooses the type of its adapter
            cast_weights(self.model, args.weights_dtype)
        if args.packing:
            check_packing(self.model)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write README.md into the output folder; the arguments are those of trl and are not used."""
        if self.is_world_process_zero():
            folder, model = self.args.output_dir, self.accelerator.unwrap_model(self.model)
            base = model.config._name_or_path
            data = ModelCardData(
                base_model=base if is_hub_id(base) else None,
                library_name="transformers",
                pipeline_tag="text-generation",
                tags=["hf-disranker", "generated_from_trainer"],
            )
            card = ModelCard.from_template(
                data,
                template_path=str(TEMPLATES / "click_model_card.md"),
                name=os.path.basename(os.path.normpath(folder)),
                folder=folder,
                base=base if is_hub_id(base) else "a model that is not published",
                rows=len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else "streamed",
                template=getattr(model.config, "click_templates", TEACHER_TEMPLATES.to_dict())["text"],
                options="\n".join(f"| {name} | {getattr(self.args, name)} |" for name in _CARD_OPTIONS),
            )
            card.save(os.path.join(folder, "README.md"))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """See `Trainer.compute_loss`."""
        own = self.args.device.type == "cpu" and self.args.loss_type == "nll"
        kind = Trainer if own else SFTTrainer
        # In evaluation trl 1.0 counts the tokens of all processes; `prediction_step` needs the mean of this one.
        items = num_items_in_batch if model.training else None
        return kind.compute_loss(self, model, inputs, return_outputs, items)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, Any, Any]:
        """See `Trainer.prediction_step` and `TrainerMixin`."""
        rows = len(inputs["input_ids"])
        real = self.real_rows(rows) if prediction_loss_only else rows
        if real < rows:
            inputs = {key: value[: max(real, 1)] for key, value in inputs.items()}
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if self.compute_loss_func is None:
            tokens = (inputs["labels"][:real, 1:] != -100).sum().float()
            self.add_terms({"loss": (1.0, LossTerm(loss.detach() * tokens, tokens))})
        return loss, logits, labels


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Raise ValueError if packing a sample after another one changes its logits."""
    ids = torch.arange(1, 13, device=model.device).unsqueeze(0)
    places = torch.arange(6, device=model.device).repeat(2).unsqueeze(0)
    was_training = model.training
    model.eval()
    packed = model(input_ids=ids, position_ids=places).logits[:, 6:].float()
    alone = model(input_ids=ids[:, 6:], position_ids=places[:, 6:]).logits.float()
    model.train(was_training)
    if (packed - alone).norm() > 0.05 * alone.norm():
        raise ValueError(
            f"The attention of this model ({model.config._attn_implementation}) attends across packed samples: turn "
            "--packing off, or choose another --attn_implementation, for example flash_attention_2."
        )


def prepare_clicks(clicks: pd.DataFrame, min_users: int = 0, seed: int = 0) -> pd.DataFrame:
    """Drop rare queries, merge equal rows (query, title, summary), adding their weights, and resample rows by weight.

    Systematic resampling draws the same number of rows, each in proportion to its weight up to rounding, so that the
    expected gradient is that of the weighted loss.

    The `users` of a query are the maximum over its rows; `weight` defaults to 1.

    Raises:
        TableError: If `min_users` is set and there is no column `users`, or no row with a positive weight is left.
    """
    if "users" not in clicks.columns:
        if min_users:
            raise TableError(f"--min_users {min_users} needs a column 'users', the number of users of the query.")
        logger.warning("The clicks have no column 'users': the model may memorize rare, personal queries.")
    elif min_users:
        rare = clicks.groupby("query")["users"].transform("max") < min_users
        share = 100 * rare.mean()
        logger.warning("Dropped %.1f%% of the clicks: queries of fewer than %d users.", share, min_users)
        clicks = clicks[~rare]
    weights = clicks.get("weight", pd.Series(1.0, clicks.index))
    same = clicks.assign(weight=weights).groupby(["query", "title", "summary"], sort=False, as_index=False)
    rows = same["weight"].sum()
    if not rows["weight"].sum() > 0:
        raise TableError("No clicks left to train on: all were dropped or have weight 0.")
    cumulated = rows["weight"].cumsum().to_numpy()
    places = (np.arange(len(rows)) + np.random.default_rng(seed).random()) * cumulated[-1] / len(rows)
    return rows.iloc[np.searchsorted(cumulated, places, side="right").clip(max=len(rows) - 1)].reset_index(drop=True)


def click_dataset(
    clicks: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, max_length: int, templates: Templates = TEACHER_TEMPLATES
) -> Dataset:
    """Tokenize clicks (query, title, summary) with the teacher's templates; longer rows are truncated at the end.

    A copy of the tokenizer is prepared for a teacher.

    Returns:
        Rows {input_ids, completion_mask}: the mask is 1 on title, summary and the end-of-sequence token. Clicks whose
        query leaves no room for the document are dropped.
    """
    rows: dict[str, list[list[int]]] = {"input_ids": [], "completion_mask": []}
    for ids, parts in _encoded(clicks, tokenizer, max_length, templates):
        rows["input_ids"].append(ids)
        rows["completion_mask"].append([int(part != _PROMPT) for part in parts])
    return Dataset.from_dict(rows)


@torch.no_grad()
def click_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    clicks: pd.DataFrame,
    max_length: int,
    templates: Templates = TEACHER_TEMPLATES,
) -> dict[str, float]:
    """Compute the mean loss per token, in nats, of titles and of summaries with the end-of-sequence token.

    Parts without tokens are left out. Arguments as in `click_dataset`.
    """
    totals, counts = torch.zeros(2, 3, dtype=torch.float64)
    rows = sorted(_encoded(clicks, tokenizer, max_length, templates), key=lambda row: len(row[0]))
    was_training = model.training
    model.eval()
    for start in range(0, len(rows), 32):
        batch = [[torch.tensor(part) for part in row] for row in rows[start : start + 32]]
        ids = pad_sequence([ids for ids, _ in batch], batch_first=True).to(model.device)
        parts = pad_sequence([parts for _, parts in batch], batch_first=True, padding_value=-1).to(model.device)
        logits = model(input_ids=ids, attention_mask=(parts >= 0).long()).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        for part in (_TITLE, _SUMMARY):
            chosen = parts[:, 1:] == part
            totals[part] += losses[chosen].sum().cpu()
            counts[part] += chosen.sum().cpu()
    model.train(was_training)
    named = {"title": _TITLE, "summary": _SUMMARY}
    return {name: (totals[part] / counts[part]).item() for name, part in named.items() if counts[part]}


def _encoded(
    clicks: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, max_length: int, templates: Templates
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the token ids of each click and the part of the text of each token."""
    tokenizer = prepare_tokenizer(copy.deepcopy(tokenizer))
    for start in range(0, len(clicks), _CHUNK):
        chunk = clicks.iloc[start : start + _CHUNK]
        queries = [templates.render_query(query) for query in chunk["query"]]
        pairs = list(zip(queries, chunk["title"], chunk["summary"], strict=True))
        texts = [templates.render_text(query, templates.render_document(*texts)) for query, *texts in pairs]
        batch = tokenizer(texts, truncation=True, max_length=max_length, return_offsets_mapping=True)
        for (query, title, _), ids, offsets in zip(pairs, batch["input_ids"], batch["offset_mapping"], strict=True):
            prompt = len(templates.prompt(query))
            title_end = len(templates.render_text(query, templates.render_document(title, "")))
            # Special tokens have the empty span (0, 0), so the first token from the end of the prompt on is text.
            first = next((i for i, (begin, _) in enumerate(offsets) if begin >= prompt), None)
            if first is not None:
                ends = [_TITLE if 0 < end <= title_end else _SUMMARY for _, end in offsets[first:]]
                yield ids, [_PROMPT] * first + ends
