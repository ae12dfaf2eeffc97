"""The Auto classes with our package, and the same checkpoints without it."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    pipeline,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_disranker import BertDistilledRanker, LLMForLastTokenRanking, Ranker
from hf_disranker.models import auto, families
from hf_disranker.recipes.quickstart.from_scratch import small_bert

PAIRS = [("read a json file", "json.load read a document"), ("plot", "os.remove delete a file")]

# Our import first, transformers later: the registration has to wait for it.
# Every entrance to transformers must leave the registration whole: some import the Auto classes half-way.
ENTRANCES = {
    "AutoModel": "from transformers import AutoModel",
    "a stock model": "from transformers import BertModel",
    "our student": "from hf_disranker import BertDistilledRanker",
    "AutoConfig": "from transformers import AutoConfig",
}
IMPORTED_FIRST = """
import json, sys, time
start = time.perf_counter()
import hf_disranker
seconds = time.perf_counter() - start
heavy = [name for name in ("torch", "transformers") if name in sys.modules]
exec(sys.argv[2])
from transformers import AutoModel
print(json.dumps({"seconds": seconds, "heavy": heavy, "class": type(AutoModel.from_pretrained(sys.argv[1])).__name__}))
from transformers import BertForMaskedLM, LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM
"""


def run_python(code, *arguments):
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert "[ERROR]" not in run.stdout  # transformers complains so of config classes it cannot document
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_importing_this_package_first_is_light_and_still_registers(student_dir, entrance):
    result = run_python(IMPORTED_FIRST, str(student_dir), ENTRANCES[entrance])
    assert result["heavy"] == [] and result["seconds"] < 1
    assert result["class"] == "BertDistilledRanker"


def test_auto_classes_return_rankers_for_marked_checkpoints(student_dir, teacher_dir):
    assert type(AutoModel.from_pretrained(student_dir)) is BertDistilledRanker
    assert type(AutoModelForSequenceClassification.from_pretrained(student_dir)) is BertDistilledRanker
    assert isinstance(AutoModel.from_pretrained(teacher_dir), LLMForLastTokenRanking)
    assert isinstance(AutoModelForSequenceClassification.from_pretrained(teacher_dir), LLMForLastTokenRanking)


def test_models_saved_out_of_a_ranker_load_as_stock(student_dir, teacher_dir, tmp_path):
    student, teacher = AutoModel.from_pretrained(student_dir), AutoModel.from_pretrained(teacher_dir)
    student.bert.save_pretrained(tmp_path / "bert")
    teacher.model.save_pretrained(tmp_path / "llama")
    assert type(AutoModel.from_pretrained(tmp_path / "bert")) is BertModel
    assert type(AutoModel.from_pretrained(tmp_path / "llama")) is LlamaModel
    BertForMaskedLM.from_pretrained(student_dir).save_pretrained(tmp_path / "mlm")
    assert type(AutoModelForMaskedLM.from_pretrained(tmp_path / "mlm")) is BertForMaskedLM
    for kind in (AutoModelForSequenceClassification, BertForSequenceClassification):
        three = kind.from_pretrained(student_dir, num_labels=3, ignore_mismatched_sizes=True)
        three.save_pretrained(tmp_path / "three")
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "three")
        assert type(three) is type(again) is BertForSequenceClassification and again.num_labels == 3
    student.save_pretrained(tmp_path / "student")
    assert type(AutoModel.from_pretrained(tmp_path / "student")) is BertDistilledRanker


def test_saving_an_auto_loaded_ranker_keeps_the_checkpoint_stock(student_dir, tmp_path):
    AutoModel.from_pretrained(student_dir).save_pretrained(tmp_path)
    before, after = (json.loads(Path(folder, "config.json").read_text()) for folder in (student_dir, tmp_path))
    assert before == after


def test_ordinary_checkpoints_load_as_without_this_package(tmp_path, student_dir):
    bert = BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    llama = LlamaConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertModel(bert).save_pretrained(tmp_path / "bert")
    BertForSequenceClassification(bert).save_pretrained(tmp_path / "classifier")
    LlamaForCausalLM(llama).save_pretrained(tmp_path / "llama")
    assert type(AutoConfig.from_pretrained(tmp_path / "bert")) is BertConfig
    assert type(AutoConfig.from_pretrained(tmp_path / "llama")) is LlamaConfig
    assert type(AutoModel.from_pretrained(tmp_path / "bert")) is BertModel
    assert type(AutoModel.from_pretrained(tmp_path / "llama")) is LlamaModel
    assert type(AutoModel.from_config(BertConfig())) is BertModel
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "llama")) is LlamaForCausalLM
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    assert type(classifier) is BertForSequenceClassification and classifier.num_labels == 2


def test_the_text_classification_pipeline_serves_a_student(student_dir):
    classify = pipeline("text-classification", model=str(student_dir), device="cpu")
    inputs = [{"text": query, "text_pair": document} for query, document in PAIRS]
    scores = [answer["score"] for answer in classify(inputs, function_to_apply="none")]
    assert scores == pytest.approx(Ranker.from_pretrained(student_dir).predict(PAIRS).tolist(), abs=1e-5)


def test_auto_tokenizer_gives_the_same_ids(student_dir, teacher_dir):
    for folder, kind in ((student_dir, BertDistilledRanker), (teacher_dir, LLMForLastTokenRanking)):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert isinstance(kind.from_pretrained(folder), kind)
        ids = tokenizer("read a json file")["input_ids"]
        assert len(ids) > 4 and tokenizer.is_fast


def test_registration_can_be_disabled(monkeypatch):
    monkeypatch.setenv("HF_DISRANKER_NO_AUTO", "1")
    monkeypatch.setattr(auto, "_install_gates", lambda configs: pytest.fail("registered all the same"))
    auto.install()


def test_a_registration_without_effect_is_an_error(monkeypatch):
    monkeypatch.setattr(AutoModel, "register", lambda *args, **kwargs: None)
    with pytest.raises(RuntimeError, match="ignores the registration of BertDistilledRanker"):
        auto.register("bert")


def test_gates_are_transparent_for_unmarked_configs(teacher_dir):
    types = set(filter(families.is_decoder, families.classifiers()))
    assert {"llama", "mixtral", "gpt2", "deepseek_v3"} <= types and not {"bert", "bart", "t5"} & types
    AutoModel.from_pretrained(teacher_dir)
    gate = CONFIG_MAPPING["llama"]
    config = AutoConfig.for_model("llama", num_hidden_layers=1)
    assert type(config) is LlamaConfig and isinstance(config, gate) and gate.attribute_map is LlamaConfig.attribute_map
    # Remote code of an unmarked checkpoint goes by the module: it replaces only classes of transformers.
    assert (gate.__doc__, gate.__module__, gate.__name__) == (
        LlamaConfig.__doc__,
        LlamaConfig.__module__,
        LlamaConfig.__name__,
    )
    assert pickle.loads(pickle.dumps(CONFIG_MAPPING))["llama"] is LlamaConfig


def test_other_auto_classes_return_stock_models_for_marked_checkpoints(student_dir, teacher_dir):
    bert = AutoModel.from_pretrained(student_dir).bert.embeddings.word_embeddings.weight
    for kind in (AutoModelForMaskedLM, AutoModelForTokenClassification, AutoModelForQuestionAnswering):
        model = kind.from_pretrained(student_dir)
        assert type(model).__module__ == BertModel.__module__ and torch.equal(
            model.bert.embeddings.word_embeddings.weight, bert
        )
    llama = AutoModel.from_pretrained(teacher_dir).model.norm.weight
    for kind in (AutoModelForCausalLM, AutoModelForTokenClassification, AutoModelForQuestionAnswering):
        model = kind.from_pretrained(teacher_dir)
        decoder = getattr(model, model.base_model_prefix)
        assert type(model).__module__ == type(decoder).__module__ == LlamaModel.__module__
        assert torch.equal(decoder.norm.weight, llama)
    config = AutoConfig.from_pretrained(teacher_dir)
    assert type(AutoModel.from_config(config)) is LlamaModel
    stock = LlamaForSequenceClassification.from_pretrained(teacher_dir, config=config)
    assert type(stock.model) is LlamaModel
    assert isinstance(AutoModelForSequenceClassification.from_config(config), LLMForLastTokenRanking)


def test_a_ranker_without_a_trained_head_is_refused(tmp_path, tiny_student):
    _, tokenizer = tiny_student
    small_bert(tokenizer, layers=1, size=32).bert.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not a trained ranker: it lacks"):
        Ranker.from_pretrained(tmp_path)
