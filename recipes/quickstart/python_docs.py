"""An embedded search data set: the Python documentation that is installed on this machine.

Public functions, classes and methods of the standard library and of installed packages are read with `ast`; nothing of
them is imported. A query is the first sentence of a docstring; the document is the dotted name (title) and the rest of
the docstring (summary). The grades follow from the structure of the documentation, no person gave them:

    2   the object itself, or an alias or override that begins with the same sentence
    1   an object that it refers to or that refers to it (roles, See Also sections, backticked dotted names)
    0   another candidate

A hash of the sentence puts an object on the training or the development side, aliases together, the same in every
environment. The sides share no sentence and no document; references and BM25 candidates stay on a query's own side.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import importlib.util
import json
import logging
import platform
import random
import re
import sysconfig
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from os.path import commonprefix
from pathlib import Path

import pandas as pd

from hf_disranker.data.bm25 import mine_candidates
from hf_disranker.data.outputs import json_in

logger = logging.getLogger(__name__)

PACKAGES = (
    "accelerate", "bm25s", "datasets", "evaluate", "fsspec", "huggingface_hub", "joblib", "networkx", "numpy",
    "pandas", "peft", "pyarrow", "scipy", "sentence_transformers", "sklearn", "torch", "transformers", "trl",
)  # fmt: skip

_BUILDER = 1  # raise it when the same environment gives another data set
_MANIFEST = "manifest.json"
_STRANGERS = 5  # random documents in each judged pool
_QUERY_WORDS = range(3, 41)
_MIN_SUMMARY_WORDS = 10
_SUMMARY_CHARACTERS = 1000
_MAX_OBJECTS = 8  # a sentence that more objects share is boilerplate, such as "Return self."
_MAX_REFERRERS = 8  # one of the many that mention DataFrame is no answer to a question about DataFrame

_SKIPPED = re.compile(  # modules that document nothing for users, or thousands of times the same
    r"(.+\.)?(tests?|test_\w+|testing_utils|conftest|benchmarks|examples|externals|setup|_vendor|_internal)"
    r"|(numpy\.)?distutils|encodings|idlelib|lib2to3|pydoc_data|turtledemo|torch\._(?!tensor$)\w+|transformers\.models"
)
_SIGNATURES = re.compile(r"(?:[\w.]+\((?:[^()]|\([^()]*\))*\)[^\n]*\n\s*\n)*")
_SENTENCE_END = re.compile(  # before a capital or sign, or a blank line, or a field, section, example or list
    r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<!etc\.)(?<!vs\.)\s+(?=[^a-z])"
    r"|\n\s*\n|\s+(?=[:@]\w+[^:\n]*: |Args:|Arguments:|Parameters:|Returns:|Examples?:|>>> |[-*] )"
)
_MARKUP = (
    (re.compile(r":[a-z:]+:`[~!.]?([^`<]+?)(?:\s*<[^`>]*>)?`"), r"\1"),  # roles
    (re.compile(r"\[?`+~?([^`\n]+?)(?:\s*<[^`>\n]*>)?`+_*\]?"), r"\1"),  # code, links
    (re.compile(r"^\s*(?:[-=~^*]{3,}\s*|\.\. (?:version\w+|deprecated)::.*)$|\.\. [\w-]+::|%\(\w+\)s", re.M), ""),
)
_NO_QUERY = re.compile(  # code, pointers to other texts, and unfilled templates
    r"\W|\w+\(|(?:see|refer|roughly|equivalent|deprecated|alias|same as|return self|inherit\w*|todo)\b"
    r"|.*(?:[`{}\[\]=|]|%\(|::|:$|>>>)", re.I
)  # fmt: skip
_REFERENCE = re.compile(  # :func:`name`, [`name`], `dotted.name`
    r"(?::(?:func|class|meth|mod|exc|attr|obj|data):|\[)`(?:[^`<]*<)?[~!.]?([\w.]+)|`~?(\w+(?:\.\w+)+)(?:\(\))?`"
)
_SEE_ALSO = re.compile(r"^See Also\n-+\n(.*?)(?=^\S[^\n]*\n---|\Z)", re.M | re.S | re.I)


def build(
    out: str | Path,
    *,
    train_queries: int = 1500,
    dev_queries: int = 1000,
    unlabelled_queries: int = 8000,
    top_k: int = 20,
    packages: Iterable[str] = PACKAGES,
) -> dict[str, int]:
    """Write the data set into a folder, unless it already holds what this environment and these settings give.

    The tables, each a parquet file: `clicks` (every training object), `heldout_clicks` (every development object, to
    evaluate on only), `judgments` (splits train and dev), `candidates` (BM25's for further training queries, without
    labels) and `corpus` (all documents, with their split).

    Args:
        out: the folder; a ValueError where its parquet files are of another origin; other files are left alone.
        train_queries: judged training queries, the first by hash.
        dev_queries: judged development queries, the first by hash.
        unlabelled_queries: training queries with candidates, the next by hash.
        top_k: BM25 candidates per query; a judged pool holds these, all graded documents and 5 random ones.
        packages: see `read_documents`.

    Returns:
        The number of rows of each table. Where the documentation has too few queries a warning says so.
    """
    out, packages = Path(out), sorted(set(packages))
    settings = {"train_queries": train_queries, "dev_queries": dev_queries, "unlabelled_queries": unlabelled_queries}
    sizes = {name: sum(path.stat().st_size for _, path in _package_files(name)) for name in packages}
    manifest = {"builder": _BUILDER, "python": platform.python_version(), "sizes": sizes, **settings, "top_k": top_k}
    found = json_in(out / _MANIFEST) or {}
    if "builder" not in found and (foreign := [*out.glob("*.parquet"), *out.glob(_MANIFEST)]):
        raise ValueError(f"{foreign[0]} exists and was not written by this command: choose another folder.")
    rows = found.pop("rows", {})
    if found != manifest or not all((out / f"{name}.parquet").is_file() for name in rows):
        tables = _tables(read_documents(packages), **settings, top_k=top_k)
        rows = {name: len(table) for name, table in tables.items()}
        _write(tables, {**manifest, "rows": rows}, out)
    return rows


def _write(tables: dict[str, pd.DataFrame], manifest: dict[str, object], out: Path) -> None:
    """Write beside, then move; the manifest is emptied first and comes last: a killed build never looks finished."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".building-") as folder:
        for name, table in tables.items():
            table.to_parquet(Path(folder, f"{name}.parquet"), index=False)
        Path(folder, _MANIFEST).write_text(json.dumps(manifest, indent=2))
        (out / _MANIFEST).write_text('{"builder": null}')
        for file in [*(f"{name}.parquet" for name in tables), _MANIFEST]:
            Path(folder, file).replace(out / file)


