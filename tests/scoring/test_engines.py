"""Engines: any reranker in this process, and servers that score."""

import copy
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from score_server import ScoreServer, logit
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from tokenizers import normalizers, processors
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LiltConfig,
    LiltForSequenceClassification,
    LlamaForSequenceClassification,
)

from hf_disranker.data.candidates import Candidates
from hf_disranker.data.tables import pair_texts
from hf_disranker.recipes.quickstart.from_scratch import small_llama
from hf_disranker.recipes.score import ScoreArguments, make_engine
from hf_disranker.scoring.engines import CrossEncoderEngine, HttpEngine, RankerEngine, load_engine
from hf_disranker.scoring.provenance import tokenizer_digest
from hf_disranker.scoring.run import ScoringRun
from hf_disranker.scoring.store import ScoreStore


def joined(judgments):
    return [
        (query, f"{title} {summary}".strip())
        for query, title, summary in zip(judgments["query"], judgments["title"], judgments["summary"], strict=True)
    ]


@pytest.fixture
def server():
    with ScoreServer() as server:
        yield server


@pytest.fixture
def no_sleep(monkeypatch):
    """Waits of urllib3 between attempts, noted instead of spent."""
    waits = []
    monkeypatch.setattr("urllib3.util.retry.time.sleep", waits.append)
    return waits


# In this process


def test_a_teacher_of_ours_is_a_ranker(teacher_dir, judgments):
    engine = load_engine(teacher_dir)
    assert isinstance(engine, RankerEngine)
    about = engine.describe()
    assert (about["teacher"], about["engine"], about["dtype"]) == (teacher_dir, "transformers", "float32")
    assert about["templates"]["text"] == "query: {query} document: {document}" and about["max_length"] == 64
    assert set(about["versions"]) == {"torch", "transformers"} and len(about["weights"]) == 64
    scores = engine.predict(pair_texts(judgments))
    assert scores.shape == (57,) and scores.dtype == np.float32
    assert engine.tokens == sum(len(row) for row in _token_rows(engine.ranker, judgments))


def _token_rows(ranker, judgments):
    documents = [text for _, text in joined(judgments)]
    return [row["input_ids"] for row in ranker.collator.encode(list(judgments["query"]), documents).rows]


def test_a_sequence_classifier_of_another_family_is_a_teacher(tmp_path, tiny_student, judgments):
    torch.manual_seed(0)
    tokenizer = tiny_student[1]
    shape = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = LiltConfig(vocab_size=len(tokenizer), num_labels=1, initializer_range=0.5, **shape)
    model = LiltForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "lilt")
    tokenizer.save_pretrained(tmp_path / "lilt")
    engine = load_engine(str(tmp_path / "lilt"))
    assert isinstance(engine, CrossEncoderEngine)
    steps = []
    scores = engine.predict(pair_texts(judgments), steps.append)
    assert steps == [32, 25]
    expected = []
    with torch.no_grad():
        for pair in joined(judgments):
            expected.append(model(**engine.model.tokenizer(*pair, return_tensors="pt")).logits.item())
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert scores.std() > 0.1 and (scores < 0).any()
    about = engine.describe()
    assert about["engine"] == "sentence-transformers" and len(about["weights"]) == 64
    json.dumps(about)

    weights = load_file(tmp_path / "lilt" / "model.safetensors")
    headless = {name: weights[name] for name in weights if not name.startswith("classifier")}
    save_file(headless, tmp_path / "lilt" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"no weights of a ranking head \(classifier.dense.bias, "):
        load_engine(str(tmp_path / "lilt"))

    model.config.num_labels = 3
    LiltForSequenceClassification(model.config).save_pretrained(tmp_path / "lilt")
    with pytest.raises(ValueError, match="returns 3 scores for a pair; a ranker returns one"):
        load_engine(str(tmp_path / "lilt"))


