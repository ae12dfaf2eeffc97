"""Teachers and students of every family: stock on disk, loaded by the Auto classes, trainable."""

import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from sentence_transformers import CrossEncoder
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from hf_disranker import DistillationConfig, DistillationTrainer, DistilledRanker, LLMForLastTokenRanking, Ranker
from hf_disranker.models.checks import position_limit
from hf_disranker.models.families import is_decoder
from hf_disranker.models.loading import ranker_class
from hf_disranker.models.packing import PACKED, packs
from hf_disranker.serving.export import export, formats

SIZE = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}
SIZE |= {"num_key_value_heads": 1, "intermediate_size": 32, "max_position_embeddings": 64}
SIZE |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "initializer_range": 0.2}
MIXTURE = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
DEEPSEEK = {"n_routed_experts": 2, "n_group": 1, "topk_group": 1, "num_key_value_heads": 2}
LINEAR = {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_key_head_dim": 8}
LINEAR |= {"linear_num_value_heads": 2, "linear_value_head_dim": 8}
OWN = {
    "deepseek_v3": MIXTURE | LATENT | DEEPSEEK,
    "falcon": {"num_kv_heads": 1},
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "num_experts": 2, "num_experts_per_tok": 1},
    "mixtral": {"num_local_experts": 2},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 32},
    "qwen3_5_text": LINEAR,
    "qwen3_next": LINEAR | MIXTURE | {"shared_expert_intermediate_size": 16},
    "qwen2_moe": MIXTURE | {"shared_expert_intermediate_size": 16},
    "qwen3_moe": MIXTURE,
}
EARLIER = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"]  # in test_teacher.py
QUICK = ["mixtral", "gpt2", "opt", "falcon"]
LONG = ["qwen2_moe", "qwen3_moe", "gemma", "phi3", "smollm3", "olmo2", "olmo3", "glm4", "gpt_neox", "starcoder2"]
LONG += ["gpt_oss", "deepseek_v3", "qwen3_5_text", "qwen3_next", "jamba"]
# What the servers list: TEI's backends of July 2026 with a classification head and these names of weights; vLLM's
# pages on scoring and classification, and its registry of decoders; Infinity's rule (BERT-like classifiers with one
# label) on the transformers below version 5 that it needs.
TEI = ["bert", "deberta-v2", "distilbert", "modernbert", "roberta", "xlm-roberta"]
VLLM = ["bert", "ernie", "modernbert", "roberta", "xlm-roberta"]
INFINITY = [*TEI, "albert", "electra", "ernie", "mpnet"]
SERVERS = {
    "TEI": {"student": TEI, "teacher": []},
    "vLLM": {"student": VLLM, "teacher": [*EARLIER, *QUICK, *LONG]},
    "Infinity": {"student": INFINITY, "teacher": []},
}
TEXTS = [[2, 5, 6, 7, 1], [2, 8, 1], [2, 9, 10, 11, 12, 13, 1]]


def by_weight(quick, long):
    return [*quick, *(pytest.param(name, marks=pytest.mark.slow) for name in long)]


def batch(side):
    rows, masks = [], []
    for text in TEXTS:
        fill, mask = [0] * (7 - len(text)), [1] * len(text)
        rows.append(fill + text if side == "left" else text + fill)
        masks.append(fill + mask if side == "left" else mask + fill)
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}


def tiny_config(model_type):
    if model_type not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        pytest.skip(f"this transformers has no {model_type} with a sequence-classification head")
    kind = LLMForLastTokenRanking.family_class(model_type).config_class.stock
    known = {field.name for field in dataclasses.fields(kind)} | set(kind.attribute_map)
    return kind(**{key: value for key, value in (SIZE | OWN.get(model_type, {})).items() if key in known})


@pytest.mark.parametrize("family", by_weight(QUICK, LONG))
def test_a_teacher_is_stock_on_disk_and_trains(family, tmp_path):
    config = tiny_config(family)
    torch.manual_seed(0)
    teacher = LLMForLastTokenRanking.from_config(config).eval()
    with torch.no_grad():
        scores = teacher(**batch("right")).scores
        torch.testing.assert_close(teacher(**batch("left")).scores, scores, atol=1e-5, rtol=0)
        assert scores.std() > 1e-3
        teacher.save_pretrained(tmp_path)
        stock_class = getattr(transformers, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[family])
        stock = stock_class.from_pretrained(tmp_path, config=type(config).from_pretrained(tmp_path)).eval()
        assert type(stock) is stock_class
        torch.testing.assert_close(stock(**batch("right")).logits.squeeze(-1), scores, atol=1e-5, rtol=0)
        for loader in (AutoModel, AutoModelForSequenceClassification, LLMForLastTokenRanking):
            again = loader.from_pretrained(tmp_path).eval()
            assert type(again) is type(teacher)
            torch.testing.assert_close(again(**batch("right")).scores, scores, atol=1e-5, rtol=0)
    optimizer = torch.optim.SGD(teacher.parameters(), lr=0.01)
    loss = teacher(**batch("right"), labels=torch.tensor([0.5, -1.0, 2.0])).loss
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        assert teacher(**batch("right")).scores.sub(scores).abs().max() > 0


