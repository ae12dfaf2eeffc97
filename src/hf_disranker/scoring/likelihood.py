"""Query likelihood: score a document by the probability of the query after it under a language model.

Ponte and Croft (1998), "A language modeling approach to information retrieval"; with a pretrained causal language
model, Sachan et al. (2022), arXiv 2204.07496. It needs neither labels nor training.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from hf_disranker.data.templates import template_fields
from hf_disranker.models.checkpoint import load_config
from hf_disranker.models.ranker import score_in_halves
from hf_disranker.scoring.engines import Callback, Pair, process_device
from hf_disranker.scoring.provenance import describe_model, tokenizer_digest, versions

logger = logging.getLogger(__name__)

DEFAULT_TEMPLATE = "{title}\n{summary}\nIn one sentence: {query}"
DEFAULT_DOCUMENT_TOKENS = 256


@dataclass
class LikelihoodEngine:
    """Backend for a causal language model that scores by mean log P(query token | document, earlier query tokens).

    Keys and values of the text before the query are computed once for all queries of a document in a call, and only
    query positions go through the output layer.

    Args:
        model: Any causal language model.
        tokenizer: Its tokenizer; special tokens that it adds at the start, such as bos, start each text.
        teacher: Name of the teacher for the manifest.
        template: Text with the fields `title` and/or `summary`, and then `query` at the end.
        document_tokens: Maximum tokens of the document; the text between document and query is never truncated.
        token_budget: Tokens per forward pass, and tokens whose keys and values are kept for all queries of their
            documents; None uses 2,048 on a CPU and 16,384 on a GPU.

    Attributes:
        tokens: Number of tokens read so far, counted as if nothing were shared.
        documents_cut: Number of pairs scored so far whose document exceeded its limit.

    Raises:
        ValueError: If the template lacks a field, contains another one, or does not end with the query.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    teacher: str
    template: str = DEFAULT_TEMPLATE
    document_tokens: int = DEFAULT_DOCUMENT_TOKENS
    token_budget: int | None = None
    tokens: int = field(default=0, init=False)
    documents_cut: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        check_template(self.template)
        if self.document_tokens < 1:
            raise ValueError(f"document_tokens is {self.document_tokens}; a document needs at least 1.")
        self.token_budget = self.token_budget or (2048 if self.model.device.type == "cpu" else 16_384)
        before = self.template.removesuffix("{query}")
        end = max(before.rfind(name) + len(name) for name in ("{title}", "{summary}") if name in before)
        # The space before the query belongs to the query's first token, as in most vocabularies.
        self._suffix = before[end:].rstrip()
        self._space = before[end + len(self._suffix) :]
        self._document = before[:end]
        self._prefix = self._ids([before[: before.index("{")].rstrip()])[0]
        self._suffix_ids = self._ids([self._suffix])[0]
        # Gemma needs its <bos>; SmolLM2, whose tokenizer adds none, ranks worse with one.
        letter, whole = self._ids(["a"])[0], self.tokenizer("a")["input_ids"]
        self._start = whole[: whole.index(letter[0])]
        self._weights = describe_model(self.model, self.model.config)
        self.model = _with_exact_head(self.model.eval())
        # transformers is renaming the argument, one family after the other.
        parameters = inspect.signature(self.model.base_model.forward).parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"

    def describe(self) -> dict[str, Any]:
        """See `Engine`."""
        return {
            "teacher": self.teacher,
            **self._weights,
            "tokenizer": tokenizer_digest(self.tokenizer),
            "engine": "likelihood",
            "versions": versions("torch", "transformers"),
            "templates": {"text": self.template},
            "document_tokens": self.document_tokens,
        }

    def predict(self, pairs: Sequence[Pair], callback: Callback | None = None) -> np.ndarray:
        """See `Engine`; scores are at most 0, in nats per token. NaN if query or document has no token.

        Raises:
            ValueError: If a text is longer than the model's positions.
        """
        contexts, queries = self._encode(pairs)
        self._check_length(contexts, queries)
        scores = np.full(len(pairs), np.nan, np.float32)
        for rows in self._batches(contexts, queries):
            scores[rows] = score_in_halves(
                self._forward, [(contexts[row], queries[row]) for row in rows], self._reduce
            )
            if callback:
                callback(len(rows))
        self.tokens += sum(map(len, contexts)) + sum(map(len, queries))
        return scores

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False, truncation=False)["input_ids"] if texts else []

    def _encode(self, pairs: Sequence[Pair]) -> tuple[list[list[int]], list[list[int]]]:
        """Return the tokens before the query and those of the query for each pair; each text is tokenised once."""
        texts = [self._document.format(**document).rstrip() for _, document in pairs]
        documents, queries = list(dict.fromkeys(texts)), list(dict.fromkeys(query for query, _ in pairs))
        limit = len(self._prefix) + self.document_tokens
        ids = dict(zip(documents, self._ids(documents), strict=True))
        self.documents_cut += sum(len(ids[text]) > limit for text in texts)
        contexts = {text: self._start + ids[text][:limit] + self._suffix_ids for text in documents}
        query_ids = dict(zip(queries, self._ids([self._space + query for query in queries]), strict=True))
        return [contexts[text] for text in texts], [query_ids[query] for query, _ in pairs]

    def _check_length(self, contexts: list[list[int]], queries: list[list[int]]) -> None:
        longest = max((len(context) + len(query) for context, query in zip(contexts, queries, strict=True)), default=0)
        positions = getattr(self.model.config, "max_position_embeddings", None)
        if positions and longest > positions:
            raise ValueError(
                f"A document and its query have {longest} tokens and {self.teacher} has {positions} positions: use "
                f"document_tokens below {self.document_tokens}."
            )

    def _batches(self, contexts: list[list[int]], queries: list[list[int]]) -> list[list[int]]:
        """Group rows by length of the context, which is not padded, and keep those of a context together.

        The different contexts of a group fit into the token budget; `_forward` divides its rows.
        """
        readable = [row for row in range(len(queries)) if queries[row] and len(contexts[row]) > 1]
        readable.sort(key=lambda row: (len(contexts[row]), contexts[row]))
        batches: list[list[int]] = []
        distinct = 0
        for row in readable:
            context, last = contexts[row], contexts[batches[-1][-1]] if batches else []
            distinct = distinct + (context != last) if len(context) == len(last) else 1
            assert self.token_budget is not None
            if len(context) == len(last) and (context == last or distinct * len(context) <= self.token_budget):
                batches[-1].append(row)
            else:
                batches.append([row])
                distinct = 1
        return batches

    @torch.inference_mode()
    def _forward(self, rows: Sequence[tuple[list[int], list[int]]]) -> np.ndarray:
        """Score (context, query) rows with contexts of one length, shape (rows,), float32."""
        places = {context: place for place, context in enumerate(dict.fromkeys(tuple(context) for context, _ in rows))}
        read = DynamicCache()
        # All but the last context token, whose position predicts the first query token.
        prompts = torch.tensor([context[:-1] for context in places], device=self.model.device)
        self.model.base_model(prompts, use_cache=True, **{self._cache_name: read})
        scores = np.zeros(len(rows), np.float32)
        order = sorted(range(len(rows)), key=lambda row: len(rows[row][1]), reverse=True)  # little padding
        start = 0
        while start < len(order):
            longest = len(rows[order[start]][0]) + len(rows[order[start]][1])
            assert self.token_budget is not None
            taken = order[start : start + max(1, self.token_budget // longest)]
            # Selection makes new tensors, so a shallow copy keeps what was read for the next rows.
            cache = copy.copy(read)
            cache.layers = [copy.copy(layer) for layer in read.layers]
            chosen = [places[tuple(rows[row][0])] for row in taken]
            cache.batch_select_indices(torch.tensor(chosen, device=self.model.device))
            scores[taken] = self._continue(cache, [rows[row] for row in taken])
            start += len(taken)
        return scores

    def _continue(self, cache: DynamicCache, rows: Sequence[tuple[list[int], list[int]]]) -> np.ndarray:
        """Score (context, query) rows whose contexts, except for their last token, are in the cache."""
        device = self.model.device
        lengths = torch.tensor([len(query) for _, query in rows], device=device)
        targets = torch.nn.utils.rnn.pad_sequence([torch.tensor(query) for _, query in rows], batch_first=True)
        targets = targets.to(device)
        last = torch.tensor([[context[-1]] for context, _ in rows], device=device)
        # Padding is on the right, where the causal mask hides it from all query tokens.
        inputs = torch.cat([last, targets[:, :-1]], dim=1)
        logits = self.model(inputs, use_cache=True, **{self._cache_name: cache}).logits.float()
        chosen = logits.gather(2, targets.unsqueeze(2)).squeeze(2) - logits.logsumexp(dim=2)
        is_query = torch.arange(targets.shape[1], device=device) < lengths.unsqueeze(1)
        return (chosen.where(is_query, 0.0).sum(dim=1) / lengths).cpu().numpy()

    def _reduce(self, rows: Sequence[tuple[list[int], list[int]]]) -> None:
        assert self.token_budget is not None
        tokens = sum(len(context) + len(query) for context, query in rows)
        self.token_budget = max(1, min(self.token_budget, tokens) // 2)
        logger.warning("Out of memory: continuing with token_budget %d.", self.token_budget)


def check_template(template: str) -> None:
    """Raise ValueError unless a template contains title and/or summary, and then the query at its end."""
    fields = template_fields(template, {"title", "summary", "query"})
    if not template.endswith("{query}") or len(fields) < 2 or len(set(fields)) < len(fields):
        raise ValueError(
            f"Template {template!r} must contain {{title}} and {{summary}}, or one of them, and end with {{query}}."
        )


def load_likelihood(
    model: str,
    template: str = DEFAULT_TEMPLATE,
    document_tokens: int = DEFAULT_DOCUMENT_TOKENS,
    dtype: str = "auto",
    token_budget: int | None = None,
    gguf_file: str | None = None,
) -> LikelihoodEngine:
    """Load a causal language model as a teacher by query likelihood, on this process's GPU if there is one.

    Args:
        model: Folder or Hub id.
        template: See `LikelihoodEngine`.
        document_tokens: See `LikelihoodEngine`.
        dtype: Precision of the weights; "auto" keeps the checkpoint's own.
        token_budget: Tokens per forward pass.
        gguf_file: Name of a GGUF file of the model, whose weights are dequantised; needs the package gguf.

    Raises:
        OSError: If the model is neither a folder nor on the Hub.
        ValueError: If the checkpoint is not a causal language model, or the template is malformed.
    """
    check_template(template)
    options = {"gguf_file": gguf_file} if gguf_file else {}
    if not gguf_file:
        architecture = (load_config(model).architectures or [""])[0]
        if not architecture.endswith("ForCausalLM"):
            raise ValueError(
                f"{model} is not a causal language model ({architecture}): omit likelihood to score with it."
            )
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **options).to(process_device())
    tokenizer = AutoTokenizer.from_pretrained(model, **options)
    return LikelihoodEngine(loaded, tokenizer, model, template, document_tokens, token_budget)


def _with_exact_head(model: PreTrainedModel) -> PreTrainedModel:
    """Compute logits in fp32, untied from the embeddings: in bf16 they have 8 bits, too few for log-probabilities."""
    head = model.get_output_embeddings()
    if head.weight.dtype != torch.float32:
        head = copy.deepcopy(head).float()
        head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
        model.set_output_embeddings(head)
    return model
