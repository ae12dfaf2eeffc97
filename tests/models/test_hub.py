"""Publishing and fetching rankers: what lands on the Hub, and what is refused."""

import copy
import json
import logging
import pickle
import re
import shutil
import traceback
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from hub_server import Handler
from huggingface_hub import HfApi, ModelCard, hf_hub_download, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError
from peft import AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
    TrainerCallback,
)

from hf_disranker import (
    BertDistilledRanker,
    DistillationConfig,
    DistillationTrainer,
    LLMForLastTokenRanking,
    Ranker,
    RankingConfig,
    RankingTrainer,
    load_groups,
)
from hf_disranker.models.card import CardFacts, model_card
from hf_disranker.models.hub import PushError, push_folder
from hf_disranker.recipes import fit_teacher

PAIRS = [("read json", "json load read a document"), ("plot", "histogram of numbers")]
RESULTS = [
    {"name": "this model", "pnr": 2.5, "ndcg@5": 0.7, "ndcg@10": 0.75, "mrr": 0.8, "pairs_per_s": 1234.5},
    {"name": "BM25", "pnr": float("inf"), "ndcg@5": 0.6, "ndcg@10": 0.65, "mrr": 0.7},
    {"name": "teacher", "pnr": 4.0, "ndcg@5": 0.9, "ndcg@10": 0.92, "mrr": 0.95},
]


def pushed(model, tokenizer, repo, **options):
    model.push_to_hub(repo, tokenizer=tokenizer, **options)
    return repo


def run_snippets(repo):
    """Run the Python of a model card as it stands; give back how many pieces there are."""
    snippets = re.findall(r"```python\n(.*?)```", ModelCard.load(repo).text, flags=re.S)
    for snippet in snippets:
        exec(snippet, {})
    return len(snippets)


def scores(name, **options):
    return Ranker.from_pretrained(name, **options).predict(PAIRS)


def trainer_of(student_dir, judgments, out, **options):
    tokenizer = AutoTokenizer.from_pretrained(student_dir)
    groups = load_groups(judgments, split="train")
    settings = {
        "max_steps": 2,
        "eval_on_start": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "max_length": 40,
        "max_query_length": 8,
    }
    settings |= {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 4, "use_cpu": True}
    return RankingTrainer(
        model=BertDistilledRanker.from_pretrained(student_dir),
        args=RankingConfig(str(out), **settings | options),
        train_dataset=groups,
        eval_dataset=load_groups(judgments, split="dev"),
        processing_class=tokenizer,
    )


# what lands on the Hub


def test_a_pushed_ranker_loads_with_the_same_scores(tiny_student, hub):
    repo = pushed(*tiny_student, "tester/round-trip")
    np.testing.assert_allclose(scores(repo), Ranker(*tiny_student).predict(PAIRS), atol=1e-5)
    files = set(hub.files(repo))
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= files
    assert not [file for file in files if file.endswith((".py", ".bin"))]


def test_save_pretrained_can_push(tiny_student, tmp_path, hub):
    tiny_student[0].save_pretrained(tmp_path / "model", push_to_hub=True, repo_id="tester/saved", private=True)
    assert hub.repos["model", "tester/saved"].private
    assert hub.files("tester/saved")["model.safetensors"] == (tmp_path / "model/model.safetensors").read_bytes()


def test_branches_have_their_own_weights(tiny_student):
    model, tokenizer = tiny_student
    repo = pushed(model, tokenizer, "tester/branches")
    other = copy.deepcopy(model)
    other.classifier.bias.data.add_(3.0)
    other.push_to_hub(repo, revision="shifted")
    HfApi().create_tag(repo, tag="v2", revision="shifted")
    np.testing.assert_allclose(scores(repo, revision="v2"), scores(repo) + 3.0, atol=1e-5)


def test_teachers_are_private_by_default(tiny_teacher, tiny_student, tmp_path):
    for name, (model, tokenizer), options, private in (
        ("t-default", tiny_teacher, {}, True),
        ("t-open", tiny_teacher, {"private": False}, False),
        ("s-default", tiny_student, {}, False),
    ):
        repo = pushed(model, tokenizer, f"tester/{name}", **options)
        assert HfApi().model_info(repo).private is private
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("tester/t-default", "config.json", token=False)
    with pytest.raises(OSError, match="tester/t-default"):
        Ranker.from_pretrained("tester/t-default", token=False, cache_dir=tmp_path)


