"""Rankings that were measured: written to disk, read again, told in lines, compared with each other."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from hf_disranker.data.outputs import check_output, json_in
from hf_disranker.data.schema import TableError
from hf_disranker.data.trec import KEY, read_judgments, read_run, write_run
from hf_disranker.evaluation.evaluate import best_passages, join_run, measure_slices, per_query, summarise
from hf_disranker.evaluation.significance import Comparison, changed_tops, compare

_PACKAGES = ("hf-disranker", "torch", "transformers", "numpy")


@dataclass
class Evaluation:
    """A ranking and what it is worth; one json file, with two more beside it.

    Args:
        name: what tables and pictures call the ranker.
        rows: a judgments table with label -1 for documents that are not judged, and the column `score`.
        queries: as from `per_query`.
        measures: as from `evaluate`.
        about: what is known of the ranker and the data: model, role, parameters, pairs_per_s, judgments, split ...
    """

    name: str
    rows: pd.DataFrame
    queries: pd.DataFrame
    measures: dict[str, Any]
    about: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, name: str, rows: pd.DataFrame, measures: Sequence[str] = (), by: str | None = None, **about: Any
    ) -> Evaluation:
        """Measure rows with the column `score`."""
        scores = rows["score"].to_numpy()
        queries = per_query(rows, scores, measures)
        found = summarise(rows, scores, queries)
        if by:
            found["slices"] = measure_slices(rows.reset_index(drop=True), scores, measures, by)
        about |= {"packages": {package: version(package) for package in _PACKAGES}}
        return cls(name, rows, queries, found, about)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write PATH (json: the measures, `name`, `about`), PATH.parquet (values by query), PATH.run (TREC run).

        Raises:
            ValueError: as `check_evaluation_output`.
        """
        check_evaluation_output(path)
        queries, run = _side_files(path)
        self.queries.to_parquet(queries, index=False)
        write_run(self.rows, run, self.name)
        text = json.dumps(self.measures | {"name": self.name, "about": self.about}, indent=2, ensure_ascii=False)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str], judgments: pd.DataFrame) -> Evaluation:
        """Read what `save` wrote, with the judgments that it was made with."""
        queries, run = _side_files(path)
        measures = _read_measures(path)
        name, about = measures.pop("name"), measures.pop("about")
        if column := about.get("max_over"):
            judgments = best_passages(judgments.assign(score=0.0), column)
        rows = join_run(judgments.drop(columns="score", errors="ignore"), read_run(run))
        return cls(name, rows, pd.read_parquet(queries), measures, about)


def check_evaluation_output(path: str | os.PathLike[str], inputs: Iterable[str | None] = ()) -> None:
    """Refuse a path where `Evaluation.save` would overwrite anything but an earlier evaluation of that path.

    Args:
        path: as for `Evaluation.save`.
        inputs: what is read to evaluate: paths, or names of another kind.

    Raises:
        ValueError, OSError: as `outputs.check_output`.
    """
    replaces = _is_evaluation(path)
    for file in (path, *_side_files(path)):
        check_output(file, lambda _: replaces, inputs)


