"""The ways in which people load a ranker, in a process with this package and in one without it.

Each loads a folder, a Hub id and a revision in turn; what it fetches comes over HTTP into a cache of its own.
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
from hf_disranker.models.loading import ranker_class

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text")
PAIRS = [("read a json file", "json load read a document"), ("plot", "histogram of a table of numbers")]
TEACHER_TEXTS = [f"query: {query} document: {document}" for query, document in PAIRS]
LOADERS = ["AutoModel", "AutoModelForSequenceClassification", "CrossEncoder", "pipeline"]

# Runs each case, a name, code and an argument for it, and stores its answer or, where it fails, the traceback.
CASES = """
import importlib.util, json, sys, traceback
source, target, imported = sys.argv[1:]
if imported:
    import hf_disranker
answers = {"installed": importlib.util.find_spec("hf_disranker") is not None}
for name, code, argument in json.load(open(source)):
    names = {"argument": argument}
    try:
        exec(code, names)
        answers[name] = names["answer"]
    except Exception:
        answers[name] = traceback.format_exc()
answers["imported"] = "hf_disranker" in sys.modules
json.dump(answers, open(target, "w"))
"""

# The class of the model and its scores for each source; scores are null where there are none.
LOAD = """
loader, kind, options, sources, pairs, texts = argument
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

answer = []
for name, revision in sources:
    model, scores = load(name, revision)
    ours = scores is not None and hasattr(model(input_ids=model.dummy_inputs["input_ids"]), "scores")
    answer.append([type(model).__name__, scores, ours])
"""

# The class of each teacher, and its logit for IDS.
IDS = [[2, 7, 8, 9, 1]]
LOAD_STOCK = """
import torch
from transformers import AutoModelForSequenceClassification
names, ids = argument
models = [AutoModelForSequenceClassification.from_pretrained(name).eval() for name in names]
answer = [[type(model).__name__, model(torch.tensor(ids)).logits.item()] for model in models]
"""

# What must be as it is without this package: a line for each case.
ORDINARY = """
folder = argument
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
answer = cases
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


@pytest.fixture(scope="session")
def with_code(published, tiny_student, tiny_teacher):
    """Repositories pushed with remote code, by kind."""
    for kind, (model, tokenizer) in (("student", tiny_student), ("teacher", tiny_teacher)):
        model.push_to_hub(f"tester/{kind}-code", remote_code=True)
        tokenizer.push_to_hub(f"tester/{kind}-code")
    return {kind: f"tester/{kind}-code" for kind in published}


@pytest.fixture(scope="session")
def families(hub):
    """A small teacher of each family on the Hub: (name, class and logit for IDS) of each."""
    size = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 16, "head_dim": 8}
    size |= {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
    }
    made = []
    for name in FAMILIES:
        torch.manual_seed(0)
        family = ranker_class(name)
        teacher = family(family.config_class.stock(**size)).eval()
        teacher.push_to_hub(f"tester/{name}")
        made.append((f"tester/{name}", [teacher.config.architecture, teacher(torch.tensor(IDS)).scores.item()]))
    return made


def answers_of(package, cases, folder, without_us):
    """Run the cases in one fresh process that has this package imported first, or not installed."""
    environment = os.environ | {"HF_HOME": str(folder / "home")}
    command = [sys.executable]
    if package == "not installed":
        command.append("-S")  # no site: neither site-packages nor the hooks of editable installs
        environment["PYTHONPATH"] = str(without_us)
    source, target = folder / "cases.json", folder / "answers.json"
    source.write_text(json.dumps(cases))
    command += ["-c", CASES, str(source), str(target), "yes" if package == "imported" else ""]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(target.read_text())


