"""Tokenizers and models from nothing."""

import pytest
import torch
from transformers import AutoTokenizer

from hf_disranker.from_scratch import embed_by_svd, small_bert, small_llama, train_bpe, train_wordpiece

TEXTS = ["read a json file", "Plot a Histogram", "sort a dict by value"] * 10


def test_wordpiece_reads_pairs_as_bert_does(tmp_path):
    tokenizer = train_wordpiece(TEXTS, vocab_size=200, max_length=16)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    pair = again("read JSON", "a file")
    assert again.convert_ids_to_tokens(pair["input_ids"]) == ["[CLS]", "read", "json", "[SEP]", "a", "file", "[SEP]"]
    assert pair["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]
    assert again.model_max_length == 16 and again.pad_token_id == 0


def test_bpe_frames_every_text_and_loses_nothing(tmp_path):
    train_bpe(TEXTS, vocab_size=400, max_length=64).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("read a json file", "naïve 日本 🙂", "a_b(c)->d"):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[1:-1]).strip() == text
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3


@pytest.mark.parametrize("layers", [1, 3])
def test_models_fit_their_tokenizers(layers):
    bert = small_bert(train_wordpiece(TEXTS, vocab_size=200, max_length=16), layers=layers, size=64)
    assert bert.config.num_hidden_layers == layers and bert.config.max_position_embeddings == 16
    tokenizer = train_bpe(TEXTS, vocab_size=400, max_length=16)
    llama = small_llama(tokenizer, layers=layers, size=64)
    assert llama.config.vocab_size == len(tokenizer) and llama.config.pad_token_id == tokenizer.pad_token_id
    assert llama.lm_head.weight is llama.model.embed_tokens.weight


def test_embed_by_svd_puts_words_of_like_company_together():
    # "cat" and "dog" keep the same company, "car" another.
    texts = ["cat eats food", "dog eats food", "car burns fuel", "bus burns fuel"] * 5
    tokenizer = train_wordpiece(texts, vocab_size=100, max_length=16)
    model = small_bert(tokenizer, layers=1, size=2)  # two topics, two directions
    embed_by_svd(model, tokenizer, texts)
    words = tokenizer.convert_tokens_to_ids(["cat", "dog", "car"])
    cat, dog, car = model.get_input_embeddings().weight[words].detach()
    similarity = torch.nn.functional.cosine_similarity
    assert similarity(cat, dog, dim=0) > 0.9 > 0.3 > similarity(cat, car, dim=0).abs()
    assert model.get_input_embeddings().weight.std().item() == pytest.approx(0.1, rel=0.05)
