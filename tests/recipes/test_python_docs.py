"""The embedded data set, on small packages written by hand; their docstrings say what must come out."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import hf_disranker
from hf_disranker.data.schema import validate
from hf_disranker.recipes.quickstart import python_docs
from hf_disranker.recipes.quickstart.python_docs import build, read_documents

TABLES = ["clicks", "heldout_clicks", "judgments", "candidates", "corpus"]

SHELF = '''
"""A module's own docstring is no document."""
raise RuntimeError("nothing may be imported")

def stack(books):
    """Put all books on top of each other. The heaviest book comes first, then the lighter ones in order.

    See Also
    --------
    unstack, nothing : Take the books down again
    """
    def nested():
        """Count the books of a nested function. Nobody can call it, so nobody can look for it either."""

def unstack(books):
    """unstack(books) -> list

    Take the books
    down again.  The order is the one in which they were put on top, from the last to the first one of them.
    """

def _private(books):
    """Hide the books from all readers. Only the library itself may call this function, so it is no document."""

class Shelf:
    """A place for :class:`Book` objects, e.g. at home.

    Holds as many books as it has space for, see `shop.shelf.Shelf.add` and :func:`~unstack`, in one row."""

    def add(self, book):
        """Add one book to the shelf.

        Parameters
        ----------
        book : Book
            What is added; it must not be wider than the space that is left.
        """

    def _shrink(self):
        """Make the shelf smaller by one book. Nobody but the shelf may call this, so it is no document at all."""

    @property
    def width(self):
        """How wide the shelf is. The number of centimetres between the two sides of it, without the wood."""

    @width.setter
    def width(self, value): ...

    class Nested:
        """A class within another class here. Nobody looks for these, so they are left out by the reader."""

    def close(self):
        """Return self. This says nothing and is far too short a sentence for a query that anybody would ask."""

    def empty(self):
        """Take all books out of the shelf."""

class Rack(Shelf):
    """A rack for wine bottles. Not for books, which fall through the holes that hold the bottles in place."""

    def add(self, book):
        """Add one  book to the Shelf.

        A rack refuses every book that is offered to it and says so in an error with some nine words.
        """
'''
ENGINE = '''
__all__ = ["start"]
def start(engine):
    """Start the engine of a car. The key has to be in the lock and the battery must not be flat for this."""
def helper(engine):
    """Help the engine to start up. It is not exported by the module and thus it has no public name at all."""
