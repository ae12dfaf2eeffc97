"""Scoring shard by shard: every pair once, whatever happens on the way."""

import copy
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import processes
import pytest
import torch
from tokenizers import normalizers
from tqdm.auto import tqdm
from transformers import BertConfig, BertModel

from hf_disranker.cli import main
from hf_disranker.data.bm25 import mine_candidates
from hf_disranker.data.candidates import Candidates
from hf_disranker.data.groups import load_groups
from hf_disranker.data.schema import TableError
from hf_disranker.data.tables import pair_texts
from hf_disranker.models.ranker import Ranker
from hf_disranker.scoring.engines import RankerEngine, load_engine
from hf_disranker.scoring.provenance import describe_model
from hf_disranker.scoring.run import MAX_CHARACTERS, ScoringRun, verify
from hf_disranker.scoring.store import ScoreStore


@pytest.fixture
def store(tmp_path):
    return ScoreStore(tmp_path / "scores")


@pytest.fixture
def engine(teacher_ranker):
    return RankerEngine(teacher_ranker, "teacher")


def run(engine, pairs, store, shard_rows=10, worker=(0, 1)):
    return ScoringRun(engine, Candidates(pairs), store, shard_rows).run(*worker)


class Stub:
    """An engine whose scores are the lengths of the documents; it keeps what it was asked."""

    tokens = 0

    def __init__(self, scores=lambda pair: len(pair[1]["summary"])):
        self.scores, self.asked = scores, []

    def describe(self):
        return {"teacher": "stub", "weights": "w", "engine": "stub"}

    def predict(self, pairs, callback=None):
        self.asked += pairs
        scores = []
        for pair in pairs:
            self.tokens += 5
            scores.append(self.scores(pair))
            if callback:
                callback(1)
        return np.array(scores, np.float32)


def test_every_pair_gets_the_rankers_score_and_keeps_its_columns(engine, judgments, store):
    pairs = judgments.assign(market="fr", rank=np.arange(57, dtype=np.int16))
    assert run(engine, pairs, store) == len(pairs)
    scores = store.read()
    pd.testing.assert_frame_equal(scores[pairs.columns], pairs, check_dtype=False)
    assert scores["rank"].dtype == np.int16
    expected = engine.ranker.predict(pair_texts(pairs))
    assert scores["teacher_score"].dtype == np.float32
    assert np.allclose(scores["teacher_score"], expected, rtol=0, atol=1e-5)


def test_only_missing_shards_are_scored(engine, judgments, store, tmp_path):
    assert len(judgments) == 57
    run(engine, judgments, store)
    before = store.read()
    (tmp_path / "scores" / "part-000002.parquet").unlink()
    (tmp_path / "scores" / "part-000005.parquet").unlink()
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "scores").glob("*t")}
    assert run(engine, judgments, store) == 10 + 7
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    pd.testing.assert_frame_equal(store.read(), before)
    assert run(engine, judgments, store) == 0


def test_another_teacher_input_or_limit_is_refused(engine, student_ranker, judgments, store):
    run(engine, judgments, store)
    shorter = Ranker(engine.ranker.model, engine.ranker.collator.tokenizer)
    shorter.collator.max_length = 48
    other_title = judgments.assign(title=["changed", *judgments["title"][1:]])
    for other, pairs, shard_rows, names in (
        (engine, other_title, 10, {"input"}),
        (engine, judgments[::-1], 10, {"input"}),
        (engine, judgments[:50], 10, {"input", "pairs"}),
        (engine, judgments, 20, {"shard_rows"}),
        (RankerEngine(student_ranker, "teacher"), judgments, 10, {"weights", "templates", "tokenizer", "config"}),
        (RankerEngine(shorter, "teacher"), judgments, 10, {"max_length"}),
        (Stub(), judgments, 10, {*engine.describe()} - {"teacher", "revision", "versions"}),
    ):
        with pytest.raises(ValueError) as error:
            run(other, pairs, store, shard_rows)
        assert {re.split("[:.]", line)[0].strip() for line in str(error.value).splitlines()[1:]} == names