def _side_files(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The values by query and the ranking; named after the whole name, so that `lr_0.1` and `lr_0.2` share nothing."""
    return Path(f"{os.fspath(path)}.parquet"), Path(f"{os.fspath(path)}.run")


def _is_evaluation(path: str | os.PathLike[str]) -> bool:
    """Whether a file was written by `Evaluation.save`."""
    found = json_in(path)
    return isinstance(found, dict) and {"name", "about", "intervals"} <= found.keys()


def _read_measures(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The json of an evaluation; ValueError where it is another file, FileNotFoundError where a file is missing."""
    if os.path.isfile(path) and not _is_evaluation(path):
        raise ValueError(f"{path} was not written by `disranker evaluate --out`.")
    for file in (Path(path), *_side_files(path)):
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; `disranker evaluate --out {path}` writes it.")
    return json.loads(Path(path).read_text(encoding="utf-8"))


def load_evaluations(paths: Iterable[str | os.PathLike[str]]) -> list[Evaluation]:
    """Read what `disranker evaluate --out` wrote: json files, or folders of them, whose other files are passed over.

    Raises:
        FileNotFoundError: a file of an evaluation is missing.
        ValueError: there is none, two have one name, or they are not of the same judgments.
    """
    files = [
        file
        for path in map(Path, paths)
        for file in (filter(_is_evaluation, sorted(path.glob("*.json"))) if path.is_dir() else [path])
    ]
    if not files:
        raise ValueError("There is no json of `disranker evaluate --out` at these places.")
    about = [_read_measures(file)["about"] for file in files]
    sources = [(one.get("judgments"), one.get("split")) for one in about]
    for file, source in zip(files, sources, strict=True):
        if source[0] is None or source != sources[0]:
            raise ValueError(f"{file} is not of the same judgments as {files[0]}: {source} and {sources[0]}.")
    # BM25's corpus and a run's lack of one differ; what holds texts serves all.
    texts = [next(filter(None, (one.get(name) for one in about)), None) for name in ("corpus", "queries")]
    judgments = read_judgments(*sources[0], *texts)
    found = [Evaluation.load(file, judgments) for file in files]
    names = [evaluation.name for evaluation in found]
    if len(set(names)) < len(names):
        raise ValueError(f"Rankers need names of their own (`disranker evaluate --name`): {', '.join(names)}.")
    return found


def compare_evaluations(
    evaluations: Sequence[Evaluation], measure: str = "ndcg@10", pairs: Iterable[tuple[str, str]] | None = None
) -> list[Comparison]:
    """Compare rankings of the same judgments; see `significance.compare`. Also tells whose first documents changed.

    Raises:
        ValueError: an evaluation does not have the measure by query.
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


def table_text(measures: Mapping[str, Any]) -> str:
    """The numbers with their intervals, a line each."""
    numbers = {name: value for name, value in measures.items() if isinstance(value, float | int)}
    return "\n".join(
        f"{name:>26} {value:12.4f}{_interval(measures, name)}"
        if isinstance(value, float)
        else f"{name:>26} {value:12d}"
        for name, value in numbers.items()
    )


def _interval(measures: Mapping[str, Any], name: str) -> str:
    """The 95% interval of a measure, if it has one."""
    low, high = measures["intervals"].get(name, (None, None))
    return "" if low is None or high is None else f"  [{low:.4f}, {high:.4f}]"


def slices_text(column: str, found: Mapping[str, Any]) -> str:
    """NDCG@10 by the values of a column, a line each."""
    lines = [f"\n{column:>26}  queries  ndcg@10"]
    for value, measures in found.items():
        shown = f"{measures['ndcg@10']:.4f}" if measures["ndcg@10"] is not None else "-"
        few = "  (few queries)" if measures["few"] else ""
        lines.append(f"{value:>26} {measures['queries']:8d}   {shown}{_interval(measures, 'ndcg@10')}{few}")
    return "\n".join(lines)


def read_expected(path: str) -> dict[str, float | None]:
    """A file of expected measures (yaml), for `differences`; TableError where it holds anything but numbers."""
    with open(path, encoding="utf-8") as file:
        try:
            expected = yaml.safe_load(file)
        except yaml.YAMLError as error:
            raise TableError(f"{path}: is no yaml: {' '.join(str(error).split())}") from error
    if not isinstance(expected, dict):
        raise TableError(f"{path}: holds no measures.")
    for name, value in expected.items():
        if value is not None and not isinstance(value, float | int):
            raise TableError(f"{path}: {name} is {value!r}, not a number.")
    return expected


def differences(measures: Mapping[str, Any], expected: Mapping[str, float | None]) -> list[str]:
    """What differs from expected measures by more than their `tolerance` (a share; by default 0.01)."""
    expected = dict(expected)
    tolerance = expected.pop("tolerance", None)
    tolerance = 0.01 if tolerance is None else tolerance
    lines = []
    for name, wanted in expected.items():
        found: Any = measures.get(name)
        same = found is wanted if found is None or wanted is None else math.isclose(found, wanted, rel_tol=tolerance)
        if not same:
            lines.append(f"  {name}: expected {wanted}, found {found} (tolerance {tolerance:.1%})")
    return lines
