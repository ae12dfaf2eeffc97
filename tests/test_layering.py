"""Imports go one way: a layer imports only itself and the layers before it."""

import ast
from pathlib import Path

import pytest

import hf_disranker

PACKAGE = Path(hf_disranker.__file__).parent
RECIPES = Path(__file__).parents[1] / "recipes"
LAYERS = ["data", "models", "evaluation", "training", "scoring", "serving", "recipes"]
# Modules at the top of the package, with the layers that each may import: `runtime` runs without torch.
TOP = {"__init__": LAYERS[:-1], "version": [], "runtime": ["data", "models"], "cli": ["recipes"]}
# Whoever imports these needs neither torch nor transformers.
LIGHT = ["version", "runtime", "models.base", "data.schema", "data.templates", "evaluation.metrics"]
HEAVY = {"torch", "transformers", "datasets", "trl", "peft", "sentence_transformers"}


def sources():
    """Each module of the package and of the recipes: (dotted name below hf_disranker, source)."""
    for folder, prefix in ((PACKAGE, ""), (RECIPES, "recipes.")):
        for path in sorted(folder.rglob("*.py")):
            name = prefix + ".".join(path.relative_to(folder).with_suffix("").parts)
            yield name, path.read_text(encoding="utf-8")


SOURCES = dict(sources())


def imports(source):
    """The modules that a source imports, at the top, in functions and for types alike."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(module, source):
    """Imports of a layer above the module's own, and of names of the package itself, which load lazily."""
    layer = module.split(".")[0]
    allowed = LAYERS[: LAYERS.index(layer) + 1] if layer in LAYERS else TOP[layer]
    for name in imports(source):
        package, *path = name.split(".")
        if package == "hf_disranker" and not (path and (path[0] in allowed or path[0] in ("version", "runtime"))):
            yield name


@pytest.mark.parametrize("module", SOURCES)
def test_imports_go_one_way(module):
    assert not list(violations(module, SOURCES[module]))


def test_every_layer_has_modules_and_nothing_else_does():
    folders = {name.split(".")[0] for name in SOURCES if "." in name}
    assert folders == set(LAYERS)
    assert {name for name in SOURCES if "." not in name} == set(TOP)


@pytest.mark.parametrize("layer", LAYERS)
def test_package_inits_are_empty(layer):
    assert SOURCES[f"{layer}.__init__"].count("\n") <= 1


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_neither_torch_nor_transformers(module):
    assert not {name.split(".")[0] for name in imports(SOURCES[module])} & HEAVY


@pytest.mark.parametrize(
    "line",
    [
        "from hf_disranker.scoring.run import ScoringRun",
        "from hf_disranker import scoring",
        "from hf_disranker import Ranker",
        "import hf_disranker.cli",
        "def later():\n    from hf_disranker.recipes import score",
        "from hf_disranker.training.losses import kl",
    ],
)
def test_a_wrong_import_is_detected(line):
    assert len(list(violations("evaluation.evaluate", line))) == 1
    right = "from hf_disranker.evaluation import metrics\nfrom hf_disranker.data.tables import read_table"
    assert not list(violations("evaluation.evaluate", right))


@pytest.mark.parametrize("module", SOURCES)
def test_recipes_are_imported_by_their_package_name(module):
    assert not any(name.split(".")[0] == "recipes" for name in imports(SOURCES[module]))
