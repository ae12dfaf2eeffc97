"""Pairs and groups as tensors: what is cut, what is kept, where the padding stands."""

import copy
import math

import pytest
import torch

from hf_disranker.data.collators import GroupCollator, PairCollator
from hf_disranker.data.groups import load_groups
from hf_disranker.data.templates import STUDENT_TEMPLATES, TEACHER_TEMPLATES, Templates

LONG_QUERY = "read json file write list dict sort plot"
DOCUMENT = "open string number"


@pytest.fixture
def student(tiny_student):
    """Reads 24 tokens, 5 of a query."""
    return PairCollator(tiny_student[1], STUDENT_TEMPLATES, max_length=24, max_query_length=5)


@pytest.fixture
def teacher(tiny_teacher):
    """Reads 48 tokens, 8 of a query."""
    return PairCollator(tiny_teacher[1], TEACHER_TEMPLATES, max_length=48, max_query_length=8)


def read_back(collator, row):
    """The text of a row; the small decoder's tokenizer puts blanks around punctuation."""
    return collator.tokenizer.decode(row["input_ids"]).replace(" :", ":")


def test_pairs_are_encoded_as_the_tokenizer_does(student, judgments):
    queries = [*judgments["query"], "json", "json", "", "读 file", "[SEP] json"]
    documents = [*judgments["summary"], "", DOCUMENT * 30, DOCUMENT, "写 a file", "[CLS] open"]
    queries = [query[:20] for query in queries]  # within the limit of a query
    expected = student.tokenizer(queries, documents, truncation="only_second", max_length=student.max_length)
    found = student.encode(queries, documents)
    for key in ("input_ids", "attention_mask", "token_type_ids"):
        assert [row[key] for row in found.rows] == expected[key]
    assert found.documents_cut == sum(bool(encoding.overflowing) for encoding in expected.encodings) > 0


def test_a_student_reads_a_pair(student):
    encoded = student.encode(["json file"], [DOCUMENT])
    (row,) = encoded.rows
    assert read_back(student, row) == "[CLS] json file [SEP] open string number [SEP]"
    assert row["token_type_ids"] == [0] * 4 + [1] * 4
    assert (encoded.queries_cut, encoded.documents_cut) == (0, 0)


def test_a_teacher_reads_one_text_between_its_special_tokens(teacher):
    (row,) = teacher.encode(["json file"], [DOCUMENT]).rows
    assert read_back(teacher, row) == "<s> query: json file document: open string number</s>"
    assert "token_type_ids" not in row


def test_a_long_query_is_truncated_to_its_own_limit_and_the_document_kept(student, teacher):
    encoded = student.encode([LONG_QUERY, "json", LONG_QUERY], [DOCUMENT] * 3)
    assert read_back(student, encoded.rows[0]) == "[CLS] read json file write list [SEP] open string number [SEP]"
    assert (encoded.queries_cut, encoded.documents_cut) == (2, 0)
    encoded = teacher.encode([LONG_QUERY * 1000], [DOCUMENT])
    text = read_back(teacher, encoded.rows[0])
    assert text.startswith("<s> query: read json") and text.endswith(" document: open string number</s>")
    assert (encoded.queries_cut, encoded.documents_cut) == (1, 0)


def test_a_query_at_its_limit_is_not_truncated(student, teacher):
    assert student.encode(["read json file write list"], [DOCUMENT]).queries_cut == 0
    # No word of the vocabulary starts with z: each letter is a token, and so is the blank before the first.
    assert teacher.encode(["zzzzzzz"], [DOCUMENT]).queries_cut == 0
    assert teacher.encode(["zzzzzzzz"], [DOCUMENT]).queries_cut == 1


def test_a_long_document_loses_its_end_and_keeps_the_last_special_token(student, teacher):
    for collator, end in ((student, "[SEP]"), (teacher, "</s>")):
        encoded = collator.encode(["json", "json"], [(DOCUMENT + " ") * 6000, DOCUMENT])
        assert len(encoded.rows[0]["input_ids"]) == collator.max_length
        assert read_back(collator, encoded.rows[0]).endswith(end)
        assert "json" in read_back(collator, encoded.rows[0])
        assert (encoded.queries_cut, encoded.documents_cut) == (0, 1)


