"""Ranker: tokenizer, model and text templates in one, for scoring."""

from __future__ import annotations

import copy
import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from hf_disranker.data.collators import Encoded, PairCollator, budget_batches, prefetch_map, runs_within
from hf_disranker.data.templates import LIKELIHOOD_TEMPLATE
from hf_disranker.models.base import Pair, PairRanker, check_batch_size, listed
from hf_disranker.models.checks import check_length, position_limit
from hf_disranker.models.loading import RankerModel, fit_tokenizer, load_ranker_model
from hf_disranker.models.packing import PACKED
from hf_disranker.models.teacher import LLMForLastTokenRanking

logger = logging.getLogger(__name__)

DEFAULT_MAX_LENGTH = 512
DEFAULT_MAX_QUERY_LENGTH = 64
DEFAULT_DOCUMENT_TOKENS = 256
_COUNTING = threading.Lock()

Row = TypeVar("Row")


class Ranker(PairRanker):
    """Scores documents for a query with a student or a teacher. Threads can share one.

    Args:
        model: A `DistilledRanker` or an `LLMForLastTokenRanking`; or a folder or Hub id, loaded by
            `from_pretrained`.
        tokenizer: The model's tokenizer, which is copied; None for a folder or Hub id.
        token_budget: Tokens of a forward pass, padding included; None for 2,048 on CPU, where more exceeds the caches
            for a small model, and 32,768 on GPU.

    Attributes:
        share_prefix: If True, the common prefix of neighbouring pairs with the same query is computed once; only for
            teachers of families without padding. On by default on CPU; not measured on GPU.
        queries_cut: Number of truncated queries so far.
        documents_cut: Number of truncated documents so far.
        tokens: Number of tokens read so far, without padding.

    Raises:
        ValueError: If tokenizer and model do not fit, or the limits leave no room for a document.
    """

    queries_cut = 0
    documents_cut = 0
    tokens = 0
    _by_likelihood = False
    # Pairs tokenised at a time: enough to sort by length, few enough not to delay the first forward pass.
    _chunk = 4096

    def __init__(
        self,
        model: RankerModel | str | os.PathLike,
        tokenizer: PreTrainedTokenizerBase | None = None,
        token_budget: int | None = None,
    ) -> None:
        if isinstance(model, str | os.PathLike):
            model, tokenizer = load_ranker_model(model, tokenizer=tokenizer)
            to_device(model)
        elif tokenizer is None:
            raise ValueError("Pass the tokenizer with the model, or the folder or Hub id of both.")
        self.model = model.eval()
        self.token_budget = token_budget or (2048 if model.device.type == "cpu" else 32_768)
        self.collator = pair_collator(model, copy.deepcopy(tokenizer))
        self.tokenizer = self.collator.tokenizer
        self.templates = self.collator.templates
        self.share_prefix = model.device.type == "cpu" and self._can_share()

    @classmethod
    def from_pretrained(  # noqa: PLR0913
        cls,
        name_or_path: str | os.PathLike,
        device: str | None = None,
        token_budget: int | None = None,
        *,
        dtype: str | torch.dtype = "auto",
        attn_implementation: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        subfolder: str = "",
        local_files_only: bool = False,
        use_safetensors: bool = True,
        likelihood: bool = False,
        likelihood_template: str = LIKELIHOOD_TEMPLATE,
        document_tokens: int = DEFAULT_DOCUMENT_TOKENS,
        gguf_file: str | None = None,
    ) -> Ranker:
        """Load a ranker from a folder or the Hub, or, with `likelihood`, a language model as a `LikelihoodRanker`.

        Args:
            name_or_path: Folder or Hub id.
            device: Device to run on; None for a GPU if there is one.
            token_budget: As in the class.
            dtype: Precision of the weights; "auto" for that of the checkpoint. A CPU with AVX-512 BF16 needs about
                half the time with "bfloat16", for scores that differ in the third digit.
            attn_implementation: Attention of the model: sdpa, eager ...
            revision: Branch, tag or commit on the Hub.
            token: Token for the Hub.
            cache_dir: Folder of downloads.
            subfolder: Folder of the checkpoint within the repository.
            local_files_only: If True, use only what was downloaded before.
            use_safetensors: If False, pickled weights are read as well, which can run code.
            likelihood: If True, score by mean log P(query | document) under any causal language model.
            likelihood_template: With `likelihood`, text with title and summary, and the query at the end.
            document_tokens: With `likelihood`, maximum tokens of a document.
            gguf_file: With `likelihood`, GGUF file of the model, dequantised by the package gguf.

        Raises:
            ValueError: If the family is not supported, the checkpoint has no ranking head or is not a language model,
                or the template is malformed.
            OSError: If there is no such folder or Hub repository.
        """
        hub: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir, "subfolder": subfolder}
        options = hub | {"local_files_only": local_files_only, "use_safetensors": use_safetensors}
        options |= {"dtype": dtype, "attn_implementation": attn_implementation}
        if likelihood or cls._by_likelihood:
            # Not at the top: the module imports this one.
            from hf_disranker.models.likelihood import load_likelihood_ranker

            limits = (likelihood_template, document_tokens, token_budget)
            return load_likelihood_ranker(name_or_path, *limits, device=device, gguf_file=gguf_file, **options)
        if gguf_file or (likelihood_template, document_tokens) != (LIKELIHOOD_TEMPLATE, DEFAULT_DOCUMENT_TOKENS):
            raise ValueError("likelihood_template, document_tokens and gguf_file need likelihood=True.")
        model, tokenizer = load_ranker_model(name_or_path, **options)
        return cls(to_device(model, device), tokenizer, token_budget)

    def describe(self) -> dict[str, Any]:
        """Describe the input for provenance: templates and limits."""
        limits = {"max_length": self.collator.max_length, "max_query_length": self.collator.max_query_length}
        return {"engine": "transformers", "templates": self.templates.to_dict(), **limits}

    def predict(
        self,
        pairs: Sequence[Pair] | Pair,
        batch_size: int | None = None,
        show_progress_bar: bool = False,
        callback: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Score pairs as `PairRanker.predict` does.

        A score does not depend on the other pairs nor on their order, beyond rounding (about 1e-6 in fp32).

        Args:
            pairs: As in `PairRanker.predict`.
            batch_size: As in `PairRanker.predict`.
            show_progress_bar: As in `PairRanker.predict`.
            callback: Called with the number of pairs of each batch.
        """
        check_batch_size(batch_size)
        pairs, alone = listed(pairs)
        scores = np.full(len(pairs), np.nan, dtype=np.float32)
        chunks = [pairs[start : start + self._chunk] for start in range(0, len(pairs), self._chunk)]
        start = 0
        with tqdm(total=len(pairs), desc="pairs", unit=" pairs", disable=not show_progress_bar) as bar:
            for encoded in prefetch_map(self._encode, chunks):
                self._count(encoded)
                for rows in self._batches(encoded.rows, batch_size):
                    batch = [(encoded.rows[row], pairs[start + row][0]) for row in rows]
                    scores[start + rows] = score_in_halves(self._forward, batch, self._reduce_budget)
                    bar.update(len(rows))
                    if callback is not None:
                        callback(len(rows))
                start += len(encoded.rows)
        return scores[0] if alone else scores

    def _batches(self, rows: Sequence[dict[str, list[int]]], batch_size: int | None) -> list[np.ndarray]:
        lengths = np.array([len(row["input_ids"]) for row in rows])
        shared = self.share_prefix and self._can_share()
        if batch_size is None:
            return (runs_within if shared else budget_batches)(lengths, self.token_budget)
        order = np.arange(len(lengths)) if shared else np.argsort(-lengths, kind="stable")
        return np.split(order, range(batch_size, len(order), batch_size))

    def _count(self, encoded: Encoded) -> None:
        tokens = sum(map(row_length, encoded.rows))
        with _COUNTING:
            self.queries_cut += encoded.queries_cut
            self.documents_cut += encoded.documents_cut
            self.tokens += tokens

    def _encode(self, pairs: Sequence[Pair]) -> Encoded:
        return self.collator.encode([query for query, _ in pairs], [self._text(document) for _, document in pairs])

    def _can_share(self) -> bool:
        attention = self.model.base_model.config._attn_implementation
        return isinstance(self.model, LLMForLastTokenRanking) and attention == PACKED

    @torch.inference_mode()
    def _forward(self, rows: Sequence[tuple[dict[str, list[int]], str]]) -> np.ndarray:
        """Score tokenised rows, each with its query, in one pass."""
        batch: dict[str, Any] = self.collator.pad([row for row, _ in rows])
        batch = {key: tensor.to(self.model.device) for key, tensor in batch.items()}
        if self.share_prefix and self._can_share():
            batch["groups"] = [query for _, query in rows]
        return self.model(**batch).scores.cpu().numpy()

    def _reduce_budget(self, rows: Sequence[tuple[dict[str, list[int]], str]]) -> None:
        """Reduce the token budget to half of these rows, which did not fit into memory."""
        self._set_budget(min(self.token_budget, sum(row_length(row) for row, _ in rows) // 2))

    def _set_budget(self, tokens: int) -> None:
        self.token_budget = max(1, tokens)
        logger.warning("Out of memory: continuing with token_budget %d.", self.token_budget)


def row_length(row: dict[str, list[int]]) -> int:
    """Return the number of tokens of a row, with those of the query that a language model has as `labels`."""
    return len(row["input_ids"]) + len(row.get("labels", ()))


def to_device(model: Any, device: str | None = None) -> Any:
    """Move a loaded model to its device, by default a GPU if there is one."""
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def pair_collator(model: RankerModel, tokenizer: PreTrainedTokenizerBase) -> PairCollator:
    """Return the collator for a ranker; tokenizer and model are fitted to each other in place.

    Raises:
        ValueError: If tokenizer and model do not fit, or the limits leave no room for a document or exceed the
            model's positions.
    """
    marker, positions = model.config.marker, position_limit(model.config)
    fit_tokenizer(model, tokenizer)
    default = min(tokenizer.model_max_length, DEFAULT_MAX_LENGTH, positions or DEFAULT_MAX_LENGTH)
    max_length = marker.max_length or default
    check_length(model.config, max_length)
    max_query_length = marker.max_query_length or min(DEFAULT_MAX_QUERY_LENGTH, max_length // 2)
    return PairCollator(tokenizer, marker.templates, max_length, max_query_length)


def score_in_halves(
    score: Callable[[Sequence[Row]], np.ndarray], rows: Sequence[Row], reduce: Callable[[Sequence[Row]], None]
) -> np.ndarray:
    """Score rows together, or in halves if they do not fit into memory.

    Args:
        score: Scores a batch, shape (rows,).
        rows: Rows of the batch.
        reduce: Called with the rows that did not fit, to make later batches smaller.

    Raises:
        RuntimeError: If a single row does not fit, or for any other error of the forward pass.
    """
    try:
        return score(rows)
    except RuntimeError as error:
        if len(rows) == 1 or not should_reduce_batch_size(error):
            raise
    # Outside the handler, whose traceback keeps the tensors of the failed pass alive.
    torch.cuda.empty_cache()
    reduce(rows)
    half = len(rows) // 2
    return np.concatenate([score_in_halves(score, part, reduce) for part in (rows[:half], rows[half:])])
