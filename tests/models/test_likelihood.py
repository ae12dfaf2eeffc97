"""Query likelihood against a plain forward pass over the full text."""

import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_gguf import write_gguf
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig, QuantoConfig

from hf_disranker import Ranker
from hf_disranker.cli import main
from hf_disranker.data.candidates import Candidates
from hf_disranker.data.schema import TableError
from hf_disranker.data.tables import pair_texts
from hf_disranker.evaluation import metrics
from hf_disranker.models.likelihood import LikelihoodRanker
from hf_disranker.models.loading import load_language_model
from hf_disranker.recipes.quickstart.from_scratch import small_llama
from hf_disranker.scoring.engines import RankerEngine
from hf_disranker.scoring.provenance import describe_model
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


def teacher(folder, **options):
    """A scoring engine of the language model in a folder."""
    options = {"likelihood_template": TEMPLATE} | options
    return RankerEngine(Ranker.from_pretrained(folder, likelihood=True, **options), folder)


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
    ranker = LikelihoodRanker(copy.deepcopy(model), tokenizer, TEMPLATE)
    steps = []
    scores = ranker.predict(pair_texts(judgments), callback=steps.append)
    assert scores.dtype == np.float32 and scores.std() > 0.1 and sum(steps) == 57
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert ranker.tokens > 57 * 8 and ranker.documents_cut == 0


def test_a_text_starts_with_the_tokenizers_special_tokens(decoder, judgments):
    model, tokenizer = decoder[0], copy.deepcopy(decoder[1])
    pairs = pair_texts(judgments[:5])
    without = LikelihoodRanker(model, tokenizer, TEMPLATE).predict(pairs)
    bos = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos[0]} $A", special_tokens=[bos]
    )
    scores = LikelihoodRanker(model, tokenizer, TEMPLATE).predict(pairs)
    np.testing.assert_allclose(scores, [by_full_text(model, tokenizer, pair) for pair in pairs], atol=1e-5)
    assert np.abs(scores - without).min() > 1e-3


def test_a_ranker_loads_a_language_model_and_ranks_as_usual(decoder, decoder_dir, judgments):
    options = {"likelihood_template": TEMPLATE, "document_tokens": 5, "token_budget": 300}
    ranker = Ranker.from_pretrained(decoder_dir, likelihood=True, device="cpu", **options)
    pairs = pair_texts(judgments)
    scores = ranker.predict(pairs)
    expected = LikelihoodRanker(*decoder, TEMPLATE, document_tokens=5, token_budget=300).predict(pairs)
    np.testing.assert_array_equal(scores, expected)
    np.testing.assert_array_equal(teacher(decoder_dir, **options).predict(pairs), expected)
    assert isinstance(ranker, Ranker) and ranker.documents_cut > 0 and ranker.token_budget == 300
    np.testing.assert_allclose(ranker.predict(pairs, batch_size=2), scores, atol=1e-5)
    assert ranker.predict(pairs[0]) == pytest.approx(scores[0], abs=1e-5)

    query, documents = pairs[0][0], [document for _, document in pairs[:4]]
    ranking = ranker.rank(query, documents, top_k=3)
    alone = LikelihoodRanker(*decoder, TEMPLATE, document_tokens=5).predict([(query, one) for one in documents])
    assert [row["corpus_id"] for row in ranking] == np.argsort(-alone, kind="stable")[:3].tolist()
    best = documents[ranking[0]["corpus_id"]]
    assert ranking[0]["text"] == f"{best['title']}\n{best['summary']}"


def test_a_document_is_a_string_or_lacks_a_field(decoder):
    ranker = LikelihoodRanker(*decoder, TEMPLATE)
    scores = ranker.predict(
        [("read", "open\na file"), ("read", {"title": "open", "summary": "a file"})]
        + [("read", "open"), ("read", {"title": "open"}), ("read", {"title": "open", "summary": float("nan")})]
    )
    np.testing.assert_allclose(scores[[0, 2, 3]], scores[[1, 4, 4]], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="A document is a string or a mapping"):
        ranker.predict([("read", {"body": "text"})])