def test_a_language_model_that_answers_yes_or_no_is_a_teacher(tmp_path, tiny_teacher, judgments):
    tokenizer = tiny_teacher[1]
    torch.manual_seed(0)
    model = small_llama(tokenizer, layers=2, size=32, initializer_range=0.1).eval()
    model.save_pretrained(tmp_path / "decoder")
    tokenizer.save_pretrained(tmp_path / "decoder")
    yes, no = (tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("read", "write"))
    body = Transformer(str(tmp_path / "decoder"), transformer_task="text-generation")
    CrossEncoder(modules=[body, LogitScore(yes, no)]).save_pretrained(str(tmp_path / "reranker"))
    engine = load_engine(str(tmp_path / "reranker"))
    assert isinstance(engine, CrossEncoderEngine)
    scores = engine.predict(pair_texts(judgments))
    features = engine.model.preprocess([joined(judgments)[3]])
    with torch.no_grad():
        logits = model(features["input_ids"], attention_mask=features["attention_mask"]).logits[0, -1]
    assert scores[3] == pytest.approx(float(logits[yes] - logits[no]), abs=1e-4)
    assert np.isfinite(scores).all() and scores.std() > 0.01
    assert engine.describe()["modules"][1][1]["true_token_id"] == yes


def test_a_plain_language_model_is_a_teacher_only_if_asked_for(tmp_path, tiny_teacher, judgments):
    tokenizer = copy.deepcopy(tiny_teacher[1])
    path = str(tmp_path)

    def save():
        torch.manual_seed(0)
        model = small_llama(tokenizer, layers=2, size=32, initializer_range=0.1).eval()
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        return model

    save()
    with pytest.raises(ValueError, match=r"without a ranking head \(LlamaForCausalLM\). .*fit_teacher.*--generative"):
        load_engine(path)
    with pytest.raises(ValueError, match="cannot answer yes or no: its tokenizer has no tokens for these words"):
        load_engine(path, generative=True)  # both would be the unknown token, and all scores 0
    tokenizer.add_tokens(["yes", "no"])
    model = save()
    engine = load_engine(path, generative=True)
    scores = engine.predict(pair_texts(judgments))
    features = engine.model.preprocess([joined(judgments)[3]])
    with torch.no_grad():
        logits = model(features["input_ids"], attention_mask=features["attention_mask"]).logits[0, -1]
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
    assert scores[3] == pytest.approx(float(logits[yes] - logits[no]), abs=1e-4) and scores.std() > 0.01


def small_encoder(tokenizer, **config):
    return BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, **config)


def test_a_checkpoint_without_a_ranking_head_is_refused(tmp_path, tiny_student, teacher_dir):
    path, tokenizer = str(tmp_path), tiny_student[1]
    tokenizer.save_pretrained(path)
    BertModel(small_encoder(tokenizer)).save_pretrained(path)
    with pytest.raises(ValueError, match=r"no ranking head \(BertModel\). disranker distill .* disranker fit_teacher"):
        load_engine(path)
    (tmp_path / "modules.json").write_text("[]")
    with pytest.raises(ValueError, match=r"is an embedding model \(SentenceTransformer\), without a ranking head"):
        load_engine(path)
    (tmp_path / "modules.json").unlink()
    for name, kind in ((path, "BertModel"), (teacher_dir, "marked ranker")):
        with pytest.raises(ValueError, match=f"--generative is for a causal language model; .* is a {kind}"):
            load_engine(name, generative=True)
    BertForSequenceClassification(small_encoder(tokenizer, num_labels=2)).save_pretrained(path)
    with pytest.raises(ValueError, match="returns 2 scores for a pair; .*difference of two logits.*fit_teacher"):
        load_engine(path)


def test_a_folder_that_is_missing_or_holds_an_adapter_is_named(tmp_path):
    with pytest.raises(OSError, match="^runs/nothing: no such folder, and as a Hub id: .") as error:
        load_engine("runs/nothing")
    assert "\n" not in str(error.value)
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(ValueError, match=r"contains an adapter \(LoRA\) of org/base .* merge_and_unload"):
        load_engine(str(tmp_path))


# What decides the scores