def test_a_teacher_that_pads_with_its_end_token_is_not_pushed(tiny_teacher, hub):
    model = copy.deepcopy(tiny_teacher[0])
    model.config.pad_token_id = model.config.eos_token_id
    with pytest.raises(ValueError, match="pad_token_id is 1 and its eos_token_id 1"):
        model.push_to_hub("tester/padding")
    assert ("model", "tester/padding") not in hub.repos


@pytest.mark.parametrize("kind", ["student", "teacher"])
@pytest.mark.parametrize("resave", ["CrossEncoder", "transformers"])
def test_a_ranker_resaved_by_others_is_still_a_ranker(request, kind, resave):
    model, tokenizer = request.getfixturevalue(f"tiny_{kind}")
    folder, repo = request.getfixturevalue(f"{kind}_dir"), f"tester/{kind}-saved-by-{resave}"
    if resave == "CrossEncoder":
        CrossEncoder(folder, device="cpu").push_to_hub(repo)
    else:
        stock = {"student": BertForSequenceClassification, "teacher": LlamaForSequenceClassification}[kind]
        stock.from_pretrained(folder).push_to_hub(repo)
        tokenizer.push_to_hub(repo)
    assert type(AutoModel.from_pretrained(repo)) is type(model)
    expected = Ranker(model, tokenizer).predict(PAIRS)
    np.testing.assert_allclose(scores(repo), expected, atol=1e-5)
    texts = (
        PAIRS if kind == "student" else [(f"query: {query}", f" document: {document}") for query, document in PAIRS]
    )
    np.testing.assert_allclose(CrossEncoder(repo, device="cpu").predict(texts), expected, atol=1e-5)


def test_remote_code_is_dropped_when_saved_again(tiny_student, tmp_path):
    model, tokenizer = tiny_student
    repo = pushed(model, tokenizer, "tester/with-code", remote_code=True)
    again = AutoModel.from_pretrained(repo, trust_remote_code=True)
    assert type(again) is BertDistilledRanker  # the installed class, not the repository's
    again.save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