def test_a_long_document_has_the_tokens_that_it_would_have_if_read_whole(student, teacher):
    documents = [f"{DOCUMENT},\t\n{DOCUMENT}  " * repeats for repeats in (2, 3, 4, 5, 7, 8, 9, 400)]
    documents += ["读取 一个 文件" * 90, "zz " * 90, "json" * 90, " " * 90 + "json " * 90]
    for collator in (student, teacher):
        found = collator.encode(["json file"] * len(documents), documents)
        collator._prefix = lambda document: document
        whole = collator.encode(["json file"] * len(documents), documents)
        assert found == whole and found.documents_cut >= 8


def test_truncating_both_keeps_part_of_both(student, teacher):
    for collator in (student, teacher):
        encoded = collator.encode([LONG_QUERY * 2], [(DOCUMENT + " ") * 100])
        assert "read json" in read_back(collator, encoded.rows[0])
        assert "open string number" in read_back(collator, encoded.rows[0])
        assert (encoded.queries_cut, encoded.documents_cut) == (1, 1)


def test_an_empty_document_is_read_as_empty(student, teacher):
    assert read_back(student, student.encode(["json"], [""]).rows[0]) == "[CLS] json [SEP] [SEP]"
    assert read_back(teacher, teacher.encode(["json"], [""]).rows[0]).endswith("document:</s>")


def document_first(tiny_teacher, max_length=48):
    templates = Templates(text="document: {document}\nquery: {query}")
    return PairCollator(tiny_teacher[1], templates, max_length=max_length, max_query_length=8)


def test_a_text_with_the_document_first_loses_the_end_of_the_document(tiny_teacher):
    collator, document = document_first(tiny_teacher), " ".join([DOCUMENT] * 30)
    encoded = collator.encode(["json file"] * 3, [DOCUMENT, document, ""])
    short, long, empty = (row["input_ids"] for row in encoded.rows)
    for ids, text in ((short, DOCUMENT), (empty, "")):
        assert ids == collator.tokenizer(f"document: {text}\nquery: json file")["input_ids"]
    assert len(long) == 48 and encoded.documents_cut == 1
    whole = collator.tokenizer(f"document: {document}\nquery: json file")["input_ids"]
    end = len(collator.tokenizer("\nquery: json file", add_special_tokens=False)["input_ids"]) + 1  # </s>
    assert long == whole[: 48 - end] + whole[-end:]
    assert read_back(collator, encoded.rows[1]).endswith("query: json file</s>")


def test_a_text_with_the_document_first_keeps_a_query_at_its_limit(tiny_teacher):
    encoded = document_first(tiny_teacher).encode([LONG_QUERY * 1000], [(DOCUMENT + " ") * 400])
    assert len(encoded.rows[0]["input_ids"]) == 48
    assert " query: read json" in read_back(document_first(tiny_teacher), encoded.rows[0]).replace("\n", " ")
    assert (encoded.queries_cut, encoded.documents_cut) == (1, 1)


@pytest.mark.parametrize("document", ["", "open", "open string number " * 9])
def test_a_template_that_leaves_no_room_for_a_document_is_refused(tiny_teacher, document):
    templates = Templates(text="{document} " + "sort " * 30 + "{query}")
    collator = PairCollator(tiny_teacher[1], templates, max_length=24, max_query_length=8)
    with pytest.raises(ValueError, match="max_length 24 leaves no room for a document"):
        collator.encode(["json"], [document])


def test_any_script_reaches_the_teacher(teacher):
    text = "🚗 東京 שלום ünï"
    (row,) = teacher.encode(["q"], [text]).rows
    assert text in read_back(teacher, row)


def test_the_words_of_a_template_do_not_count_as_query(tiny_student):
    templates = Templates(query="sort {query}", document="{summary}")
    collator = PairCollator(tiny_student[1], templates, max_length=24, max_query_length=5)
    encoded = collator.encode(["read json file write list"], [DOCUMENT])
    assert encoded.queries_cut == 0
    assert read_back(collator, encoded.rows[0]).startswith("[CLS] sort read json file write list [SEP] open")
    wordy = PairCollator(tiny_student[1], Templates(query="sort " * 10 + "{query}"), max_length=24, max_query_length=5)
    text = read_back(wordy, wordy.encode(["read json file write list"], [(DOCUMENT + " ") * 9]).rows[0])
    assert text == f"[CLS] {'sort ' * 10}read json file write list [SEP] {DOCUMENT} {DOCUMENT} [SEP]"