def _tables(
    documents: pd.DataFrame, train_queries: int, dev_queries: int, unlabelled_queries: int, top_k: int
) -> dict[str, pd.DataFrame]:
    train, dev = (documents[documents["split"] == split] for split in ("train", "dev"))
    train_asked = _first_queries(train, train_queries + unlabelled_queries)
    dev_asked = _first_queries(dev, dev_queries)
    train_mined, dev_mined = mine_candidates(train_asked, train, top_k), mine_candidates(dev_asked, dev, top_k)
    judged = train_asked.head(train_queries)
    return {
        "clicks": train[["query_id", "query", "doc_id", "title", "summary"]],
        "heldout_clicks": dev[["query_id", "query", "doc_id", "title", "summary"]],
        "judgments": pd.concat([_judgments(judged, train, train_mined), _judgments(dev_asked, dev, dev_mined)]),
        "candidates": train_mined[~train_mined["query_id"].isin(judged["query_id"])],
        "corpus": documents[["doc_id", "title", "summary", "split"]],
    }


def _first_queries(side: pd.DataFrame, number: int) -> pd.DataFrame:
    queries = side[["query_id", "query"]].drop_duplicates().sort_values("query_id")
    if len(queries) < number:
        logger.warning("The documentation on this machine gives %d queries, not %d.", len(queries), number)
    return queries.head(number)


