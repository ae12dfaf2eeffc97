"""Tokenizers and models from nothing."""

import random

import pytest
import torch
from transformers import AutoTokenizer

from hf_disranker.data.templates import TEACHER_TEMPLATES
from hf_disranker.recipes.quickstart.from_scratch import (
    embed_by_svd,
    match_words,
    small_bert,
    small_llama,
    train_bpe,
    train_wordpiece,
)

TEXTS = ["read a json file", "Plot a Histogram", "sort a dict by value"] * 10


def test_wordpiece_reads_pairs_as_bert_does(tmp_path):
    tokenizer = train_wordpiece(TEXTS, vocab_size=200, max_length=16)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    pair = again("read JSON", "a file")
    assert again.convert_ids_to_tokens(pair["input_ids"]) == ["[CLS]", "read", "json", "[SEP]", "a", "file", "[SEP]"]
    assert pair["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]
    assert again.model_max_length == 16 and again.pad_token_id == 0


def test_bpe_adds_special_tokens_and_loses_only_whitespace(tmp_path):
    train_bpe(TEXTS, vocab_size=400, max_length=64).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("read a json file", "naïve 日本 🙂", "a_b(c)->d"):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[1:-1]).replace(" ", "") == text.replace(" ", "")
    # A word is the same token wherever it stands.
    assert tokenizer.tokenize("json.file")[0] == tokenizer.tokenize("a json")[-1]
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3


@pytest.mark.parametrize("layers", [1, 3])
def test_models_fit_their_tokenizers(layers):
    bert = small_bert(train_wordpiece(TEXTS, vocab_size=200, max_length=16), layers=layers, size=64)
    assert bert.config.num_hidden_layers == layers and bert.config.max_position_embeddings == 16
    tokenizer = train_bpe(TEXTS, vocab_size=400, max_length=16)
    llama = small_llama(tokenizer, layers=layers, size=64)
    assert llama.config.vocab_size == len(tokenizer) and llama.config.pad_token_id == tokenizer.pad_token_id
    assert llama.lm_head.weight is llama.model.embed_tokens.weight


def test_embed_by_svd_places_words_with_similar_contexts_together():
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


WORDS = [first + second for first in "bdfgklmnprst" for second in ("ata", "eno", "iru", "olo", "umi", "ysa")]


def sentences(count=300):
    draw = random.Random(0)
    return [" ".join(draw.sample(WORDS, 6)) for _ in range(count)]


def copy_against_others(attention, ids, word):
    """What a word's second occurrence gives to its first, over the mean of what it gives to other words."""
    first, second = [place for place, token in enumerate(ids) if token == word]
    others = [place for place in range(second) if place != first]
    return (attention[second, first] / attention[second, others].mean()).item()


def test_match_words_lets_a_document_word_find_its_copy_in_the_query_bert():
    tokenizer = train_wordpiece(sentences(), vocab_size=400, max_length=32)
    torch.manual_seed(0)
    model = small_bert(tokenizer, layers=2, size=64, initializer_range=0.06, attn_implementation="eager").eval()
    embed_by_svd(model, tokenizer, sentences())
    batch = tokenizer("bata deno firu", "golo kumi deno lysa", return_tensors="pt")
    word = tokenizer.convert_tokens_to_ids("deno")

    def ratio():
        attention = model.bert(**batch, output_attentions=True).attentions[0][0].mean(dim=0)
        return copy_against_others(attention, batch["input_ids"][0].tolist(), word)

    before = ratio()
    match_words(model, tokenizer)
    assert before < 1.5 and ratio() > 3


def test_match_words_marks_documents_and_lets_their_words_find_the_query_llama():
    texts = [TEACHER_TEMPLATES.render_text(f"{text}", text) for text in sentences()]
    tokenizer = train_bpe(texts, vocab_size=600, max_length=48)
    torch.manual_seed(0)
    options = {"initializer_range": 0.05, "attn_implementation": "eager"}
    model = small_llama(tokenizer, layers=2, size=64, **options).eval()
    embed_by_svd(model, tokenizer, texts)
    text = TEACHER_TEMPLATES.render_text(TEACHER_TEMPLATES.render_query("bata deno firu"), "golo kumi deno lysa")
    batch = tokenizer(text, return_tensors="pt")
    ids = batch["input_ids"][0].tolist()
    word = tokenizer(" deno", add_special_tokens=False)["input_ids"]
    assert len(word) == 1

    def look():
        first, second = (layer[0] for layer in model.model(**batch, output_attentions=True).attentions)
        return first[0], copy_against_others(second.mean(dim=0), ids, word[0])

    _, before = look()
    match_words(model, tokenizer)
    mark, after = look()
    assert before < 1.5 and after > 3
    # Every token of the document looks at the word that opens it, wherever it stands.
    opening = ids.index(
        tokenizer(TEACHER_TEMPLATES.prompt("").rstrip(": "), add_special_tokens=False)["input_ids"][-1]
    )
    assert (mark[opening + 1 :, opening] > 0.5).all()
