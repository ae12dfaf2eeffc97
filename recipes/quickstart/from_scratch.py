"""Small models and tokenizers built from text alone, without pre-trained checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.utils.extmath import randomized_svd
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from hf_disranker.data.templates import TEACHER_TEMPLATES
from hf_disranker.models.student import BertDistilledRanker

_EMBEDDING_SPREAD = 0.1


def train_wordpiece(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerBase:
    """Train a lower-case BERT tokenizer on `texts`.

    Args:
        texts: Training texts; must not contain development data.
        vocab_size: Maximum number of tokens.
        max_length: Maximum length of a query-document pair in tokens.
    """
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    )
    return BertTokenizer(vocab=backend.get_vocab(), model_max_length=max_length)


def train_bpe(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerBase:
    """Train a lower-case byte-level BPE tokenizer for a decoder that adds `<s>` and `</s>` and pads with `<pad>`.

    Punctuation is split off, so decoding may insert spaces around it.

    Args:
        texts: Training texts; must not contain development data.
        vocab_size: Maximum number of tokens, at least 259 (all bytes and the special tokens).
        max_length: Maximum length of a text in tokens.
    """
    special = ["<s>", "</s>", "<pad>"]
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    # A word must map to the same token in "numpy.histogram" and after a space, or exact matches are lost.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A $B:1 </s>:1", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=max_length,
        padding_side="left",
    )


def small_bert(tokenizer: PreTrainedTokenizerBase, *, layers: int, size: int, **options: Any) -> BertDistilledRanker:
    """Create a BERT ranker with random weights: attention heads of size 64, feed-forward layers of twice the size.

    Additional options are passed to `BertConfig`.
    """
    return BertDistilledRanker(BertConfig(**_sizes(tokenizer, layers, size), **options))


def small_llama(tokenizer: PreTrainedTokenizerBase, *, layers: int, size: int, **options: Any) -> LlamaForCausalLM:
    """Create a Llama language model with random weights, tied embeddings and attention heads of size 64.

    Additional options are passed to `LlamaConfig`.
    """
    return LlamaForCausalLM(
        LlamaConfig(
            **_sizes(tokenizer, layers, size),
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **options,
        )
    )


def _sizes(tokenizer: PreTrainedTokenizerBase, layers: int, size: int) -> dict[str, Any]:
    """Return the options that the configs of both models share."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": size,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, size // 64),
        "intermediate_size": 2 * size,
        "max_position_embeddings": tokenizer.model_max_length,
        "pad_token_id": tokenizer.pad_token_id,
    }


