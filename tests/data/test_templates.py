"""Templates render columns and nothing else."""

import pytest

from hf_disranker.data.templates import STUDENT_TEMPLATES, TEACHER_TEMPLATES, Templates


def test_the_student_reads_a_pair_and_the_teacher_one_text():
    assert STUDENT_TEMPLATES.render_query("red car") == "red car"
    assert STUDENT_TEMPLATES.render_document("Car", "It is red.") == "Car It is red."
    assert TEACHER_TEMPLATES.render_text("red car", "Car It is red.") == "query: red car document: Car It is red."


def test_an_empty_title_or_summary_leaves_no_outer_whitespace():
    assert STUDENT_TEMPLATES.render_document("", "It is red.") == "It is red."
    assert STUDENT_TEMPLATES.render_document("Car", "") == "Car"
    assert STUDENT_TEMPLATES.render_document("", "") == ""


def test_braces_in_a_text_stay_as_they_are():
    query, document = "{document} {0} {query.__class__}", "{query} }{ %s"
    assert TEACHER_TEMPLATES.render_query(query) == query
    assert TEACHER_TEMPLATES.render_document(document, "{title}") == document + " {title}"
    assert TEACHER_TEMPLATES.render_text(query, document) == f"query: {query} document: {document}"
    assert TEACHER_TEMPLATES.prompt(query) == f"query: {query} document:"


def test_every_text_of_a_query_starts_with_the_prompt():
    templates = Templates(query="<{query}>", text="Q {query}\nD {document} end")
    query = templates.render_query("red")
    assert templates.prompt(query) == "Q <red>\nD"
    assert templates.render_text(query, "car") == "Q <red>\nD car end"


def test_the_document_may_come_first_but_then_it_cannot_be_predicted():
    templates = Templates(text="{document}\nquery: {query}")
    assert templates.document_first and not TEACHER_TEMPLATES.document_first and not STUDENT_TEMPLATES.document_first
    assert templates.render_text("red", "car") == "car\nquery: red"
    with pytest.raises(ValueError, match="the query has to come first"):
        templates.prompt("red")


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ({"query": "{title}"}, r"has the fields \['title'\]; it must use \['query'\]"),
        ({"query": "no field"}, r"has the fields \[\]"),
        ({"query": "{}"}, r"has the fields \[''\]"),
        ({"document": "{title} {url}"}, "'url'"),
        ({"document": "{title.__class__}"}, "title.__class__"),
        ({"document": "{title[0]}"}, "title"),
        ({"query": "{query:{query.__class__}}"}, "formats a field; use plain names, such as {query}"),
        ({"query": "{query:99999999999}"}, "formats a field"),
        ({"query": "{query!r}"}, "formats a field"),
        ({"query": "{query"}, "expected '}'"),
        ({"text": "{query}"}, "needs {query} and {document}, each once"),
        ({"text": "{query} {document} {query}"}, "needs {query} and {document}, each once"),
    ],
)
def test_an_invalid_template_is_refused(templates, message):
    with pytest.raises(ValueError, match=message):
        Templates(**templates)


def test_templates_round_trip_through_the_marker():
    assert STUDENT_TEMPLATES.to_dict() == {"query": "{query}", "document": "{title} {summary}"}
    assert Templates(**TEACHER_TEMPLATES.to_dict()) == TEACHER_TEMPLATES
