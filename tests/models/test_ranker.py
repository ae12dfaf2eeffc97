"""Ranker: a score belongs to its pair alone, whatever stands beside it."""

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from hf_disranker.data.tables import pair_texts
from hf_disranker.models.ranker import Ranker
from hf_disranker.models.teacher import LLMForLastTokenRanking
from hf_disranker.recipes.quickstart.from_scratch import small_llama


@pytest.fixture(params=["student", "teacher"])
def ranker(request):
    return request.getfixturevalue(f"{request.param}_ranker")


def test_scores_do_not_depend_on_budget_order_or_neighbours(ranker, judgments):
    pairs = pair_texts(judgments)
    scores = ranker.predict(pairs)
    assert scores.dtype == np.float32 and scores.std() > 0.05
    assert np.allclose(ranker.predict(pairs[::-1])[::-1], scores, rtol=0, atol=1e-5)
    alone = [ranker.predict([pair])[0] for pair in pairs[:9]]
    assert np.allclose(alone, scores[:9], rtol=0, atol=1e-5)
    for ranker.token_budget in (1, 100, 1000, 100_000):
        assert np.allclose(ranker.predict(pairs), scores, rtol=0, atol=1e-5)


def test_a_teachers_scores_do_not_depend_on_the_padding_side(teacher_ranker, judgments, monkeypatch):
    pairs = pair_texts(judgments)
    teacher_ranker.share_prefix = False  # which pads nothing
    assert teacher_ranker.collator.tokenizer.padding_side == "left"
    scores = teacher_ranker.predict(pairs)
    monkeypatch.setattr(teacher_ranker.collator.tokenizer, "padding_side", "right")
    assert np.allclose(teacher_ranker.predict(pairs), scores, rtol=0, atol=1e-5)


SHAPE = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3}


@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config, Qwen3Config, MistralConfig])
def test_a_shared_prefix_changes_no_score(config, tiny_teacher, judgments):
    tokenizer = tiny_teacher[1]
    torch.manual_seed(0)
    model = LLMForLastTokenRanking.from_config(config(vocab_size=len(tokenizer), **SHAPE))
    ranker, pairs = Ranker(model, tokenizer), pair_texts(judgments)
    assert ranker.share_prefix
    pairs += [(pairs[0][0], ""), pairs[0], pairs[0]]  # a query alone, a query again, a row that is all prefix but one
    read, attention = [], model.model.config._attn_implementation
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: read.append(inputs[0].numel()))
    shared = ranker.predict(pairs)
    tokens = sum(read)
    assert model.model.config._attn_implementation == attention
    ranker.share_prefix = False
    padded = ranker.predict(pairs)
    np.testing.assert_allclose(shared, padded, rtol=0, atol=1e-5)
    assert padded.std() > 0.05 and tokens < 0.9 * ranker.tokens / 2  # of each of the two calls


def test_no_prefix_is_shared_where_attention_is_not_plain(tiny_teacher, student_ranker):
    tokenizer = tiny_teacher[1]
    window = {"sliding_window": 8, "vocab_size": len(tokenizer)}
    for config in (MistralConfig(**SHAPE, **window), Gemma2Config(**SHAPE, **window)):
        assert not Ranker(LLMForLastTokenRanking.from_config(config), tokenizer).share_prefix
    assert not student_ranker.share_prefix


def test_a_document_is_a_string_or_its_title_and_summary(ranker):
    documents = [{"title": "read file", "summary": "json list"}, {"title": "", "summary": "plot"}]
    texts = ["read file json list", "plot"]
    from_mappings = ranker.predict([("read json", document) for document in documents])
    assert np.array_equal(from_mappings, ranker.predict([("read json", text) for text in texts]))
    assert ranker.rank("read json", documents) == ranker.rank("read json", texts)


def test_rank_gives_the_best_first(ranker):
    documents = ["sort list", "read json file", "plot"]
    scores = ranker.predict([("read json", document) for document in documents])
    ranking = ranker.rank("read json", documents)
    assert [row["corpus_id"] for row in ranking] == np.argsort(-scores).tolist()
    assert [row["score"] for row in ranking] == sorted(scores.tolist(), reverse=True)
    assert [row["text"] for row in ranking] == [documents[row["corpus_id"]] for row in ranking]
    assert ranker.rank("read json", documents, top_k=1) == ranking[:1]
    assert ranker.rank("read json", []) == []


def test_what_is_cut_is_counted(ranker):
    pairs = [("read " * 100, "json"), ("read", "json " * 30_000), ("read", "json"), ("read", "🚗 東京 שלום")]
    for times in (1, 2):
        assert np.isfinite(ranker.predict(pairs)).all()
        assert (ranker.queries_cut, ranker.documents_cut) == (times, times)


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_a_saved_ranker_scores_the_same(kind, request, judgments):
    loaded = Ranker.from_pretrained(request.getfixturevalue(f"{kind}_dir"), device="cpu")
    pairs = pair_texts(judgments)
    expected = request.getfixturevalue(f"{kind}_ranker").predict(pairs)
    assert np.allclose(loaded.predict(pairs), expected, rtol=0, atol=1e-6)


def test_checkpoints_of_another_kind_are_refused(tiny_student, tiny_teacher, tmp_path):
    tiny = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    models = {
        "bert": BertModel(BertConfig(**tiny, intermediate_size=32)),
        "llama": small_llama(tiny_teacher[1], layers=1, size=32),
        "gpt2": GPT2Model(GPT2Config(vocab_size=99, n_embd=32, n_layer=1, n_head=1)),
    }
    messages = {
        "bert": r"bert is no trained ranker: it lacks \['classifier.bias', 'classifier.weight'\]",
        "llama": r"llama is no trained ranker: it lacks \['score.weight'\]",
        "gpt2": "A gpt2 model cannot be a teacher; known families: llama, qwen2, qwen3",
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=messages[name]):
            Ranker.from_pretrained(tmp_path / name)


@pytest.mark.parametrize("name", ["/nowhere/student", "nowhere/student"])
def test_a_folder_that_is_not_there_is_named(name):
    with pytest.raises(OSError, match=f"{name}: no such folder"):
        Ranker.from_pretrained(name)


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_half_the_bits_move_scores_little_and_tie_none(kind, request, judgments):
    folder, pairs = request.getfixturevalue(f"{kind}_dir"), pair_texts(judgments)
    exact, half = (Ranker.from_pretrained(folder, device="cpu", dtype=kind) for kind in ("float32", "bfloat16"))
    expected, scores = exact.predict(pairs), half.predict(pairs)
    assert next(half.model.parameters()).dtype == torch.bfloat16
    assert len(set(scores)) == len(set(expected))
    # Of random models, whose weights do not average their rounding out.
    assert 0 < np.abs(scores - expected).max() < 0.05
