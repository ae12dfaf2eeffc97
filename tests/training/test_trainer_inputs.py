"""What users pass to the trainers: models of any kind, precision, options that have no effect, missing pieces."""

import copy

import pandas as pd
import pytest
import torch
import transformers.trainer
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
    TrainingArguments,
)
from two_processes import ragged_groups

from hf_disranker import (
    BertDistilledRanker,
    ClickTrainer,
    CptConfig,
    DistillationConfig,
    DistillationTrainer,
    LLMForLastTokenRanking,
    RankDistillationConfig,
    RankingConfig,
    RankingTrainer,
    click_dataset,
)
from hf_disranker.recipes.quickstart.from_scratch import small_bert, small_llama

SETTINGS = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
# Not every version of transformers has the second one.
STRATEGIES = ["group_by_length"] + ["batch_rebalance"] * hasattr(transformers.trainer, "BatchRebalanceSampler")
SHORT = {"max_length": 48, "max_query_length": 16, **SETTINGS}


@pytest.fixture(scope="module")
def groups():
    return ragged_groups(7, 5)


@pytest.fixture(scope="module")
def plain_llama(tiny_teacher, tmp_path_factory):
    """A causal language model whose tokenizer pads with the end-of-sequence token."""
    folder, tokenizer = tmp_path_factory.mktemp("llama"), copy.deepcopy(tiny_teacher[1])
    tokenizer.pad_token = tokenizer.eos_token
    torch.manual_seed(0)
    model = small_llama(tokenizer, layers=1, size=32)
    model.resize_token_embeddings(len(tokenizer))
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    return str(folder)


