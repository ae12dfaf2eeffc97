"""The documentation as a site: strict build, search in both languages, footer links within a language."""

import functools
import http.server
import json
import re
import shutil
import threading
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Folder of the built site; a warning or a broken link is an error."""
    pytest.importorskip("jieba")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))
    return folder


def test_the_index_contains_chinese_words(site):
    index = json.loads((site / "search/search_index.json").read_text(encoding="utf-8"))
    separator = re.compile(index["config"]["separator"])
    words = {word for entry in index["docs"] for word in separator.split(entry["title"] + " " + entry["text"])}
    assert {"排序", "教师", "点击", "查询", "蒸馏", "标注"} <= words


def test_next_and_previous_stay_within_a_language(site):
    for page in site.rglob("*.html"):
        footer = re.findall(r'<a href="([^"]+)" class="md-footer__link', page.read_text(encoding="utf-8"))
        for target in footer:
            assert target.endswith(".zh.html") == page.name.endswith(".zh.html"), f"{page.name} leads to {target}"


def test_the_home_pages_show_the_results_of_the_readme(site):
    for name in ("index.html", "index.zh.html"):
        assert "NDCG@10                    PNR" in (site / name).read_text(encoding="utf-8")


@pytest.fixture
def served(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_query_of_two_characters_finds_pages(served):
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium on this machine")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(f"{served}/index.zh.html")
        box = page.locator("input[data-md-component=search-query]")
        box.click()
        for query in ("margin", "排序", "查询"):
            box.fill(query)
            box.press("End")  # the page listens to keys
            found = page.locator(".md-search-result__item mark", has_text=query)
            found.first.wait_for(state="attached", timeout=60_000)
        browser.close()
