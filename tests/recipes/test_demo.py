"""The search page: what it computes, what it shows in a browser, what it pushes."""

import shutil
import sys

import numpy as np
import pandas as pd
import pytest

from hf_disranker import cli
from hf_disranker.recipes.demo import page as demo
from hf_disranker.recipes.demo.page import Column, DemoArguments, Searcher

EVIL = "<script>document.title = 'hacked'</script><img src=x onerror=\"document.title='hacked'\"> ${1 + 1}"
CORPUS = pd.DataFrame(
    {
        "doc_id": ["a", "b", "c", "d", "e"],
        "title": ["json json json", "json.load", f"json {EVIL}", "smtplib", "读取文件"],
        "summary": [
            "short",
            "read a json file, with all its many words",
            f"json text {EVIL}",
            "send mail",
            "打开并读取文件",
        ],
    }
)


class ByLength:
    """Scores a document by the number of its letters."""

    def predict(self, pairs):
        return np.array([float(len(document["summary"])) for _, document in pairs])


def test_columns_contain_places_scores_and_moves():
    first, second = Searcher(CORPUS[:4], {"student": ByLength()}).search("json")
    assert first.name == "bm25" and sorted(first.places) == [0, 1, 2] and (np.diff(first.scores) <= 0).all()
    assert second.name == "student" and second.places.tolist() == [2, 1, 0]
    before = {place: at for at, place in enumerate(first.places)}
    assert second.moves.tolist() == [before[place] - at for at, place in enumerate(second.places)]
    assert (np.diff(second.scores) <= 0).all() and first.seconds > 0


def test_chinese_queries_match_and_unknown_words_return_nothing():
    searcher = Searcher(CORPUS, {"student": ByLength()})
    assert [column.places.tolist() for column in searcher.search("读取")] == [[4], [4]]
    assert list(searcher.search("unheard")) == []
    assert "No document shares a word" in demo.render([], CORPUS, "English")
    assert "没有文档" in demo.render([], CORPUS, "中文")


def test_columns_are_yielded_one_by_one():
    class Slow:
        def predict(self, pairs):
            raise AssertionError("the teacher is asked before the student is shown")

    columns = Searcher(CORPUS[:4], {"student": ByLength(), "teacher": Slow()}).search("json")
    assert [next(columns).name for _ in range(2)] == ["bm25", "student"]


def test_the_page_shows_moves_bars_and_times():
    scores = np.array([np.log(3), 0.0, -np.log(3)])  # logistic function: 0.75, 0.5, 0.25
    columns = [
        Column("bm25", np.array([0, 1, 3]), np.array([3.0, 2.0, 1.0]), np.zeros(3, int), 0.002),
        Column("student", np.array([1, 0, 3]), scores, np.array([1, -1, 0]), 0.036),
    ]
    html = demo.render(columns, CORPUS, "English", ["teacher"])
    assert "3 documents in 36 ms" in html and "$" not in html
    assert html.count("▲1") == 1 and html.count("▼1") == 1 and html.count(">=<") == 1
    assert [part.split("%")[0] for part in html.split("width:")[1:]] == ["75", "50", "25"]
    assert html.count("<section") == 3 and html.count("Scoring …") == 1


def test_bars_of_teacher_and_student_share_a_scale():
    column = Column("student", np.arange(2), np.array([0.46, 0.46]), np.zeros(2, int), 0.1)
    (first, second), transform = demo.bar_lengths(column, None), {"shift": 4.0, "scale": 2.0}
    assert first == second == pytest.approx(0.613, abs=1e-3)  # equal scores, equal bars
    teacher = Column("teacher", np.arange(1), np.array([4.92]), np.zeros(1, int), 0.1)  # (4.92 - 4) / 2 = 0.46
    assert demo.bar_lengths(teacher, transform) == pytest.approx(first)


def test_every_text_of_the_corpus_is_escaped():
    columns = list(Searcher(CORPUS, {"student": ByLength()}).search("json"))
    html = demo.render(columns, CORPUS, "English")
    assert "<script>" not in html and "<img" not in html and html.count("&lt;script&gt;") == 4


def test_both_languages_say_the_same_things():
    english, chinese = demo.TEXTS.values()
    assert english.keys() == chinese.keys()


def test_examples_come_from_a_table_or_a_text_file(judgments, tmp_path):
    judgments.assign(query=judgments["query"] + " " + judgments["query_id"] * 2).to_parquet(tmp_path / "q.parquet")
    found = demo.example_queries(str(tmp_path / "q.parquet"), "dev", count=3)
    assert len(found) == 3 and [len(query) for query in found] == sorted(len(query) for query in found)
    (tmp_path / "q.txt").write_text("one\n二\n", encoding="utf-8")
    assert demo.example_queries(str(tmp_path / "q.txt")) == ["one", "二"]
    assert demo.example_queries(None) == []


