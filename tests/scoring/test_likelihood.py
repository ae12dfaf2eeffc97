"""Query likelihood against a plain forward pass over the full text."""

import copy
import json
import sys

import numpy as np
import pytest
import torch
from tiny_gguf import write_gguf
from tokenizers import processors
from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

from hf_disranker.cli import main
from hf_disranker.data.candidates import Candidates
from hf_disranker.data.schema import TableError
from hf_disranker.data.tables import pair_texts
from hf_disranker.evaluation import metrics
from hf_disranker.recipes.quickstart.from_scratch import small_llama
from hf_disranker.scoring.likelihood import LikelihoodEngine, load_likelihood
from hf_disranker.scoring.run import ScoringRun, verify
from hf_disranker.scoring.store import ScoreStore

TEMPLATE = "document {title}\n{summary}\nquery: {query}"


@pytest.fixture(scope="module")
def decoder(tiny_teacher):
    """A causal language model with random weights, and its tokenizer."""
    torch.manual_seed(0)
    return small_llama(tiny_teacher[1], layers=2, size=32, initializer_range=0.2).eval(), tiny_teacher[1]


@pytest.fixture
def decoder_dir(decoder, tmp_path):
    for part in decoder:
        part.save_pretrained(tmp_path / "decoder")
    return str(tmp_path / "decoder")


def gemma(tokenizer):
    """A model with sliding windows and soft-capped logits."""
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 16,
    }
    kinds = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        num_key_value_heads=1,
        final_logit_softcapping=2.0,
        initializer_range=0.2,
        **shape,
        **kinds,
    )
    return Gemma3ForCausalLM(config).eval()


def by_full_text(model, tokenizer, pair, document_tokens=256):
    """Mean log-probability of the query's tokens in one forward pass over the full text."""
    query, document = pair

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    text = ids(f"document {document['title']}\n{document['summary']}".rstrip())[
        : len(ids("document")) + document_tokens
    ]
    whole = tokenizer("a")["input_ids"]
    start = whole[: whole.index(ids("a")[0])]
    context, asked = start + text + ids("\nquery:"), ids(f" {query}")
    with torch.no_grad():
        logits = model(torch.tensor([context + asked])).logits[0].log_softmax(dim=-1)
    return np.mean([logits[len(context) + at - 1, token].item() for at, token in enumerate(asked)])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_score_matches_a_full_text_forward(decoder, judgments, family):
    model, tokenizer = decoder if family == "llama" else (gemma(decoder[1]), decoder[1])
    expected = [by_full_text(model, tokenizer, pair) for pair in pair_texts(judgments)]
    engine = LikelihoodEngine(copy.deepcopy(model), tokenizer, "lm", TEMPLATE)
    steps = []
    scores = engine.predict(pair_texts(judgments), steps.append)
    assert scores.dtype == np.float32 and scores.std() > 0.1 and sum(steps) == 57
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert engine.tokens > 57 * 8 and engine.documents_cut == 0


def test_a_text_starts_with_the_tokenizers_special_tokens(decoder, judgments):
    model, tokenizer = decoder[0], copy.deepcopy(decoder[1])
    pairs = pair_texts(judgments[:5])
    without = LikelihoodEngine(model, tokenizer, "lm", TEMPLATE).predict(pairs)
    bos = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos[0]} $A", special_tokens=[bos]
    )
    scores = LikelihoodEngine(model, tokenizer, "lm", TEMPLATE).predict(pairs)
    np.testing.assert_allclose(scores, [by_full_text(model, tokenizer, pair) for pair in pairs], atol=1e-5)
    assert np.abs(scores - without).min() > 1e-3


def test_scores_do_not_depend_on_batch_or_order(decoder, judgments):
    model, tokenizer = decoder
    queries = judgments["query"].unique()[:4]
    pairs = [(query, document) for query in queries for _, document in pair_texts(judgments[:20])]
    alone = np.concatenate([LikelihoodEngine(model, tokenizer, "lm").predict([pair]) for pair in pairs[::7]])
    order = np.random.default_rng(0).permutation(len(pairs))
    for budget in (1, 100, 5000):
        engine = LikelihoodEngine(model, tokenizer, "lm", token_budget=budget)
        scores = engine.predict(pairs)
        np.testing.assert_allclose(scores[::7], alone, rtol=0, atol=1e-5)
        np.testing.assert_allclose(engine.predict([pairs[at] for at in order]), scores[order], rtol=0, atol=1e-5)