def test_options_of_likelihood_need_it(decoder_dir):
    for option in ({"likelihood_template": TEMPLATE}, {"document_tokens": 9}, {"gguf_file": "model.gguf"}):
        with pytest.raises(ValueError, match="document_tokens and gguf_file need likelihood=True"):
            Ranker.from_pretrained(decoder_dir, **option)
    with pytest.raises(ValueError, match="document_tokens is 0; a document needs at least 1"):
        Ranker.from_pretrained("no/model", likelihood=True, document_tokens=0)
    with pytest.raises(OSError, match="no/model: no such folder, and as a Hub id"):
        Ranker.from_pretrained("no/model", likelihood=True, local_files_only=True)
    with pytest.raises(ValueError, match="is not a trained ranker: .* or load it with likelihood=True"):
        Ranker.from_pretrained(decoder_dir)
    assert isinstance(LikelihoodRanker.from_pretrained(decoder_dir), LikelihoodRanker)


def test_pickled_weights_are_refused(decoder, decoder_dir):
    path = Path(decoder_dir, "model.safetensors")
    torch.save(load_file(path), path.with_name("pytorch_model.bin"))
    path.unlink()
    with pytest.raises(OSError, match="pytorch_model.bin and not as safetensors"):
        Ranker.from_pretrained(decoder_dir, likelihood=True)
    pairs = [("read", "open a file")]
    loaded = Ranker.from_pretrained(decoder_dir, likelihood=True, use_safetensors=False)
    assert loaded.predict(pairs) == LikelihoodRanker(*decoder).predict(pairs)


def test_scores_do_not_depend_on_batch_or_order(decoder, judgments):
    model, tokenizer = decoder
    queries = judgments["query"].unique()[:4]
    pairs = [(query, document) for query in queries for _, document in pair_texts(judgments[:20])]
    alone = np.concatenate([LikelihoodRanker(model, tokenizer).predict([pair]) for pair in pairs[::7]])
    order = np.random.default_rng(0).permutation(len(pairs))
    for budget in (1, 100, 5000):
        ranker = LikelihoodRanker(model, tokenizer, token_budget=budget)
        scores = ranker.predict(pairs)
        np.testing.assert_allclose(scores[::7], alone, rtol=0, atol=1e-5)
        np.testing.assert_allclose(ranker.predict([pairs[at] for at in order]), scores[order], rtol=0, atol=1e-5)


def test_each_document_is_read_once_and_the_head_sees_query_positions_only(decoder, judgments):
    model, tokenizer = copy.deepcopy(decoder[0]), decoder[1]
    read, output = [], []
    model.model.embed_tokens.register_forward_hook(lambda _, inputs, __: read.append(inputs[0].numel()))
    model.lm_head.register_forward_hook(lambda _, inputs, __: output.append(inputs[0].shape[:2].numel()))
    query, document = pair_texts(judgments)[0]
    queries = list(judgments["query"].unique())
    ranker = LikelihoodRanker(model, tokenizer, TEMPLATE)
    context = ranker._encode([(query, document)]).rows[0]["input_ids"]
    ranker.predict([(query, document) for query in queries])
    widest = max(len(tokenizer(f" {query}", add_special_tokens=False)["input_ids"]) for query in queries)
    assert read == [len(context) - 1, len(queries) * widest] and output == [len(queries) * widest]
    read.clear()
    ranker.token_budget = len(context) + widest
    ranker.predict([(query, document) for query in queries])
    assert len(read) == 1 + len(queries) and read[0] == len(context) - 1 and max(read[1:]) == widest


def test_a_long_document_is_truncated_and_the_query_part_is_not(decoder, judgments):
    model, tokenizer = decoder
    query, document = pair_texts(judgments)[0]
    long = document | {"summary": document["summary"] + " read write" * 30}
    ranker = LikelihoodRanker(model, tokenizer, TEMPLATE, document_tokens=5)
    scores = ranker.predict([(query, long), (query, document)])
    expected = [by_full_text(model, tokenizer, (query, one), 5) for one in (long, document)]
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert scores[0] == pytest.approx(scores[1], abs=1e-6) and ranker.documents_cut == 2
    model.config.max_position_embeddings, positions = 30, model.config.max_position_embeddings
    try:
        with pytest.raises(ValueError, match="the model has 30 positions: use document_tokens below 256"):
            LikelihoodRanker(model, tokenizer, TEMPLATE).predict([(query, long)])
    finally:
        model.config.max_position_embeddings = positions


def test_an_empty_query_is_refused_by_the_table(decoder, judgments, tmp_path):
    ranker = LikelihoodRanker(*decoder)
    rows = judgments.assign(query=judgments["query"].where(judgments["query_id"] != "q0", " "))
    with pytest.raises(TableError, match="query"):
        ScoringRun(RankerEngine(ranker, "lm"), Candidates(rows), ScoreStore(tmp_path / "scores")).run()
    document = pair_texts(judgments)[0][1]
    assert np.isnan(ranker.predict([("", document)])).tolist() == [True]
    assert ranker.predict([]).shape == (0,)