def test_adapters_and_merged_teachers(tiny_teacher, tmp_path):
    model, tokenizer = copy.deepcopy(tiny_teacher[0]), tiny_teacher[1]
    base = pushed(model, tokenizer, "tester/base-teacher")
    lora = get_peft_model(
        LLMForLastTokenRanking.from_pretrained(base),
        LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "v_proj"]),
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in lora.parameters():
            if weight.requires_grad:
                weight.add_(0.05 * torch.randn_like(weight))
    lora.push_to_hub("tester/adapter", private=True)
    batch = tokenizer(["query: plot document: histogram", "query: a document: b"], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = lora.eval()(**batch).logits
        loaded = AutoModel.from_pretrained("tester/adapter").eval()
        assert isinstance(loaded, LLMForLastTokenRanking)
        torch.testing.assert_close(loaded(**batch).logits, expected, atol=1e-5, rtol=0)
        peft = AutoPeftModelForSequenceClassification.from_pretrained("tester/adapter").eval()
        torch.testing.assert_close(peft(**batch).logits, expected, atol=1e-5, rtol=0)
        repo = pushed(lora.merge_and_unload(), tokenizer, "tester/merged")
        merged = AutoModelForSequenceClassification.from_pretrained(repo).eval()
        torch.testing.assert_close(merged(**batch).logits, expected, atol=1e-5, rtol=0)


# the trainer


def test_the_trainer_pushes_model_tokenizer_and_card(student_dir, judgments, tmp_path, hub):
    trainer = trainer_of(student_dir, judgments, tmp_path / "end", hub_model_id="tester/trained", hub_token=hub.token)
    trainer.train()
    trainer.push_to_hub(results=RESULTS[1:], remote_code=True)
    files = hub.files("tester/trained")
    assert not [name for name in files if name.endswith(".bin") or name.startswith("checkpoint-")]
    assert {"modeling_disranker.py", "model.safetensors", "tokenizer.json"} <= set(files)
    # Tokenizer and model agree on the length that training cut at.
    assert json.loads(files["tokenizer_config.json"])["model_max_length"] == 40
    assert np.isfinite(scores("tester/trained")).all()
    card = ModelCard.load("tester/trained")
    assert "| this model |" in card.text and "| before training |" in card.text and "| BM25 | inf |" in card.text
    assert (
        "| learning_rate | 2e-05 |" in card.text and "fingerprint `" in card.text and "Not measured" not in card.text
    )
    assert "| lr_scheduler_type | linear |" in card.text
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert measured["pnr"] == pytest.approx(trainer.state.log_history[-2]["eval_pnr"], abs=1e-4)
    assert set(measured) == {"pnr", "ndcg@5", "ndcg@10", "mrr"}


def test_every_save_pushes_revisions_that_load(student_dir, judgments, tmp_path, hub):
    options = {"push_to_hub": True, "hub_model_id": "tester/every-save", "hub_strategy": "every_save"}
    trainer = trainer_of(student_dir, judgments, tmp_path, hub_always_push=True, hub_token=hub.token, **options)
    waiting = TrainerCallback()
    # A step of this tiny model is over before the push of the one before has read its files.
    waiting.on_step_begin = lambda *_, **__: trainer.push_in_progress and trainer.push_in_progress.wait_until_done()
    trainer.add_callback(waiting)
    trainer.train()
    trainer.push_in_progress.wait_until_done()
    titles = {commit.title: commit.oid for commit in hub.repos["model", "tester/every-save"].history("main")}
    assert {"Training in progress, step 1", "Training in progress, step 2"} <= set(titles)
    first = titles["Training in progress, step 1"]
    assert np.isfinite(scores("tester/every-save", revision=first)).all()
    arguments = hub.files("tester/every-save", first)["training_args.bin"]
    assert hub.token.encode() not in arguments  # Trainer pushes its arguments as a pickle
    trainer.push_to_hub()
    assert "training_args.bin" not in hub.files("tester/every-save")


def test_distillation_losses_are_in_the_card(student_dir, judgments, tmp_path):
    rows = judgments.assign(teacher_score=judgments["label"].astype("float32")).drop(columns="split")
    trainer = DistillationTrainer(
        model=BertDistilledRanker.from_pretrained(student_dir),
        args=DistillationConfig(str(tmp_path), point_weight=0.25, max_length=64, use_cpu=True),
        train_dataset=load_groups(rows),
        processing_class=AutoTokenizer.from_pretrained(student_dir),
    )
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert "point 0.25" in text and "margin 0.5" in text and "| point_weight |" not in text


def test_a_teachers_trainer_makes_a_private_repository(teacher_dir, judgments, tmp_path, hub):
    options = {"max_length": 64, "use_cpu": True, "push_to_hub": True, "hub_model_id": "tester/private-teacher"}
    RankingTrainer(
        model=LLMForLastTokenRanking.from_pretrained(teacher_dir),
        args=RankingConfig(str(tmp_path), hub_token=hub.token, **options),
        train_dataset=load_groups(judgments, split="train"),
        processing_class=AutoTokenizer.from_pretrained(teacher_dir),
    )
    assert hub.repos["model", "tester/private-teacher"].private


def test_a_trainer_publishes_an_adapter_and_how_to_load_it(tiny_teacher, judgments, tmp_path, hub):
    base = pushed(*tiny_teacher, "tester/adapted-base")
    trainer = RankingTrainer(
        model=get_peft_model(
            LLMForLastTokenRanking.from_pretrained(base),
            LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "v_proj"]),
        ),
        args=RankingConfig(
            str(tmp_path),
            max_steps=3,
            learning_rate=0.1,
            max_length=64,
            use_cpu=True,
            hub_model_id="tester/adapted",
        ),
        train_dataset=load_groups(judgments, split="train"),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    trainer.train()
    trainer.push_to_hub()
    assert hub.repos["model", "tester/adapted"].private
    files = set(hub.files("tester/adapted"))
    assert {"adapter_model.safetensors", "tokenizer.json"} <= files and "model.safetensors" not in files
    assert ModelCard.load("tester/adapted").data.base_model == base and run_snippets("tester/adapted") == 2
    tokenizer = AutoTokenizer.from_pretrained("tester/adapted")
    found = Ranker(AutoModel.from_pretrained("tester/adapted"), tokenizer).predict(PAIRS)
    np.testing.assert_allclose(found, Ranker(trainer.model, tokenizer).predict(PAIRS), atol=1e-5)
    assert np.abs(found - scores(base)).max() > 0.01