def test_each_document_is_read_once_and_the_head_sees_query_positions_only(decoder, judgments):
    model, tokenizer = copy.deepcopy(decoder[0]), decoder[1]
    read, output = [], []
    model.model.embed_tokens.register_forward_hook(lambda _, inputs, __: read.append(inputs[0].numel()))
    model.lm_head.register_forward_hook(lambda _, inputs, __: output.append(inputs[0].shape[:2].numel()))
    query, document = pair_texts(judgments)[0]
    queries = list(judgments["query"].unique())
    engine = LikelihoodEngine(model, tokenizer, "lm", TEMPLATE)
    contexts, _ = engine._encode([(query, document)])
    engine.predict([(query, document) for query in queries])
    widest = max(len(tokenizer(f" {query}", add_special_tokens=False)["input_ids"]) for query in queries)
    assert read == [len(contexts[0]) - 1, len(queries) * widest] and output == [len(queries) * widest]
    read.clear()
    engine.token_budget = len(contexts[0]) + widest
    engine.predict([(query, document) for query in queries])
    assert len(read) == 1 + len(queries) and read[0] == len(contexts[0]) - 1 and max(read[1:]) == widest


def test_a_long_document_is_truncated_and_the_query_part_is_not(decoder, judgments):
    model, tokenizer = decoder
    query, document = pair_texts(judgments)[0]
    long = document | {"summary": document["summary"] + " read write" * 30}
    engine = LikelihoodEngine(model, tokenizer, "lm", TEMPLATE, document_tokens=5)
    scores = engine.predict([(query, long), (query, document)])
    expected = [by_full_text(model, tokenizer, (query, one), 5) for one in (long, document)]
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert scores[0] == pytest.approx(scores[1], abs=1e-6) and engine.documents_cut == 2
    model.config.max_position_embeddings, positions = 30, model.config.max_position_embeddings
    try:
        with pytest.raises(ValueError, match="lm has 30 positions: use document_tokens below 256"):
            LikelihoodEngine(model, tokenizer, "lm", TEMPLATE).predict([(query, long)])
    finally:
        model.config.max_position_embeddings = positions


def test_an_empty_query_is_refused_by_the_table(decoder, judgments, tmp_path):
    engine = LikelihoodEngine(*decoder, "lm")
    rows = judgments.assign(query=judgments["query"].where(judgments["query_id"] != "q0", " "))
    with pytest.raises(TableError, match="query"):
        ScoringRun(engine, Candidates(rows), ScoreStore(tmp_path / "scores")).run()
    document = pair_texts(judgments)[0][1]
    assert np.isnan(engine.predict([("", document)])).tolist() == [True]
    assert engine.predict([]).shape == (0,)


@pytest.mark.parametrize(
    "template",
    ["{query}", "{title} {summary}", "{query} {title}", "{title} {query} end", "{title} {body} {query}"]
    + ["{title.__class__} {query}", "{title:9} {query}", "{title!r} {query}", "{title} {title} {query}"],
)
def test_a_malformed_template_is_refused_before_the_model_loads(template):
    message = "must contain .title. and .summary., or one of them, and end with .query.|must use|formats a field"
    with pytest.raises(ValueError, match=message):
        load_likelihood("no/model", template)


def test_provenance_changes_with_template_and_limit(decoder, decoder_dir, judgments, tmp_path):
    store = ScoreStore(tmp_path / "scores")
    engine = load_likelihood(decoder_dir, TEMPLATE)
    about = engine.describe()
    json.dumps(about)
    assert {"weights", "config", "dtype", "tokenizer", "templates", "document_tokens"} <= about.keys()
    ScoringRun(engine, Candidates(judgments), store, 20).run()
    assert verify(load_likelihood(decoder_dir, TEMPLATE), store) < 1e-5
    for other, key in (({"template": "{title} {query}"}, "templates"), ({"document_tokens": 9}, "document_tokens")):
        with pytest.raises(ValueError, match=f"another run; use a new folder.\n  {key}: [^\n]*$"):
            engine = load_likelihood(decoder_dir, **{"template": TEMPLATE} | other)
            ScoringRun(engine, Candidates(judgments), store, 20).run()


def test_a_ranker_is_not_a_language_model(teacher_dir):
    with pytest.raises(ValueError, match="is not a causal language model .LlamaForSequenceClassification."):
        load_likelihood(teacher_dir)


