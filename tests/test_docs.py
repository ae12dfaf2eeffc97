"""The documentation holds: its snippets run as they stand, its links lead somewhere, its tables are the code's.

A block that cannot run here carries the comment `<!-- not run: reason -->` in the line before it; options of stages
that stand there are parsed all the same.
"""

import copy
import importlib.util
import json
import os
import re
import shlex
import shutil
import sys
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hub_server import USER
from transformers import BertConfig, BertModel

from hf_disranker import Ranker, ScoreStore
from hf_disranker.cli import main
from hf_disranker.data.candidates import Candidates
from hf_disranker.recipes import cpt, distill, fit_teacher
from hf_disranker.recipes.quickstart.from_scratch import small_llama
from hf_disranker.scoring.engines import load_engine
from hf_disranker.scoring.run import ScoringRun

ROOT = Path(__file__).parents[1]
PAGES = sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("README*.md"), *ROOT.glob("docs/**/*.md")])
TRAINING = ("cpt", "fit_teacher", "distill")
# What stands in pages and is no `disranker`: the quickstart has tests of its own, `make install` makes what runs them.
ELSEWHERE = (
    "make quickstart",
    "make demo",
    "make models",
    "make showcase",
    "make test",
    "make install",
    "source .venv/bin/activate",
)


def blocks(page, sections=None):
    """(kind, text, reason not to run it or None) of each python and bash block of the page or of `## N.` sections."""
    text = (ROOT / page).read_text(encoding="utf-8")
    if sections is not None:
        parts = re.split(r"^## (\d+)\. ", text, flags=re.M)
        text = "".join(part for number, part in zip(parts[1::2], parts[2::2], strict=True) if int(number) in sections)
    found = re.findall(r"(?:<!-- not run: (.+?) -->\n)?```(python|bash)\n(.*?)```", text, flags=re.S)
    return [(kind, block, reason or None) for reason, kind, block in found]


def commands(block):
    lines = (line.split(" # ")[0].strip() for line in block.replace("\\\n", " ").splitlines())
    return [line for line in lines if line and not line.startswith(ELSEWHERE)]


def run(page, *added, sections=None):
    """Run the snippets of a page; training commands get some options more. Gives the number of blocks."""
    names = {"__name__": page}
    found = blocks(page, sections)
    for kind, block, reason in found:
        if kind == "python" and not reason:
            exec(compile(block, page, "exec"), names)
        for command in commands(block) if kind == "bash" and not reason else ():
            program, *arguments = shlex.split(command)
            assert program == "disranker", f"{page}: {command}"
            main([*arguments, *(added if arguments[0] in TRAINING else ())])
    return len(found)