def test_a_recipe_publishes_the_merged_teacher(teacher_dir, judgments, tmp_path, hub):
    judgments.to_parquet(tmp_path / "judgments.parquet")
    arguments = ["--model_name_or_path", teacher_dir, "--judgments", str(tmp_path / "judgments.parquet"), "--use_cpu"]
    arguments += ["--output_dir", str(tmp_path / "out"), "--max_length", "48", "--max_steps", "2", "--save_steps", "1"]
    arguments += ["--use_peft", "--lora_target_modules", "q_proj", "v_proj", "--save_strategy", "steps"]
    arguments += ["--push_to_hub", "--hub_model_id", "tester/recipe", "--hub_token", hub.token]
    fit_teacher.main(*fit_teacher.make_parser().parse_args_and_config(arguments))
    titles = [commit.title for commit in hub.repos["model", "tester/recipe"].history("main")]
    assert titles[0] == "End of training" and any(title.startswith("Training in progress") for title in titles)
    assert not [name for name in hub.files("tester/recipe") if name.startswith("adapter_")]
    np.testing.assert_allclose(scores("tester/recipe"), scores(tmp_path / "out"), atol=1e-5)
    assert hub.token not in "".join(map(str, hub.files("tester/recipe").values()))
    assert "| this model |" in ModelCard.load("tester/recipe").text


# the card


def test_the_card_lists_what_is_known_and_passes_validation(tiny_student):
    config = copy.deepcopy(tiny_student[0].config)
    config.disranker |= {"teacher": {"id": "org/teacher", "revision": "abc123"}, "max_length": 64}
    config.disranker |= {"max_query_length": 16, "score_transform": {"scale": 0.5, "shift": 1.0}}
    facts = CardFacts(
        base_model="org/small-bert",
        results=RESULTS,
        dataset="org/judgments",
        data=[{"use": "training", "name": "org/scores", "rows": 12, "fingerprint": "f00d"}],
        losses={"point": 0.5, "margin": 0.5},
        hyperparameters={"learning_rate": 5e-5},
    )
    card = model_card(config, "org/student", facts)
    again = ModelCard(str(card)).data  # raises ValueError for metadata that is none
    assert (again.pipeline_tag, again.library_name) == ("text-ranking", "sentence-transformers")
    assert (again.base_model, again.datasets, again.model_name) == ("org/small-bert", ["org/scores"], "student")
    values = {result.metric_type: result.metric_value for result in again.eval_results}
    assert values == {"pnr": 2.5, "ndcg@5": 0.7, "ndcg@10": 0.75, "mrr": 0.8}
    assert {(r.task_type, r.dataset_type) for r in again.eval_results} == {("text-ranking", "org/judgments")}
    for fact in (
        *("org/teacher, revision abc123", "point 0.5, margin 0.5", "| learning_rate | 5e-05 |", "fingerprint `f00d`"),
        *("| this model | 2.5000 | 0.7000 | 0.7500 | 0.8000 | 1,234 |", "| teacher | 4.0000", "{'scale': 0.5"),
        *(
            'CrossEncoder("org/student")',
            "vllm serve org/student",
            "--model-id org/student",
            "disranker export",
        ),
        *("`{title} {summary}`", "raw_scores", "Identity", "Not measured: before training.", "2411.04539"),
    ):
        assert fact in card.text, fact
    tables = re.findall(r"(?:^\|.*\n)+", card.text, flags=re.M)  # an empty line would end one
    assert [len(table.splitlines()) - 2 for table in tables] == [2, 1, 3]


def test_the_card_of_a_teacher_and_of_an_adapter(tiny_teacher):
    config = tiny_teacher[0].config
    card = model_card(config, "org/teacher")
    assert card.data.library_name == "transformers" and "text-embeddings-router" not in card.text
    assert "'query: how to plot document: numpy.histogram: bins of data'" in card.text
    adapter = model_card(config, "org/a", CardFacts(base_model="org/base"), adapter=True)
    assert adapter.data.library_name == "peft" and "LoRA weights that make [org/base]" in adapter.text


