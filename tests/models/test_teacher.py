"""LLMForLastTokenRanking against the stock classes, and its tokenizer."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import processors
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from hf_disranker import LLMForLastTokenRanking
from hf_disranker.models.ranker import Ranker
from hf_disranker.models.teacher import expect_labels, last_token, prepare_tokenizer
from hf_disranker.recipes.quickstart.from_scratch import train_bpe

TINY = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
FAMILIES = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "mistral": MistralConfig,
    "gemma2": Gemma2Config,
    "gemma3_text": Gemma3TextConfig,
}
ARCHITECTURES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral"}
ARCHITECTURES |= {"gemma2": "Gemma2", "gemma3_text": "Gemma3Text"}


def teacher_of(family, **options):
    torch.manual_seed(0)
    return LLMForLastTokenRanking.from_config(FAMILIES[family](**TINY | options)).eval()


def padded(texts, side, pad):
    longest = max(map(len, texts))
    rows, masks = [], []
    for text in texts:
        fill = longest - len(text)
        ids, mask = [pad] * fill, [0] * fill
        rows.append(ids + text if side == "left" else text + ids)
        masks.append(mask + [1] * len(text) if side == "left" else [1] * len(text) + mask)
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}


TEXTS = [[2, 5, 6, 7, 1], [2, 8, 1], [2, 9, 10, 11, 12, 13, 1]]


def test_last_token_matches_hand_example():
    hidden = torch.arange(12.0).reshape(2, 3, 2)  # row 0: [0 1] [2 3] [4 5], row 1: [6 7] [8 9] [10 11]
    left, right = torch.tensor([[0, 1, 1], [1, 1, 1]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert last_token(hidden, left).tolist() == [[4, 5], [10, 11]]
    assert last_token(hidden, right).tolist() == [[2, 3], [6, 7]]
    assert last_token(hidden, None).tolist() == [[4, 5], [10, 11]]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_checkpoint_is_stock_and_scores_as_the_stock_class_does(tmp_path, family):
    teacher = teacher_of(family)
    teacher.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == [f"{ARCHITECTURES[family]}ForSequenceClassification"]
    assert config["model_type"] == family
    assert config["disranker"]["role"] == "teacher" and config["disranker"]["head"] == "last_token"
    # The stock class on the stock config, as a process without this package has it.
    stock_config = FAMILIES[family].from_pretrained(tmp_path)
    stock = AutoModelForSequenceClassification.from_config(stock_config)
    stock.load_state_dict(teacher.state_dict())
    inputs = padded(TEXTS, "right", 0)
    with torch.no_grad():
        expected = stock.eval()(**inputs).logits.squeeze(-1)
        torch.testing.assert_close(teacher(**inputs).scores, expected, atol=1e-6, rtol=0)
        again = LLMForLastTokenRanking.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(again(**inputs).scores, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pad", [0, 1], ids=["own pad", "pad is eos"])
def test_scores_do_not_depend_on_padding_side_batch_or_padding_id(family, pad):
    teacher = teacher_of(family, pad_token_id=pad)
    with torch.no_grad():
        alone = torch.cat([teacher(input_ids=torch.tensor([text])).scores for text in TEXTS])
        for side in ("left", "right"):
            torch.testing.assert_close(teacher(**padded(TEXTS, side, pad)).scores, alone, atol=1e-5, rtol=0)
    assert alone.std() > 1e-3  # different texts do score differently


def test_a_causal_language_model_becomes_a_teacher(tmp_path):
    torch.manual_seed(3)
    language_model = LlamaForCausalLM(LlamaConfig(**TINY))
    language_model.save_pretrained(tmp_path)
    teacher, info = LLMForLastTokenRanking.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"score.weight"} and not info["unexpected_keys"]
    assert torch.equal(teacher.model.norm.weight, language_model.model.norm.weight)
    assert torch.equal(teacher.get_input_embeddings().weight, language_model.get_input_embeddings().weight)


def test_it_trains_and_is_called_as_the_stock_class_is(tmp_path):
    teacher, inputs = teacher_of("llama"), padded(TEXTS, "left", 0)
    teacher.save_pretrained(tmp_path)
    teacher = LLMForLastTokenRanking.from_pretrained(pretrained_model_name_or_path=tmp_path).eval()
    labels = torch.tensor([0.5, -1.0, 2.0])
    with torch.no_grad():
        scores = teacher(**inputs).scores
        for use_cache in (True, False):
            torch.testing.assert_close(teacher(**inputs, use_cache=use_cache).scores, scores)
        output = teacher(**inputs, labels=labels)
        torch.testing.assert_close(output.loss, (scores - labels).square().mean())
        torch.testing.assert_close(teacher(**inputs, labels=labels, return_dict=False), (output.loss, output.logits))


def test_generated_classes_are_pickled_by_name():
    teacher = teacher_of("qwen3")
    again = pickle.loads(pickle.dumps(teacher))
    assert type(again) is type(teacher) and type(again).__name__ == "Qwen3ForLastTokenRanking"
    assert type(again.config) is type(teacher.config) and type(again.config).__qualname__ == "DisRankerQwen3Config"
    with torch.no_grad():
        assert torch.equal(again(**padded(TEXTS, "left", 0)).scores, teacher(**padded(TEXTS, "left", 0)).scores)


def test_other_families_and_students_are_refused(student_dir):
    with pytest.raises(ValueError, match="A bert model cannot be a teacher: transformers has no decoder"):
        LLMForLastTokenRanking.from_config(BertConfig())
    with pytest.raises(ValueError, match="A bert model cannot be a teacher"):
        LLMForLastTokenRanking.from_pretrained(student_dir)


def test_lora_keeps_the_score_row_and_merges_to_the_same_scores(tmp_path):
    teacher = teacher_of("llama")
    lora = get_peft_model(teacher, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for weight in lora.parameters():
            if weight.requires_grad:
                weight.add_(0.05 * torch.randn_like(weight))
        inputs = padded(TEXTS, "left", 0)
        expected = lora.eval()(**inputs).scores
        lora.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(teacher_of("llama"), tmp_path).eval()
        torch.testing.assert_close(loaded(**inputs).scores, expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(loaded.merge_and_unload()(**inputs).scores, expected, atol=1e-5, rtol=0)


def test_prepare_tokenizer_adds_one_end_token_and_a_separate_pad_token():
    bare = train_bpe(["read a json file"] * 5, vocab_size=300, max_length=8).backend_tokenizer
    bare.post_processor = None
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="</s>", pad_token="</s>")
    for _ in range(2):
        prepare_tokenizer(tokenizer)
        ids = tokenizer("read a json file", truncation=True, max_length=4)["input_ids"]
        assert len(ids) == 4 and ids[-1] == tokenizer.eos_token_id and ids[-2] != tokenizer.eos_token_id
        assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_prepare_tokenizer_keeps_what_stands_in_front_of_a_text():
    bare = train_bpe(["read a json file"] * 5, vocab_size=300, max_length=8).backend_tokenizer
    first = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 0)])
    bare.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), first])  # as Llama 3 has it
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="</s>", pad_token="<pad>")
    read, file = (tokenizer.encode(text, add_special_tokens=False) for text in ("read", "file"))
    prepare_tokenizer(tokenizer)
    assert tokenizer("read").input_ids == [0, *read, tokenizer.eos_token_id]
    assert tokenizer("read", "file").input_ids == [0, *read, *file, tokenizer.eos_token_id]


def test_prepare_tokenizer_needs_an_end_of_sequence_token():
    bare = train_bpe(["read a json file"] * 5, vocab_size=300, max_length=8).backend_tokenizer
    with pytest.raises(ValueError, match="end-of-sequence"):
        prepare_tokenizer(PreTrainedTokenizerFast(tokenizer_object=bare))


@pytest.fixture(scope="module")
def grades_tokenizer():
    texts = ["query: read a file document: open and read relevance: 0 1 2 3"] * 20
    backend = train_bpe(texts, vocab_size=320, max_length=32).backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=32
    )


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("llama", True), ("gemma2", True)])
def test_label_expectation_is_the_mean_grade_of_the_stock_language_model(tmp_path, grades_tokenizer, family, tied):
    tokenizer = copy.deepcopy(grades_tokenizer)
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
    torch.manual_seed(0)
    plain = FAMILIES[family](
        **TINY | special | {"vocab_size": len(tokenizer), "tie_word_embeddings": tied, "initializer_range": 0.5}
    )
    stock = AutoModelForCausalLM.from_config(plain).eval()
    stock.save_pretrained(tmp_path / "stock")
    config = expect_labels(plain, tokenizer, [" 0", " 1", " 2"])
    teacher = LLMForLastTokenRanking.from_pretrained(tmp_path / "stock", config=config).eval()
    found = Ranker(teacher, tokenizer).predict([("read a file", "open"), ("read", "open and read " * 20)])

    # The long document is cut, the ending is not.
    texts = ["query: read a file document: open", "query: read document: " + "open and read " * 20]
    ending = tokenizer.encode(" relevance:", add_special_tokens=False)
    labels = [tokenizer.encode(" relevance: " + label, add_special_tokens=False)[-1] for label in "012"]
    expected = []
    for text in texts:
        ids = grades_tokenizer(text, truncation=True, max_length=32 - len(ending)).input_ids + ending
        with torch.no_grad():
            chances = stock(torch.tensor([ids])).logits[0, -1, labels].softmax(dim=0)
        expected.append(float(chances @ torch.arange(3.0)))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert abs(expected[0] - expected[1]) > 1e-3  # a hundred times the tolerance
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        grades = teacher(torch.tensor([ids, ids[::-1]])).scores
    assert not torch.equal(grades, grades.bfloat16().float())  # not rounded

    teacher.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    saved = json.loads((tmp_path / "teacher" / "config.json").read_text())
    assert saved["architectures"] == [type(stock).__name__] and saved["disranker"]["grades"] == [0, 1, 2]
    again = Ranker.from_pretrained(tmp_path / "teacher")
    np.testing.assert_allclose(again.predict([("read a file", "open")]), expected[:1], atol=1e-5)
    assert isinstance(AutoModel.from_pretrained(tmp_path / "teacher"), LLMForLastTokenRanking)
    language_model = type(stock).from_pretrained(tmp_path / "teacher")
    torch.testing.assert_close(language_model.lm_head.weight, stock.lm_head.weight)


def test_an_ending_replaces_the_end_token_and_is_added_once(grades_tokenizer):
    tokenizer = copy.deepcopy(grades_tokenizer)
    prepare_tokenizer(tokenizer)
    assert tokenizer("read").input_ids[-1] == tokenizer.eos_token_id
    for _ in range(2):
        prepare_tokenizer(tokenizer, " relevance:")
    expected = [tokenizer.bos_token_id, *tokenizer.encode("read relevance:", add_special_tokens=False)]
    assert tokenizer("read").input_ids == expected


def test_a_label_must_be_one_token(grades_tokenizer):
    for labels in ([" 0", " irrelevant"], [" 1", " 1"]):
        with pytest.raises(ValueError, match="must be one token"):
            expect_labels(LlamaConfig(**TINY), copy.deepcopy(grades_tokenizer), labels)
