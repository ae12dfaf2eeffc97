"""Training jobs that run alike on one process and on two: `run_jobs` starts two, which call `main`.

Each job trains a student without dropout, or with, and gives a tensor: a gradient or the final weights.
"""

import os
import socket

import numpy as np
import pandas as pd
import processes
import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback

from hf_disranker import (
    BertDistilledRanker,
    ClickTrainer,
    CptConfig,
    DistillationConfig,
    DistillationTrainer,
    RankingConfig,
    RankingTrainer,
    click_dataset,
)
from hf_disranker.recipes.quickstart.from_scratch import small_llama

KINDS = {"labels": (RankingTrainer, RankingConfig), "scores": (DistillationTrainer, DistillationConfig)}
WEIGHTS = {
    "labels": {"hinge_weight": 1.0, "ranknet_weight": 0.7, "softmax_weight": 0.3},
    "scores": {"point_weight": 0.5, "margin_weight": 0.5, "kl_weight": 0.2, "hinge_weight": 0.1},
}
WORDS = ["read", "write", "json", "file", "python", "list", "dict", "sort", "plot", "open", "close", "string"]


def random_row(rng, query, size, labels=None):
    """A query with `size` documents and teacher scores; labels 0 to 2 are drawn unless given."""

    def text(words):
        return " ".join(rng.choice(WORDS, words))

    return {
        "query_id": str(query),
        "query": text(3),
        "doc_ids": [f"{query}-{i}" for i in range(size)],
        "titles": [text(2) for _ in range(size)],
        "summaries": [text(int(rng.integers(0, 12))) for _ in range(size)],
        "labels": rng.integers(0, 3, size).tolist() if labels is None else labels,
        "teacher_scores": (3 * rng.normal(size=size) + 5).tolist(),
    }


def ragged_groups(count, largest=30, seed=0):
    """Queries with 1 to `largest` documents, labels 0 to 2 and teacher scores."""
    rng = np.random.default_rng(seed)
    rows = []
    for query in range(count):
        size = int(rng.integers(1, largest + 1)) if query > 1 else [1, largest][query]
        rows.append(random_row(rng, query, size))
    return Dataset.from_list(rows)


def make_trainer(kind, model_dir, out, groups, **options):
    torch.manual_seed(0)
    dropout, eval_dataset = options.pop("dropout", 0.1), options.pop("eval_dataset", None)
    model = BertDistilledRanker.from_pretrained(
        model_dir, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout
    )
    trainer_class, config_class = KINDS[kind]
    settings = {"report_to": "none", "max_length": 48, "max_query_length": 16, "seed": 1, "disable_tqdm": True}
    settings |= {"eval_strategy": "no", "save_strategy": "no", "use_cpu": True, "warmup_steps": 0} | WEIGHTS[kind]
    return trainer_class(
        model=model,
        args=config_class(str(out), **settings | options),
        train_dataset=groups,
        eval_dataset=eval_dataset,
        processing_class=AutoTokenizer.from_pretrained(model_dir),
    )


class GradientTaker(TrainerCallback):
    gradient = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradient = torch.cat([weight.grad.flatten().clone() for weight in model.parameters()])


def gradient(kind, model_dir, out, **options):
    """The gradient of one optimizer step on the same sixteen queries, without dropout."""
    taker = GradientTaker()
    options = {"train_sampling_strategy": "sequential", "max_grad_norm": 0.0} | options
    trainer = make_trainer(kind, model_dir, out, ragged_groups(16), max_steps=1, dropout=0.0, **options)
    trainer.add_callback(taker)
    trainer.train()
    return taker.gradient


def weights(model_dir, out, groups, resume=None, **options):
    """The final weights of seven steps with dropout, from a checkpoint on or from the beginning."""
    options = {"max_steps": 7, "save_strategy": "steps", "save_steps": 5, "save_total_limit": None} | options
    trainer = make_trainer("scores", model_dir, out, groups, learning_rate=1e-3, **options)
    trainer.train(resume_from_checkpoint=resume)
    return torch.cat(
        [weight.detach().flatten() for weight in trainer.accelerator.unwrap_model(trainer.model).parameters()]
    )


def whole_and_resumed(model_dir, out, groups, **options):
    """Weights of the uninterrupted run and of one that goes on from step 5, in the middle of the second epoch."""
    whole = weights(model_dir, out / "whole", groups, **options)
    return whole, weights(model_dir, out / "resumed", groups, str(out / "whole" / "checkpoint-5"), **options)


def evaluation_losses(model_dir, out):
    """The evaluation losses of five queries, and of five rows of clicks, which two processes do not share evenly."""
    losses = []
    for kind in KINDS:
        trainer = make_trainer(
            kind, model_dir, out, None, eval_dataset=ragged_groups(5, 7), per_device_eval_batch_size=2
        )
        losses.append(trainer.evaluate()["eval_loss"])
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.eos_token, tokenizer.pad_token = "[SEP]", "[PAD]"
    torch.manual_seed(0)
    model = small_llama(tokenizer, layers=1, size=32, initializer_range=0.5)
    clicks = pd.DataFrame({"query": WORDS[:5], "title": [" ".join(WORDS[: 2 * n]) for n in range(5)], "summary": ""})
    rows = click_dataset(clicks, tokenizer, max_length=48)
    args = CptConfig(str(out), max_length=48, per_device_eval_batch_size=2, use_cpu=True, disable_tqdm=True)
    losses.append(ClickTrainer(model, args, rows, rows, tokenizer).evaluate()["eval_loss"])
    return losses


def run_jobs(model_dir, out):
    """All jobs on two processes; gives what the first of them found."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    children = [
        processes.start(main, model_dir, out, world | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    for child in children:
        child.join(300)
        child.kill()
    assert [child.exitcode for child in children] == [0, 0]
    return torch.load(out / "found.pt")


def main(model_dir, out, environment):
    """Run all jobs as one of the processes; the first of them stores what they found."""
    os.environ |= environment
    torch.set_num_threads(1)
    found = {kind: gradient(kind, model_dir, out, per_device_train_batch_size=8) for kind in KINDS}
    for name, groups in {"memory": ragged_groups(16, 7), "stream": ragged_groups(16, 7).to_iterable_dataset()}.items():
        found[name] = whole_and_resumed(model_dir, out / name, groups, per_device_train_batch_size=3)
    found["token batches"] = whole_and_resumed(model_dir, out / "tokens", ragged_groups(16, 7), token_budget=256)
    found["budget"] = gradient("scores", model_dir, out, token_budget=2000, gradient_accumulation_steps=99)
    found["losses"] = evaluation_losses(model_dir, out)
    if os.environ["RANK"] == "0":
        torch.save(found, out / "found.pt")
    torch.distributed.destroy_process_group()
