"""Text templates: from the columns query, title and summary to model input."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from string import Formatter


@dataclass(frozen=True)
class Templates:
    """Templates of a query and a document as model input.

    Args:
        query: Query template with the field `query`.
        document: Document template with the fields `title` and `summary`.
        text: None for models with a pair input (query, document), such as BERT. Otherwise the template of a single
            text, with the rendered `query` and `document` as fields. With the query first, all documents of a query
            share a prefix; with the document first, the text is that of a likelihood teacher.

    Raises:
        ValueError: If a template has an unknown field, or `text` lacks one or repeats it.

    Examples:
        >>> templates = Templates(text="query: {query} document: {document}")
        >>> templates.render_text("sort a list", templates.render_document("list.sort", "in place"))
        'query: sort a list document: list.sort in place'
    """

    query: str = "{query}"
    document: str = "{title} {summary}"
    text: str | None = None

    def __post_init__(self) -> None:
        template_fields(self.query, {"query"})
        template_fields(self.document, {"title", "summary"})
        if self.text is not None and sorted(_text_fields(self.text)) != ["document", "query"]:
            raise ValueError(f"Template {self.text!r} needs {{query}} and {{document}}, each once.")

    @property
    def document_first(self) -> bool:
        """Whether the single text has the document before the query."""
        return self.text is not None and _text_fields(self.text)[0] == "document"

    def render_query(self, query: str) -> str:
        """Render the query."""
        return self.query.format(query=query)

    def render_document(self, title: str | None = None, summary: str | None = None) -> str:
        """Render the document without whitespace at the ends; a missing title or summary (None, NaN) is empty."""
        return self.fill_document(title, summary).strip()

    def fill_document(self, title: str | None = None, summary: str | None = None) -> str:
        """Like `render_document`, with the whitespace at the ends."""
        return self.document.format(title=_text(title), summary=_text(summary))

    def prompt(self, query: str) -> str:
        """Render the part of the single text before the document, without trailing whitespace.

        Raises:
            ValueError: If the document comes first.
        """
        assert self.text is not None, "a model that reads pairs has no prompt"
        if self.document_first:
            raise ValueError(f"Template {self.text!r}: to predict the document, the query has to come first.")
        return self.text.split("{document}")[0].rstrip().format(query=query)

    def render_text(self, query: str, document: str) -> str:
        """Render the single text from a rendered query and document."""
        assert self.text is not None, "a model that reads pairs has no single text"
        return self.text.format(query=query, document=document)

    def to_dict(self) -> dict[str, str]:
        """Return the templates that are not None, as stored in the checkpoint's marker."""
        return {name: template for name, template in asdict(self).items() if template is not None}


def _text(value: object) -> object:
    if isinstance(value, str):
        return value
    try:
        return "" if value is None or value != value else value
    except TypeError:  # pandas.NA compares to nothing
        return ""


def _text_fields(text: str) -> list[str]:
    return template_fields(text, {"query", "document"})


def template_fields(template: str, known: set[str]) -> list[str]:
    """Return the fields of a template in order; ValueError for others than the known ones, or none.

    Only plain names are allowed: a format string can reach attributes, and a width can exhaust memory.
    """
    parts = [(name, spec, conversion) for _, name, spec, conversion in Formatter().parse(template) if name is not None]
    fields = [name for name, _, _ in parts]
    if not fields or not set(fields) <= known:
        raise ValueError(f"Template {template!r} has the fields {fields}; it must use {sorted(known)}.")
    if any(spec or conversion for _, spec, conversion in parts):
        raise ValueError(f"Template {template!r} formats a field; use plain names, such as {{{fields[0]}}}.")
    return fields


STUDENT_TEMPLATES = Templates()
TEACHER_TEMPLATES = Templates(text="query: {query} document: {document}")
# Of a language model that scores by query likelihood.
LIKELIHOOD_TEMPLATE = "{title}\n{summary}\nIn one sentence: {query}"