def embed_by_svd(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
    """Initialise the token embeddings from a truncated SVD of the texts' TF-IDF matrix (latent semantic analysis).

    Tokens with similar contexts are then close before any training; 10,000 texts take a few seconds. Works in place;
    the random position embeddings are scaled down to match.

    Args:
        model: Model from `small_bert` or `small_llama`.
        tokenizer: Tokenizer of the model.
        texts: Texts for the co-occurrence statistics; must not contain development data.

    Source: Deerwester et al. 1990, "Indexing by latent semantic analysis".
    """
    rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    tokens, sizes = np.concatenate(rows).astype(np.int64), [len(row) for row in rows]
    shape = (len(rows), len(tokenizer))
    counts = csr_matrix((np.ones(len(tokens)), (np.repeat(np.arange(len(rows)), sizes), tokens)), shape=shape)
    weights = model.get_input_embeddings().weight
    _, strengths, directions = randomized_svd(
        TfidfTransformer(sublinear_tf=True).fit_transform(counts), weights.shape[1], n_iter=2, random_state=0
    )
    vectors = directions.T * np.sqrt(strengths)
    with torch.no_grad():
        weights.copy_(torch.from_numpy(_EMBEDDING_SPREAD * vectors / vectors.std()))
        if isinstance(model, BertDistilledRanker):
            model.bert.embeddings.position_embeddings.weight.mul_(_EMBEDDING_SPREAD)


def match_words(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Initialise the attention heads so that each token attends to its copies: query words match document words.

    Exact word matching is essential for ranking and slow to learn from random heads. If the query and key projections
    of a head share one random matrix, a token attends to similar tokens before any training. Works in place; call
    `embed_by_svd` first.

    Args:
        model: Model from `small_bert` or `small_llama` (at least two layers).
        tokenizer: Tokenizer of the model.

    Source: after Trockman & Kolter 2023, "Mimetic initialization of self-attention layers", arXiv 2305.09828.
    The choice of layers, the scales and the document marker of the decoder are ours.
    """
    with torch.no_grad():
        if isinstance(model, BertDistilledRanker):
            # BERT's segment embeddings distinguish copies in the query from copies in the document.
            for layer in model.bert.encoder.layer:
                _match_bert(layer.attention)
        else:
            _mark_documents(model, tokenizer)
            _match_llama(model.model.layers[1].self_attn)


def _match_bert(attention: Any) -> None:
    """Share query and key projections; output inverts the value rotation, so a copied vector meets its original."""
    size, width = attention.self.query.weight.shape[1], attention.self.attention_head_size
    for head in range(size // width):
        rows = slice(head * width, (head + 1) * width)
        look = torch.randn(width, size) / size**0.5
        attention.self.query.weight[rows] = look
        attention.self.key.weight[rows] = look
        turn = torch.linalg.qr(torch.randn(size, width))[0].T
        attention.self.value.weight[rows] = 0.5 * turn
        attention.output.dense.weight[:, rows] = -0.5 * turn.T


# Reserved axes of the small decoder's residual stream: a constant 1; the word that starts a document; a marker on
# every token from that word on.
_ONE, _OPENS, _MARK, _RESERVED = 0, 1, 2, 3


def _mark_documents(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the first head of the first layer mark every document token, since a decoder has no segment embeddings.

    Each token attends to the template word that precedes the document if it is visible, and uniformly otherwise.
    """
    embeddings, first = model.get_input_embeddings().weight, model.model.layers[0]
    size, width = embeddings.shape[1], first.self_attn.head_dim
    spread, one = _EMBEDDING_SPREAD * size**0.5, 0.4
    opening = tokenizer(TEACHER_TEMPLATES.prompt("").rstrip(": "), add_special_tokens=False)["input_ids"][-1]
    embeddings[:, :_RESERVED] = 0.0
    unseen = embeddings.norm(dim=1) < 1e-3
    embeddings[unseen, _RESERVED:] = torch.randn(int(unseen.sum()), size - _RESERVED)
    # Equal norms, so that the reserved axes keep the same weight in every token after normalisation.
    embeddings.mul_(spread / embeddings.norm(dim=1, keepdim=True))
    embeddings[opening] = 0.0
    embeddings[opening, _OPENS] = spread
    embeddings[:, _ONE] = one
    scale = ((spread**2 + one**2) / size) ** 0.5  # root mean square, the divisor of the layer norm

    # Keep the output of the first layer small relative to the word embeddings.
    first.self_attn.o_proj.weight.mul_(0.1)
    first.mlp.down_proj.weight.mul_(0.1)
    queries, keys = first.self_attn.q_proj.weight, first.self_attn.k_proj.weight
    values, output = first.self_attn.v_proj.weight, first.self_attn.o_proj.weight
    for weight in (queries[:width], keys[:width], values[:width], output[:, :width]):
        weight.zero_()
    slow = slice(width // 2 - 4, width // 2)  # slow rotary pairs, so that position hardly matters
    queries[slow, _ONE] = 0.5 * width**0.5 * 12.0 * scale / one
    keys[slow, _OPENS] = 0.5 * scale / spread
    values[0, _OPENS] = scale / spread
    output[_MARK, 0] = spread


def _match_llama(attention: Any) -> None:
    """Share query and key projections over word axes and slow rotary pairs, so that copies match at any distance."""
    size, width = attention.q_proj.weight.shape[1], attention.head_dim
    fast, half = width // 8, width // 2
    for head in range(size // width):
        look = torch.randn(width, size) / size**0.5
        look[:fast] = look[half : half + fast] = 0.0
        look[:, :_RESERVED] = 0.0
        look *= (half / (half - fast)) ** 0.5
        rows = slice(head * width, (head + 1) * width)
        attention.q_proj.weight[rows] = look
        attention.k_proj.weight[rows] = look
