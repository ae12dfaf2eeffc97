"""The quickstart, all stages, on a documentation of a few functions and a few steps each."""

import contextlib
import dataclasses
import importlib
import io
import json
import logging
import os
import re
import subprocess
import sys
from types import SimpleNamespace
from xml.etree import ElementTree

import pandas as pd
import pytest
import yaml
from transformers import BertConfig, BertModel

from hf_disranker import cli
from hf_disranker.recipes.outputs import save_json
from hf_disranker.recipes.quickstart import from_scratch, python_docs, results, run, stages
from hf_disranker.recipes.runs import resume_point
from hf_disranker.scoring.store import ScoreStore

SIZES = "8,10,4,6"  # judged queries, unlabelled ones, their documents, development queries


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """The shipped configs with two steps instead of hundreds, by preset."""
    folder = tmp_path_factory.mktemp("configs")
    for name, preset in run.PRESETS.items():
        (folder / name).mkdir()
        for source in preset.configs.glob("*.yaml"):
            options = yaml.safe_load(source.read_text())
            short = {"max_steps": 2, "save_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 2}
            short |= {"eval_rows": 4} if source.stem == "cpt" else {}
            options |= {"token_budget": 2048} if source.stem == "score" else short
            (folder / name / source.name).write_text(yaml.safe_dump(options))
    return folder


@pytest.fixture(scope="module")
def small_data():
    """A data set of the standard library alone, with few queries."""
    build = python_docs.build
    sizes = {"train_queries": 12, "dev_queries": 10, "unlabelled_queries": 12, "top_k": 5, "packages": ()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(python_docs, "build", lambda out: build(out, **sizes))
        yield


def run_quickstart(*options):
    run.main(*run.make_parser().parse_args_and_config([*map(str, options)]))


@pytest.fixture(scope="module")
def finished(configs, small_data, tmp_path_factory):
    """A finished quickstart: its folder, the options that it ran with and what it printed."""
    folder = tmp_path_factory.mktemp("quickstart")
    options, printed = ["--out", folder, "--configs", configs / "tiny"], io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setitem(run.PRESETS, "tiny", dataclasses.replace(run.PRESETS["tiny"], sizes=SIZES))
        run_quickstart(*options)
        yield folder, options, printed.getvalue()


def recipe_of(main):
    """A recipe whose `main` gets the arguments as they were typed."""
    parser = SimpleNamespace(parse_args_and_config=lambda arguments=None: [arguments])
    return SimpleNamespace(make_parser=lambda: parser, main=main)


def stage_lines(printed):
    return [line for line in printed.split("\n") if re.match(r"\d/9 ", line)]


def test_each_stage_has_a_line_with_its_time_and_a_log(finished):
    folder, _, printed = finished
    lines = stage_lines(printed)
    names = ["data", "base", "cpt", "teacher", "scores", "student", "label_student", "click_student", "report"]
    assert [line.split()[1] for line in lines] == names
    assert all(re.search(r" +\d+ s$", line) for line in lines)
    assert "it/s]" not in printed and "train_loss" not in printed
    logs = {path.stem: path.read_text() for path in (folder / "logs").iterdir()}
    assert logs.keys() == set(names)
    assert "disranker fit_teacher --config" in logs["teacher"] and "train_loss" in logs["teacher"]
    assert "rows of judgments" in logs["data"] and "BERT, distilled" in logs["report"]
    facts = json.loads((folder / "teacher" / "finished.json").read_text())
    assert facts["threads"] == 1 and facts["seconds"] > 0 and facts["cpu_seconds"] > 0


def test_every_stage_leaves_what_the_next_one_needs(finished):
    folder, _, printed = finished
    shown = json.loads((folder / "report" / "results.json").read_text())
    assert [row["name"] for row in shown] == list(results.TITLES)
    for row in shown:
        assert {"parameters", "ndcg@5", "ndcg@10", "pnr", "pairs_per_s"} <= row.keys()
        assert (row["parameters"] is None) == (row["pairs_per_s"] is None) == (row["name"] == "bm25")
        assert 0 <= row["ndcg@10"] <= 1
    parameters = {row["name"]: row["parameters"] for row in shown}
    assert parameters["teacher"] > parameters["student"] == parameters["label_student"] == parameters["click_student"]
    store = ScoreStore(folder / "scores")
    assert store.missing() == 0 and store.manifest()["teacher"] == str(folder / "teacher")
    marker = json.loads((folder / "student" / "config.json").read_text())["disranker"]
    assert marker["teacher"]["id"] == str(folder / "teacher")
    assert "Scores of BERT, distilled against LLM teacher" in (folder / "report" / "report.html").read_text()
    picture = ElementTree.parse(folder / "report" / "results.svg").getroot()
    assert len(picture.findall(".//{*}circle")) == len(results.TITLES)
    for name in ("BM25", "LLM teacher", "BERT, distilled", "CrossEncoder", "Query:", "p = "):
        assert name in printed


def test_the_sample_is_of_the_training_side_and_of_the_sizes_asked_for(finished):
    folder = finished[0]
    corpus = pd.read_parquet(folder / "data" / "corpus.parquet").set_index("doc_id")
    names = ("labels", "clicks_and_labels", "unlabelled", "judgments")
    tables = {name: pd.read_parquet(folder / "data" / "sample" / f"{name}.parquet") for name in names}
    tables["click_log"] = pd.read_parquet(folder / "data" / "click_log.parquet")
    for name, table in tables.items():
        side = "dev" if name == "judgments" else "train"
        assert len(table) and set(corpus.loc[table["doc_id"], "split"]) == {side}
    queries = {name: table["query_id"].nunique() for name, table in tables.items()}
    assert (queries["labels"], queries["unlabelled"], queries["judgments"]) == (8, 10, 6)
    assert tables["unlabelled"].groupby("query_id").size().max() == 4
    assert "label" not in tables["unlabelled"]
    # The teacher has the judgments of the baseline and no others.
    whole = pd.read_parquet(folder / "data" / "labels.parquet")
    seen = set(tables["clicks_and_labels"]["query_id"])
    assert seen & set(whole["query_id"]) == set(tables["labels"]["query_id"]) < seen


def test_a_second_run_prints_the_results_without_torch_and_children_inherit_passive_waiting(finished):
    """In a process of its own: whether torch is imported cannot be seen in this one."""
    folder, options, printed = finished
    code = f"""
import dataclasses, subprocess, sys
from hf_disranker import cli
from hf_disranker.recipes.outputs import save_json
from hf_disranker.recipes.quickstart import run
run.PRESETS["tiny"] = dataclasses.replace(run.PRESETS["tiny"], sizes="{SIZES}")
cli.main({["quickstart", *map(str, options)]!r})
print("torch" in sys.modules, "pandas" in sys.modules, flush=True)
subprocess.run([sys.executable, "-c", "import os; print(os.environ['OMP_WAIT_POLICY'])"], check=True)
"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert (folder / "report" / "results.txt").read_text() in shown.stdout
    assert "All stages are finished" in shown.stdout and not stage_lines(shown.stdout)
    assert shown.stdout.split("\n")[-3:] == ["False False", "PASSIVE", ""]


def test_a_wait_policy_of_the_user_stays(monkeypatch):
    seen = []
    recipe = recipe_of(lambda _: seen.append(os.environ["OMP_WAIT_POLICY"]))
    monkeypatch.setattr(cli, "load_stage", lambda stage: recipe)
    monkeypatch.setattr(sys, "argv", ["disranker"])
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    cli.main(["score"])
    assert seen == ["ACTIVE"]


def test_the_benchmark_shows_machine_times_and_tables(finished, tmp_path, monkeypatch, capsys):
    benchmark = importlib.import_module("quickstart")  # pytest has benchmarks/ on its path
    (tmp_path / "3").symlink_to(finished[0])
    machine = {"cpu": "A chip", "cores": 2, "torch": "2.13 AVX2", "busy": True, "seconds": 77.2}
    save_json(machine, str(tmp_path / "3" / "machine.json"))
    monkeypatch.setattr(sys, "argv", ["quickstart", "--seeds", "3", "--out", str(tmp_path)])
    benchmark.main()
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "results.md").read_text()
    assert printed.startswith("A chip, 2 cores, one kept busy, torch 2.13 AVX2\n")
    for stage in run.STAGES:
        assert re.search(rf"^\| {stage.name} \| \d+ \(\d+\), 1 \|$", printed, flags=re.M)
    assert re.search(r"^\| the whole command \| 77 \(\d+\) \|$", printed, flags=re.M)
    assert "| BERT, distilled | BERT, labels alone | " in printed and "| LLM teacher | 0." in printed


def test_a_stage_that_did_not_finish_runs_again_with_those_that_read_it(finished, capsys):
    folder, options, _ = finished
    models = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.safetensors")}
    (folder / "student" / "finished.json").unlink()
    run_quickstart(*options)
    lines = stage_lines(capsys.readouterr().out)
    assert [line.split()[1] for line in lines if not line.endswith(" done")] == ["student", "report"]
    changed = [path.parent.name for path, time in models.items() if path.stat().st_mtime_ns != time]
    assert changed == ["student"]


def test_scores_of_another_teacher_are_not_kept(tmp_path):
    (tmp_path / "scores").mkdir()
    for number in range(2):
        teacher = f"teacher of run {number}"

        def work(teacher=teacher):
            ScoreStore(tmp_path / "scores").open({"teacher": teacher, "pairs": 1, "shard_rows": 1})

        stages._run_once(tmp_path / "scores", {"recipe": "score", "after": teacher}, work)
    assert ScoreStore(tmp_path / "scores").manifest()["teacher"] == "teacher of run 1"


def test_a_failed_stage_names_its_log(finished, monkeypatch, capsys):
    folder, options, _ = finished
    work = type("Work", (), {"run_stage": staticmethod(lambda out, stage: 1 / 0)})
    monkeypatch.setattr(run.importlib, "import_module", lambda name: work)
    before = (folder / "report" / "finished.json").read_text()
    (folder / "report" / "finished.json").unlink()
    with pytest.raises(ZeroDivisionError):
        run_quickstart(*options)
    assert stage_lines(capsys.readouterr().out)[-1].endswith(f"stopped, see {folder}/logs/report.log")
    (folder / "report" / "finished.json").write_text(before)


def test_output_of_a_stage_goes_to_its_log_and_what_follows_does_not(tmp_path, capsys):
    logger, handler = logging.getLogger("quickstart.test"), logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    with run.output_to(tmp_path / "logs" / "a.log"):
        print("printed")
        logger.warning("logged")
        late = logging.StreamHandler()  # of a library that the stage imports
        logger.addHandler(late)
    logger.removeHandler(late)
    assert late.stream is sys.stderr
    logger.warning("afterwards")
    logger.removeHandler(handler)
    assert (tmp_path / "logs" / "a.log").read_text() == "printed\nlogged\n"
    assert capsys.readouterr().err == "afterwards\n"


@pytest.mark.parametrize(("seconds", "chosen"), [({1: 1.0, 2: 0.7}, 2), ({1: 1.0, 2: 0.9}, 1), ({1: 1.0, 2: 50.0}, 1)])
def test_threads_are_used_where_a_step_is_clearly_faster_with_them(monkeypatch, seconds, chosen):
    threads = []
    monkeypatch.setattr(stages.torch, "set_num_threads", threads.append)
    monkeypatch.setattr(stages.timeit, "repeat", lambda step, number, repeat: [seconds[threads[-1]]] * repeat)
    assert stages.choose_threads(2) == chosen
    assert threads == [1, 2] and stages.choose_threads(1) == 1


def test_a_folder_with_models_of_another_origin_is_refused(tmp_path):
    (tmp_path / "student" / "checkpoint-5").mkdir(parents=True)
    with pytest.raises(ValueError, match="student exists and was not created by a quickstart"):
        run_quickstart("--out", tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["student", "checkpoint-5"]


def test_the_hub_preset_takes_checkpoints_through_the_same_stages(configs, small_data, tmp_path, capsys):
    texts = ["read a json file", "plot a histogram", "sort a dict by value"] * 10
    tokens = from_scratch.train_bpe(texts, vocab_size=400, max_length=256)
    from_scratch.small_llama(tokens, layers=1, size=64).save_pretrained(tmp_path / "llama")
    tokens.save_pretrained(tmp_path / "llama")
    tokens = from_scratch.train_wordpiece(texts, vocab_size=200, max_length=256)
    encoder = BertModel(BertConfig(vocab_size=len(tokens), hidden_size=64, num_hidden_layers=1, num_attention_heads=1))
    encoder.save_pretrained(tmp_path / "bert")
    tokens.save_pretrained(tmp_path / "bert")
    where = ["--out", tmp_path / "run", "--preset", "hub", "--configs", configs / "hub"]
    run_quickstart(*where, "--decoder", tmp_path / "llama", "--bert", tmp_path / "bert")
    assert "BERT, distilled" in capsys.readouterr().out
    assert not (tmp_path / "run" / "base").exists()
    for name, start in (("student", "bert"), ("teacher", "llama")):
        config = json.loads((tmp_path / "run" / name / "config.json").read_text())
        assert config["vocab_size"] == json.loads((tmp_path / start / "config.json").read_text())["vocab_size"]


def test_the_hub_preset_names_real_checkpoints_and_a_config_for_every_stage():
    tiny, hub = (preset.configs for preset in run.PRESETS.values())
    assert {path.name for path in tiny.glob("*.yaml")} == {path.name for path in hub.glob("*.yaml")}
    assert run.PRESETS["hub"].decoder and run.PRESETS["hub"].bert


@pytest.mark.parametrize("config", sorted(run.CONFIGS.glob("quickstart*/*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_configs_hold_known_options(config):
    recipe = config.stem if config.stem in ("cpt", "score", "distill") else "fit_teacher"
    parser = importlib.import_module(f"hf_disranker.recipes.{recipe}").make_parser()
    known = {action.dest for action in parser._actions}
    assert set(yaml.safe_load(config.read_text())) <= known


def test_a_stage_runs_again_when_its_arguments_or_its_config_change(tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(stages.importlib, "import_module", lambda name: recipe_of(seen.append))
    config = tmp_path / "a.yaml"
    config.write_text("x: 1")
    stage = ["--config", str(config)]
    for arguments, passing in ((stage, ["--bf16"]), (stage, []), ([*stage, "--y"], []), ([*stage, "--y"], [])):
        stages.run_recipe(tmp_path / "stage", "score", arguments, passing)
    config.write_text("x: 2")
    stages.run_recipe(tmp_path / "stage", "score", [*stage, "--y"], [])
    assert seen == [[*stage, "--bf16"], [*stage, "--y"], [*stage, "--y"]]
    assert capsys.readouterr().out.count("already finished, skipped") == 2


def test_a_stage_resumes_its_own_checkpoints_and_no_others(tmp_path, monkeypatch):
    config = tmp_path / "a.yaml"
    config.write_text("learning_rate: 1")
    found = []

    def main(arguments):
        found.append(resume_point(str(tmp_path / "stage")) is not None)
        save_json({"global_step": 1}, str(tmp_path / "stage" / "checkpoint-1" / "trainer_state.json"))
        if len(found) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(stages.importlib, "import_module", lambda name: recipe_of(main))
    stage = [tmp_path / "stage", "distill", ["--config", str(config)], []]
    with pytest.raises(KeyboardInterrupt):
        stages.run_recipe(*stage)
    stages.run_recipe(*stage)  # the same options: goes on
    config.write_text("learning_rate: 2")
    stages.run_recipe(*stage)  # others: begins again
    assert found == [False, True, False]


def test_fast_precision_asks_for_bf16_only_where_it_is_faster(monkeypatch):
    for seconds, options in (({"float32": 9.0, "bfloat16": 2.0}, True), ({"float32": 3.0, "bfloat16": 2.5}, False)):
        monkeypatch.setattr(
            stages.timeit,
            "repeat",
            lambda code, globals, number, repeat, seconds=seconds: [seconds[str(globals["matrix"].dtype)[6:]]],
        )
        monkeypatch.setattr(stages.torch.accelerator, "is_available", lambda: False)
        assert (stages.fast_precision()[:2] == ["--bf16", "true"]) is options


def test_clicked_documents_are_label_1_and_other_candidates_0():
    rows = [("1", "red", "d1"), ("0", "car", "d1"), ("0", "car", "007"), ("0", "car", "d2")]
    candidates = pd.DataFrame(rows, columns=["query_id", "query", "doc_id"]).assign(title="", summary="text")
    clicks = candidates.iloc[[3]]
    clicks = pd.concat([clicks, clicks.assign(doc_id="d9"), clicks.assign(query_id="unseen")])
    judged = stages.click_judgments(clicks, candidates)
    assert judged[["query_id", "doc_id", "label"]].to_numpy().tolist() == [
        ["0", "007", 0],
        ["0", "d1", 0],
        ["0", "d2", 1],
        ["0", "d9", 1],
    ]