def test_the_snippets_of_a_card_run(tiny_student, tiny_teacher):
    assert run_snippets(pushed(*tiny_student, "tester/snippets-student")) == 3
    assert run_snippets(pushed(*tiny_teacher, "tester/snippets-teacher")) == 2


def test_a_card_contains_no_local_paths(tiny_student, student_dir, tmp_path):
    config = copy.deepcopy(tiny_student[0].config)
    config.disranker["teacher"] = {"id": str(tmp_path / "runs" / "teacher"), "revision": None}
    card = model_card(config, "org/student", CardFacts(base_model=student_dir))
    assert str(tmp_path) not in str(card) and student_dir not in str(card) and "teacher (not published)" in card.text
    assert card.data.base_model is None


def test_an_existing_card_is_kept(tiny_student, hub):
    repo = pushed(*tiny_student, "tester/own-card")
    HfApi().upload_file(repo_id=repo, path_or_fileobj=b"---\nlicense: mit\n---\nMine.", path_in_repo="README.md")
    tiny_student[0].push_to_hub(repo)
    assert hub.files(repo)["README.md"].endswith(b"Mine.")
    tiny_student[0].push_to_hub(repo, facts=CardFacts(results=RESULTS))
    assert b"| BM25 | inf |" in hub.files(repo)["README.md"]


# a push that is cut off


