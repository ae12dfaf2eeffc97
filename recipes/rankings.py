"""Evaluated rankings: scoring, saving, loading and comparing them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from hf_disranker.data.tables import pair_texts
from hf_disranker.data.trec import KEY, read_judgments, read_run, write_run
from hf_disranker.evaluation.evaluate import best_passages, evaluate, join_run, per_query
from hf_disranker.evaluation.significance import Comparison, changed_tops, compare
from hf_disranker.recipes.outputs import check_output, json_in, save_json

if TYPE_CHECKING:
    from hf_disranker.models.base import PairRanker
    from hf_disranker.scoring.engines import Engine

# Pairs scored at a time, for the progress bar.
_CHUNK = 16_384
_PACKAGES = ("hf-disranker", "torch", "transformers", "numpy")


@dataclass
class Evaluation:
    """An evaluated ranking, saved as a json file and two side files.

    `about` has facts about the ranker and the data: model, role, parameters, pairs_per_s, judgments, split ...
    """

    name: str  # of the ranker, in tables and charts
    rows: pd.DataFrame  # judgments table with label -1 for unjudged documents, and the column `score`
    queries: pd.DataFrame  # result of `per_query`
    measures: dict[str, Any]  # result of `evaluate`
    about: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, name: str, rows: pd.DataFrame, measures: Sequence[str] = (), by: str | None = None, **about: Any
    ) -> Evaluation:
        """Evaluate rows with the column `score`."""
        scores = rows["score"].to_numpy()
        queries = per_query(rows, scores, measures)
        found = evaluate(rows, scores, measures, by, queries)
        about |= {"packages": {package: version(package) for package in _PACKAGES}}
        return cls(name, rows, queries, found, about)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write PATH (json: the measures, `name`, `about`), PATH.parquet (values by query), PATH.run (TREC run).

        Raises:
            ValueError: As in `check_evaluation_output`.
        """
        check_evaluation_output(path)
        queries, run = _side_files(path)
        self.queries.to_parquet(queries, index=False)
        write_run(self.rows, run, self.name)
        save_json(self.measures | {"name": self.name, "about": self.about}, os.fspath(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str], judgments: pd.DataFrame) -> Evaluation:
        """Load an evaluation with the judgments that it was computed from."""
        queries, run = _side_files(path)
        measures = _read_measures(path)
        name, about = measures.pop("name"), measures.pop("about")
        if column := about.get("max_over"):
            judgments = best_passages(judgments.assign(score=0.0), column)
        rows = join_run(judgments.drop(columns="score", errors="ignore"), read_run(run))
        return cls(name, rows, pd.read_parquet(queries), measures, about)


def check_evaluation_output(path: str | os.PathLike[str], inputs: Iterable[str | None] = ()) -> None:
    """Check that `Evaluation.save` overwrites nothing but an earlier evaluation, as `outputs.check_output` does."""
    replaces = _is_evaluation(path)
    for file in (path, *_side_files(path)):
        check_output(file, lambda _: replaces, inputs)


