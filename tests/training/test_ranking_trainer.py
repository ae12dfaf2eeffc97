"""RankingTrainer and DistillationTrainer: exact gradients, logs, resume and bad input."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, EvalPrediction
from two_processes import random_row

from hf_disranker import (
    BertDistilledRanker,
    DistillationConfig,
    DistillationTrainer,
    LLMForLastTokenRanking,
    RankDistillationTrainer,
    RankingConfig,
    RankingTrainer,
)
from hf_disranker.training.losses import score_spread
from hf_disranker.training.ranking_trainer import ranking_metrics


def ragged_groups(count=8, seed=0):
    """Queries with 1 to 7 documents, labels 0 to 2 and teacher scores."""
    rng = np.random.default_rng(seed)
    rows = []
    for query in range(count):
        size = int(rng.integers(1, 8)) if query else 5
        rows.append(random_row(rng, query, size, labels=[0, 1, 2, 0, 1, 2, 0][:size]))
    return Dataset.from_list(rows)


def student(folder):
    """The tiny student without dropout, so that equal batches have equal gradients."""
    return BertDistilledRanker.from_pretrained(folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def options(tmp_path, **extra):
    settings = {"report_to": "none", "max_length": 48, "max_query_length": 16, "seed": 1, "disable_tqdm": True}
    return {"output_dir": str(tmp_path), "eval_strategy": "no", "save_strategy": "no"} | settings | extra


def one_step(folder, tmp_path, trainer_class, config_class, micro_batch, accumulation):
    """The change of all weights by one SGD step on the same eight queries."""
    model = student(folder)
    before = torch.cat([weight.detach().flatten().clone() for weight in model.parameters()])
    args = config_class(
        **options(
            tmp_path,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            learning_rate=0.1,
            warmup_steps=0,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
            train_sampling_strategy="sequential",
            logging_steps=1,
        )
    )
    trainer = trainer_class(
        model=model, args=args, train_dataset=ragged_groups(), processing_class=AutoTokenizer.from_pretrained(folder)
    )
    trainer.train()
    after = torch.cat([weight.detach().flatten() for weight in model.parameters()])
    return after - before, trainer.state.log_history[0]


@pytest.mark.parametrize(
    ("trainer_class", "config_class"),
    [(RankingTrainer, RankingConfig), (DistillationTrainer, DistillationConfig)],
    ids=["hinge", "point and margin"],
)
def test_gradient_does_not_depend_on_how_the_batch_is_split(student_dir, tmp_path, trainer_class, config_class):
    whole, log = one_step(student_dir, tmp_path, trainer_class, config_class, micro_batch=8, accumulation=1)
    assert whole.norm() > 1e-3
    for micro_batch, accumulation in ((4, 2), (2, 4), (1, 8), (3, 3)):
        parts, parts_log = one_step(student_dir, tmp_path, trainer_class, config_class, micro_batch, accumulation)
        assert (parts - whole).norm() <= 1e-5 * whole.norm()
        for name in set(log) - {"epoch", "step", "learning_rate", "grad_norm"}:
            assert parts_log[name] == pytest.approx(log[name], rel=1e-3, abs=1e-4), name


def test_logged_terms_are_those_of_the_batch(student_dir, tmp_path):
    _, log = one_step(student_dir, tmp_path, DistillationTrainer, DistillationConfig, micro_batch=2, accumulation=4)
    groups = ragged_groups()
    model, tokenizer = student(student_dir).eval(), AutoTokenizer.from_pretrained(student_dir)
    model.start_at(np.concatenate(groups["teacher_scores"]).mean())  # as the trainer does
    squares, margins, count, weight = 0.0, 0.0, 0, 0
    for row in groups:
        texts = [f"{title} {summary}".strip() for title, summary in zip(row["titles"], row["summaries"], strict=True)]
        with torch.no_grad():
            inputs = tokenizer([row["query"]] * len(texts), texts, padding=True, return_tensors="pt")
            error = model(**inputs).scores.numpy() - np.array(row["teacher_scores"])
        squares, count = squares + (error**2).sum(), count + len(error)
        if len(error) > 1:
            pairs = [(a - b) ** 2 for i, a in enumerate(error) for b in error[i + 1 :]]
            margins, weight = margins + np.mean(pairs) * (len(error) - 1), weight + len(error) - 1
    assert log["point_mse"] == pytest.approx(squares / count, rel=1e-3)
    assert log["margin_mse"] == pytest.approx(margins / weight, rel=1e-3)
    assert log["loss"] == pytest.approx(0.05 * squares / count + 0.5 * margins / weight, rel=1e-3)


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_training_learns_the_order_of_its_labels(student_dir, teacher_dir, tmp_path, kind):
    folder = student_dir if kind == "student" else teacher_dir
    torch.manual_seed(0)
    model = (BertDistilledRanker if kind == "student" else LLMForLastTokenRanking).from_pretrained(folder)
    groups = ragged_groups()
    args = RankingConfig(**options(tmp_path, max_steps=40, learning_rate=3e-3, per_device_train_batch_size=8))
    trainer = RankingTrainer(
        model=model,
        args=args,
        train_dataset=groups,
        eval_dataset=groups,
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.5 * before["eval_loss"]
    assert after["eval_pair_accuracy"] > 0.9
    assert {"eval_pnr", "eval_ndcg@5", "eval_ndcg@10"} <= after.keys()


def test_a_teacher_reads_the_query_of_a_group_once_with_the_same_gradients(teacher_dir, tmp_path):
    model, tokenizer = LLMForLastTokenRanking.from_pretrained(teacher_dir), AutoTokenizer.from_pretrained(teacher_dir)
    groups = ragged_groups()
    trainer = RankingTrainer(
        model=model, args=RankingConfig(**options(tmp_path)), train_dataset=groups, processing_class=tokenizer
    )
    batch = trainer.data_collator(list(groups))
    read, gradients = [], []
    model.get_input_embeddings().register_forward_hook(lambda _, inputs, output: read.append(inputs[0].numel()))
    pairs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    for scores in (trainer.group_scores(model, batch)[batch["mask"]], model(**pairs).scores):
        model.zero_grad()
        scores.square().sum().backward()
        gradients.append((scores, *[weight.grad.clone() for weight in model.parameters()]))
    assert read[0] < read[1] == batch["attention_mask"].sum()
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_a_distilled_student_learns_the_teachers_scale(student_dir, tmp_path):
    torch.manual_seed(0)
    groups = ragged_groups(4)
    args = DistillationConfig(**options(tmp_path, max_steps=150, learning_rate=3e-3, per_device_train_batch_size=4))
    trainer = DistillationTrainer(
        model=student(student_dir),
        args=args,
        train_dataset=groups,
        eval_dataset=groups.remove_columns("labels"),
        processing_class=AutoTokenizer.from_pretrained(student_dir),
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.05 * before["eval_loss"]
    assert "eval_pnr" not in after  # no labels, no measure of them
    assert isinstance(trainer, RankDistillationTrainer)


def test_resuming_in_mid_epoch_ends_with_the_same_weights(student_dir, tmp_path):
    def run(folder, resume=None):
        torch.manual_seed(0)
        model = BertDistilledRanker.from_pretrained(student_dir)  # with dropout
        args = DistillationConfig(
            **options(folder, max_steps=6, per_device_train_batch_size=3, gradient_accumulation_steps=2)
            | {"save_strategy": "steps", "save_steps": 2, "save_total_limit": None, "learning_rate": 1e-3}
        )
        trainer = DistillationTrainer(
            model=model,
            args=args,
            train_dataset=ragged_groups(16),
            processing_class=AutoTokenizer.from_pretrained(student_dir),
        )
        trainer.train(resume_from_checkpoint=resume)
        return model.state_dict()

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-4"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_limits_are_stored_with_the_model(student_dir, tmp_path):
    args = RankingConfig(**options(tmp_path, max_steps=1))
    trainer = RankingTrainer(
        model=student(student_dir),
        args=args,
        train_dataset=ragged_groups(),
        processing_class=AutoTokenizer.from_pretrained(student_dir),
    )
    trainer.save_model(str(tmp_path))
    marker = json.loads((tmp_path / "config.json").read_text())["disranker"]
    assert (marker["max_length"], marker["max_query_length"]) == (48, 16)
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == 48


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.remove_columns("labels"), "learns from 'labels'"),
        (lambda rows: rows.map(lambda row: {"labels": [1] * len(row["labels"])}), "no order to learn"),
    ],
)
def test_rows_that_teach_nothing_are_refused(student_dir, tmp_path, change, message):
    tokenizer = AutoTokenizer.from_pretrained(student_dir)
    with pytest.raises(ValueError, match=message):
        RankingTrainer(
            model=student(student_dir),
            args=RankingConfig(**options(tmp_path)),
            train_dataset=change(ragged_groups()),
            processing_class=tokenizer,
        )


def test_queries_without_a_pair_are_counted(student_dir, tmp_path, caplog):
    single = sum(len(row["labels"]) < 2 for row in ragged_groups())
    RankingTrainer(
        model=student(student_dir),
        args=RankingConfig(**options(tmp_path)),
        train_dataset=ragged_groups(),
        processing_class=AutoTokenizer.from_pretrained(student_dir),
    )
    assert single and f"{single} of 8 queries have no pair of different labels" in caplog.text


def test_ranking_metrics_match_hand_example():
    # query 0: labels 1 0 0, scores .5 .9 .1: one concordant, one discordant; query 1: labels 1 0, both in order.
    labels = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, np.nan]])
    scores = np.array([[0.5, 0.9, 0.1], [0.2, 0.3, 0.0]])
    values = ranking_metrics(EvalPrediction(predictions=scores, label_ids=labels))
    assert values["pnr"] == 2.0 and values["pair_accuracy"] == pytest.approx(2 / 3)
    assert values["ndcg@10"] == pytest.approx((1 / np.log2(3) + 1) / 2)


def test_score_spread_matches_hand_example():
    scores, mask = torch.tensor([[1.0, 3.0, 9.0], [5.0, 5.0, 5.0]]), torch.tensor([[True, True, False], [True] * 3])
    assert score_spread(scores, mask).mean.item() == pytest.approx((1.0 + 0.0) / 2)


def test_an_affine_transform_is_learned_and_stored(student_dir, tmp_path):
    groups = ragged_groups()
    args = DistillationConfig(**options(tmp_path, score_transform="affine", logging_steps=1, max_steps=1))
    model, tokenizer = student(student_dir), AutoTokenizer.from_pretrained(student_dir)
    trainer = DistillationTrainer(model=model, args=args, train_dataset=groups, processing_class=tokenizer)
    trainer.save_model(str(tmp_path))
    scores = np.concatenate(groups["teacher_scores"])
    stored = json.loads((tmp_path / "config.json").read_text())["disranker"]["score_transform"]
    assert stored == {"kind": "affine", "shift": pytest.approx(scores.mean()), "scale": pytest.approx(scores.std())}
    batch = trainer.data_collator(groups.to_list())
    wanted = (batch["teacher_scores"] - stored["shift"]) / stored["scale"]
    terms = trainer.loss_terms(wanted, batch)
    assert terms["point_mse"][1].mean < 1e-10 and terms["margin_mse"][1].mean < 1e-10
    with pytest.raises(ValueError, match="none or affine"):
        DistillationConfig(**options(tmp_path, score_transform="zscore"))


def test_labels_of_some_documents_will_do_for_a_loss_on_labels(student_dir, tmp_path):
    args = DistillationConfig(**options(tmp_path, hinge_weight=0.3, ranknet_weight=0.2, kl_weight=0.1))
    trainer = DistillationTrainer(
        model=student(student_dir),
        args=args,
        train_dataset=ragged_groups(),
        processing_class=AutoTokenizer.from_pretrained(student_dir),
    )
    batch = {"labels": torch.tensor([[1.0, np.nan, 0.0]]), "mask": torch.ones(1, 3, dtype=torch.bool)}
    batch["teacher_scores"] = torch.tensor([[1.0, 2.0, 3.0]])
    terms = trainer.loss_terms(torch.tensor([[0.0, 9.0, 0.0]]), batch)
    assert {name: weight for name, (weight, _) in terms.items()} == {
        "point_mse": 0.05,
        "margin_mse": 0.5,
        "kl": 0.1,
        "hinge": 0.3,
        "ranknet": 0.2,
    }
    assert terms["hinge"][1].mean == 1.0  # one pair of known grades, equal scores: the whole margin
    assert terms["ranknet"][1].mean.item() == pytest.approx(np.log(2))
