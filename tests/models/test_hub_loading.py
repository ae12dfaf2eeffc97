"""The ways in which people load a ranker, each in a fresh process, with this package and without it.

A process loads a folder, a Hub id and a revision in turn; what it fetches comes over HTTP into a cache of its own.
"""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from transformers import AutoModel

from hf_disranker import Ranker
from hf_disranker.models.teacher import family_class

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text")
PAIRS = [("read a json file", "json load read a document"), ("plot", "histogram of a table of numbers")]
TEACHER_TEXTS = [f"query: {query} document: {document}" for query, document in PAIRS]
LOADERS = ["AutoModel", "AutoModelForSequenceClassification", "CrossEncoder", "pipeline"]

# Prints the class of the model and its scores for each source; scores are null where there are none.
LOAD = """
import importlib.util, json, sys
loader, kind, options, sources, pairs, texts = json.loads(sys.argv[1])
if options.pop("import_first", False):
    import hf_disranker
import transformers
from transformers import AutoTokenizer

def load(name, revision):
    if loader == "CrossEncoder":
        from sentence_transformers import CrossEncoder
        model = CrossEncoder(name, revision=revision, device="cpu", **options)
        inputs = pairs if kind == "student" else [(f"query: {q}", f" document: {d}") for q, d in pairs]
        return model[0].auto_model, model.predict(inputs).tolist()
    if loader == "pipeline":
        classify = transformers.pipeline("text-classification", model=name, revision=revision, device="cpu", **options)
        inputs = [{"text": q, "text_pair": d} for q, d in pairs] if kind == "student" else texts
        return classify.model, [answer["score"] for answer in classify(inputs, function_to_apply="none")]
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    inputs = list(zip(*pairs)) if kind == "student" else [texts]
    batch = tokenizer(*map(list, inputs), padding=True, return_tensors="pt")
    model = getattr(transformers, loader).from_pretrained(name, revision=revision, **options).eval()
    output = model(**batch)
    return model, output.logits.squeeze(-1).tolist() if "logits" in output else None

answers = []
for name, revision in sources:
    model, scores = load(name, revision)
    ours = scores is not None and hasattr(model(input_ids=model.dummy_inputs["input_ids"]), "scores")
    answers.append([type(model).__name__, scores, ours])
installed = importlib.util.find_spec("hf_disranker") is not None
print(json.dumps({"installed": installed, "imported": "hf_disranker" in sys.modules, "answers": answers}))
"""

# Prints the class of each teacher, and its logit for IDS.
IDS = [[2, 7, 8, 9, 1]]
LOAD_STOCK = """
import importlib.util, json, sys
import torch
from transformers import AutoModelForSequenceClassification
names, ids = json.loads(sys.argv[1])
models = [AutoModelForSequenceClassification.from_pretrained(name).eval() for name in names]
answers = [[type(model).__name__, model(torch.tensor(ids)).logits.item()] for model in models]
print(json.dumps([importlib.util.find_spec("hf_disranker") is not None, answers]))
"""

