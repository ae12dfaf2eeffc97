"""`disranker abtest` and `disranker interleave`, as a user meets them, on simulated logs."""

import importlib
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hf_disranker import cli

simulator = importlib.import_module("hf_disranker.recipes.simulator")
KEYS = ["name", "control", "treatment", "relative_difference", "interval", "p", "p_holm"]
NAMES = ["page_ctr", "user_ctr", "clicks_per_page", "dwell"]


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run `disranker` in a folder of its own; gives what it printed."""
    monkeypatch.setattr(sys, "argv", ["disranker"])
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        cli.main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return run


def grades(share, seed=0):
    values = np.random.default_rng(seed).choice(3, size=(20, 10), p=share)
    return pd.DataFrame(values, index=[f"q{number}" for number in range(20)])


RANKINGS = {"old": grades([0.8, 0.15, 0.05]), "new": grades([0.4, 0.3, 0.3])}


@pytest.fixture
def log(tmp_path):
    rows = simulator.ab_log(RANKINGS, 3000)
    rows.to_parquet(tmp_path / "log.parquet")
    return rows


def test_a_log_is_analysed_from_end_to_end(run, log):
    options = ["--slices", "device", "--covariates", "clicks_before", "--out", "runs/abtest.json"]
    printed = run("abtest", "log.parquet", "--control", "old", *options)
    assert "Significant at 5% after Holm: page_ctr of new, user_ctr of new, clicks_per_page of new, dwell" in printed
    assert (
        "device = phone: old " in printed and "page_ctr of new: " in printed and "page_ctr         +0.47%: " in printed
    )
    found = json.loads(Path("runs/abtest.json").read_text())
    assert [list(one) for one in found["measures"]] == [KEYS] * 4
    assert [one["name"] for one in found["measures"]] == NAMES
    old, new = (simulator.true_measures(one) for one in RANKINGS.values())
    for one in found["measures"]:
        low, high = one["interval"]
        assert low < one["relative_difference"] < high
        assert one["relative_difference"] == pytest.approx(new[one["name"]] / old[one["name"]] - 1, abs=high - low)
    assert found["users"]["old"] + found["users"]["new"] == 3000 and found["refusal"] is None
    assert 0.05 < found["cuped"]["variance_reduction"]["page_ctr of new"] < 0.5
    assert len(found["days"]) == 14 and len(found["trends"]) == 4 and len(found["cuped"]["without"]) == 4
    parts = {one["value"]: one["users"] for one in found["slices"]["device"]}
    assert sum(part["old"] for part in parts.values()) == found["users"]["old"]
    run("abtest", "log.parquet", "--control", "old", *options)  # its own file may be replaced


def test_a_log_with_other_names_is_read_by_columns(run, log):
    expected = run("abtest", "log.parquet", "--control", "old")
    log.rename(columns={"user_id": "visitor", "clicked": "opened"}).to_csv("theirs.csv", index=False)
    with pytest.raises(SystemExit, match="If yours have other names: --columns user_id=YOURS,clicked=YOURS"):
        run("abtest", "theirs.csv", "--control", "old")
    assert run("abtest", "theirs.csv", "--control", "old", "--columns", "user_id=visitor,clicked=opened") == expected


def test_several_treatments_are_each_compared_with_the_control(run):
    simulator.ab_log(RANKINGS | {"same": RANKINGS["old"]}, 3000).to_csv("log.csv", index=False)
    run("abtest", "log.csv", "--control", "old", "--out", "abtest.json")
    found = json.loads(Path("abtest.json").read_text())["measures"]
    assert [(one["name"], one["bucket"]) for one in found] == [(name, b) for name in NAMES for b in ("new", "same")]
    assert all((one["p_holm"] < 0.05) == (one["bucket"] == "new") for one in found)


def test_a_sample_ratio_mismatch_ends_without_a_conclusion(run, log, capsys):
    lost = log[(log["bucket"] == "old") | ~log["user_id"].str[-1].isin(["3", "7"])]
    lost.to_parquet("lost.parquet")
    with pytest.raises(SystemExit, match="Nothing is concluded: users are not split as intended") as end:
        run("abtest", "lost.parquet", "--control", "old", "--out", "abtest.json")
    assert isinstance(end.value.code, str)  # so the exit code is 1
    assert "page_ctr" not in capsys.readouterr().out
    found = json.loads(Path("abtest.json").read_text())
    assert found["measures"] == [] and "p = " in found["refusal"]
    shares = [f"{name}={count}" for name, count in lost.groupby("bucket")["user_id"].nunique().items()]
    assert "sample ratio     p = 1.0000" in run("abtest", "lost.parquet", "--control", "old", "--shares", *shares)


@pytest.mark.parametrize("share", ["old", "old=half", "old=-1", "bm25=0.5"])
def test_invalid_shares_are_a_one_line_error(run, log, share):
    with pytest.raises(SystemExit, match="BUCKET=SHARE|a share above 0 for each of the buckets old, new"):
        run("abtest", "log.parquet", "--control", "old", "--shares", share)


def test_few_users_end_without_a_conclusion(run):
    simulator.ab_log(RANKINGS, 300).to_parquet("few.parquet")
    with pytest.raises(SystemExit, match="Nothing is concluded: a bucket has fewer than 200 users"):
        run("abtest", "few.parquet", "--control", "old")


@pytest.mark.parametrize(
    ("buckets", "control", "message"),
    [
        ({"old": "old", "new": "new"}, "bm25", "The buckets are new, old: an A/B test needs the control 'bm25'"),
        ({"old": "old", "new": "old"}, "old", "The buckets are old: an A/B test needs the control 'old' and another"),
    ],
)
def test_invalid_buckets_are_a_one_line_error(run, log, buckets, control, message):
    log.assign(bucket=log["bucket"].map(buckets)).to_parquet("log.parquet")
    with pytest.raises(SystemExit, match=message):
        run("abtest", "log.parquet", "--control", control)


def test_mixed_users_are_refused_or_left_out_by_name(run, log):
    log.loc[log["user_id"] == "u5", "bucket"] = "old"
    log = pd.concat([log, log[log["user_id"] == "u5"].assign(bucket="new")])
    log.to_parquet("log.parquet")
    with pytest.raises(SystemExit, match=r"1 user\(s\) are in several buckets. First: 'u5'"):
        run("abtest", "log.parquet", "--control", "old")
    printed = run("abtest", "log.parquet", "--control", "old", "--exclude_mixed_users", "true")
    assert "1 users in several buckets left out" in printed


@pytest.mark.parametrize("content", ["my notes", '{"made_by": "me"}', "[]"])
def test_foreign_files_are_not_overwritten(run, log, content):
    Path("notes.json").write_text(content)
    with pytest.raises(SystemExit, match="notes.json exists and was not written by this command"):
        run("abtest", "log.parquet", "--control", "old", "--out", "notes.json")
    assert Path("notes.json").read_text() == content


def test_the_report_shows_an_ab_test(run, log, judgments):
    judgments.to_parquet("judgments.parquet")
    run("evaluate", "--bm25", "--judgments", "judgments.parquet", "--out", "eval/bm25.json")
    run("abtest", "log.parquet", "--control", "old", "--out", "abtest.json")
    run("report", "eval", "--abtest", "abtest.json", "--out", "report.html")
    assert "clicks_per_page" in Path("report.html").read_text()
    with pytest.raises(SystemExit, match=r"bm25.json was not written by `disranker abtest --out`"):
        run("report", "eval", "--abtest", "eval/bm25.json", "--out", "report.html")


@pytest.fixture
def rankings(judgments, tmp_path):
    """BM25's place is taken by a run that ranks backwards; the other one is perfect."""
    judgments.to_parquet(tmp_path / "judgments.parquet")
    for name, sign in (("bad", -1), ("good", 1)):
        rows = judgments.assign(score=sign * judgments["label"]).sort_values("score", ascending=False, kind="stable")
        lines = (f"{row.query_id} Q0 {row.doc_id} 1 {row.score} {name}\n" for row in rows.itertuples())
        (tmp_path / f"{name}.run").write_text("".join(lines))


