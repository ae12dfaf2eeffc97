"""Text templates: from the columns query, title, summary to what a model reads."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from string import Formatter


@dataclass(frozen=True)
class Templates:
    """How a query and a document become model input.

    Args:
        query: template of the query; knows the field `query`.
        document: template of the document; knows `title` and `summary`.
        text: None for a model that reads the pair (query, document), as BERT does; else the one text that the model
            reads, with the fields `query` and `document` (the rendered ones). The query stands first, so that all
            documents of a query share their beginning.

    Raises:
        ValueError: a template names a field it does not know, or `text` does not hold the query before the document.

    Examples:
        >>> templates = Templates(text="query: {query} document: {document}")
        >>> templates.render_text("sort a list", templates.render_document("list.sort", "in place"))
        'query: sort a list document: list.sort in place'
    """

    query: str = "{query}"
    document: str = "{title} {summary}"
    text: str | None = None

    def __post_init__(self) -> None:
        _check_fields(self.query, {"query"})
        _check_fields(self.document, {"title", "summary"})
        if self.text is not None and _check_fields(self.text, {"query", "document"}) != ["query", "document"]:
            raise ValueError(f"Template {self.text!r} must hold {{query}} and then {{document}}, each once.")

    def render_query(self, query: str) -> str:
        """The query as the model reads it."""
        return self.query.format(query=query)

    def render_document(self, title: str | None = None, summary: str | None = None) -> str:
        """The document as one string; an empty title or summary leaves no blank at the ends.

        What is not there is an empty text: None, and the NaN that pandas puts in its place.
        """
        return self.document.format(title=_text(title), summary=_text(summary)).strip()

    def prompt(self, query: str) -> str:
        """What of the one text stands before the document, without the blank at its end."""
        assert self.text is not None, "a model that reads pairs has no prompt"
        return self.text.split("{document}")[0].rstrip().format(query=query)

    def render_text(self, query: str, document: str) -> str:
        """The one text that the model reads, of a rendered query and a rendered document."""
        assert self.text is not None, "a model that reads pairs has no single text"
        return self.text.format(query=query, document=document)

    def to_dict(self) -> dict[str, str]:
        """The templates that are set, as the checkpoint's marker stores them."""
        return {name: template for name, template in asdict(self).items() if template is not None}


def _text(value: object) -> object:
    if isinstance(value, str):
        return value
    try:
        return "" if value is None or value != value else value
    except TypeError:  # pandas.NA compares to nothing
        return ""


def _check_fields(template: str, known: set[str]) -> list[str]:
    """The fields of a template in order.

    Only plain names are allowed: a format string can reach attributes, and a width can fill the memory.
    """
    parts = [(name, spec, conversion) for _, name, spec, conversion in Formatter().parse(template) if name is not None]
    fields = [name for name, _, _ in parts]
    if not fields or not set(fields) <= known:
        raise ValueError(f"Template {template!r} has the fields {fields}; it must use {sorted(known)}.")
    if any(spec or conversion for _, spec, conversion in parts):
        raise ValueError(f"Template {template!r} formats a field; it must hold plain names, such as {{{fields[0]}}}.")
    return fields


STUDENT_TEMPLATES = Templates()
TEACHER_TEMPLATES = Templates(text="query: {query} document: {document}")
