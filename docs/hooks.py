"""Hooks of mkdocs: generated parts of pages, line breaks in Chinese text, footer links within a language.

The options of every stage come from the code, the results on the home page from the README. Chinese has no spaces
between words, so line breaks between its characters are removed.
"""

import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_disranker.cli import STAGES, load_stage
from hf_disranker.recipes.command_line import NAMES

OPTIONS = "<!-- options of every stage -->"
RESULTS = "<!-- results of the README -->"
_CJK = "[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]"
_BREAK = re.compile(f"(?<={_CJK})\\n(?={_CJK})")

# From the paper's abstract and first page; facts from summaries are marked as such.
PAPER = {
    ("cpt", "text_template"): "query, title and summary: yes; wording: no",
    ("cpt", "completion_only_loss"): "query in, title and summary out: yes",
    ("fit_teacher", "head"): "last token: yes",
    ("fit_teacher", "label_words"): "no",
    ("fit_teacher", "hinge_weight"): "a rank loss: yes; hinge: by a summary",
    ("distill", "model"): "a BERT: yes; 6 layers: by a summary",
    ("distill", "point_weight"): "the loss: yes; its weight: not known",
    ("distill", "margin_weight"): "the loss: yes; its weight: not known",
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in the generated parts and join lines of Chinese; mkdocs calls this for every page."""
    markdown = _BREAK.sub("", markdown)
    if RESULTS in markdown:
        markdown = markdown.replace(RESULTS, results())
    return markdown.replace(OPTIONS, "\n".join(option_tables())) if OPTIONS in markdown else markdown


def on_nav(nav: Any, **_: Any) -> None:
    """Unlink neighbours of different languages, so that "Next" stays within a language."""
    for page, following in zip(nav.pages, nav.pages[1:], strict=False):
        if _is_chinese(page) != _is_chinese(following):
            page.next_page = following.previous_page = None


def _is_chinese(page: Any) -> bool:
    return page.file.src_uri.endswith(".zh.md")


def results() -> str:
    """Return the table of results in the README, as a block of code."""
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    found = re.search(r"^```\n +parameters.*?^```$", readme, flags=re.M | re.S)
    assert found, "README.md has no table of results."
    return found[0]


def option_tables() -> Iterator[str]:
    """Yield lines of markdown: a section per stage with a table per group of options."""
    for stage, what in STAGES.items():
        recipe = load_stage(stage)
        what = what.strip()
        yield f"\n## disranker {stage}\n\n{what[0].upper() + what[1:] if what[0].isalpha() else f'Stage {what}'}.\n"
        for kind in recipe.make_parser().dataclass_types:
            yield from _option_table(stage, kind)


def _option_table(stage: str, kind: type) -> Iterator[str]:
    """Yield the options of a dataclass that we define or whose default we change."""
    chosen = {name for base in kind.__mro__ if _is_ours(base) for name in inspect.get_annotations(base)} | NAMES.keys()
    rows = [option for option in dataclasses.fields(kind) if option.name in chosen]
    foreign = [base.__name__ for base in kind.__mro__ if dataclasses.is_dataclass(base) and not _is_ours(base)]
    if rows:
        yield f"\n### {kind.__name__} of {stage}\n" if foreign else ""
        yield "| option | default | meaning | stated by the paper? |\n|---|---|---|---|"
    for option in rows:
        # Paths have no counterpart in the paper.
        stated = PAPER.get((stage, option.name), "no" if foreign and option.name not in NAMES else "–")
        name, text = NAMES.get(option.name, option.name), _cell(option.metadata["help"])
        yield f"| `{name}` | {_default(option)} | {text} | {stated} |"
    if foreign:
        yield f"\n{'and all' if rows else 'All'} options of `{foreign[0]}`: see `disranker {stage} --help-all`.\n"


def _is_ours(kind: type) -> bool:
    return kind.__module__.startswith(("hf_disranker", "recipes")) and dataclasses.is_dataclass(kind)


def _default(option: dataclasses.Field) -> str:
    if option.default is not dataclasses.MISSING:
        return "none" if option.default in (None, "") else f"`{option.default}`"
    if option.default_factory is dataclasses.MISSING:
        return "required"
    if option.name == "dataloader_pin_memory":
        return "with a GPU"
    return f"`{option.default_factory()!r}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
