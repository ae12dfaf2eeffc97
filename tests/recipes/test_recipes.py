"""The stages by their recipes, on tiny models: LoRA, growing vocabularies, resuming, and what they leave behind."""

import importlib
import json

import numpy as np
import pytest
import torch
from tiny_gguf import write_gguf
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen3Config,
)
from transformers import Qwen3ForCausalLM as Qwen3

from hf_disranker import LLMForLastTokenRanking, Ranker
from hf_disranker.data.tables import pair_texts
from hf_disranker.recipes.quickstart.from_scratch import small_llama

SHORT = ["--max_length", "48", "--use_cpu", "true", "--disable_tqdm", "true", "--report_to", "none"]


def run(recipe, *arguments):
    module = importlib.import_module(f"hf_disranker.recipes.{recipe}")
    return module.main(*module.make_parser().parse_args_and_config([str(argument) for argument in arguments]))


@pytest.fixture
def tables(tmp_path, judgments, clicks, candidates, corpus):
    frames = {"judgments": judgments, "clicks": clicks, "candidates": candidates, "corpus": corpus}
    for name, frame in frames.items():
        frame.to_parquet(tmp_path / f"{name}.parquet")
    return tmp_path


@pytest.fixture
def language_model(tmp_path, tiny_teacher):
    """A Llama and its tokenizer as a folder."""
    tokenizer = tiny_teacher[1]
    torch.manual_seed(0)
    small_llama(tokenizer, layers=1, size=64).save_pretrained(tmp_path / "decoder")
    tokenizer.save_pretrained(tmp_path / "decoder")
    return tmp_path / "decoder"


LORA = ["--use_peft", "true", "--lora_r", 4, "--lora_target_modules", "q_proj", "v_proj"]


