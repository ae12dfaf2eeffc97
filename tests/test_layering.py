"""Imports go one way: a module imports only what stands above it in this list."""

import ast
import re
from pathlib import Path

import pytest

import hf_disranker

PACKAGE = Path(hf_disranker.__file__).parent
GROUPS = {
    "leaves": ["version", "schema", "texts", "pair_ranker", "metrics", "losses"],
    "data": [
        "files",
        "beir",
        "outputs",
        "data",
        "mining",
        "readers",
        "impressions",
        "candidates",
        "python_docs",
        "packing",
        "pooling",
        "collators",
        "batching",
        "sampling",
    ],
    "models": ["checkpoint", "card", "hub", "student", "teacher", "from_scratch", "auto", "ranker"],
    "judging": ["significance", "evaluation", "rankings", "online", "hub_data"],
    "stages": [
        "runs",
        "arguments",
        "trainer_setup",
        "evaluation_loss",
        "cpt",
        "guards",
        "ranking_trainer",
        "summary",
        "store",
        "combine",
        "provenance",
        "heads",
        "engines",
        "scoring",
        "cluster",
    ]
    + ["distillation", "cross_encoder"],
    "shipping": ["charts", "report", "runtime", "export", "demo", "cli"],
}
ORDER = [module for group in GROUPS.values() for module in group]
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def imports(source):
    """What a source imports, at the top, in functions and for types alike: (module, name) pairs."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, ["hf_disranker" if node.level else "", node.module]))
            yield from ((module, alias.name) for alias in node.names)


def own_modules(source):
    """The modules of the package that a source imports; names of the package itself count as `__init__`."""
    for module, name in imports(source):
        package, *path = module.split(".")
        if package in ("hf_disranker", "recipes"):
            yield path[0] if path else name if name in MODULES or name == "recipes" else "__init__"


def violations(module, source):
    allowed = ORDER[: ORDER.index(module)]
    return [imported for imported in own_modules(source) if imported not in allowed]


def source_of(module):
    return (PACKAGE / f"{module}.py").read_text(encoding="utf-8")


def test_the_list_knows_every_module():
    assert set(MODULES) <= set(ORDER)


def test_the_map_in_contributing_names_every_module():
    page = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\w+", page.split("## The map of the house")[1].split("## Add")[0]))
    assert set(MODULES) - {"version"} <= named


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_upward(module):
    assert violations(module, source_of(module)) == []


def test_the_package_itself_imports_no_recipe():
    assert "recipes" not in set(own_modules(source_of("__init__")))


@pytest.mark.parametrize("module", ["version", "schema", "texts", "metrics", "runtime"])
def test_the_first_leaves_and_the_runtime_need_neither_torch_nor_transformers(module):
    roots = {imported.split(".")[0] for imported, _ in imports(source_of(module))}
    assert not roots & {"torch", "transformers", "datasets", "trl"}


@pytest.mark.parametrize(
    "line",
    [
        "from hf_disranker.scoring import score_pairs",
        "from hf_disranker import scoring",
        "from hf_disranker import Ranker",
        "import hf_disranker.cli",
        "from .store import ScoreStore",
        "from . import store",
        "def later():\n    from hf_disranker.recipes import score",
        "from hf_disranker import recipes",
        "from recipes import score",
        "from hf_disranker.hub_data import push_table",
    ],
)
def test_a_wrong_import_is_seen(line):
    assert len(violations("evaluation", line)) == 1
    assert violations("evaluation", "from hf_disranker import metrics\nfrom hf_disranker.data import read_table") == []
