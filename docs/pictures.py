"""Make the pictures of the documentation.

python docs/pictures.py                    # the drawings, after the README's table has changed
python docs/pictures.py runs/quickstart    # also report.png and demo.png, photographed from a run
"""

import re
import shutil
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
ERRORS = np.array([2.4, 1.2, 1.9, 0.4, 1.6])  # student less teacher, five documents of a query

_FRAME = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">
<style>
  text {{ font: 16px system-ui, sans-serif; fill: #1f2328; }}
  .quiet {{ fill: #59636e; font-size: 14px; }} .strong {{ font-weight: 600; font-size: 18px; }}
  .middle {{ text-anchor: middle; }} .end {{ text-anchor: end; }} .big {{ font-size: 26px; font-weight: 600; }}
  .box {{ fill: #f6f8fa; stroke: #d1d9e0; }} .ours {{ fill: #ddf4ff; stroke: #54aeff; }}
  .line {{ stroke: #59636e; stroke-width: 1.5; fill: none; }} .head {{ fill: #59636e; }}
  .zero {{ stroke: #59636e; stroke-dasharray: 4 4; }}
  .offset {{ fill: #bf8700; }} .offset-line {{ stroke: #bf8700; stroke-width: 2.5; }}
  .order {{ fill: #0969da; }} .order-line {{ stroke: #0969da; stroke-width: 2.5; }}
  @media (prefers-color-scheme: dark) {{
    text {{ fill: #f0f6fc; }} .quiet {{ fill: #9198a1; }}
    .box {{ fill: #151b23; stroke: #3d444d; }} .ours {{ fill: #121d2f; stroke: #388bfd; }}
    .line, .zero {{ stroke: #9198a1; }} .head {{ fill: #9198a1; }}
    .offset {{ fill: #d29922; }} .offset-line {{ stroke: #d29922; }}
    .order {{ fill: #4493f8; }} .order-line {{ stroke: #4493f8; }}
  }}
</style>
{body}
</svg>
"""


def main() -> None:
    """Write the drawings, and the screenshots if a run is named."""
    table = (ROOT / "README.md").read_text(encoding="utf-8")
    (ROOT / "docs/images/method.svg").write_text(method(table), encoding="utf-8")
    (ROOT / "docs/images/point_and_margin.svg").write_text(point_and_margin(ERRORS), encoding="utf-8")
    if sys.argv[1:]:
        photograph(Path(sys.argv[1]))


def photograph(run: Path, query: str = "train a random forest") -> None:
    """Take the screenshots of the report and of the search page with the models of a quickstart's run."""
    from playwright.sync_api import sync_playwright

    from hf_disranker.recipes.demo.page import DemoArguments, serve

    models = {name: str(run / name) for name in ("student", "teacher")}
    queries = str(ROOT / "recipes/configs/quickstart/queries.txt")
    arguments = DemoArguments(corpus=str(run / "data/corpus.parquet"), queries=queries, **models)
    app, url, _ = serve(arguments, server_name="127.0.0.1", prevent_thread_lock=True)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1300})
        page.goto((run / "report/report.html").absolute().as_uri())
        page.screenshot(path=ROOT / "docs/images/report.png")
        page.set_viewport_size({"width": 1280, "height": 760})
        page.goto(url)
        page.get_by_role("button", name=query).wait_for()
        page.wait_for_timeout(1000)  # until its handlers are bound
        page.get_by_role("button", name=query).click()
        page.wait_for_selector("#results section.teacher ol")
        page.screenshot(path=ROOT / "docs/images/demo.png")
        browser.close()
    app.get_blocks().close()


def method(table: str) -> str:
    """Draw teacher, scores and student, with the showcase's numbers from the README's table."""
    teacher, student = (_row(table, name) for name in ("SmolLM2-135M, not trained", "BERT, distilled"))
    body = [
        *_box(0, 20, 150, 44, "clicks"),
        *_box(0, 78, 150, 44, "judgments"),
        *_box(216, 20, 190, 102, "LLM teacher", "trained to rank, or as it is", "by query likelihood"),
        *_box(0, 216, 150, 44, "unlabelled pairs"),
        *_box(216, 187, 190, 102, "BERT student", "a stock classifier", "on disk", kind="ours"),
        *_arrow(150, 42, 210, 58),
        *_arrow(150, 100, 210, 84),
        *_arrow(150, 228, 262, 128),
        *_arrow(311, 122, 311, 181),
        '<text x="324" y="160" class="quiet">its scores: Point-MSE, Margin-MSE</text>',
        '<text x="430" y="18" class="quiet">in the showcase:</text>',
        *_numbers(64, teacher),
        *_numbers(231, student),
    ]
    label = (
        "Clicks and judgments make an LLM teacher. Its scores of unlabelled pairs make a BERT student. In the "
        f"showcase: teacher, NDCG@10 {teacher[0]}, {teacher[1]} pairs/s; "
        f"student {student[0]}, {student[1]} pairs/s."
    )
    return _FRAME.format(width=640, height=302, label=label, body="\n".join(body))


def _row(table: str, name: str) -> tuple[str, str]:
    """NDCG@10 and pairs/s of a ranker, as the README's table prints them."""
    found = re.search(rf"^{name} +[\d.]+M .*?([\d.]+) +[\d.]+ +([\d,]+)$", table, flags=re.M)
    assert found, f"The README's table has no row '{name}'."
    return found.group(1), found.group(2)


def _numbers(y: int, row: tuple[str, str]) -> list[str]:
    ndcg, speed = row
    return [
        f'<text x="430" y="{y}" class="big">{ndcg}</text><text x="516" y="{y}" class="quiet">NDCG@10</text>',
        f'<text x="430" y="{y + 34}" class="big">{speed}</text>',
        f'<text x="516" y="{y + 34}" class="quiet">pairs/s</text>',
    ]


def _box(x: int, y: int, width: int, height: int, title: str, *lines: str, kind: str = "box") -> list[str]:
    middle = x + width // 2
    first = y + height // 2 + 6 - 11 * len(lines)
    style = "strong middle" if lines else "middle"
    return [
        f'<rect x="{x + 1}" y="{y}" width="{width - 2}" height="{height}" rx="8" class="{kind}"/>',
        f'<text x="{middle}" y="{first}" class="{style}">{title}</text>',
        *(
            f'<text x="{middle}" y="{first + 24 + 20 * i}" class="quiet middle">{line}</text>'
            for i, line in enumerate(lines)
        ),
    ]


def _arrow(x1: int, y1: int, x2: int, y2: int) -> list[str]:
    turn = np.degrees(np.arctan2(y2 - y1, x2 - x1))
    head = f'<path d="M6 0 L-4 -5 L-4 5 Z" transform="translate({x2} {y2}) rotate({turn:.1f})" class="head"/>'
    return [f'<path d="M{x1} {y1} L{x2} {y2}" class="line"/>', head]


def point_and_margin(errors: np.ndarray) -> str:
    """Draw the errors of five documents, split into offset and individual deviations, and the two losses."""
    offset, own = errors.mean(), errors - errors.mean()
    point, variance, margin = (errors**2).mean(), (own**2).mean(), 2 * (own**2).sum() / (len(errors) - 1)
    bottom, unit = 250, 80  # y of error 0; pixels for an error of 1

    def height(error: float) -> float:
        return round(bottom - unit * float(error), 1)

    body = [
        '<text x="0" y="20" class="strong">errors of a query’s documents</text>',
        f'<line x1="0" x2="330" y1="{bottom}" y2="{bottom}" class="zero"/>',
        f'<text x="0" y="{bottom + 22}" class="quiet">0: the teacher’s score</text>',
        f'<line x1="0" x2="330" y1="{height(offset)}" y2="{height(offset)}" class="offset-line"/>',
        f'<text x="0" y="{height(offset) + 20}" class="quiet">mean {offset:.1f}</text>',
    ]
    for place, error in enumerate(errors):
        x = 96 + 54 * place
        body.append(f'<line x1="{x}" x2="{x}" y1="{height(offset)}" y2="{height(error)}" class="order-line"/>')
        body.append(f'<circle cx="{x}" cy="{height(error)}" r="6" class="order"/>')
    body += _bar(390, "Point-MSE", [("offset", offset**2), ("order", variance)], f"{point:.2f}", bottom, unit)
    body += _bar(520, "Margin-MSE", [("order", margin)], f"{margin:.2f}", bottom, unit)
    body += [
        '<rect x="0" y="296" width="14" height="14" class="offset"/>',
        '<text x="22" y="309" class="quiet">offset: mean error, squared</text>',
        '<rect x="230" y="296" width="14" height="14" class="order"/>',
        '<text x="252" y="309" class="quiet">order: variance of the errors (Margin-MSE: 2.5 times)</text>',
    ]
    label = (
        f"Five errors with mean {offset:.1f}. Point-MSE {point:.2f} is the squared mean {offset**2:.2f} plus the "
        f"variance {variance:.2f}. Margin-MSE {margin:.2f} is 2.5 times the variance and does not depend on the mean."
    )
    return _FRAME.format(width=640, height=320, label=label, body="\n".join(body))


def _bar(x: int, name: str, parts: list[tuple[str, float]], total: str, bottom: int, unit: int) -> list[str]:
    lines, y = [], float(bottom)
    for kind, value in parts:
        y -= unit * value
        lines.append(f'<rect x="{x}" y="{y:.1f}" width="86" height="{unit * value:.1f}" class="{kind}"/>')
    lines.append(f'<text x="{x + 43}" y="{y - 10:.1f}" class="middle">{total}</text>')
    return [*lines, f'<text x="{x + 43}" y="{bottom + 22}" class="middle">{name}</text>']


if __name__ == "__main__":
    main()
