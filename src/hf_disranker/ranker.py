"""Ranker: tokenizer, model and text templates in one, for scoring."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from hf_disranker.batching import budget_batches, made_ahead, runs_within
from hf_disranker.collators import Encoded, PairCollator
from hf_disranker.packing import PACKED, pack
from hf_disranker.pair_ranker import Document, PairRanker
from hf_disranker.student import BertDistilledRanker
from hf_disranker.teacher import LLMForLastTokenRanking, prepare_tokenizer

logger = logging.getLogger(__name__)

DEFAULT_MAX_LENGTH = 512
DEFAULT_MAX_QUERY_LENGTH = 64
# Pairs tokenised at a time: enough to sort by length, little enough that the first do not keep the model waiting.
_CHUNK = 4096


class Ranker(PairRanker):
    """Scores documents for a query with a student or a teacher.

    Args:
        model: a `BertDistilledRanker` or an `LLMForLastTokenRanking`.
        tokenizer: its tokenizer.
        token_budget: tokens of a forward pass, padding included; None takes 2,048 on a CPU, whose caches hold no
            more of a small model's work, and 32,768 on a GPU.

    Attributes:
        share_prefix: compute what neighbouring pairs with the same query have in common once, without padding. On at
            first for a teacher with full attention on a CPU; what it gains on a GPU has not been measured.
    """

    def __init__(
        self,
        model: BertDistilledRanker | LLMForLastTokenRanking,
        tokenizer: PreTrainedTokenizerBase,
        token_budget: int | None = None,
    ) -> None:
        self.model = model.eval()
        self.token_budget = token_budget or (2048 if model.device.type == "cpu" else 32_768)
        self.collator = pair_collator(model, tokenizer)
        self.templates = self.collator.templates
        self.share_prefix = model.device.type == "cpu" and self._has_full_attention()
        self.queries_cut = 0
        self.documents_cut = 0
        self.tokens = 0

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike, device: str | None = None, **options: Any) -> Ranker:
        """Load a ranker from a folder or the Hub.

        Args:
            name_or_path: folder or Hub id.
            device: where it runs; None takes a GPU when there is one.
            options: go to the model's `from_pretrained`, for example `revision` or `dtype`. A CPU with AVX-512 BF16
                takes about half the time with dtype "bfloat16", for scores that differ in the third digit.

        Raises:
            ValueError: the checkpoint is of a kind that is not known, or holds no ranking head.
            OSError: neither a folder nor on the Hub.
        """
        hub = {key: options[key] for key in ("revision", "token", "cache_dir") if key in options}
        try:
            config = AutoConfig.from_pretrained(name_or_path, **hub)
        except OSError as error:
            if os.path.isdir(name_or_path):
                raise
            raise OSError(f"{name_or_path}: no such folder, and as a Hub id: {error}") from error
        kind = BertDistilledRanker if config.model_type == "bert" else LLMForLastTokenRanking
        model, info = kind.from_pretrained(name_or_path, output_loading_info=True, **options)
        if info["missing_keys"]:
            raise ValueError(f"{name_or_path} is no trained ranker: it lacks {sorted(info['missing_keys'])[:4]}.")
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **hub)
        head = getattr(model, "classifier", None) or getattr(model, "score", None)
        if head is not None and head.weight.dtype != torch.float32:
            # A score in bf16 has 8 bits, and documents of a query would tie.
            head.float().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
        return cls(model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), tokenizer)

    def predict(
        self, pairs: Sequence[tuple[str, Document]], progress: bool | Callable[[int], None] = False
    ) -> np.ndarray:
        """Score pairs.

        A score does not depend on which other pairs are scored with it, nor on their order, beyond rounding
        (about 1e-6 in fp32).

        Args:
            pairs: (query, document); a document is a string or a mapping with title and summary.
            progress: show a progress bar, or what to call with the number of pairs of each batch.

        Returns:
            Raw logits in the order of `pairs`, shape (len(pairs),), float32.
        """
        scores = np.zeros(len(pairs), dtype=np.float32)
        chunks = [pairs[start : start + _CHUNK] for start in range(0, len(pairs), _CHUNK)]
        start = 0
        with tqdm(total=len(pairs), desc="pairs", unit=" pairs", disable=not progress or callable(progress)) as bar:
            for encoded in made_ahead(self._encode, chunks):
                self.queries_cut += encoded.queries_cut
                self.documents_cut += encoded.documents_cut
                lengths = np.array([len(row["input_ids"]) for row in encoded.rows])
                self.tokens += int(lengths.sum())
                batches = runs_within if self.share_prefix else budget_batches
                for rows in batches(lengths, self.token_budget):
                    queries = [pairs[start + row][0] for row in rows]
                    scores[start + rows] = self._forward([encoded.rows[row] for row in rows], queries)
                    bar.update(len(rows))
                    if callable(progress):
                        progress(len(rows))
                start += len(lengths)
        return scores

    def _encode(self, pairs: Sequence[tuple[str, Document]]) -> Encoded:
        return self.collator.encode([query for query, _ in pairs], [self._text(document) for _, document in pairs])

    def _has_full_attention(self) -> bool:
        """Whether it is a decoder of ours in which a token sees all that stand before it, and nothing bends scores."""
        config = self.model.config
        window = getattr(config, "sliding_window", None) or self.collator.max_length
        plain = "gemma" not in config.model_type and window >= self.collator.max_length
        return isinstance(self.model, LLMForLastTokenRanking) and plain

    def _forward(self, rows: list[dict[str, list[int]]], queries: list[str]) -> np.ndarray:
        """Score tokenised rows together, or in halves when the memory does not hold them; then also what follows."""
        try:
            return self._shared(rows, queries) if self.share_prefix else self._padded(rows)
        except RuntimeError as error:
            if len(rows) == 1 or not should_reduce_batch_size(error):
                raise
        # Outside of the handler, whose traceback keeps the tensors of the failed pass.
        torch.cuda.empty_cache()
        self.token_budget = min(self.token_budget, sum(len(row["input_ids"]) for row in rows) // 2)
        logger.warning("Out of memory: going on with token_budget %d.", self.token_budget)
        half = len(rows) // 2
        return np.concatenate([self._forward(rows[at], queries[at]) for at in (slice(half), slice(half, None))])

    @torch.inference_mode()
    def _padded(self, rows: list[dict[str, list[int]]]) -> np.ndarray:
        batch = {key: tensor.to(self.model.device) for key, tensor in self.collator.pad(rows).items()}
        return self.model(**batch).scores.cpu().numpy()

    @torch.inference_mode()
    def _shared(self, rows: list[dict[str, list[int]]], queries: list[str]) -> np.ndarray:
        packed = pack([row["input_ids"] for row in rows], queries)
        ids, places = (tensor.to(self.model.device) for tensor in (packed.input_ids, packed.position_ids))
        decoder = self.model.model
        usual = decoder.config._attn_implementation
        decoder.set_attn_implementation(PACKED)
        try:
            hidden = decoder(input_ids=ids, position_ids=places, use_cache=False, packed=packed).last_hidden_state
        finally:
            decoder.set_attn_implementation(usual)
        return self.model.head_logits(hidden[0, packed.last]).squeeze(-1).float().cpu().numpy()


def pair_collator(
    model: BertDistilledRanker | LLMForLastTokenRanking, tokenizer: PreTrainedTokenizerBase
) -> PairCollator:
    """The collator that feeds a model as its checkpoint says."""
    marker = model.config.disranker
    if marker["role"] == "teacher":
        tokenizer = prepare_tokenizer(tokenizer, marker.get("ending"))
    else:
        tokenizer.padding_side = "right"  # BERT counts its positions from the left
    max_length = marker.get("max_length") or min(tokenizer.model_max_length, DEFAULT_MAX_LENGTH)
    max_query_length = marker.get("max_query_length") or min(DEFAULT_MAX_QUERY_LENGTH, max_length // 2)
    return PairCollator(tokenizer, model.config.templates, max_length, max_query_length)
