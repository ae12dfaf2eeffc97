"""Continued pre-training: what is masked, and that trl learns from it."""

import math
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM
from trl import SFTTrainer

from hf_disranker import ClickTrainer, CptConfig, click_dataset
from hf_disranker.data.schema import TableError
from hf_disranker.data.tables import read_table
from hf_disranker.models.teacher import LLMForLastTokenRanking
from hf_disranker.recipes.quickstart.from_scratch import small_llama, train_bpe
from hf_disranker.training.cpt import check_packing, click_losses, prepare_clicks

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


def test_the_defaults_raise_no_warning_and_checkpoint_no_activations(tmp_path, recwarn):
    assert not CptConfig(str(tmp_path), use_cpu=True).gradient_checkpointing
    assert [str(warning.message) for warning in recwarn if "deprecated" in str(warning.message)] == []
    assert CptConfig(str(tmp_path), use_cpu=True, gradient_checkpointing=True).gradient_checkpointing


def test_the_loss_is_on_title_summary_and_end_alone(tokenizer):
    rows = click_dataset(CLICKS[:3], tokenizer, max_length=48)
    for row, click in zip(rows, CLICKS[:3].itertuples(), strict=True):
        learned = [i for i, mask in zip(row["input_ids"], row["completion_mask"], strict=True) if mask]
        prompt = [i for i, mask in zip(row["input_ids"], row["completion_mask"], strict=True) if not mask]
        assert learned[-1] == tokenizer.eos_token_id
        # The small decoder's tokenizer puts blanks around punctuation.
        learned_text, prompt_text = (tokenizer.decode(ids).strip() for ids in (learned[:-1], prompt[1:]))
        assert learned_text.replace(" . ", ".") == f"{click.title} {click.summary}".strip()
        assert prompt_text.replace(" :", ":") == f"query: {click.query} document:"
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
    settings = {"max_length": 48, "eval_strategy": "no", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    args = CptConfig(str(folder), seed=0, **settings | options)
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


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_the_loss_on_a_cpu_equals_trl(tokenizer, tmp_path, loss_type):
    losses = []
    # One evaluation batch: over several trl averages their means.
    options = {"max_steps": 3, "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 12}
    for kind in (ClickTrainer, SFTTrainer):
        trainer = trainer_of(kind, tokenizer, tmp_path, per_device_train_batch_size=2, loss_type=loss_type, **options)
        trainer.train()
        losses.append([trainer.state.log_history[-1]["train_loss"], trainer.evaluate()["eval_loss"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(("options", "private"), [({}, True), ({"hub_private_repo": False}, False)])
def test_models_trained_on_clicks_are_private_by_default(tokenizer, tmp_path, hub, options, private):
    repo = f"tester/clicks-{private}"
    trainer_of(ClickTrainer, tokenizer, tmp_path, push_to_hub=True, hub_model_id=repo, hub_token=hub.token, **options)
    assert hub.repos["model", repo].private is private


def table(*rows):
    return pd.DataFrame(rows, columns=["query", "title", "summary", "weight", "users"])


def test_equal_clicks_are_merged_and_rows_repeat_by_weight():
    clicks = table(("a", "x", "", 1.0, 9), ("a", "x", "", 2.0, 9), ("b", "y", "", 9.0, 9), ("c", "z", "", 0.0, 9))
    # Three rows are left, of weights 3, 9 and 0: of three draws b gets 9/4 and a 3/4.
    drawn = [prepare_clicks(clicks, seed=seed)["query"].tolist() for seed in range(200)]
    assert all(len(rows) == 3 and rows.count("b") in (2, 3) and rows.count("c") == 0 for rows in drawn)
    assert sum(rows.count("b") for rows in drawn) / 200 == pytest.approx(9 / 4, abs=0.1)


def test_equal_weights_keep_every_click_once():
    rows = prepare_clicks(pd.concat([CLICKS.assign(query=CLICKS["query"] + str(i)) for i in range(5)]))
    assert len(rows) == 15 == len(rows.drop_duplicates())


def test_queries_of_few_users_are_dropped_and_counted(caplog):
    clicks = table(("a", "x", "", 1.0, 1), ("a", "y", "", 1.0, 5), ("b", "z", "", 1.0, 4), ("c", "z", "", 1.0, 5))
    assert prepare_clicks(clicks, min_users=5)["query"].tolist() == ["a", "a", "c"]
    assert "Dropped 25.0% of the clicks: queries of fewer than 5 users" in caplog.text
    with pytest.raises(TableError, match="No clicks left"):
        prepare_clicks(clicks, min_users=6)


def test_without_users_it_warns_and_cannot_filter(caplog):
    prepare_clicks(CLICKS)
    assert [record.getMessage() for record in caplog.records if "memorize rare" in record.getMessage()]
    with pytest.raises(TableError, match="--min_users 3 needs a column 'users'"):
        prepare_clicks(CLICKS, min_users=3)


def test_losses_of_title_and_summary_match_the_token_by_token_sum(tokenizer):
    torch.manual_seed(0)
    model = small_llama(tokenizer, layers=1, size=64, initializer_range=0.5)
    found = click_losses(model, tokenizer, CLICKS[:3], max_length=48)
    sums, counts = {"title": 0.0, "summary": 0.0}, {"title": 0, "summary": 0}
    for click in CLICKS[:3].itertuples():
        document = f"{click.title} {click.summary}".strip()
        prompt, whole = (tokenizer(f"query: {click.query} document:{text}").input_ids for text in ("", f" {document}"))
        titled = tokenizer(f"query: {click.query} document: {click.title}".strip()).input_ids
        with torch.no_grad():
            chances = model.eval()(torch.tensor([whole])).logits[0].log_softmax(dim=-1)
        for place in range(len(prompt) - 1, len(whole)):
            part = "title" if place < len(titled) - 1 else "summary"
            sums[part] -= chances[place - 1, whole[place]].item()
            counts[part] += 1
    assert found == {part: pytest.approx(sums[part] / counts[part], rel=1e-4) for part in sums}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_samples_train_as_separate_ones(tokenizer, tmp_path, attention):
    options = {"learning_rate": 0.0, "max_steps": 1, "per_device_train_batch_size": 12, "logging_steps": 1}
    apart = trainer_of(ClickTrainer, tokenizer, tmp_path, **options)
    packed = trainer_of(ClickTrainer, tokenizer, tmp_path, packing=True, eval_packing=False, **options)
    assert len(packed.train_dataset) < len(apart.train_dataset)
    logged = []
    for trainer in (apart, packed):
        trainer.model.set_attn_implementation(attention)
        check_packing(trainer.model)
        trainer.train()
        logged.append(next(entry for entry in trainer.state.log_history if "grad_norm" in entry))
    for name in ("loss", "grad_norm"):
        assert logged[1][name] == pytest.approx(logged[0][name], rel=1e-3)


def test_a_model_that_mixes_packed_samples_is_refused(tokenizer):
    model = small_llama(tokenizer, layers=1, size=64, initializer_range=0.5)
    whole = model.forward
    model.forward = lambda input_ids, position_ids: whole(input_ids)  # blind to where a sample begins
    with pytest.raises(ValueError, match="attends across packed samples"):
        check_packing(model)


def test_the_teacher_keeps_the_template_of_the_clicks(tokenizer, tmp_path):
    model = small_llama(tokenizer, layers=1, size=64)
    model.config.click_templates = {
        "query": "{query}",
        "document": "{title} {summary}",
        "text": "{query} => {document}",
    }
    model.save_pretrained(tmp_path)
    teacher = LLMForLastTokenRanking.from_pretrained(tmp_path)
    assert teacher.config.marker.templates.render_text("q", "d") == "q => d"


def test_the_example_of_the_page_about_clicks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = pd.DataFrame(
        [
            ("ann", "read json", "json.load", "text", 1, 30),
            ("ann", "read json", "json.load", "text", 1, 40),  # once per user
            ("bob", "read json", "json.load", "text", 2, 12),
            ("cat", "read json", "json.dump", "text", 1, 3),  # left at once
        ],
        columns=["user", "query", "title", "summary", "position", "seconds"],
    )
    log.to_parquet("log.parquet")
    swaps = [(1, True), (1, True), (1, False), (1, False), (2, True), (2, False), (2, False), (2, False)]
    pd.DataFrame(swaps, columns=["position", "clicked"]).to_parquet("swaps.parquet")
    page = (Path(__file__).parents[2] / "docs" / "how_to" / "clicks.md").read_text(encoding="utf-8")
    exec(re.search(r"```python\n(.*?)```", page, flags=re.S)[1], {})
    # The second place is looked at half as often as the first: ann's click weighs 1, bob's 2.
    rows = read_table("clicks.parquet", "clicks").to_dict("records")
    expected = {"query": "read json", "title": "json.load", "summary": "text", "weight": 3.0, "users": 3.0}
    assert rows == [expected]
