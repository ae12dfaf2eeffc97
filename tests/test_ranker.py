"""Ranker: a score belongs to its pair alone, whatever stands beside it."""

import numpy as np
import pytest
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

from hf_disranker.data import pair_texts
from hf_disranker.from_scratch import small_llama
from hf_disranker.ranker import Ranker


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
    assert teacher_ranker.collator.tokenizer.padding_side == "left"
    scores = teacher_ranker.predict(pairs)
    monkeypatch.setattr(teacher_ranker.collator.tokenizer, "padding_side", "right")
    assert np.allclose(teacher_ranker.predict(pairs), scores, rtol=0, atol=1e-5)


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