@pytest.mark.parametrize("lora", [[], LORA], ids=["full", "lora"])
def test_cpt_and_fit_teacher_save_stock_checkpoints(tables, language_model, lora):
    steps = [*SHORT, "--max_steps", 3, "--learning_rate", 0.01, "--save_strategy", "no", *lora]
    clicks = ["--clicks", tables / "clicks.parquet", "--eval_clicks", tables / "clicks.parquet"]
    run("cpt", "--model", language_model, *clicks, "--out", tables / "cpt", *steps)
    losses = json.loads((tables / "cpt" / "cpt.json").read_text())
    assert losses["loss_after"] < losses["loss_before"]
    assert losses["perplexity_after"] == pytest.approx(np.exp(losses["loss_after"]))
    for part in ("title", "summary"):
        assert losses[f"{part}_perplexity_after"] < losses[f"{part}_perplexity_before"]
    assert set(json.loads((tables / "cpt" / "run.json").read_text())["data"]) == {"clicks", "eval_clicks"}

    judgments = ["--judgments", tables / "judgments.parquet"]
    run("fit_teacher", "--model", tables / "cpt", *judgments, "--out", tables / "teacher", *steps)
    assert "eval_pnr" in json.loads((tables / "teacher" / "eval.json").read_text())
    assert not (tables / "teacher" / "adapter_config.json").exists()
    ranker = Ranker.from_pretrained(tables / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(tables / "teacher")
    stock = LlamaForSequenceClassification.from_pretrained(tables / "teacher").eval()
    texts = ["query: read json document: json load", "query: plot document: os remove file"]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = stock(**inputs).logits.squeeze(-1).numpy()
    scores = ranker.predict([("read json", "json load"), ("plot", "os remove file")])
    np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_a_4_bit_teacher_is_saved_as_a_stock_checkpoint(tables, language_model):
    pytest.importorskip("bitsandbytes")
    # bitsandbytes passes no gradients on a CPU after an evaluation, so there is none.
    steps = [*SHORT, *LORA, "--load_in_4bit", "true", "--max_steps", 3, "--learning_rate", 0.01, "--logging_steps", 1]
    inputs = ["--model", language_model, "--judgments", tables / "judgments.parquet"]
    run("fit_teacher", *inputs, "--out", tables / "teacher", "--eval_strategy", "no", *steps)
    (state,) = (tables / "teacher").glob("checkpoint-*/trainer_state.json")
    logged = json.loads(state.read_text())["log_history"]
    assert logged[-1]["grad_norm"] > 0
    stock, info = LlamaForSequenceClassification.from_pretrained(tables / "teacher", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and stock.dtype == torch.float32


def test_a_decoder_from_gguf_is_trained_and_saved_as_an_ordinary_checkpoint(tables, tmp_path):
    pytest.importorskip("gguf")
    expected = write_gguf(tmp_path / "model.gguf").model.state_dict()
    rows = len(expected["embed_tokens.weight"])
    start = ["--model", tmp_path, "--gguf_file", "model.gguf", "--max_steps", 1, "--learning_rate", 0, *SHORT]
    judgments = ["--judgments", tables / "judgments.parquet"]
    run("cpt", *start, "--clicks", tables / "clicks.parquet", "--out", tables / "cpt")
    run("fit_teacher", *start, *judgments, "--out", tables / "teacher")
    label = [*judgments, "--head", "label_expectation", "--label_words", "0", "1", "2"]
    run("fit_teacher", *start, *label, "--out", tables / "label")
    for out, stock in (
        ("cpt", LlamaForCausalLM),
        ("teacher", LlamaForSequenceClassification),
        ("label", LlamaForCausalLM),
    ):
        saved, info = stock.from_pretrained(tables / out, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and saved.dtype == torch.float32
        assert not hasattr(saved.config, "quantization_config")
        for name, weight in saved.model.state_dict().items():
            torch.testing.assert_close(weight[:rows] if "embed" in name else weight, expected[name])
        assert AutoTokenizer.from_pretrained(tables / out).tokenize(" read") == ["Ġr", "ea", "d"]
    run("fit_teacher", "--model", tables / "cpt", *judgments, "--out", tables / "next", "--max_steps", 1, *SHORT)


def test_a_gguf_file_that_cannot_start_a_stage_is_refused_before_the_tables_are_read(tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "encoder.gguf", "bert")
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    write_gguf(tmp_path / "decoder.gguf")
    inputs = {"cpt": ["--clicks", "none.parquet"], "fit_teacher": ["--judgments", "none.parquet"]}
    for stage, tables in inputs.items():
        start = [stage, "--model", tmp_path, "--out", tmp_path / "out", *tables, "--gguf_file"]
        with pytest.raises(ValueError, match="encoder.gguf of .* cannot be read: .*bert is not supported"):
            run(*start, "encoder.gguf")
        with pytest.raises(OSError, match="does not appear to have a file named missing.gguf"):
            run(*start, "missing.gguf")
        with monkeypatch.context() as patch:
            patch.setattr("importlib.util.find_spec", lambda name, package=None: None)
            with pytest.raises(ValueError, match="decoder.gguf needs the package gguf: pip install"):
                run(*start, "decoder.gguf")


def test_a_tokenizer_that_pads_with_its_end_token_gets_a_pad_token(tables, tiny_teacher):
    backend = tiny_teacher[1].backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Qwen3(Qwen3Config(vocab_size=len(tokenizer), num_key_value_heads=1, head_dim=16, **shape))
    model.save_pretrained(tables / "qwen")
    tokenizer.save_pretrained(tables / "qwen")
    judgments = ["--judgments", tables / "judgments.parquet", "--out", tables / "teacher"]
    run("fit_teacher", "--model", tables / "qwen", *judgments, *SHORT, "--max_steps", 2)
    config = json.loads((tables / "teacher" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForSequenceClassification"]
    saved = AutoTokenizer.from_pretrained(tables / "teacher")
    assert saved.pad_token_id == config["pad_token_id"] != saved.eos_token_id
    assert saved("read a json file")["input_ids"][-1] == saved.eos_token_id
    assert config["vocab_size"] == len(saved)
    assert isinstance(LLMForLastTokenRanking.from_pretrained(tables / "teacher"), LLMForLastTokenRanking)


def test_a_teacher_learns_by_label_expectation_in_bf16_with_lora_and_recomputed_activations(tables, language_model):
    steps = [*SHORT, "--max_steps", 3, "--learning_rate", 0.01, "--save_strategy", "no", *LORA]
    large = ["--bf16", "true", "--gradient_checkpointing", "true"]
    head = ["--head", "label_expectation", "--label_words", "close", "read", "write"]
    inputs = ["--model", language_model, "--judgments", tables / "judgments.parquet"]
    run("fit_teacher", *inputs, "--out", tables / "teacher", *steps, *large, *head)
    config = json.loads((tables / "teacher" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["disranker"]["head"] == "label_expectation" and config["disranker"]["ending"] == " relevance:"
    scores = Ranker.from_pretrained(tables / "teacher").predict([("read json", "json load"), ("plot", "remove file")])
    assert ((scores > 0) & (scores < 2)).all() and scores[0] != scores[1]


def test_cpt_refuses_an_encoder(tables, student_dir):
    with pytest.raises(ValueError, match="is a bert: cpt trains a decoder"):
        run("cpt", "--model", student_dir, "--clicks", tables / "clicks.parquet", "--out", tables / "cpt", *SHORT)


def test_a_finished_cpt_stays_as_it_is(tables, language_model):
    steps = [*SHORT, "--max_steps", 1, "--save_strategy", "steps", "--save_steps", 1]
    for _ in range(2):
        run("cpt", "--model", language_model, "--clicks", tables / "clicks.parquet", "--out", tables / "cpt", *steps)
        assert [path.name for path in (tables / "cpt").glob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.parametrize("patience", [[], ["--early_stopping_patience", 1]])
def test_a_finished_run_with_its_best_model_stays_as_it_is(tables, student_dir, patience, caplog):
    inputs = ["--model", student_dir, "--judgments", tables / "judgments.parquet", "--out", tables / "best", *SHORT]
    inputs += ["--save_strategy", "steps", "--save_steps", 1, "--eval_strategy", "steps", "--eval_steps", 1]
    # A rate too small to change a score: the first step stays the best.
    inputs += ["--load_best_model_at_end", "true", "--learning_rate", 1e-12, "--metric_for_best_model", "ndcg@10"]
    kept = []
    for _ in range(2):
        caplog.clear()
        run("fit_teacher", *inputs, *patience, "--max_steps", 4)
        kept.append(sorted(path.name for path in (tables / "best").glob("checkpoint-*")))
    assert kept == [["checkpoint-1", "checkpoint-2" if patience else "checkpoint-4"]] * 2
    assert "was finished already: nothing was trained" in caplog.text


def losses(checkpoint):
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def test_distill_resumes_and_keeps_the_chosen_layers(tables, student_dir, teacher_dir, judgments, capsys):
    pairs = ["--pairs", tables / "candidates.parquet", "--corpus", tables / "corpus.parquet"]
    run("score", "--model", teacher_dir, *pairs, "--out", tables / "scores", "--shard_rows", 20)
    assert f"Scored {len(judgments)} of {len(judgments)} pairs" in capsys.readouterr().out
    run("score", "--model", teacher_dir, *pairs, "--out", tables / "scores", "--shard_rows", 20)
    assert "Nothing left to score for this job" in capsys.readouterr().out
    inputs = ["--model", student_dir, "--student_layers", "1", "--scores", tables / "scores"]
    inputs += ["--judgments", tables / "judgments.parquet", "--out", tables / "student", *SHORT]
    inputs += ["--save_strategy", "steps", "--save_steps", 1, "--logging_steps", 1]
    run("distill", *inputs, "--max_steps", 2)
    first = losses(tables / "student" / "checkpoint-2")
    for _ in range(2):  # a finished run stays as it is
        run("distill", *inputs, "--max_steps", 3)
        whole = losses(tables / "student" / "checkpoint-3")
        assert len(first) == 2 and len(whole) == 3 and whole[:2] == first  # resumed
        assert not (tables / "student" / "checkpoint-4").exists()
    config = json.loads((tables / "student" / "config.json").read_text())
    assert config["num_hidden_layers"] == 1
    assert config["disranker"]["teacher"] == {"id": teacher_dir, "revision": None}

    out = tables / "eval.json"
    measured = run(
        "evaluate", "--model", tables / "student", "--judgments", tables / "judgments.parquet", "--out", out
    )
    assert json.loads(out.read_text())["ndcg@10"] == measured.measures["ndcg@10"]
    dev = judgments[judgments["split"] == "dev"]
    assert np.isfinite(Ranker.from_pretrained(tables / "student").predict(pair_texts(dev))).all()


def test_distill_refuses_a_table_without_teacher_scores(tables, student_dir):
    with pytest.raises(ValueError, match=r"judgments\.parquet has no column teacher_score; `disranker score` writes"):
        run("distill", "--model", student_dir, "--scores", tables / "judgments.parquet", "--out", tables / "x", *SHORT)


def test_score_counts_the_pairs_in_quarantine(tables, teacher_dir, judgments, capsys):
    rows = judgments[:3].assign(title=["a", " ", "b"], summary=["", "", "c " * 300_000]).drop(columns="label")
    rows.to_parquet(tables / "odd.parquet")
    run("score", "--model", teacher_dir, "--pairs", tables / "odd.parquet", "--out", tables / "odd", "--shard_rows", 2)
    assert "Scored 3 of 3 pairs" in (printed := capsys.readouterr().out)
    assert f"2 pairs have no score, see disranker score --status {tables / 'odd'}." in printed


def test_distill_streams_samples_and_averages_teachers(tables, student_dir, judgments):
    scored = judgments.assign(teacher_score=np.arange(len(judgments), dtype=np.float32))
    scored.to_parquet(tables / "one.parquet")
    scored.assign(teacher_score=-scored["teacher_score"]).to_parquet(tables / "two.parquet")
    common = ["--model", student_dir, *SHORT, "--max_steps", 2, "--save_strategy", "no", "--eval_strategy", "no"]
    sampled = ["--document_sampling", "stratified", "--documents_per_query", 3, "--score_transform", "affine"]
    one = ["--scores", tables / "one.parquet", "--out", tables / "student"]
    run("distill", *common, *one, *sampled, "--streaming", "true", "--token_budget", 200)
    record = json.loads((tables / "student" / "run.json").read_text())
    assert record["options"]["ScriptArguments"]["document_sampling"] == "stratified"
    assert record["options"]["DistillationConfig"]["token_budget"] == 200
    assert set(record["data"]) == {"scores_0"} and len(record["data"]["scores_0"]["fingerprint"]) == 64
    transform = json.loads((tables / "student" / "config.json").read_text())["disranker"]["score_transform"]
    assert transform["kind"] == "affine" and transform["scale"] > 1
    with pytest.raises(ValueError, match="no order to learn"):  # the two teachers cancel
        run("distill", *common, *one, "--more_scores", tables / "two.parquet")


def test_distill_learns_from_labelled_queries_too(tables, student_dir, judgments, caplog):
    caplog.set_level("INFO", logger="hf_disranker")
    train = judgments[judgments["split"] == "train"]
    scored = train.drop(columns="label").assign(teacher_score=np.arange(len(train), dtype=np.float32))
    scored.to_parquet(tables / "scores.parquet")
    inputs = ["--model", student_dir, "--scores", tables / "scores.parquet", "--out", tables / "student", *SHORT]
    inputs += ["--labels", tables / "judgments.parquet", "--max_steps", 2]
    inputs += ["--save_strategy", "steps", "--save_steps", 2]
    with pytest.raises(ValueError, match="--labels needs the weight of a loss on labels, such as --hinge_weight 1"):
        run("distill", *inputs)
    with pytest.raises(ValueError, match="--labels needs the scores in memory"):
        run("distill", *inputs, "--hinge_weight", 1, "--streaming", "true")

    batch = ["--per_device_train_batch_size", 2 * train["query_id"].nunique(), "--logging_steps", 1]
    run("distill", *inputs, "--hinge_weight", 1, *batch)
    history = json.loads((tables / "student" / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert history[0]["margin_mse"] > 0 and history[0]["hinge"] > 0 and history[0]["epoch"] == 1  # all queries twice
    assert "have no pair of different teacher_scores" not in caplog.text and "also trained on" not in caplog.text
    assert set(json.loads((tables / "student" / "run.json").read_text())["data"]) == {"labels", "scores_0"}


def test_labelled_queries_to_evaluate_on_are_reported(tables, student_dir, judgments, caplog):
    dev = judgments[judgments["split"] == "dev"].drop(columns="label")
    dev.assign(teacher_score=np.arange(len(dev), dtype=np.float32)).to_parquet(tables / "scores.parquet")
    inputs = ["--model", student_dir, "--scores", tables / "scores.parquet", "--labels", tables / "judgments.parquet"]
    inputs += ["--judgments", tables / "judgments.parquet", "--eval_split", "train", "--hinge_weight", 1, *SHORT]
    run("distill", *inputs, "--out", tables / "student", "--max_steps", 1)
    assert "8 of 8 evaluation queries are also trained on" in caplog.text


def test_judgments_without_splits_need_no_split_option(tables, student_dir, judgments, caplog, monkeypatch):
    read = []  # queries of each table, in the order of reading
    for recipe in ("fit_teacher", "distill"):
        module = importlib.import_module(f"hf_disranker.recipes.{recipe}")
        load = module.load_groups
        monkeypatch.setattr(module, "load_groups", lambda *a, load=load, **k: read.append(load(*a, **k)) or read[-1])
    judgments.drop(columns="split").to_parquet(tables / "whole.parquet")
    steps = [*SHORT, "--max_steps", 1, "--save_strategy", "no"]
    start = ["--model", student_dir, "--judgments", tables / "whole.parquet", *steps]
    run("fit_teacher", *start, "--out", tables / "alone")
    assert "whole.parquet has no splits: training on all rows, without evaluation." in caplog.text
    assert not (tables / "alone" / "eval.json").exists()
    run("fit_teacher", *start, "--eval_judgments", tables / "judgments.parquet", "--out", tables / "other")
    judgments.assign(teacher_score=np.arange(len(judgments), dtype=np.float32)).to_parquet(tables / "scores.parquet")
    inputs = ["--model", student_dir, "--scores", tables / "scores.parquet"]
    run("distill", *inputs, "--judgments", tables / "whole.parquet", *steps, "--out", tables / "student")
    queries, dev = (rows["query_id"].nunique() for rows in (judgments, judgments[judgments["split"] == "dev"]))
    assert list(map(len, read)) == [queries, queries, dev, queries, queries]


def test_distill_refuses_an_unfinished_store(tables, student_dir, teacher_dir):
    pairs = ["--pairs", tables / "candidates.parquet", "--corpus", tables / "corpus.parquet"]
    run("score", "--model", teacher_dir, *pairs, "--out", tables / "scores", "--shard_rows", 20)
    (tables / "scores" / "part-000001.parquet").unlink()
    with pytest.raises(ValueError, match="still lacks the scores of 20 pairs"):
        run("distill", "--model", student_dir, "--scores", tables / "scores", "--out", tables / "student")


def test_a_student_without_a_teacher_keeps_the_chosen_layers(tables, student_dir, language_model, caplog):
    caplog.set_level("INFO", logger="hf_disranker")
    rest = ["--judgments", tables / "judgments.parquet", "--out", tables / "student", "--student_layers", "1"]
    rest += [*SHORT, "--max_steps", 1, "--save_strategy", "no"]
    with pytest.raises(ValueError, match="--student_layers is for an encoder; .*decoder is a llama"):
        run("fit_teacher", "--model", language_model, *rest)
    run("fit_teacher", "--model", student_dir, *rest)
    assert json.loads((tables / "student" / "config.json").read_text())["num_hidden_layers"] == 1
    assert f"Model saved to {tables / 'student'}. Next: disranker evaluate --model" in caplog.text
    assert "fitted to graded judgments, without a teacher" in (tables / "student" / "README.md").read_text()


def test_a_decoder_learns_scores_and_then_labels_from_a_text_with_the_document_first(
    tables, language_model, student_dir, judgments
):
    judgments.assign(teacher_score=np.arange(len(judgments), dtype=np.float32)).to_parquet(tables / "scores.parquet")
    scores, graded = ["--scores", tables / "scores.parquet"], ["--judgments", tables / "judgments.parquet"]
    text, rest = ["--text_template", "{document}\nquery: {query}"], [*SHORT, "--max_steps", 1, "--save_strategy", "no"]
    for stage, data in (("distill", scores), ("fit_teacher", graded)):
        with pytest.raises(ValueError, match="A text template is for a decoder; a bert reads a query and a document"):
            run(stage, "--model", student_dir, *data, *text, "--out", tables / "refused", *rest)
    with pytest.raises(ValueError, match="the query has to come first"):
        run(
            "cpt",
            "--model",
            language_model,
            "--clicks",
            tables / "clicks.parquet",
            *text,
            "--out",
            tables / "cpt",
            *rest,
        )

    run("distill", "--model", language_model, *scores, *text, "--out", tables / "first", *rest)
    run("fit_teacher", "--model", tables / "first", *graded, "--out", tables / "second", *rest)
    changed = ["--text_template", "{document} Q {query}", "--out", tables / "third"]
    run("fit_teacher", "--model", tables / "first", *graded, *changed, *rest)
    assert Ranker.from_pretrained(tables / "third").templates.text == "{document} Q {query}"
    ranker = Ranker.from_pretrained(tables / "second")
    assert ranker.templates.text == "{document}\nquery: {query}" and ranker.model.role == "teacher"
    ids = ranker.tokenizer("open a file\nquery: read", return_tensors="pt")
    with torch.no_grad():
        expected = ranker.model(**ids).scores
    np.testing.assert_allclose(ranker.predict([("read", "open a file")]), expected, atol=1e-5)