@pytest.fixture
def workshop(student_dir, teacher_dir, judgments, tmp_path, monkeypatch):
    """The folders and tables that the stages leave behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["disranker"])
    for name in ("runs/quickstart/student", "runs/student"):
        shutil.copytree(student_dir, name)
    shutil.copytree(teacher_dir, "runs/teacher")
    for name in ("metrics", "recipes"):
        shutil.copytree(ROOT / name, name)
    judgments.to_parquet("judgments.parquet")
    pairs = judgments.drop(columns=["label", "split"])
    ScoringRun(load_engine("runs/teacher"), Candidates(pairs), ScoreStore("runs/scores")).run()


@pytest.fixture
def tables(workshop, candidates, corpus):
    """What the pages about scoring read."""
    candidates.to_parquet("candidates.parquet")
    corpus.to_parquet("corpus.parquet")
    return candidates


@pytest.fixture(scope="session")
def small_models(tiny_student, tiny_teacher):
    """Small models under the names of the real ones, on the Hub of the tests."""
    size = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    layers = {"sentence-transformers/all-MiniLM-L6-v2": 1, "google-bert/bert-base-uncased": 12}
    torch.manual_seed(0)
    for name, count in layers.items():
        BertModel(BertConfig(vocab_size=len(tiny_student[1]), num_hidden_layers=count, **size)).push_to_hub(name)
        tiny_student[1].push_to_hub(name)
    tokenizer = copy.deepcopy(tiny_teacher[1])
    tokenizer.model_max_length = 512
    for part in (small_llama(tokenizer, layers=2, size=32), tokenizer):
        for name in ("Qwen/Qwen3-0.6B-Base", "HuggingFaceTB/SmolLM2-135M"):
            part.push_to_hub(name)


def test_the_page_about_a_billion_pairs(tables, capsys):
    assert run("docs/how_to/score_a_billion_pairs.md") == 3
    assert "runs/billion: 57 of 57 pairs, 100.0%" in capsys.readouterr().out
    assert ScoreStore("runs/cluster").missing() == 0


def test_the_page_about_resuming(tables, corpus, capsys):
    shutil.rmtree("runs/scores")
    tables[:50].to_parquet("next_week.parquet")
    corpus.assign(summary=corpus["summary"].where(corpus.index != 9, "changed")).to_parquet("next_corpus.parquet")
    assert run("docs/how_to/resume.md") == 5
    printed = capsys.readouterr().out
    assert "runs/scores: 57 of 57 pairs, 100.0%" in printed and "Largest difference: " in printed
    assert ScoreStore("runs/new").manifest()["pairs"] == 1 and len(pd.read_parquet("next_scores.parquet")) == 50


def test_the_page_about_own_scores(tables, capsys):
    assert run("docs/how_to/use_your_own_scores.md") == 2
    assert "runs/overlap: 57 of 57 pairs, 100.0%" in capsys.readouterr().out


def test_the_page_about_several_teachers(tables, student_dir, corpus):
    shutil.rmtree("runs/scores")
    shutil.copytree(student_dir, "runs/reranker")
    for name, part in (("may", tables[:26]), ("june", tables[26:])):
        engine = load_engine("runs/teacher")
        ScoringRun(engine, Candidates(part, corpus), ScoreStore(f"runs/scores_{name}")).run()
    assert run("docs/how_to/use_several_teachers.md") == 3
    assert abs(pd.read_parquet("scores.parquet")["teacher_score"].mean()) < 1e-5
    assert len(pd.read_parquet("scores_all.parquet")) == 57


def test_the_page_about_evaluation(tables, judgments, capsys):
    Path("expected.yaml").write_text("tolerance: 1.0\nndcg@10: 0.5\n")
    assert run("docs/how_to/evaluate.md") == 4
    printed = capsys.readouterr().out
    assert "b - a" in printed and "P@5" in printed and "query_words  queries" in printed
    assert Path("runs/report.html").stat().st_size > 10_000


def test_the_page_about_online_tests(workshop, judgments, capsys):
    os.makedirs("runs/quickstart/data")
    judgments.to_parquet("runs/quickstart/data/judgments.parquet")
    assert run("docs/how_to/online.md") == 6
    printed = capsys.readouterr().out
    assert "1,000 users, " in printed and "clicks_per_page" in printed and "device = phone" in printed
    assert "A/B test" in Path("runs/report.html").read_text(encoding="utf-8")


def test_the_page_about_no_labels(tables, small_models, capsys):
    shutil.rmtree("runs")
    assert run("docs/how_to/no_labels.md", "--use_cpu", "true", "--max_steps", "2") == 4
    printed = capsys.readouterr().out
    assert "Scored 57 of 57 pairs" in printed and "'corpus_id': 0" in printed and printed.count("ndcg@10") == 4


def test_the_page_about_the_hub(workshop, capsys):
    pytest.importorskip("mteb", reason="mteb does not install beside the lowest versions")
    assert run("docs/how_to/hub.md") >= 18


def test_the_page_about_speed(workshop, capsys):
    assert run("docs/how_to/speed.md") == 1
    assert "'corpus_id': 0" in capsys.readouterr().out


def test_the_page_about_clicks(workshop, small_models, clicks):
    clicks.assign(users=9).to_parquet("clicks.parquet")
    clicks[:3].to_parquet("held_out.parquet")
    log = clicks[["query", "title", "summary"]].loc[clicks.index.repeat(3)].reset_index(drop=True)
    log.assign(user=[f"u{i % 3}" for i in log.index], position=1 + log.index % 2, seconds=30).to_parquet("log.parquet")
    pd.DataFrame({"position": [1, 2] * 4, "clicked": [1, 0, 1, 1, 1, 0, 1, 0]}).to_parquet("swaps.parquet")
    assert run("docs/how_to/clicks.md", "--use_cpu", "true") == 2
    weights = pd.read_parquet("clicks.parquet")["weight"]
    assert set(weights.round(6)) <= {1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 9.0, 12.0}  # 1 at the top, 4 in place 2


def test_the_page_about_training_names_existing_options():
    assert [reason for _, _, reason in blocks("docs/how_to/training.md")] == ["200,000 steps", "several GPUs"]
    assert (ROOT / "recipes/configs/accelerate/several_gpus.yaml").exists()


def test_the_home_page(workshop, small_models, capsys):
    assert run("docs/index.md") == 2
    assert "'corpus_id': 1" in capsys.readouterr().out


def test_the_page_about_python(workshop, small_models, judgments, hub, capsys, caplog):
    os.makedirs("beir/qrels")
    texts = judgments.rename(columns={"doc_id": "_id", "summary": "text"})[["_id", "title", "text"]]
    texts.to_json("beir/corpus.jsonl", orient="records", lines=True)
    queries = judgments.rename(columns={"query": "text"}).drop_duplicates("query_id")[["query_id", "text"]]
    queries.rename(columns={"query_id": "_id"}).to_json("beir/queries.jsonl", orient="records", lines=True)
    qrels = judgments.rename(columns={"query_id": "query-id", "doc_id": "corpus-id", "label": "score"})
    qrels[["query-id", "corpus-id", "score"]].to_csv("beir/qrels/test.tsv", sep="\t", index=False)
    assert run("docs/how_to/python.md") == 9
    printed = capsys.readouterr().out
    assert "(4, 7)" in printed and "disabled" not in caplog.text
    state = json.loads(max(Path("runs/huber").glob("*/trainer_state.json")).read_text())
    assert {"huber", "margin_mse"} <= set(state["log_history"][0]) and "point_mse" not in state["log_history"][0]
    assert list(Path("runs/logged").rglob("events.out.tfevents*"))
    assert "README.md" in hub.files(f"{USER}/logged")


def test_the_page_about_own_tables(tables, capsys):
    assert run("docs/how_to/own_data.md") == 3
    assert "column 'label'" in capsys.readouterr().out
    assert not pd.read_parquet("my_candidates.parquet").duplicated(["query_id", "doc_id"]).any()


def test_the_page_about_weights_and_depth(workshop, small_models, capsys):
    assert run("docs/how_to/choose_weights_and_depth.md", "--use_cpu", "true", "--max_steps", "2") == 2
    printed = capsys.readouterr().out
    assert re.search(r"^six_layers 0\.\d+ [\d,]+ pairs/s\nthree_layers 0\.\d+ [\d,]+ pairs/s$", printed, flags=re.M)


@pytest.mark.parametrize(
    ("page", "printed"),
    [
        ("last_token", "tensor([3., 5.])"),
        ("point_and_margin", "Point-MSE 2.71, Margin-MSE 1.14\nPoint-MSE 0.46, Margin-MSE 1.14"),
        ("pnr", "4 1 1 4.0"),
        ("score_scale", ""),
        ("sampling", ""),
        ("cascade", "5,439 queries"),
    ],
)
def test_the_concepts_compute_what_they_say(page, printed, tables, capsys):
    assert run(f"docs/concepts/{page}.md") == 1
    assert capsys.readouterr().out.strip().endswith(printed)


def test_the_first_tutorial(workshop, tiny_student, judgments, capsys):
    shutil.copytree("runs/student", "runs/quickstart/base/bert")
    shutil.copytree("runs/scores", "runs/quickstart/scores")
    os.makedirs("runs/quickstart/data")
    judgments.to_parquet("runs/quickstart/data/judgments.parquet")
    assert run("docs/tutorials/first_ranker.md") == 5
    printed = capsys.readouterr().out
    assert "numpy.histogram: bins of a data set" in printed and "57 of 57 pairs" in printed and "ndcg@10" in printed


def raw_export(folder):
    """A click log and judgments as they leave other systems: 40 queries in several spellings, 30 judged, no ids."""
    rng = np.random.default_rng(0)
    words = np.array(
        ["read", "write", "json", "file", "sort", "plot", "open", "list", "table", "date", "path", "number"]
    )
    rows = []
    for number in range(40):
        query = rng.choice(words, 2, replace=False)
        for grade in (2, 1, 0, 0, 0):
            text = [*query[:grade], *rng.choice(words, 4)]
            texts = {
                "product_name": f"{text[0]} &amp; {text[1]}",
                "description": " ".join([*text[2:], str(len(rows))]),
            }
            rows.append({"search_term": f"{query[0]} {query[1]} {number}", **texts, "grade": str(grade)})
    pairs = pd.DataFrame(rows)
    judged = pairs[:150].copy()
    judged.loc[1::5, "search_term"] = judged["search_term"].str.title()
    judged.loc[2, "grade"] = ""
    judged = pd.concat([judged, judged[:1].assign(grade="1")])  # judged twice, with two grades
    judged.columns = ["Search_Term ", "Product_Name", " Description", "Grade"]
    judged.to_csv(folder / "judgments_export.csv", index=False, encoding="utf-8-sig")
    clicked = pairs[pairs["grade"] == "2"].drop(columns="grade")
    log = pd.concat([clicked.assign(user=f"u{number}") for number in range(3)], ignore_index=True)
    log.loc[log["user"] == "u1", "search_term"] = log["search_term"].str.upper().str.replace(" ", "  ") + " "
    log = pd.concat([log, log[:1].assign(search_term=" ")])
    log.to_csv(folder / "click_log.csv", index=False)


def test_the_tutorial_from_a_click_log_to_a_report(workshop, small_models, tmp_path, capsys):
    shutil.rmtree("runs")
    raw_export(tmp_path)
    assert run("docs/tutorials/own_data.md", "--use_cpu", "true", sections=range(7)) == 7
    printed = capsys.readouterr().out
    assert re.search(r"^\d+ clicks, 149 judged pairs, \d+ queries to measure on$", printed, flags=re.M)
    judged = pd.read_csv("judgments.csv")
    assert judged.loc[0, "label"] == 2 and judged.loc[0, "title"].count(" & ") == 1
    dev = {query.casefold() for query in judged.loc[judged["split"] == "dev", "query"]}
    assert 2 <= len(dev) <= 12
    for table in ("clicks.csv", "candidates.csv"):
        queries = set(pd.read_csv(table)["query"])
        assert queries and not {query.casefold() for query in queries} & dev, f"{table} holds development queries"
        assert all(query == " ".join(query.split()) for query in queries)
    clicks = pd.read_csv("clicks.csv")
    assert set(clicks["weight"]) == set(clicks["users"]) == {3}  # three people, in two spellings
    names = {"bm25", "teacher", "student", "labels_alone"}
    assert {path.name for path in Path("runs/eval").glob("*.run")} == {f"{name}.json.run" for name in names}
    assert re.search(r"^student - teacher ", printed, flags=re.M) or "b - a" in printed
    report = Path("runs/report.html").read_text(encoding="utf-8")
    assert all(f"</span> {name}" in report for name in names)


@pytest.mark.slow
def test_the_tutorial_from_a_student_to_a_server(workshop, judgments, capsys):
    judgments.to_csv("judgments.csv", index=False)
    assert run("docs/tutorials/own_data.md", sections=range(7, 9)) == 3
    printed = capsys.readouterr().out
    assert "numpy.histogram Bins of a data set" in printed
    served = json.loads(printed.splitlines()[-1].replace("'", '"'))["scores"]
    pairs = [("plot a histogram", text) for text in ("numpy.histogram Bins of a data set", "smtplib Send mail")]
    assert served == pytest.approx(Ranker.from_pretrained("runs/student").predict(pairs).tolist(), abs=1e-4)


@pytest.mark.parametrize("page", ["tutorials/first_ranker", "tutorials/own_data", "how_to/online"])
def test_both_languages_show_the_same_snippets(page):
    english, chinese = (blocks(f"docs/{page}{ending}") for ending in (".md", ".zh.md"))
    assert english == chinese


def test_pages_link_to_their_translation_and_otherwise_stay_in_their_language():
    """A Chinese page marks its links to English pages; an English page links to its own translation."""
    pages = [ROOT / page for page in PAGES if page.startswith("docs/")]
    for page in pages:
        text, chinese = page.read_text(encoding="utf-8"), page.name.endswith(".zh.md")
        translation = page.name.replace(".zh.md", ".md") if chinese else page.name.replace(".md", ".zh.md")
        link = f"[{'English' if chinese else '中文'}]({translation})"
        assert text.count(link) == (page.with_name(translation) in pages), f"{page.name}: {link}"
        others = re.findall(r"\]\(([^)\s#:]+\.md)[^)]*\)(（英文）)?", text.replace(link, ""))
        for target, marked in others:
            assert target.endswith(".zh.md") == (chinese and not marked), f"{page.name} leads to {target}"


@pytest.mark.parametrize("page", ["README.md", "README_zh.md"])
def test_the_readme(page, tables, small_models, judgments, clicks, corpus):
    for name, table in {"judgments": judgments, "clicks": clicks, "candidates": tables, "corpus": corpus}.items():
        table.to_csv(f"{name}.csv", index=False)
    assert run(page, "--use_cpu", "true") >= 4
    assert Path("runs/bert/eval.json").exists()


def test_both_readmes_show_the_same_results():
    texts = [(ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "README_zh.md")]
    english, chinese = ([re.findall(r"```\n( +parameters.*?)```", text, flags=re.S)] for text in texts)
    assert len(english[0]) == 1 and english == chinese
    rows = [re.findall(r"^\|.*$", text, flags=re.M) for text in texts]
    figures = [[sorted(re.findall(r"\d[\d,.^-]*\d|\d|https:[^)]+", row)) for row in part] for part in rows]
    assert len(rows[0]) > 12 and figures[0] == figures[1]


def test_both_readmes_show_the_same_snippets():
    english, chinese = (
        [re.sub(r" *# .*", "", block) for _, block, _ in blocks(page)] for page in ("README.md", "README_zh.md")
    )
    assert english == chinese


def test_commands_that_are_not_run_have_existing_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("distill.yaml").write_text("student: s\nscores: t\noutput_dir: o\n")
    recipes = {"cpt": cpt, "distill": distill, "fit_teacher": fit_teacher}
    parsed = 0
    for page in PAGES:
        for command in (
            line for kind, block, reason in blocks(page) if reason and kind == "bash" for line in commands(block)
        ):
            stage = re.search(r"(?:disranker |hf_disranker\.recipes\.)(\w+) (.*)", command)
            if stage and stage[1] in recipes:
                recipes[stage[1]].make_parser().parse_args_and_config(shlex.split(stage[2]))
                parsed += 1
    assert parsed >= 2


def test_every_page_with_snippets_is_in_a_test():
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for page in PAGES:
        if any(reason is None for *_, reason in blocks(page)):
            # A Chinese page has the snippets of the English one.
            assert Path(page).stem.removesuffix(".zh") in tests, f"No test runs {page}."


# Links within docs/ are mkdocs' business: `make docs` stops at a broken one.
@pytest.mark.parametrize("page", ["README.md", "README_zh.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"])
def test_links_of_top_level_pages_resolve(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    local = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    assert local
    for target in local:
        path, _, anchor = target.partition("#")
        assert (ROOT / path).exists(), target
        assert not anchor or anchor in anchors(ROOT / path), target


def anchors(page):
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_no_page_links_to_source_files_by_a_relative_path():
    for page in PAGES:
        if page.startswith("docs/"):
            assert not re.search(r"\]\((?:\.\./){2}(?:src|recipes|tests|benchmarks)/", (ROOT / page).read_text()), page


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pictures_match_the_current_numbers():
    pictures = load("pictures")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    drawn = {"method": pictures.method(readme), "point_and_margin": pictures.point_and_margin(pictures.ERRORS)}
    for name, svg in drawn.items():
        xml.etree.ElementTree.fromstring(svg)
        stored = (ROOT / f"docs/images/{name}.svg").read_text(encoding="utf-8")
        assert stored == svg, f"{name}.svg is out of date: run `python docs/pictures.py`"


def test_lines_of_chinese_are_joined_and_paragraphs_kept():
    text = "一行，\n两行。\n\n- 项目\n  half\n三"
    assert load("hooks").on_page_markdown(text) == "一行，两行。\n\n- 项目\n  half\n三"


def test_the_site_lists_every_option_with_its_default():
    hooks = load("hooks")
    tables = hooks.on_page_markdown(f"before\n{hooks.OPTIONS}\nafter")
    assert tables.startswith("before\n") and tables.endswith("\nafter")
    for stage in hooks.STAGES:
        assert f"## disranker {stage}\n" in tables
    assert "| `point_weight` | `0.05` | Weight of Point-MSE, on absolute scores. | the loss: yes;" in tables
    assert "| `hinge_margin` | `1.0` |" in tables and "| `scores` | required |" in tables
    assert tables.count("\n| `model` |") >= 6 and tables.count("\n| `out` |") >= 7
    for (stage, option), stated in hooks.PAPER.items():
        part = tables.split(f"## disranker {stage}\n")[1].split("\n## disranker")[0]
        assert re.search(rf"^\| `{option}` \|.*\| {re.escape(stated)} \|$", part, flags=re.M), (stage, option)


def test_the_site_offers_every_page_and_nothing_from_the_network():
    class Loader(yaml.SafeLoader):
        """Reads mkdocs.yml, whose tags name Python objects."""

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)
    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)
    listed = re.findall(r"[\w/.]+\.md", str(config["nav"]))
    assert sorted(f"docs/{page}" for page in listed) == [page for page in PAGES if page.startswith("docs/")]
    assert config["strict"] and config["theme"]["font"] is False