def _judgments(queries: pd.DataFrame, side: pd.DataFrame, mined: pd.DataFrame) -> pd.DataFrame:
    """The judged pools of queries: their objects (2), objects related to these (1), BM25's and random ones (0)."""
    own = side.merge(queries).assign(label=2)
    related = own.assign(doc_id=own["related"], label=1).explode("doc_id").dropna(subset="doc_id")
    doc_ids, number = list(side["doc_id"]), min(_STRANGERS, len(side))
    drawn = queries["query_id"].map(lambda seed: random.Random(seed).sample(doc_ids, number))
    others = pd.concat([mined.merge(queries), queries.assign(doc_id=drawn).explode("doc_id")]).assign(label=0)
    pools = pd.concat([own, related, others])[["query_id", "query", "doc_id", "label"]]
    pools = pools.sort_values(["query_id", "doc_id", "label"]).drop_duplicates(["query_id", "doc_id"], keep="last")
    pools = pools.assign(label=pools["label"].astype("int8")).merge(side[["doc_id", "title", "summary", "split"]])
    return pools[["query_id", "query", "doc_id", "title", "summary", "label", "split"]]


def read_documents(packages: Iterable[str] = PACKAGES) -> pd.DataFrame:
    """The documents that this machine's Python documentation gives.

    Args:
        packages: importable names; those that are not installed are skipped.

    Returns:
        One row per object, in order of doc_id: doc_id, title, query, summary, query_id, split ("train" or "dev") and
        related: the doc_ids, on the same side, that it refers to or that refer to it.
    """
    docstrings = _docstrings(packages)
    rows = [(name, name, *_query_and_summary(docstrings[name])) for name in sorted(docstrings)]
    documents = pd.DataFrame([row for row in rows if row[2]], columns=["doc_id", "title", "query", "summary"])
    documents["query_id"] = documents["query"].map(_query_id)
    documents["query"] = documents.groupby("query_id")["query"].transform("first")  # aliases may differ in capitals
    boilerplate = documents.groupby("query_id")["doc_id"].transform("size") > _MAX_OBJECTS
    repeated = documents.groupby("summary")["query_id"].transform("nunique") > 1  # it could be on both sides
    documents = documents[~boilerplate & ~repeated].reset_index(drop=True)
    documents["split"] = documents["query_id"].map(_side)
    sides = dict(zip(documents["doc_id"], documents["split"], strict=True))
    related = _related({doc_id: _references(docstrings[doc_id]) for doc_id in sides}, sides)
    return documents.assign(related=documents["doc_id"].map(related))


def _query_id(query: str) -> str:
    return hashlib.sha256(query.lower().encode()).hexdigest()[:16]


def _side(query_id: str) -> str:
    return "dev" if int(query_id, 16) % 5 == 0 else "train"


def _query_and_summary(docstring: str) -> tuple[str, str]:
    """Split a docstring in two; both are empty if either is no use for search."""
    text = _SIGNATURES.sub("", _SEE_ALSO.sub("", docstring), count=1)  # See Also quotes sentences of other documents
    for pattern, plain in _MARKUP:
        text = pattern.sub(plain, text)
    sentence, _, rest = _SENTENCE_END.sub("\0", text.strip('" \n'), count=1).partition("\0")
    query, summary = " ".join(sentence.split()).rstrip("."), " ".join(rest.split())
    is_query = len(query.split()) in _QUERY_WORDS and not _NO_QUERY.match(query)
    is_summary = len(summary.split()) >= _MIN_SUMMARY_WORDS and query.lower() not in summary.lower()
    summary = f"{summary} "[: _SUMMARY_CHARACTERS + 1].rpartition(" ")[0]
    return (query, summary) if is_query and is_summary else ("", "")


