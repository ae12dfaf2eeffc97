"""Query likelihood: score a document by the probability of the query after it under a language model.

Ponte and Croft (1998), "A language modeling approach to information retrieval"; with a pretrained causal language
model, Sachan et al. (2022), arXiv 2204.07496. It needs neither labels nor training.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from hf_disranker.data.collators import Encoded
from hf_disranker.data.templates import LIKELIHOOD_TEMPLATE, Templates, template_fields
from hf_disranker.models.base import Document, Pair
from hf_disranker.models.checkpoint import hub_options, load_config
from hf_disranker.models.checks import position_limit
from hf_disranker.models.loading import load_language_model
from hf_disranker.models.packing import parameters
from hf_disranker.models.ranker import DEFAULT_DOCUMENT_TOKENS, Ranker, row_length, to_device
from hf_disranker.models.teacher import leading_tokens


class LikelihoodRanker(Ranker):
    """Scores a document by mean log P(query token | document, earlier query tokens) under a causal language model.

    Scores are at most 0, in nats per token; NaN if query or document has no token. They compare documents of a query.
    Keys and values of the text before the query are computed once for all queries of a document in a call (of up to
    65,536 pairs), and only query positions go through the output layer. Threads can share one.

    Args:
        model: Any causal language model.
        tokenizer: Its tokenizer, which is copied; what it puts in front of a text, such as a bos token, starts each
            text.
        template: Text with the fields `title` and/or `summary`, and then `query` at the end. A document that is a
            string takes the place of these fields and of the text between them.
        document_tokens: Maximum tokens of the document; the text between document and query is never truncated.
        token_budget: Tokens per forward pass, and tokens whose keys and values are kept for all queries of their
            documents; None uses 2,048 on a CPU and 16,384 on a GPU.

    Attributes:
        documents_cut: Number of pairs scored so far whose document exceeded its limit.
        tokens: Number of tokens read so far, counted as if nothing were shared.

    Raises:
        ValueError: If the template lacks a field, contains another one, or does not end with the query; from
            `predict`, if a text is longer than the model's positions.
    """

    _by_likelihood = True
    _chunk = 65_536

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        template: str = LIKELIHOOD_TEMPLATE,
        document_tokens: int = DEFAULT_DOCUMENT_TOKENS,
        token_budget: int | None = None,
    ) -> None:
        check_input(template, document_tokens)
        self.model = model.eval()  # type: ignore[assignment]
        self.tokenizer = copy.deepcopy(tokenizer)
        self.template, self.document_tokens = template, document_tokens
        self.token_budget = token_budget or (2048 if model.device.type == "cpu" else 16_384)
        before = template.removesuffix("{query}")
        start = before.index("{")
        end = max(before.rfind(name) + len(name) for name in ("{title}", "{summary}") if name in before)
        self.templates = Templates(document=before[start:end])
        self._lead = before[:start]
        # The space before the query belongs to the query's first token, as in most vocabularies.
        suffix = before[end:].rstrip()
        self._space = before[end + len(suffix) :]
        self._prefix, self._suffix = self._ids([self._lead.rstrip(), suffix])
        # Gemma needs its <bos>; SmolLM2, whose tokenizer adds none, ranks worse with one.
        self._start = leading_tokens(self.tokenizer)
        self._language_model = _with_exact_head(model)
        # transformers is renaming the argument, one family after the other.
        self._cache_name = "cache" if "cache" in parameters(type(model.base_model).forward) else "past_key_values"

    def describe(self) -> dict[str, Any]:
        """See `Ranker.describe`."""
        text = {"text": self.template}
        return {"engine": "likelihood", "templates": text, "document_tokens": self.document_tokens}

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False, truncation=False)["input_ids"] if texts else []

    def _encode(self, pairs: Sequence[Pair]) -> Encoded:
        """Tokenise each text once; a row has the text before the query as `input_ids`, the query as `labels`."""
        texts = [self._before_query(document) for _, document in pairs]
        documents, queries = list(dict.fromkeys(texts)), list(dict.fromkeys(query for query, _ in pairs))
        limit = len(self._prefix) + self.document_tokens
        ids = dict(zip(documents, self._ids(documents), strict=True))
        contexts = {text: self._start + ids[text][:limit] + self._suffix for text in documents}
        query_ids = dict(zip(queries, self._ids([self._space + query for query in queries]), strict=True))
        rows = [
            {"input_ids": contexts[text], "labels": query_ids[query]}
            for text, (query, _) in zip(texts, pairs, strict=True)
        ]
        self._check_length(max(map(row_length, rows), default=0))
        return Encoded(rows, 0, sum(len(ids[text]) > limit for text in texts))

    def _before_query(self, document: Document) -> str:
        text = self._text(document)
        if not isinstance(document, str):  # with the template's text before an empty title
            text = self.templates.fill_document(document.get("title"), document.get("summary"))
        return (self._lead + text).rstrip()

    def _check_length(self, longest: int) -> None:
        positions = position_limit(self.model.config)
        if positions is not None and longest > positions:
            name = self.model.config.name_or_path or "the model"
            raise ValueError(
                f"A document and its query have {longest} tokens and {name} has {positions} positions: use "
                f"document_tokens below {self.document_tokens}."
            )

    def _batches(self, rows: Sequence[dict[str, list[int]]], batch_size: int | None) -> list[np.ndarray]:
        """Group rows by length of the context, which is not padded, and keep those of a context together.

        The different contexts of a group fit into the token budget; `_forward` divides its rows.
        """
        contexts = [row["input_ids"] for row in rows]
        readable = [place for place, row in enumerate(rows) if row["labels"] and len(row["input_ids"]) > 1]
        readable.sort(key=lambda row: (len(contexts[row]), contexts[row]))
        batches: list[list[int]] = []
        distinct = 0
        for row in readable:
            context, last = contexts[row], contexts[batches[-1][-1]] if batches else []
            distinct = distinct + (context != last) if len(context) == len(last) else 1
            fits = context == last or distinct * len(context) <= self.token_budget
            if len(context) == len(last) and fits and (batch_size is None or len(batches[-1]) < batch_size):
                batches[-1].append(row)
            else:
                batches.append([row])
                distinct = 1
        return [np.array(batch) for batch in batches]

    def _reduce_budget(self, rows: Sequence[tuple[dict[str, list[int]], str]]) -> None:
        """Halve the token budget; rows that share a document may have more tokens than it."""
        self._set_budget(min(self.token_budget, sum(row_length(row) for row, _ in rows)) // 2)

    @torch.inference_mode()
    def _forward(self, batch: Sequence[tuple[dict[str, list[int]], str]]) -> np.ndarray:
        """Score tokenised rows with contexts of one length, shape (rows,), float32."""
        rows = [(row["input_ids"], row["labels"]) for row, _ in batch]
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
        logits = self._language_model(inputs, use_cache=True, **{self._cache_name: cache}).logits.float()
        chosen = logits.gather(2, targets.unsqueeze(2)).squeeze(2) - logits.logsumexp(dim=2)
        is_query = torch.arange(targets.shape[1], device=device) < lengths.unsqueeze(1)
        return (chosen.where(is_query, 0.0).sum(dim=1) / lengths).cpu().numpy()


def check_input(template: str, document_tokens: int) -> None:
    """Raise ValueError for a malformed template or a limit below 1."""
    fields = template_fields(template, {"title", "summary", "query"})
    if not template.endswith("{query}") or len(fields) < 2 or len(set(fields)) < len(fields):
        raise ValueError(
            f"Template {template!r} must contain {{title}} and {{summary}}, or one of them, and end with {{query}}."
        )
    if document_tokens < 1:
        raise ValueError(f"document_tokens is {document_tokens}; a document needs at least 1.")


def load_likelihood_ranker(
    name: str | os.PathLike,
    template: str,
    document_tokens: int,
    token_budget: int | None,
    *,
    device: str | None,
    **options: Any,
) -> LikelihoodRanker:
    """Load a causal language model as a ranker; arguments as in `Ranker.from_pretrained`, errors as well."""
    check_input(template, document_tokens)
    architecture = (load_config(name, **hub_options(options)).architectures or [""])[0]
    if not architecture.endswith("ForCausalLM") and not options["gguf_file"]:
        raise ValueError(f"{name} is not a causal language model ({architecture}): omit likelihood to score with it.")
    model, tokenizer = load_language_model(name, **options)
    return LikelihoodRanker(to_device(model, device), tokenizer, template, document_tokens, token_budget)


def _with_exact_head(model: PreTrainedModel) -> PreTrainedModel:
    """Compute logits in fp32, untied from the embeddings: in bf16 they have 8 bits, too few for log-probabilities.

    The result shares all other modules with the model, which stays unchanged.
    """
    head = model.get_output_embeddings()
    if head.weight.dtype == torch.float32:
        return model
    head = copy.deepcopy(head).float()
    head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    exact = copy.copy(model)
    exact._modules = model._modules.copy()
    exact.set_output_embeddings(head)
    return exact
