"""Ranker: tokenizer, model and text templates in one, for scoring."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from hf_disranker.collators import PairCollator
from hf_disranker.packing import budget_batches
from hf_disranker.student import BertDistilledRanker
from hf_disranker.teacher import LLMForLastTokenRanking, prepare_tokenizer

logger = logging.getLogger(__name__)

Document = str | Mapping[str, str]

DEFAULT_MAX_LENGTH = 512
DEFAULT_MAX_QUERY_LENGTH = 64
# Pairs tokenised at a time: enough to sort by length, little enough for memory.
_CHUNK = 8192


class Ranker:
    """Scores documents for a query with a student or a teacher.

    Args:
        model: a `BertDistilledRanker` or an `LLMForLastTokenRanking`.
        tokenizer: its tokenizer.
        token_budget: tokens of a forward pass, padding included; None takes 2,048 on a CPU, whose caches hold no
            more of a small model's work, and 32,768 on a GPU.
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
        self.queries_cut = 0
        self.documents_cut = 0

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike, device: str | None = None, **options: Any) -> Ranker:
        """Load a ranker from a folder or the Hub.

        Args:
            name_or_path: folder or Hub id.
            device: where it runs; None takes a GPU when there is one.
            options: go to the model's `from_pretrained`, for example `revision` or `dtype`.

        Raises:
            ValueError: the checkpoint is of a kind that is not known, or holds no ranking head.
        """
        hub = {key: options[key] for key in ("revision", "token", "cache_dir") if key in options}
        config = AutoConfig.from_pretrained(name_or_path, **hub)
        kind = BertDistilledRanker if config.model_type == "bert" else LLMForLastTokenRanking
        model, info = kind.from_pretrained(name_or_path, output_loading_info=True, **options)
        if info["missing_keys"]:
            raise ValueError(f"{name_or_path} is no trained ranker: it lacks {sorted(info['missing_keys'])[:4]}.")
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **hub)
        return cls(model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), tokenizer)

    def predict(self, pairs: Sequence[tuple[str, Document]], progress: bool = False) -> np.ndarray:
        """Score pairs.

        A score does not depend on which other pairs are scored with it, nor on their order, beyond rounding
        (about 1e-6 in fp32).

        Args:
            pairs: (query, document); a document is a string or a mapping with title and summary.
            progress: show a progress bar.

        Returns:
            Raw logits in the order of `pairs`, shape (len(pairs),), float32.
        """
        scores = np.zeros(len(pairs), dtype=np.float32)
        with tqdm(total=len(pairs), desc="pairs", unit=" pairs", disable=not progress) as bar:
            for start in range(0, len(pairs), _CHUNK):
                chunk = pairs[start : start + _CHUNK]
                encoded = self.collator.encode([query for query, _ in chunk], [self._text(doc) for _, doc in chunk])
                self.queries_cut += encoded.queries_cut
                self.documents_cut += encoded.documents_cut
                lengths = np.array([len(row["input_ids"]) for row in encoded.rows])
                for rows in budget_batches(lengths, self.token_budget):
                    scores[start + rows] = self._forward([encoded.rows[row] for row in rows])
                    bar.update(len(rows))
        return scores

    def probabilities(self, pairs: Sequence[tuple[str, Document]]) -> np.ndarray:
        """The logistic function of `predict`, shape (len(pairs),), float32 between 0 and 1.

        In the order of the raw scores; calibrated only if the labels of the training were probabilities.
        """
        return (1.0 / (1.0 + np.exp(-self.predict(pairs).astype(np.float64)))).astype(np.float32)

    def rank(self, query: str, documents: Sequence[Document], top_k: int | None = None) -> list[dict[str, Any]]:
        """Sort documents for a query, best first.

        Args:
            query: what the user typed.
            documents: strings or mappings with title and summary.
            top_k: how many to give back; None gives all.

        Returns:
            For each document {"corpus_id": its place in `documents`, "score": float, "text": str}, as
            `CrossEncoder.rank` does.
        """
        scores = self.predict([(query, document) for document in documents])
        order = np.argsort(-scores, kind="stable")[:top_k]
        return [{"corpus_id": int(i), "score": float(scores[i]), "text": self._text(documents[i])} for i in order]

    def _text(self, document: Document) -> str:
        if isinstance(document, str):
            return document
        return self.collator.templates.render_document(document["title"], document["summary"])

    @torch.inference_mode()
    def _forward(self, rows: list[dict[str, list[int]]]) -> np.ndarray:
        batch = {key: tensor.to(self.model.device) for key, tensor in self.collator.pad(rows).items()}
        return self.model(**batch).scores.cpu().numpy()


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