def _references(docstring: str) -> list[str]:
    """The names that a docstring refers to, as it writes them."""
    names = [name for groups in _REFERENCE.findall(docstring) for name in groups if name]
    for section in _SEE_ALSO.findall(docstring):
        names += ", ".join(re.findall(r"^[\w.]+(?:, [\w.]+)*(?= *:|,?$)", section, re.M)).split(", ")
    return names


def _related(references: dict[str, list[str]], sides: dict[str, str]) -> dict[str, list[str]]:
    """For each document those of its side that it refers to or that refer to it."""
    meanings = defaultdict(list)  # of each dotted ending of a document's name
    for name in references:
        parts = name.split(".")
        for start in range(len(parts)):
            meanings[".".join(parts[start:])].append(name)
    links = set()
    for name, called in references.items():
        targets = {_resolve(reference, name, meanings[reference]) for reference in called if reference in meanings}
        links |= {(name, target) for target in targets if target and target != name and sides[target] == sides[name]}
    referrers = Counter(target for _, target in links)
    links |= {(target, name) for name, target in links if referrers[target] <= _MAX_REFERRERS}
    related: dict[str, list[str]] = {name: [] for name in references}
    for name, other in sorted(links):
        related[name].append(other)
    return related


def _resolve(reference: str, origin: str, meanings: list[str]) -> str | None:
    """What a reference means: of the documents so called the one nearest to its origin; None if that is not clear."""
    shared = [len(commonprefix([origin.split("."), meaning.split(".")])) for meaning in meanings]
    clear = shared.count(max(shared)) == 1 and (max(shared) > 0 or "." in reference)
    return meanings[shared.index(max(shared))] if clear else None


@dataclass
class _Module:
    """What is kept of a source file."""

    docstrings: dict[str, dict[str, str]] = field(default_factory=dict)  # by name, then by member: "" or ".method"
    imports: list[tuple[str, str, str]] = field(default_factory=list)  # from module, name (or "*"), as name
    exported: set[str] = field(default_factory=set)  # __all__, if it is a plain list


def _docstrings(packages: Iterable[str]) -> dict[str, str]:
    """The docstrings of all public objects, by the dotted name by which users know the object."""
    files = dict(_module_files(Path(sysconfig.get_paths()["stdlib"]), ""))
    for package in sorted(set(packages)):
        files.update(_package_files(package))
    gc.freeze()  # else the collector walks over all that the process holds while the trees come and go
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


def _package_files(package: str) -> list[tuple[str, Path]]:
    spec = importlib.util.find_spec(package)  # of a top-level name, so nothing is imported
    folders = sorted((spec and spec.submodule_search_locations) or [])
    return [file for folder in folders for file in _module_files(Path(folder), package)]


def _module_files(folder: Path, prefix: str) -> Iterator[tuple[str, Path]]:
    """Dotted name and path of every module below a folder, private ones too, since public ones import from them."""
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
    """Read a source file; None if it cannot be read."""
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
    """Top-level statements, also those under `if`, `else` and `try`."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _statements([*node.body, *node.orelse])


def _members(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> Iterator[tuple[str, str]]:
    """The docstrings of an object ("") and, if it is a class, of its public methods (".method")."""
    yield "", ast.get_docstring(node) or ""
    for member in node.body if isinstance(node, ast.ClassDef) else []:
        if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef) and not member.name.startswith("_"):
            yield f".{member.name}", ast.get_docstring(member) or ""


def _public_names(modules: dict[str, _Module]) -> dict[tuple[str, str], str]:
    """For each object (module, name) its shortest public name in that module or a package around it."""
    known = {module: {name: (module, name) for name in content.docstrings} for module, content in modules.items()}
    outer_first = sorted(modules, key=lambda module: (module.count("."), module))
    for module in outer_first[::-1] * 2:  # twice, as pandas takes DataFrame from pandas.core.api, which imports it too
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