def _side_files(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Return the paths of the values by query and of the run, which extend the full name of `path`."""
    return Path(f"{os.fspath(path)}.parquet"), Path(f"{os.fspath(path)}.run")


def _is_evaluation(path: str | os.PathLike[str]) -> bool:
    """Return True if a file was written by `Evaluation.save`."""
    found = json_in(path)
    return isinstance(found, dict) and {"name", "about", "intervals"} <= found.keys()


def _read_measures(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Load the json of an evaluation; ValueError for another kind of file, FileNotFoundError for a missing one."""
    if os.path.isfile(path) and not _is_evaluation(path):
        raise ValueError(f"{path} was not written by `disranker evaluate --out`.")
    for file in (Path(path), *_side_files(path)):
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; `disranker evaluate --out {path}` writes it.")
    return json_in(path)


def load_evaluations(paths: Iterable[str | os.PathLike[str]]) -> list[Evaluation]:
    """Load evaluations from json files of `disranker evaluate --out`, or from folders, skipping other files there.

    Raises:
        FileNotFoundError: If a file of an evaluation is missing.
        ValueError: If there is no evaluation, two have the same name, or their judgments differ.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        files += filter(_is_evaluation, sorted(path.glob("*.json"))) if path.is_dir() else [path]
    if not files:
        raise ValueError("No json file of `disranker evaluate --out` was found.")
    about = [_read_measures(file)["about"] for file in files]
    sources = [(one.get("judgments"), one.get("split")) for one in about]
    for file, source in zip(files, sources, strict=True):
        if source[0] is None or source != sources[0]:
            raise ValueError(f"{file} has other judgments than {files[0]}: {source} and {sources[0]}.")
    # Only some evaluations, such as BM25's, name a corpus; its texts serve all.
    corpus, queries = (next(filter(None, (one.get(name) for one in about)), None) for name in ("corpus", "queries"))
    columns = {ours: theirs for one in about for ours, theirs in (one.get("columns") or {}).items()}
    judgments = read_judgments(*sources[0], corpus, queries, columns)
    found = [Evaluation.load(file, judgments) for file in files]
    names = [evaluation.name for evaluation in found]
    if len(set(names)) < len(names):
        raise ValueError(f"Rankers need distinct names (`disranker evaluate --name`): {', '.join(names)}.")
    return found


def compare_evaluations(
    evaluations: Sequence[Evaluation], measure: str = "ndcg@10", pairs: Iterable[tuple[str, str]] | None = None
) -> list[Comparison]:
    """Compare rankings of the same judgments by `significance.compare`, with the share of changed top documents.

    Raises:
        ValueError: If an evaluation lacks the measure.
    """
    for one in evaluations:
        if measure not in one.queries.columns:
            raise ValueError(f"{one.name} has no {measure} by query; it has: {', '.join(one.queries.columns[2:])}.")
    values = pd.concat({one.name: one.queries.set_index("query_id")[measure] for one in evaluations}, axis=1)
    scores = pd.concat({one.name: one.rows.set_index(KEY)["score"] for one in evaluations}, axis=1)
    scores, queries = scores.fillna(-np.inf), scores.index.get_level_values("query_id")
    return [
        replace(one, changed={k: changed_tops(scores[one.first], scores[one.second], queries, k) for k in (1, 5, 10)})
        for one in compare({one.name: values[one.name] for one in evaluations}, pairs)
    ]


def score_with(ranker: PairRanker | Engine, rows: pd.DataFrame, progress: bool = True) -> tuple[np.ndarray, float]:
    """Score rows with query, title and summary; return scores, shape (rows,), and pairs per second after warm-up."""
    pairs = pair_texts(rows)
    cut = {name: getattr(ranker, name) for name in ("queries_cut", "documents_cut") if hasattr(ranker, name)}
    ranker.predict(pairs[:256])
    for name, count in cut.items():  # do not count the warm-up
        setattr(ranker, name, count)
    start = time.perf_counter()
    starts = tqdm(range(0, len(pairs), _CHUNK), desc="scoring", disable=not progress, leave=False)
    scores = [ranker.predict(pairs[at : at + _CHUNK]) for at in starts]
    return np.concatenate(scores), len(pairs) / (time.perf_counter() - start)


def describe(ranker: Any) -> dict[str, Any]:
    """Return facts about a `Ranker` or scoring engine for reports."""
    model = ranker.model
    marker = getattr(model.config, "marker", None)
    about = {"role": marker.role if marker else "model", "teacher": ((marker and marker.teacher) or {}).get("id")}
    about |= {"score_transform": marker and marker.score_transform}
    about |= {"parameters": sum(weight.numel() for weight in model.parameters())}
    return about | {name: getattr(ranker, name) for name in ("queries_cut", "documents_cut") if hasattr(ranker, name)}
