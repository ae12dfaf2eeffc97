"""Search page: BM25 results and their re-rankings by the student and the teacher, side by side.

    disranker demo --corpus corpus.parquet --student runs/student --teacher runs/teacher --queries judgments.parquet
    disranker demo --corpus corpus.parquet --student runs/student --space org/name

The page is served on localhost. With --space it is pushed to the Hub as a Space, including corpus and models.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from huggingface_hub import HfApi
from scipy.special import expit

from hf_disranker.data.bm25 import bm25_index, bm25_tokens
from hf_disranker.data.tables import read_table
from hf_disranker.models.hub import pushing
from hf_disranker.models.ranker import Ranker
from hf_disranker.recipes.command_line import RecipeParser, TableArguments, recipe_parser
from hf_disranker.version import __version__

_SHOWN = 10
_PREFERRED = "() => navigator.language.startsWith('zh') ? '中文' : 'English'"
TEXTS: dict[str, dict[str, str]] = json.loads(
    Path(__file__).with_name("demo.json").read_text(encoding="utf-8")
)  # by language


@dataclass
class DemoArguments(TableArguments):
    """Arguments of the search page."""

    corpus: str = field(metadata={"help": "Table of documents: file, URL or Hub data set id."})
    student: str = field(metadata={"help": "Student: folder or Hub id."})
    teacher: str | None = field(default=None, metadata={"help": "Teacher: folder or Hub id; adds a column."})
    queries: str | None = field(
        default=None, metadata={"help": "Example queries: a text file with one per line, or a table."}
    )
    split: str = field(default="", metadata={"help": "Split of the query table; '' for all rows."})
    depth: int = field(default=20, metadata={"help": "Number of documents from BM25."})
    title: str = field(default="Search, ranked by a distilled BERT", metadata={"help": "Heading of the page."})
    port: int | None = field(default=None, metadata={"help": "Port; default: the first free one from 7860."})
    space: str | None = field(default=None, metadata={"help": "Push the page as this Space instead of serving it."})


@dataclass(frozen=True)
class Column:
    """Ranking: row numbers in the corpus, best first, with scores, moves relative to BM25 and the time in seconds."""

    name: str
    places: np.ndarray
    scores: np.ndarray
    moves: np.ndarray
    seconds: float


class Searcher:
    """BM25 search over a corpus with rankers that re-rank its results.

    Args:
        corpus: Corpus table.
        rankers: Rankers by name, in the order of the columns, the fastest first.
        depth: Number of documents from BM25.
    """

    def __init__(self, corpus: pd.DataFrame, rankers: dict[str, Ranker], depth: int = 20) -> None:
        self.corpus, self.rankers, self.depth = corpus, rankers, depth
        self._index = bm25_index(corpus)

    def search(self, query: str) -> Iterator[Column]:
        """Yield the column of BM25, then that of each ranker once it is scored; nothing if BM25 finds no document."""
        start = time.perf_counter()
        count = min(self.depth, len(self.corpus))
        found, scores = self._index.retrieve([bm25_tokens(query)], k=count, show_progress=False)
        places, scores = found[0][scores[0] > 0], scores[0][scores[0] > 0]
        if not len(places):
            return
        yield Column("bm25", places, scores, np.zeros(len(places), int), time.perf_counter() - start)
        documents = self.corpus.iloc[places][["title", "summary"]].to_dict("records")
        for name, ranker in self.rankers.items():
            start = time.perf_counter()
            new = ranker.predict([(query, document) for document in documents])
            order = np.argsort(-new, kind="stable")
            seconds = time.perf_counter() - start
            yield Column(name, places[order], new[order], order - np.arange(len(order)), seconds)


def bar_lengths(column: Column, transform: Mapping[str, float] | None) -> np.ndarray | None:
    """Return the bar of each document, between 0 and 1, on one scale for all queries and both rankers.

    Args:
        column: Ranking; BM25's scores are in another unit and have no bars.
        transform: The student's `score_transform`, which maps teacher scores to the student's scale.

    Returns:
        Logistic function of the scores in the student's scale, shape (documents,); None for BM25.
    """
    if column.name == "bm25":
        return None
    scores = column.scores
    if column.name == "teacher" and transform:
        scores = (scores - transform["shift"]) / transform["scale"]
    return expit(scores)


def render(
    columns: Sequence[Column],
    corpus: pd.DataFrame,
    language: str,
    pending: Sequence[str] = (),
    transform: Mapping[str, float] | None = None,
) -> str:
    """Render the columns as HTML, with a placeholder for each pending ranker; all corpus texts are escaped."""
    texts = TEXTS[language]
    if not columns:
        return f'<p class="nothing" role="status">{texts["nothing"]}</p>'
    parts = []
    for column in columns:
        lengths = bar_lengths(column, transform)
        rows = [
            _row(corpus.iloc[column.places[at]], column.scores[at], lengths, at, _move(column, at, texts))
            for at in range(min(_SHOWN, len(column.places)))
        ]
        facts = texts["facts"].format(ms=max(1.0, 1000 * column.seconds), n=len(column.places))
        parts.append(_section(column.name, texts, facts, f"<ol>{''.join(rows)}</ol>"))
    parts += [_section(name, texts, texts["pending"], "") for name in pending]
    found = len(columns[0].places)
    note = texts["note"].format(n=found, shown=min(_SHOWN, found))
    return f'<div class="columns">{"".join(parts)}</div><p class="note" role="status">{note}</p>'


def _section(name: str, texts: Mapping[str, str], facts: str, body: str) -> str:
    return (
        f'<section class="{name}" aria-label="{texts[name]}"><h2>{texts[name]}</h2>'
        f'<p class="facts">{facts}</p>{body}</section>'
    )


def _row(document: Any, score: float, lengths: np.ndarray | None, at: int, move: str) -> str:
    bar = ""
    if lengths is not None:
        bar = f'<span class="bar" aria-hidden="true"><i style="width:{100 * lengths[at]:.0f}%"></i></span>'
    title = re.sub(r"([._/])", r"\1<wbr>", escape(document["title"] or document["summary"][:80]))
    return (
        f'<li><details><summary><span class="title">{title}</span>{move}'
        f'{bar}<span class="score">{score:.2f}</span></summary><p>{escape(document["summary"])}</p></details></li>'
    )


def _move(column: Column, at: int, texts: dict[str, str]) -> str:
    if column.name == "bm25":
        return ""
    n = int(column.moves[at])
    kind, sign = ("up", f"▲{n}") if n > 0 else ("down", f"▼{-n}") if n < 0 else ("same", "=")
    told = texts[kind].format(n=abs(n))
    return f'<span class="move {kind}" role="img" aria-label="{told}" title="{told}">{sign}</span>'


def example_queries(
    source: str | None, split: str = "", count: int = 6, columns: dict[str, str] | None = None
) -> list[str]:
    """Return the shortest queries of a table, or the first lines of a text file."""
    if source is None:
        return []
    if source.endswith(".txt"):
        return Path(source).read_text(encoding="utf-8").splitlines()[:count]
    rows = read_table(source, "candidates", split=split, texts=False, columns=columns)
    queries = rows["query"].str.strip().unique()
    telling = [query for query in queries if len(bm25_tokens(query)) > 2]
    return sorted(telling, key=len)[:count]


def page(args: DemoArguments) -> Any:
    """Load the models and build the gradio app."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr

    columns = args.column_names()
    corpus = read_table(args.corpus, "corpus", columns=columns)
    names = {"student": args.student} | ({"teacher": args.teacher} if args.teacher else {})
    searcher = Searcher(corpus, {name: Ranker.from_pretrained(path) for name, path in names.items()}, args.depth)
    list(searcher.search(corpus["title"].iloc[0]))  # warm-up
    transform = searcher.rankers["student"].model.config.marker.score_transform
    examples = example_queries(args.queries, args.split, columns=columns)

    def search(query: str, language: str) -> Iterator[str]:
        """Yield the page after each column, so that the teacher delays nothing else."""
        found: list[Column] = []
        for column in searcher.search(query.strip()):
            found.append(column)
            if column.name != "bm25":  # shown together with the student
                yield render(found, corpus, language, [*names][len(found) - 1 :], transform)
        if not found:
            yield render([], corpus, language) if query.strip() else ""

    def speak(language: str) -> tuple[Any, str]:
        texts = TEXTS[language]
        return gr.update(placeholder=texts["placeholder"], label=texts["placeholder"]), f"**{texts['examples']}**"

    with gr.Blocks(title=args.title, fill_width=True) as app:
        with gr.Row(elem_id="head"):
            gr.HTML(f"<h1>{escape(args.title)}</h1>")
            language = gr.Radio(
                [*TEXTS], value="English", label="Language / 语言", container=False, min_width=200, scale=0
            )
        query = gr.Textbox(lines=1, elem_id="query", autofocus=True, label=TEXTS["English"]["placeholder"])
        heading = gr.Markdown(visible=bool(examples), elem_id="examples-heading")
        with gr.Row(elem_id="examples"):
            buttons = [gr.Button(example, size="sm", min_width=0) for example in examples]
        results = gr.HTML(elem_id="results")
        asked = [query, language]
        for button in buttons:
            chosen = button.click(lambda text=button.value: text, None, query)
            chosen.then(search, asked, results, show_progress="hidden")
        query.submit(search, asked, results, show_progress="hidden")
        language.change(speak, language, [query, heading]).then(search, asked, results, show_progress="hidden")
        app.load(None, None, language, js=_PREFERRED).then(speak, language, [query, heading])
    return app


