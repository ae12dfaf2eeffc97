"""Quality of students by loss, amount of data, library and depth.

    python benchmarks/quality.py run --quickstart runs/quickstart --out runs/quality --seeds 0 1 2
    python benchmarks/quality.py show --out runs/quality
    python benchmarks/quality.py run --quickstart runs/showcase --base runs/models/minilm --layers 0 2 4
                                     --config benchmarks/configs/quality_minilm.yaml --out runs/quality_minilm

Every student in benchmarks/configs/quality.yaml starts from the quickstart's BERT and is trained on the quickstart's
data: teacher scores of 8,000 unlabelled queries, labels and clicks. `--base` starts from a pretrained BERT instead.
`run` skips finished cells, which are folders with eval.json; run several processes with different seeds to share the
work. `show` prints markdown: means over the available seeds, 95% intervals by query of these means, and paired tests
against the reference, Holm-corrected for all tests in a table.
"""

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from datasets import Dataset
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments, losses
from speed import make_stock
from transformers import AutoTokenizer, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

from hf_disranker import BertDistilledRanker, DistillationConfig, DistillationTrainer, Ranker
from hf_disranker.data.bm25 import bm25_scores
from hf_disranker.data.groups import load_groups
from hf_disranker.data.tables import pair_texts, read_table, write_table
from hf_disranker.evaluation import metrics
from hf_disranker.evaluation.significance import bootstrap, compare, refusal
from hf_disranker.recipes.quickstart import from_scratch
from hf_disranker.recipes.quickstart.stages import bf16_is_faster
from hf_disranker.recipes.rankings import Evaluation, describe
from hf_disranker.training.ranking_trainer import RankingConfig, RankingTrainer
from hf_disranker.training.sentence_transformers import to_n_tuples

CONFIG = Path(__file__).parent / "configs" / "quality.yaml"
TITLES = {
    "a": "Which loss, on the same teacher scores?",
    "c": "How much data?",
    "d": "Against peers, at equal data, model and steps",
    "e": "How deep a student?",
}


def prepare(args: argparse.Namespace, layers: int) -> Path:
    """Create the initial checkpoint of a depth, with the teacher's mean score as the bias of the head."""
    quickstart, folder = args.quickstart, args.out / "start" / str(layers)
    if (folder / "tokenizer.json").exists():
        return folder
    scores = read_table(quickstart / "scores", "scores", texts=False)["teacher_score"]
    base = args.base or quickstart / "base" / "bert"
    tokenizer = AutoTokenizer.from_pretrained(base)
    set_seed(0)
    if args.base:
        student = BertDistilledRanker.from_pretrained(base, dtype=torch.float32)
        student.keep_layers(args.layers or range(student.config.num_hidden_layers))
    elif layers == 2:
        student = BertDistilledRanker.from_pretrained(base)
    else:
        corpus = read_table(quickstart / "data" / "corpus.parquet", "corpus", split="train")
        texts = (corpus["title"] + " " + corpus["summary"]).tolist()
        no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        student = from_scratch.small_bert(tokenizer, layers=layers, size=128, initializer_range=0.06, **no_dropout)
        from_scratch.embed_by_svd(student, tokenizer, texts)
        from_scratch.match_words(student, tokenizer)
    student.start_at(float(scores.mean()))
    student.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def training_rows(cell: dict[str, Any], quickstart: Path, out: Path) -> Dataset:
    """Return the training data of a cell, one row per query."""
    data = cell.get("data")
    if data == "teacher_on_clicks_and_labels":
        path = out / "teacher_on_clicks_and_labels.parquet"
        if not path.exists():
            pairs = pd.read_parquet(quickstart / "data" / "clicks_and_labels.parquet").drop(columns="label")
            scores = Ranker.from_pretrained(quickstart / "teacher").predict(pair_texts(pairs))
            write_table(pairs.assign(teacher_score=scores), str(path))
        return load_groups(path)
    if data:
        return load_groups(quickstart / "data" / f"{data}.parquet")
    rows = load_groups(quickstart / "scores")
    rows = rows.select(range(cell.get("queries", len(rows))))
    return rows.add_column("labels", rows["teacher_scores"]) if cell.get("scores_as_labels") else rows


