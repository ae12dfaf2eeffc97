"""Heads of one language model at equal data: likelihood without training, last token, label expectation.

    python benchmarks/heads.py run --showcase runs/showcase --model runs/models/smollm2 --out runs/heads
    python benchmarks/heads.py show --out runs/heads

A head learns from the model's own likelihoods, which the showcase stores, from clicks and labels, or from both. All
cells of benchmarks/configs/heads.yaml have equal steps and numbers of queries. `run` skips finished cells: files
NAME.json. All rankers are evaluated on the same sample of development queries.
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from datasets import concatenate_datasets
from quality import sample_queries
from transformers import AutoConfig, AutoTokenizer, set_seed

from hf_disranker import DistillationConfig, DistillationTrainer, LLMForLastTokenRanking, Ranker, load_groups
from hf_disranker.data.bm25 import bm25_scores
from hf_disranker.data.tables import pair_texts, read_table
from hf_disranker.evaluation.significance import bootstrap, compare
from hf_disranker.models.loading import load_ranker_model, with_text_template
from hf_disranker.models.teacher import expect_labels
from hf_disranker.recipes.rankings import Evaluation
from hf_disranker.training.ranking_trainer import RankingConfig, RankingTrainer

CONFIG = Path(__file__).parent / "configs" / "heads.yaml"
REFERENCE = "likelihood, not trained"


def optimizer(model: LLMForLastTokenRanking, body: float, head: float) -> torch.optim.Optimizer:
    """Return AdamW with a learning rate for the new head apart from that of the body."""
    heads = [weight for name, weight in model.named_parameters() if name.startswith("score.")]
    others = [weight for name, weight in model.named_parameters() if not name.startswith("score.")]
    groups: list[dict[str, Any]] = [{"params": others, "lr": body}, {"params": heads, "lr": head}]
    return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)


def train(cell: dict[str, Any], config: dict[str, Any], args: argparse.Namespace, folder: Path) -> None:
    """Train the model with a head and save it."""
    set_seed(args.seed)
    data = args.showcase / "data"
    sources = {
        "likelihoods": lambda: load_groups(args.showcase / "scores", corpus=data / "corpus.parquet"),
        "clicks and labels": lambda: load_groups(data / "clicks_and_labels.parquet"),
    }
    number = config["steps"] * config["queries_per_step"] // len(cell["data"])
    parts = [sources[name]().shuffle(seed=args.seed).select(range(number)) for name in cell["data"]]
    rows = concatenate_datasets(parts)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model_config = with_text_template(AutoConfig.from_pretrained(args.model), cell["text"])
    if cell["head"] == "label_expectation":
        model_config = expect_labels(model_config, tokenizer, list("01234"))
    model, tokenizer = load_ranker_model(
        args.model, config=model_config, tokenizer=tokenizer, new_head=True, dtype=torch.float32
    )
    distils = "likelihoods" in cell["data"]
    kinds = (DistillationTrainer, DistillationConfig) if distils else (RankingTrainer, RankingConfig)
    options = {name: config[name] for name in ("max_length", "max_query_length", "learning_rate")}
    options |= {"max_steps": config["steps"], "per_device_train_batch_size": config["queries_per_step"] // 2}
    options |= {"gradient_accumulation_steps": 2}
    options |= {"bf16": args.dtype == "bfloat16", "use_cpu": not torch.cuda.is_available()}
    options |= {"report_to": "none", "save_strategy": "no", "eval_strategy": "no", "logging_steps": 10}
    options |= {"warmup_steps": 0.1, "seed": args.seed, "disable_tqdm": True} | cell.get("options", {})
    trainer = kinds[0](
        model=model,
        args=kinds[1](str(folder / "work"), **options),
        train_dataset=rows,
        processing_class=tokenizer,
        optimizers=(optimizer(model, config["learning_rate"], config["head_learning_rate"]), None),
    )
    trainer.train()
    trainer.save_model(str(folder))


def run(args: argparse.Namespace) -> None:
    """Evaluate BM25 and the likelihoods, then train and evaluate all unfinished cells."""
    config = yaml.safe_load(args.config.read_text())
    data = args.showcase / "data"
    judged, corpus = read_table(data / "judgments.parquet", "judgments", split="dev"), data / "corpus.parquet"
    known = read_table(args.showcase / "dev_scores", "scores", texts=False)[["query_id", "doc_id", "teacher_score"]]
    dev = sample_queries(judged.merge(known, on=["query_id", "doc_id"]), config["dev_queries"])
    save("bm25", dev, bm25_scores(dev, read_table(corpus, "corpus", split="dev")), args.out, {})
    save(REFERENCE, dev, dev["teacher_score"].to_numpy(), args.out, {})
    for name, cell in config["cells"].items():
        folder = args.out / name.replace(" ", "_").replace(",", "")
        if (args.out / f"{name}.json").exists() or (args.only and name not in args.only):
            continue
        begin = time.process_time()
        train(cell, config, args, folder)
        seconds = time.process_time() - begin
        scores = Ranker.from_pretrained(folder, dtype=args.dtype).predict(pair_texts(dev))
        save(name, dev, scores, args.out, {"cpu_seconds": seconds, "seed": args.seed})
        shutil.rmtree(folder)
        print(f"{name}: {seconds:.0f} CPU seconds", flush=True)


def save(name: str, dev: pd.DataFrame, scores: np.ndarray, out: Path, about: dict[str, Any]) -> None:
    """Evaluate scores on the development pairs and save the measures by query."""
    out.mkdir(parents=True, exist_ok=True)
    Evaluation.of(name, dev.drop(columns="teacher_score").assign(score=scores), **about).save(out / f"{name}.json")


def show(args: argparse.Namespace) -> None:
    """Print the table, with paired tests against the likelihoods, Holm-corrected."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(args.out.glob("*.json"))}
    values = {name: pd.read_parquet(args.out / f"{name}.json.parquet")["ndcg@10"].to_numpy() for name in found}
    tests = {one.first: one for one in compare(values, [(name, REFERENCE) for name in found if name != REFERENCE])}
    print(f"| ranker | NDCG@10 | less {REFERENCE} | p, Holm | PNR | CPU s of training |\n|" + "---|" * 6)
    for name, one in sorted(found.items(), key=lambda item: item[1]["ndcg@10"]):
        low, high = bootstrap(values[name])
        test, seconds = tests.get(name), one["about"].get("cpu_seconds")
        difference = f"{test.difference:+.3f} [{test.interval[0]:+.3f}, {test.interval[1]:+.3f}]" if test else ""
        cells = [name, f"{one['ndcg@10']:.3f} [{low:.3f}, {high:.3f}]", difference]
        pnr = np.inf if one["pnr"] is None else one["pnr"]
        cells += [f"{test.p_holm:.4f}" if test else "", f"{pnr:.2f}", f"{seconds:,.0f}" if seconds else ""]
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    """Run the experiments or show their results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "show"])
    parser.add_argument("--showcase", type=Path, default=Path("runs/showcase"), help="folder of `make showcase`")
    parser.add_argument("--model", type=Path, default=Path("runs/models/smollm2"), help="a causal language model")
    parser.add_argument("--out", type=Path, default=Path("runs/heads"))
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32", help="bfloat16 for mixed-precision training and scoring in bf16")
    parser.add_argument("--only", nargs="+", default=[], help="names of the cells to run")
    args = parser.parse_args()
    {"run": run, "show": show}[args.what](args)


if __name__ == "__main__":
    main()