def serve(args: DemoArguments, **options: Any) -> Any:
    """Serve the page without gradio's messages; options are passed to its `launch`."""
    import gradio as gr

    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # no web fonts
    css = Path(__file__).with_name("demo.css").read_text(encoding="utf-8")
    return page(args).launch(theme=theme, css=css, share=False, quiet=True, footer_links=[], **options)


_APP = '''"""Search page created by `disranker demo --space`."""

from hf_disranker.recipes.demo.page import DemoArguments, serve

serve(DemoArguments(**{arguments!r}))
'''
_README = """\
---
title: {title}
emoji: 🔎
colorFrom: blue
colorTo: gray
sdk: gradio
sdk_version: {version}
app_file: app.py
pinned: false
---

BM25 results re-ranked by a distilled BERT and its teacher. Made with hf-disranker {ours}.
"""


def write_space(args: DemoArguments, folder: Path) -> None:
    """Write the files of a Space: app, corpus, local models and example queries."""
    import gradio

    arguments = asdict(args) | {"corpus": "corpus.parquet", "split": ""}
    arguments |= dict.fromkeys(("queries", "port", "space", "columns"))
    columns = args.column_names()
    read_table(args.corpus, "corpus", columns=columns).to_parquet(folder / "corpus.parquet", index=False)
    if examples := example_queries(args.queries, args.split, columns=columns):
        arguments["queries"] = "queries.txt"
        (folder / "queries.txt").write_text("\n".join(examples), encoding="utf-8")
    for name in ("student", "teacher"):
        path = arguments[name]
        if path and os.path.isdir(path):
            unwanted = shutil.ignore_patterns("checkpoint-*", "*.bin", "*.pt", "onnx", "openvino")
            shutil.copytree(path, folder / name, ignore=unwanted)
            arguments[name] = name
    (folder / "app.py").write_text(_APP.format(arguments=arguments), encoding="utf-8")
    (folder / "requirements.txt").write_text(f"hf-disranker[demo]>={__version__}\n", encoding="utf-8")
    readme = _README.format(title=repr(args.title), version=gradio.__version__, ours=__version__)
    (folder / "README.md").write_text(readme, encoding="utf-8")


def make_parser() -> RecipeParser:
    """Return the argument parser of the page."""
    return recipe_parser("demo", __doc__, DemoArguments)


def main(args: DemoArguments) -> None:
    """Serve the page, or push it as a Space."""
    if find_spec("gradio") is None:
        raise ValueError("The page needs gradio: pip install hf-disranker[demo]")
    if args.space is None:
        app, url, _ = serve(args, server_name="127.0.0.1", server_port=args.port, prevent_thread_lock=True)
        print(f"{args.title}: {url} (Ctrl+C ends it)", flush=True)
        app.get_blocks().block_thread()
        return
    api = HfApi()
    with tempfile.TemporaryDirectory() as folder, pushing(api, args.space, None, "space"):
        write_space(args, Path(folder))
        api.create_repo(args.space, repo_type="space", space_sdk="gradio", exist_ok=True)
        api.upload_folder(repo_id=args.space, repo_type="space", folder_path=folder, commit_message="Upload page")
