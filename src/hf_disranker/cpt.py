"""Stage 1: continued pre-training of a language model on clicks, query in, clicked title + summary out.

The rows go to trl's `SFTTrainer`; this module makes them and sets its defaults.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, Trainer
from trl import SFTConfig, SFTTrainer

from hf_disranker.hub import TokenFreeArguments
from hf_disranker.teacher import prepare_tokenizer
from hf_disranker.texts import TEACHER_TEMPLATES, Templates

_CHUNK = 10_000


@dataclass
class CptConfig(TokenFreeArguments, SFTConfig):
    """Options of the continued pre-training.

    Defaults that differ from trl's `SFTConfig`: learning_rate 1e-4, max_length 256, warmup_steps 0.03 (a share of all
    steps), completion_only_loss True (the loss is on title and summary), gradient_checkpointing False, bf16 False,
    eval_strategy "epoch", save_total_limit 1, report_to "none", hub_private_repo True (the model has read the clicks),
    dataloader_pin_memory only with a GPU.
    """

    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of AdamW."})
    max_length: int | None = field(default=256, metadata={"help": "Tokens of query, title and summary at most."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Warm-up steps; below 1, a share of all steps."})
    completion_only_loss: bool | None = field(default=True, metadata={"help": "Loss on title and summary only."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Trade time for memory."})
    bf16: bool | None = field(default=False, metadata={"help": "Train in bf16 where the hardware has it."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."})
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available, metadata={"help": "Pin memory for the way to a GPU."}
    )
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints to keep."})
    report_to: str = field(default="none", metadata={"help": "Where logs go: none, trackio, tensorboard ..."})
    hub_private_repo: bool | None = field(default=True, metadata={"help": "Whether a new repository is private."})


class ClickTrainer(SFTTrainer):
    """trl's `SFTTrainer`; on a CPU with the model's own loss.

    trl folds the vocabulary into the loss chunk by chunk, which saves GPU memory; on a CPU the same loss took three to
    eight times as long (32 x 48 tokens, 4,000 words).
    """

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """See `Trainer.compute_loss`."""
        kind = Trainer if self.args.device.type == "cpu" else SFTTrainer
        return kind.compute_loss(self, model, inputs, *args, **kwargs)


def click_dataset(
    clicks: pd.DataFrame,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    templates: Templates = TEACHER_TEMPLATES,
) -> Dataset:
    """Tokenised rows of clicks, in the very text that the teacher will read when it ranks.

    Args:
        clicks: columns query, title, summary.
        tokenizer: the model's; it is prepared as a teacher's.
        max_length: tokens of a row at most; longer rows lose their end.
        templates: the teacher's.

    Returns:
        Rows {input_ids, completion_mask}: the mask is 1 on title, summary and the end-of-sequence token. A click whose
        query alone fills the row is left out.
    """
    tokenizer = prepare_tokenizer(tokenizer)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "completion_mask": []}
    for start in range(0, len(clicks), _CHUNK):
        chunk = clicks.iloc[start : start + _CHUNK]
        queries = [templates.render_query(query) for query in chunk["query"]]
        documents = [templates.render_document(*texts) for texts in zip(chunk["title"], chunk["summary"], strict=True)]
        texts = [templates.render_text(*pair) for pair in zip(queries, documents, strict=True)]
        batch = tokenizer(texts, truncation=True, max_length=max_length, return_offsets_mapping=True)
        for query, ids, offsets in zip(queries, batch["input_ids"], batch["offset_mapping"], strict=True):
            prompt = len(templates.prompt(query))
            # Special tokens have the empty span (0, 0), so the first token at or behind the prompt's end is text.
            first = next((i for i, (begin, _) in enumerate(offsets) if begin >= prompt), None)
            if first is not None:
                rows["input_ids"].append(ids)
                rows["completion_mask"].append([0] * first + [1] * (len(ids) - first))
    return Dataset.from_dict(rows)
