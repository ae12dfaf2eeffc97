"""The pages about export and search stacks run as they stand."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

import pandas as pd
import pytest

from hf_disranker.cli import main
from hf_disranker.data.tables import pair_texts
from hf_disranker.models.ranker import Ranker

pytestmark = pytest.mark.slow
HOW_TO = Path(__file__).parents[2] / "docs/how_to"


@pytest.fixture
def workshop(student_dir, teacher_dir, student_ranker, judgments, tmp_path, monkeypatch):
    """A student, a teacher, and pairs that the student tells apart: random weights score most too alike for int8."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["disranker"])
    shutil.copytree(student_dir, "runs/student")
    shutil.copytree(teacher_dir, "runs/teacher")
    scores = pd.Series(student_ranker.predict(pair_texts(judgments))).groupby(judgments["query_id"])
    judgments.loc[sorted([*scores.idxmax(), *scores.idxmin()])].to_parquet("judgments.parquet")


def blocks(page, kind):
    text = (HOW_TO / page).read_text(encoding="utf-8")
    return re.findall(rf"```{kind}\n(.*?)```", text, flags=re.S)


def run_commands(page):
    """The page's commands `disranker ...`."""
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    for line in lines:
        if line.startswith("disranker "):
            main(shlex.split(line)[1:])


def test_the_page_about_export(workshop, capsys):
    run_commands("export.md")
    for snippet in blocks("export.md", "python"):
        exec(compile(snippet, "export.md", "exec"), {})
    assert "'corpus_id'" in capsys.readouterr().out
    assert len(list(Path("runs/exported").rglob("*model*"))) == 5  # ONNX twice, OpenVINO's two, the weights
    assert Path("runs/teacher_vllm/score_template.jinja").exists()


def test_the_page_about_search_stacks(workshop):
    """Its Python snippets give the ranker's scores in an environment that sees ours and adds the stacks."""
    run_commands("search_stacks.md")
    text = (HOW_TO / "search_stacks.md").read_text(encoding="utf-8")
    stacks = Path(os.environ.get("STACKS_ENV", "stacks"))  # one that is there already saves minutes
    if not stacks.exists():
        venv.create(stacks, with_pip=True)
        (site,) = stacks.glob("lib/python*/site-packages")
        (site / "ours.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
        wanted = sorted({name for line in re.findall(r"`pip install ([^`]*)`", text) for name in line.split()})
        subprocess.run([stacks / "bin/python", "-m", "pip", "install", "-q", *wanted], check=True)
    setting, *snippets = blocks("search_stacks.md", "python")
    names: dict = {}
    exec(setting, names)
    pairs = [(names["query"], document) for document in names["documents"]]
    expected = Ranker.from_pretrained("runs/student").predict(pairs).tolist()
    assert len(snippets) == 5
    for snippet in snippets:
        code = f"{setting}\n{snippet}\nprint([float(score) for score in scores])\n"
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        ended = subprocess.run([stacks / "bin/python", "-c", code], capture_output=True, text=True, env=environment)
        assert ended.returncode == 0, ended.stderr
        assert json.loads(ended.stdout.splitlines()[-1]) == pytest.approx(expected, abs=1e-4), snippet