@pytest.mark.parametrize("family", by_weight(QUICK, LONG))
def test_a_teacher_trains_by_lora_and_loads_with_the_adapter(family, tmp_path):
    torch.manual_seed(0)
    LLMForLastTokenRanking.from_config(tiny_config(family)).save_pretrained(tmp_path / "base")
    base = LLMForLastTokenRanking.from_pretrained(tmp_path / "base")
    lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(base, lora)
    model(**batch("right"), labels=torch.tensor([0.5, -1.0, 2.0])).loss.backward()
    trained = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert any("lora_A" in name for name in trained) and any("modules_to_save" in name for name in trained)
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    model.save_pretrained(tmp_path / "adapter")
    again = LLMForLastTokenRanking.from_pretrained(tmp_path / "adapter").eval()
    with torch.no_grad():
        scores = model.eval()(**batch("right")).scores
        torch.testing.assert_close(again(**batch("right")).scores, scores, atol=1e-5, rtol=0)
        assert (scores - base.from_pretrained(tmp_path / "base").eval()(**batch("right")).scores).abs().max() > 1e-3


def pair_tokenizer(types=True):
    """Fast tokenizer of words w0 to w79 that joins pairs; its padding id is 1, as in RoBERTa."""
    words = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", *(f"w{number}" for number in range(80))]
    backend = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = ["input_ids", "token_type_ids", "attention_mask"] if types else ["input_ids", "attention_mask"]
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=names, model_max_length=62, **special)


ENCODER = {"vocab_size": 84, "pad_token_id": 1, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3}
ENCODER |= {"sep_token_id": 3, "embedding_size": 32, "hidden_act": "gelu", "num_key_value_heads": 2}
TYPED = ["electra", "ernie", "albert", "nomic_bert"]
POSITIONS = {"roberta": 62, "xlm-roberta": 62, "mpnet": 62}
QUICK_STUDENTS = ["roberta", "electra", "modernbert"]
LONG_STUDENTS = [
    "xlm-roberta",
    "distilbert",
    "deberta-v2",
    "albert",
    "mpnet",
    "ernie",
    "eurobert",
    "nomic_bert",
    "gte",
]
STOCK = """
import json, pathlib, sys
from sentence_transformers import CrossEncoder
from transformers import AutoModel, AutoModelForSequenceClassification
pairs, results = json.loads(sys.argv[2]), {}
for folder in pathlib.Path(sys.argv[1]).iterdir():
    classes = [type(kind.from_pretrained(folder)).__name__ for kind in (AutoModel, AutoModelForSequenceClassification)]
    results[folder.name] = [*classes, CrossEncoder(str(folder), device="cpu").predict(pairs).tolist()]
assert "hf_disranker" not in sys.modules
print(json.dumps(results))
"""
PAIRS = [("w1 w2", "w3 w4 w5"), ("w1 w2", "w6"), ("w7", "w8 w9 w10 w11 w12 w13")]

ONE_STEP = {"max_steps": 1, "warmup_steps": 0, "learning_rate": 0.01, "max_length": 62, "max_query_length": 8}
ONE_STEP |= {"use_cpu": True}


def student_config(model_type):
    if model_type not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        pytest.skip(f"this transformers has no {model_type} with a sequence-classification head")
    kind = DistilledRanker.family_class(model_type).config_class.stock
    known = {field.name for field in dataclasses.fields(kind)} | set(kind.attribute_map)
    own = {"type_vocab_size": 2 if model_type in TYPED else 0 if model_type == "deberta-v2" else 1}
    return kind(**{key: value for key, value in (SIZE | ENCODER | own).items() if key in known})


