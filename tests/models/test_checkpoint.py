"""What is loaded: whole weights, the tokenizer that belongs to them, limits within their positions."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from hf_disranker import BertDistilledRanker, LLMForLastTokenRanking, Ranker
from hf_disranker.data.templates import Templates
from hf_disranker.models.checkpoint import Marker
from hf_disranker.models.checks import check_length, position_limit
from hf_disranker.models.teacher import fit_embeddings, prepare_tokenizer
from hf_disranker.recipes import cpt, distill, fit_teacher
from hf_disranker.training.cpt import CptConfig
from hf_disranker.training.distillation import DistillationConfig
from hf_disranker.training.ranking_trainer import RankingConfig

TINY = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json")


def renamed(folder, target, rename):
    """A copy of a checkpoint with other keys; a key that becomes None is left out."""
    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    save_file({rename(key): value for key, value in weights.items() if rename(key)}, target / "model.safetensors")
    return str(target)


@pytest.mark.parametrize(
    ("kind", "lost"), [("student", "bert.embeddings.LayerNorm.bias"), ("teacher", "model.embed_tokens.weight")]
)
def test_an_encoder_that_would_start_at_random_is_refused(kind, lost, request, tmp_path):
    loader = {"student": BertDistilledRanker, "teacher": LLMForLastTokenRanking}[kind]
    folder = request.getfixturevalue(f"{kind}_dir")
    config = json.loads(Path(folder, "config.json").read_text())
    del config["disranker"]  # as a stock class saved it
    prefixed = renamed(folder, tmp_path / "prefixed", lambda key: f"module.{key}")
    Path(prefixed, "config.json").write_text(json.dumps(config))
    message = f"prefixed lacks .* weights of the model, such as {lost}, .* It has others, such as module"
    for load in (loader.from_pretrained, Ranker.from_pretrained):
        with pytest.raises(ValueError, match=message):
            load(prefixed)
    one = renamed(folder, tmp_path / "one", lambda key: None if key == lost else key)
    with pytest.raises(ValueError, match=f"one lacks 1 weights of the model, such as {lost}"):
        loader.from_pretrained(one)


def test_a_bert_without_pooler_gets_a_new_one_with_its_head(tmp_path):
    BertForMaskedLM(BertConfig(**TINY)).save_pretrained(tmp_path)
    _, info = BertDistilledRanker.from_pretrained(tmp_path, output_loading_info=True)
    assert {key.split(".")[-3] for key in info["missing_keys"] if "pooler" in key} == {"pooler"}
    with pytest.raises(ValueError, match="is not a trained ranker: it lacks"):
        Ranker.from_pretrained(tmp_path)


def test_cpt_refuses_a_language_model_without_its_head(teacher_dir, clicks, tmp_path):
    plain = renamed(teacher_dir, tmp_path / "plain", lambda key: None if key.startswith("score") else key)
    config = json.loads(Path(plain, "config.json").read_text()) | {"tie_word_embeddings": False}
    del config["disranker"]
    Path(plain, "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="plain lacks 1 weights of the model, such as lm_head.weight"):
        cpt.load_model(cpt.ModelConfig(plain))


def test_a_marker_survives_a_round_trip_and_is_checked():
    marker = Marker("student", "cls", Templates(), max_length=48, teacher={"id": "org/teacher", "revision": None})
    content = marker.to_dict()
    assert Marker.from_dict(content, "student") == marker
    assert content["score_transform"] is None and "ending" not in content and content["max_length"] == 48
    for changes, message in (
        ({"format": 2}, "format 2, this package supports up to 1"),
        ({"role": "teacher"}, "This checkpoint is a teacher, not a student"),
        ({"max_length": "48"}, "max_length in the key disranker of config.json is '48', not an integer"),
        ({"templates": {"text_": "x"}}, "The templates in the key disranker of config.json cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            Marker.from_dict(content | changes, "student")


def test_a_folder_without_tokenizer_files_is_refused(student_dir, tmp_path):
    shutil.copytree(student_dir, tmp_path / "bare", ignore=shutil.ignore_patterns(*TOKENIZER_FILES))
    with pytest.raises(ValueError, match=r"bare: the tokenizer has 5 tokens, .* embeddings for \d+: .* missing"):
        Ranker.from_pretrained(tmp_path / "bare")


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(tiny_student, tiny_teacher):
    for config, tokenizer in ((BertConfig, tiny_student[1]), (LlamaConfig, tiny_teacher[1])):
        kind = BertDistilledRanker if config is BertConfig else LLMForLastTokenRanking.from_config
        with pytest.raises(ValueError, match=r"produces token ids up to \d+, the model has embeddings for 60 tokens"):
            Ranker(kind(config(**TINY)), tokenizer)


def test_embeddings_may_be_padded(tiny_student):
    tokenizer = tiny_student[1]
    rows = -(-len(tokenizer) // 64) * 64
    assert rows > len(tokenizer)
    Ranker(BertDistilledRanker(BertConfig(**TINY | {"vocab_size": rows})), tokenizer)


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (BertConfig(max_position_embeddings=512), 512),
        (LlamaConfig(max_position_embeddings=2048), 2048),
        (LlamaConfig(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}), None),
    ],
)
def test_a_limit_beyond_the_positions_is_refused(config, positions):
    assert position_limit(config) == positions
    check_length(config, positions or 100_000)
    if positions:
        with pytest.raises(ValueError, match=f"max_length {positions + 1} is beyond the {positions} positions of"):
            check_length(config, positions + 1)


def test_every_stage_names_a_missing_folder(tmp_path):
    runs = [
        (distill, distill.ScriptArguments("runs/nothing", "no.parquet"), DistillationConfig(str(tmp_path))),
        (fit_teacher, fit_teacher.ScriptArguments("no.parquet"), RankingConfig(str(tmp_path))),
        (cpt, cpt.ScriptArguments("no.parquet"), CptConfig(str(tmp_path))),
    ]
    for stage, *arguments in runs:
        model_args = [] if stage is distill else [cpt.ModelConfig("runs/nothing")]
        with pytest.raises(OSError, match="runs/nothing: no such folder, and as a Hub id: "):
            stage.main(*arguments, *model_args)
    for kind in (BertDistilledRanker, LLMForLastTokenRanking):
        with pytest.raises(OSError, match="runs/nothing: no such folder, and as a Hub id: "):
            kind.from_pretrained("runs/nothing")


def test_the_positions_bound_every_stage(student_dir, teacher_dir, judgments, clicks, tmp_path):
    table, clicked = str(tmp_path / "judgments.parquet"), str(tmp_path / "clicks.parquet")
    judgments.assign(teacher_score=1.0 * judgments["label"]).to_parquet(table)
    clicks.to_parquet(clicked)
    options = {"max_length": 65, "eval_strategy": "no", "use_cpu": True}
    out = str(tmp_path / "out")
    runs = [
        (distill, distill.ScriptArguments(student_dir, table), DistillationConfig(out, **options)),
        (fit_teacher, fit_teacher.ScriptArguments(table), RankingConfig(out, **options), fit_teacher.ModelConfig()),
        (cpt, cpt.ScriptArguments(clicked), CptConfig(out, **options), cpt.ModelConfig(teacher_dir)),
    ]
    runs[1][3].model_name_or_path = teacher_dir
    for stage, *arguments in runs:
        with pytest.raises(ValueError, match="max_length 65 is beyond the 64 positions of .*: choose 64"):
            stage.main(*arguments)


@pytest.mark.parametrize(("asked", "dtype"), [({}, torch.float32), ({"weights_dtype": "bfloat16"}, torch.bfloat16)])
def test_a_student_stored_in_half_precision_is_trained_in_fp32(
    asked, dtype, student_dir, judgments, tmp_path, monkeypatch
):
    folder, table = tmp_path / "half", str(tmp_path / "scores.parquet")
    shutil.copytree(student_dir, folder)
    BertDistilledRanker.from_pretrained(student_dir).bfloat16().save_pretrained(folder)
    judgments.assign(teacher_score=1.0 * judgments["label"]).to_parquet(table)

    def look(model, **_):
        raise InterruptedError(str({weight.dtype for weight in model.parameters()}))

    monkeypatch.setattr(distill, "DistillationTrainer", look)
    with pytest.raises(InterruptedError, match=str(dtype)):
        distill.main(
            distill.ScriptArguments(str(folder), table), DistillationConfig(str(tmp_path), use_cpu=True, **asked)
        )


@pytest.mark.parametrize("labels", [2, 3])
def test_a_classifier_with_several_labels_is_named(labels, tmp_path):
    BertForSequenceClassification(BertConfig(**TINY, num_labels=labels)).save_pretrained(tmp_path)
    message = f"is a classifier with {labels} labels; a ranker has one score"
    for load in (Ranker.from_pretrained, BertDistilledRanker.from_pretrained):
        with pytest.raises(ValueError, match=message):
            load(tmp_path)


def test_a_lora_adapter_alone_loads_as_a_teacher_but_not_as_a_ranker(teacher_dir, tmp_path):
    torch.manual_seed(0)
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(LLMForLastTokenRanking.from_pretrained(teacher_dir), lora).eval()
    adapted.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"contains an adapter \(LoRA\) of .* without the model itself. Merge them first"
    ):
        Ranker.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Merge them first"):
        cpt.load_model(cpt.ModelConfig(str(tmp_path)))
    ids = torch.tensor([[0, 7, 8, 9, 1]])
    expected = adapted(input_ids=ids).scores
    loaded = LLMForLastTokenRanking.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=ids).scores, expected)
    merged = PeftModel.from_pretrained(LLMForLastTokenRanking.from_pretrained(teacher_dir), tmp_path)
    torch.testing.assert_close(merged.merge_and_unload().eval()(input_ids=ids).scores, expected)


def test_a_causal_language_model_without_pad_token_gets_one(tiny_teacher, tmp_path):
    tokenizer = tiny_teacher[1]
    config = LlamaConfig(**TINY | {"vocab_size": len(tokenizer)}, eos_token_id=1, pad_token_id=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"pad_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(saved))
    model, tokenizer = cpt.load_model(cpt.ModelConfig(str(tmp_path)))
    fit_embeddings(model, prepare_tokenizer(tokenizer))
    pad = tokenizer.pad_token_id
    assert pad != tokenizer.eos_token_id and model.config.pad_token_id == pad
    assert model.get_input_embeddings().num_embeddings > pad
