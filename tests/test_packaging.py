"""The wheel holds what is no Python."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_wheel_brings_templates_and_configs(tmp_path):
    pytest.importorskip("setuptools")
    for name in ("src", "recipes"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    code = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    names = set(zipfile.ZipFile(next((tmp_path / "dist").glob("*.whl"))).namelist())
    expected = {f"hf_disranker/templates/{path.name}" for path in (ROOT / "src/hf_disranker/templates").iterdir()}
    configs = ROOT / "recipes" / "configs"
    expected |= {f"hf_disranker/recipes/configs/{path.relative_to(configs)}" for path in configs.glob("*/*.yaml")}
    assert len(expected) > 10 and expected <= names