def causal_in_bf16(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def share_changed(trainer):
    """Share of the weights that training changes."""
    before = [weight.detach().clone() for weight in trainer.model.parameters()]
    trainer.train()
    pairs = list(zip(before, trainer.model.parameters(), strict=True))
    return sum((old != new).sum().item() for old, new in pairs) / sum(old.numel() for old, _ in pairs)


def state_of(tokenizer):
    backend = tokenizer.backend_tokenizer.to_str()
    return len(tokenizer), tokenizer.pad_token, tokenizer.model_max_length, tokenizer.padding_side, backend


def test_a_folder_and_rows_are_enough(tiny_student, groups, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = copy.deepcopy(tiny_student[1])
    tokenizer.model_max_length = 256
    for part in (small_bert(tokenizer, layers=1, size=32), tokenizer):
        part.save_pretrained("bert")
    trainer = RankingTrainer("bert", train_dataset=groups)
    assert isinstance(trainer.model, BertDistilledRanker) and isinstance(trainer.args, RankingConfig)
    assert trainer.args.eval_strategy == "no" and trainer.model.config.disranker["max_query_length"] == 32
    assert len(trainer.processing_class) == len(tokenizer)
    assert RankDistillationConfig is DistillationConfig


@pytest.mark.parametrize("kind", [RankingConfig, DistillationConfig, CptConfig])
def test_an_evaluation_set_is_evaluated_every_epoch(student_dir, groups, tmp_path, kind):
    assert kind(str(tmp_path), use_cpu=True).eval_strategy == "epoch"
    args = RankingConfig(str(tmp_path), **SHORT)
    for eval_dataset, strategy in ((None, "no"), (groups, "epoch"), (None, "no")):
        trainer = RankingTrainer(student_dir, args, groups, eval_dataset)
        assert trainer.args.eval_strategy == strategy
    with pytest.raises(ValueError, match="didn't pass an `eval_dataset`"):
        RankingTrainer(student_dir, RankingConfig(str(tmp_path), eval_strategy="epoch", **SHORT), groups)
    with pytest.raises(ValueError, match="early_stopping_patience needs an eval_dataset"):
        RankingTrainer(student_dir, RankingConfig(str(tmp_path), early_stopping_patience=2, **SHORT), groups)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_a_student_stored_in_half_precision_is_trained_in_fp32(student_dir, groups, tmp_path, caplog, stored):
    model = BertDistilledRanker.from_pretrained(student_dir, dtype=stored)
    args = DistillationConfig(str(tmp_path), max_steps=1, learning_rate=1e-5, warmup_steps=0, **SHORT)
    trainer = DistillationTrainer(model, args, groups, processing_class=AutoTokenizer.from_pretrained(student_dir))
    assert {weight.dtype for weight in trainer.model.parameters()} == {torch.float32}
    assert f"The weights are {str(stored)[6:]} and are trained in float32" in caplog.text
    assert share_changed(trainer) > 0.5


def test_half_precision_weights_are_trained_when_asked_for(student_dir, groups, tmp_path):
    args = DistillationConfig(str(tmp_path), weights_dtype="bfloat16", **SHORT)
    trainer = DistillationTrainer(student_dir, args, groups)
    assert {weight.dtype for weight in trainer.model.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="weights_dtype is float32 or bfloat16, got 'float16'"):
        CptConfig(str(tmp_path), weights_dtype="float16", use_cpu=True)
    with pytest.raises(ValueError, match="would round the weights for good"):
        RankingConfig(str(tmp_path), bf16_full_eval=True)


def test_clicks_are_learned_in_fp32_by_a_model_that_pads_with_its_end(plain_llama, clicks, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(plain_llama)
    words, before = len(tokenizer), state_of(tokenizer)
    rows = click_dataset(clicks, tokenizer, max_length=48)
    args = CptConfig(str(tmp_path), max_length=48, max_steps=1, **SETTINGS)
    for model in (plain_llama, causal_in_bf16(plain_llama)):
        trainer = ClickTrainer(model, args, rows, processing_class=tokenizer)
        assert {weight.dtype for weight in trainer.model.parameters()} == {torch.float32}
        assert trainer.model.get_input_embeddings().num_embeddings == len(trainer.processing_class) == words + 1
    trainer.train()
    assert state_of(tokenizer) == before
    with pytest.raises(TypeError, match="ClickTrainer needs args of CptConfig"):
        ClickTrainer(plain_llama, TrainingArguments(str(tmp_path)), rows)
    with pytest.raises(ValueError, match="max_length 65 is beyond the 64 positions"):
        ClickTrainer(plain_llama, CptConfig(str(tmp_path), max_length=65, **SETTINGS), rows)


def test_an_adapter_is_trained_in_fp32_on_weights_as_they_are_stored(plain_llama, groups, tmp_path):
    model = LLMForLastTokenRanking.from_pretrained(plain_llama, dtype=torch.bfloat16)
    args = RankingConfig(str(tmp_path), max_steps=2, learning_rate=1e-2, warmup_steps=0, **SHORT)
    adapter = LoraConfig(target_modules=["q_proj"])
    trainer = RankingTrainer(
        model, args, groups, groups, AutoTokenizer.from_pretrained(plain_llama), peft_config=adapter
    )
    dtypes = {weight.requires_grad: weight.dtype for weight in trainer.model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    names = {name.split(".")[-3] for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert names == {"lora_A", "lora_B", "modules_to_save"} and adapter.task_type is None
    assert share_changed(trainer) > 0 and trainer.evaluate()["eval_loss"] > 0
    with pytest.raises(ValueError, match="task_type of peft_config is CAUSAL_LM"):
        RankingTrainer(plain_llama, args, groups, peft_config=LoraConfig(task_type="CAUSAL_LM"))


def test_a_causal_model_that_pads_with_its_end_is_fitted(plain_llama, groups, tmp_path):
    args = RankingConfig(str(tmp_path), max_steps=1, **SHORT)
    trainer = RankingTrainer(LLMForLastTokenRanking.from_pretrained(plain_llama), args, groups, groups)
    trainer.train()
    config = trainer.model.config
    assert config.pad_token_id == trainer.processing_class.pad_token_id == config.vocab_size - 1


def test_the_callers_tokenizer_and_config_are_not_modified(plain_llama, student_dir, groups, tmp_path):
    for folder, kind in ((plain_llama, LLMForLastTokenRanking), (student_dir, BertDistilledRanker)):
        model, tokenizer = kind.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        config, before = model.config, (copy.deepcopy(model.config.to_dict()), state_of(tokenizer))
        trainer = RankingTrainer(model, RankingConfig(str(tmp_path), **SHORT), groups, processing_class=tokenizer)
        assert (config.to_dict(), state_of(tokenizer)) == before
        assert trainer.model.config.disranker["max_length"] == trainer.processing_class.model_max_length == 48


def test_stock_classifiers_share_their_weights(tiny_student, tiny_teacher, groups, tmp_path):
    for (ranker, tokenizer), stock_class in (
        (tiny_student, BertForSequenceClassification),
        (tiny_teacher, LlamaForSequenceClassification),
    ):
        ranker.save_pretrained(tmp_path)
        stock = stock_class.from_pretrained(tmp_path)
        args = RankingConfig(str(tmp_path / "out"), max_steps=1, learning_rate=1e-3, warmup_steps=0, **SHORT)
        trainer = RankingTrainer(stock, args, groups, processing_class=tokenizer)
        assert isinstance(trainer.model, BertDistilledRanker | LLMForLastTokenRanking)
        ids = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
        torch.testing.assert_close(trainer.model(**ids).logits, ranker(**ids).logits)
        trainer.train()
        trainer.save_model(str(tmp_path / "out"))
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
        torch.testing.assert_close(again.eval()(**ids).logits, stock.eval()(**ids).logits)
        assert again.config.marker.templates == ranker.config.marker.templates


def test_models_that_are_not_rankers_are_refused(tiny_student, plain_llama, groups, tmp_path):
    args, tokenizer = RankingConfig(str(tmp_path), **SHORT), tiny_student[1]
    config = copy.deepcopy(tiny_student[0].bert.config)
    two = BertForSequenceClassification(type(config).stock(**{**config.to_dict(), "num_labels": 2}))
    for model, error, message in (
        (two, ValueError, "has 2 labels; a ranker has one: load it with num_labels=1"),
        (causal_in_bf16(plain_llama), TypeError, "A LlamaForCausalLM is not a ranker: pass .* the folder or Hub id"),
        (torch.nn.Linear(2, 2), TypeError, "A Linear is not a ranker"),
    ):
        with pytest.raises(error, match=message):
            RankingTrainer(model, args, groups, processing_class=tokenizer)
    with pytest.raises(ValueError, match="not loaded from a checkpoint: pass processing_class"):
        RankingTrainer(small_bert(tokenizer, layers=1, size=32), args, groups)


def test_model_init_is_called_for_each_training(student_dir, groups, tmp_path):
    made = []

    def model_init(trial):
        made.append(BertDistilledRanker.from_pretrained(student_dir, dtype=torch.bfloat16))
        return made[-1]

    args = RankingConfig(str(tmp_path), max_steps=1, learning_rate=1e-3, warmup_steps=0, **SHORT)
    trainer = RankingTrainer(args=args, train_dataset=groups, model_init=model_init)
    results = []
    for _ in range(2):
        trainer.train()
        results.append(trainer.model)
    assert len(made) == 3 and results[0] is not results[1]
    for one, two in zip(results[0].parameters(), results[1].parameters(), strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, two)
    with pytest.raises(ValueError, match="needs either a model or a model_init"):
        RankingTrainer(args=args, train_dataset=groups)


@pytest.mark.parametrize("trainer_class", [RankingTrainer, DistillationTrainer])
def test_options_that_would_be_ignored_are_refused(student_dir, groups, tmp_path, trainer_class):
    args = trainer_class.config_class(str(tmp_path), **SHORT)
    for name in ("compute_loss_func", "data_collator"):
        with pytest.raises(TypeError, match=f"accepts no .*{name}.* loss_terms"):
            trainer_class(student_dir, args, groups, **{name: lambda *_: 1 / 0})
    with pytest.raises(TypeError, match=f"needs args of {trainer_class.config_class.__name__}, .* TrainingArguments"):
        trainer_class(student_dir, TrainingArguments(str(tmp_path), use_cpu=True), groups)
    for name, value in (("remove_unused_columns", True), ("label_names", ["labels"]), ("label_smoothing_factor", 0.1)):
        with pytest.raises(ValueError, match=f"{name} must stay"):
            trainer_class.config_class(str(tmp_path), **SHORT | {name: value})
    with pytest.raises(ValueError, match="batch_eval_metrics needs another compute_metrics"):
        trainer_class(student_dir, trainer_class.config_class(str(tmp_path), batch_eval_metrics=True, **SHORT), groups)
    with pytest.raises(ValueError, match="max_length 65 is beyond the 64 positions"):
        trainer_class(student_dir, trainer_class.config_class(str(tmp_path), **SHORT | {"max_length": 65}), groups)


def test_losses_that_the_trainer_does_not_read_are_refused(student_dir, groups, tmp_path):
    trainer = RankingTrainer(student_dir, DistillationConfig(str(tmp_path), **SHORT), groups)
    with pytest.raises(ValueError, match="All losses of RankingTrainer have weight 0"):
        trainer.train()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sampling_by_length_needs_lengths(student_dir, groups, tmp_path, strategy):
    args = RankingConfig(str(tmp_path), max_steps=1, train_sampling_strategy=strategy, **SHORT)
    with pytest.raises(ValueError, match="needs a column 'length' in train_dataset; token_budget"):
        RankingTrainer(student_dir, args, groups)
    with_lengths = groups.add_column("length", [len(row) for row in groups["doc_ids"]])
    RankingTrainer(student_dir, args, with_lengths, with_lengths).train()


def test_rows_of_another_kind_are_refused(student_dir, groups, tmp_path):
    args = RankingConfig(str(tmp_path), **SHORT)
    for rows, error, message in (
        ("judgments.parquet", TypeError, "train_dataset is the path 'judgments.parquet': read it by load_groups"),
        (DatasetDict(train=groups), TypeError, r"contains several sets, \['train'\]: choose one"),
        (Dataset.from_dict({"query": ["a"], "label": [1]}), ValueError, "train_dataset lacks the columns .'doc_ids'"),
    ):
        with pytest.raises(error, match=message):
            RankingTrainer(student_dir, args, rows)
    with pytest.raises(ValueError, match="dev lacks the columns"):
        RankingTrainer(student_dir, args, groups, {"dev": groups.remove_columns("titles")})


@pytest.mark.parametrize("trainer_class", [RankingTrainer, DistillationTrainer])
def test_the_evaluation_loss_covers_the_whole_set(student_dir, groups, tmp_path, trainer_class):
    found = []
    weights = {"hinge_weight": 0.5, "softmax_weight": 0.3}
    weights |= {"kl_weight": 0.2} if trainer_class is DistillationTrainer else {}
    for size, eval_dataset in ((1, groups), (3, groups), (16, groups), (3, {"one": groups, "two": groups})):
        args = trainer_class.config_class(str(tmp_path), per_device_eval_batch_size=size, **SHORT | weights)
        trainer = trainer_class(student_dir, args, groups, eval_dataset)
        found += [value for name, value in trainer.evaluate().items() if name.endswith("loss")]
    batch = trainer.data_collator(groups.to_list())
    with torch.no_grad():
        terms = trainer.loss_terms(trainer.group_scores(trainer.model.eval(), dict(batch)), batch)
    assert found == [pytest.approx(sum(factor * term.mean.item() for factor, term in terms.values()), rel=1e-6)] * 5
    assert trainer.predict(groups).metrics["test_loss"] == pytest.approx(found[0], rel=1e-6)
    assert "test_loss" not in trainer.predict(groups.remove_columns(["labels", "teacher_scores"])).metrics


def test_the_evaluation_loss_on_clicks_is_the_mean_over_tokens(plain_llama, clicks, tmp_path):
    clicks = pd.concat([clicks, clicks.assign(summary="")])
    rows, found = click_dataset(clicks, AutoTokenizer.from_pretrained(plain_llama), max_length=48), []
    assert len({len(row["input_ids"]) for row in rows}) > 1
    for size in (1, 3, 16):
        args = CptConfig(str(tmp_path), max_length=48, per_device_eval_batch_size=size, **SETTINGS)
        found.append(ClickTrainer(plain_llama, args, rows, rows).evaluate()["eval_loss"])
    assert found == pytest.approx([found[0]] * 3, rel=1e-6)


def test_measures_do_not_depend_on_how_predictions_are_gathered(student_dir, groups, tmp_path):
    measured = []
    for concat in (True, False):
        args = RankingConfig(str(tmp_path), eval_do_concat_batches=concat, per_device_eval_batch_size=3, **SHORT)
        measured.append(RankingTrainer(student_dir, args, groups, groups).evaluate())
    for name in ("eval_pnr", "eval_ndcg@10", "eval_mrr", "eval_loss"):
        assert measured[0][name] == measured[1][name]


def test_a_custom_loss_is_evaluated_too(student_dir, groups, tmp_path):
    class Mine(RankingTrainer):
        def loss_terms(self, scores, batch):
            _, term = super().loss_terms(scores, batch)["hinge"]
            return {"mine": (2.0, term)}

    args = RankingConfig(str(tmp_path), **SHORT)
    losses = [kind(student_dir, args, groups, groups).evaluate()["eval_loss"] for kind in (RankingTrainer, Mine)]
    assert losses[1] == pytest.approx(2 * losses[0])


def test_labelled_and_unlabelled_queries_are_distilled_together(student_dir, groups, tmp_path):
    rows = groups.to_list()
    rows[0]["labels"] = None
    rows[2]["labels"] = [None, *rows[2]["labels"][1:]]
    rows[3]["teacher_scores"] = None
    args = DistillationConfig(str(tmp_path), hinge_weight=0.5, max_steps=2, logging_steps=1, **SHORT)
    trainer = DistillationTrainer(student_dir, args, Dataset.from_list(rows), Dataset.from_list(rows))
    trainer.train()
    assert all(entry["loss"] > 0 and entry["hinge"] > 0 for entry in trainer.state.log_history if "loss" in entry)
    assert trainer.evaluate()["eval_loss"] > 0
