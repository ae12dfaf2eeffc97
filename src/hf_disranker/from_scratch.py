"""Small models and tokenizers from nothing but text: for the quickstart, tests, and wherever no checkpoint may be."""

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

from hf_disranker.student import BertDistilledRanker

_EMBEDDING_SPREAD = 0.1


def train_wordpiece(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerBase:
    """A lower-case BERT tokenizer whose vocabulary comes from `texts`.

    Args:
        texts: what the vocabulary is learned from; never development data.
        vocab_size: number of tokens at most.
        max_length: tokens of a query-document pair that the model will read.
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
    """A lower-case byte-level BPE tokenizer for a decoder: `<s>` before each text, `</s>` behind it, `<pad>` apart.

    Args:
        texts: what the vocabulary is learned from; never development data.
        vocab_size: number of tokens at most, at least 259 (every byte and the special tokens).
        max_length: tokens of a text that the model will read.
    """
    special = ["<s>", "</s>", "<pad>"]
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
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
    """A BERT ranker with random weights for a tokenizer: heads of 64, feed-forward of four times the size.

    Further options go to `BertConfig`.
    """
    return BertDistilledRanker(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=size,
            num_hidden_layers=layers,
            num_attention_heads=max(1, size // 64),
            intermediate_size=4 * size,
            max_position_embeddings=tokenizer.model_max_length,
            pad_token_id=tokenizer.pad_token_id,
            **options,
        )
    )


def small_llama(tokenizer: PreTrainedTokenizerBase, *, layers: int, size: int, **options: Any) -> LlamaForCausalLM:
    """A Llama language model with random weights and tied embeddings for a tokenizer: heads of 64.

    Further options go to `LlamaConfig`.
    """
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=size,
            num_hidden_layers=layers,
            num_attention_heads=max(1, size // 64),
            intermediate_size=3 * size,
            max_position_embeddings=tokenizer.model_max_length,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **options,
        )
    )


def embed_by_svd(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
    """Start the token embeddings from a truncated SVD of the texts' TF-IDF matrix (latent semantic analysis).

    Tokens that keep the same company then lie together before any training, in a few seconds for 10,000 texts. Works
    in place; position embeddings, which say nothing yet, are made small beside them.

    Args:
        model: a model of `small_bert` or `small_llama`.
        tokenizer: its tokenizer.
        texts: what the statistics come from; never development data.

    Source: Deerwester et al. 1990, "Indexing by latent semantic analysis".
    """
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
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