@pytest.mark.parametrize("family", by_weight(["gemma3_text", *QUICK, *QUICK_STUDENTS], [*LONG, *LONG_STUDENTS]))
def test_without_padding_logits_and_gradients_are_those_of_the_stock_class(family):
    encoder = family in (*QUICK_STUDENTS, *LONG_STUDENTS)
    config = student_config(family) if encoder else tiny_config(family)
    torch.manual_seed(0)
    model = (DistilledRanker if encoder else LLMForLastTokenRanking).from_config(config).eval()
    attention = model.base_model.config._attn_implementation
    assert (attention == PACKED) == packs(config)
    found = []
    for kind in (attention, "sdpa" if attention == PACKED else attention):
        model.base_model.set_attn_implementation(kind)
        model.zero_grad()
        logits = model(**batch("right")).logits
        logits.square().sum().backward()
        gradients = [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
        found.append((logits.detach(), torch.cat(gradients)))
    (ours, slopes), (stock, expected) = found
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=0)
    assert (slopes - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("family", by_weight(QUICK_STUDENTS, LONG_STUDENTS))
def test_a_student_is_stock_on_disk_and_scores_as_stock_loaders_do(family, tmp_path):
    config = student_config(family)
    torch.manual_seed(0)
    ranker = DistilledRanker.from_config(config).eval()
    tokenizer = pair_tokenizer(family in TYPED)
    ranker.start_at(0.5)
    ranker.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    scores = Ranker(ranker, tokenizer).predict(PAIRS)
    assert scores.std() > 1e-4
    stock_class = getattr(transformers, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[family])
    stock = stock_class.from_pretrained(tmp_path, config=type(config).from_pretrained(tmp_path)).eval()
    assert type(stock) is stock_class
    inputs = tokenizer(*map(list, zip(*PAIRS, strict=True)), padding=True, return_tensors="pt")
    with torch.no_grad():
        np.testing.assert_allclose(stock(**inputs).logits.squeeze(-1).numpy(), scores, atol=1e-5)
    for loader in (AutoModel, AutoModelForSequenceClassification, DistilledRanker):
        again = loader.from_pretrained(tmp_path)
        assert type(again) is type(ranker)
        np.testing.assert_allclose(Ranker(again, tokenizer).predict(PAIRS), scores, atol=1e-5)
    np.testing.assert_allclose(CrossEncoder(str(tmp_path), device="cpu").predict(PAIRS), scores, atol=1e-5)
    assert pickle.loads(pickle.dumps(type(ranker))) is type(ranker)
    assert position_limit(ranker.config) == POSITIONS.get(family, 64)


@pytest.mark.slow
def test_cross_encoder_and_auto_classes_give_the_same_scores_without_this_package(tmp_path):
    expected = {}
    for family in [*QUICK, *LONG, *QUICK_STUDENTS, *LONG_STUDENTS]:
        if family not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
            continue
        torch.manual_seed(0)
        is_teacher = is_decoder(family)
        config = tiny_config(family) if is_teacher else student_config(family)
        config.pad_token_id = 1
        ranker = ranker_class(family)(config).eval()
        ranker.save_pretrained(tmp_path / family)
        pair_tokenizer(family in TYPED).save_pretrained(tmp_path / family)
        expected[family] = CrossEncoder(str(tmp_path / family), device="cpu").predict(PAIRS)
        assert expected[family].std() > 1e-4, family
    run = subprocess.run(
        [sys.executable, "-c", STOCK, tmp_path, json.dumps(PAIRS)], capture_output=True, text=True, check=True
    )
    results = json.loads(run.stdout.splitlines()[-1])
    assert results.keys() == expected.keys()
    for family, (base, classifier, scores) in results.items():
        assert classifier == MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[family]
        assert base == MODEL_MAPPING_NAMES[family]
        np.testing.assert_allclose(scores, expected[family], atol=1e-5, err_msg=family)


@pytest.mark.parametrize("family", by_weight(QUICK_STUDENTS, LONG_STUDENTS))
def test_a_student_starts_from_a_plain_encoder_with_fewer_layers_and_trains(family, tmp_path):
    config = student_config(family)
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(tmp_path / "encoder")
    ranker = DistilledRanker.from_pretrained(tmp_path / "encoder")
    if family == "albert":
        with pytest.raises(ValueError, match="Cannot keep layers of a albert model: its layers are shared"):
            ranker.keep_layers([0])
    else:
        ranker.keep_layers([0])
    row = {"query_id": "1", "query": "w1 w2", "doc_ids": ["a", "b"], "titles": ["w3", "w4"]}
    row |= {"summaries": ["w5 w6 w7", "w8"], "teacher_scores": [2.0, -1.0]}
    trainer = DistillationTrainer(
        model=ranker,
        args=DistillationConfig(str(tmp_path / "run"), **ONE_STEP),
        train_dataset=Dataset.from_list([row] * 2),
        processing_class=pair_tokenizer(family in TYPED),
    )
    before = {name: weight.detach().clone() for name, weight in ranker.named_parameters()}
    trainer.train()
    changed = [name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name])]
    assert {name.startswith(f"{ranker.base_model_prefix}.") for name in changed} == {True, False}
    trainer.save_model(tmp_path / "run")
    pairs = [("w1 w2", "w3 w5 w6 w7"), ("w1 w2", "w4 w8")]
    scores = Ranker(trainer.model, pair_tokenizer(family in TYPED)).predict(pairs)
    np.testing.assert_allclose(Ranker(tmp_path / "run").predict(pairs), scores, atol=1e-5)