def test_the_manifest_distinguishes_weights(engine, judgments, store):
    run(engine, judgments, store)
    weights = store.manifest()["weights"]
    other = copy.deepcopy(engine.ranker.model)
    assert describe_model(other, other.config)["weights"] == weights
    with torch.no_grad():
        other.score.weight[0, 0] += 1e-3
    assert describe_model(other, other.config)["weights"] != weights


def changed(engine):
    """The engine after its tokenizer was told to read one word as another."""
    tokenizer = copy.deepcopy(engine.ranker.collator.tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("read", "write")
    return RankerEngine(Ranker(engine.ranker.model, tokenizer), "teacher")


def test_a_changed_tokenizer_or_config_is_another_teacher(engine, judgments, store, tmp_path):
    run(engine, judgments, store)
    (tmp_path / "scores" / "part-000002.parquet").unlink()
    for use in (
        lambda other: run(other, judgments, store),
        lambda other: verify(other, store),
    ):
        with pytest.raises(ValueError, match=r"another \w+[^\n]*\n  tokenizer: '\w{64}' there, '\w{64}' now$"):
            use(changed(engine))
    other = copy.deepcopy(engine.ranker.model)
    other.config.rms_norm_eps = 1e-3
    with pytest.raises(ValueError, match="\n  config.rms_norm_eps: default there, 0.001 now$"):
        run(RankerEngine(Ranker(other, engine.ranker.collator.tokenizer), "teacher"), judgments, store)
    assert 2 not in store.shards()


def test_a_manifest_without_config_or_tokenizer_is_refused(engine, judgments, store, tmp_path):
    run(engine, judgments, store)
    path = tmp_path / "scores" / "manifest.json"
    path.write_text(
        json.dumps({key: store.manifest()[key] for key in store.manifest().keys() - {"config", "tokenizer"}})
    )
    for use in (
        lambda: run(engine, judgments, store),
        lambda: verify(engine, store),
    ):
        with pytest.raises(ValueError, match=r"\n  config: not known there, .*\n  tokenizer: not known there, .*$"):
            use()


# Rows that cannot be scored


def test_poisoned_rows_go_to_the_quarantine_with_their_reason(judgments, store, tmp_path):
    rows = judgments.copy()
    rows.loc[3, ["title", "summary"]] = [" ", ""]
    rows.loc[14, "summary"] = "word " * 200_000
    rows.loc[40, "summary"] = "nan"
    engine = Stub(lambda pair: float("nan") if pair[1]["summary"] == "nan" else len(pair[1]["summary"]))
    assert run(engine, rows, store) == 57
    assert len(engine.asked) == 55 and store.missing() == 0
    apart = pd.read_parquet(tmp_path / "scores" / "quarantine.parquet")
    reasons = {
        judgments["doc_id"][3]: "empty document",
        judgments["doc_id"][14]: f"document of more than {MAX_CHARACTERS:,} characters",
        judgments["doc_id"][40]: "the teacher returned no finite score",
    }
    assert dict(zip(apart["doc_id"], apart["reason"], strict=True)) == reasons
    assert store.summary().quarantined == dict.fromkeys(reasons.values(), 1)
    trained = load_groups(store.path)
    assert sum(len(group["doc_ids"]) for group in trained) == 54
    assert not set(reasons) & {doc for group in trained for doc in group["doc_ids"]}


def test_a_teacher_that_scores_nothing_stops_the_run(judgments, store):
    bad = set(judgments["query"][20:30])
    engine = Stub(lambda pair: float("inf") if pair[0] in bad else 1.0)
    with pytest.raises(TableError, match=r"1 shard\(s\) failed; run again for them.\nshard 2: .* any of 10 pairs"):
        run(engine, judgments, store)
    assert 2 not in store.shards() and "no finite score" in store.failures()[2]


def test_a_few_poisoned_rows_at_the_end_do_not_keep_a_run_from_finishing(judgments, store):
    last = set(judgments["query"][53:])
    run(Stub(lambda pair: float("nan") if pair[0] in last else 1.0), judgments, store, shard_rows=9)
    assert store.missing() == 0 and store.summary().quarantined == {"the teacher returned no finite score": 4}


# Several workers


def test_workers_share_the_shards_and_any_number_of_them_can_resume(judgments, store):
    engines = [Stub() for _ in range(3)]
    done = [run(engine, judgments, store, worker=(at, 3)) for at, engine in enumerate(engines[:2])]
    assert done == [20, 20] and store.shards() == {0, 3, 1, 4}
    assert run(engines[2], judgments, store, worker=(0, 1)) == 17
    asked = [pair for engine in engines for pair in engine.asked]
    assert len(asked) == 57 and sorted(map(str, asked)) == sorted(map(str, pair_texts(judgments)))
    assert store.read()["doc_id"].tolist() == judgments["doc_id"].tolist()


def test_the_log_records_shard_and_worker(judgments, store, tmp_path):
    run(Stub(), judgments, store, worker=(1, 4))
    record = json.loads((tmp_path / "scores" / "log" / "part-000005.json").read_text())
    assert (record["shard"], record["pairs"], record["tokens"], record["worker"]) == (5, 7, 35, "1 of 4")
    assert record["ended"] >= record["started"] > time.time() - 60
    assert f"last       shard {record['shard']} by worker 1 of 4" in store.status()


# Scores that are there


def test_verify_finds_a_changed_score(engine, judgments, store, tmp_path):
    run(engine, judgments, store)
    assert verify(engine, store) < 1e-5
    path = tmp_path / "scores" / "part-000004.parquet"
    rows = pd.read_parquet(path)
    rows.loc[2, "teacher_score"] += 0.5
    store.write(4, rows)
    assert verify(engine, store) == pytest.approx(0.5, abs=1e-5)
    with pytest.raises(ValueError, match="contains the scores of another teacher.\n  config: .*\n  dtype: "):
        verify(Stub(), store)


@pytest.mark.parametrize("now", [float("nan"), float("inf")])
def test_a_pair_without_a_score_now_differs_infinitely(judgments, store, now):
    run(Stub(), judgments, store)
    assert verify(Stub(lambda pair: now), store) == float("inf")


def test_verify_ends_with_an_error_beyond_the_tolerance(engine, teacher_dir, judgments, store, restored_argv, capsys):
    run(engine, judgments, store)
    rows = store.rows(4).to_pandas()
    rows.loc[2, "teacher_score"] += 0.5
    store.write(4, rows)
    std = store.summary().std
    ask = ["score", "--model", teacher_dir, "--out", store.path, "--verify", "true"]
    with pytest.raises(SystemExit, match="other scores than this teacher computes now: --tolerance is 0.05") as end:
        main(ask)
    assert end.value.code not in (0, None)
    main([*ask, "--tolerance", str(0.51 / std)])
    told = f"Largest difference: 0.5, {0.5 / std:.2g} standard deviations of the scores.\n"
    assert capsys.readouterr().out == 2 * told


def test_a_store_without_scores_has_none_to_verify(store):
    store.open({"format": 2, **Stub().describe(), "pairs": 1, "shard_rows": 1})
    with pytest.raises(ValueError, match="scores contains no scores yet"):
        verify(Stub(), store)


# Progress


def test_a_log_file_gets_a_line_a_minute(judgments, store, monkeypatch, capsys):
    clock = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])

    def slow(pair):
        clock[0] += 20
        return 1.0

    run(Stub(slow), judgments[:10], store, shard_rows=5)
    printed = capsys.readouterr().err
    assert re.findall(r"(\d+)/10 \[", printed) == ["0", "3", "6", "9", "10"]


