"""The quickstart, all stages, on a documentation of a few functions and a few steps each."""

import importlib
import json

import pytest
import yaml

from hf_disranker import python_docs
from hf_disranker.store import ScoreStore

quickstart = importlib.import_module("hf_disranker.recipes.quickstart")

RANKERS = ["bm25", "label_student", "click_student", "teacher_no_cpt", "teacher", "student"]


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """The shipped configs with two steps instead of hundreds."""
    folder = tmp_path_factory.mktemp("configs")
    for source in quickstart.CONFIGS.glob("*.yaml"):
        options = yaml.safe_load(source.read_text())
        short = {"max_steps": 2, "save_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 2}
        short |= {"eval_rows": 4} if source.stem == "cpt" else {}
        options |= {"token_budget": 2048} if source.stem == "score" else short
        (folder / source.name).write_text(yaml.safe_dump(options))
    return folder


@pytest.fixture(scope="module")
def run(configs, tmp_path_factory):
    """Run the quickstart into a folder, with a data set of the standard library alone and few queries."""
    folder = tmp_path_factory.mktemp("quickstart")
    patch = pytest.MonkeyPatch()
    build = python_docs.build
    patch.setattr(
        python_docs,
        "build",
        lambda out: build(out, train_queries=12, dev_queries=10, unlabelled_queries=12, top_k=5, packages=()),
    )
    parser = quickstart.make_parser()

    def run():
        quickstart.main(*parser.parse_args_and_config(["--out", str(folder), "--configs", str(configs)]))
        return folder

    yield run
    patch.undo()


def test_every_stage_leaves_what_the_next_one_needs(run, capsys):
    folder = run()
    printed = capsys.readouterr().out
    results = json.loads((folder / "report" / "results.json").read_text())
    assert [row["name"] for row in results] == RANKERS
    for row in results:
        assert {"parameters", "ndcg@5", "ndcg@10", "pnr", "pairs_per_s"} <= row.keys()
        assert (row["parameters"] is None) == (row["pairs_per_s"] is None) == (row["name"] == "bm25")
        assert 0 <= row["ndcg@10"] <= 1
    teacher, student = results[4]["parameters"], results[5]["parameters"]
    assert teacher > student == results[1]["parameters"] == results[2]["parameters"]
    store = ScoreStore(folder / "scores")
    assert store.missing() == 0 and store.manifest()["teacher"] == str(folder / "teacher")
    marker = json.loads((folder / "student" / "config.json").read_text())["disranker"]
    assert marker["teacher"] == {"id": str(folder / "teacher"), "revision": None}
    assert all(
        name in printed for name in ("BM25", "LLM teacher", "BERT, distilled", "CrossEncoder", "Query:", "p = ")
    )

    changed = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    run()
    assert capsys.readouterr().out.count("finished before, skipped") == 10
    assert changed == {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}

    # A stage that did not finish runs again, alone; what it had done counts.
    (folder / "student" / "finished.json").unlink()
    run()
    assert capsys.readouterr().out.count("finished before, skipped") == 9


@pytest.mark.parametrize("config", sorted(quickstart.CONFIGS.parent.glob("*/*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_configs_hold_known_options(config):
    recipe = config.stem if config.stem in ("cpt", "score", "distill") else "fit_teacher"
    parser = importlib.import_module(f"hf_disranker.recipes.{recipe}").make_parser()
    known = {action.dest for action in parser._actions}
    assert set(yaml.safe_load(config.read_text())) <= known