def test_bf16_scores_are_close_and_do_not_tie(decoder, decoder_dir, judgments):
    expected = LikelihoodEngine(*decoder, "lm").predict(pair_texts(judgments))
    engine = load_likelihood(decoder_dir, dtype="bfloat16")
    assert engine.describe()["dtype"] == "bfloat16" and engine.model.dtype == torch.bfloat16
    scores = engine.predict(pair_texts(judgments))
    np.testing.assert_allclose(scores, expected, atol=0.1)
    assert len(np.unique(scores)) > 50


def test_out_of_memory_halves_the_batch(decoder, judgments, monkeypatch, caplog):
    model = copy.deepcopy(decoder[0])
    engine = LikelihoodEngine(model, decoder[1], "lm")
    expected = engine.predict(pair_texts(judgments))
    forward = LikelihoodEngine._forward

    def small(self, rows):
        if len(rows) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return forward(self, rows)

    monkeypatch.setattr(LikelihoodEngine, "_forward", small)
    np.testing.assert_allclose(engine.predict(pair_texts(judgments)), expected, atol=1e-5)
    assert caplog.messages[0].startswith("Out of memory: continuing with token_budget ")


def test_score_and_evaluate_use_it_by_an_option(decoder, decoder_dir, judgments, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["disranker"])
    table, out = str(tmp_path / "pairs.parquet"), str(tmp_path / "scores")
    judgments.to_parquet(table)
    option = ["--model", decoder_dir, "--likelihood", "true", "--likelihood_template", TEMPLATE.replace("\n", "\\n")]
    main(["score", *option, "--pairs", table, "--out", out])
    scores = ScoreStore(out).read()["teacher_score"].to_numpy()
    np.testing.assert_allclose(
        scores, LikelihoodEngine(*decoder, "lm", TEMPLATE).predict(pair_texts(judgments)), atol=1e-5
    )
    main(["evaluate", *option, "--judgments", table, "--split", "", "--out", str(tmp_path / "lm.json")])
    main(["evaluate", "--scores", out, "--judgments", table, "--split", "", "--out", str(tmp_path / "stored.json")])
    live, stored = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("lm", "stored"))
    assert live["ndcg@10"] == pytest.approx(stored["ndcg@10"], abs=1e-6) and live["about"]["parameters"] > 1000
    for stage in (["score", "--pairs", table, "--out", out], ["evaluate", "--judgments", table]):
        with pytest.raises(SystemExit, match="--gguf_file: only with --likelihood"):
            main([*stage, "--model", decoder_dir, "--gguf_file", "model.gguf"])
        with pytest.raises(SystemExit, match="--likelihood, --generative and --label_index are three"):
            main([*stage, *option, "--generative", "true"])


def test_a_gguf_file_scores_as_the_model_it_contains(judgments, tmp_path, monkeypatch, capsys):
    pytest.importorskip("gguf")
    model = write_gguf(tmp_path / "model.gguf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert tokenizer.tokenize(" read") == ["Ġr", "ea", "d"]
    expected = LikelihoodEngine(model, tokenizer, "lm", TEMPLATE).predict(pair_texts(judgments))
    engine = load_likelihood(str(tmp_path), TEMPLATE, gguf_file="model.gguf")
    np.testing.assert_allclose(engine.predict(pair_texts(judgments)), expected, atol=1e-4)

    judgments.drop(columns=["label", "split"]).to_parquet(tmp_path / "pairs.parquet")
    options = ["--model", tmp_path, "--gguf_file", "model.gguf", "--likelihood", "true"]
    options += ["--likelihood_template", TEMPLATE]
    monkeypatch.setattr(sys, "argv", ["disranker"])
    main(["score", *map(str, [*options, "--pairs", tmp_path / "pairs.parquet", "--out", tmp_path / "scores"])])
    np.testing.assert_allclose(ScoreStore(tmp_path / "scores").read()["teacher_score"], expected, atol=1e-4)
    judgments.to_parquet(tmp_path / "judgments.parquet")
    main(["evaluate", *map(str, [*options, "--judgments", tmp_path / "judgments.parquet", "--split", ""])])
    ndcg = metrics.evaluate(judgments["label"], expected, judgments["query_id"])["ndcg@10"]
    assert f"{ndcg:.4f}" in capsys.readouterr().out
