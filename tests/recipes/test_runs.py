"""Resuming, saving and recording a run."""

import hashlib
import json
import subprocess

import pytest
import torch
from datasets import Dataset
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig

from hf_disranker import DistillationConfig, LLMForLastTokenRanking
from hf_disranker.recipes.outputs import save_json
from hf_disranker.recipes.quickstart.from_scratch import small_llama
from hf_disranker.recipes.runs import (
    fingerprint,
    resume_point,
    save_model,
    save_record,
    warn_shared_queries,
)


def test_resume_point_is_the_newest_checkpoint(tmp_path, caplog):
    assert resume_point(str(tmp_path / "nowhere")) is None
    assert resume_point(str(tmp_path)) is None
    for step in (2, 10, 9):
        save_json({"global_step": step}, str(tmp_path / f"checkpoint-{step}" / "trainer_state.json"))
    assert resume_point(str(tmp_path)) == str(tmp_path / "checkpoint-10")
    assert "Resuming from" in caplog.text


def test_resume_point_skips_an_incomplete_checkpoint(tmp_path, caplog):
    save_json({"global_step": 5}, str(tmp_path / "checkpoint-5" / "trainer_state.json"))
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-15").mkdir()
    (tmp_path / "checkpoint-15" / "trainer_state.json").write_text('{"global_step": 1')
    assert resume_point(str(tmp_path)) == str(tmp_path / "checkpoint-5")
    assert "checkpoint-10 is incomplete" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-5"]


def test_save_json_writes_strict_json_and_leaves_the_old_file_when_the_new_cannot_be_written(tmp_path):
    path = tmp_path / "new" / "result.json"
    save_json({"a": "ä", "b": [float("inf"), float("nan"), 0.5]}, str(path))
    assert "".join(path.read_text(encoding="utf-8").split()) == '{"a":"ä","b":[null,null,0.5]}'
    with pytest.raises(TypeError):
        save_json({"a": object()}, str(path))
    assert json.loads(path.read_text(encoding="utf-8"))["a"] == "ä"


def test_a_record_contains_options_data_versions_and_revision(tmp_path, monkeypatch):
    table = tmp_path / "table.parquet"
    table.write_bytes(b"abc")
    config = DistillationConfig(str(tmp_path), learning_rate=3e-4, hub_token="secret", hinge_weight=0.5)
    save_record(str(tmp_path), (config,), {"scores": str(table), "corpus": None, "folder": str(tmp_path)})
    text = (tmp_path / "run.json").read_text()
    record = json.loads(text)
    options = record["options"]["DistillationConfig"]
    assert (options["learning_rate"], options["hinge_weight"], options["optim"]) == (3e-4, 0.5, config.optim)
    assert "secret" not in text
    # PyPI's wheels of torch omit the build (+cu126) in their metadata.
    assert torch.__version__.startswith(record["packages"]["torch"]) and "transformers" in record["packages"]
    digest = hashlib.sha256(hashlib.sha256(b"abc").digest()).hexdigest()
    assert record["data"]["scores"] == {"source": str(table), "fingerprint": digest}
    assert record["data"]["folder"]["fingerprint"] == digest and "corpus" not in record["data"]
    table.write_bytes(b"abd")
    assert fingerprint(str(table)) != digest
    assert fingerprint("org/data") is None


def test_the_fingerprint_of_a_beir_folder_covers_its_files(tmp_path):
    (tmp_path / "qrels").mkdir()
    digests = set()
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/dev.tsv"):
        (tmp_path / name).write_text(name)
        digests.add(fingerprint(str(tmp_path)))
    assert len(digests) == 3 and None not in digests


def test_the_fingerprint_of_a_hub_data_set_is_its_commit(hub, judgments):
    Dataset.from_pandas(judgments).push_to_hub("tester/fingerprint")
    first = fingerprint("tester/fingerprint")
    assert first == HfApi().dataset_info("tester/fingerprint").sha
    Dataset.from_pandas(judgments[:5]).push_to_hub("tester/fingerprint")
    assert fingerprint("tester/fingerprint") not in (first, None)


def test_a_record_names_the_commit_and_that_it_was_changed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_record(str(tmp_path / "out"), (), {})
    assert json.loads((tmp_path / "out" / "run.json").read_text())["git"] is None
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    save_record(str(tmp_path / "out"), (), {})
    assert json.loads((tmp_path / "out" / "run.json").read_text())["git"] == commit
    save_record(str(tmp_path / "out"), (), {})
    assert json.loads((tmp_path / "out" / "run.json").read_text())["git"] == f"{commit}+"


def test_the_fingerprint_of_a_score_store_ignores_its_quarantine(tmp_path):
    (tmp_path / "part-000000.parquet").write_bytes(b"scores")
    before = fingerprint(str(tmp_path))
    (tmp_path / "quarantine.parquet").mkdir()
    assert fingerprint(str(tmp_path)) == before is not None


def test_weights_of_four_bits_are_widened_before_lora_is_merged(tmp_path, tiny_teacher):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    language_model, tokenizer = small_llama(tiny_teacher[1], layers=1, size=64), tiny_teacher[1]
    language_model.save_pretrained(tmp_path / "base")
    model = LLMForLastTokenRanking.from_pretrained(
        tmp_path / "base", quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map="cpu"
    )
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(model, lora).train()  # eval() makes bitsandbytes round to bf16 on a CPU
    torch.nn.init.normal_(model.base_model.model.score.modules_to_save["default"].weight)
    ids = torch.arange(5, 45).view(4, 10)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    save_model(model, tokenizer, str(tmp_path / "merged"))
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    saved = LLMForLastTokenRanking.from_pretrained(tmp_path / "merged").eval()
    assert expected.std() > 0.1
    with torch.no_grad():
        torch.testing.assert_close(saved(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_shared_queries_are_counted_up_to_case_and_whitespace(caplog):
    warn_shared_queries(["GPS  watch ", "kettle", "kettle"], ["gps watch", "Toaster", "cable", "cable"])
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(
        "1 of 3 evaluation queries are also trained on, up to case and whitespace, first 'gps"
    )
    warn_shared_queries(["kettle"], ["kettles"])
    assert len(caplog.messages) == 1
