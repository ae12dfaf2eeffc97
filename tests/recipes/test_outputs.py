"""No command overwrites a file that it did not make."""

import importlib
import json

import pytest

from hf_disranker.recipes import export
from hf_disranker.recipes.outputs import check_output
from hf_disranker.recipes.runs import check_output_dir
from hf_disranker.training.distillation import DistillationConfig
from hf_disranker.training.ranking_trainer import RankingConfig


def test_a_file_is_replaced_only_by_the_stage_that_wrote_it(tmp_path):
    mine = tmp_path / "mine.txt"
    check_output(tmp_path / "new" / "mine.txt", lambda _: False)  # nothing is there, and the folder is made
    assert (tmp_path / "new").is_dir()
    mine.write_text("made")
    check_output(mine, lambda path: path.read_text() == "made", ["org/model", str(tmp_path / "other"), None])
    with pytest.raises(ValueError, match="mine.txt exists and was not written by this command"):
        check_output(mine, lambda path: path.read_text() == "other")
    (tmp_path / "link.txt").symlink_to(mine)
    with pytest.raises(ValueError, match="mine.txt is read by this command"):
        check_output(mine, lambda _: True, [str(tmp_path / "link.txt")])
    with pytest.raises(ValueError, match="is a folder"):
        check_output(tmp_path, lambda _: True)
    with pytest.raises(OSError):
        check_output(mine / "below.txt", lambda _: True)


def test_training_resumes_only_in_its_own_folder(tmp_path):
    ranking, distillation = (kind(str(tmp_path / "out"), use_cpu=True) for kind in (RankingConfig, DistillationConfig))
    check_output_dir(ranking, "org/model")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.md").write_text("what I tried")
    check_output_dir(ranking, "org/model")
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="files that this command did not write, such as config.json"):
        check_output_dir(ranking, "org/model")
    (tmp_path / "out" / "run.json").write_text(json.dumps({"options": {"RankingConfig": {}}}))
    check_output_dir(ranking, "org/model")
    with pytest.raises(ValueError, match="files that this command did not write"):  # another stage's
        check_output_dir(distillation, "org/model")
    (tmp_path / "out" / "checkpoint-5").mkdir()
    for model in ("out", "out/checkpoint-5"):
        with pytest.raises(ValueError, match="is read by this command"):
            check_output_dir(ranking, str(tmp_path / model))
    (tmp_path / "out" / "checkpoint-5" / "trainer_state.json").write_text("{}")
    (tmp_path / "out" / "run.json").unlink()
    check_output_dir(ranking, "org/model")  # a run that was cut off


@pytest.mark.parametrize("recipe", ["cpt", "fit_teacher", "distill"])
def test_every_training_recipe_checks_its_output_folder_first(recipe, tmp_path, judgments, clicks):
    judgments.assign(teacher_score=1.0).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    sources = {"cpt": "--clicks", "fit_teacher": "--judgments", "distill": "--scores"}
    arguments = ["--model", "org/model", sources[recipe], tmp_path / "rows.parquet", "--out", tmp_path / "model"]
    module = importlib.import_module(f"hf_disranker.recipes.{recipe}")
    with pytest.raises(ValueError, match="such as config.json: choose another folder"):
        module.main(*module.make_parser().parse_args_and_config([*map(str, arguments), "--use_cpu", "true"]))


def test_an_export_leaves_other_folders_alone(student_dir, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    for folder, words in ((tmp_path, "such as README.md"), (student_dir, "is read by this command")):
        with pytest.raises(ValueError, match=words):
            export.main(export.ExportArguments(student_dir, str(folder), "cross-encoder"))
    assert (tmp_path / "README.md").read_text() == "mine"
