"""The snippets of README and docs run as they stand."""

import re
import shutil
from pathlib import Path

import pytest
from transformers import BertConfig, BertModel

from hf_disranker import ScoreStore
from hf_disranker.candidates import Candidates
from hf_disranker.engines import load_engine
from hf_disranker.scoring import ScoringRun

ROOT = Path(__file__).parents[1]


@pytest.fixture
def workshop(student_dir, teacher_dir, judgments, tmp_path, monkeypatch):
    """The folders and tables that the stages leave behind."""
    monkeypatch.chdir(tmp_path)
    for name in ("runs/quickstart/student", "runs/student"):
        shutil.copytree(student_dir, name)
    shutil.copytree(teacher_dir, "runs/teacher")
    shutil.copytree(ROOT / "metrics", "metrics")
    judgments.to_parquet("judgments.parquet")
    pairs = judgments.drop(columns=["label", "split"])
    ScoringRun(load_engine("runs/teacher"), Candidates(pairs), ScoreStore("runs/scores")).run()


def run_snippets(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    names = {"__name__": page}
    snippets = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    for snippet in snippets:
        exec(compile(snippet, page, "exec"), names)
    return len(snippets)


def test_the_page_about_the_hub(workshop, capsys):
    assert run_snippets("docs/how_to/hub.md") >= 18


def test_the_readme(workshop, tiny_student, capsys):
    tokenizer = tiny_student[1]
    minilm = "sentence-transformers/all-MiniLM-L6-v2"
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    plain = BertModel(BertConfig(vocab_size=len(tokenizer), **size))
    plain.push_to_hub(minilm)  # under that name, on the Hub of the tests
    tokenizer.push_to_hub(minilm)
    assert run_snippets("README.md") >= 2
