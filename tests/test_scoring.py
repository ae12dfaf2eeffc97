"""Scoring shard by shard: every pair once, whatever happens on the way."""

import copy
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch

from hf_disranker.data import mine_candidates, pair_texts, read_table
from hf_disranker.ranker import Ranker
from hf_disranker.schema import TableError
from hf_disranker.scoring import manifest_of, score_pairs, weights_digest
from hf_disranker.store import ScoreStore


@pytest.fixture
def store(tmp_path):
    return ScoreStore(tmp_path / "scores")


def test_every_pair_gets_the_rankers_score_and_keeps_its_columns(teacher_ranker, judgments, store):
    pairs = judgments.assign(market="fr")
    assert score_pairs(teacher_ranker, pairs, store, "teacher", shard_rows=10) == len(pairs)
    scores = store.read()
    pd.testing.assert_frame_equal(scores[pairs.columns], pairs, check_dtype=False)
    expected = teacher_ranker.predict(pair_texts(pairs))
    assert scores["teacher_score"].dtype == np.float32
    assert np.allclose(scores["teacher_score"], expected, rtol=0, atol=1e-5)


def test_only_missing_shards_are_scored(teacher_ranker, judgments, store, tmp_path):
    assert len(judgments) == 57
    score_pairs(teacher_ranker, judgments, store, "teacher", shard_rows=10)
    before = store.read()
    (tmp_path / "scores" / "part-00002.parquet").unlink()
    (tmp_path / "scores" / "part-00005.parquet").unlink()
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "scores").iterdir()}
    assert score_pairs(teacher_ranker, judgments, store, "teacher", shard_rows=10) == 10 + 7
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    pd.testing.assert_frame_equal(store.read(), before)
    assert score_pairs(teacher_ranker, judgments, store, "teacher", shard_rows=10) == 0


def test_another_teacher_input_or_limit_is_refused(teacher_ranker, student_ranker, judgments, store):
    score_pairs(teacher_ranker, judgments, store, "teacher", shard_rows=10)
    shorter = Ranker(teacher_ranker.model, teacher_ranker.collator.tokenizer)
    shorter.collator.max_length = 48
    other_title = judgments.assign(title=["changed", *judgments["title"][1:]])
    for ranker, pairs, shard_rows, names in (
        (teacher_ranker, other_title, 10, {"input"}),
        (teacher_ranker, judgments[::-1], 10, {"input"}),
        (teacher_ranker, judgments[:50], 10, {"input", "pairs"}),
        (teacher_ranker, judgments, 20, {"shard_rows"}),
        (student_ranker, judgments, 10, {"weights", "templates"}),
        (shorter, judgments, 10, {"max_length"}),
    ):
        with pytest.raises(ValueError) as error:
            score_pairs(ranker, pairs, store, "teacher", shard_rows)
        assert {line.split(":")[0].strip() for line in str(error.value).splitlines()[1:]} == names


def test_the_manifest_tells_weights_apart(teacher_ranker, judgments):
    weights = manifest_of(teacher_ranker, judgments, "teacher", 10)["weights"]
    other = copy.deepcopy(teacher_ranker.model)
    assert weights_digest(other) == weights
    with torch.no_grad():
        other.score.weight[0, 0] += 1e-3
    assert weights_digest(other) != weights


def test_a_score_that_is_not_finite_stops_the_run(teacher_ranker, judgments, store, monkeypatch):
    predict = teacher_ranker.predict

    def broken(pairs):
        scores = predict(pairs)
        return np.where([query == judgments["query"][15] for query, _ in pairs], np.nan, scores)

    monkeypatch.setattr(teacher_ranker, "predict", broken)
    with pytest.raises(
        TableError, match=r"score\(s\) that are not finite, first: \[\{'query_id': 'q3', 'doc_id': 'd3-"
    ):
        score_pairs(teacher_ranker, judgments, store, "teacher", shard_rows=10)
    assert store.has(0) and not store.has(1)


def many_pairs(judgments):
    """About 2,000 candidates: many spellings of the queries, each with every document that shares a word."""
    queries = judgments.drop_duplicates("query_id")["query"]
    spellings = pd.DataFrame(
        {"query": [f"{query} {extra}" for query in queries for extra in queries if extra != query]}
    )
    spellings["query_id"] = spellings.index.astype(str)
    return mine_candidates(spellings, judgments, top_k=16)[:2000]


def kill_after(shards, command, out):
    """Start a command and kill it, as a power cut would, once it has written so many shards; give their bytes."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(out.glob("*.parquet"))) < shards and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    return {file: file.read_bytes() for file in out.glob("*.parquet")}


def test_kill_and_resume_scores_every_pair_once(teacher_dir, judgments, corpus, tmp_path):
    pairs, out = many_pairs(judgments), tmp_path / "scores"
    assert len(pairs) == 2000
    pairs.to_parquet(tmp_path / "pairs.parquet")
    corpus.to_parquet(tmp_path / "corpus.parquet")
    command = [sys.executable, "-m", "hf_disranker.cli", "score", "--model", teacher_dir, "--out", str(out)]
    command += ["--pairs", str(tmp_path / "pairs.parquet"), "--corpus", str(tmp_path / "corpus.parquet")]
    command += ["--shard_rows", "100", "--token_budget", "64"]

    before = kill_after(2, command, out)
    assert 2 <= len(before) < 20
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f"Scored {2000 - 100 * len(before)} of 2000 pairs" in again.stdout
    assert {file: file.read_bytes() for file in before} == before

    undisturbed = ScoreStore(tmp_path / "undisturbed")
    ranker = Ranker.from_pretrained(teacher_dir)
    ranker.token_budget = 64
    score_pairs(ranker, read_table(pairs, "candidates", corpus=corpus), undisturbed, "teacher", shard_rows=100)
    scores, expected = ScoreStore(out).read(), undisturbed.read()
    key = ["query_id", "doc_id"]
    assert not scores.duplicated(key).any()
    pd.testing.assert_frame_equal(scores[[*key, "rank"]], expected[[*key, "rank"]])
    assert np.allclose(scores["teacher_score"], expected["teacher_score"], rtol=0, atol=1e-6)
    assert scores["teacher_score"].std() > 0.1
