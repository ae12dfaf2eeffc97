"""Attention without padding."""

import copy
import pickle

import numpy as np
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    Qwen3Config,
    RobertaConfig,
)

from hf_disranker import DistilledRanker, LLMForLastTokenRanking
from hf_disranker.models import packing
from hf_disranker.models.packing import PACKED, packs, plan

SIZE = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 32}
SIZE |= {"pad_token_id": 0, "initializer_range": 0.3}
LLAMA = LlamaConfig(**SIZE, num_key_value_heads=2)
# Local layers see two tokens to each side; the head reads the mean of a row.
LOCAL = {"local_attention": 4, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}
LOCAL |= {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
CONFIGS = {
    "bert": BertConfig(**SIZE),
    "roberta": RobertaConfig(**SIZE, max_position_embeddings=40),
    "modernbert": ModernBertConfig(**SIZE, **LOCAL, classifier_pooling="mean"),
    "llama": LLAMA,
    "mistral": MistralConfig(**SIZE, num_key_value_heads=2, sliding_window=3),
    "qwen3": Qwen3Config(**SIZE, num_key_value_heads=2, head_dim=8, attention_dropout=0.0),
}


@pytest.fixture(params=CONFIGS)
def model(request):
    return ranker(CONFIGS[request.param])


def ranker(config):
    torch.manual_seed(0)
    kind = LLMForLastTokenRanking if hasattr(config, "num_key_value_heads") else DistilledRanker
    return kind.from_config(copy.deepcopy(config)).eval()


def ragged():
    """Rows of 12, 7, 12, 3 and 7 tokens; the first three begin with the same four."""
    mask = (torch.arange(12) < torch.tensor([12, 7, 12, 3, 7]).unsqueeze(1)).long()
    torch.manual_seed(3)
    ids = torch.randint(5, 99, mask.shape)
    ids[:3, :4] = ids[0, :4]
    return {"input_ids": ids * mask, "attention_mask": mask}


def padded(model):
    model = copy.deepcopy(model)
    model.base_model.set_attn_implementation("sdpa")
    return model


def gradients(model, rows):
    model.zero_grad()
    model(**rows).logits.square().sum().backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


def apart(one, two):
    return float((one - two).norm() / two.norm())


def planned(**inputs):
    model = ranker(LLAMA)
    return plan(model, inputs, "last", inputs.pop("groups", None))


def test_rows_are_packed_longest_first():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]])
    packed = planned(input_ids=torch.arange(9).view(3, 3), attention_mask=mask)
    assert packed.runs == [(1, 3, 3), (2, 2, 2)] and packed.keys is None
    assert packed.tokens.tolist() == [3, 4, 5, 0, 1, 7, 8]
    assert packed.positions.tolist() == [0, 1, 2, 0, 1, 0, 1]
    assert packed.read.tolist() == [4, 2, 6]
    assert [ends.tolist() for ends in packed.bounds] == [[0, 3, 5, 7]] * 2


def test_neighbours_with_equal_keys_share_their_first_tokens():
    # The first two rows share 1, 2; of the third, whose key is another, nothing is shared, nor of a row's last token.
    ids = torch.tensor([[1, 2, 3, 9], [1, 2, 9, 0], [1, 2, 9, 0], [7, 9, 0, 0], [7, 9, 0, 0]])
    packed = planned(input_ids=ids, attention_mask=(ids > 0).long(), groups=["a", "a", "b", "c", "c"])
    texts = ids.flatten()[packed.tokens].split([queries for count, queries, _ in packed.runs for _ in range(count)])
    assert [text.tolist() for text in texts] == [[3, 9], [1, 2, 9], [9], [1, 2], [9], [9], [7]]
    seen = ids.flatten()[packed.tokens][packed.keys].split(
        [keys for count, _, keys in packed.runs for _ in range(count)]
    )
    assert [text.tolist() for text in seen] == [[1, 2, 3, 9], [1, 2, 9], [1, 2, 9], [1, 2], [7, 9], [7, 9], [7]]
    assert packed.positions.tolist() == [2, 3, 0, 1, 2, 2, 0, 1, 1, 1, 0]
    assert ids.flatten()[packed.tokens][packed.read].tolist() == [9] * 5


