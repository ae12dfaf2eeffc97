"""The configs that the recipes come with are read by their recipes, field by field."""

import importlib
import math
from pathlib import Path

import pytest
import yaml

from hf_disranker import recipes

CONFIGS = Path(recipes.__path__[0], "configs")
REQUIRED = {
    "cpt": ["--clicks", "clicks.parquet"],
    "fit_teacher": ["--model_name_or_path", "runs/cpt", "--judgments", "judgments.parquet"],
    "score": ["--model", "runs/teacher", "--pairs", "candidates.parquet", "--out", "runs/scores"],
    "distill": ["--scores", "runs/scores"],
}


@pytest.mark.parametrize("folder", ["minilm", "paper", "zh"])
@pytest.mark.parametrize("stage", REQUIRED)
def test_every_field_of_a_config_reaches_its_recipe(folder: str, stage: str, tmp_path: Path) -> None:
    values = yaml.safe_load((CONFIGS / folder / f"{stage}.yaml").read_text())
    # A CPU refuses bf16 training; that the field exists is what counts here.
    runnable = tmp_path / "config.yaml"
    runnable.write_text(yaml.safe_dump(values | ({"use_cpu": True} if "bf16" in values else {})))
    where = [] if stage == "score" else ["--output_dir", str(tmp_path)]
    parser = importlib.import_module(f"hf_disranker.recipes.{stage}").make_parser()

    parsed = parser.parse_args_and_config(["--config", str(runnable), *REQUIRED[stage], *where])

    found = {name: value for part in parsed for name, value in vars(part).items()}
    assert values
    for name, value in values.items():
        same = math.isclose(found[name], value) if isinstance(value, float) else found[name] == value
        assert same, (name, found[name], value)
