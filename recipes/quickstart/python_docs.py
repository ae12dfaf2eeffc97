"""Embedded search data set built from the Python documentation installed on this machine.

A query is the first sentence of a docstring of a public function, class or method in the standard library or an
installed package; the document is its dotted name (title) and the rest of the docstring (summary). Grades are derived
from the structure of the documentation, not from human judgments:

    2   the object itself, or an alias or override whose docstring starts with the same sentence
    1   an object that it refers to or that refers to it (roles, See Also sections, dotted names in backticks)
    0   any other candidate

A hash of the sentence assigns each object, together with its aliases, to the training or development split,
independently of the environment. The splits share no sentences and no documents; references and BM25 candidates stay
within the split of the query.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import random
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from os.path import commonprefix
from pathlib import Path

import pandas as pd

from hf_disranker.data.bm25 import mine_candidates
from hf_disranker.recipes.outputs import json_in
from hf_disranker.recipes.quickstart.docstrings import package_files, read_docstrings

logger = logging.getLogger(__name__)

PACKAGES = (
    "accelerate", "bm25s", "datasets", "evaluate", "fsspec", "huggingface_hub", "joblib", "networkx", "numpy",
    "pandas", "peft", "pyarrow", "scipy", "sentence_transformers", "sklearn", "torch", "transformers", "trl",
)  # fmt: skip

_BUILDER = 1  # increase when the same environment would produce a different data set
_MANIFEST = "manifest.json"
_STRANGERS = 5  # random documents in each judged pool
_QUERY_WORDS = range(3, 41)
_MIN_SUMMARY_WORDS = 10
_SUMMARY_CHARACTERS = 1000
_MAX_OBJECTS = 8  # a sentence shared by more objects is boilerplate, such as "Return self."
_MAX_REFERRERS = 8  # one of many objects that mention DataFrame does not answer a query about DataFrame

_SIGNATURES = re.compile(r"(?:[\w.]+\((?:[^()]|\([^()]*\))*\)[^\n]*\n\s*\n)*")
_SENTENCE_END = re.compile(  # before a non-lowercase character, an empty line, a field, section, example or list
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
    """Write the data set to a folder, unless it is already there for this environment and these settings.

    The tables, each a parquet file: `clicks` (every training object), `heldout_clicks` (every development object, to
    evaluate on only), `judgments` (splits train and dev), `candidates` (BM25's for further training queries, without
    labels) and `corpus` (all documents, with their split).

    Args:
        out: Output folder; files of other names are kept.
        train_queries: Number of judged training queries, the first in hash order.
        dev_queries: Number of judged development queries, the first in hash order.
        unlabelled_queries: Number of training queries with candidates only, the next in hash order.
        top_k: BM25 candidates per query; a judged pool consists of these, all graded documents and 5 random ones.
        packages: See `read_documents`.

    Returns:
        Number of rows of each table; a warning is logged if the documentation has too few queries.

    Raises:
        ValueError: If the folder contains parquet files that this function did not write.
    """
    out, packages = Path(out), sorted(set(packages))
    settings = {"train_queries": train_queries, "dev_queries": dev_queries, "unlabelled_queries": unlabelled_queries}
    sizes = {name: sum(path.stat().st_size for _, path in package_files(name)) for name in packages}
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
    """Write to a temporary folder, then move; the manifest comes last, so an interrupted build is never complete."""
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
        logger.warning("The documentation on this machine has %d queries, fewer than %d.", len(queries), number)
    return queries.head(number)


def _judgments(queries: pd.DataFrame, side: pd.DataFrame, mined: pd.DataFrame) -> pd.DataFrame:
    """Return the judged pools: the query's objects (2), related objects (1), BM25 and random candidates (0)."""
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
    """Read the Python documentation installed on this machine as documents.

    Args:
        packages: Importable names; packages that are not installed are skipped.

    Returns:
        One row per object, sorted by doc_id: doc_id, title, query, summary, query_id, split ("train" or "dev") and
        related (doc_ids in the same split that it refers to or that refer to it).
    """
    docstrings = read_docstrings(packages)
    rows = [(name, name, *_query_and_summary(docstrings[name])) for name in sorted(docstrings)]
    documents = pd.DataFrame([row for row in rows if row[2]], columns=["doc_id", "title", "query", "summary"])
    documents["query_id"] = documents["query"].map(_query_id)
    documents["query"] = documents.groupby("query_id")["query"].transform("first")  # aliases may differ in case
    boilerplate = documents.groupby("query_id")["doc_id"].transform("size") > _MAX_OBJECTS
    repeated = documents.groupby("summary")["query_id"].transform("nunique") > 1  # it could end up in both splits
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
    """Split a docstring into query and summary; both are empty if either is unsuitable for search."""
    text = _SIGNATURES.sub("", _SEE_ALSO.sub("", docstring), count=1)  # See Also sections quote other documents
    for pattern, plain in _MARKUP:
        text = pattern.sub(plain, text)
    sentence, _, rest = _SENTENCE_END.sub("\0", text.strip('" \n'), count=1).partition("\0")
    query, summary = " ".join(sentence.split()).rstrip("."), " ".join(rest.split())
    is_query = len(query.split()) in _QUERY_WORDS and not _NO_QUERY.match(query)
    is_summary = len(summary.split()) >= _MIN_SUMMARY_WORDS and query.lower() not in summary.lower()
    summary = f"{summary} "[: _SUMMARY_CHARACTERS + 1].rpartition(" ")[0]
    return (query, summary) if is_query and is_summary else ("", "")


def _references(docstring: str) -> list[str]:
    """Return the names that a docstring refers to, as written."""
    names = [name for groups in _REFERENCE.findall(docstring) for name in groups if name]
    for section in _SEE_ALSO.findall(docstring):
        names += ", ".join(re.findall(r"^[\w.]+(?:, [\w.]+)*(?= *:|,?$)", section, re.M)).split(", ")
    return names


def _related(references: dict[str, list[str]], sides: dict[str, str]) -> dict[str, list[str]]:
    """Map each document to those in its split that it refers to or that refer to it."""
    meanings = defaultdict(list)  # dotted suffix -> document names
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
    """Resolve a reference to the candidate nearest to its origin; return None if it is ambiguous."""
    shared = [len(commonprefix([origin.split("."), meaning.split(".")])) for meaning in meanings]
    clear = shared.count(max(shared)) == 1 and (max(shared) > 0 or "." in reference)
    return meanings[shared.index(max(shared))] if clear else None
