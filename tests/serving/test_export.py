"""Export: every format returns the ranker's scores, or is not written."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from transformers import LlamaForSequenceClassification

from hf_disranker.data.tables import pair_texts
from hf_disranker.models.ranker import Ranker
from hf_disranker.models.teacher import LLMForLastTokenRanking
from hf_disranker.recipes import export as recipe
from hf_disranker.recipes.export import ExportArguments
from hf_disranker.runtime import Ranker as LightRanker
from hf_disranker.serving import export
from hf_disranker.serving.export import Parity, compare

EQUAL = Parity(9, 0.0, 1.0, 1.0, None, [2.0, 3.0], [1.0, 1.5])


@pytest.fixture
def table(judgments, tmp_path):
    path = tmp_path / "pairs.parquet"
    judgments.to_parquet(path)
    return str(path)


@pytest.fixture(scope="module")
def exported(student_dir, tmp_path_factory):
    """All formats of the tiny student in one folder, on the built-in pairs."""
    out = str(tmp_path_factory.mktemp("exported"))
    for kind in ("cross-encoder", "onnx", "openvino"):
        recipe.main(ExportArguments(student_dir, out, kind))
    return Path(out)


@pytest.mark.parametrize("file", ["onnx/model.onnx", "openvino/openvino_model.xml"])
def test_fp32_formats_match_the_rankers_scores(exported, student_ranker, judgments, file):
    pairs = pair_texts(judgments)
    scores = LightRanker(exported, file).predict(pairs)
    np.testing.assert_allclose(scores, student_ranker.predict(pairs), atol=1e-4)


def test_the_graph_is_what_other_runtimes_accept(exported):
    model = onnx.load(exported / "onnx/model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)] and model.ir_version == 8
    assert {node.domain for node in model.graph.node} == {""}
    axes = {
        tensor.name: [axis.dim_param or axis.dim_value for axis in tensor.type.tensor_type.shape.dim]
        for tensor in [*model.graph.input, *model.graph.output]
    }
    both = ["batch", "sequence"]
    assert axes == {"input_ids": both, "attention_mask": both, "token_type_ids": both, "logits": ["batch", 1]}


def test_the_folder_contains_what_loaders_need(exported, tiny_student):
    tokenizer = tiny_student[1]
    words = (exported / "vocab.txt").read_text(encoding="utf-8").splitlines()
    assert words == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["disranker"]["max_length"] == 64 and config["disranker"]["max_query_length"] == 32
    tokens = json.loads((exported / "tokenizer.json").read_text())
    assert tokens["truncation"] is None and tokens["padding"] is None
    assert json.loads((exported / "tokenizer_config.json").read_text())["model_max_length"] == 64
    card = (exported / "README.md").read_text(encoding="utf-8")
    assert card.count("## Exports") == 1
    for kind in ("cross-encoder", "onnx", "openvino"):
        assert f"| {kind} | 9 | " in card


def test_a_teacher_is_served_with_its_own_text(teacher_dir, teacher_ranker, table, judgments, tmp_path):
    out = tmp_path / "vllm"
    parity = recipe.main(ExportArguments(teacher_dir, str(out), "vllm", table))
    assert parity.max_difference < 1e-4 and parity.pairs == len(judgments)
    template = (out / "score_template.jinja").read_text()
    messages = [{"role": "query", "content": "read {json}"}, {"role": "document", "content": "open a file"}]
    text = teacher_ranker.collator.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    assert text == "query: read {json} document: open a file"
    stock = LlamaForSequenceClassification.from_pretrained(out)
    inputs = teacher_ranker.collator.tokenizer(text, return_tensors="pt")
    with torch.inference_mode():
        score = stock(input_ids=inputs["input_ids"]).logits.item()
    assert score == pytest.approx(teacher_ranker.predict([("read {json}", "open a file")])[0], abs=1e-5)


@pytest.mark.parametrize("kind", ["vllm", "onnx"])
def test_a_format_of_the_other_role_is_refused(student_dir, teacher_dir, tmp_path, kind):
    model = student_dir if kind == "vllm" else teacher_dir
    with pytest.raises(ValueError, match="vllm is the format for teachers"):
        recipe.main(ExportArguments(model, str(tmp_path / "out"), kind))


def test_a_teacher_without_score_row_is_refused(teacher_dir, tiny_teacher, tmp_path):
    teacher = LLMForLastTokenRanking.from_pretrained(teacher_dir)
    del teacher.score  # as where the score is an expected label
    with pytest.raises(ValueError, match="no score row"):
        export.write_vllm(Ranker(teacher, tiny_teacher[1]), tmp_path)


def test_a_missing_library_is_named(student_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ValueError, match=r"openvino.*: pip install hf-disranker\[onnx\] or hf-disranker\[openvino\]"):
        recipe.main(ExportArguments(student_dir, str(tmp_path / "out"), "openvino"))


def test_nothing_is_written_if_scores_change(student_dir, table, tmp_path, monkeypatch):
    def wrong(ranker, folder):
        return lambda pairs: ranker.predict(pairs)[::-1]

    monkeypatch.setattr(export, "write_onnx", wrong)
    with pytest.raises(ValueError, match="Nothing was written: onnx changes the scores too much"):
        recipe.main(ExportArguments(student_dir, str(tmp_path / "out"), "onnx", table))
    assert not (tmp_path / "out").exists()


def test_parity_by_hand(judgments):
    rows = judgments[judgments["query_id"].isin(["q0", "q1"])]  # three and four documents
    old = np.array([3.0, 1.0, 2.0, 4.0, 3.0, 2.0, 1.0])
    new = old.copy()
    new[[1, 2]] = 2.0, 1.0  # one of three pairs of q0 swapped
    new[6] = 1.5
    answers = {"old": old, "new": new}

    def scorer(name):
        return lambda pairs: answers[name]

    parity = compare(scorer("old"), scorer("new"), rows)
    assert parity.max_difference == 1.0 and parity.tau == pytest.approx((1 / 3 + 1) / 2) and parity.top1 == 1.0
    # Labels of q0 are 2, 0, 1: the swap moves its gain of 1 from the second place to the third.
    assert parity.ndcg_change == pytest.approx(((3 + 1 / 2) / (3 + 1 / np.log2(3)) - 1) / 2)


def test_the_verdict_says_no_more_than_was_measured():
    assert EQUAL.verdict == "same scores, faster (2.00 times the pairs/s)"
    assert replace(EQUAL, pairs_per_s=[1.2, 3.0]).verdict.startswith("same scores, no clear difference in speed")
    assert replace(EQUAL, pairs_per_s=[0.5, 0.6]).verdict.startswith("same scores, slower")
    assert replace(EQUAL, max_difference=0.1).verdict.startswith("different scores")
    assert replace(EQUAL, top1=0.9).verdict.startswith("different scores")


def test_pairs_are_whole_queries_without_truncated_ones(student_ranker, judgments, table, caplog):
    rows = recipe.read_pairs(ExportArguments("m", "o", "onnx", table, max_pairs=8), student_ranker)
    assert rows["query_id"].value_counts().to_dict() == {"q0": 3, "q1": 4}
    long = judgments.assign(query=judgments["query"].where(judgments["query_id"] != "q1", "read " * 40))
    long.to_parquet(table)
    rows = recipe.read_pairs(ExportArguments("m", "o", "onnx", table), student_ranker)
    assert len(rows) == len(judgments) - 4 and "Not compared: 4 pairs" in caplog.text
