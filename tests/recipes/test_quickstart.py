"""The quickstart, all stages, on a documentation of a few functions and a few steps each."""

import importlib
import json
from xml.etree import ElementTree

import pandas as pd
import pytest
import yaml
from transformers import BertConfig, BertModel

from hf_disranker.recipes.quickstart import from_scratch, python_docs, results
from hf_disranker.scoring.store import ScoreStore
from hf_disranker.training.runs import resume_point, save_json

quickstart = importlib.import_module("hf_disranker.recipes.quickstart.stages")


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """The shipped configs with two steps instead of hundreds, by preset."""
    folder = tmp_path_factory.mktemp("configs")
    for name, preset in quickstart.PRESETS.items():
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
    quickstart.main(*quickstart.make_parser().parse_args_and_config([*map(str, options)]))


@pytest.fixture
def run(configs, small_data, tmp_path):
    def run():
        run_quickstart("--out", tmp_path, "--configs", configs / "tiny")
        return tmp_path

    return run


def test_every_stage_leaves_what_the_next_one_needs(run, capsys):
    folder = run()
    printed = capsys.readouterr().out
    shown = json.loads((folder / "report" / "results.json").read_text())
    assert [row["name"] for row in shown] == list(results.TITLES)
    for row in shown:
        assert {"parameters", "ndcg@5", "ndcg@10", "pnr", "pairs_per_s"} <= row.keys()
        assert (row["parameters"] is None) == (row["pairs_per_s"] is None) == (row["name"] == "bm25")
        assert 0 <= row["ndcg@10"] <= 1
    parameters = {row["name"]: row["parameters"] for row in shown}
    assert parameters["teacher"] > parameters["student"] == parameters["label_student"] == parameters["click_student"]
    assert parameters["teachers"] == parameters["teacher"] + parameters["teacher_no_cpt"]
    both = [folder / "teacher", folder / "teacher_no_cpt"]
    for teacher, scores in zip(both, ("scores", "scores_no_cpt"), strict=True):
        store = ScoreStore(folder / scores)
        assert store.missing() == 0 and store.manifest()["teacher"] == str(teacher)
    marker = json.loads((folder / "student" / "config.json").read_text())["disranker"]
    assert marker["teacher"] == {"id": f"{both[0]} + {both[1]}", "revision": None}
    assert (
        "Scores of BERT, distilled against mean of both teachers, rescaled"
        in (folder / "report" / "report.html").read_text()
    )
    picture = ElementTree.parse(folder / "report" / "results.svg").getroot()
    assert len(picture.findall(".//{*}circle")) == len(results.TITLES)
    assert all(
        name in printed
        for name in ("BM25", "LLM teacher", "mean of both", "BERT, distilled", "CrossEncoder", "Query:", "p = ")
    )

    # Nothing that a ranker learns from is of the development side, and what is called unlabelled tells no click.
    corpus = pd.read_parquet(folder / "data" / "corpus.parquet").set_index("doc_id")
    tables = {
        name: pd.read_parquet(folder / "data" / f"{name}.parquet")
        for name in ("click_log", "labels", "clicks_and_labels", "unlabelled")
    }
    for table in tables.values():
        assert len(table) and set(corpus.loc[table["doc_id"], "split"]) == {"train"}
    assert "label" not in tables["unlabelled"]
    assert set(tables["labels"]["query_id"]) < set(tables["clicks_and_labels"]["query_id"])

    changed = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    run()
    assert capsys.readouterr().out.count("already finished, skipped") == 8
    assert changed == {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}

    # A stage that did not finish runs again, alone; what it had done counts.
    (folder / "student" / "finished.json").unlink()
    run()
    assert capsys.readouterr().out.count("already finished, skipped") == 7


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
    tiny, hub = (preset.configs for preset in quickstart.PRESETS.values())
    assert {path.name for path in tiny.glob("*.yaml")} == {path.name for path in hub.glob("*.yaml")}
    assert quickstart.PRESETS["hub"].decoder and quickstart.PRESETS["hub"].bert


@pytest.mark.parametrize("config", sorted(quickstart.CONFIGS.glob("quickstart*/*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_configs_hold_known_options(config):
    recipe = config.stem if config.stem in ("cpt", "score", "distill") else "fit_teacher"
    parser = importlib.import_module(f"hf_disranker.recipes.{recipe}").make_parser()
    known = {action.dest for action in parser._actions}
    assert set(yaml.safe_load(config.read_text())) <= known


def test_a_stage_runs_again_when_its_arguments_or_its_config_change(tmp_path, monkeypatch, capsys):
    seen = []

    class Recipe:
        @staticmethod
        def make_parser():
            return Recipe

        @staticmethod
        def parse_args_and_config(arguments):
            return [arguments]

        main = seen.append

    monkeypatch.setattr(quickstart.importlib, "import_module", lambda name: Recipe)
    config = tmp_path / "a.yaml"
    config.write_text("x: 1")
    stage = ["--config", str(config)]
    for arguments, passing in ((stage, ["--bf16"]), (stage, []), ([*stage, "--y"], []), ([*stage, "--y"], [])):
        quickstart.run_recipe(tmp_path / "stage", "score", arguments, passing)
    config.write_text("x: 2")
    quickstart.run_recipe(tmp_path / "stage", "score", [*stage, "--y"], [])
    assert seen == [[*stage, "--bf16"], [*stage, "--y"], [*stage, "--y"]]
    assert capsys.readouterr().out.count("already finished, skipped") == 2


def test_a_stage_resumes_its_own_checkpoints_and_no_others(tmp_path, monkeypatch):
    config = tmp_path / "a.yaml"
    config.write_text("learning_rate: 1")
    found = []

    class Recipe:
        @staticmethod
        def make_parser():
            return Recipe

        @staticmethod
        def parse_args_and_config(arguments):
            return [arguments]

        @staticmethod
        def main(arguments):
            found.append(resume_point(str(tmp_path / "stage")) is not None)
            save_json({"global_step": 1}, str(tmp_path / "stage" / "checkpoint-1" / "trainer_state.json"))
            if len(found) == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(quickstart.importlib, "import_module", lambda name: Recipe)
    stage = [tmp_path / "stage", "distill", ["--config", str(config)], []]
    with pytest.raises(KeyboardInterrupt):
        quickstart.run_recipe(*stage)
    quickstart.run_recipe(*stage)  # the same options: goes on
    config.write_text("learning_rate: 2")
    quickstart.run_recipe(*stage)  # others: begins again
    assert found == [False, True, False]


def test_fast_precision_asks_for_bf16_only_where_it_is_faster(monkeypatch):
    for seconds, options in (({"float32": 9.0, "bfloat16": 2.0}, True), ({"float32": 3.0, "bfloat16": 2.5}, False)):
        monkeypatch.setattr(
            quickstart.timeit,
            "repeat",
            lambda code, globals, number, repeat, seconds=seconds: [seconds[str(globals["matrix"].dtype)[6:]]],
        )
        monkeypatch.setattr(quickstart.torch.accelerator, "is_available", lambda: False)
        assert (quickstart.fast_precision()[:2] == ["--bf16", "true"]) is options