def test_the_bar_moves_within_a_shard_and_back_when_it_fails(judgments, store, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    bars, places = [], []

    class Bar(tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            bars.append(self)

    def score(pair):
        places.append(bars[0].n)
        return float("nan") if len(places) <= 20 else 1.0

    monkeypatch.setattr("hf_disranker.scoring.run.tqdm", Bar)
    with pytest.raises(TableError, match="shard 0: "):
        run(Stub(score), judgments[:40], store, shard_rows=20)
    assert places == [*range(20), *range(20)] and bars[0].n == 20


# Models that are no rankers


def test_no_stage_scores_with_a_model_without_a_ranking_head(tmp_path, tiny_student, judgments, restored_argv):
    tokenizer = tiny_student[1]
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    for part in (BertModel(config), tokenizer):
        part.save_pretrained(tmp_path / "bert")
    judgments.to_parquet(tmp_path / "pairs.parquet")
    model, pairs = (["--model", str(tmp_path / "bert")], str(tmp_path / "pairs.parquet"))
    for stage in (
        ["score", *model, "--pairs", pairs, "--out", str(tmp_path / "scores")],
        ["evaluate", *model, "--judgments", pairs],
    ):
        with pytest.raises(SystemExit, match=f"^disranker {stage[0]}: .*bert has no ranking head .BertModel.*distill"):
            main(stage)
    assert not (tmp_path / "scores").exists()


# Crashes


@pytest.fixture
def tables(judgments, corpus, tmp_path):
    """2,000 candidates in two files: many spellings of the queries, each with every document that shares a word."""
    queries = judgments.drop_duplicates("query_id")["query"]
    spellings = pd.DataFrame(
        {"query": [f"{query} {extra}" for query in queries for extra in queries if extra != query]}
    )
    spellings["query_id"] = spellings.index.astype(str)
    pairs = mine_candidates(spellings, judgments, top_k=16)[:2000]
    (tmp_path / "pairs").mkdir()
    pairs[:1100].to_parquet(tmp_path / "pairs" / "a.parquet", row_group_size=150)
    pairs[1100:].to_parquet(tmp_path / "pairs" / "b.parquet")
    corpus.to_parquet(tmp_path / "corpus.parquet")
    return tmp_path


def command(tables, teacher_dir, *more):
    command = [sys.executable, "-m", "hf_disranker.cli", "score", "--model", teacher_dir, "--pairs", tables / "pairs"]
    command += ["--corpus", tables / "corpus.parquet", "--shard_rows", 100, "--token_budget", 64, *more]
    return [str(part) for part in command]


@pytest.fixture
def restored_argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["disranker"])


def undisturbed(tables, teacher_dir, out):
    """The same run in this process, which has the same number of threads."""
    run = ScoringRun(
        load_engine(teacher_dir, token_budget=64),
        Candidates(tables / "pairs", tables / "corpus.parquet"),
        ScoreStore(out),
        100,
    )
    assert run.run() == 2000
    return shard_bytes(out)


def shard_bytes(out):
    return {file.name: file.read_bytes() for file in out.glob("*.parquet")}


def kill_within(seconds, more_shards, command, out):
    """Start a command and kill it, as a power cut would, some time after it has written some more shards."""
    before = len(shard_bytes(out))
    process = processes.start(main, command)
    deadline = time.monotonic() + 400
    while len(shard_bytes(out)) < before + more_shards and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(random.uniform(0, seconds))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "the run ended before it could be killed"
    return shard_bytes(out)


def test_kill_twice_and_resume_scores_every_pair_once(teacher_dir, tables, restored_argv, capsys):
    out = tables / "scores"
    score = command(tables, teacher_dir, "--out", out)[3:]
    first = kill_within(0.05, 2, score, out)
    second = kill_within(0.05, 3, score, out)
    assert 2 <= len(first) < len(second) < 20
    assert {name: second[name] for name in first} == first
    main(score)
    assert f"Scored {2000 - 100 * len(second)} of 2000 pairs" in capsys.readouterr().out

    assert shard_bytes(out) == undisturbed(tables, teacher_dir, tables / "undisturbed")
    scores = ScoreStore(out).read()
    assert len(scores) == 2000 and not scores.duplicated(["query_id", "doc_id"]).any()
    assert scores["teacher_score"].std() > 0.1


def test_processes_of_a_launcher_share_a_run(
    engine, teacher_dir, judgments, store, tmp_path, monkeypatch, restored_argv, capsys
):
    judgments.to_parquet(tmp_path / "pairs.parquet")
    ask = ["score", "--model", teacher_dir, "--pairs", str(tmp_path / "pairs.parquet"), "--out", store.path]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        main([*ask, "--shard_rows", "10"])
    assert re.findall(r"Scored (\d+) of 57 pairs", capsys.readouterr().out) == ["30", "27"]
    workers = {json.loads(file.read_text())["worker"] for file in (tmp_path / "scores" / "log").iterdir()}
    assert workers == {"0 of 2", "1 of 2"}
    run(engine, judgments, ScoreStore(tmp_path / "one"))
    assert shard_bytes(tmp_path / "scores") == shard_bytes(tmp_path / "one")


@pytest.mark.slow
def test_two_processes_of_accelerate_launch_share_a_run(teacher_dir, tables):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", "0", "--module", "hf_disranker.recipes.score"]
    out = tables / "scores"
    ended = subprocess.run(
        launch + command(tables, teacher_dir, "--out", out)[4:], capture_output=True, text=True, timeout=400
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.count("Scored 1000 of 2000 pairs") == 2
    workers = {json.loads(file.read_text())["worker"] for file in (out / "log").iterdir()}
    assert workers == {"0 of 2", "1 of 2"}
    assert shard_bytes(out) == undisturbed(tables, teacher_dir, tables / "undisturbed")


def test_a_job_array_takes_its_part(teacher_dir, tables, restored_argv):
    out = tables / "scores"
    main(command(tables, teacher_dir, "--out", out, "--num_shards", 10, "--shard_index", 3)[3:])
    assert ScoreStore(out).shards() == {3, 13}
    with pytest.raises(SystemExit, match="--shard_index 10 of --num_shards 10: they count from 0"):
        main(command(tables, teacher_dir, "--out", out, "--num_shards", 10, "--shard_index", 10)[3:])


@pytest.mark.parametrize("limit", [15_000, 100])
def test_a_full_disk_leaves_no_half_shard(engine, judgments, store, tmp_path, limit):
    """A limit on the size of files fails a write in the middle, as a full disk does."""
    wide = judgments.assign(noise=[random.Random(at).randbytes(4000 if at >= 20 else 0).hex() for at in range(57)])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError):
            run(engine, wide, store)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert not list((tmp_path / "scores").rglob("*.tmp"))
    assert store.is_store() == (limit > 100)
    if store.is_store():
        assert store.shards() == {0, 1} and "large" in store.failures()[2]
    assert run(engine, wide, store) == 57 - 10 * (2 if limit > 100 else 0)
    assert len(store.read()) == 57 and store.failures() == {}


def test_input_damaged_during_a_run_costs_only_its_shards(judgments, store, tmp_path):
    judgments.to_parquet(tmp_path / "pairs.parquet", index=False, row_group_size=10)
    candidates = Candidates(tmp_path / "pairs.parquet")
    candidates.check()
    content = (tmp_path / "pairs.parquet").read_bytes()
    footer = int.from_bytes(content[-8:-4], "little") + 8
    middle = (len(content) - footer) // 2
    (tmp_path / "pairs.parquet").write_bytes(content[: middle - 300] + bytes(600) + content[middle + 300 :])
    with pytest.raises(TableError, match=r"shard\(s\) failed; run again for them.\nshard \d: .*: cannot be read"):
        ScoringRun(Stub(), candidates, store, 10).run()
    assert 3 <= len(store.shards()) < 6 and set(store.failures()) == set(range(6)) - store.shards()
    (tmp_path / "pairs.parquet").write_bytes(content)
    ScoringRun(Stub(), Candidates(tmp_path / "pairs.parquet"), store, 10).run()
    assert store.missing() == 0 and store.failures() == {}


def test_a_truncated_input_file_is_named_before_the_model_loads(tables, restored_argv):
    path = tables / "pairs" / "b.parquet"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(SystemExit) as end:
        main(command(tables, "no/model", "--out", tables / "scores")[3:])
    assert end.value.code.startswith(f"disranker score: {path}: cannot be read as parquet: ")
    assert not (tables / "scores").exists()