@pytest.fixture(scope="module")
def served(student_dir, teacher_dir, tmp_path_factory):
    """Address of the page on tiny models and a corpus with hostile texts."""
    folder = tmp_path_factory.mktemp("page")
    CORPUS.to_parquet(folder / "corpus.parquet")
    (folder / "queries.txt").write_text("read json\n读取\n", encoding="utf-8")
    tables = {"corpus": str(folder / "corpus.parquet"), "queries": str(folder / "queries.txt")}
    arguments = DemoArguments(student=student_dir, teacher=teacher_dir, **tables)
    app, url, _ = demo.serve(arguments, server_name="127.0.0.1", prevent_thread_lock=True)
    yield url
    app.get_blocks().close()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium on this machine")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(served, browser):
    """Opens the page in a fresh context; gives the page and what it asked of other machines."""
    contexts = []

    def opened(**options):
        context = browser.new_context(**options)
        contexts.append(context)
        page, strangers = context.new_page(), []
        page.on("request", lambda request: strangers.append(request.url) if is_foreign(request.url) else None)
        page.goto(served)
        page.get_by_role("button", name="read json").wait_for()
        page.wait_for_timeout(500)  # the handlers are bound
        return page, strangers

    def is_foreign(url):
        return not url.startswith((served, "data:", "blob:"))

    yield opened
    for context in contexts:
        context.close()


def titles(page, column):
    return page.locator(f"#results section.{column} .title").all_inner_texts()


def test_a_search_with_mouse_shows_three_columns_and_whole_documents(opened, student_dir):
    from hf_disranker.models.ranker import Ranker

    page, strangers = opened()
    page.locator("#query textarea, #query input").fill("json")
    page.keyboard.press("Enter")
    page.wait_for_selector("#results section.teacher")
    assert sorted(titles(page, "bm25")) == sorted(CORPUS["title"][:3])
    documents = CORPUS[:3][["title", "summary"]].to_dict("records")
    best = Ranker.from_pretrained(student_dir).rank("json", documents)[0]["corpus_id"]
    assert titles(page, "student")[0] == CORPUS["title"][best]
    row = page.locator("#results section.bm25 li", has_text="json.load")
    assert not row.locator("p").is_visible()
    row.locator("summary").click()
    assert row.locator("p").inner_text() == CORPUS["summary"][1]
    assert page.title() != "hacked" and strangers == []
    page.get_by_role("button", name="读取").click()
    page.get_by_text("读取文件").first.wait_for()
    assert titles(page, "student") == ["读取文件"]


def test_a_search_by_keyboard_alone(opened):
    page, _ = opened()

    def go_to(*kinds):
        for _ in range(30):
            if page.evaluate("document.activeElement.tagName") in kinds:
                return
            page.keyboard.press("Tab")
        raise AssertionError(f"no way to {kinds}")

    page.evaluate("document.activeElement.blur()")
    go_to("TEXTAREA")
    page.keyboard.type("json")
    page.keyboard.press("Enter")
    page.wait_for_selector("#results section.teacher")
    go_to("SUMMARY")
    page.keyboard.press("Enter")
    opened_rows = page.locator("#results details[open]")
    assert opened_rows.count() == 1 and opened_rows.locator("p").is_visible()


def test_a_phone_scrolls_down_only_and_speaks_the_browsers_language(opened):
    page, _ = opened(viewport={"width": 390, "height": 844}, locale="zh-CN")
    page.get_by_role("button", name="read json").click()
    page.wait_for_selector("#results section.teacher")
    assert page.locator("#results section.student h2").inner_text() == "学生模型 (BERT)"
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    tops = {name: page.locator(f"#results section.{name}").bounding_box()["y"] for name in ("student", "bm25")}
    assert tops["student"] < tops["bm25"]


def test_a_missing_gradio_is_named_before_a_table_is_read(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(sys, "argv", ["disranker"])
    for options in ([], ["--space", "org/search"]):
        with pytest.raises(
            SystemExit, match=r"disranker demo: The page needs gradio: pip install hf-disranker\[demo\]"
        ):
            cli.main(["demo", "--corpus", "nowhere.parquet", "--student", "nowhere", *options])


def test_a_space_contains_everything_it_needs(hub, student_dir, teacher_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    CORPUS.to_parquet("corpus.parquet")
    (tmp_path / "queries.txt").write_text("read json\n")
    local = {"corpus": "corpus.parquet", "queries": "queries.txt"}
    demo.main(DemoArguments(student=student_dir, teacher="org/teacher", title="Find: it", space="org/search", **local))
    files = hub.files("org/search", kind="space")
    assert files["requirements.txt"].startswith(b"hf-disranker[demo]")
    front = files["README.md"].decode().split("---")[1]
    assert "\nsdk: gradio\n" in front and "\napp_file: app.py\n" in front and "\ntitle: 'Find: it'\n" in front
    for path, content in files.items():
        (tmp_path / "space" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "space" / path).write_bytes(content)
    monkeypatch.chdir(tmp_path / "space")
    given = []
    monkeypatch.setattr(demo, "serve", given.append)
    exec(compile(files["app.py"], "app.py", "exec"), {})
    (arguments,) = given
    assert (arguments.student, arguments.teacher, arguments.space) == ("student", "org/teacher", None)
    arguments.teacher = None
    assert demo.page(arguments).title == "Find: it"
