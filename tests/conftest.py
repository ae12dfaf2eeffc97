"""Tiny rankers and tables that many tests use, built in a second without a network.

tiny_student, tiny_teacher      (model, tokenizer), built once with fixed seeds; not to be changed
student_dir, teacher_dir        the same as folders; load from here what you want to train or change
student_ranker, teacher_ranker  the same as a fresh `Ranker`
judgments                       12 queries of 3 to 7 documents, labels 0 to 2, split train (8 queries) or dev (4)
corpus                          the documents of `judgments`: doc_id, title, summary
candidates                      the pairs of `judgments` without texts: query_id, query, doc_id, rank
clicks                          the pairs of label 2: query, title, summary, weight
hub                             the Hub of this run, a server on loopback: see hub_server.py
"""

# ruff: noqa: E402
import atexit
import os
import tempfile

from hub_server import HubServer

# Before anything of Hugging Face is imported, which reads these once: no test reaches the Hub of the world.
HUB = HubServer().__enter__()
HF_HOME = tempfile.TemporaryDirectory(prefix="hf_home_")
atexit.register(HF_HOME.cleanup)
os.environ |= {"HF_ENDPOINT": HUB.url, "HF_TOKEN": HUB.token, "HF_HOME": HF_HOME.name, "HF_HUB_DISABLE_XET": "1"}
os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # on tiny models threads wait for one another, on a busy machine for minutes

import numpy as np
import pandas as pd
import pytest
import torch

from hf_disranker.models.ranker import Ranker
from hf_disranker.models.teacher import LLMForLastTokenRanking
from hf_disranker.recipes.quickstart.from_scratch import small_bert, small_llama, train_bpe, train_wordpiece

MAX_LENGTH = 64
WORDS = ["read", "write", "json", "file", "python", "list", "dict", "sort", "plot", "histogram", "open", "close"]
WORDS += ["string", "number", "array", "table", "query", "document", "random", "matrix", "path", "text", "date"]


def _judgments():
    """Documents that share as many words with their query as their label says."""
    rng = np.random.default_rng(7)
    rows = []
    for number in range(12):
        words = rng.choice(WORDS, 2, replace=False)
        others = [word for word in WORDS if word not in words]
        for place in range(3 + number % 5):
            label = [2, 0, 1, 0, 0, 1, 0][place]
            text = [*words[:label], *rng.choice(others, 4 + place)]
            rows.append(
                {
                    "query_id": f"q{number}",
                    "query": " ".join(words),
                    "doc_id": f"d{number}-{place}",
                    "title": " ".join(text[:2]),
                    "summary": " ".join(text[2:]),
                    "label": label,
                    "split": "train" if number < 8 else "dev",
                }
            )
    return pd.DataFrame(rows)


@pytest.fixture(scope="session")
def hub():
    return HUB


@pytest.fixture
def judgments():
    return _judgments()


@pytest.fixture
def corpus(judgments):
    return judgments[["doc_id", "title", "summary"]]


@pytest.fixture
def candidates(judgments):
    rank = judgments.groupby("query_id").cumcount() + 1
    return judgments[["query_id", "query", "doc_id"]].assign(rank=rank)


@pytest.fixture
def clicks(judgments):
    clicked = judgments[judgments["label"] == 2].reset_index(drop=True)
    return clicked[["query", "title", "summary"]].assign(weight=1.0 + clicked.index % 3)


def _texts():
    rows = _judgments()
    return rows["query"] + " " + rows["title"] + " " + rows["summary"]


@pytest.fixture(scope="session")
def tiny_student():
    tokenizer = train_wordpiece(_texts(), vocab_size=300, max_length=MAX_LENGTH)
    torch.manual_seed(0)
    model = small_bert(tokenizer, layers=2, size=32, initializer_range=0.1)
    model.classifier.weight.data.mul_(10)  # random weights score everything nearly alike
    return model.eval(), tokenizer


@pytest.fixture(scope="session")
def tiny_teacher():
    tokenizer = train_bpe(_texts(), vocab_size=400, max_length=MAX_LENGTH)
    torch.manual_seed(0)
    model = LLMForLastTokenRanking.from_config(small_llama(tokenizer, layers=2, size=32, initializer_range=0.1).config)
    return model.eval(), tokenizer


@pytest.fixture(scope="session")
def student_dir(tiny_student, tmp_path_factory):
    return _saved(tiny_student, tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="session")
def teacher_dir(tiny_teacher, tmp_path_factory):
    return _saved(tiny_teacher, tmp_path_factory.mktemp("teacher"))


def _saved(ranker, folder):
    for part in ranker:
        part.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def student_ranker(tiny_student):
    return Ranker(*tiny_student)


@pytest.fixture
def teacher_ranker(tiny_teacher):
    return Ranker(*tiny_teacher)
