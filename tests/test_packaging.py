"""What is shipped: the wheel, how fast it starts, what its docstrings claim, and no calls that are about to go."""

import configparser
import doctest
import importlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import warnings
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import hf_disranker

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "hf_disranker"
WITH_EXAMPLES = sorted(
    "hf_disranker." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if "\n        >>> " in path.read_text()
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("src", "recipes"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    code = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True)
    return next((folder / "dist").glob("*.whl"))


def test_the_wheel_contains_every_file_of_package_and_recipes(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"hf_disranker/{path.relative_to(PACKAGE)}" for path in PACKAGE.rglob("*") if _is_shipped(path)}
    recipes = ROOT / "recipes"
    expected |= {
        f"hf_disranker/recipes/{path.relative_to(recipes)}" for path in recipes.rglob("*") if _is_shipped(path)
    }
    assert len(expected) > 80 and expected <= names


def _is_shipped(path):
    return path.is_file() and path.suffix != ".pyc"


def test_the_wheel_contains_everything_that_is_imported(wheel, tmp_path):
    """Unpacked far from the repository, with the dependencies of this environment."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import hf_disranker as h; [getattr(h, name) for name in h.__all__]\n"
    code += "from hf_disranker.cli import STAGES, load_stage\n"
    code += "print(h.__file__, *(load_stage(stage).__file__ for stage in STAGES), sep='\\n')"
    clean = os.environ | {"PYTHONPATH": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=clean, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    files = ended.stdout.split()
    assert len(files) > 8 and all(file.startswith(str(tmp_path)) for file in files), files


@pytest.mark.slow
def test_the_wheel_works_in_a_separate_environment(wheel, tmp_path, judgments):
    """Installs the wheel with all it needs, as `pip install` would, and uses it far from the repository."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    bin, constraints = tmp_path / "venv" / "bin", ROOT / "constraints-cpu.txt"
    install = [bin / "python", "-m", "pip", "install", "--quiet", "--constraint", constraints, wheel]
    subprocess.run(install, check=True, capture_output=True)
    judgments.to_csv(tmp_path / "judgments.csv", index=False)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [bin / "disranker", "evaluate", "--bm25", "--judgments", "judgments.csv"]
    ended = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "ndcg@10" in ended.stdout
    code = "import hf_disranker as h; [getattr(h, name) for name in h.__all__]; print(h.__file__)"
    ended = subprocess.run([bin / "python", "-c", code], cwd=tmp_path, env=clean, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert str(tmp_path) in ended.stdout


def fastest(command, tries=5):
    """Seconds that a process takes at best: other work on the machine can only add to them."""
    times = []
    for _ in range(tries):
        begin = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - begin)
    return min(times)


def test_the_import_is_light():
    code = "import sys, time; t = time.perf_counter(); import hf_disranker; print(time.perf_counter() - t); "
    code += "print(*sys.modules)"
    printed = [
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.splitlines()
        for _ in range(5)
    ]
    assert min(float(seconds) for seconds, _ in printed) < 0.2
    assert not {"torch", "transformers", "datasets", "pandas", "numpy"} & set(printed[0][1].split())


def test_the_help_of_the_command_is_quick():
    assert fastest([Path(sys.executable).parent / "disranker", "--help"]) < 1.0


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples_in_docstrings(module):
    results = doctest.testmod(importlib.import_module(module))
    assert results.failed == 0


def test_some_docstrings_have_examples():
    names = {module.rsplit(".", 1)[1] for module in WITH_EXAMPLES}
    assert {"losses", "teacher", "templates"} <= names


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])
def test_a_deprecated_call_of_ours_fails_the_tests(category):
    with pytest.raises(category):
        warnings.warn_explicit("about to go", category, "data.py", 1, module="hf_disranker.data.tables")
    warnings.warn_explicit("about to go", category, "theirs.py", 1, module="transformers.trainer")


def test_the_citation_names_this_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == hf_disranker.__version__


@pytest.mark.parametrize("file", [".pre-commit-config.yaml", *ROOT.glob(".github/**/*.yml")], ids=str)
def test_forms_are_yaml(file):
    assert yaml.safe_load((ROOT / file).read_text())


def test_the_sdist_contains_tests_and_docs(tmp_path):
    folder = tmp_path / "copy"
    ignored = shutil.ignore_patterns(
        ".git", ".venv*", "runs", "build", "dist", "*.egg-info", "__pycache__", ".*_cache"
    )
    shutil.copytree(ROOT, folder, ignore=ignored)
    code = "from setuptools.build_meta import build_sdist; build_sdist('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True)
    with tarfile.open(next((folder / "dist").glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("src", "recipes", "tests", "docs", "metrics", "benchmarks", ".github")
    expected = {str(path.relative_to(folder)) for name in folders for path in (folder / name).rglob("*")}
    expected -= {name for name in expected if ".egg-info" in name}
    assert expected | {"Makefile", "CHANGELOG.md", "LICENSE", "constraints-lowest.txt", "mkdocs.yml"} <= names


def workflow_jobs(name):
    return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text())["jobs"].values()


WORKFLOWS = [path.name for path in ROOT.glob(".github/workflows/*.yml")]


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_workflows_call_make_targets(workflow):
    """The commands are those that a developer types, so that a red run can be repeated."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    for job in workflow_jobs(workflow):
        choices = job.get("strategy", {}).get("matrix", {}).get("target", [])
        for step in (step["run"] for step in job["steps"] if "run" in step):
            program, *words = step.replace("${{ matrix.target }}", " ".join(choices)).split()
            called = {word for word in words if re.fullmatch("[a-z-]+", word)}
            assert program == "make" and called and called <= targets, step


def test_the_claimed_pythons_are_those_of_the_workflow():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    claimed = re.findall(r"Python :: (3\.\d+)", setup["metadata"]["classifiers"])
    matrices = [job["strategy"]["matrix"] for job in workflow_jobs("ci.yml")]
    assert claimed == [version for matrix in matrices for version in matrix.get("python", ())]


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_actions_are_pinned_by_major_version(workflow):
    used = [step["uses"] for job in workflow_jobs(workflow) for step in job["steps"] if "uses" in step]
    assert used and all(re.fullmatch(r"[\w-]+/[\w-]+@(release/)?v\d+", action) for action in used)


def test_the_lowest_constraints_are_the_lower_bounds():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    lowest = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    for line in setup["options"]["install_requires"].split():
        requirement = Requirement(line)
        for bound in requirement.specifier:
            assert bound.operator == ">=", f"{line}: no upper pins"
            tested, claimed = Version(lowest[requirement.name]), Version(bound.version)
            assert tested >= claimed and tested.release[: len(claimed.release)] == claimed.release, line