'''


def write_package(folder, name, **modules):
    (folder / name).mkdir(parents=True)
    for module, source in modules.items():
        (folder / name / f"{module}.py").write_text(source, encoding="utf-8")


def function(name, *paragraphs):
    docstring = "\n\n    ".join(paragraphs)
    return f'def {name}():\n    """{docstring}"""\n'


def numbered_functions(count):
    """A module of functions with different sentences, each referring to the next."""
    rest = "Some text of ten words or more that names :func:`f{}` and the word w{} as well."
    return "".join(
        function(f"f{n}", f"Compute the answer number {n} of all.", rest.format(n + 1, n % 7)) for n in range(count)
    )


@pytest.fixture
def no_stdlib(tmp_path, monkeypatch):
    """A standard library without modules, and a folder on the path to write packages to."""
    (tmp_path / "stdlib").mkdir()
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path / "stdlib")})
    monkeypatch.syspath_prepend(tmp_path / "site")
    return tmp_path / "site"


@pytest.fixture
def shop(no_stdlib):
    write_package(
        no_stdlib, "shop", __init__="from ._engine import *\nraise RuntimeError", shelf=SHELF, _engine=ENGINE
    )
    return read_documents(["shop"]).set_index("doc_id")


@pytest.fixture
def built(no_stdlib, tmp_path):
    write_package(no_stdlib, "many", __init__="", answers=numbered_functions(120))
    sizes = {"train_queries": 30, "dev_queries": 10, "unlabelled_queries": 40, "top_k": 6}
    counts = build(tmp_path / "out", packages=["many"], **sizes)
    tables = {name: pd.read_parquet(tmp_path / "out" / f"{name}.parquet") for name in TABLES}
    assert counts == {name: len(table) for name, table in tables.items()}
    return read_documents(["many"]), tables


def test_public_objects_become_documents(shop):
    assert list(shop.index) == [
        "shop.shelf.Rack", "shop.shelf.Rack.add", "shop.shelf.Shelf", "shop.shelf.Shelf.add",
        "shop.shelf.Shelf.width", "shop.shelf.stack", "shop.shelf.unstack", "shop.start",
    ]  # fmt: skip
    assert not {"shop", "shop.shelf", "shop._engine"} & set(sys.modules)
    assert list(shop["title"]) == list(shop.index)


def test_docstring_is_split_into_query_and_summary(shop):
    texts = shop[["query", "summary"]].apply(tuple, axis=1)
    assert texts["shop.shelf.unstack"] == (
        "Take the books down again",
        "The order is the one in which they were put on top, from the last to the first one of them.",
    )
    assert texts["shop.shelf.Shelf"] == (
        "A place for Book objects, e.g. at home",
        "Holds as many books as it has space for, see shop.shelf.Shelf.add and unstack, in one row.",
    )
    assert texts["shop.shelf.Shelf.add"] == (
        "Add one book to the Shelf",
        "Parameters book : Book What is added; it must not be wider than the space that is left.",
    )


def test_see_also_sections_are_left_out(shop):
    """It quotes the sentences of other documents, perhaps of the other side."""
    assert shop.loc["shop.shelf.stack", "summary"] == "The heaviest book comes first, then the lighter ones in order."


def test_aliases_share_one_query(shop):
    alias, override = shop.loc["shop.shelf.Rack.add"], shop.loc["shop.shelf.Shelf.add"]
    assert alias["query_id"] == override["query_id"] and alias["query"] == override["query"]
    assert alias["split"] == override["split"]
    assert shop["query_id"].nunique() == len(shop) - 1


def test_query_id_and_side_are_the_hash_of_the_sentence(shop):
    """So they are the same in every environment: `printf 'take the books down again' | sha256sum`."""
    assert shop.loc["shop.shelf.unstack", "query_id"] == "6405ef43b88c4d9e"
    assert list(shop.index[shop["split"] == "dev"]) == ["shop.shelf.unstack"]  # the only one that is divisible by 5


def test_grades_follow_the_structure(shop, tmp_path):
    """Shelf refers to Shelf.add, and to unstack, which is on the other side."""
    build(tmp_path / "out", train_queries=6, dev_queries=1, unlabelled_queries=0, top_k=3, packages=["shop"])
    judgments = pd.read_parquet(tmp_path / "out" / "judgments.parquet")
    graded = judgments[judgments["label"] > 0].groupby("query")[["doc_id", "label"]]
    assert graded.apply(lambda pool: dict(pool.to_numpy())).to_dict() == {
        "A place for Book objects, e.g. at home": {"shop.shelf.Shelf": 2, "shop.shelf.Shelf.add": 1},
        "A rack for wine bottles": {"shop.shelf.Rack": 2},
        "Add one book to the Shelf": {"shop.shelf.Rack.add": 2, "shop.shelf.Shelf": 1, "shop.shelf.Shelf.add": 2},
        "How wide the shelf is": {"shop.shelf.Shelf.width": 2},
        "Put all books on top of each other": {"shop.shelf.stack": 2},
        "Start the engine of a car": {"shop.start": 2},
        "Take the books down again": {"shop.shelf.unstack": 2},
    }


@pytest.mark.parametrize(
    ("reference", "origin", "meanings", "meaning"),
    [
        ("fft", "scipy.fftpack.ifft", ["numpy.fft.fft", "scipy.fft.fft", "scipy.fftpack.fft"], "scipy.fftpack.fft"),
        ("fit", "sklearn.svm.SVC.score", ["sklearn.svm.SVC.fit", "sklearn.svm.SVR.fit"], "sklearn.svm.SVC.fit"),
        ("fit", "sklearn.metrics.f1", ["sklearn.svm.SVC.fit", "sklearn.svm.SVR.fit"], None),
        ("norm", "pandas.eval", ["torch.norm"], None),
        ("linalg.norm", "pandas.eval", ["numpy.linalg.norm"], "numpy.linalg.norm"),
    ],
)
def test_a_reference_resolves_to_the_nearest_document(reference, origin, meanings, meaning):
    assert python_docs._resolve(reference, origin, meanings) == meaning


def test_references_count_both_ways_within_a_side():
    references = {"a.x": ["y", "z"], "a.y": [], "a.z": ["x"], "a.w": ["x", "w", "v"]}
    sides = {"a.x": "train", "a.y": "train", "a.z": "dev", "a.w": "train"}
    assert python_docs._related(references, sides) == {
        "a.x": ["a.w", "a.y"], "a.y": ["a.x"], "a.z": [], "a.w": ["a.x"],
    }  # fmt: skip


def test_a_document_with_many_referrers_is_not_related_to_them():
    referrers = [f"a.f{n}" for n in range(python_docs._MAX_REFERRERS + 1)]
    references = {"a.hub": [], **{name: ["hub"] for name in referrers}}
    related = python_docs._related(references, dict.fromkeys(references, "train"))
    assert related == {"a.hub": [], **{name: ["a.hub"] for name in referrers}}


def test_title_is_the_shortest_public_name(no_stdlib):
    """As pandas.DataFrame, which is defined in pandas.core.frame and comes by way of pandas.core.api."""
    thing = function("Thing", "Do a thing of its own.", "Ten words or more that nothing else in here has got.")
    write_package(no_stdlib, "deep", __init__="if TYPE_CHECKING:\n    from deep.core.api import Thing as Object")
    write_package(no_stdlib / "deep", "core", __init__="", api="from .frame import Thing", frame=thing)
    write_package(no_stdlib, "other", __init__="from deep import Object")
    assert list(read_documents(["deep", "other"])["doc_id"]) == ["deep.Object"]


def test_boilerplate_is_left_out(no_stdlib):
    summary = "Ten words or more that tell nothing about any thing."
    functions = [function(f"s{n}", "Do what it does.", f"{summary} But for {n}.") for n in range(9)]
    functions += [function(f"t{n}", f"Do thing number {n}.", summary) for n in range(2)]
    functions += [function("own", "Do a thing of its own.", f"{summary} Only here.")]
    write_package(no_stdlib, "dull", __init__="".join(functions))
    assert list(read_documents(["dull"])["doc_id"]) == ["dull.own"]


def test_unreadable_source_is_skipped_and_counted(no_stdlib, caplog):
    write_package(
        no_stdlib, "broken", __init__="", good=numbered_functions(2), bad="def f(:\n", above="from ... import x"
    )
    (no_stdlib / "broken" / "latin.py").write_bytes(b"name = '\xe9'")
    with caplog.at_level(logging.WARNING):
        assert list(read_documents(["broken", "not_installed"])["doc_id"]) == ["broken.good.f0", "broken.good.f1"]
    assert "Skipped 3 unreadable source file(s): broken.above, broken.bad, broken.latin" in caplog.text


def test_tables_follow_their_contracts(built):
    _, tables = built
    for name, contract in zip(TABLES, ["clicks", "clicks", "judgments", "candidates", "corpus"], strict=True):
        validate(tables[name], contract, name)
    assert tables["judgments"].groupby("split")["query_id"].nunique().to_dict() == {"dev": 10, "train": 30}
    assert tables["candidates"]["query_id"].nunique() == 40
    assert set(tables["candidates"]["rank"]) == set(range(1, 7))


def test_sides_share_nothing(built):
    documents, tables = built
    dev = documents[documents["split"] == "dev"]
    dev_ids, dev_queries, dev_query_ids = set(dev["doc_id"]), set(dev["query"].str.lower()), set(dev["query_id"])
    judgments = tables["judgments"]
    for table in (tables["clicks"], tables["candidates"], judgments[judgments["split"] == "train"]):
        assert not dev_ids & set(table["doc_id"])
        assert not dev_queries & set(table["query"].str.lower())
        assert not dev_query_ids & set(table["query_id"])
    for table in (tables["heldout_clicks"], judgments[judgments["split"] == "dev"]):
        assert set(table["doc_id"]) <= dev_ids and set(table["query_id"]) <= dev_query_ids
    assert set(tables["corpus"].loc[tables["corpus"]["split"] == "dev", "doc_id"]) == dev_ids
    assert len(tables["clicks"]) + len(tables["heldout_clicks"]) == len(tables["corpus"]) == 120


def test_unlabelled_queries_are_not_judged(built):
    _, tables = built
    assert not set(tables["candidates"]["query_id"]) & set(tables["judgments"]["query_id"])


def test_pools_contain_graded_mined_and_random_documents(built):
    documents, tables = built
    documents = documents.set_index("doc_id")
    for query_id, pool in tables["judgments"].groupby("query_id"):
        labels = pool.set_index("doc_id")["label"].to_dict()
        own = set(documents.index[documents["query_id"] == query_id])
        related = {other for doc_id in own for other in documents.loc[doc_id, "related"]} - own
        assert {doc_id for doc_id, label in labels.items() if label == 2} == own
        assert {doc_id for doc_id, label in labels.items() if label == 1} == related
        assert 6 <= len(labels) <= 6 + 1 + 2 + 5
    assert (tables["judgments"]["label"] == 1).any()


BUILD = """
import sys
from hf_disranker.recipes.quickstart import docstrings, python_docs
docstrings.sysconfig.get_paths = lambda: {"stdlib": sys.argv[1]}
sys.path.insert(0, sys.argv[2])
python_docs.build(sys.argv[3], packages=["many"], train_queries=30, dev_queries=10, unlabelled_queries=40, top_k=6)
"""


def test_builds_are_equal_under_any_hash_seed(no_stdlib, tmp_path):
    write_package(no_stdlib, "many", __init__="", answers=numbered_functions(120))
    for seed in ("1", "2"):
        paths = [str(tmp_path / "stdlib"), str(no_stdlib), str(tmp_path / seed)]
        source = str(Path(hf_disranker.__file__).parents[1])
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": source}
        subprocess.run([sys.executable, "-c", BUILD, *paths], check=True, env=environment, capture_output=True)
    for name in [f"{table}.parquet" for table in TABLES] + ["manifest.json"]:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


@pytest.fixture
def small_build(no_stdlib, tmp_path, monkeypatch):
    """Builds a small set into one folder and counts how often the documentation was read for it."""
    write_package(no_stdlib, "many", __init__="", answers=numbered_functions(60))
    reads = []
    monkeypatch.setattr(python_docs, "read_documents", lambda packages: reads.append(1) or read_documents(packages))

    def small_build(**changes):
        settings = {"train_queries": 5, "dev_queries": 2, "unlabelled_queries": 5, "packages": ("many",), **changes}
        return build(tmp_path / "out", **settings), len(reads)

    return small_build


def test_a_finished_build_is_reused(small_build, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("left alone")
    counts, _ = small_build()
    assert small_build() == (counts, 1)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        [*(f"{name}.parquet" for name in TABLES), "manifest.json", "mine.txt"]
    )


@pytest.mark.parametrize("name", ["judgments.parquet", "manifest.json"])
def test_foreign_tables_are_not_overwritten(small_build, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text('{"mine": 1}')
    with pytest.raises(ValueError, match=f"{name} exists and was not written by this command"):
        small_build()
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]
    assert (tmp_path / "out" / name).read_text() == '{"mine": 1}'


def test_changed_inputs_rebuild_the_data_set(small_build, no_stdlib, monkeypatch):
    small_build()
    assert small_build(train_queries=6)[1] == 2
    (no_stdlib / "many" / "more.py").write_text(numbered_functions(3))
    assert small_build(train_queries=6)[1] == 3
    monkeypatch.setattr(python_docs, "_BUILDER", -1)
    assert small_build(train_queries=6)[1] == 4
    assert small_build(train_queries=6)[1] == 4


def test_an_interrupted_build_is_rebuilt(small_build, tmp_path, monkeypatch):
    counts, _ = small_build()
    moved = []

    def killed(self, target):
        moved.append(target)
        if len(moved) == 3:
            raise KeyboardInterrupt
        return self.rename(target)

    with monkeypatch.context() as context:
        context.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            small_build(train_queries=6)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == {"builder": None}
    assert small_build() == (counts, 3)
    (tmp_path / "out" / "corpus.parquet").unlink()
    assert small_build() == (counts, 4)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["rows"] == counts


def test_too_few_queries_are_reported(small_build, caplog):
    with caplog.at_level(logging.WARNING):
        small_build(unlabelled_queries=500)
    assert "fewer than 505" in caplog.text


def test_standard_library():
    documents = read_documents([]).set_index("doc_id")
    assert len(documents) > 1000
    assert documents.index.is_unique and documents.index.is_monotonic_increasing
    assert 0.15 < (documents["split"] == "dev").mean() < 0.25
    assert documents.groupby("query_id").size().max() <= 8
    assert "json.dumps" in documents.index and "asyncio.gather" in documents.index
    assert not any("._" in name or name.startswith(("test.", "idlelib.")) for name in documents.index)
    assert documents["summary"].str.len().max() <= 1000
    contained = [query.lower() in summary.lower() for query, summary in documents[["query", "summary"]].to_numpy()]
    assert not any(contained)
