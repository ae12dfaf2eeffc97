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


def test_output_supports_tuples_and_has_fp32_scores():
    ranker = BertDistilledRanker(BertConfig(**TINY)).eval().to(torch.bfloat16)
    output = ranker(**batch())
    assert output.scores.dtype == torch.float32 and output.scores.shape == (3,)
    usual = ranker(**batch(), return_dict=False)
    assert isinstance(usual, tuple)
    torch.testing.assert_close(usual[0], output.logits, atol=4e-3, rtol=0)  # bf16 keeps 8 bits


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


def test_an_unmarked_config_can_be_printed():
    """Some versions of transformers build one to compare with."""
    config = BertDistilledRanker.config_class()
    assert config.to_dict()["architectures"] == ["BertForSequenceClassification"]
    assert "BertForSequenceClassification" in repr(config)


def test_keep_layers_keeps_the_named_layers_and_survives_saving(tmp_path):
    ranker = BertDistilledRanker(BertConfig(**TINY)).eval()
    first, third = (ranker.bert.encoder.layer[i].output.dense.weight.clone() for i in (0, 2))
    ranker.keep_layers([0, 2]).save_pretrained(tmp_path)
    again = BertDistilledRanker.from_pretrained(tmp_path).eval()
    assert again.config.num_hidden_layers == 2
    assert torch.equal(again.bert.encoder.layer[0].output.dense.weight, first)
    assert torch.equal(again.bert.encoder.layer[1].output.dense.weight, third)
    torch.testing.assert_close(again(**batch()).scores, ranker(**batch()).scores, atol=1e-6, rtol=0)


@pytest.mark.parametrize("layers", [[], [0, 0], [4], [-1]])
def test_keep_layers_refuses_missing_layers(layers):
    with pytest.raises(ValueError, match="layers 0 to 3"):
        BertDistilledRanker(BertConfig(**TINY)).keep_layers(layers)


def test_checkpoints_of_another_kind_are_refused(tmp_path, teacher_dir):
    with pytest.raises(ValueError, match="contains a llama model; BertForSequenceClassification reads bert"):
        BertDistilledRanker.from_pretrained(teacher_dir)
    ranker = BertDistilledRanker(BertConfig(**TINY))
    ranker.config.disranker["format"] = 2
    ranker.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="format 2, this package supports up to 1"):
        BertDistilledRanker.from_pretrained(tmp_path)


def test_start_at_moves_all_scores_to_the_teachers_mean():
    torch.manual_seed(2)
    ranker = BertDistilledRanker(BertConfig(**TINY)).eval()
    with torch.no_grad():
        before = ranker(**batch()).scores
        ranker.start_at(-2.5)
        torch.testing.assert_close(ranker(**batch()).scores, before - 2.5)


def ragged(side="right"):
    """Rows of 12, 7, 12, 3 and 7 tokens, padded on one side."""
    lengths = torch.tensor([12, 7, 12, 3, 7])
    place = torch.arange(12) if side == "right" else torch.arange(11, -1, -1)
    mask = (place < lengths.unsqueeze(1)).long()
    torch.manual_seed(3)
    ids, types = torch.randint(5, 99, mask.shape), torch.randint(0, 2, mask.shape)
    return {"input_ids": ids * mask, "token_type_ids": types * mask, "attention_mask": mask}


def gradients(model):
    return torch.cat([weight.grad.flatten() for weight in model.parameters()])


def test_without_padding_logits_and_gradients_are_those_of_the_stock_class(tmp_path):
    torch.manual_seed(1)
    BertDistilledRanker(BertConfig(**TINY, initializer_range=0.3)).save_pretrained(tmp_path)
    ours, stock = (
        kind.from_pretrained(tmp_path).eval() for kind in (BertDistilledRanker, BertForSequenceClassification)
    )
    for model in (ours, stock):
        model(**ragged()).logits.square().sum().backward()
    assert ours(**ragged()).logits.shape == (5, 1) and ours(**ragged()).logits.std() > 0.1
    torch.testing.assert_close(ours(**ragged()).logits, stock(**ragged()).logits, atol=1e-5, rtol=0)
    assert (gradients(ours) - gradients(stock)).norm() / gradients(stock).norm() < 1e-5


def test_calls_that_need_more_than_scores_use_the_stock_forward():
    ranker = BertDistilledRanker(BertConfig(**TINY)).eval()
    output = ranker(**batch(), output_hidden_states=True, labels=torch.zeros(3))
    assert len(output.hidden_states) == 5 and output.loss is not None
    torch.testing.assert_close(output.scores, ranker(**batch()).scores, atol=1e-6, rtol=0)


def test_unknown_keywords_keep_the_fast_path():
    ranker = BertDistilledRanker(BertConfig(**TINY, initializer_range=0.3)).eval()
    # CrossEncoder adds the key "scores" to the features that it passes.
    again = ranker(**ragged(), scores=torch.zeros(5), return_dict=True, output_attentions=False)
    assert torch.equal(again.scores, ranker(**ragged()).scores)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_padding_changes_no_score(kind):
    ranker = BertDistilledRanker(BertConfig(**TINY, initializer_range=0.3)).eval()
    rows = ragged()
    alone = [
        ranker(input_ids=ids[mask.bool()].unsqueeze(0), token_type_ids=types[mask.bool()].unsqueeze(0)).scores
        for ids, types, mask in zip(*rows.values(), strict=True)
    ]
    scores = ranker(**rows | {"attention_mask": rows["attention_mask"].to(kind)}).scores
    torch.testing.assert_close(scores, torch.cat(alone), atol=1e-5, rtol=0)


def test_masks_of_any_form_give_the_scores_of_the_stock_class():
    torch.manual_seed(1)
    ranker = BertDistilledRanker(BertConfig(**TINY, initializer_range=0.3)).eval()
    hole, none = ragged()["attention_mask"], ragged()["attention_mask"]
    hole[0, 4], none[3] = 0, 0
    for rows in (ragged("left"), ragged() | {"attention_mask": hole}, ragged() | {"attention_mask": none}):
        with torch.no_grad():
            stock = BertForSequenceClassification.forward(ranker, **rows).logits
            torch.testing.assert_close(ranker(**rows).logits, stock, atol=1e-5, rtol=0)


def test_rows_do_not_attend_to_each_other():
    ranker = BertDistilledRanker(BertConfig(**TINY, initializer_range=0.3)).eval()
    before = ranker(**ragged()).scores
    changed = ragged()
    changed["input_ids"][1] = 17 * changed["attention_mask"][1]
    after = ranker(**changed).scores
    others = [0, 2, 3, 4]
    assert torch.equal(after[others], before[others]) and after[1] != before[1]


def test_dropout_spreads_scores_as_in_the_stock_class(tmp_path):
    torch.manual_seed(1)
    options = {"attention_probs_dropout_prob": 0.5, "hidden_dropout_prob": 0.0, "initializer_range": 0.3}
    BertDistilledRanker(BertConfig(**TINY, **options)).save_pretrained(tmp_path)
    kinds = (BertDistilledRanker, BertForSequenceClassification)
    rows = {key: value.repeat(400, 1) for key, value in ragged().items()}
    with torch.no_grad():
        ours, stock = (kind.from_pretrained(tmp_path).train()(**rows).logits.view(400, 5) for kind in kinds)
    torch.testing.assert_close(ours.std(dim=0), stock.std(dim=0), atol=0, rtol=0.2)
    assert (ours.mean(dim=0) - stock.mean(dim=0)).abs().max() < 4 * stock.std(dim=0).max() / 20
    assert stock.std(dim=0).min() > 0.05
