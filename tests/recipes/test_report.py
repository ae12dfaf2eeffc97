"""HTML report and charts."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from hf_disranker.evaluation.evaluate import join_run
from hf_disranker.recipes.rankings import Evaluation
from hf_disranker.recipes.report import charts
from hf_disranker.recipes.report import page as report
from hf_disranker.recipes.report.page import write_report

HOSTILE = """<script>alert("x")</script><img src=http://evil.example/a.png onerror='x()'>&amp;"'"""
VOID = {"meta", "br", "img", "input", "link"}


class Page(HTMLParser):
    """The elements of a page, and whether they are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.texts.append(text)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def evaluations(judgments, tmp_path):
    """BM25, a teacher, and a student of it whose folder holds a log and a record; everywhere hostile texts."""
    rows = judgments.assign(
        query=judgments["query"] + HOSTILE, title=HOSTILE + judgments["title"], summary=judgments["summary"] + HOSTILE
    )
    rng = np.random.default_rng(0)
    teacher = rows["label"] + rng.normal(0, 0.5, len(rows))
    scores = {"bm25": rng.normal(size=len(rows)), "teacher": teacher, "student<b>": 0.5 * teacher - 3}
    student = tmp_path / "student"
    (student / "checkpoint-20").mkdir(parents=True)
    log = [{"step": step, "loss": 1.0, "point_mse": 9 / step, "margin_mse": 8 / step} for step in (1, 2, 3)]
    (student / "checkpoint-20" / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    (student / "run.json").write_text(json.dumps({"options": HOSTILE}))
    about = {"bm25": {"role": "bm25"}, "teacher": {"role": "teacher", "source": "t", "pairs_per_s": 2000.0}}
    about["student<b>"] = {"role": "student", "source": str(student), "teacher": "t", "parameters": 1_500_000}
    about["student<b>"] |= {"documents_cut": 7, "queries_cut": 1}
    facts = {"judgments": "judgments.parquet", "split": "dev"}
    return [
        Evaluation.of(name, rows.assign(score=values), by="split", **about[name], **facts)
        for name, values in scores.items()
    ]


def test_the_report_contains_all_panels_and_facts(evaluations, tmp_path):
    write_report(evaluations, tmp_path / "report.html", titles={"teacher": "LLM teacher"})
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    shown = html.unescape(text)
    assert "<title>Ranking report</title>" in text and len(page.all("table")) == 3
    assert len(page.all("svg")) == 2 + 1 + 3 + 1  # measures, scatter, scores by grade, learning curve
    # The student is the teacher's scores, times 0.5, less 3.
    facts = dict(re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd>", text))
    assert (facts["scale"], facts["offset"], facts["Kendall tau"]) == ("0.50", "-3.00", "1.000")
    assert facts["Truncated by student&lt;b&gt;"] == "7 documents, 1 queries"
    assert facts["Queries"].startswith("12,") and facts["Documents"].startswith(f"{len(evaluations[0].rows)} judged")
    assert "12 queries are fewer than 200" in shown and "point_mse" in shown and "1.5M" in shown and "8 min" in shown
    assert 'class="few"' in text  # the slices have 4 and 8 queries


def test_report_verdict_names_winner_size_and_certainty(evaluations, tmp_path, monkeypatch):
    def verdict():
        write_report(evaluations, tmp_path / "report.html", titles={"student<b>": "student", "bm25": "BM25"})
        found = re.search(
            r"<p class=.verdict.><strong>(.*?)</strong></p>", (tmp_path / "report.html").read_text(encoding="utf-8")
        )
        return html.unescape(found[1])

    evaluations[2].about["pairs_per_s"] = 9000.0  # the teacher's: 2000
    values = (evaluations[2].queries["ndcg@10"] - evaluations[0].queries["ndcg@10"]).dropna()
    difference = rf"\({values.mean():+.3f} NDCG@10, 95% interval [+-]0\.\d+ to [+-]0\.\d+, ".replace("+0", r"\+0")
    teacher = r" and has \d+% of the NDCG@10 at 4\.5 times the speed of teacher\."
    refused = rf"student leads BM25 {difference}not called significant: 12 queries are fewer than 200\){teacher}"
    assert re.fullmatch(refused, verdict())
    monkeypatch.setattr(report, "refusal", lambda queries, bm25: None)
    won = rf"student beats BM25 {difference}Holm-corrected p = 0\.\d{{4}}\){teacher}"
    assert re.fullmatch(won, verdict())
    evaluations.reverse()  # the comparison is now (student, BM25), the verdict stays the same
    assert verdict().split(",")[0] == f"student beats BM25 ({values.mean():+.3f} NDCG@10"


def test_the_verdict_names_the_best_ranker_if_it_is_a_third_one(judgments, tmp_path):
    runs = {"bm25": 0.0, "perfect": 1.0, "other": 0.1}
    evaluations = [
        Evaluation.of(name, judgments.assign(score=weight * judgments["label"] + judgments.index % 3))
        for name, weight in runs.items()
    ]
    evaluations[1] = Evaluation.of("perfect", judgments.assign(score=judgments["label"]))
    write_report(evaluations, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "perfect has the highest NDCG@10 (1.000)." in text and "of the NDCG@10 of" not in text


def test_every_ranker_shown_is_tested(evaluations, tmp_path):
    write_report(evaluations, tmp_path / "report.html", pairs=[("student<b>", "bm25")])
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "student&lt;b&gt; – bm25" in text and "teacher – bm25" in text


def test_verdict_is_on_the_best_distilled_student_against_bm25(evaluations, tmp_path):
    weak, strong = evaluations[2], evaluations[1]
    strong.about |= {"role": "student", "source": "s", "teacher": "t"}
    evaluations = [evaluations[0], weak, strong, replace(weak, name="other")]
    weak.measures["ndcg@10"], strong.measures["ndcg@10"] = 0.7, 0.9
    write_report(evaluations, tmp_path / "report.html", pairs=[("teacher", "student<b>")], titles={"teacher": "best"})
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.search(r"<p class=.verdict.><strong>best leads bm25 ", text)
    assert "best – bm25" in text and "between bm25 and best" in text


def test_a_standardised_student_is_drawn_against_standardised_teacher_scores(judgments, tmp_path):
    # The teacher's scores have mean 4 and deviation 2; the student learned (t - 4) / 2, and is 0.5 above it.
    teacher = 4 + 2 * np.tile([-1.0, 1.0], len(judgments))[: len(judgments)]
    student = (teacher - 4) / 2 + 0.5
    about = {"role": "student", "teacher": "t", "score_transform": {"kind": "affine", "shift": 4.0, "scale": 2.0}}
    write_report(
        [
            Evaluation.of("teacher", judgments.assign(score=teacher), role="teacher", source="t"),
            Evaluation.of("student", judgments.assign(score=student), **about),
        ],
        tmp_path / "report.html",
    )
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    facts = dict(re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd>", text))
    assert (facts["scale"], facts["offset"], facts["RMSE"]) == ("1.00", "+0.50", "0.50")
    assert (facts["offset by query"], facts["order in a query"]) == ("0.50", "0.00")
    assert "teacher, rescaled" in text


def test_documents_missing_from_a_run_are_not_drawn(judgments, tmp_path):
    teacher = judgments.assign(teacher_score=np.arange(len(judgments)) % 7 + 1.0)
    run = teacher.assign(teacher_score=2 * teacher["teacher_score"])[::2]
    about = {"role": "student", "teacher": "t"}
    write_report(
        [
            Evaluation.of("teacher", join_run(judgments, teacher), role="teacher", source="t"),
            Evaluation.of("student", join_run(judgments, run), **about),
        ],
        tmp_path / "report.html",
    )
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    facts = dict(re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd>", text))
    assert facts["scale"] == "2.00" and float(facts["offset"]) == 0


def test_the_report_loads_nothing_and_runs_no_script(evaluations, tmp_path):
    write_report(evaluations, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert {tag for tag, _ in page.elements} & {"script", "img", "link", "iframe", "b", "object", "form"} == set()
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href", "action"):
            assert attributes.get(name, "#").startswith("#"), (tag, attributes)
    assert "url(" not in text and "@import" not in text
    assert text.count("&lt;script&gt;alert(") >= 10  # and the texts are there


def test_the_report_can_be_used_by_keyboard_and_read_aloud(evaluations, tmp_path):
    write_report(evaluations, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.all("html")[0]["lang"] == "en" and len(page.all("h1")) == len(page.all("main")) == 1
    assert page.all("a")[0] == {"class": "skip", "href": "#main"}
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {link["href"][1:] for link in page.all("a")} <= set(ids)
    assert text.count("<caption>") == len(page.all("table"))
    assert all("scope" in cell for cell in page.all("th"))
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in page.all("svg"))
    scrolling = [part for part in page.all("div") if part.get("class") == "scroll"]
    assert all(part["tabindex"] == "0" and part["aria-label"] for part in scrolling) and scrolling
    cells = [cell for cell in page.all("td") if "colspan" not in cell]
    assert all(cell["data-label"] for cell in cells)  # a phone shows cards, whose cells have no column head
    for rule in (":focus-visible", "prefers-color-scheme: dark", "@media print"):
        assert rule in text


def test_gains_and_losses_are_sorted(evaluations, tmp_path):
    write_report(evaluations, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    changes = [float(b) - float(a) for a, b in re.findall(r"</span> ([0-9.]+) → ([0-9.]+)<", text)]
    gains, losses = ([c for c in changes if c * sign > 0] for sign in (1, -1))
    assert gains == sorted(gains, reverse=True) and losses == sorted(losses) and len(gains) > 2
    values = evaluations[2].queries["ndcg@10"] - evaluations[0].queries["ndcg@10"]
    assert gains[0] == pytest.approx(values.max(), abs=0.02)


def test_without_texts_only_ids_are_shown(evaluations, tmp_path, judgments):
    write_report(evaluations, tmp_path / "report.html", texts=False)
    shown = html.unescape((tmp_path / "report.html").read_text(encoding="utf-8"))
    lead = shown.split("Training record of student<b>")[0]
    assert "alert(" not in lead and not any(query in lead for query in judgments["query"])
    assert judgments["doc_id"].iloc[0] in lead or "d1-0" in lead


ABTEST = {"users": {"old<b>": 1000, "new": 1003}, "control": "old<b>", "refusal": None, "measures": []}
EFFECT = {"control": 0.3, "treatment": 0.303, "relative_difference": 0.01, "interval": [0.002, 0.018], "p": 0.0143}


def test_an_ab_test_has_a_panel(evaluations, tmp_path):
    undefined = dict.fromkeys(("control", "treatment", "relative_difference", "p", "p_holm"))
    effects = [
        {"name": "page_ctr", "p_holm": 0.0286} | EFFECT,
        {"name": "dwell", "interval": [None, None]} | undefined,
    ]
    for name, abtest in {"told": ABTEST | {"measures": effects}, "refused": ABTEST | {"refusal": "few users"}}.items():
        write_report(evaluations[:1], tmp_path / f"{name}.html", abtest=abtest)
    told, refused = (Page((tmp_path / f"{name}.html").read_text()).texts for name in ("told", "refused"))
    for text in ("+1.00%", "+0.20% to +1.80%", "0.0143", "0.0286", "not defined"):
        assert text in told
    assert " few users." in refused and "page_ctr" not in refused
    assert any("Users: old<b> 1,000, new 1,003. The control is old<b>." in text for text in told)


def test_a_single_ranker_has_a_report(judgments, tmp_path):
    one = Evaluation.of("one", judgments.drop(columns=["title", "summary"]).assign(score=1.0), role="run")
    write_report([one], tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert len(page.all("table")) == 1 and "Gains and losses" not in page.texts


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
@pytest.mark.parametrize("width", [375, 1280])
def test_a_browser_shows_no_sideways_scrolling(evaluations, tmp_path, width):
    evaluations[0].about["judgments"] = f"runs/{'x' * 80}.parquet"
    write_report(evaluations, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    probe = "<script>document.title = document.documentElement.scrollWidth + ' ' + innerWidth</script></body>"
    (tmp_path / "probed.html").write_text(text.replace("</body>", probe), encoding="utf-8")
    frame = f'<iframe src="probed.html" style="width:{width}px;height:900px;border:0"></iframe>'
    listen = "<script>onload = () => document.title = frames[0].document.title</script>"
    (tmp_path / "frame.html").write_text(frame + listen)
    command = ["chromium", "--headless", "--no-sandbox", "--allow-file-access-from-files", "--dump-dom"]
    shown = subprocess.run([*command, f"file://{tmp_path}/frame.html"], capture_output=True, text=True, timeout=120)
    page, window = map(int, re.search(r"<title>(\d+) (\d+)</title>", shown.stdout).groups())
    assert page <= window == width


# Pictures


def test_ticks_are_round_numbers():
    assert charts.ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert charts.ticks(-7.3, 4) == [-6, -4, -2, 0, 2, 4]
    assert charts.ticks(0.0, 0.0) == [0.0]


def test_points_match_the_axes():
    svg = charts.lines({"a<b": (np.array([0.0, 10.0]), np.array([0.0, 1.0]))}, "x", "y", "spoken")
    root = ElementTree.fromstring(svg)
    (line,) = root.findall(".//polyline")
    (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in line.attrib["points"].split())
    texts = {text.text: text for text in root.findall(".//text")}
    assert x2 - x1 == pytest.approx(charts.WIDTH - 44 - 12)
    assert float(texts["10"].attrib["x"]) == x2 and float(texts["0.2"].attrib["y"]) - 4 == pytest.approx(
        y1 + 0.2 * (y2 - y1), abs=0.11
    )
    assert "a<b" in texts
