"""Infinity, the real program: our checkpoint as it is, under load, and killed in the middle of a scoring run.

It needs an environment of its own, which takes a minute to install; INFINITY_ENV names one that is there already.
"""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import venv
from pathlib import Path

import numpy as np
import pytest
import requests

from hf_disranker.data.candidates import Candidates
from hf_disranker.data.tables import pair_texts
from hf_disranker.recipes import export
from hf_disranker.recipes.export import ExportArguments
from hf_disranker.scoring.engines import HttpEngine
from hf_disranker.scoring.run import ScoringRun
from hf_disranker.scoring.store import ScoreStore

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
LOAD_SECONDS = 10


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    if there := os.environ.get("INFINITY_ENV"):
        return there
    folder = tmp_path_factory.mktemp("infinity")
    venv.create(folder, with_pip=True)
    subprocess.run([folder / "bin/python", "-m", "pip", "install", "-q", "infinity-emb[torch,server]"], check=True)
    return folder


@pytest.fixture(scope="module")
def checkpoint(student_dir, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("reranker"))
    export.main(ExportArguments(student_dir, out, "cross-encoder"))
    return out


@pytest.fixture
def start(environment, checkpoint):
    """Starts the server with the command of docs/how_to/serve.md, on a free port; gives (process, address)."""
    page = (ROOT / "docs/how_to/serve.md").read_text(encoding="utf-8")
    command = re.search(r"^infinity/bin/(infinity_emb .*?)\n```", page, flags=re.S | re.M)[1].replace("\\\n", " ")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    replaced = {"runs/reranker": checkpoint, "7997": port}
    program, *arguments = [replaced.get(word, word) for word in shlex.split(command)]
    running = []

    def start():
        quiet = {"DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0", "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(
            [Path(environment, "bin", program), *arguments],
            env=os.environ | quiet,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        running.append(process)
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if requests.get(f"{url}/health", timeout=5).ok:
                    return process, url
            except requests.RequestException:
                time.sleep(0.2)
        raise AssertionError("Infinity did not start")

    yield start
    for process in running:
        kill(process)


def kill(process):
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_scores_equal_ours_under_load(start, student_ranker, judgments, tmp_path):
    _, url = start()
    pairs = pair_texts(judgments)
    expected = student_ranker.predict(pairs)
    wanted = []
    for rows in judgments.groupby("query_id").indices.values():
        documents = [f"{document['title']} {document['summary']}" for _, document in (pairs[row] for row in rows)]
        body = {"model": "student", "query": pairs[rows[0]][0], "documents": documents, "raw_scores": True}
        wanted.append([body, expected[rows].tolist()])
    (tmp_path / "requests.json").write_text(json.dumps(wanted))
    script = [sys.executable, Path(__file__).parents[1].joinpath("infinity_load.py"), url, tmp_path / "requests.json"]
    hammer = subprocess.Popen([*script, str(LOAD_SECONDS)], stdout=subprocess.PIPE)
    engine, rounds = HttpEngine("infinity", url, "student"), 0
    while hammer.poll() is None:
        np.testing.assert_allclose(engine.predict(pairs), expected, atol=1e-4)
        rounds += 1
    measured = json.loads(hammer.stdout.read())
    assert hammer.returncode == 0 and rounds > 0
    assert measured["difference"] < 1e-4 and measured["scores"] > 100
    times = ", ".join(f"p{share} {1000 * np.percentile(measured['seconds'], share):.1f} ms" for share in (50, 95, 99))
    requests_per_s, pairs_per_s = (n / LOAD_SECONDS for n in (len(measured["seconds"]), measured["scores"]))
    print(f"{requests_per_s:.0f} requests/s, {pairs_per_s:.0f} pairs/s, {times}")


def test_scores_have_a_sigmoid_unless_requested_raw(start, student_ranker):
    _, url = start()
    documents = ["json file", "open the path"]
    body = {"model": "student", "query": "read json", "documents": documents}
    results = requests.post(f"{url}/rerank", json=body, timeout=60).json()["results"]
    found = {one["index"]: one["relevance_score"] for one in results}
    expected = student_ranker.probabilities([("read json", document) for document in documents])
    assert [found[0], found[1]] == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_killed_server_costs_one_shard(start, student_ranker, judgments, tmp_path):
    process, url = start()
    calls = []

    class Mortal(HttpEngine):
        """Its server is killed while the third shard is being scored."""

        def predict(self, pairs, callback=None):
            calls.append(len(pairs))
            if len(calls) == 3:
                kill(process)
            return super().predict(pairs, callback)

    store = ScoreStore(tmp_path / "scores")
    with pytest.raises(OSError):
        ScoringRun(Mortal("infinity", url, "student", retries=1), Candidates(judgments), store, 10).run()
    assert store.shards() == {0, 1}
    _, url = start()
    ScoringRun(HttpEngine("infinity", url, "student"), Candidates(judgments), store, 10).run()
    assert store.missing() == 0 and store.status().failures == {}
    expected = student_ranker.predict(pair_texts(judgments))
    np.testing.assert_allclose(store.read()["teacher_score"], expected, atol=1e-4)
