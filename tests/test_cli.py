"""The command line, as a user meets it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from hf_disranker import cli
from hf_disranker.recipes.quickstart.from_scratch import small_llama
from hf_disranker.scoring.store import ScoreStore


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
def test_every_stage_has_a_help(run, stage):
    assert run(stage, "--help").startswith(f"usage: disranker {stage} [--config FILE.yaml]")


def test_a_stage_may_be_spelled_with_a_dash(run):
    assert run("fit-teacher", "-h").startswith("usage: disranker fit_teacher")


def test_unknown_stage_error_lists_the_known_stages(run):
    with pytest.raises(SystemExit) as end:
        run("destill")
    assert end.value.code == f"disranker: there is no stage 'destill'; there are: {', '.join(cli.STAGES)}."


def test_a_missing_table_is_a_one_line_error(tmp_path):
    command = [sys.executable, "-m", "hf_disranker.cli", "score", "--model", "m", "--out", str(tmp_path / "scores")]
    ended = subprocess.run([*command, "--pairs", "no/pairs.parquet"], capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 1
    assert ended.stderr.splitlines() == ["disranker score: no/pairs.parquet: no such file or folder."]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["--judgments", "{tmp}/bad.csv"], ["--config", "{tmp}/missing.yaml"]])
def test_bad_input_is_a_one_line_error(run, tmp_path, arguments):
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


def test_score_and_evaluate_import_only_what_they_need(tmp_path, teacher_dir, student_dir, judgments):
    judgments.to_parquet(tmp_path / "judgments.parquet")
    code = f"""
import sys
from transformers import AutoModel  # imports scikit-learn in 5.19
before = set(sys.modules)
from hf_disranker import cli
table = {str(tmp_path / "judgments.parquet")!r}
cli.main(["score", "--model", {teacher_dir!r}, "--pairs", table, "--out", {str(tmp_path / "scores")!r}])
cli.main(["evaluate", "--model", {student_dir!r}, "--judgments", table])
assert not {{"trl", "sklearn", "sentence_transformers"}} & (sys.modules.keys() - before)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr


def test_a_missing_package_is_named_with_its_extra(run, monkeypatch):
    def main(_):
        raise ImportError("Using `bitsandbytes` 4-bit quantization requires bitsandbytes.\nSee the manual.")

    monkeypatch.setattr("hf_disranker.recipes.compare.main", main)
    with pytest.raises(SystemExit) as end:
        run("compare", "--runs", "eval")
    assert end.value.code.endswith("requires bitsandbytes. Or: pip install hf-disranker[qlora]")


def test_tables_under_other_names_go_through_the_stages(run, tmp_path, judgments, teacher_dir):
    names = {"query": "search_term", "title": "product_name", "label": "grade", "split": "fold"}
    judgments.rename(columns=names).to_csv(tmp_path / "export.csv", index=False)
    columns = ["--columns", ",".join(f"{ours}={theirs}" for ours, theirs in names.items())]
    run("score", "--model", teacher_dir, "--pairs", tmp_path / "export.csv", "--out", tmp_path / "scores", *columns)
    where = ["--judgments", tmp_path / "export.csv", *columns]
    printed = run("evaluate", "--scores", tmp_path / "scores", *where, "--out", tmp_path / "eval" / "teacher.json")
    assert f"{'documents':>26} {(judgments['split'] == 'dev').sum():12d}" in printed
    assert run("report", tmp_path / "eval", "--out", tmp_path / "report.html")
    for wrong, message in (
        ("query=search", "export.csv: no column 'search' to read as 'query'; it has: query_id, search_term"),
        ("query", "--columns is OURS=YOURS,OURS=YOURS with each of ours once, got 'query'."),
        ("query=a,query=b", "with each of ours once"),
    ):
        with pytest.raises(SystemExit) as end:
            run("evaluate", "--bm25", "--judgments", tmp_path / "export.csv", "--columns", wrong)
        assert message in end.value.code