def test_layers_that_cannot_follow_each_other_are_refused():
    ranker = DistilledRanker.from_config(student_config("modernbert"))
    with pytest.raises(ValueError, match=r"Cannot keep layers \[1\] of a modernbert model: keep its first layer"):
        ranker.keep_layers([1])
    assert ranker.config.num_hidden_layers == len(ranker.model.layers) == 2


def test_a_student_needs_all_weights_but_the_head(tmp_path):
    config = student_config("roberta")
    encoder = AutoModel.from_config(config)
    weights = encoder.state_dict()
    lost = "encoder.layer.1.output.dense.bias"
    encoder.save_pretrained(tmp_path, state_dict={name: value for name, value in weights.items() if name != lost})
    with pytest.raises(ValueError, match=f"lacks 1 weights of the model, such as roberta.{lost}"):
        DistilledRanker.from_pretrained(tmp_path)


@pytest.mark.parametrize("family", ["t5", "bart", "llama", "perceiver", "modernvbert"])
def test_other_families_cannot_be_students(family):
    config = transformers.AutoConfig.for_model(family)
    with torch.device("meta"), pytest.raises(ValueError, match=f"A {family} model cannot be a student: "):
        DistilledRanker.from_config(config)


def test_other_students_are_exported_as_cross_encoders_alone(tmp_path):
    ranker = Ranker(DistilledRanker.from_config(student_config("electra")), pair_tokenizer())
    rows = pd.DataFrame({"query_id": ["1"], "query": ["w1"], "title": ["w2"], "summary": ["w3"]})
    assert export(ranker, "student", "cross-encoder", str(tmp_path / "out"), rows).max_difference < 1e-5
    for file_format in ("onnx", "openvino"):
        with pytest.raises(ValueError, match=f"student is a electra model: {file_format} is for BERT students"):
            export(ranker, "student", file_format, str(tmp_path / "out"), rows)


def is_packed(family):
    kind = ranker_class(family)
    return packs(kind.config_class.stock())


def served_by(family):
    role = "teacher" if is_decoder(family) else "student"
    return ", ".join(name for name, lists in SERVERS.items() if family in lists[role])


def test_the_docs_list_the_same_families():
    lines = ["| family | role | batches | exports | listed by |", "|---|---|---|---|---|"]
    for family in ["bert", *QUICK_STUDENTS, *LONG_STUDENTS, *EARLIER, *QUICK, *LONG]:
        role = "teacher" if is_decoder(family) else "student"
        batches = "packed" if is_packed(family) else "padded"
        lines.append(f"| {family} | {role} | {batches} | {', '.join(formats(family))} | {served_by(family)} |")
    table = "\n".join(lines) + "\n"
    page = Path(__file__).parents[2] / "docs" / "reference" / "models.md"
    assert table in page.read_text(encoding="utf-8"), f"The page needs this table:\n{table}"


@pytest.mark.parametrize("family", ["t5", "lilt"])
def test_an_unsupported_family_is_refused(family):
    with pytest.raises(ValueError, match=f"A {family} model cannot be a ranker: transformers has no encoder and no"):
        ranker_class(family)


def test_a_tokenizer_that_cannot_join_pairs_is_refused():
    tokenizer = pair_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    with pytest.raises(ValueError, match="a student needs a fast tokenizer that joins pairs of texts"):
        Ranker(DistilledRanker.from_config(student_config("roberta")), tokenizer)


@pytest.mark.parametrize("family", ["t5", "bart", "plbart", "ctrl", "xlnet", "roberta"])
def test_other_heads_are_refused_by_name(family):
    config = transformers.AutoConfig.for_model(family)
    with torch.device("meta"), pytest.raises(ValueError, match=f"A {family} model cannot be a teacher: "):
        LLMForLastTokenRanking.from_config(config)
