"""Existing rerankers as teachers: modular heads, two labels, prompts and chat templates of sentence-transformers."""

import copy
import json

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)

from hf_disranker.cli import main
from hf_disranker.data.tables import pair_texts
from hf_disranker.scoring.engines import CrossEncoderEngine, RankerEngine, load_engine
from hf_disranker.scoring.store import ScoreStore

# As the model card of Qwen3-Reranker has it.
PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
INSTRUCT = "Given a web search query, retrieve relevant passages that answer the query"
ROLE = "{{{{ messages | selectattr('role', 'eq', '{0}') | map(attribute='content') | first }}}}"
TEMPLATE = (
    f"{PREFIX}<Instruct>: {INSTRUCT}\n<Query>: {ROLE.format('query')}\n<Document>: {ROLE.format('document')}{SUFFIX}"
)


def joined(judgments):
    texts = (judgments["title"] + " " + judgments["summary"]).str.strip()
    return list(zip(judgments["query"], texts, strict=True))


def bert(tokenizer, **config):
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return BertConfig(vocab_size=len(tokenizer), initializer_range=0.3, **size, **config)


def qwen3(tokenizer, **config):
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    size |= {"intermediate_size": 32, "head_dim": 16, "pad_token_id": tokenizer.pad_token_id}
    return Qwen3Config(vocab_size=len(tokenizer), initializer_range=0.3, **size, **config)


def save_modular(folder, tokenizer, labels=1):
    """Save a CrossEncoder whose head is made of modules: pooling, a dense layer with GELU, and one of scores."""
    BertModel(bert(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    head = [Pooling(32, "cls"), Dense(32, 32, activation_function=nn.GELU())]
    head.append(Dense(32, labels, activation_function=nn.Identity(), module_output_name="scores"))
    CrossEncoder(modules=[Transformer(str(folder)), *head]).save_pretrained(str(folder / "modular"))
    return str(folder / "modular")


def test_a_modular_cross_encoder_scores_as_in_sentence_transformers(tmp_path, tiny_student, judgments):
    path = save_modular(tmp_path, tiny_student[1])
    engine = load_engine(path)
    assert isinstance(engine, CrossEncoderEngine)
    scores = engine.predict(pair_texts(judgments))
    model = CrossEncoder(path, device="cpu")
    assert isinstance(model.activation_fn, nn.Sigmoid)
    expected = model.predict(joined(judgments))
    np.testing.assert_allclose(1 / (1 + np.exp(-scores)), expected, atol=1e-5)
    about = engine.describe()
    assert scores.std() > 0.1 and about["activation"] == "torch.nn.modules.linear.Identity"
    assert [module[0] for module in about["modules"]] == ["Transformer", "Pooling", "Dense", "Dense"]
    assert about["modules"][2][1]["activation_function"] == "torch.nn.modules.activation.GELU"


def test_a_label_is_chosen_among_several(tmp_path, tiny_student, judgments):
    tokenizer = tiny_student[1]
    modular = save_modular(tmp_path, tokenizer, labels=2)
    for labels in (2, 3):
        path = str(tmp_path / f"classifier{labels}")
        BertForSequenceClassification(bert(tokenizer, num_labels=labels)).save_pretrained(path)
        tokenizer.save_pretrained(path)
    for path in (modular, str(tmp_path / "classifier2"), str(tmp_path / "classifier3")):
        logits = CrossEncoder(path, device="cpu").predict(joined(judgments), activation_fn=nn.Identity())
        with pytest.raises(ValueError, match=r"returns [23] scores for a pair.*--label_index 1"):
            load_engine(path)
        engine = load_engine(path, label_index=1)
        probability = torch.from_numpy(logits).softmax(dim=1)[:, 1]
        np.testing.assert_allclose(engine.predict(pair_texts(judgments)), probability.logit(), atol=1e-4)
        if logits.shape[1] == 2:
            np.testing.assert_allclose(engine.predict(pair_texts(judgments)), logits[:, 1] - logits[:, 0], atol=1e-5)
        assert engine.describe()["label_index"] == 1
        for wrong in (-1, logits.shape[1]):
            with pytest.raises(
                ValueError, match=rf"--label_index {wrong}: .* has the labels 0 to {logits.shape[1] - 1}"
            ):
                load_engine(path, label_index=wrong)


def test_score_and_evaluate_accept_a_label_option(tmp_path, tiny_student, judgments, monkeypatch):
    monkeypatch.setattr("sys.argv", ["disranker"])
    path, table, out = save_modular(tmp_path, tiny_student[1], labels=2), str(tmp_path / "t.parquet"), tmp_path / "out"
    judgments.to_parquet(table)
    option = ["--model", path, "--label_index", "1"]
    main(["score", *option, "--pairs", table, "--out", str(out)])
    assert ScoreStore(str(out)).manifest()["label_index"] == 1
    for source in (option, ["--scores", str(out)]):
        main(["evaluate", *source, "--judgments", table, "--split", "", "--out", str(tmp_path / f"{source[0]}.json")])
    live, stored = (json.loads((tmp_path / f"--{name}.json").read_text()) for name in ("model", "scores"))
    assert live["ndcg@10"] == pytest.approx(stored["ndcg@10"], abs=1e-6) and live["about"]["label_index"] == 1
    with pytest.raises(SystemExit, match="--label_index need --model"):
        main(["evaluate", "--scores", str(out), "--label_index", "1", "--judgments", table])
    with pytest.raises(SystemExit, match="label_index: for a model in this process, not for --engine vllm"):
        main(["score", *option, "--engine", "vllm", "--pairs", table, "--out", str(tmp_path / "other")])


def test_a_label_is_not_chosen_where_there_is_one(tmp_path, tiny_student, student_dir):
    for path in (student_dir, save_modular(tmp_path, tiny_student[1])):
        with pytest.raises(ValueError, match="returns one score for a pair: leave out --label_index"):
            load_engine(path, label_index=0)
    assert load_engine(student_dir).describe().get("label_index") is None


@pytest.fixture
def qwen_tokenizer(tiny_teacher):
    tokenizer = copy.deepcopy(tiny_teacher[1])
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "<think>", "</think>"], special_tokens=True)
    tokenizer.add_tokens(["yes", "no"])
    tokenizer.chat_template = TEMPLATE
    tokenizer.padding_side = "left"
    return tokenizer