@pytest.fixture
def described(tmp_path):
    """Describe the engine of a copy of a folder, whose config and tokenizer may be changed first."""

    def described(folder, change=lambda tokenizer: None, **config):
        copied = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(folder, copied)
        content = json.loads((copied / "config.json").read_text())
        (copied / "config.json").write_text(json.dumps(content | config))
        tokenizer = AutoTokenizer.from_pretrained(copied)
        change(tokenizer)
        tokenizer.save_pretrained(copied)
        return load_engine(str(copied)).describe()

    return described


def test_settings_that_do_not_change_scores_are_not_described(teacher_dir, described, judgments):
    engine = load_engine(teacher_dir)
    about = engine.describe()
    engine.predict(pair_texts(judgments))  # sets the tokenizer's limits
    assert engine.describe() == about
    harmless = {"use_cache": False, "transformers_version": "9", "_attn_implementation": "eager"}
    again = described(teacher_dir, **harmless, id2label={"0": "relevant"}, label2id={"relevant": 0})
    assert again | {"teacher": teacher_dir} == about
    json.dumps(about)


def test_a_changed_config_or_tokenizer_is_described(teacher_dir, student_dir, described):
    for folder, field, value in (
        (teacher_dir, "rope_parameters", {"rope_theta": 500.0, "rope_type": "default"}),
        (student_dir, "num_attention_heads", 8),
    ):
        before, now = described(folder), described(folder, **{field: value})
        assert [key for key in now if now[key] != before[key]] == ["teacher", "config"]
        assert now["config"][field] == value

    def replace(tokenizer):
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace("read", "write")

    before, now = described(teacher_dir), described(teacher_dir, replace)
    assert [key for key in now if now[key] != before[key]] == ["teacher", "tokenizer"]


def test_the_digest_covers_everything_that_affects_token_ids(tiny_teacher):
    def changed(change):
        tokenizer = copy.deepcopy(tiny_teacher[1])
        change(tokenizer)
        return tokenizer_digest(tokenizer)

    last = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    digests = [
        changed(change)
        for change in (
            lambda tokenizer: None,
            lambda tokenizer: tokenizer.add_tokens(["an entirely new word"]),
            lambda tokenizer: tokenizer.add_special_tokens({"pad_token": "<new pad>"}),
            lambda tokenizer: setattr(tokenizer.backend_tokenizer, "normalizer", normalizers.Lowercase()),
            lambda tokenizer: setattr(tokenizer.backend_tokenizer, "post_processor", last),
            lambda tokenizer: setattr(tokenizer, "truncation_side", "left"),
            lambda tokenizer: setattr(tokenizer, "padding_side", "right"),
            lambda tokenizer: setattr(tokenizer, "model_input_names", ["input_ids"]),
        )
    ]
    assert len(set(digests)) == len(digests)
    assert digests[0] == changed(
        lambda tokenizer: tokenizer("a b", truncation=True, max_length=3, padding="max_length")
    )


def test_a_chat_template_counts_where_it_is_used(student_dir, tiny_teacher):
    model = CrossEncoder(student_dir)
    before = CrossEncoderEngine(model, "student").describe()["tokenizer"]
    model.tokenizer.chat_template = "{{ messages }}"
    assert CrossEncoderEngine(model, "student").describe()["tokenizer"] != before


