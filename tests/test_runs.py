"""What the recipes share."""

import json

import pytest

from hf_disranker import runs
from hf_disranker.runs import fast_precision, resume_point, run_recipe, save_json


def test_resume_point_is_the_newest_checkpoint(tmp_path, caplog):
    assert resume_point(str(tmp_path / "nowhere")) is None
    assert resume_point(str(tmp_path)) is None
    for step in (2, 10, 9):
        save_json({"global_step": step}, str(tmp_path / f"checkpoint-{step}" / "trainer_state.json"))
    assert resume_point(str(tmp_path)) == str(tmp_path / "checkpoint-10")
    assert "Resuming from" in caplog.text


def test_resume_point_passes_over_a_checkpoint_that_was_cut_off(tmp_path, caplog):
    save_json({"global_step": 5}, str(tmp_path / "checkpoint-5" / "trainer_state.json"))
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-15").mkdir()
    (tmp_path / "checkpoint-15" / "trainer_state.json").write_text('{"global_step": 1')
    assert resume_point(str(tmp_path)) == str(tmp_path / "checkpoint-5")
    assert "checkpoint-10 is half written" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-5"]


def test_save_json_leaves_the_old_file_when_the_new_cannot_be_written(tmp_path):
    path = tmp_path / "new" / "result.json"
    save_json({"a": "ä"}, str(path))
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "ä"}
    with pytest.raises(TypeError):
        save_json({"a": object()}, str(path))
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "ä"}


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

    monkeypatch.setattr(runs.importlib, "import_module", lambda name: Recipe)
    config = tmp_path / "a.yaml"
    config.write_text("x: 1")
    stage = ["--config", str(config)]
    for arguments, passing in ((stage, ["--bf16"]), (stage, []), ([*stage, "--y"], []), ([*stage, "--y"], [])):
        run_recipe(tmp_path / "stage", "score", arguments, passing)
    config.write_text("x: 2")
    run_recipe(tmp_path / "stage", "score", [*stage, "--y"], [])
    assert seen == [[*stage, "--bf16"], [*stage, "--y"], [*stage, "--y"]]
    assert capsys.readouterr().out.count("finished before, skipped") == 2


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

    monkeypatch.setattr(runs.importlib, "import_module", lambda name: Recipe)
    stage = [tmp_path / "stage", "distill", ["--config", str(config)], []]
    with pytest.raises(KeyboardInterrupt):
        run_recipe(*stage)
    run_recipe(*stage)  # the same options: goes on
    config.write_text("learning_rate: 2")
    run_recipe(*stage)  # others: begins again
    assert found == [False, True, False]


def test_fast_precision_asks_for_bf16_only_where_it_is_faster(monkeypatch):
    for seconds, options in (({"float32": 9.0, "bfloat16": 2.0}, True), ({"float32": 3.0, "bfloat16": 2.5}, False)):
        monkeypatch.setattr(
            runs.timeit,
            "repeat",
            lambda code, globals, number, repeat, seconds=seconds: [seconds[str(globals["matrix"].dtype)[6:]]],
        )
        monkeypatch.setattr(runs.torch.accelerator, "is_available", lambda: False)
        assert (fast_precision()[:2] == ["--bf16", "true"]) is options