def prompt(query, document):
    return f"{PREFIX}<Instruct>: {INSTRUCT}\n<Query>: {query}\n<Document>: {document}{SUFFIX}"


def test_a_generative_reranker_reads_its_documented_prompt(tmp_path, qwen_tokenizer, judgments):
    tokenizer = qwen_tokenizer
    tokenizer.model_max_length = 1024
    model = Qwen3ForCausalLM(qwen3(tokenizer)).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    scores = load_engine(str(tmp_path), generative=True).predict(pair_texts(judgments))
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
    with torch.no_grad():
        for row, pair in enumerate(joined(judgments)[:5]):
            ids = torch.tensor([tokenizer.encode(prompt(*pair), add_special_tokens=False)])
            logits = model(ids).logits[0, -1]
            assert scores[row] == pytest.approx(float(logits[yes] - logits[no]), abs=1e-4)
    assert scores.std() > 1e-3


def test_a_decoder_classifier_with_a_template_for_pairs_reads_it(tmp_path, qwen_tokenizer, judgments):
    tokenizer = qwen_tokenizer
    tokenizer.model_max_length = 1024
    model = Qwen3ForSequenceClassification(qwen3(tokenizer, num_labels=1)).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    engine = load_engine(str(tmp_path))
    assert isinstance(engine, CrossEncoderEngine)
    expected = CrossEncoder(str(tmp_path), device="cpu").predict(joined(judgments), activation_fn=nn.Identity())
    scores = engine.predict(pair_texts(judgments))
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    with torch.no_grad():
        ids = torch.tensor([tokenizer.encode(prompt(*joined(judgments)[3]), add_special_tokens=False)])
        assert scores[3] == pytest.approx(model(ids).logits.item(), abs=1e-4)


def test_a_cross_encoder_with_a_prompt_keeps_it(tmp_path, tiny_student, judgments):
    tokenizer = tiny_student[1]
    BertForSequenceClassification(bert(tokenizer, num_labels=1)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = CrossEncoder(str(tmp_path), device="cpu")
    model.save_pretrained(str(tmp_path / "plain"))
    assert isinstance(load_engine(str(tmp_path / "plain")), RankerEngine)
    model.prompts, model.default_prompt_name = {"search": "read json "}, "search"
    model.save_pretrained(str(tmp_path / "prompt"))
    engine = load_engine(str(tmp_path / "prompt"))
    expected = model.predict(joined(judgments), activation_fn=nn.Identity())
    np.testing.assert_allclose(engine.predict(pair_texts(judgments)), expected, atol=1e-5)
    plain = load_engine(str(tmp_path / "plain")).predict(pair_texts(judgments))
    assert np.abs(plain - expected).max() > 0.01