def test_limits_that_leave_no_room_for_a_document_are_refused(tiny_student):
    with pytest.raises(ValueError, match="max_query_length 9 leaves no room .* max_length 24; it can be 8 at most"):
        PairCollator(tiny_student[1], STUDENT_TEMPLATES, max_length=24, max_query_length=9)


@pytest.mark.parametrize(("side", "places"), [("right", slice(0, 2)), ("left", slice(1, 3))])
def test_the_padding_side_follows_the_tokenizer(student, side, places):
    student.tokenizer = copy.deepcopy(student.tokenizer)
    student.tokenizer.padding_side, student.tokenizer.pad_token = side, "[MASK]"
    rows = [
        {"input_ids": [7, 8, 9], "attention_mask": [1, 1, 1], "token_type_ids": [0, 1, 1]},
        {"input_ids": [7, 8], "attention_mask": [1, 1], "token_type_ids": [0, 1]},
    ]
    batch = student.pad(rows)
    assert {key: tensor[0].tolist() for key, tensor in batch.items()} == rows[0]
    for key, fill in (("input_ids", student.tokenizer.mask_token_id), ("attention_mask", 0), ("token_type_ids", 0)):
        expected = [fill] * 3
        expected[places] = rows[1][key]
        assert batch[key][1].tolist() == expected


def test_ragged_groups_match_hand_example(student, judgments):
    groups = load_groups(judgments[judgments["query_id"].isin(["q0", "q1"])])
    single = load_groups(judgments[judgments["doc_id"] == "d2-0"])
    batch = GroupCollator(student)([groups[0], single[0], groups[1]])
    assert batch["mask"].tolist() == [[True] * 3 + [False], [True] + [False] * 3, [True] * 4]
    assert batch["labels"][batch["mask"]].tolist() == [2, 0, 1, 2, 2, 0, 1, 0]
    assert batch["labels"][0, 3].isnan() and batch["labels"][1, 1:].isnan().all()
    assert batch["teacher_scores"].isnan().all() and batch["teacher_scores"].shape == (3, 4)


def test_pairs_of_a_batch_follow_the_order_of_its_groups(student, judgments):
    some = judgments[judgments["query_id"].isin(["q0", "q5", "q8"])]
    batch = GroupCollator(student)(list(load_groups(some)))
    documents = (some["title"] + " " + some["summary"]).tolist()
    expected = student.pad(student.encode(some["query"].tolist(), documents).rows)
    for key in ("input_ids", "attention_mask", "token_type_ids"):
        assert torch.equal(batch[key], expected[key])
    assert len(batch["input_ids"]) == batch["mask"].sum() == len(some)


def test_groups_of_scores_have_no_labels(student, judgments):
    scores = judgments.drop(columns="label").assign(teacher_score=[place / 8 for place in range(len(judgments))])
    batch = GroupCollator(student)(list(load_groups(scores))[:2])
    assert batch["teacher_scores"][0, :3].tolist() == [0, 0.125, 0.25] and math.isnan(batch["teacher_scores"][0, 3])
    assert batch["teacher_scores"][1].tolist() == [0.375, 0.5, 0.625, 0.75]
    assert batch["labels"].isnan().all()


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 0, 1)])
def test_groups_with_and_without_labels_share_a_batch(student, judgments, order):
    groups = list(load_groups(judgments[judgments["query_id"].isin(["q0", "q1"])]))
    groups.append(groups[0] | {"labels": [None, 1, math.nan], "teacher_scores": [0.5, None, 2.0]})
    del groups[1]["labels"]
    batch = GroupCollator(student)([groups[place] for place in order])
    labels, scores = (batch[key][[order.index(place) for place in range(3)]] for key in ("labels", "teacher_scores"))
    nan = math.nan
    expected = torch.tensor([[2, 0, 1, nan], [nan] * 4, [nan, 1, nan, nan]])
    torch.testing.assert_close(labels, expected, equal_nan=True)
    torch.testing.assert_close(scores, torch.tensor([[nan] * 4, [nan] * 4, [0.5, nan, 2.0, nan]]), equal_nan=True)


def test_a_query_with_too_few_labels_is_named(student, judgments):
    group = load_groups(judgments[judgments["query_id"] == "q0"])[0]
    with pytest.raises(ValueError, match="Query 'q0': 1 labels for 3 documents"):
        GroupCollator(student)([group | {"labels": [1]}])
