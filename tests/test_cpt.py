"""Continued pre-training: what is masked, and that trl learns from it."""

import math

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM
from trl import SFTTrainer

from hf_disranker import ClickTrainer, CptConfig, click_dataset
from hf_disranker.from_scratch import small_llama, train_bpe

CLICKS = pd.DataFrame(
    {
        "query": ["read a json file", "plot a histogram", "sort a dict by value"] * 4,
        "title": ["json.load", "", "sorted"] * 4,
        "summary": ["read a document from a file", "hist draws bars", ""] * 4,
    }
)


@pytest.fixture(scope="module")
def tokenizer():
    texts = (CLICKS["query"] + " " + CLICKS["title"] + " " + CLICKS["summary"]).tolist()
    return train_bpe([*texts, "query: document:"] * 10, vocab_size=400, max_length=48)


def test_the_loss_is_on_title_summary_and_end_alone(tokenizer):
    rows = click_dataset(CLICKS[:3], tokenizer, max_length=48)
    for row, click in zip(rows, CLICKS[:3].itertuples(), strict=True):
        learned = [i for i, mask in zip(row["input_ids"], row["completion_mask"], strict=True) if mask]
        prompt = [i for i, mask in zip(row["input_ids"], row["completion_mask"], strict=True) if not mask]
        assert learned[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(learned[:-1]).strip() == f"{click.title} {click.summary}".strip()
        assert tokenizer.decode(prompt[1:]).strip() == f"query: {click.query} document:"
        assert row["completion_mask"] == sorted(row["completion_mask"])


def test_the_text_is_the_one_that_the_teacher_reads(tokenizer):
    row = click_dataset(CLICKS[:1], tokenizer, max_length=48)[0]
    assert (
        row["input_ids"]
        == tokenizer("query: read a json file document: json.load read a document from a file").input_ids
    )


def test_a_long_row_is_cut_and_keeps_its_end_token_and_a_query_that_fills_the_row_is_left_out(tokenizer):
    clicks = pd.DataFrame({"query": ["read", "sort " * 60], "title": ["file " * 80, "list"], "summary": ["", ""]})
    rows = click_dataset(clicks, tokenizer, max_length=20)
    assert len(rows) == 1 and len(rows[0]["input_ids"]) == 20
    assert rows[0]["input_ids"][-1] == tokenizer.eos_token_id


def trainer_of(kind, tokenizer, folder, **options):
    torch.manual_seed(0)
    args = CptConfig(
        str(folder), eval_strategy="no", save_strategy="no", disable_tqdm=True, use_cpu=True, seed=0, **options
    )
    rows = click_dataset(CLICKS, tokenizer, max_length=48)
    model = small_llama(tokenizer, layers=1, size=64)
    return kind(model=model, args=args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)


def test_training_lowers_the_loss_and_the_model_reloads(tokenizer, tmp_path):
    trainer = trainer_of(ClickTrainer, tokenizer, tmp_path, max_steps=30, learning_rate=1e-2)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert before == pytest.approx(math.log(len(tokenizer)), rel=0.1)  # random weights know nothing
    assert after < 0.5 * before
    trainer.save_model(str(tmp_path))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again.lm_head.weight, trainer.model.lm_head.weight)


def test_the_loss_on_a_cpu_is_trls(tokenizer, tmp_path):
    losses = []
    for kind in (ClickTrainer, SFTTrainer):
        trainer = trainer_of(
            kind, tokenizer, tmp_path, max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2
        )
        trainer.train()
        losses.append([trainer.state.log_history[-1]["train_loss"], trainer.evaluate()["eval_loss"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(("options", "private"), [({}, True), ({"hub_private_repo": False}, False)])
def test_what_has_read_clicks_is_published_privately_unless_asked_otherwise(
    tokenizer, tmp_path, hub, options, private
):
    repo = f"tester/clicks-{private}"
    trainer_of(ClickTrainer, tokenizer, tmp_path, push_to_hub=True, hub_model_id=repo, hub_token=hub.token, **options)
    assert hub.repos["model", repo].private is private