# What must be as it is without this package: a line for each case.
ORDINARY = """
import importlib.util, json, sys
folder, imported = json.loads(sys.argv[1])
if imported:
    import hf_disranker
import torch, transformers
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification,
    AutoModelForTokenClassification, AutoTokenizer, BertConfig, BertTokenizer, Gemma2Config, Gemma3TextConfig,
    LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, pipeline,
)
from sentence_transformers import CrossEncoder, SentenceTransformer

size = dict(vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
decoder = size | dict(num_key_value_heads=1, head_dim=8, pad_token_id=0, bos_token_id=2, eos_token_id=1)
FAMILIES = dict(llama=LlamaConfig, qwen2=Qwen2Config, qwen3=Qwen3Config, mistral=MistralConfig, gemma2=Gemma2Config)
FAMILIES["gemma3_text"] = Gemma3TextConfig
ids = torch.tensor([[2, 7, 8, 9, 1]])
cases = {}

def note(name, model):
    output = model.eval()(ids)
    first = output.logits if hasattr(output, "logits") else output.last_hidden_state
    cases[name] = [type(model).__name__, type(model.config).__name__, round(first.double().sum().item(), 5)]

def both(kind, config, path, **options):
    torch.manual_seed(0)
    note(f"{path}: from_config", kind.from_config(config))
    kind.from_config(config).save_pretrained(f"{folder}/{path}")
    note(f"{path}: from_pretrained", kind.from_pretrained(f"{folder}/{path}", **options))

bert = BertConfig(**size, max_position_embeddings=32)
for kind in (AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoModelForTokenClassification):
    both(kind, bert, f"bert-{kind.__name__}")
both(AutoModelForSequenceClassification, BertConfig(**size, num_labels=1), "bert-one-label", dtype="float32")
for name, config in FAMILIES.items():
    for kind in (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification):
        both(kind, config(**decoder), f"{name}-{kind.__name__}", attn_implementation="eager")
cases["for_model"] = [type(AutoConfig.for_model(name)).__mro__[-4].__name__ for name in ("bert", "llama")]
words = {word: place for place, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "read", "json"])}
for name in ("bert-AutoModel", "bert-AutoModelForSequenceClassification", "bert-one-label"):
    BertTokenizer(vocab=words).save_pretrained(f"{folder}/{name}")
cases["tokenizer"] = [type(AutoTokenizer.from_pretrained(f"{folder}/bert-AutoModel")).__name__]
encoder = SentenceTransformer(f"{folder}/bert-AutoModel", device="cpu")
cross_encoder = CrossEncoder(f"{folder}/bert-one-label", device="cpu")
probability = cross_encoder.predict([("read", "json")]).round(5).tolist()
cases["CrossEncoder"] = [type(cross_encoder[0].auto_model).__name__, probability]
cases["SentenceTransformer"] = [type(encoder[0].auto_model).__name__, encoder.encode("read json").round(5).tolist()]
features = pipeline("feature-extraction", model=f"{folder}/bert-AutoModel", device="cpu")
cases["features"] = [type(features.model).__name__, round(sum(map(sum, features("read json")[0])), 5)]
classify = pipeline("text-classification", model=f"{folder}/bert-AutoModelForSequenceClassification", device="cpu")
cases["classify"] = [type(classify.model).__name__, classify("read json")[0]["label"]]
print(json.dumps([importlib.util.find_spec("hf_disranker") is not None, cases]))
"""


@pytest.fixture(scope="session")
def without_us(tmp_path_factory):
    """All installed packages but this one, as a folder of links: nothing of it is there to be found."""
    folder = tmp_path_factory.mktemp("packages")
    for path in (Path(entry) for entry in sys.path if entry.endswith("site-packages")):
        for package in path.iterdir():
            link = folder / package.name
            if "hf_disranker" not in package.name and package.suffix != ".pth" and not link.exists():
                link.symlink_to(package)
    return folder