@pytest.fixture
def impatient(monkeypatch):
    """huggingface_hub tries again at once, not after seconds."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


def test_an_interrupted_push_keeps_the_last_revision(tiny_student, hub, monkeypatch, impatient, caplog):
    model, tokenizer = copy.deepcopy(tiny_student[0]), tiny_student[1]
    repo = pushed(model, tokenizer, "tester/cut")
    good, before = hub.repos["model", repo].branches["main"], scores(repo)
    model.classifier.bias.data.add_(5.0)
    caplog.set_level(logging.DEBUG)
    with monkeypatch.context() as context:
        context.setattr(Handler, "do_PUT", lambda self: self.connection.close())
        with pytest.raises(PushError, match=f"main of {repo} is at {good} and loads as before.* push again") as error:
            model.push_to_hub(repo, token=hub.token)
    assert hub.token not in str(error.value) + caplog.text
    np.testing.assert_allclose(scores(repo), before, atol=1e-5)
    model.push_to_hub(repo)
    np.testing.assert_allclose(scores(repo), before + 5.0, atol=1e-5)


def test_an_interrupted_trainer_push_keeps_the_last_revision(
    student_dir, judgments, tmp_path, hub, monkeypatch, impatient, caplog
):
    repo = "tester/trainer-cut"
    trainer = trainer_of(student_dir, judgments, tmp_path, hub_model_id=repo, hub_token=hub.token)
    trainer.push_to_hub()
    good, before = hub.repos["model", repo].branches["main"], scores(repo)
    trainer.model.classifier.bias.data.add_(7.0)  # weights that are not there yet, from no other test
    caplog.set_level(logging.DEBUG)
    with monkeypatch.context() as context:
        context.setattr(Handler, "do_PUT", lambda self: self.connection.close())
        with pytest.raises(PushError, match=f"is at {good} and loads as before.* push again") as error:
            trainer.push_to_hub()
    assert hub.token not in "".join(traceback.format_exception(error.value)) + caplog.text
    np.testing.assert_allclose(scores(repo), before, atol=1e-5)
    trainer.push_to_hub()
    np.testing.assert_allclose(scores(repo), before + 7.0, atol=1e-5)


def _push_and_hang(folder, repo):
    model = BertDistilledRanker.from_pretrained(folder)
    model.classifier.bias.data.add_(1.0)
    model.push_to_hub(repo)


def test_a_process_killed_while_pushing_keeps_the_last_revision(student_dir, tiny_student, hub, monkeypatch):
    repo = pushed(*tiny_student, "tester/killed")
    before, good = scores(repo), hub.repos["model", repo].branches["main"]
    children = []
    monkeypatch.setattr(Handler, "do_PUT", lambda self: children[0].kill())  # in the middle of the weights
    children.append(processes.start(_push_and_hang, student_dir, repo))
    children[0].join(60)
    assert children[0].exitcode == -9
    assert hub.repos["model", repo].branches["main"] == good
    np.testing.assert_allclose(scores(repo), before, atol=1e-5)


def test_a_rejected_token_is_reported_but_not_shown(tiny_student, caplog):
    caplog.set_level(logging.DEBUG)
    with pytest.raises(PushError, match="check the token") as error:
        tiny_student[0].push_to_hub("tester/refused", token="hf_wrongWRONGwrong")
    assert "hf_wrong" not in str(error.value) + caplog.text


# what is refused


@pytest.fixture
def folder(student_dir, tmp_path):
    """A copy of the student, to be spoilt."""
    return Path(shutil.copytree(student_dir, tmp_path / "spoilt"))


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("where", ["folder", "Hub"])
def test_pickled_weights_are_refused_without_loading(folder, where, tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "exploded",)

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    name = str(folder)
    if where == "Hub":
        name = "tester/pickles"
        HfApi().create_repo(name, exist_ok=True)
        HfApi().upload_folder(repo_id=name, folder_path=folder)
    for load in (AutoModel, BertDistilledRanker, Ranker):
        with pytest.raises(OSError, match="weights as pytorch_model.bin and not as safetensors. Refused"):
            load.from_pretrained(name)
    assert not (tmp_path / "exploded").exists()


def test_an_auto_map_that_points_elsewhere_is_refused(folder):
    edit(folder, auto_map={"AutoModel": "evil/code--modeling.Ranker"})
    for load in (AutoModel, BertDistilledRanker, Ranker):
        with pytest.raises(ValueError, match="auto_map names code of another repository"):
            load.from_pretrained(folder)
    with pytest.raises(ValueError, match="auto_map names code of another repository"):
        AutoModel.from_pretrained(folder, trust_remote_code=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"disranker": True}, "is True, not the description of a ranker"),
        ({"disranker": {"format": 1, "role": "student", "head": "mean"}}, "says 1 labels and the head mean"),
        ({"hidden_size": 16}, "do not fit what its config claims"),
    ],
)
def test_a_config_that_contradicts_the_checkpoint_is_refused(folder, changes, message):
    edit(folder, **changes)
    for load in (AutoModel, BertDistilledRanker):
        with pytest.raises(ValueError, match=message):
            load.from_pretrained(folder)


def test_explicit_classes_refuse_a_marker_with_several_labels(folder):
    edit(folder, id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1})
    with pytest.raises(ValueError, match="says 2 labels and the head cls"):
        BertDistilledRanker.from_pretrained(folder)


def test_a_marked_checkpoint_without_its_head_is_refused(folder):
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.startswith("classifier")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="is not a trained ranker: it lacks .*classifier.*which its config claims"):
        AutoModel.from_pretrained(folder)


def test_truncated_weights_are_refused(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(OSError, match="truncated or damaged. Download it again"):
        AutoModel.from_pretrained(folder)


def test_an_incomplete_download_is_refused(tiny_student, monkeypatch, impatient):
    repo = pushed(*tiny_student, "tester/early")
    answer = Handler.reply

    def half(self, status, content, headers):
        big = status in (200, 206) and self.command == "GET" and "model.safetensors" in self.path
        answer(self, status, content[: len(content) // 2] if big else content, headers)

    with monkeypatch.context() as context:
        context.setattr(Handler, "reply", half)
        with pytest.raises(OSError, match="(?i)consistency|size"):
            AutoModel.from_pretrained(repo)
    np.testing.assert_allclose(scores(repo), Ranker(*tiny_student).predict(PAIRS), atol=1e-5)


@pytest.mark.parametrize("token", ["hf_abcdefghijkl\n", "hf_oauth_abc.def-ghi\n", "a secret of another kind\n"])
def test_a_token_invalid_in_a_header_is_not_shown(tiny_student, token):
    with pytest.raises(PushError, match="Illegal header value b'Bearer \\*\\*\\*") as error:
        tiny_student[0].push_to_hub("tester/line-end", token=token)
    assert token.strip() not in "".join(traceback.format_exception(error.value))


def test_push_folder_skips_pickles(folder, hub):
    (folder / "training_args.bin").write_bytes(b"pickle")
    push_folder(folder, "tester/folder", BertDistilledRanker.from_pretrained(folder).config)
    assert "training_args.bin" not in hub.files("tester/folder")
    assert Path(snapshot_download("tester/folder"), "model.safetensors").exists()