def test_a_stock_decoder_with_a_score_row_is_a_ranker(tmp_path, teacher_dir, judgments):
    shutil.copytree(teacher_dir, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["disranker"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours, same = (load_engine(name).predict(pair_texts(judgments)) for name in (teacher_dir, str(tmp_path)))
    np.testing.assert_allclose(same, ours, atol=1e-6)


def test_a_decoder_that_pads_with_its_end_token_is_described_alike_at_every_load(tmp_path, tiny_teacher, judgments):
    tokenizer = copy.deepcopy(tiny_teacher[1])
    tokenizer.pad_token = tokenizer.eos_token
    config = small_llama(tokenizer, layers=1, size=32).config
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    first = load_engine(str(tmp_path)).describe()
    torch.rand(1)  # whatever is drawn at loading must not count
    assert load_engine(str(tmp_path)).describe() == first


def out_of_memory():
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


@pytest.mark.parametrize("share_prefix", [True, False])
def test_a_batch_that_does_not_fit_is_halved(teacher_ranker, judgments, monkeypatch, caplog, share_prefix):
    expected = teacher_ranker.predict(pair_texts(judgments))
    teacher_ranker.share_prefix = share_prefix
    forward, sizes = teacher_ranker.model.model.forward, []

    def small(input_ids, **inputs):
        sizes.append(input_ids.numel())
        if sizes[-1] > 300:
            raise out_of_memory()
        return forward(input_ids=input_ids, **inputs)

    monkeypatch.setattr(teacher_ranker.model.model, "forward", small)
    scores = teacher_ranker.predict(pair_texts(judgments))
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert max(sizes) > 500 and 150 <= teacher_ranker.token_budget <= 500
    assert caplog.messages[0].startswith("Out of memory: continuing with token_budget ")
    sizes.clear()
    teacher_ranker.predict(pair_texts(judgments))
    assert max(sizes) <= 300  # it has learnt


def test_other_errors_and_one_row_that_does_not_fit_are_raised(teacher_ranker, judgments, monkeypatch):
    for error in (RuntimeError("shapes do not match"), out_of_memory()):
        monkeypatch.setattr(teacher_ranker.model.model, "forward", Mock(side_effect=error))
        with pytest.raises(RuntimeError, match=str(error)[:10]):
            teacher_ranker.predict(pair_texts(judgments))


def test_a_cross_encoder_halves_its_batch(student_dir, judgments, monkeypatch, caplog):
    engine = CrossEncoderEngine(CrossEncoder(student_dir), "student")
    expected = engine.predict(pair_texts(judgments))
    predict, sizes = engine.model.predict, []

    def small(texts, batch_size, **options):
        sizes.append(batch_size)
        if batch_size > 8:
            raise out_of_memory()
        return predict(texts, batch_size=batch_size, **options)

    monkeypatch.setattr(engine.model, "predict", small)
    np.testing.assert_allclose(engine.predict(pair_texts(judgments)), expected, atol=1e-5)
    assert (
        sizes[:2] == [32, 16]
        and set(sizes[2:]) == {8}
        and "Out of memory: continuing with batch_size 8." in caplog.messages
    )


DTYPES = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("folder", ["teacher_dir", "student_dir"])
def test_scores_do_not_depend_on_batch_or_order(request, folder, dtype, judgments):
    engine = load_engine(request.getfixturevalue(folder), str(dtype).removeprefix("torch."))
    pairs = pair_texts(judgments)
    alone = np.array([engine.predict([pair])[0] for pair in pairs])
    order = np.random.default_rng(0).permutation(len(pairs))
    for budget in (64, 300, 5000):
        engine.ranker.token_budget = budget
        np.testing.assert_allclose(engine.predict(pairs), alone, rtol=0, atol=DTYPES[dtype])
        mixed = engine.predict([pairs[at] for at in order])
        np.testing.assert_allclose(mixed, alone[order], rtol=0, atol=DTYPES[dtype])
    assert alone.std() > 3 * DTYPES[dtype]


# Over HTTP


@pytest.mark.parametrize("kind", ["vllm", "tei", "infinity"])
def test_a_server_returns_raw_scores_in_our_order(server, kind, judgments):
    engine = HttpEngine(kind, f"{server.url}/", "org/teacher", batch_size=3, concurrency=4)
    scores = engine.predict(pair_texts(judgments))
    expected = [logit(query, document) for query, document in joined(judgments)]
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    assert (scores < 0).any() and scores.max() > 1  # no probabilities
    sizes = judgments.groupby("query_id").size()
    assert len(server.requests) == sum(-(-sizes // 3))  # a query's documents together, three at a time
    assert all(body["model"] == "org/teacher" for _, _, body, _ in server.requests)
    assert engine.tokens == (0 if kind == "tei" else 7 * 57)


def test_requests_in_flight_are_bounded(server, judgments):
    server.delay = 0.01
    HttpEngine("tei", server.url, "t", batch_size=1, concurrency=3).predict(pair_texts(judgments))
    assert server.most_inside == 3


def test_a_busy_server_is_retried(server, judgments, no_sleep):
    server.troubles = [(503, {}), (429, {"Retry-After": "7"}), (500, {})]
    engine = HttpEngine("infinity", server.url, "t", concurrency=1)
    scores = engine.predict(pair_texts(judgments[:3]))
    assert np.isfinite(scores).all() and len(server.requests) == 4
    assert 7 in no_sleep and len(no_sleep) >= 2


def test_a_server_that_refuses_us_or_stays_busy_ends_the_run(server, judgments, no_sleep):
    for troubles, status in (([(401, {})], 401), ([(404, {})], 404), ([(503, {})] * 3, 503)):
        server.troubles = list(troubles)
        with pytest.raises(OSError, match=f"returned {status}: "):
            HttpEngine("tei", server.url, "t", retries=2).predict(pair_texts(judgments[:3]))


def test_pairs_that_the_server_rejects_have_no_score(server, judgments):
    rows = judgments.assign(title=["unreadable" if at in (1, 30) else "read" for at in range(57)])
    scores = HttpEngine("vllm", server.url, "t").predict(pair_texts(rows))
    assert np.flatnonzero(np.isnan(scores)).tolist() == [1, 30]


@pytest.mark.parametrize(
    ("score", "expected"),
    [(2, 2), ([0.25], 0.25)]
    + [(value, np.nan) for value in (None, "0.5", "high", True, [0.1, 0.9], [], {}, 10**400, 1e300)]
    + [(float(value), np.nan) for value in ("nan", "inf", "-inf")],
    ids=str,
)
def test_a_score_that_is_not_a_number_becomes_nan(server, judgments, monkeypatch, score, expected):
    found = [{"index": 2, "score": 0.5}, {"index": 1, "score": score}, {"index": 0, "score": -0.5}]
    answer = {"data": found, "usage": {"prompt_tokens": None}}
    monkeypatch.setattr("score_server.Handler.answer", lambda self, body: (200, answer))
    scores = HttpEngine("vllm", server.url, "t").predict(pair_texts(judgments[:3]))
    np.testing.assert_array_equal(scores, np.array([-0.5, expected, 0.5], np.float32))
    assert len(server.requests) == 1


def poisoned(answer):
    """A server that answers in another way as soon as one document is poison."""

    def respond(self, body):
        texts = body["texts"]
        scores = [{"index": at, "score": float(len(text))} for at, text in enumerate(texts)]
        return 200, answer(scores, [text == "poison" for text in texts]) if "poison" in texts else scores

    return respond


@pytest.mark.parametrize(
    "answer",
    [
        lambda scores, poison: [one for one, bad in zip(scores, poison, strict=True) if not bad],
        lambda scores, poison: [one | {"index": 0} for one in scores] if len(scores) > 1 else [{"score": 1.0}],
        lambda scores, poison: [{"score": one["score"]} for one in scores],
        lambda scores, poison: {"error": "cannot read it", "error_type": "tokenizer"},
        lambda scores, poison: [
            {"index": at, "error": "too long"} if bad else scores[at] for at, bad in enumerate(poison)
        ],
    ],
    ids=["left out", "one index twice", "no index", "error", "error of one"],
)
def test_a_document_that_invalidates_a_response_is_isolated(server, monkeypatch, answer):
    monkeypatch.setattr("score_server.Handler.answer", poisoned(answer))
    pairs = [("q", {"title": title, "summary": ""}) for title in ("a", "poison", "ccc", "dddd", "eeeee")]
    scores = HttpEngine("tei", server.url, "t").predict(pairs)
    np.testing.assert_array_equal(scores, [1, np.nan, 3, 4, 5])


@pytest.mark.parametrize("answer", [{"detail": "hello"}, "hello", None, [1.0, 2.0, 3.0]], ids=str)
def test_a_response_without_scores_is_an_error(server, judgments, monkeypatch, answer):
    monkeypatch.setattr("score_server.Handler.answer", lambda self, body: (200, answer))
    with pytest.raises(OSError, match="returned no scores of 3 documents: "):
        HttpEngine("tei", server.url, "t").predict(pair_texts(judgments[:3]))


def test_engines_report_every_batch(server, judgments, teacher_dir):
    ours = load_engine(teacher_dir, token_budget=200)
    for engine in (ours, HttpEngine("tei", server.url, "t", batch_size=2)):
        steps = []
        engine.predict(pair_texts(judgments), steps.append)
        assert sum(steps) == 57 and len(steps) >= 5


def test_the_key_is_sent_in_the_header_only(server, judgments, monkeypatch):
    monkeypatch.setenv("HF_DISRANKER_API_KEY", "secret-key")
    engine = HttpEngine("vllm", server.url, "t")
    engine.predict(pair_texts(judgments[:3]))
    assert server.requests[0][1]["Authorization"] == "Bearer secret-key"
    assert "secret-key" not in repr(engine) + json.dumps(engine.describe())


def test_options_of_a_local_model_are_refused_with_a_server():
    options = {"generative": True, "dtype": "bfloat16", "token_budget": 64}
    for names in (["generative"], ["dtype"], ["token_budget"], [*options]):
        given = {name: options[name] for name in names}
        with pytest.raises(ValueError, match=f"^--{', --'.join(names)}: for a model in this process, not .* vllm"):
            make_engine(ScoreArguments(model="t", engine="vllm", **given))


def test_options_of_a_server_are_refused_for_a_local_model():
    for given in ({"url": "http://host:8000"}, {"concurrency": 4}, {"url": "http://host:8000", "concurrency": 4}):
        with pytest.raises(ValueError, match=f"^--{', --'.join(given)}: for a server, not for --engine transformers"):
            make_engine(ScoreArguments(model="t", **given))


def test_a_token_budget_is_refused_for_a_cross_encoder(tmp_path, tiny_student):
    tokenizer = tiny_student[1]
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = LiltConfig(vocab_size=len(tokenizer), num_labels=1, **shape)
    for part in (LiltForSequenceClassification(config), tokenizer):
        part.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no token budget"):
        load_engine(str(tmp_path), token_budget=64)


def test_an_unknown_server_is_refused():
    with pytest.raises(ValueError, match="no server kind 'triton'; there are: vllm, tei, infinity"):
        HttpEngine("triton", "http://localhost", "t")


def start(port):
    """The server as a process of its own, listening."""
    process = subprocess.Popen([sys.executable, str(Path(__file__).parents[1].joinpath("score_server.py")), str(port)])
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return process
        except OSError:
            time.sleep(0.02)
    raise AssertionError("the server did not start")


def test_a_server_that_dies_in_the_middle_costs_one_shard(judgments, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process, calls = start(port), []

    class Mortal(HttpEngine):
        """Its server is killed while the third shard is being scored."""

        def predict(self, pairs, callback=None):
            calls.append(len(pairs))
            if len(calls) == 3:
                process.send_signal(signal.SIGKILL)
                process.wait()
            return super().predict(pairs, callback)

    store = ScoreStore(tmp_path)
    with pytest.raises(OSError):
        engine = Mortal("tei", f"http://127.0.0.1:{port}", "t", retries=1)
        ScoringRun(engine, Candidates(judgments), store, 10).run()
    assert store.shards() == {0, 1} and "refused" in store.failures()[2]
    again = start(port)
    try:
        engine = HttpEngine("tei", f"http://127.0.0.1:{port}", "t")
        assert ScoringRun(engine, Candidates(judgments), store, 10).run() == 37
    finally:
        again.kill()
        again.wait()
    assert store.failures() == {} and store.missing() == 0
    expected = [logit(query, document) for query, document in joined(judgments)]
    np.testing.assert_allclose(store.read()["teacher_score"], expected, rtol=1e-6)