@pytest.fixture
def run(without_us, tmp_path):
    """Run code in a fresh process, without this package or with it, and read what it prints last."""

    def run_python(code, argument, absent):
        environment = os.environ | {"HF_HOME": str(tmp_path / "home")}
        command = [sys.executable]
        if absent:
            command.append("-S")  # no site: neither site-packages nor the hooks of editable installs
            environment["PYTHONPATH"] = str(without_us)
        command += ["-c", code, json.dumps(argument)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run_python


@pytest.fixture(scope="session")
def published(hub, tiny_student, tiny_teacher, student_dir, teacher_dir):
    """For student and teacher: sources (name, revision) and the scores that each must give.

    The tag v1 of a repository holds a model whose scores are twice those of its main branch.
    """
    found = {}
    for kind, (model, tokenizer), folder in (
        ("student", tiny_student, student_dir),
        ("teacher", tiny_teacher, teacher_dir),
    ):
        repo = f"tester/{kind}"
        doubled = copy.deepcopy(model)
        head = doubled.classifier if kind == "student" else doubled.score
        for weight in head.parameters():
            weight.data.mul_(2)
        doubled.push_to_hub(repo)
        tokenizer.push_to_hub(repo)
        HfApi().create_tag(repo, tag="v1")
        model.push_to_hub(repo)
        pairs = [(query, {"title": "", "summary": document}) for query, document in PAIRS]
        scores = Ranker.from_pretrained(folder).predict(pairs)
        found[kind] = [(folder, None), (repo, "main"), (repo, "v1")], [scores, scores, 2 * scores]
    return found


@pytest.mark.parametrize("kind", ["student", "teacher"])
@pytest.mark.parametrize("package", ["imported", "not installed"])
@pytest.mark.parametrize("loader", LOADERS)
def test_every_way_of_loading_gives_the_same_raw_scores(published, run, loader, package, kind):
    sources, expected = published[kind]
    absent = package == "not installed"
    argument = [loader, kind, {"import_first": not absent}, sources, PAIRS, TEACHER_TEXTS]
    result = run(LOAD, argument, absent)
    assert result["installed"] is result["imported"] is not absent
    assert len(result["answers"]) == 3
    for (name, scores, has_scores), wanted in zip(result["answers"], expected, strict=True):
        if absent and loader == "AutoModel":  # documented: the encoder or decoder alone
            assert (name, scores) == ({"student": "BertModel", "teacher": "LlamaModel"}[kind], None)
            continue
        stock = {"student": "BertForSequenceClassification", "teacher": "LlamaForSequenceClassification"}
        ours = {"student": "BertDistilledRanker", "teacher": "LlamaForLastTokenRanking"}
        assert name == (stock if absent else ours)[kind] and has_scores is not absent
        np.testing.assert_allclose(scores, wanted, atol=2e-5)


@pytest.fixture(scope="session")
def with_code(published, tiny_student, tiny_teacher):
    """Repositories pushed with remote code, by kind."""
    for kind, (model, tokenizer) in (("student", tiny_student), ("teacher", tiny_teacher)):
        model.push_to_hub(f"tester/{kind}-code", remote_code=True)
        tokenizer.push_to_hub(f"tester/{kind}-code")
    return {kind: f"tester/{kind}-code" for kind in published}


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_remote_code_gives_the_ranker_without_this_package(published, with_code, run, hub, kind):
    name, expected = with_code[kind], published[kind][1][0]
    code = [file for file in hub.files(name) if file.endswith(".py")]
    config = json.loads(hub.files(name)["config.json"])
    ours = {"student": "BertDistilledRanker", "teacher": "LlamaForLastTokenRanking"}[kind]
    assert code == ["modeling_disranker.py"] and config["auto_map"] == {"AutoModel": f"modeling_disranker.{ours}"}
    assert "hf_disranker" not in hub.files(name)[code[0]].decode()
    options = {"trust_remote_code": True}
    result = run(LOAD, ["AutoModel", kind, options, [(name, "main")], PAIRS, TEACHER_TEXTS], True)
    (found, scores, has_scores) = result["answers"][0]
    assert not result["installed"] and (found, has_scores) == (ours, True)
    np.testing.assert_allclose(scores, expected, atol=2e-5)


def test_who_does_not_trust_remote_code_gets_the_stock_class(published, with_code, run):
    sources = [(with_code["student"], "main")]
    result = run(LOAD, ["AutoModelForSequenceClassification", "student", {}, sources, PAIRS, TEACHER_TEXTS], True)
    assert result["answers"][0][0] == "BertForSequenceClassification"
    np.testing.assert_allclose(result["answers"][0][1], published["student"][1][0], atol=2e-5)


def test_teachers_of_every_family_load_with_this_package_and_without(hub, run):
    size = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 16, "head_dim": 8}
    size |= {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
    }
    expected = []
    for name in FAMILIES:
        torch.manual_seed(0)
        family = family_class(name)
        teacher = family(family.config_class.stock(**size)).eval()
        teacher.push_to_hub(f"tester/{name}")
        ours = AutoModel.from_pretrained(f"tester/{name}").eval()
        expected.append(
            [teacher.config.architecture, pytest.approx(teacher(torch.tensor(IDS)).scores.item(), abs=1e-6)]
        )
        assert type(ours) is family and ours(torch.tensor(IDS)).scores.item() == expected[-1][1]
    assert run(LOAD_STOCK, [[f"tester/{name}" for name in FAMILIES], IDS], True) == [False, expected]


def test_ordinary_checkpoints_load_exactly_as_without_us(run, tmp_path):
    plain = run(ORDINARY, [str(tmp_path / "plain"), False], True)
    ours = run(ORDINARY, [str(tmp_path / "ours"), True], False)
    assert (plain[0], ours[0]) == (False, True)
    assert len(plain[1]) > 50
    assert ours[1] == plain[1]