def test_interleaved_lists_are_written_and_their_clicks_evaluated(run, rankings):
    made = run("interleave", "--a", "bad.run", "--b", "good.run", "--out", "lists.parquet", "--depth", "4")
    assert made == "lists.parquet: 12 queries, 16 lists of up to 4 documents each\n"
    lists = pd.read_parquet("lists.parquet")
    simulator.interleaved_log(lists, "judgments.parquet", users=400, split="").to_parquet("clicks.parquet")
    result = run("interleave", "--lists", "lists.parquet", "--log", "clicks.parquet", "--out", "result.json")
    found = json.loads(Path("result.json").read_text())
    assert found["users"] == 400 and found["difference"] > 0 and found["p"] < 0.001 and found["interval"][0] > 0
    assert f"400 users, {found['pages']:,} pages: a wins {found['first_wins']:,}" in result
    pd.read_parquet("clicks.parquet").rename(columns={"user_id": "visitor", "doc_id": "url"}).to_csv("theirs.csv")
    options = ["--lists", "lists.parquet", "--log", "theirs.csv", "--columns", "user_id=visitor,doc_id=url"]
    assert run("interleave", *options) == result


def test_interleave_refuses_foreign_files_and_incomplete_options(run, rankings):
    lists = ["--a", "bad.run", "--b", "good.run", "--out"]
    with pytest.raises(SystemExit, match="was not written by this command"):
        run("interleave", *lists, "judgments.parquet")
    run("interleave", *lists, "lists.parquet")
    run("interleave", *lists, "lists.parquet")
    for options in ([], ["--a", "bad.run"], ["--lists", "lists.parquet"], ["--a", "bad.run", "--b", "good.run"]):
        with pytest.raises(SystemExit, match="Name --a, --b and --out to make lists, or --lists and --log"):
            run("interleave", *options)
    with pytest.raises(SystemExit, match="--columns names the columns of --log"):
        run("interleave", *lists, "lists.parquet", "--columns", "doc_id=url")
    with pytest.raises(SystemExit, match="judgments.parquet: not lists of `disranker interleave`"):
        run("interleave", "--lists", "judgments.parquet", "--log", "judgments.parquet")


@pytest.mark.slow
def test_two_million_rows_take_seconds_and_little_memory(tmp_path):
    rows = simulator.ab_log(RANKINGS, 50_000, documents=True)
    rows.to_parquet(tmp_path / "log.parquet")
    assert len(rows) > 1_900_000
    begin = time.perf_counter()
    command = ["-m", "hf_disranker.cli", "abtest", "log.parquet", "--control", "old", "--slices", "device"]
    subprocess.run([sys.executable, *command], cwd=tmp_path, check=True, capture_output=True)
    seconds, peak = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"{len(rows):,} rows: {seconds:.1f} s, {peak:,.0f} MiB")
    assert seconds < 60 and peak < 1500