def test_training_stages_say_what_matters_and_end_with_a_card(tmp_path, tiny_teacher, judgments, clicks):
    tokenizer = tiny_teacher[1]
    torch.manual_seed(0)
    small_llama(tokenizer, layers=1, size=32).save_pretrained(tmp_path / "decoder")
    tokenizer.save_pretrained(tmp_path / "decoder")
    judgments.to_parquet(tmp_path / "judgments.parquet")
    clicks.to_parquet(tmp_path / "clicks.parquet")
    code = """
import runpy, sys
from hf_disranker import cli
short = "--max_steps 2 --max_length 48 --use_cpu true --report_to none --gradient_checkpointing".split()
sys.argv = ["cpt.py", "--model", "decoder", "--clicks", "clicks.parquet", "--out", "cpt", *short]
runpy.run_module("hf_disranker.recipes.cpt", run_name="__main__")  # as `accelerate launch -m` does
cli.main(["fit_teacher", "--model", "cpt", "--judgments", "judgments.parquet", "--out", "teacher", *short])
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    for noise in ("LOAD REPORT", "Loading weights", "Writing model shards", "examples/s", "FutureWarning"):
        assert noise not in ended.stderr, ended.stderr
    lines = [line for line in ended.stderr.splitlines() if "it/s]" not in line and line.strip()]
    assert "cpt: training on 12 clicks, 0 of them truncated to 48 tokens." in lines
    assert "Model saved to cpt. Next: disranker fit_teacher --model cpt --judgments TABLE --out FOLDER" in lines
    assert "fit_teacher: training on 8 queries with 37 documents, evaluating on 4 queries with 20 documents." in lines
    assert lines[-2].startswith("Evaluation: ndcg@10 0.")
    assert lines[-1] == "Model saved to teacher. Next: disranker score --model teacher --pairs TABLE --out FOLDER"
    for folder, words in (("cpt", "Data: 12 clicks"), ("teacher", 'Ranker.from_pretrained("teacher")')):
        card = (tmp_path / folder / "README.md").read_text()
        assert words in card and "None" not in card.split("##")[0]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_evaluate_overwrites_only_its_own_files(run, tmp_path, judgments):
    judgments.to_parquet(tmp_path / "judgments.parquet")
    rows = judgments.assign(teacher_score=judgments["label"] * 1.0)
    lines = [f"{row.query_id} Q0 {row.doc_id} 1 {row.teacher_score} x" for row in rows.itertuples()]
    (tmp_path / "bm25.run").write_text("\n".join(lines))
    (tmp_path / "notes.json").write_text('{"name": "mine"}')
    before = files(tmp_path)
    where = ["evaluate", "--run", tmp_path / "bm25.run", "--judgments", tmp_path / "judgments.parquet"]
    for name in ("bm25.json", "judgments.json", "bm25.json"):  # the third time over its own
        run(*where, "--out", tmp_path / name)
    after = files(tmp_path)
    assert {name: after[name] for name in before} == before
    made = {"bm25.json", "judgments.json"}
    assert after.keys() - before.keys() == {name + end for name in made for end in ("", ".run", ".parquet")}

    (tmp_path / "theirs.json.run").write_text("a run of mine")
    before = files(tmp_path)
    for name in ("notes.json", "judgments.parquet", "bm25.run", "theirs.json"):
        with pytest.raises(SystemExit, match="choose another output"):
            run(*where, "--out", tmp_path / name)
    again = ["evaluate", "--run", tmp_path / "bm25.json.run", *where[3:]]
    with pytest.raises(SystemExit, match="is read by this command"):
        run(*again, "--out", tmp_path / "bm25.json")
    for stage in ("compare", "report"):
        for name in ("notes.json", "bm25.json", "judgments.parquet"):
            with pytest.raises(SystemExit, match="choose another output"):
                run(stage, tmp_path / "bm25.json", tmp_path / "judgments.json", "--out", tmp_path / name)
    assert files(tmp_path) == before


def test_compare_and_report_replace_only_their_own_files(run, evaluated):
    for stage, name in (("compare", "comparison.json"), ("report", "page.html")):
        for _ in range(2):  # the second time with the json of the first in the folder
            assert run(stage, evaluated, "--out", evaluated / name)
    with pytest.raises(SystemExit, match="was not written by `disranker evaluate --out`"):
        run("compare", evaluated / "comparison.json")
    (evaluated / "ours.json.run").unlink()
    with pytest.raises(SystemExit, match="ours.json.run: no such file"):
        run("compare", evaluated)


def test_names_with_a_dot_do_not_share_files(run, tmp_path, judgments):
    judgments.to_parquet(tmp_path / "judgments.parquet")
    for name, sign in (("lr_0.1", 1.0), ("lr_0.2", -1.0)):
        judgments.assign(teacher_score=sign * judgments["label"]).to_parquet(tmp_path / "scores.parquet")
        where = ["--judgments", tmp_path / "judgments.parquet", "--name", name, "--out", tmp_path / name]
        run("evaluate", "--scores", tmp_path / "scores.parquet", *where)
    run("compare", tmp_path / "lr_0.1", tmp_path / "lr_0.2", "--out", tmp_path / "comparison.json")
    (one,) = json.loads((tmp_path / "comparison.json").read_text())
    assert one["difference"] < -0.1 and one["changed"]["1"] == 1.0


def test_impossible_evaluations_are_refused_before_scoring(run, tmp_path, judgments, corpus, monkeypatch):
    monkeypatch.setattr("hf_disranker.recipes.evaluate.load_local", lambda *_: pytest.fail("a model was loaded"))
    blanks = judgments.assign(query_id=judgments["query"])
    steep = judgments.assign(label=judgments["label"].where(judgments.index != judgments.index[-1], 2000))
    for name, table in {"judgments": judgments, "blanks": blanks, "steep": steep, "corpus": corpus}.items():
        table.to_parquet(tmp_path / f"{name}.parquet")
    (tmp_path / "expected.yaml").write_text("ndcg@10: high")
    (tmp_path / "first.run").write_text("q0 Q0 d5-1 1 3.0 x\n")
    first = ["--candidates", tmp_path / "first.run", "--corpus", tmp_path / "corpus.parquet"]
    for table, options, words in (
        ("blanks", ["--out", tmp_path / "eval.json"], "column 'query_id'"),
        ("steep", [], "labels up to 1000"),
        ("judgments", ["--measures", "AP", "nDGC@10"], "ir_measures knows no such measure"),
        ("judgments", ["--measures", "alpha_nDCG@10"], "ir_measures cannot compute alpha_nDCG@10"),
        ("judgments", ["--by", "market"], "no column 'market'"),
        ("judgments", ["--max_over", "page"], "no column 'page'"),
        ("judgments", ["--expect", tmp_path / "missing.yaml"], "missing.yaml"),
        ("judgments", ["--expect", tmp_path / "expected.yaml"], "expected.yaml: ndcg@10 is 'high', not a number"),
        ("judgments", ["--out", tmp_path], "is a folder"),
        ("judgments", ["--out", tmp_path / "expected.yaml" / "eval.json"], "expected.yaml"),
        ("judgments", first, "No judged"),
    ):
        where = ["--judgments", tmp_path / f"{table}.parquet", "--split", ""]
        with pytest.raises(SystemExit) as end:
            run("evaluate", "--model", "org/model", *where, *options)
        assert words in end.value.code and "\n" not in end.value.code
    assert not (tmp_path / "eval.json").exists()


def test_judgments_without_splits_need_no_split_option(run, tmp_path, judgments):
    judgments.drop(columns="split").to_csv(tmp_path / "judgments.csv", index=False)
    assert len(judgments[judgments["split"] == "dev"]) < len(judgments)
    judgments.to_csv(tmp_path / "split.csv", index=False)
    for name, chosen, wanted in (
        ("judgments", [], judgments),
        ("split", [], judgments[judgments["split"] == "dev"]),
        ("split", ["--split", ""], judgments),
    ):
        printed = run("evaluate", "--bm25", "--judgments", tmp_path / f"{name}.csv", *chosen)
        assert f"{'documents':>26} {len(wanted):12d}" in printed
    with pytest.raises(SystemExit, match="no column 'split' to take 'dev' from"):
        run("evaluate", "--bm25", "--judgments", tmp_path / "judgments.csv", "--split", "dev")


def test_one_ranking_is_evaluated_at_a_time(run, tmp_path, judgments):
    judgments.to_parquet(tmp_path / "judgments.parquet")
    for chosen in ([], ["--bm25", "--scores", "scores"]):
        with pytest.raises(SystemExit, match="disranker evaluate: name one of --model, --run, --scores and --bm25"):
            run("evaluate", "--judgments", tmp_path / "judgments.parquet", *chosen)


@pytest.fixture
def evaluated(run, tmp_path, judgments, student_dir):
    """BM25 and a student, evaluated on the dev queries."""
    judgments.to_parquet(tmp_path / "judgments.parquet")
    where = ["--judgments", tmp_path / "judgments.parquet"]
    run("evaluate", "--bm25", *where, "--out", tmp_path / "eval" / "bm25.json")
    printed = run(
        "evaluate", "--model", student_dir, *where, "--name", "ours", "--out", tmp_path / "eval" / "ours.json"
    )
    assert "pair_accuracy" in printed
    return tmp_path / "eval"


def test_any_cross_encoder_can_be_evaluated(run, tmp_path, evaluated, student_dir):
    config = json.loads((Path(student_dir) / "config.json").read_text())
    shutil.copytree(student_dir, tmp_path / "foreign")
    foreign = {name: value for name, value in config.items() if name != "disranker"} | {"model_type": "bert"}
    (tmp_path / "foreign" / "config.json").write_text(json.dumps(foreign))
    out = tmp_path / "foreign.json"
    run("evaluate", "--model", tmp_path / "foreign", "--judgments", tmp_path / "judgments.parquet", "--out", out)
    ours = json.loads((evaluated / "ours.json").read_text())
    found = json.loads(out.read_text())
    assert found["name"] == "foreign" and found["ndcg@10"] == pytest.approx(ours["ndcg@10"])
    assert ours["about"]["parameters"] > 1000 and ours["about"]["pairs_per_s"] > 0


def test_evaluated_rankers_are_compared_and_reported(run, tmp_path, evaluated):
    printed = run("compare", evaluated / "bm25.json", evaluated / "ours.json", "--out", tmp_path / "comparison.json")
    assert "b - a" in printed and "No difference is called significant: 4 queries are fewer than 200" in printed
    (one,) = json.loads((tmp_path / "comparison.json").read_text())
    assert (one["first"], one["second"], one["queries"], set(one["changed"])) == ("ours", "bm25", 4, {"1", "5", "10"})
    assert "report.html" in run("report", evaluated, "--out", tmp_path / "report.html")
    assert run("report", evaluated, "--out", tmp_path / "ids.html", "--no_texts")
    query = pd.read_parquet(tmp_path / "judgments.parquet").query("split == 'dev'")["query"].iloc[0]
    assert query in (tmp_path / "report.html").read_text() and query not in (tmp_path / "ids.html").read_text()


def test_a_trec_run_of_a_model_gives_the_measures_of_the_model(run, tmp_path, evaluated):
    where = ["--judgments", tmp_path / "judgments.parquet", "--out", tmp_path / "run.json"]
    run("evaluate", "--run", evaluated / "ours.json.run", *where)
    ours, again = (json.loads(path.read_text()) for path in (evaluated / "ours.json", tmp_path / "run.json"))
    numbers = {name for name, value in ours.items() if isinstance(value, float | int)}
    assert {name: again[name] for name in numbers} == {name: ours[name] for name in numbers}


def test_a_model_ranks_the_candidates_of_a_first_stage(run, tmp_path, evaluated, judgments, corpus, student_dir):
    # The first stage found two documents of q8, one of them judged.
    corpus.to_parquet(tmp_path / "corpus.parquet")
    query = judgments.query("split == 'dev'")["query_id"].iloc[0]
    judged = judgments.query("query_id == @query")["doc_id"].iloc[0]
    (tmp_path / "first.run").write_text(f"{query} Q0 {judged} 1 2.0 x\n{query} Q0 d0-0 2 1.0 x\n")
    options = ["--candidates", tmp_path / "first.run", "--corpus", tmp_path / "corpus.parquet"]
    where = ["--judgments", tmp_path / "judgments.parquet", "--out", tmp_path / "again.json"]
    run("evaluate", "--model", student_dir, *where, *options)
    assert json.loads((tmp_path / "again.json").read_text())["unjudged"] == 1
    assert len((tmp_path / "again.json.run").read_text().splitlines()) == 2


def test_expected_measures_are_checked(run, tmp_path, evaluated):
    ours = json.loads((evaluated / "ours.json").read_text())
    where = ["evaluate", "--run", evaluated / "ours.json.run", "--judgments", tmp_path / "judgments.parquet"]
    expected = tmp_path / "expected.yaml"
    expected.write_text(f"tolerance: 0.02\nndcg@10: {ours['ndcg@10'] * 1.015}\n")
    run(*where, "--expect", expected)
    expected.write_text(f"ndcg@10: {ours['ndcg@10'] * 1.015}\nmrr: {ours['mrr']}\nndgc@5: 0.5\n")
    with pytest.raises(SystemExit) as end:
        run(*where, "--expect", expected)
    head, ndcg, unknown = end.value.code.splitlines()
    exact = tmp_path / "exact.yaml"
    exact.write_text(f"tolerance: 0\nndcg@10: {ours['ndcg@10'] * 1.001}\n")
    with pytest.raises(SystemExit, match="1 measure"):
        run(*where, "--expect", exact)
    assert head == f"{expected}: 2 measure(s) differ."
    assert ndcg.startswith("  ndcg@10: expected ") and "found None" in unknown


def test_passages_are_measured_and_reported_as_documents(run, tmp_path, judgments):
    # Two passages of every document, the second one always worse.
    rows = judgments[judgments["split"] == "dev"].assign(page=judgments["doc_id"])
    second = rows.assign(doc_id=rows["doc_id"] + "-2", label=0)
    pd.concat([rows, second]).to_parquet(tmp_path / "passages.parquet")
    scores = pd.concat([rows.assign(teacher_score=rows["label"] * 1.0), second.assign(teacher_score=-1.0)])
    scores.drop(columns="label").to_parquet(tmp_path / "scores.parquet")
    inputs = ["--judgments", tmp_path / "passages.parquet", "--scores", tmp_path / "scores.parquet"]
    run("evaluate", *inputs, "--max_over", "page", "--by", "query_words", "--out", tmp_path / "eval" / "pages.json")
    measures = json.loads((tmp_path / "eval" / "pages.json").read_text())
    assert (measures["documents"], measures["pnr"], measures["ndcg@10"]) == (len(rows), None, 1.0)
    assert measures["slices"]["2"]["queries"] == 4
    run("report", tmp_path / "eval", "--out", tmp_path / "report.html")
    assert "Slices in grey" in (tmp_path / "report.html").read_text()


def test_judgments_with_only_relevant_documents_require_candidates(run, tmp_path, judgments, caplog):
    judgments[judgments["label"] > 0].to_parquet(tmp_path / "positives.parquet")
    run("evaluate", "--bm25", "--judgments", tmp_path / "positives.parquet")
    assert "name --candidates" in caplog.text
