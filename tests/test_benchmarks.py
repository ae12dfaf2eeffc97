"""The experiments behind docs/benchmarks/quality.md, with models and tables that take seconds."""

import argparse
import ast
import importlib.util
import math
import re
import shutil
import sys

import numpy as np
import pytest
import torch
import yaml
from transformers import BertConfig, BertModel

from hf_disranker import Ranker
from hf_disranker.data.tables import pair_texts, write_table
from hf_disranker.recipes.quickstart.from_scratch import small_llama

load = importlib.import_module  # pytest has benchmarks/ on its path


@pytest.fixture
def encoder(tiny_student, tmp_path):
    size = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 6}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tiny_student[1]), **size)).save_pretrained(tmp_path / "encoder")
    tiny_student[1].save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def call(module, monkeypatch, what, *options):
    monkeypatch.setattr(sys, "argv", [module.__name__, what, *map(str, options)])
    module.main()


def test_graded_queries_are_ranked_by_models_that_never_saw_their_labels(
    encoder, judgments, tmp_path, monkeypatch, capsys
):
    human_graded = load("human_graded")
    (tmp_path / "graded").mkdir()
    judgments.to_parquet(tmp_path / "graded" / "judgments.parquet")
    config = yaml.safe_load(human_graded.CONFIG.read_text())
    config |= {"folds": 2, "students": {"1 layer": [5]}, "sets": {"graded": {"steps": 1}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    seen = []
    fit = human_graded.Fold.fit
    monkeypatch.setattr(human_graded.Fold, "fit", lambda fold, layers: seen.append(fold) or fit(fold, layers))
    options = ["--data", tmp_path, "--out", tmp_path / "out", "--config", tmp_path / "config.yaml", "--model", encoder]

    for what in ("run", "run", "show"):  # the second finds all done
        call(human_graded, monkeypatch, what, *options)

    assert len(seen) == 2 * 2  # folds; the teacher and the student on labels
    for fold in seen:
        assert not set(fold.seen["query_id"]) & set(fold.held_out["query_id"])
        assert set(fold.seen["query_id"]) | set(fold.held_out["query_id"]) == set(judgments["query_id"])
    printed = capsys.readouterr().out
    assert "12 queries. Nothing is called significant: 12 queries are fewer than 200." in printed
    assert "| 1 layer, distilled | 1 layer, labels | " in printed and " p = " not in printed


def test_the_cells_of_every_system_train_and_are_compared(
    student_dir, teacher_dir, judgments, corpus, tmp_path, monkeypatch, capsys
):
    quality = load("quality")
    quickstart = tmp_path / "quickstart"
    shutil.copytree(student_dir, quickstart / "base" / "bert")
    shutil.copytree(teacher_dir, quickstart / "teacher")
    pairs = judgments.drop(columns=["label", "split"])
    scores = Ranker.from_pretrained(teacher_dir).predict(pair_texts(pairs))
    tables = {"data/judgments": judgments, "data/corpus": corpus.assign(split=judgments["split"])}
    tables |= {"data/labels": judgments.drop(columns="split"), "scores/0": pairs.assign(teacher_score=scores)}
    for name, table in tables.items():
        write_table(table, str(quickstart / f"{name}.parquet"))
    config = yaml.safe_load(quality.CONFIG.read_text()) | {"steps": 1, "max_length": 64}
    kept = [config["reference"], "sentence-transformers RankNetLoss", "transformers Trainer, regression", "labels"]
    config["cells"] = {name: config["cells"][name] for name in kept}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    options = ["--quickstart", quickstart, "--out", tmp_path / "out", "--config", tmp_path / "config.yaml"]

    call(quality, monkeypatch, "run", *options, "--seeds", 0, "--questions", "d")
    assert not (tmp_path / "out" / "cells" / "labels").exists()  # a cell of another question
    call(quality, monkeypatch, "run", *options, "--seeds", 0)
    call(quality, monkeypatch, "show", *options)

    printed = capsys.readouterr().out
    assert all(printed.count(f"{name}, seed 0: ") == 1 for name in kept)  # the second run goes on where the first was
    assert re.search(r"^\| labels \| 1 \| 0\.\d+ .*\| [+-]0\.\d+ \[", printed, flags=re.M)
    assert "Nothing is called significant: 4 queries are fewer than 200." in printed

    shutil.rmtree(quickstart / "teacher")  # another start, and a teacher known by its scores alone
    write_table(pairs.assign(teacher_score=scores), str(quickstart / "dev_scores" / "0.parquet"))
    options += ["--out", tmp_path / "other", "--base", student_dir, "--layers", 1, "--only", config["reference"]]
    call(quality, monkeypatch, "run", *options, "--seeds", 0)
    (cell,) = (tmp_path / "other" / "cells").iterdir()
    assert Ranker.from_pretrained(cell / "0" / "model").model.config.num_hidden_layers == 1
    dev = judgments["split"].to_numpy() == "dev"
    assert np.load(tmp_path / "other" / "teacher.npy") == pytest.approx(scores[dev])


def test_heads_of_one_model_learn_from_equal_numbers_of_queries(
    tiny_teacher, judgments, corpus, tmp_path, monkeypatch, capsys
):
    heads, showcase = load("heads"), tmp_path / "showcase"
    small_llama(tiny_teacher[1], layers=1, size=64).save_pretrained(tmp_path / "model")
    tiny_teacher[1].save_pretrained(tmp_path / "model")
    pairs = judgments.drop(columns=["label", "split"])
    scores = pairs.assign(teacher_score=np.arange(len(pairs), dtype=np.float32))
    tables = {"data/judgments": judgments, "data/corpus": corpus.assign(split=judgments["split"])}
    tables |= {"data/clicks_and_labels": judgments.drop(columns="split"), "scores/0": scores, "dev_scores/0": scores}
    for name, table in tables.items():
        write_table(table, str(showcase / f"{name}.parquet"))
    config = yaml.safe_load(heads.CONFIG.read_text()) | {"steps": 1, "max_length": 64, "dev_queries": 3}
    config["cells"] = {name: cell for name, cell in config["cells"].items() if cell["head"] == "last_token"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    seen = []
    for trainer in ("RankingTrainer", "DistillationTrainer"):
        kind = getattr(heads, trainer)
        monkeypatch.setattr(heads, trainer, lambda kind=kind, **options: seen.append(options) or kind(**options))
    options = ["--showcase", showcase, "--model", tmp_path / "model", "--out", tmp_path / "out"]

    for what in ("run", "run", "show"):  # the second finds all done
        call(heads, monkeypatch, what, *options, "--config", tmp_path / "config.yaml")

    assert [len(one["train_dataset"]) for one in seen] == [8] * len(config["cells"])
    rates = {group["lr"] for one in seen for group in one["optimizers"][0].param_groups}
    texts = {one["model"].config.marker.templates.text for one in seen}
    assert len(texts) == 2 and rates <= {0.0, config["learning_rate"], config["head_learning_rate"]}
    printed = capsys.readouterr().out
    assert all(printed.count(f"| {name} | ") == 1 for name in [*config["cells"], "bm25", heads.REFERENCE])


def test_pooled_gives_every_set_the_same_weight():
    rng = np.random.default_rng(0)
    small, large = rng.normal(0.3, 0.1, 50), rng.normal(0.1, 0.1, 5000)
    mean, (low, high) = load("human_graded").pooled([small, np.r_[large, np.nan]])
    half = 1.96 * math.sqrt(small.var() / 50 + large.var() / 5000) / 2
    assert mean == pytest.approx((small.mean() + large.mean()) / 2)
    np.testing.assert_allclose([low, high], [mean - half, mean + half], atol=0.15 * half)


def test_queries_that_differ_by_a_plural_share_a_fold():
    human_graded = load("human_graded")
    folds = human_graded.fold_of(["wireless headphones", "Wireless headphone", "tv-set", "tvset"], 1000)
    assert folds[0] == folds[1] and folds[2] == folds[3] and folds[0] != folds[2]


@pytest.mark.parametrize("system", load("training").SYSTEMS)
def test_training_is_measured_for_every_system_and_peers_train_the_stock_class(system, tmp_path):
    training = load("training")
    shape = {"layers": 2, "size": 32, "queries": 2, "documents": 4, "steps": 3, "precision": "fp32"}
    training.prepare(tmp_path, argparse.Namespace(**shape))
    row = training.run_one(system, tmp_path, argparse.Namespace(**shape))
    assert row["documents"] > 0 and row["memory"] > 0
    compared = {"sentence-transformers, n-tuples": 3 / 4, "sentence-transformers, triplets": 1 / 2}.get(system, 3 / 2)
    assert row["pairs"] == pytest.approx(compared * row["documents"])


def test_measures_equal_those_of_the_peers(capsys, monkeypatch):
    measures = load("measures")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # ranx compiles for a minute
    seconds = measures.metric_rows(2000, rounds=1)
    means = ast.literal_eval(re.search(r"{.*}", capsys.readouterr().out)[0])
    assert len(seconds) == 3 and len(set(means.values())) == 1