def products(query, key, value, window=(-1, -1), runs=((1, 3, 3), (1, 1, 1))):
    none = torch.zeros(0, dtype=torch.long)
    packed = packing.Packed(none, none, None, None, list(runs), (2, 3), torch.nn.Identity(), alone=False)
    columns = [torch.tensor(x).view(-1, 1, 1) for x in (query, key, value)]
    return packing._by_products(*columns, packed, 1.0, window, 0.0).flatten().tolist()


def test_products_match_hand_examples():
    # One head of size 1. Equal keys weigh equally: each token gets the mean of the values that it sees in its row.
    zeros, values = [0.0] * 4, [1.0, 2.0, 6.0, 5.0]
    assert products([1.0] * 4, zeros, values) == [3, 3, 3, 5]
    assert products([1.0] * 4, zeros, values, (-1, 0)) == [1, 1.5, 3, 5]
    assert products([1.0] * 4, zeros, values, (1, 0)) == [1, 1.5, 4, 5]
    assert products([1.0] * 4, zeros, values, (1, 1)) == [1.5, 3, 4, 5]
    # The last two of three tokens ask; a token that asks alone sees keys 0, log 2 and 0 weighing 1 : 2 : 1.
    assert products([1.0] * 3, zeros, values, (-1, 0), [(1, 2, 3), (1, 1, 1)]) == [1.5, 3, 5]
    found = products([1.0], [0.0, float(np.log(2)), 0.0], values[:3], runs=[(1, 1, 3)])
    assert found == pytest.approx([(1 + 2 * 2 + 6) / 4])


@pytest.mark.parametrize("long", [512, 4])
def test_logits_and_gradients_are_those_with_padding(model, long, monkeypatch):
    monkeypatch.setattr(packing, "_LONG", long)  # above it by sdpa, below it by plain products
    rows = ragged()
    assert model(**rows).logits.std() > 0.1
    torch.testing.assert_close(model(**rows).logits, padded(model)(**rows).logits, atol=1e-5, rtol=0)
    assert apart(gradients(model, rows), gradients(padded(model), rows)) < 1e-5


def test_bf16_differs_from_fp32_by_its_own_rounding(model):
    rows, exact = ragged(), model(**ragged()).logits
    half = copy.deepcopy(model).bfloat16()
    ours, stock = (one(**rows).logits.float().sub(exact).abs().max() for one in (half, padded(half)))
    assert ours < 2 * stock + 0.02


def test_rows_do_not_attend_to_each_other(model):
    before, changed = model(**ragged()).scores, ragged()
    changed["input_ids"][1] = 17 * changed["attention_mask"][1]
    after = model(**changed).scores
    assert torch.equal(after[[0, 2, 3, 4]], before[[0, 2, 3, 4]]) and after[1] != before[1]


