"""Read the public docstrings of the standard library and installed packages with `ast`, without importing them."""

from __future__ import annotations

import ast
import gc
import importlib.util
import logging
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

logger = logging.getLogger(__name__)

_SKIPPED = re.compile(  # modules without user documentation, or with thousands of near-identical docstrings
    r"(.+\.)?(tests?|test_\w+|testing_utils|conftest|benchmarks|examples|externals|setup|_vendor|_internal)"
    r"|(numpy\.)?distutils|encodings|idlelib|lib2to3|pydoc_data|turtledemo|torch\._(?!tensor$)\w+|transformers\.models"
)


@dataclass
class _Module:
    """Docstrings, imports and exports of a source file."""

    # name -> member ("" or ".method") -> docstring
    docstrings: dict[str, dict[str, str]] = field(default_factory=dict)
    imports: list[tuple[str, str, str]] = field(default_factory=list)  # (module, name or "*", alias)
    exported: set[str] = field(default_factory=set)  # __all__, if it is a plain list


def read_docstrings(packages: Iterable[str]) -> dict[str, str]:
    """Return the docstrings of all public objects, keyed by the shortest public dotted name.

    Args:
        packages: Importable names; packages that are not installed are skipped.
    """
    files = dict(_module_files(Path(sysconfig.get_paths()["stdlib"]), ""))
    for package in sorted(set(packages)):
        files.update(package_files(package))
    gc.freeze()  # the garbage collector would traverse the whole process for every syntax tree
    parsed = {name: _parse(name, path) for name, path in files.items()}
    gc.unfreeze()
    modules = {name: module for name, module in parsed.items() if module}
    if unreadable := sorted(parsed.keys() - modules):
        logger.warning("Skipped %d unreadable source file(s): %s", len(unreadable), ", ".join(unreadable[:5]))
    return {
        public + member: docstring
        for (module, name), public in _public_names(modules).items()
        for member, docstring in modules[module].docstrings[name].items()
    }


def package_files(package: str) -> list[tuple[str, Path]]:
    """Return the dotted name and path of every module in an installed package; empty if it is not installed."""
    spec = importlib.util.find_spec(package)  # does not import a top-level name
    folders = sorted((spec and spec.submodule_search_locations) or [])
    return [file for folder in folders for file in _module_files(Path(folder), package)]


def _module_files(folder: Path, prefix: str) -> Iterator[tuple[str, Path]]:
    """Yield the dotted name and path of every module in a folder, including private ones that public ones import."""
    for path in sorted(folder.iterdir()):
        name = f"{prefix}.{path.stem}".lstrip(".")
        if path.name == "__init__.py":
            yield prefix, path
        elif _SKIPPED.fullmatch(name) or not path.stem.isidentifier():
            continue
        elif path.suffix == ".py":
            yield name, path
        elif (path / "__init__.py").is_file():
            yield from _module_files(path, name)


def _parse(name: str, path: Path) -> _Module | None:
    """Parse a source file; return None if it cannot be parsed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
        return _read_module(tree, package=name if path.stem == "__init__" else name.rpartition(".")[0])
    except (ImportError, OSError, SyntaxError, ValueError, RecursionError):
        return None


def _read_module(tree: ast.Module, package: str) -> _Module:
    module = _Module()
    for node in _statements(tree.body):
        if isinstance(node, ast.ImportFrom):
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            module.imports += [(source, alias.name, alias.asname or alias.name) for alias in node.names]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            documented = {member: docstring for member, docstring in _members(node) if docstring}
            module.docstrings.setdefault(node.name, {}).update(documented)  # overloads and setters have no docstring
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = node.value.elts if isinstance(node.value, ast.List | ast.Tuple) else []
            module.exported.update(str(name.value) for name in names if isinstance(name, ast.Constant))
    return module


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield top-level statements, including those nested in `if`, `else` and `try`."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _statements([*node.body, *node.orelse])


def _members(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> Iterator[tuple[str, str]]:
    """Yield the docstrings of an object ("") and, for a class, of its public methods (".method")."""
    yield "", ast.get_docstring(node) or ""
    for member in node.body if isinstance(node, ast.ClassDef) else []:
        if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef) and not member.name.startswith("_"):
            yield f".{member.name}", ast.get_docstring(member) or ""


def _public_names(modules: dict[str, _Module]) -> dict[tuple[str, str], str]:
    """Map each object (module, name) to its shortest public name in that module or a parent package."""
    known = {module: {name: (module, name) for name in content.docstrings} for module, content in modules.items()}
    outer_first = sorted(modules, key=lambda module: (module.count("."), module))
    # Twice: pandas re-exports DataFrame from pandas.core.api, which imports it as well.
    for module in outer_first[::-1] * 2:
        for source, name, alias in modules[module].imports:
            if source in modules:
                names = (modules[source].exported or known[source]) if name == "*" else [name]
                for found in sorted(known[source].keys() & names):
                    known[module].setdefault(alias.replace("*", found), known[source][found])
    public: dict[tuple[str, str], str] = {}
    for module in outer_first:
        for name, home in sorted(known[module].items()):
            if "._" not in f".{module}.{name}" and f"{home[0]}.".startswith(f"{module}."):
                public.setdefault(home, f"{module}.{name}")
    return public
