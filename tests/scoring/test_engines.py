"""Engines: any reranker in this process, and servers that score."""

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
from score_server import ScoreServer, logit
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

from hf_disranker.data.candidates import Candidates
from hf_disranker.data.tables import pair_texts
from hf_disranker.recipes.quickstart.from_scratch import small_llama
from hf_disranker.scoring.engines import CrossEncoderEngine, HttpEngine, RankerEngine, load_engine
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


def test_any_sequence_classifier_with_one_label_is_a_teacher(tmp_path, tiny_student, judgments):
    torch.manual_seed(0)
    tokenizer = tiny_student[1]
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = XLMRobertaConfig(vocab_size=len(tokenizer), num_labels=1, initializer_range=0.5, **shape)
    model = XLMRobertaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "roberta")
    tokenizer.save_pretrained(tmp_path / "roberta")
    engine = load_engine(str(tmp_path / "roberta"))
    assert isinstance(engine, CrossEncoderEngine)
    scores = engine.predict(pair_texts(judgments))
    expected = []
    with torch.no_grad():
        for pair in joined(judgments):
            expected.append(model(**engine.model.tokenizer(*pair, return_tensors="pt")).logits.item())
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert scores.std() > 0.1 and (scores < 0).any()
    about = engine.describe()
    assert about["engine"] == "sentence-transformers" and len(about["weights"]) == 64
    json.dumps(about)

    model.config.num_labels = 3
    XLMRobertaForSequenceClassification(model.config).save_pretrained(tmp_path / "roberta")
    with pytest.raises(ValueError, match="gives 3 scores for a pair; a teacher gives one"):
        load_engine(str(tmp_path / "roberta"))


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


def test_a_stock_decoder_with_a_score_row_is_a_ranker(tmp_path, teacher_dir, judgments):
    shutil.copytree(teacher_dir, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["disranker"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours, same = (load_engine(name).predict(pair_texts(judgments)) for name in (teacher_dir, str(tmp_path)))
    np.testing.assert_allclose(same, ours, atol=1e-6)


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
    assert caplog.messages[0].startswith("Out of memory: going on with token_budget ")
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
    assert sizes == [32, 16, 8] and "Out of memory: going on with batch_size 8." in caplog.messages


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
def test_a_server_gives_raw_scores_in_our_order(server, kind, judgments):
    engine = HttpEngine(kind, f"{server.url}/", "org/teacher", batch_size=3, concurrency=4)
    scores = engine.predict(pair_texts(judgments))
    expected = [logit(query, document) for query, document in joined(judgments)]
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    assert (scores < 0).any() and scores.max() > 1  # no probabilities
    sizes = judgments.groupby("query_id").size()
    assert len(server.requests) == sum(-(-sizes // 3))  # a query's documents together, three at a time
    assert all(body["model"] == "org/teacher" for _, _, body, _ in server.requests)
    assert engine.tokens == (0 if kind == "tei" else 7 * 57)


def test_requests_under_way_are_bounded(server, judgments):
    server.delay = 0.01
    HttpEngine("tei", server.url, "t", batch_size=1, concurrency=3).predict(pair_texts(judgments))
    assert server.most_inside == 3


def test_a_rate_limit_spreads_the_requests(server, judgments):
    begin = time.monotonic()
    HttpEngine("tei", server.url, "t", batch_size=1, per_second=100).predict(pair_texts(judgments[:21]))
    assert time.monotonic() - begin >= 0.19
    times = sorted(at for *_, at in server.requests)
    assert len(times) == 21 and times[-1] - times[0] >= 0.15


def test_a_busy_server_is_asked_again(server, judgments, no_sleep):
    server.troubles = [(503, {}), (429, {"Retry-After": "7"}), (500, {})]
    engine = HttpEngine("infinity", server.url, "t", concurrency=1)
    scores = engine.predict(pair_texts(judgments[:3]))
    assert np.isfinite(scores).all() and len(server.requests) == 4
    assert 7 in no_sleep and len(no_sleep) >= 2


def test_a_server_that_refuses_us_or_stays_busy_ends_the_run(server, judgments, no_sleep):
    for troubles, status in (([(401, {})], 401), ([(404, {})], 404), ([(503, {})] * 3, 503)):
        server.troubles = list(troubles)
        with pytest.raises(OSError, match=f"answers {status}: "):
            HttpEngine("tei", server.url, "t", retries=2).predict(pair_texts(judgments[:3]))


def test_what_the_server_cannot_read_has_no_score(server, judgments):
    rows = judgments.assign(title=["unreadable" if at in (1, 30) else "read" for at in range(57)])
    scores = HttpEngine("vllm", server.url, "t").predict(pair_texts(rows))
    assert np.flatnonzero(np.isnan(scores)).tolist() == [1, 30]


@pytest.mark.parametrize("answer", [[{"index": 0, "score": 1.0}], {"detail": "hello"}, []])
def test_an_answer_without_all_scores_is_no_answer(server, judgments, monkeypatch, answer):
    monkeypatch.setattr("score_server.Handler.answer", lambda self, body: (200, answer))
    with pytest.raises(OSError, match="gives no scores of 3 documents: "):
        HttpEngine("tei", server.url, "t").predict(pair_texts(judgments[:3]))


def test_the_key_goes_into_the_header_and_nowhere_else(server, judgments, monkeypatch):
    monkeypatch.setenv("HF_DISRANKER_API_KEY", "secret-key")
    engine = HttpEngine("vllm", server.url, "t")
    engine.predict(pair_texts(judgments[:3]))
    assert server.requests[0][1]["Authorization"] == "Bearer secret-key"
    assert "secret-key" not in repr(engine) + json.dumps(engine.describe())


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

        def predict(self, pairs):
            calls.append(len(pairs))
            if len(calls) == 3:
                process.send_signal(signal.SIGKILL)
                process.wait()
            return super().predict(pairs)

    store = ScoreStore(tmp_path)
    with pytest.raises(OSError):
        engine = Mortal("tei", f"http://127.0.0.1:{port}", "t", retries=1)
        ScoringRun(engine, Candidates(judgments), store, 10).run()
    assert store.shards() == {0, 1} and "refused" in store.status().failures[2]
    again = start(port)
    try:
        engine = HttpEngine("tei", f"http://127.0.0.1:{port}", "t")
        assert ScoringRun(engine, Candidates(judgments), store, 10).run() == 37
    finally:
        again.kill()
        again.wait()
    assert store.status().failures == {} and store.missing() == 0
    expected = [logit(query, document) for query, document in joined(judgments)]
    np.testing.assert_allclose(store.read()["teacher_score"], expected, rtol=1e-6)
