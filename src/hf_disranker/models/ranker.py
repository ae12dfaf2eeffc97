"""Ranker: tokenizer, model and text templates in one, for scoring."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from hf_disranker.data.collators import Encoded, PairCollator, budget_batches, prefetch_map, runs_within
from hf_disranker.models.base import Pair, PairRanker, listed
from hf_disranker.models.checkpoint import (
    HUB_OPTIONS,
    check_length,
    check_vocabulary,
    load_config,
    load_tokenizer,
    position_limit,
)
from hf_disranker.models.memory import score_in_halves
from hf_disranker.models.packing import PACKED, pack
from hf_disranker.models.student import BertDistilledRanker
from hf_disranker.models.teacher import LLMForLastTokenRanking, fit_embeddings, prepare_tokenizer

logger = logging.getLogger(__name__)

DEFAULT_MAX_LENGTH = 512
DEFAULT_MAX_QUERY_LENGTH = 64
# Pairs tokenised at a time: enough to sort by length, little enough that the first do not keep the model waiting.
_CHUNK = 4096
_COUNTING = threading.Lock()


class Ranker(PairRanker):
    """Scores documents for a query with a student or a teacher; threads can share one.

    Args:
        model: a `BertDistilledRanker` or an `LLMForLastTokenRanking`.
        tokenizer: its tokenizer.
        token_budget: tokens of a forward pass, padding included; None takes 2,048 on a CPU, whose caches hold no
            more of a small model's work, and 32,768 on a GPU.

    Attributes:
        share_prefix: compute what neighbouring pairs with the same query have in common once, without padding; only a
            teacher with full attention by sdpa does. On at first on a CPU; the gain on a GPU has not been measured.
        queries_cut: queries beyond their limit so far.
        documents_cut: documents of which not all was read.
        tokens: read so far, without padding.
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
        if self._has_full_attention():
            self.model.model.set_attn_implementation(PACKED)
        self.share_prefix = model.device.type == "cpu" and self._can_share()
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
        hub = {key: options[key] for key in HUB_OPTIONS if key in options}
        is_bert = load_config(name_or_path, **hub).model_type == "bert"
        kind = BertDistilledRanker if is_bert else LLMForLastTokenRanking
        model, info = kind.from_pretrained(name_or_path, output_loading_info=True, **options)
        if info["missing_keys"]:
            stage = "`disranker distill` trains one on a BERT" if is_bert else "`disranker fit_teacher` trains one"
            raise ValueError(
                f"{name_or_path} is no trained ranker: it lacks {sorted(info['missing_keys'])[:4]}, the ranking head; "
                f"{stage}."
            )
        tokenizer = load_tokenizer(name_or_path, **hub)
        head = getattr(model, "classifier", None) or getattr(model, "score", None)
        if head is not None and head.weight.dtype != torch.float32:
            # A score in bf16 has 8 bits, and documents of a query would tie.
            head.float().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
        return cls(model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), tokenizer)

    def predict(self, pairs: Sequence[Pair] | Pair, progress: bool | Callable[[int], None] = False) -> np.ndarray:
        """Score pairs.

        A score does not depend on which other pairs are scored with it, nor on their order, beyond rounding
        (about 1e-6 in fp32).

        Args:
            pairs: (query, document); a document is a string or a mapping with title and summary, of which one that is
                missing, None or NaN is an empty text.
            progress: show a progress bar, or what to call with the number of pairs of each batch.

        Returns:
            Raw logits in the order of `pairs`, shape (len(pairs),), float32; of a single pair its score alone.
        """
        pairs, alone = listed(pairs)
        scores = np.zeros(len(pairs), dtype=np.float32)
        chunks = [pairs[start : start + _CHUNK] for start in range(0, len(pairs), _CHUNK)]
        start = 0
        with tqdm(total=len(pairs), desc="pairs", unit=" pairs", disable=not progress or callable(progress)) as bar:
            for encoded in prefetch_map(self._encode, chunks):
                lengths = np.array([len(row["input_ids"]) for row in encoded.rows])
                self._count(encoded, int(lengths.sum()))
                batches = runs_within if self.share_prefix and self._can_share() else budget_batches
                for rows in batches(lengths, self.token_budget):
                    batch = [(encoded.rows[row], pairs[start + row][0]) for row in rows]
                    scores[start + rows] = score_in_halves(self._forward, batch, self._reduce_budget)
                    bar.update(len(rows))
                    if callable(progress):
                        progress(len(rows))
                start += len(lengths)
        return scores[0] if alone else scores

    def _count(self, encoded: Encoded, tokens: int) -> None:
        with _COUNTING:
            self.queries_cut += encoded.queries_cut
            self.documents_cut += encoded.documents_cut
            self.tokens += tokens

    def _encode(self, pairs: Sequence[Pair]) -> Encoded:
        return self.collator.encode([query for query, _ in pairs], [self._text(document) for _, document in pairs])

    def _has_full_attention(self) -> bool:
        """Whether it is a decoder with full causal attention by sdpa, without soft-capping of the logits."""
        if not isinstance(self.model, LLMForLastTokenRanking):
            return False
        config = self.model.config
        window = getattr(config, "sliding_window", None) or self.collator.max_length
        by_sdpa = self.model.model.config._attn_implementation in ("sdpa", PACKED)
        return by_sdpa and "gemma" not in config.model_type and window >= self.collator.max_length

    def _can_share(self) -> bool:
        decoder = self.model.model if isinstance(self.model, LLMForLastTokenRanking) else self.model
        return decoder.config._attn_implementation == PACKED

    def _forward(self, rows: Sequence[tuple[dict[str, list[int]], str]]) -> np.ndarray:
        """Score tokenised rows, each with its query, in one pass."""
        encoded = [row for row, _ in rows]
        if self.share_prefix and self._can_share():
            return self._shared(encoded, [query for _, query in rows])
        return self._padded(encoded)

    def _reduce_budget(self, rows: Sequence[tuple[dict[str, list[int]], str]]) -> None:
        """Halve the token budget after these rows did not fit into memory."""
        self.token_budget = min(self.token_budget, sum(len(row["input_ids"]) for row, _ in rows) // 2)
        logger.warning("Out of memory: continuing with token_budget %d.", self.token_budget)

    @torch.inference_mode()
    def _padded(self, rows: list[dict[str, list[int]]]) -> np.ndarray:
        batch = {key: tensor.to(self.model.device) for key, tensor in self.collator.pad(rows).items()}
        return self.model(**batch).scores.cpu().numpy()

    @torch.inference_mode()
    def _shared(self, rows: list[dict[str, list[int]]], queries: list[str]) -> np.ndarray:
        packed = pack([row["input_ids"] for row in rows], queries)
        ids, places = (tensor.to(self.model.device) for tensor in (packed.input_ids, packed.position_ids))
        # A mask of four dimensions is taken as it is, where any other would be made one of tokens x tokens.
        unused = torch.empty(1, 1, 1, 1, device=ids.device)
        hidden = self.model.model(
            input_ids=ids, attention_mask=unused, position_ids=places, use_cache=False, packed=packed
        ).last_hidden_state
        return self.model.head_logits(hidden[0, packed.last]).squeeze(-1).float().cpu().numpy()


def pair_collator(
    model: BertDistilledRanker | LLMForLastTokenRanking, tokenizer: PreTrainedTokenizerBase
) -> PairCollator:
    """The collator that feeds a model as its checkpoint says; model and tokenizer are made to fit, in place.

    Raises:
        ValueError: tokenizer and model do not go together, or the limits leave no room for a document or go beyond
            the model's positions.
    """
    marker, positions = model.config.disranker, position_limit(model.config)
    if marker["role"] == "teacher":
        fit_embeddings(model, prepare_tokenizer(tokenizer, marker.get("ending")))
    else:
        check_vocabulary(model, tokenizer)
        tokenizer.padding_side = "right"  # BERT counts its positions from the left
    default = min(tokenizer.model_max_length, DEFAULT_MAX_LENGTH, positions or DEFAULT_MAX_LENGTH)
    max_length = marker.get("max_length") or default
    check_length(model.config, max_length)
    max_query_length = marker.get("max_query_length") or min(DEFAULT_MAX_QUERY_LENGTH, max_length // 2)
    return PairCollator(tokenizer, model.config.templates, max_length, max_query_length)
