"""Ranker: a score belongs to its pair alone, whatever stands beside it."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoModelForSequenceClassification,
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


def test_a_teachers_scores_do_not_depend_on_the_padding_side(tiny_teacher, judgments):
    ranker, pairs = Ranker(*copy.deepcopy(tiny_teacher)), pair_texts(judgments)
    ranker.model.base_model.set_attn_implementation("sdpa")  # the ranker's own pads nothing
    assert ranker.collator.tokenizer.padding_side == "left"
    scores = ranker.predict(pairs)
    ranker.collator.tokenizer.padding_side = "right"
    assert np.allclose(ranker.predict(pairs), scores, rtol=0, atol=1e-5)


SHAPE = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3}


KINDS = [LlamaConfig, Qwen2Config, Qwen3Config, partial(MistralConfig, sliding_window=8)]


@pytest.mark.parametrize("config", KINDS)
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
    np.testing.assert_allclose(shared, ranker.predict(pairs), rtol=0, atol=1e-5)
    assert sum(read) - tokens == ranker.tokens / 2  # of each of the two calls, without padding
    model.base_model.set_attn_implementation("sdpa")
    padded = ranker.predict(pairs)
    np.testing.assert_allclose(shared, padded, rtol=0, atol=1e-5)
    assert padded.std() > 0.05 and tokens < 0.9 * ranker.tokens / 3


def test_other_attention_implementations_are_kept_and_share_no_prefix(teacher_dir, judgments):
    eager, shared = (
        Ranker.from_pretrained(teacher_dir, device="cpu", attn_implementation=kind) for kind in ("eager", "sdpa")
    )
    eager.share_prefix = True
    np.testing.assert_allclose(eager.predict(pair_texts(judgments)), shared.predict(pair_texts(judgments)), atol=1e-5)
    assert eager.model.model.config._attn_implementation == "eager"


def test_no_prefix_is_shared_where_attention_is_not_plain(tiny_teacher, student_ranker):
    tokenizer = tiny_teacher[1]
    config = Gemma2Config(**SHAPE, vocab_size=len(tokenizer))
    assert not Ranker(LLMForLastTokenRanking.from_config(config), tokenizer).share_prefix
    assert not student_ranker.share_prefix


def test_a_document_is_a_string_or_its_title_and_summary(ranker):
    documents = [{"title": "read file", "summary": "json list"}, {"title": "", "summary": "plot"}]
    texts = ["read file json list", "plot"]
    from_mappings = ranker.predict([("read json", document) for document in documents])
    assert np.array_equal(from_mappings, ranker.predict([("read json", text) for text in texts]))
    assert ranker.rank("read json", documents) == ranker.rank("read json", texts)


@pytest.mark.parametrize("missing", [{"title": None}, {"title": float("nan")}, {"title": pd.NA}, {}])
def test_a_missing_title_or_summary_is_an_empty_text(ranker, missing):
    summary = {"summary": "json list"}
    found, expected, turned = (
        ranker.predict([("read json", document)])
        for document in (summary | missing, summary | {"title": ""}, {"title": "json list", "summary": None})
    )
    assert found == expected == turned
    assert ranker.rank("read json", [summary | missing])[0]["text"] == "json list"


def test_one_pair_is_one_score(ranker):
    pair = ("read json", "plot")
    expected = ranker.predict([pair])[0]
    for alone in (pair, list(pair), ("read json", {"title": "", "summary": "plot"})):
        assert np.ndim(ranker.predict(alone)) == 0 and ranker.predict(alone) == expected
    assert ranker.probabilities(pair) == ranker.probabilities([pair])[0]
    assert ranker.predict([]).shape == (0,) and ranker.predict([pair, pair]).shape == (2,)


def test_invalid_pairs_and_documents_are_refused(ranker):
    for pairs in ("read", ["read"], ["read", "json", "plot"]):
        with pytest.raises(ValueError, match=r"Give pairs \(query, document\)"):
            ranker.predict(pairs)
    for document in (None, 3, {"text": "json"}):
        with pytest.raises(ValueError, match="is a string or a mapping with title and summary, not"):
            ranker.predict([("read", document)])


def test_threads_share_a_ranker(ranker):
    # Beside one another: packed and padded passes, cut and whole texts.
    texts = [" ".join(["read", "json", "plot"][: 1 + n % 3] * (1 + n % 30)) for n in range(60)]
    jobs = [[(text, text), (text, "plot"), ("json", texts[-1 - n])] for n, text in enumerate(texts)]
    expected = [ranker.predict(job) for job in jobs]
    counted = ranker.queries_cut, ranker.documents_cut, ranker.tokens
    padding = copy.copy(ranker)
    padding.share_prefix = False
    with ThreadPoolExecutor(8) as threads:
        others = threads.map(padding.predict, jobs)
        found = list(threads.map(ranker.predict, jobs))
        for scores in (found, list(others)):
            np.testing.assert_allclose(np.stack(scores), np.stack(expected), rtol=0, atol=1e-5)
    assert (ranker.queries_cut, ranker.documents_cut, ranker.tokens) == tuple(2 * count for count in counted)


def test_scoring_does_not_modify_the_tokenizer(ranker):
    backend = ranker.collator.tokenizer.backend_tokenizer
    before = backend.to_str()
    ranker.predict([("read " * 100, "json " * 100), ("read", "json")])
    assert backend.to_str() == before


@pytest.mark.parametrize("pad", ["</s>", None])
def test_a_stock_decoder_that_pads_with_its_end_token_scores(pad, tiny_teacher, tmp_path):
    tokenizer = copy.deepcopy(tiny_teacher[1])
    ids = {"eos_token_id": 1, "pad_token_id": pad and 1, "num_labels": 1}
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(
        LlamaConfig(**SHAPE, vocab_size=len(tokenizer), **ids)
    ).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"pad_token": pad}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(saved))
    first, again = (Ranker.from_pretrained(tmp_path, device="cpu") for _ in range(2))
    pairs = [("read json", "plot"), ("read json", "open a file and read json of a table")]
    shared = first.predict(pairs)
    first.share_prefix = False
    np.testing.assert_allclose(first.predict(pairs), shared, rtol=0, atol=1e-5)
    rows = [ranker.model.get_input_embeddings().weight for ranker in (first, again)]
    assert torch.equal(*rows) and len(rows[0]) == len(tokenizer) + 1  # the same weights each time
    assert first.model.config.pad_token_id == len(tokenizer)


def test_limits_stay_within_the_positions(tiny_student):
    model, tokenizer = copy.deepcopy(tiny_student)
    tokenizer.model_max_length = 512
    assert Ranker(model, tokenizer).collator.max_length == 64
    model.config.disranker["max_length"] = 65
    with pytest.raises(ValueError, match="max_length 65 is beyond the 64 positions"):
        Ranker(model, tokenizer)


def test_rank_returns_the_best_first(ranker):
    documents = ["sort list", "read json file", "plot"]
    scores = ranker.predict([("read json", document) for document in documents])
    ranking = ranker.rank("read json", documents)
    assert [row["corpus_id"] for row in ranking] == np.argsort(-scores).tolist()
    assert [row["score"] for row in ranking] == sorted(scores.tolist(), reverse=True)
    assert [row["text"] for row in ranking] == [documents[row["corpus_id"]] for row in ranking]
    assert ranker.rank("read json", documents, top_k=1) == ranking[:1]
    assert ranker.rank("read json", []) == []


def test_the_constructor_loads_a_folder(student_dir, student_ranker, judgments):
    pairs = pair_texts(judgments)
    for ranker in (Ranker(student_dir), Ranker(student_dir, student_ranker.collator.tokenizer)):
        np.testing.assert_allclose(ranker.predict(pairs), student_ranker.predict(pairs), atol=1e-6)
    with pytest.raises(ValueError, match="Pass the tokenizer with the model"):
        Ranker(student_ranker.model)


def test_constructors_do_not_modify_the_tokenizer(tiny_teacher):
    tokenizer = copy.deepcopy(tiny_teacher[1])
    tokenizer.pad_token = tokenizer.eos_token
    before = tokenizer.backend_tokenizer.to_str()
    Ranker(copy.deepcopy(tiny_teacher[0]), tokenizer)
    assert tokenizer.backend_tokenizer.to_str() == before and tokenizer.pad_token == tokenizer.eos_token


def test_predict_and_rank_have_the_parameters_of_cross_encoder(ranker, judgments, monkeypatch, capsys):
    pairs = pair_texts(judgments)
    scores, sizes, forward = ranker.predict(pairs), [], ranker._forward
    monkeypatch.setattr(ranker, "_forward", lambda rows: sizes.append(len(rows)) or forward(rows))
    again = ranker.predict(pairs, batch_size=25, show_progress_bar=True)
    np.testing.assert_allclose(again, scores, rtol=0, atol=1e-5)
    assert sizes == [25, 25, 7] and "57/57" in capsys.readouterr().err
    documents = [{"title": "sort list"}, {"summary": "read json file"}, "plot"]
    ranking = ranker.rank("read json", documents, return_documents=False, batch_size=2)
    assert [set(row) for row in ranking] == [{"corpus_id", "score"}] * 3
    with pytest.raises(ValueError, match="batch_size 0 is below 1"):
        ranker.predict(pairs, batch_size=0)


def test_truncated_texts_are_counted(ranker):
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
        "albert": AlbertModel(AlbertConfig(**tiny, intermediate_size=32)),
    }
    messages = {
        "bert": r"bert is not a trained ranker: it lacks .*'classifier.weight'\], .*; `disranker distill` trains one",
        "llama": r"llama is not a trained ranker: it lacks \['score.weight'\], .*; `disranker fit_teacher` trains one",
        "gpt2": r"gpt2 is not a trained ranker: it lacks \['score.weight'\]",
        "albert": r"albert is not a trained ranker: it lacks .*'classifier.weight'\].*`disranker distill` trains one",
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=messages[name]):
            Ranker.from_pretrained(tmp_path / name)


@pytest.mark.parametrize("name", ["/nowhere/student", "nowhere/student"])
def test_a_missing_folder_is_named(name):
    with pytest.raises(OSError, match=f"{name}: no such folder"):
        Ranker.from_pretrained(name)


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_half_precision_moves_scores_little_and_adds_no_ties(kind, request, judgments):
    folder, pairs = request.getfixturevalue(f"{kind}_dir"), pair_texts(judgments)
    exact, half = (Ranker.from_pretrained(folder, device="cpu", dtype=kind) for kind in ("float32", "bfloat16"))
    expected, scores = exact.predict(pairs), half.predict(pairs)
    assert next(half.model.parameters()).dtype == torch.bfloat16
    assert len(set(scores)) == len(set(expected))
    # Of random models, whose weights do not average their rounding out.
    assert 0 < np.abs(scores - expected).max() < 0.05


@pytest.mark.parametrize("kind", ["tiny_student", "tiny_teacher"])
def test_scores_under_autocast_are_not_rounded_to_bf16(kind, request):
    model = copy.deepcopy(request.getfixturevalue(kind)[0]).eval()
    ids = torch.arange(3, 51).reshape(8, 6)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert output.logits.dtype == torch.float32
    assert (output.scores != output.scores.bfloat16().float()).sum() >= 7  # of 8; a rounded score equals its rounding
    output.scores.sum().backward()
    head = [weight.grad for name, weight in model.named_parameters() if name.startswith(("classifier.", "score."))]
    assert head and all(grad is not None and grad.dtype == torch.float32 for grad in head)
