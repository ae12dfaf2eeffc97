"""The command line, as a user meets it."""

import json
import subprocess
import sys

import pytest

from hf_disranker import cli
from hf_disranker.store import ScoreStore


@pytest.fixture
def run(monkeypatch, capsys):
    """Run `disranker` with arguments in this process; gives what it printed."""
    monkeypatch.setattr(sys, "argv", ["disranker"])

    def run(*arguments):
        cli.main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_the_stages(run, arguments):
    printed = run(*arguments)
    for stage, what in cli.STAGES.items():
        assert f"  {stage:<12} {what}" in printed


@pytest.mark.parametrize("stage", cli.STAGES)
def test_every_stage_has_a_help(run, capsys, stage):
    with pytest.raises(SystemExit) as end:
        run(stage, "--help")
    assert end.value.code == 0
    assert f"usage: disranker {stage} [--config FILE.yaml]" in capsys.readouterr().out


def test_an_unknown_stage_is_refused_with_those_that_there_are(run):
    with pytest.raises(SystemExit) as end:
        run("destill")
    assert end.value.code == f"disranker: there is no stage 'destill'; there are: {', '.join(cli.STAGES)}."


def test_a_missing_table_ends_in_one_plain_line(tmp_path):
    command = [sys.executable, "-m", "hf_disranker.cli", "score", "--model", "m", "--out", str(tmp_path / "scores")]
    ended = subprocess.run([*command, "--pairs", "no/pairs.parquet"], capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 1
    assert ended.stderr.splitlines() == ["disranker score: no/pairs.parquet: no such file or folder."]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["--judgments", "{tmp}/bad.csv"], ["--config", "{tmp}/missing.yaml"]])
def test_bad_input_ends_in_one_plain_line(run, tmp_path, arguments):
    (tmp_path / "bad.csv").write_text("query_id,query,doc_id,title,summary,label\n1,red,a,A,one,good\n")
    with pytest.raises(SystemExit) as end:
        run("evaluate", "--bm25", *(argument.format(tmp=tmp_path) for argument in arguments))
    assert end.value.code.startswith("disranker evaluate: ") and "\n" not in end.value.code
    assert "bad.csv: column 'label'" in end.value.code or "missing.yaml" in end.value.code


def test_the_command_line_wins_over_the_config_file(run, tmp_path, teacher_dir, candidates, corpus):
    candidates.to_csv(tmp_path / "candidates.csv", index=False)
    corpus.to_json(tmp_path / "corpus.jsonl", orient="records", lines=True)
    (tmp_path / "score.yaml").write_text(
        f"model: {teacher_dir}\npairs: {tmp_path}/candidates.csv\ncorpus: {tmp_path}/corpus.jsonl\n"
        f"out: {tmp_path}/scores\nshard_rows: 7\ntoken_budget: 128\n"
    )
    printed = run("score", "--config", tmp_path / "score.yaml", "--shard_rows", 20)
    assert f"Scored {len(candidates)} of {len(candidates)} pairs into {tmp_path}/scores; 0 documents and 0" in printed
    manifest = ScoreStore(tmp_path / "scores").manifest()
    assert (manifest["shard_rows"], manifest["teacher"]) == (20, teacher_dir)


def test_scores_of_any_origin_can_be_evaluated(run, tmp_path, judgments):
    judgments.to_csv(tmp_path / "judgments.csv", index=False)
    judgments.assign(teacher_score=judgments["label"] / 2).to_parquet(tmp_path / "scores.parquet")
    inputs = ["--judgments", tmp_path / "judgments.csv", "--scores", tmp_path / "scores.parquet"]
    printed = run("evaluate", *inputs, "--split", "dev", "--out", tmp_path / "new" / "eval.json")
    measures = json.loads((tmp_path / "new" / "eval.json").read_text())
    assert measures["ndcg@10"] == 1.0 and measures["pnr"] is None
    assert "ndcg@10       1.0000  [1.0000, 1.0000]" in printed


def test_one_ranking_is_evaluated_at_a_time(run, tmp_path, judgments):
    judgments.to_parquet(tmp_path / "judgments.parquet")
    for chosen in ([], ["--bm25", "--scores", "scores"]):
        with pytest.raises(SystemExit, match="Name one of --model, --scores and --bm25"):
            run("evaluate", "--judgments", tmp_path / "judgments.parquet", *chosen)
