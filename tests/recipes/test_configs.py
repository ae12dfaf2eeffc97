"""Every field of the shipped configs reaches its recipe."""

import dataclasses
import importlib
import math
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from sentence_transformers.cross_encoder import losses

from hf_disranker import DistillationConfig, recipes
from hf_disranker.recipes.command_line import NAMES

CONFIGS = Path(recipes.__path__[0], "configs")
REQUIRED = {
    "cpt": ["--clicks", "clicks.parquet"],
    "fit_teacher": ["--model", "runs/cpt", "--judgments", "judgments.parquet"],
    "fit_student": ["--judgments", "judgments.parquet"],
    "score": ["--model", "runs/teacher", "--pairs", "candidates.parquet", "--out", "runs/scores"],
    "distill": ["--scores", "runs/scores"],
}


@pytest.mark.parametrize("folder", ["minilm", "paper", "zh"])
@pytest.mark.parametrize("stage", REQUIRED)
def test_every_field_of_a_config_reaches_its_recipe(folder: str, stage: str, tmp_path: Path) -> None:
    values = yaml.safe_load((CONFIGS / folder / f"{stage}.yaml").read_text())
    # A CPU refuses bf16 training; only the field matters here.
    runnable = tmp_path / "config.yaml"
    runnable.write_text(yaml.safe_dump(values | ({"use_cpu": True} if "bf16" in values else {})))
    where = [] if stage == "score" else ["--out", str(tmp_path)]
    recipe = stage.replace("student", "teacher")
    parser = importlib.import_module(f"hf_disranker.recipes.{recipe}").make_parser()

    parsed = parser.parse_args_and_config(["--config", str(runnable), *REQUIRED[stage], *where])

    found = {NAMES.get(name, name): value for part in parsed for name, value in vars(part).items()}
    assert values
    for name, value in values.items():
        same = math.isclose(found[name], value) if isinstance(value, float) else found[name] == value
        assert same, (name, found[name], value)


@pytest.mark.parametrize("path", sorted((CONFIGS / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_configs_and_each_says_when_to_use_it(path: Path) -> None:
    values, text = yaml.safe_load(path.read_text()), path.read_text()
    config = load_config_from_file(str(path))
    assert config.distributed_type == values["distributed_type"] and config.num_processes == values["num_processes"]
    assert text.startswith("# ") and "ot yet run" in text


def test_the_experiments_name_known_systems_and_options() -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "configs" / "quality.yaml"
    config = yaml.safe_load(path.read_text())
    known = {field.name for field in dataclasses.fields(DistillationConfig)}
    assert config["reference"] in config["cells"]
    for name, cell in config["cells"].items():
        assert cell["system"] in ("distill", "fit", "sentence-transformers", "transformers"), name
        assert set(cell.get("options", {})) <= known, name
        assert cell["system"] != "sentence-transformers" or hasattr(losses, cell["loss"]), name
        assert set(cell["question"]) <= set("acde"), name
