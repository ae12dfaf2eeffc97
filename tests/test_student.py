"""BertDistilledRanker: a stock BERT classifier on disk, a ranker in memory."""

import json

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

from hf_disranker import BertDistilledRanker

TINY = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
}


def batch():
    torch.manual_seed(0)
    return {"input_ids": torch.randint(5, 99, (3, 12)), "token_type_ids": torch.randint(0, 2, (3, 12))}


def test_the_checkpoint_is_stock_and_scores_as_the_stock_class_does(tmp_path):
    torch.manual_seed(1)
    ranker = BertDistilledRanker(BertConfig(**TINY)).eval()
    ranker.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["model_type"] == "bert"
    assert config["id2label"] == {"0": "LABEL_0"}
    assert config["sentence_transformers"] == {"activation_fn": "torch.nn.modules.linear.Identity"}
    assert config["disranker"] == {
        "format": 1,
        "role": "student",
        "head": "cls",
        "templates": {"query": "{query}", "document": "{title} {summary}"},
        "score_transform": None,
    }
    stock, info = BertForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        expected = stock.eval()(**batch()).logits.squeeze(-1)
        torch.testing.assert_close(ranker(**batch()).scores, expected, atol=1e-6, rtol=0)


def test_output_keeps_tuples_and_gives_fp32_scores():
    ranker = BertDistilledRanker(BertConfig(**TINY)).eval().to(torch.bfloat16)
    output = ranker(**batch())
    assert output.scores.dtype == torch.float32 and output.scores.shape == (3,)
    assert torch.equal(ranker(**batch(), return_dict=False)[0], output.logits)


def test_a_plain_bert_becomes_a_ranker_with_one_label(tmp_path):
    torch.manual_seed(2)
    plain = BertModel(BertConfig(**TINY))
    plain.save_pretrained(tmp_path)
    ranker, info = BertDistilledRanker.from_pretrained(tmp_path, num_labels=1, output_loading_info=True)
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert ranker.config.num_labels == 1 and ranker.classifier.out_features == 1
    assert torch.equal(ranker.bert.encoder.layer[3].output.dense.weight, plain.encoder.layer[3].output.dense.weight)


def test_marking_a_config_leaves_the_original_alone():
    config = BertConfig(**TINY, num_labels=3)
    BertDistilledRanker(config)
    assert type(config) is BertConfig and config.num_labels == 3 and not hasattr(config, "disranker")


def test_keep_layers_takes_the_named_layers_and_survives_saving(tmp_path):
    ranker = BertDistilledRanker(BertConfig(**TINY)).eval()
    first, third = (ranker.bert.encoder.layer[i].output.dense.weight.clone() for i in (0, 2))
    ranker.keep_layers([0, 2]).save_pretrained(tmp_path)
    again = BertDistilledRanker.from_pretrained(tmp_path).eval()
    assert again.config.num_hidden_layers == 2
    assert torch.equal(again.bert.encoder.layer[0].output.dense.weight, first)
    assert torch.equal(again.bert.encoder.layer[1].output.dense.weight, third)
    torch.testing.assert_close(again(**batch()).scores, ranker(**batch()).scores, atol=1e-6, rtol=0)


@pytest.mark.parametrize("layers", [[], [0, 0], [4], [-1]])
def test_keep_layers_refuses_layers_that_are_not_there(layers):
    with pytest.raises(ValueError, match="layers 0 to 3"):
        BertDistilledRanker(BertConfig(**TINY)).keep_layers(layers)


def test_checkpoints_of_another_kind_are_refused(tmp_path, teacher_dir):
    with pytest.raises(ValueError, match="holds a llama model; BertForSequenceClassification reads bert"):
        BertDistilledRanker.from_pretrained(teacher_dir)
    ranker = BertDistilledRanker(BertConfig(**TINY))
    ranker.config.disranker["format"] = 2
    ranker.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="format 2, this package knows up to 1"):
        BertDistilledRanker.from_pretrained(tmp_path)


def test_start_at_moves_all_scores_to_the_teachers_mean():
    torch.manual_seed(2)
    ranker = BertDistilledRanker(BertConfig(**TINY)).eval()
    with torch.no_grad():
        before = ranker(**batch()).scores
        ranker.start_at(-2.5)
        torch.testing.assert_close(ranker(**batch()).scores, before - 2.5)