def varlen_by_rows(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """Compute what `torch.nn.attention.varlen.varlen_attn` documents, segment by segment, with its arguments."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and cu_seq_q[-1] == len(query) and cu_seq_k[-1] == len(key)
    sizes = [(cu_seq_q.diff(), max_q), (cu_seq_k.diff(), max_k)]
    assert all(lengths.max() == longest and lengths.min() > 0 for lengths, longest in sizes)
    assert enable_gqa == (query.shape[1] != key.shape[1]) and window_size[0] >= -1
    output = []
    for (start, stop), (first, last) in zip(cu_seq_q.unfold(0, 2, 1), cu_seq_k.unfold(0, 2, 1), strict=True):
        q, k, v = (x.transpose(0, 1) for x in (query[start:stop], key[first:last], value[first:last]))
        k, v = (x.repeat_interleave(len(q) // len(x), dim=0) for x in (k, v))
        places, asking = torch.arange(k.shape[1]), torch.arange(q.shape[1]) + k.shape[1] - q.shape[1]
        before, after = asking.unsqueeze(1) - places, places - asking.unsqueeze(1)
        hidden = torch.zeros(before.shape, dtype=torch.bool)
        for distance, reach in zip((before, after), window_size, strict=True):
            hidden |= (distance > reach) & (reach >= 0)
        weights = (scale * q @ k.transpose(1, 2)).masked_fill(hidden, -torch.inf).softmax(dim=2)
        output.append((weights @ v).transpose(0, 1))
    return torch.cat(output)


@pytest.mark.parametrize("groups", [None, [0, 0, 0, 1, 1]])
def test_the_gpu_kernel_is_called_as_documented(model, groups, monkeypatch):
    monkeypatch.setattr(packing, "varlen_attn", varlen_by_rows)
    monkeypatch.setattr(packing, "_takes_kernel", lambda *_: True)
    monkeypatch.setattr(packing, "_by_products", None)
    rows, options = ragged(), {"groups": groups} if groups and hasattr(model, "decoder") else {}
    torch.testing.assert_close(model(**rows, **options).logits, padded(model)(**rows).logits, atol=1e-5, rtol=0)
    assert apart(gradients(model, rows | options), gradients(padded(model), rows)) < 1e-5


def test_cpu_tensors_do_not_take_the_gpu_kernel():
    cpu = torch.zeros(3, 2, 8, dtype=torch.bfloat16)
    assert packing._has_kernel() == (Version(torch.__version__) >= Version("2.11"))
    assert not packing._takes_kernel(cpu, cpu, 0.0)


def test_a_checkpointed_model_has_the_same_gradients(model):
    expected = gradients(model.train(), ragged()) if model.config.model_type in ("llama", "mistral", "qwen3") else None
    if expected is None:  # no dropout, so that two passes agree
        for part in model.modules():
            part.p = 0.0 if isinstance(part, torch.nn.Dropout) else getattr(part, "p", None)
        expected = gradients(model, ragged())
    for reentrant in (True, False):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        assert apart(gradients(model, ragged()), expected) < 1e-5


def test_adapters_train_without_padding(model):
    names = ["query", "value"] if hasattr(model, "bert") or hasattr(model, "roberta") else "all-linear"
    torch.manual_seed(0)
    tuned = get_peft_model(model, LoraConfig(target_modules=names, init_lora_weights=False)).eval()
    rows = ragged()
    assert tuned.base_model.model.base_model.config._attn_implementation == PACKED
    assert apart(gradients(tuned, rows), gradients(padded_adapter(tuned), rows)) < 1e-5


def padded_adapter(tuned):
    tuned = copy.deepcopy(tuned)
    tuned.base_model.model.base_model.set_attn_implementation("sdpa")
    return tuned


def test_copies_and_pickles_compute_no_padding(model):
    rows, expected = ragged(), model(**ragged()).logits
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert plan(again, rows, "first") is not None
        assert torch.equal(again(**rows).logits, expected)


def test_unsupported_inputs_fall_back_to_padding():
    model, rows = ranker(LLAMA), ragged()
    assert plan(model, rows, "last") is not None
    more = {"output_attentions": True}, {"output_hidden_states": True}, {"use_cache": True}
    for asked in (*more, {"inputs_embeds": torch.zeros(5, 12, 32)}, {"attention_mask": torch.ones(5, 1, 12, 12)}):
        assert plan(model, rows | asked, "last") is None
    assert model(**rows, output_hidden_states=True).hidden_states[-1].shape == (5, 12, 32)
    rows["attention_mask"][0, 5] = 0  # a hole
    assert plan(model, rows, "last") is None
    assert plan(ranker(Gemma2Config(**SIZE, num_key_value_heads=2, head_dim=8)), ragged(), "last") is None
    assert not packs(Gemma2Config())


def test_attention_with_more_than_products_is_refused():
    state = torch.zeros(1, 2, 3, 8)
    packed = planned(input_ids=torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="Identity has softcap, which attention without padding does not support"):
        packing._attention(torch.nn.Identity(), state, state, state, None, packed=packed, softcap=50.0)
