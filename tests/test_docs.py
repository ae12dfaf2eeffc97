"""The snippets of README and docs run as they stand."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from transformers import BertConfig, BertModel

from hf_disranker import ScoreStore
from hf_disranker.candidates import Candidates
from hf_disranker.cli import main
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


def run_all(page):
    """The snippets of a page and its commands `disranker ...`, in their order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    names = {"__name__": page}
    blocks = re.findall(r"```(python|bash)\n(.*?)```", text, flags=re.S)
    for kind, block in blocks:
        if kind == "python":
            exec(compile(block, page, "exec"), names)
        for command in block.replace("\\\n", " ").splitlines() if kind == "bash" else ():
            program, *arguments = shlex.split(command)
            assert program == "disranker"
            main(arguments)
    return len(blocks)


@pytest.fixture
def tables(workshop, candidates, corpus, monkeypatch):
    """What the pages about scoring read."""
    monkeypatch.setattr(sys, "argv", ["disranker"])
    candidates.to_parquet("candidates.parquet")
    corpus.to_parquet("corpus.parquet")
    return candidates


def test_the_page_about_a_billion_pairs(tables, capsys):
    assert run_all("docs/how_to/score_a_billion_pairs.md") == 2
    assert "runs/billion: 57 of 57 pairs, 100.0%" in capsys.readouterr().out
    assert ScoreStore("runs/cluster").missing() == 0


def test_the_page_about_resuming(tables, corpus, capsys):
    shutil.rmtree("runs/scores")
    tables[:50].to_parquet("next_week.parquet")
    corpus.assign(summary=corpus["summary"].where(corpus.index != 9, "changed")).to_parquet("next_corpus.parquet")
    assert run_all("docs/how_to/resume.md") == 3
    printed = capsys.readouterr().out
    assert "runs/scores: 57 of 57 pairs, 100.0%" in printed and "Largest difference: " in printed
    assert "reused     49" in printed and "quantile      there       here      moved" in printed


def test_the_page_about_own_scores(tables, capsys):
    assert run_all("docs/how_to/use_your_own_scores.md") == 2
    assert "runs/overlap: 57 of 57 pairs, 100.0%" in capsys.readouterr().out


def test_the_page_about_several_teachers(tables, student_dir, corpus, capsys):
    shutil.rmtree("runs/scores")
    shutil.copytree(student_dir, "runs/reranker")
    for name, part in (("may", tables[:26]), ("june", tables[26:])):
        engine = load_engine("runs/teacher")
        ScoringRun(engine, Candidates(part, corpus), ScoreStore(f"runs/scores_{name}")).run()
    assert run_all("docs/how_to/use_several_teachers.md") == 3
    assert "teacher    runs/teacher + runs/reranker, mean of several teachers" in capsys.readouterr().out
    assert ScoreStore("runs/scores_all").manifest()["pairs"] == 57


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