@pytest.mark.parametrize(
    "template",
    ["{query}", "{title} {summary}", "{query} {title}", "{title} {query} end", "{title} {body} {query}"]
    + ["{title.__class__} {query}", "{title:9} {query}", "{title!r} {query}", "{title} {title} {query}"],
)
def test_a_malformed_template_is_refused_before_the_model_loads(template):
    message = "must contain .title. and .summary., or one of them, and end with .query.|must use|formats a field"
    with pytest.raises(ValueError, match=message):
        Ranker.from_pretrained("no/model", likelihood=True, likelihood_template=template)


def test_provenance_changes_with_template_and_limit(decoder, decoder_dir, judgments, tmp_path):
    store = ScoreStore(tmp_path / "scores")
    engine = teacher(decoder_dir)
    about = engine.describe()
    json.dumps(about)
    assert {"weights", "config", "dtype", "tokenizer", "templates", "document_tokens"} <= about.keys()
    ScoringRun(engine, Candidates(judgments), store, 20).run()
    assert verify(teacher(decoder_dir), store) < 1e-5
    for other, key in (
        ({"likelihood_template": "{title} {query}"}, "templates"),
        ({"document_tokens": 9}, "document_tokens"),
    ):
        with pytest.raises(ValueError, match=f"another run; use a new folder.\n  {key}: [^\n]*$"):
            ScoringRun(teacher(decoder_dir, **other), Candidates(judgments), store, 20).run()


def test_a_ranker_is_not_a_language_model(teacher_dir):
    with pytest.raises(ValueError, match="is not a causal language model .LlamaForSequenceClassification."):
        Ranker.from_pretrained(teacher_dir, likelihood=True)


def test_bf16_scores_are_close_and_do_not_tie(decoder, decoder_dir, judgments):
    expected = LikelihoodRanker(*decoder).predict(pair_texts(judgments))
    ranker = Ranker.from_pretrained(decoder_dir, likelihood=True, dtype="bfloat16")
    about = RankerEngine(ranker, "lm").describe()
    assert about["dtype"] == "bfloat16" and ranker.model.dtype == torch.bfloat16
    loaded = AutoModelForCausalLM.from_pretrained(decoder_dir, dtype="bfloat16")
    assert about["weights"] == describe_model(loaded, loaded.config)["weights"]
    scores = ranker.predict(pair_texts(judgments))
    np.testing.assert_allclose(scores, expected, atol=0.1)
    assert len(np.unique(scores)) > 50


def test_out_of_memory_halves_the_batch(decoder, judgments, monkeypatch, caplog):
    model = copy.deepcopy(decoder[0])
    ranker = LikelihoodRanker(model, decoder[1])
    expected = ranker.predict(pair_texts(judgments))
    forward = LikelihoodRanker._forward

    def small(self, rows):
        if len(rows) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return forward(self, rows)

    monkeypatch.setattr(LikelihoodRanker, "_forward", small)
    np.testing.assert_allclose(ranker.predict(pair_texts(judgments)), expected, atol=1e-5)
    assert caplog.messages[0].startswith("Out of memory: continuing with token_budget ")


def test_score_and_evaluate_use_it_by_an_option(decoder, decoder_dir, judgments, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["disranker"])
    table, out = str(tmp_path / "pairs.parquet"), str(tmp_path / "scores")
    judgments.to_parquet(table)
    option = ["--model", decoder_dir, "--likelihood", "true", "--likelihood_template", TEMPLATE.replace("\n", "\\n")]
    main(["score", *option, "--pairs", table, "--out", out])
    scores = ScoreStore(out).read()["teacher_score"].to_numpy()
    np.testing.assert_allclose(scores, LikelihoodRanker(*decoder, TEMPLATE).predict(pair_texts(judgments)), atol=1e-5)
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
    expected = LikelihoodRanker(model, tokenizer, TEMPLATE).predict(pair_texts(judgments))
    ranker = Ranker.from_pretrained(tmp_path, likelihood=True, likelihood_template=TEMPLATE, gguf_file="model.gguf")
    np.testing.assert_allclose(ranker.predict(pair_texts(judgments)), expected, atol=1e-4)

    with pytest.raises(ValueError, match="model.gguf is dequantized; it cannot be loaded in 4 or 8 bits"):
        load_language_model(tmp_path, gguf_file="model.gguf", quantization_config=QuantoConfig())

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