def train(cell: dict[str, Any], config: dict[str, Any], rows: Dataset, start: Path, folder: Path, seed: int) -> None:
    """Train one student and save it."""
    common = {"output_dir": str(folder / "work"), "max_steps": config["steps"], "seed": seed, "report_to": "none"}
    common |= {"learning_rate": config["learning_rate"], "save_strategy": "no", "logging_steps": 50}
    common |= {"bf16": config["bf16"], "use_cpu": not torch.cuda.is_available(), "warmup_steps": 0.05}
    common["disable_tqdm"] = True
    lengths = {"max_length": config["max_length"], "max_query_length": config["max_query_length"]}
    queries = config["queries_per_step"]
    set_seed(seed)
    if cell["system"] in ("distill", "fit"):
        kinds = {"distill": (DistillationTrainer, DistillationConfig), "fit": (RankingTrainer, RankingConfig)}
        trainer_kind, config_kind = kinds[cell["system"]]
        options = common | lengths | cell.get("options", {}) | {"per_device_train_batch_size": queries}
        tokenizer = AutoTokenizer.from_pretrained(start)
        student = BertDistilledRanker.from_pretrained(start, attn_implementation="eager")
        if options.get("score_transform") == "affine":
            student.start_at(0.0)  # the mean of the targets
        args = config_kind(**options, eval_strategy="no")
        trainer = trainer_kind(model=student, args=args, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        tokenizer = trainer.processing_class
    elif cell["system"] == "sentence-transformers":
        stock = shutil.copytree(start, folder / "work" / "stock", dirs_exist_ok=True)
        make_stock(stock)
        model = CrossEncoder(str(stock), max_length=config["max_length"])
        model.model.config._attn_implementation = "eager"
        data, size = peer_rows(cell["loss"], rows, queries)
        args = CrossEncoderTrainingArguments(**common, per_device_train_batch_size=size)
        loss = getattr(losses, cell["loss"])(model)
        CrossEncoderTrainer(model=model, args=args, train_dataset=data, loss=loss).train()
        student, tokenizer = model.model, model.tokenizer
    else:
        student, tokenizer = plain_regression(common, config, rows, start)
    student.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    if cell["system"] not in ("distill", "fit"):  # the start's marker, so that all are scored alike
        shutil.copy(start / "config.json", folder / "model" / "config.json")


def peer_rows(loss: str, rows: Dataset, queries: int) -> tuple[Dataset, int]:
    """Convert rows for a sentence-transformers loss; also return the batch size with equally many documents."""
    documents = round(np.mean([len(row["doc_ids"]) for row in rows]))
    if loss == "MarginMSELoss":
        return to_n_tuples(rows, documents), queries
    texts = [[f"{a} {b}".strip() for a, b in zip(row["titles"], row["summaries"], strict=True)] for row in rows]
    if loss == "RankNetLoss":
        columns = {"query": rows["query"], "docs": texts, "labels": rows["teacher_scores"]}
        return Dataset.from_dict(columns), queries
    return flat_rows(rows, texts), queries * documents


def flat_rows(rows: Dataset, texts: Sequence[list[str]]) -> Dataset:
    """Return one row per pair: query, document, label."""
    pairs = [
        {"query": row["query"], "document": text, "label": score}
        for row, documents in zip(rows, texts, strict=True)
        for text, score in zip(documents, row["teacher_scores"], strict=True)
    ]
    return Dataset.from_list(pairs)


def plain_regression(common: dict[str, Any], config: dict[str, Any], rows: Dataset, start: Path) -> tuple[Any, Any]:
    """Train a plain transformers regression with the squared error of single pairs."""
    tokenizer = AutoTokenizer.from_pretrained(start)
    model = BertForSequenceClassification.from_pretrained(start, attn_implementation="eager")
    data, size = peer_rows("MSELoss", rows, config["queries_per_step"])
    cut = {"truncation": True, "max_length": config["max_length"]}  # from the longer of the two, as CrossEncoder
    texts = ["query", "document"]
    data = data.map(lambda rows: tokenizer(*(rows[t] for t in texts), **cut), batched=True, remove_columns=texts)
    args = TrainingArguments(**common, per_device_train_batch_size=size)
    Trainer(model=model, args=args, train_dataset=data, processing_class=tokenizer).train()
    return model, tokenizer


def run(args: argparse.Namespace) -> None:
    """Train and evaluate all unfinished cells, seed by seed."""
    config = yaml.safe_load(args.config.read_text())
    config["bf16"] = torch.cuda.is_available() or bf16_is_faster()
    dev = read_table(args.quickstart / "data" / "judgments.parquet", "judgments", split="dev")
    if "dev_queries" in config:
        dev = sample_queries(dev, config["dev_queries"])
    facts = {"judgments": str(args.quickstart / "data" / "judgments.parquet"), "split": "dev"}
    baselines(args, dev, facts)
    teacher = np.load(args.out / "teacher.npy")
    wanted = {name for name, cell in config["cells"].items() if set(cell["question"]) & set(args.questions)}
    wanted &= set(args.only or wanted)
    cells = [(seed, name) for seed in args.seeds for name in config["cells"] if name in wanted]
    for seed, name in cells:
        cell, folder = config["cells"][name], args.out / "cells" / name.replace("/", "_") / str(seed)
        if (folder / "eval.json").exists():
            continue
        start = prepare(args, cell.get("layers", 2))
        rows = training_rows(cell, args.quickstart, args.out)
        begin = time.process_time()
        train(cell, config, rows, start, folder, seed)
        seconds = time.process_time() - begin
        ranker = Ranker.from_pretrained(folder / "model")
        scores, speed = measured(ranker, dev)
        tau = metrics.query_mean(metrics.kendall_tau(scores, teacher, dev["query_id"]))
        error = metrics.teacher_error(scores, teacher, dev["query_id"])
        about = describe(ranker) | facts | {"cpu_seconds": seconds, "pairs_per_cpu_s": speed, "tau": tau}
        about |= {"offset": error.offset, "order": error.order, "seed": seed, "threads": torch.get_num_threads()}
        about["bf16"] = config["bf16"]
        shutil.rmtree(folder / "work", ignore_errors=True)
        Evaluation.of(name, dev.assign(score=scores), **about).save(folder / "eval.json")
        print(f"{name}, seed {seed}: {seconds:.0f} CPU seconds", flush=True)


def sample_queries(rows: pd.DataFrame, number: int) -> pd.DataFrame:
    """Return the rows of a random sample of queries, the same in every call."""
    queries = rows["query_id"].drop_duplicates().sample(number, random_state=0)
    return rows[rows["query_id"].isin(queries)].reset_index(drop=True)


def measured(ranker: Ranker, rows: pd.DataFrame) -> tuple[np.ndarray, float]:
    """Return scores and pairs per CPU second, which with one thread equals pairs/s on an idle machine."""
    begin = time.process_time()
    scores = ranker.predict(pair_texts(rows))
    return scores, len(rows) / (time.process_time() - begin)


def baselines(args: argparse.Namespace, dev: pd.DataFrame, facts: dict[str, Any]) -> None:
    """Evaluate BM25 and the teacher on the same queries."""
    if (args.out / "bm25.json").exists():
        return
    args.out.mkdir(parents=True, exist_ok=True)
    corpus = read_table(args.quickstart / "data" / "corpus.parquet", "corpus", split="dev")
    if (args.quickstart / "dev_scores").exists():
        known = read_table(args.quickstart / "dev_scores", "scores", texts=False)
        keys = ["query_id", "doc_id"]
        scores = dev[keys].merge(known, on=keys, how="left", validate="1:1")["teacher_score"].to_numpy()
        about = facts
    else:
        teacher = Ranker.from_pretrained(args.quickstart / "teacher")
        scores, speed = measured(teacher, dev)
        about = describe(teacher) | facts | {"pairs_per_cpu_s": speed}
    np.save(args.out / "teacher.npy", scores)
    Evaluation.of("teacher", dev.assign(score=scores), **about).save(args.out / "teacher.json")
    Evaluation.of("bm25", dev.assign(score=bm25_scores(dev, corpus)), role="bm25", **facts).save(
        args.out / "bm25.json"
    )


def show(args: argparse.Namespace) -> None:
    """Print a table for each question."""
    config = yaml.safe_load(args.config.read_text())
    found = {name: cell_results(args.out / "cells" / name.replace("/", "_")) for name in config["cells"]}
    found |= {name: [read_result(args.out / f"{name}.json")] for name in ("bm25", "teacher")}
    bm25 = found["bm25"][0][0]["ndcg@10"]
    for question, title in TITLES.items():
        names = [name for name, cell in config["cells"].items() if question in cell["question"] and found[name]]
        if not names:
            continue
        values = {name: mean_by_query(found[name]) for name in [*names, "teacher", "bm25"]}
        print(f"\n## {question}. {title}\n\n{table(names, found, values, config['reference'])}")
        if why_not := refusal(len(values["bm25"]), bm25):
            print(f"\nNothing is called significant: {why_not}.")


def cell_results(folder: Path) -> list[tuple[dict[str, Any], np.ndarray]]:
    """Return measures and NDCG@10 by query for each finished seed."""
    return [read_result(path) for path in sorted(folder.glob("*/eval.json"))]


def read_result(path: Path) -> tuple[dict[str, Any], np.ndarray]:
    """Read the measures and NDCG@10 by query that `Evaluation.save` wrote."""
    return json.loads(path.read_text()), pd.read_parquet(f"{path}.parquet")["ndcg@10"].to_numpy()


def mean_by_query(results: list[tuple[dict[str, Any], np.ndarray]]) -> np.ndarray:
    """Average NDCG@10 by query over all seeds."""
    return np.mean([values for _, values in results], axis=0)


def table(names: list[str], found: dict[str, Any], values: dict[str, np.ndarray], reference: str) -> str:
    """Format a row per student, and for the teacher and BM25."""
    compared = [name for name in names if name != reference]
    tests = {}
    if reference in names:
        tests = {one.first: one for one in compare(values, [(name, reference) for name in compared])}
    head = (
        f"student | seeds | NDCG@10 | less {reference} | seeds above | p, Holm | PNR | AUC | tau | offset | order "
        "| pairs/CPU s | CPU s"
    )
    lines = [f"| {head} |", "|" + "---|" * 13]
    for name in [*names, "teacher", "bm25"]:
        low, high = bootstrap(values[name])
        measures = [one for one, _ in found[name]]
        mean = {key: np.mean([one[key] or np.nan for one in measures]) for key in ("ndcg@10", "pnr", "auc")}
        spread = f" ± {np.std([one['ndcg@10'] for one in measures], ddof=1):.3f}" if len(measures) > 1 else ""
        about = {
            key: np.mean([one["about"].get(key) or np.nan for one in measures])
            for key in ("tau", "offset", "order", "pairs_per_cpu_s", "cpu_seconds")
        }
        test = tests.get(name)
        difference = f"{test.difference:+.3f} [{test.interval[0]:+.3f}, {test.interval[1]:+.3f}]" if test else ""
        cells = [name, str(len(measures)), f"{mean['ndcg@10']:.3f}{spread} [{low:.3f}, {high:.3f}]", difference]
        cells += [seeds_above(found[name], found[reference]) if test else ""]
        cells += [f"{test.p_holm:.4f}" if test else "", f"{mean['pnr']:.2f}", f"{mean['auc']:.3f}"]
        cells += [f"{about['tau']:.3f}", f"{about['offset']:.2f}", f"{about['order']:.2f}"]
        cells += [f"{about['pairs_per_cpu_s']:,.0f}", f"{about['cpu_seconds']:.0f}"]
        lines.append("| " + " | ".join(cell.replace("nan", "") for cell in cells) + " |")
    return "\n".join(lines)


def seeds_above(results: list[tuple[dict[str, Any], np.ndarray]], reference: Any) -> str:
    """Count the common seeds in which NDCG@10 is above that of the reference."""
    ours, theirs = ({one["about"]["seed"]: one["ndcg@10"] for one, _ in some} for some in (results, reference))
    both = ours.keys() & theirs.keys()
    return f"{sum(ours[seed] > theirs[seed] for seed in both)} of {len(both)}"


def main() -> None:
    """Run the experiments or show their results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "show"])
    parser.add_argument(
        "--quickstart", type=Path, default=Path("runs/quickstart"), help="quickstart or showcase folder"
    )
    parser.add_argument("--base", type=Path, help="BERT to start from instead of the quickstart's")
    parser.add_argument("--layers", type=int, nargs="+", help="layers of --base to keep; default: all")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--questions", default="acde", help="letters of the tables to run")
    parser.add_argument("--only", nargs="+", default=[], help="names of the cells to run")
    args = parser.parse_args()
    {"run": run, "show": show}[args.what](args)


if __name__ == "__main__":
    main()