@pytest.fixture(scope="session")
def answers(published, with_code, families, without_us, tmp_path_factory):
    """What each package state answered to the cases, which share a process because it takes long to start."""
    found = {}
    for package in ("imported", "not installed"):
        folder = tmp_path_factory.mktemp("loading")
        cases = [("ordinary", ORDINARY, str(folder))]
        cases += [
            (f"{loader} {kind}", LOAD, [loader, kind, {}, published[kind][0], PAIRS, TEACHER_TEXTS])
            for loader in LOADERS
            for kind in published
        ]
        if package == "not installed":
            cases.append(("families", LOAD_STOCK, [[name for name, _ in families], IDS]))
            untrusted = ["AutoModelForSequenceClassification", "student", {}]
            cases.append(("untrusted", LOAD, [*untrusted, [(with_code["student"], "main")], PAIRS, TEACHER_TEXTS]))
            for kind, name in with_code.items():  # last: it registers classes
                trusted = ["AutoModel", kind, {"trust_remote_code": True}]
                cases.append((f"code {kind}", LOAD, [*trusted, [(name, "main")], PAIRS, TEACHER_TEXTS]))
        found[package] = answers_of(package, cases, folder, without_us)
    return found


@pytest.mark.parametrize("package", ["imported", "not installed"])
def test_processes_run_with_and_without_this_package(answers, package):
    assert answers[package]["installed"] is answers[package]["imported"] is (package == "imported")


@pytest.mark.parametrize("kind", ["student", "teacher"])
@pytest.mark.parametrize("package", ["imported", "not installed"])
@pytest.mark.parametrize("loader", LOADERS)
def test_every_way_of_loading_gives_the_same_raw_scores(published, answers, loader, package, kind):
    expected = published[kind][1]
    absent = package == "not installed"
    answer = answers[package][f"{loader} {kind}"]
    assert len(answer) == 3, answer
    for (name, scores, has_scores), wanted in zip(answer, expected, strict=True):
        if absent and loader == "AutoModel":  # documented: the encoder or decoder alone
            assert (name, scores) == ({"student": "BertModel", "teacher": "LlamaModel"}[kind], None)
            continue
        stock = {"student": "BertForSequenceClassification", "teacher": "LlamaForSequenceClassification"}
        ours = {"student": "BertDistilledRanker", "teacher": "LlamaForLastTokenRanking"}
        assert name == (stock if absent else ours)[kind] and has_scores is not absent
        np.testing.assert_allclose(scores, wanted, atol=2e-5)


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_remote_code_gives_the_ranker_without_this_package(published, with_code, answers, hub, kind):
    name, expected = with_code[kind], published[kind][1][0]
    code = [file for file in hub.files(name) if file.endswith(".py")]
    config = json.loads(hub.files(name)["config.json"])
    ours = {"student": "BertDistilledRanker", "teacher": "LlamaForLastTokenRanking"}[kind]
    assert code == ["modeling_disranker.py"] and config["auto_map"] == {"AutoModel": f"modeling_disranker.{ours}"}
    assert "hf_disranker" not in hub.files(name)[code[0]].decode()
    ((found, scores, has_scores),) = answers["not installed"][f"code {kind}"]
    assert (found, has_scores) == (ours, True)
    np.testing.assert_allclose(scores, expected, atol=2e-5)


def test_without_trust_remote_code_the_stock_class_loads(published, answers):
    ((found, scores, _),) = answers["not installed"]["untrusted"]
    assert found == "BertForSequenceClassification"
    np.testing.assert_allclose(scores, published["student"][1][0], atol=2e-5)


def test_teachers_of_every_family_load_with_this_package_and_without(families, answers):
    for (name, (_, score)), model_type in zip(families, FAMILIES, strict=True):
        ours = AutoModel.from_pretrained(name).eval()
        assert type(ours) is ranker_class(model_type) and ours(torch.tensor(IDS)).scores.item() == score
    expected = [[architecture, pytest.approx(score, abs=1e-6)] for _, (architecture, score) in families]
    assert answers["not installed"]["families"] == expected


def test_ordinary_checkpoints_load_exactly_as_without_this_package(answers):
    plain, ours = answers["not installed"]["ordinary"], answers["imported"]["ordinary"]
    assert isinstance(plain, dict) and len(plain) > 50, plain
    assert ours == plain
