"""transformers' own tests of a model class, on our classes and on the stock classes that they extend."""

import importlib
import re
import subprocess
import sys
import tarfile
import types
import unittest
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from transformers import BertForSequenceClassification, LlamaForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from hf_disranker import DistilledRanker, LLMForLastTokenRanking

PACKAGE = "transformers_tests"
# Test suites that the source distribution leaves out, with the class that the one of models extends.
LEFT_OUT = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}
BY_DESIGN = {
    "test_bc_cache_name_forward": "A ranker returns no cache.",
    "test_can_load_ignoring_mismatched_shapes": "A ranker has one label.",
    "test_problem_types": "A ranker has one label.",
    "test_sdpa_can_dispatch_non_composite_models": "A ranker's attention has a name of its own.",
    "test_model_weights_reload_no_missing_tied_weights": "Weights that would start at random are refused.",
}
SIZE = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZE |= {"intermediate_size": 37, "max_position_embeddings": 64, "pad_token_id": 0, "num_labels": 1}


@pytest.fixture(scope="module")
def common(request, tmp_path_factory):
    """The module `test_modeling_common` of the installed transformers, from its source distribution."""
    pytest.importorskip("parameterized")
    folder = tmp_path_factory.mktemp("sdist")
    release = f"transformers=={version('transformers')}"
    options = ["--quiet", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest", str(folder)]
    run = subprocess.run([sys.executable, "-m", "pip", "download", *options, release], capture_output=True, text=True)
    if run.returncode:
        pytest.skip(f"pip cannot download the source of {release}: {run.stderr.splitlines()[-1]}")
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(next(folder.glob("transformers-*/tests")))]
    for mark in re.findall(r"\bmark\.(\w+)", Path(*package.__path__, "test_modeling_common.py").read_text("utf-8")):
        request.config.addinivalue_line("markers", mark)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, PACKAGE, package)
        for name, mixin in LEFT_OUT.items():
            module = types.ModuleType(f"{PACKAGE}.{name}")
            setattr(module, mixin, type(mixin, (), {}))
            patch.setitem(sys.modules, module.__name__, module)
        yield importlib.import_module(f"{PACKAGE}.test_modeling_common")


class ModelTester:
    """What the common tests ask of a model: its size, a config and a batch."""

    batch_size, seq_length, is_training = 3, 7, True
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4

    def __init__(self, config_class):
        self.config_class = config_class

    def get_config(self):
        return self.config_class(**SIZE)

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(1, 99, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def passed(common, model_class, tester):
    """Run the common tests of a model class; return the names of those that pass, and the errors of the others."""

    class CommonTest(common.ModelTesterMixin, unittest.TestCase):
        all_model_classes = (model_class,)

        def setUp(self):
            torch.manual_seed(0)
            self.model_tester = tester

        def _prepare_for_class(self, inputs, kind, return_labels=False):
            inputs = super()._prepare_for_class(inputs, kind)
            return inputs | ({"labels": torch.zeros(tester.batch_size)} if return_labels else {})

    result = unittest.TestResult()
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(CommonTest)
    names = {test._testMethodName for test in suite}
    suite.run(result)
    errors = {}
    for test, error in [*result.failures, *result.errors, *result.skipped]:
        errors[getattr(test, "test_case", test)._testMethodName] = error
    return names - errors.keys(), errors


@pytest.mark.slow
@pytest.mark.parametrize("stock", [BertForSequenceClassification, LlamaForSequenceClassification])
def test_what_passes_on_a_stock_class_passes_on_ours(common, monkeypatch, stock):
    config_class = stock.config_class
    family = DistilledRanker if stock is BertForSequenceClassification else LLMForLastTokenRanking
    ours = type(family.from_config(config_class(**SIZE)))
    # By this table the tests know what a class is for.
    monkeypatch.setitem(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, "ranker", ours.__name__)
    expected, _ = passed(common, stock, ModelTester(config_class))
    found, errors = passed(common, ours, ModelTester(config_class))
    assert len(expected) > 90
    lost = expected - found - BY_DESIGN.keys()
    assert not lost, "\n".join(f"{name}: {errors[name]}" for name in sorted(lost))
