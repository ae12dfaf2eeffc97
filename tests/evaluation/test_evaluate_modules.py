"""metrics/pnr and metrics/ndcg: the measures of this package as modules of `evaluate`."""

import math
import runpy
import time
from pathlib import Path

import evaluate
import numpy as np
import pytest
import yaml
from huggingface_hub import HfApi, snapshot_download

from hf_disranker.evaluation import metrics

FOLDER = Path(__file__).parents[2] / "metrics"


@pytest.fixture(scope="module", params=["pnr", "ndcg"])
def measure(request):
    return evaluate.load(str(FOLDER / request.param))


def test_hand_examples():
    # a: labels 2 1 0, ranked 2 0 1: pairs (2,0) (2,1) right, (1,0) wrong. b: tied.
    rows = {"predictions": [3, 1, 2, 5, 5], "references": [2, 1, 0, 1, 0], "query_ids": ["a", "a", "a", "b", "b"]}
    found = evaluate.load(str(FOLDER / "pnr")).compute(**rows)
    assert found == {
        **{"pnr": 2.0, "pair_accuracy": pytest.approx(2 / 3), "pair_accuracy_per_query": pytest.approx(2 / 3)},
        **{"concordant": 2, "discordant": 1, "tied": 1},
    }
    found = evaluate.load(str(FOLDER / "ndcg")).compute(**rows, ks=[3])
    a = (3 + 1 / math.log2(4)) / (3 + 1 / math.log2(3))
    b = (1 + 1 / math.log2(3)) / 2
    assert found == {"ndcg@3": pytest.approx((a + b) / 2), "queries": 2, "queries_without_relevant": 0}


@pytest.mark.parametrize("rows", [2_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_rows_stream_through(measure, rows):
    rng = np.random.default_rng(0)
    scores, labels, queries = rng.normal(size=rows), rng.integers(0, 4, rows), np.arange(rows) // 20
    begin = time.perf_counter()
    for start in range(0, rows, rows // 10):
        part = slice(start, start + rows // 10)
        ids = queries[part].astype(str)
        measure.add_batch(predictions=scores[part], references=labels[part], query_ids=ids)
    found = measure.compute()
    print(f"{time.perf_counter() - begin:.1f} s")
    expected = metrics.evaluate(labels, scores, queries, ks=(5, 10))
    shared = found.keys() & expected.keys()
    assert len(shared) >= 4
    assert {name: found[name] for name in shared} == pytest.approx({name: expected[name] for name in shared})


def test_fractions_are_refused_as_grades(measure):
    rows = {"predictions": [0.1, 0.2, 0.3], "query_ids": ["a", "a", "a"]}
    with pytest.raises(ValueError, match="labels: 2 of 3 values are not whole numbers >= 0, the first at index 1"):
        measure.compute(references=[1, 0.2, 0.9], **rows)
    assert measure.compute(references=[1.0, 0.0, 2.0], **rows) == measure.compute(references=[1, 0, 2], **rows)


@pytest.mark.parametrize("kind", [list, np.array], ids=["list", "numpy"])
def test_query_ids_may_be_integers(measure, kind):
    rows = {"predictions": kind([3, 1, 2, 5, 4]), "references": kind([2, 1, 0, 1, 0])}
    expected = measure.compute(**rows, query_ids=["a", "a", "a", "b", "b"])
    assert measure.compute(**rows, query_ids=kind([10, 10, 10, 9, 9])) == expected
    for start in (0, 3):
        part = slice(start, start + 3)
        measure.add_batch(**{name: values[part] for name, values in rows.items()}, query_ids=[10, 10, 10, 9, 9][part])
    assert measure.compute() == expected


@pytest.mark.parametrize("name", ["pnr", "ndcg"])
def test_the_folders_are_spaces(name, hub, tmp_path, monkeypatch):
    _, front, text = (FOLDER / name / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    space = yaml.safe_load(front)
    assert space["sdk"] == "gradio" and {"evaluate", "metric"} <= set(space["tags"])
    assert (FOLDER / name / "requirements.txt").read_text().split() == ["hf-disranker", "evaluate", "gradio"]
    snippet = text.split("```python\n")[1].split("```")[0].replace("metrics/", f"{FOLDER}/")
    exec(snippet, {})

    repo = f"tester/{name}"
    HfApi().create_repo(repo, repo_type="space", space_sdk="gradio", exist_ok=True)
    HfApi().upload_folder(repo_id=repo, repo_type="space", folder_path=FOLDER / name)
    rows = {"predictions": [3, 1, 2], "references": [2, 1, 0], "query_ids": ["a", "a", "a"]}
    expected = evaluate.load(str(FOLDER / name)).compute(**rows)
    assert evaluate.load(repo).compute(**rows) == expected

    # The page as a Space starts it, and a visitor who asks it.
    gradio_client = pytest.importorskip("gradio_client")
    monkeypatch.chdir(snapshot_download(repo, repo_type="space", local_dir=tmp_path))
    page = runpy.run_path(space["app_file"])["page"]
    _, address, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    try:
        table = {"headers": list(rows), "data": list(map(list, zip(*rows.values(), strict=True)))}
        assert gradio_client.Client(address, verbose=False).predict(table, api_name="/compute") == expected
    finally:
        page.close()
