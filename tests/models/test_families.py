"""Teachers of every decoder family: stock on disk, loaded by the Auto classes, trainable."""

import dataclasses

import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from hf_disranker import LLMForLastTokenRanking
from hf_disranker.models.teacher import family_class

SIZE = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}
SIZE |= {"num_key_value_heads": 1, "intermediate_size": 32, "max_position_embeddings": 64}
SIZE |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "initializer_range": 0.2}
MIXTURE = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
DEEPSEEK = {"n_routed_experts": 2, "n_group": 1, "topk_group": 1, "num_key_value_heads": 2}
OWN = {
    "deepseek_v3": MIXTURE | LATENT | DEEPSEEK,
    "falcon": {"num_kv_heads": 1},
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "mixtral": {"num_local_experts": 2},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 32},
    "qwen2_moe": MIXTURE | {"shared_expert_intermediate_size": 16},
    "qwen3_moe": MIXTURE,
}
QUICK = ["mixtral", "gpt2", "opt", "falcon"]  # llama, qwen2, qwen3, mistral, gemma2 and gemma3_text: test_teacher.py
LONG = ["qwen2_moe", "qwen3_moe", "gemma", "phi3", "smollm3", "olmo2", "olmo3", "glm4", "gpt_neox", "starcoder2"]
LONG += ["gpt_oss", "deepseek_v3"]
TEXTS = [[2, 5, 6, 7, 1], [2, 8, 1], [2, 9, 10, 11, 12, 13, 1]]


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
    kind = family_class(model_type).config_class.stock
    known = {field.name for field in dataclasses.fields(kind)} | set(kind.attribute_map)
    return kind(**{key: value for key, value in (SIZE | OWN.get(model_type, {})).items() if key in known})


@pytest.mark.parametrize("family", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in LONG)])
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


@pytest.mark.parametrize("family", ["t5", "bart", "plbart", "ctrl", "xlnet", "roberta"])
def test_other_heads_are_refused_by_name(family):
    config = transformers.AutoConfig.for_model(family)
    with torch.device("meta"), pytest.raises(ValueError, match=f"A {family} model cannot be a teacher: "):
        LLMForLastTokenRanking.from_config(config)
