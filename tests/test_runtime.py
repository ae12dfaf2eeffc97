"""The light runtime: the checkpoint's scores without torch."""

import json
import shutil
import subprocess
import sys
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import HfApi

from hf_disranker.data.tables import pair_texts
from hf_disranker.models.ranker import Ranker
from hf_disranker.models.student import BertDistilledRanker
from hf_disranker.recipes import export
from hf_disranker.recipes.export import ExportArguments
from hf_disranker.runtime import FILES
from hf_disranker.runtime import Ranker as LightRanker

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(student_dir, tiny_student, tmp_path_factory):
    """An exported student with templates of its own and tight limits."""
    model = BertDistilledRanker.from_pretrained(student_dir)
    templates = {"query": "search {query}", "document": "{title} : {summary}"}
    model.config.disranker |= {"templates": templates, "max_length": 28, "max_query_length": 6}
    source = tmp_path_factory.mktemp("source")
    model.save_pretrained(source)
    tiny_student[1].save_pretrained(source)
    out = tmp_path_factory.mktemp("light")
    export.main(ExportArguments(str(source), str(out / "onnx"), "onnx"))
    return source, out / "onnx"


@pytest.fixture
def pairs(judgments):
    """Pairs of every kind: short, cut documents, cut queries, empty ones, other scripts."""
    long = " ".join(["histogram", "matrix"] * 60)
    odd = [(long, long), ("read", long), (f"  {long}", "json"), ("read", ""), ("如何 read", "文件 ünïcode 😀")]
    return pair_texts(judgments) + odd


def test_scores_are_those_of_the_checkpoint(folder, pairs):
    full, light = Ranker.from_pretrained(folder[0]), LightRanker.from_pretrained(folder[1])
    np.testing.assert_allclose(light.predict(pairs), full.predict(pairs), atol=1e-4)
    np.testing.assert_allclose(light.probabilities(pairs), full.probabilities(pairs), atol=1e-4)
    assert full.queries_cut and full.documents_cut


def test_ranking_is_that_of_the_checkpoint(folder, pairs):
    full, light = Ranker.from_pretrained(folder[0]), LightRanker.from_pretrained(folder[1], threads=1)
    documents = [document for _, document in pairs]
    expected, found = full.rank("read json", documents, top_k=5), light.rank("read json", documents, top_k=5)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == theirs | {"score": pytest.approx(theirs["score"], abs=1e-4)}


def test_single_pairs_and_missing_texts_score_as_in_the_ranker(folder):
    light = LightRanker(folder[1])
    score = light.predict(("read json", "plot"))
    assert np.ndim(score) == 0 and score == light.predict([("read json", "plot")])[0]
    for missing in (None, float("nan")):
        document = {"title": missing, "summary": "plot"}
        assert light.predict([("read json", document)]) == light.predict([("read json", {"summary": "plot"})])


@pytest.mark.parametrize("format", ["onnx", pytest.param("openvino", marks=pytest.mark.slow)])
def test_threads_share_a_ranker(format, folder, pairs, tmp_path):
    source = folder[1]
    if format == "openvino":
        openvino = pytest.importorskip("openvino")
        shutil.copytree(folder[1], tmp_path, ignore=shutil.ignore_patterns("onnx"), dirs_exist_ok=True)
        openvino.save_model(openvino.convert_model(folder[1] / FILES[0]), tmp_path / FILES[1])
        source = tmp_path
    light = LightRanker(source, threads=1)
    jobs = [pairs[start::7] for start in range(7)] * 6
    expected = [light.predict(job) for job in jobs]
    with ThreadPoolExecutor(8) as threads:
        for scores, wanted in zip(threads.map(light.predict, jobs), expected, strict=True):
            np.testing.assert_allclose(scores, wanted, rtol=0, atol=1e-5)


def test_a_missing_folder_is_named():
    for name in ("runs/nothing", "/nowhere/runs/nothing"):
        with pytest.raises(OSError, match=f"{name}: no such folder, and as a Hub id: "):
            LightRanker.from_pretrained(name)


def test_batches_contain_little_padding(folder, pairs, monkeypatch):
    light, filled = LightRanker.from_pretrained(folder[1]), []
    run = light._run
    monkeypatch.setattr(light, "_run", lambda batch: filled.append(batch["attention_mask"].mean()) or run(batch))
    light.predict(pairs)
    assert len(filled) > 1 and min(filled) >= 0.9


def test_it_loads_from_the_hub(folder, pairs, hub):
    repo = HfApi().create_repo("org/light").repo_id
    HfApi().upload_folder(repo_id=repo, folder_path=folder[1])
    before = len(hub.requests)
    light = LightRanker.from_pretrained(repo)
    np.testing.assert_array_equal(light.predict(pairs), LightRanker(folder[1]).predict(pairs))
    assert not any("vocab.txt" in request for request in hub.requests[before:])


def test_a_folder_without_model_is_refused(student_dir):
    with pytest.raises(FileNotFoundError, match="has no exported model; `disranker export` writes one"):
        LightRanker.from_pretrained(student_dir)
    with pytest.raises(FileNotFoundError, match="has no other.onnx"):
        LightRanker.from_pretrained(student_dir, file="other.onnx")


SCRIPT = """
import importlib.util, json, sys, time
start = time.perf_counter()
from hf_disranker.runtime import Ranker
ranker = Ranker.from_pretrained(sys.argv[1])
pairs = json.load(open(sys.argv[2]))
ranker.predict(pairs[:1])
seconds = time.perf_counter() - start
import hf_disranker
print(json.dumps({
    "seconds": seconds,
    "mebibytes": int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024,
    "scores": ranker.predict(pairs).tolist(),
    "torch": any(importlib.util.find_spec(name) for name in ("torch", "transformers", "pandas")),
}))
"""


@pytest.mark.slow
def test_it_runs_without_torch(folder, pairs, tmp_path):
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, ROOT], check=True)
    venv.create(tmp_path / "light", with_pip=True)
    pip = [tmp_path / "light/bin/python", "-m", "pip", "install", "-q"]
    subprocess.run([*pip, "--no-deps", *tmp_path.glob("*.whl")], check=True)
    subprocess.run([*pip, "onnxruntime", "tokenizers", "huggingface_hub", "numpy"], check=True)
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    command = [tmp_path / "light/bin/python", "-c", SCRIPT, folder[1], tmp_path / "pairs.json"]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)  # the first run compiles the modules
    printed = json.loads(subprocess.run(command, check=True, capture_output=True, cwd=tmp_path).stdout)
    assert not printed["torch"]
    np.testing.assert_allclose(printed["scores"], Ranker.from_pretrained(folder[0]).predict(pairs), atol=1e-4)
    assert printed["seconds"] < 1 and printed["mebibytes"] < 150, printed
