"""Scoring speed against peers on the same pairs and weights, and the effect on the scores.

    python benchmarks/speed.py                                  # MiniLM-L6, tokenisation
    python benchmarks/speed.py --rows bert-base teacher         # BERT-base and a decoder of 69M parameters; slow
    python benchmarks/speed.py --rows student --trained runs/quickstart/student --judgments judgments.parquet
    python benchmarks/speed.py --device cuda --rows student bert-base teacher teacher-7b    # pip install flash-attn

Texts are the Python documentation of this machine. Weights are random, which affects agreement but not speed;
`--trained` shows the effect of bf16 on the measures of a trained ranker. Figures are pairs per CPU second in one
thread (per wall-clock second on a GPU): the median over the rounds, with the slowest and fastest in brackets. `limit`
is the share of the machine's rate for large matrix products, counting the products of the stock model without padding.
bf16 is included if matrix products are at least as fast in it.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import CrossEncoder
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, Qwen3Config

from hf_disranker import BertDistilledRanker, LLMForLastTokenRanking, Ranker, read_table
from hf_disranker.data.collators import budget_batches
from hf_disranker.data.tables import pair_texts
from hf_disranker.data.templates import Templates
from hf_disranker.evaluation import metrics
from hf_disranker.evaluation.evaluate import evaluate
from hf_disranker.recipes.quickstart import python_docs
from hf_disranker.recipes.quickstart.from_scratch import train_bpe, train_wordpiece

Scores = np.ndarray
Variants = dict[str, Callable[[], Scores]]

SHAPES = {
    "minilm": {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536},
    "bert-base": {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
}
_SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
TEACHERS = {
    "teacher": dict(zip(_SIZES, (10, 640, 10, 1920), strict=True)),
    "teacher-7b": dict(zip(_SIZES, (28, 3584, 28, 18_944), strict=True)),  # as Qwen2-7B, but for the vocabulary
}
INSTRUCTION = "Judge whether the document answers the query of someone who programs in Python. " * 3
MAX_LENGTH, BUDGET = 256, 4096


def read_pairs(count: int, folder: Path, whole: bool = False) -> list[tuple[str, str]]:
    """Read queries with 16 documents each, as a first stage would return them.

    Documents are truncated to a log-normal number of words, typical for titles and summaries in a search; with `whole`
    they are not, and most exceed the model's maximum length.
    """
    python_docs.build(folder)
    corpus = read_table(f"{folder}/corpus.parquet", "corpus")
    rows = read_table(f"{folder}/candidates.parquet", "candidates", corpus=corpus)
    rows = rows[rows.groupby("query_id")["query_id"].transform("size") >= 16].groupby("query_id").head(16).head(count)
    words = np.random.default_rng(0).lognormal(np.log(40), 0.55, len(rows)).astype(int).clip(8)
    texts = [(query, f"{text['title']} {text['summary']}") for query, text in pair_texts(rows)]
    return [
        (query, text if whole else " ".join(text.split()[:size]))
        for (query, text), size in zip(texts, words, strict=True)
    ]


def limits(device: str = "cpu") -> dict[str, float]:
    """Return the GFLOP/s of a large matrix product by precision, best of five."""
    found, size = {}, 1024 if device == "cpu" else 8192
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.randn(size, size, device=device, dtype=dtype)
        best = min(time_of(partial(torch.matmul, matrix, matrix), device) for _ in range(5))
        found[str(dtype).removeprefix("torch.")] = 2 * size**3 / best / 1e9
    return found


def time_of(job: Callable[[], Any], device: str = "cpu") -> float:
    """Return the seconds of one call: CPU time, or wall-clock time on a GPU."""
    start = _now(device)
    job()
    return _now(device) - start


def _now(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measure(variants: Variants, rounds: int, device: str = "cpu") -> dict[str, tuple[list[float], Scores]]:
    """Return the seconds of each round and the scores; the variants take turns."""
    found: dict[str, tuple[list[float], Scores]] = {name: ([], np.array([])) for name in variants}
    if device != "cpu":
        for variant in variants.values():  # kernels are chosen in the first call
            variant()
    for _ in range(rounds):
        for name, variant in variants.items():
            start = _now(device)
            scores = variant()
            found[name] = ([*found[name][0], _now(device) - start], scores)
            print(".", end="", flush=True, file=sys.stderr)
    return found


def precisions(peaks: dict[str, float]) -> list[str]:
    """Return the precisions in which the machine is at least as fast as in fp32."""
    return [name for name, peak in peaks.items() if peak >= peaks["float32"]]


def student_rows(
    folder: Path, shape: dict[str, int], pairs: list[tuple[str, str]], dtypes: list[str], device: str
) -> tuple[Variants, float, float]:
    """Return the variants for one BERT, and the mean FLOPs and tokens of a pair."""
    texts = [text for pair in pairs for text in pair]
    tokenizer = train_wordpiece(texts, vocab_size=30_522, max_length=MAX_LENGTH)
    torch.manual_seed(0)
    model = BertDistilledRanker(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **shape)).eval()
    for name in ("ours", "stock"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    make_stock(folder / "stock")

    variants: Variants = {}
    lengths = np.array([len(row) for row in tokenizer([q for q, _ in pairs], [d for _, d in pairs])["input_ids"]])
    for name in dtypes:
        dtype = getattr(torch, name)
        options: dict[str, Any] = {"device": device, "max_length": MAX_LENGTH, "model_kwargs": {"dtype": dtype}}
        peer, with_us = (CrossEncoder(str(folder / kind), **options) for kind in ("stock", "ours"))
        ranker = Ranker.from_pretrained(folder / "ours", device=device, dtype=dtype)
        variants[f"CrossEncoder.predict {name}"] = partial(peer.predict, pairs, show_progress_bar=False)
        variants[f"transformers, token budget {name}"] = _control(folder / "stock", dtype, pairs, device)
        variants[f"CrossEncoder with hf_disranker {name}"] = partial(with_us.predict, pairs, show_progress_bar=False)
        variants[f"ours {name}"] = partial(ranker.predict, pairs)
    if importlib.util.find_spec("flash_attn") and device != "cpu":
        options["model_kwargs"] |= {"attn_implementation": "flash_attention_2"}
        flat = CrossEncoder(str(folder / "stock"), **options)
        ranker = Ranker.from_pretrained(folder / "ours", device=device, **options["model_kwargs"])
        variants["CrossEncoder, flash attention bfloat16"] = partial(flat.predict, pairs, show_progress_bar=False)
        variants["ours, flash attention bfloat16"] = partial(ranker.predict, pairs)
    tokens, size = np.minimum(lengths, MAX_LENGTH), shape["hidden_size"]
    weights = 4 * size**2 + 2 * size * shape["intermediate_size"]
    flops = np.mean(shape["num_hidden_layers"] * tokens * (2 * weights + 4 * tokens * size))
    return variants, float(flops), float(tokens.mean())


def make_stock(folder: Path) -> None:
    """Remove the marker from a checkpoint, so that AutoModel loads the stock class for the peers."""
    config = json.loads((folder / "config.json").read_text())
    del config["disranker"]
    (folder / "config.json").write_text(json.dumps(config))


def _control(folder: Path, dtype: torch.dtype, pairs: list[tuple[str, str]], device: str) -> Callable[[], Scores]:
    """Return a baseline that runs the stock class on batches sorted by number of tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype).eval().to(device)
    assert type(model).__name__ == "BertForSequenceClassification"

    budget = BUDGET if device == "cpu" else 8 * BUDGET

    def score() -> Scores:
        queries, documents = zip(*pairs, strict=True)
        rows = tokenizer(list(queries), list(documents), truncation="only_second", max_length=MAX_LENGTH)
        scores = np.zeros(len(pairs), np.float32)
        for batch in budget_batches(np.array([len(ids) for ids in rows["input_ids"]]), budget):
            inputs = tokenizer.pad({key: [rows[key][row] for row in batch] for key in rows}, return_tensors="pt")
            with torch.inference_mode():
                scores[batch] = model(**inputs.to(device)).logits.squeeze(-1).float().cpu().numpy()
        return scores

    return score


def teacher_rows(
    pairs: list[tuple[str, str]], shape: dict[str, int], instruction: str, device: str
) -> tuple[Variants, float]:
    """Return the variants for one decoder, and the mean FLOPs of a pair."""
    tokenizer = train_bpe([text for pair in pairs for text in pair], vocab_size=30_000, max_length=MAX_LENGTH)
    torch.manual_seed(0)
    name = "float32" if device == "cpu" else "bfloat16"
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        num_key_value_heads=shape["num_attention_heads"] // 2,
        head_dim=shape["hidden_size"] // shape["num_attention_heads"],
        pad_token_id=tokenizer.pad_token_id,
        **shape,
    )
    with torch.device(device):
        torch.set_default_dtype(getattr(torch, name))
        model = LLMForLastTokenRanking.from_config(config).eval()
        torch.set_default_dtype(torch.float32)
    if instruction:
        model.config.update_marker(templates=Templates(text=instruction + model.config.marker.templates.text))
    model.config.update_marker(max_length=MAX_LENGTH, max_query_length=64)
    stock = copy.deepcopy(model)
    stock.base_model.set_attn_implementation("sdpa")
    budget = Ranker(stock, tokenizer, BUDGET if device == "cpu" else None)
    packed, shared = Ranker(model, tokenizer), Ranker(model, tokenizer)
    packed.share_prefix, shared.share_prefix = False, True

    def sixteens() -> Scores:
        rows = [(row, "") for row in budget._encode(pairs).rows]
        return np.concatenate([budget._forward(rows[start : start + 16]) for start in range(0, len(rows), 16)])

    tokens = np.array([len(row["input_ids"]) for row in budget._encode(pairs).rows])
    size, inner = shape["hidden_size"], shape["intermediate_size"]
    weights = 3 * size**2 + 3 * size * inner
    flops = float(np.mean(shape["num_hidden_layers"] * tokens * (2 * weights + 2 * tokens * size)))
    variants: Variants = {
        f"padded batches of 16 {name}": sixteens,
        f"token budget {name}": partial(budget.predict, pairs),
        f"ours {name}": partial(packed.predict, pairs),
        f"ours, shared prefix {name}": partial(shared.predict, pairs),
    }
    return variants, flops


def show(
    title: str, found: dict[str, tuple[list[float], Scores]], flops: float, peaks: dict[str, float]
) -> list[dict[str, Any]]:
    """Print a table relative to its first row and return the rows."""
    expected = next(iter(found.values()))[1]
    groups = np.arange(len(expected)) // 16
    base = statistics.median(next(iter(found.values()))[0])
    print(f"\n\n{title}\n{'':40}{'pairs/s':>12}{'':16}{'times':>7}{'limit':>7}{'max |d|':>9}{'tau':>8}")
    rows = []
    for name, (times_taken, scores) in found.items():
        rate, times = len(scores) / statistics.median(times_taken), base / statistics.median(times_taken)
        spread = [len(scores) / max(times_taken), len(scores) / min(times_taken)]
        share = rate * flops / 1e9 / peaks[name.split()[-1]]
        drift = float(np.abs(scores - expected).max())
        tau = float(np.nanmean(metrics.kendall_tau(expected, scores, groups)))
        rows.append(
            {"name": name, "rate": rate, "spread": spread, "times": times, "limit": share, "drift": drift, "tau": tau}
        )
        brackets = f"[{spread[0]:.1f}, {spread[1]:.1f}]"
        print(f"{name:40}{rate:12.1f}{brackets:>16}{times:7.2f}{share:7.0%}{drift:9.1e}{tau:8.4f}", flush=True)
    return rows


def tokenisation(pairs: list[tuple[str, str]], ranker: Ranker, rounds: int) -> dict[str, float]:
    """Return tokenised pairs per CPU second: batches of 32 as in CrossEncoder, and ours."""
    tokenizer = ranker.collator.tokenizer

    def peer() -> Scores:
        for start in range(0, len(pairs), 32):
            tokenizer(
                pairs[start : start + 32], padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
            )
        return np.array([])

    def ours() -> Scores:
        ranker._encode(pairs)
        return np.array([])

    found = measure({"CrossEncoder's way": peer, "ours": ours}, rounds)
    return {name: len(pairs) / statistics.median(taken) for name, (taken, _) in found.items()}


def trained(folder: str, judgments: str) -> dict[str, dict[str, float]]:
    """Return the measures of a trained ranker in fp32 and bf16 on the development queries."""
    rows = read_table(judgments, "judgments", split="dev")
    found = {}
    for name in ("float32", "bfloat16"):
        scores = Ranker.from_pretrained(folder, device="cpu", dtype=name).predict(pair_texts(rows))
        found[name] = {measure: evaluate(rows, scores)[measure] for measure in ("ndcg@10", "pnr")}
    return found


def main(argv: Iterable[str] | None = None) -> None:
    """Run the selected benchmarks, print tables and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ["student", "bert-base", *TEACHERS, "tokens"]
    parser.add_argument("--rows", nargs="+", default=["student", "tokens"], choices=known)
    parser.add_argument("--pairs", type=int, default=1024, help="pairs for the student; a quarter for larger models")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--whole", action="store_true", help="do not truncate documents to log-normal lengths")
    parser.add_argument("--trained", help="folder of a trained student, evaluated in fp32 and bf16")
    parser.add_argument("--judgments", help="table of judgments for --trained")
    parser.add_argument("--data", help="folder for the data set; default: a temporary one")
    parser.add_argument("--out", help="write the results to this JSON file")
    args = parser.parse_args(argv if argv is None else list(argv))
    torch.set_num_threads(1)
    results: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    results |= {"torch": torch.__version__, "load": os.getloadavg()[0], "limits": limits(args.device)}
    print("GFLOP/s of one core, or of the card:", {name: round(value) for name, value in results["limits"].items()})
    with tempfile.TemporaryDirectory() as folder:
        pairs = read_pairs(args.pairs, Path(args.data or f"{folder}/data"), args.whole)
        small = pairs[: args.pairs // 4]
        if "student" in args.rows:
            results["student"] = _student("minilm", Path(folder), pairs, args, results["limits"])
        if "bert-base" in args.rows:
            results["bert-base"] = _student("bert-base", Path(folder), small, args, results["limits"])
        for name in [name for name in TEACHERS if name in args.rows]:
            for title, instruction in (("no instruction", ""), ("an instruction of 40 tokens", INSTRUCTION)):
                variants, flops = teacher_rows(small, TEACHERS[name], instruction, args.device)
                found = measure(variants, args.rounds, args.device)
                results[f"{name}, {title}"] = show(f"{name}, {title}", found, flops, results["limits"])
        if "tokens" in args.rows:
            tokenizer = train_wordpiece([text for pair in pairs for text in pair], 30_522, MAX_LENGTH)
            model = BertDistilledRanker(BertConfig(vocab_size=len(tokenizer), **SHAPES["minilm"]))
            results["tokenisation"] = tokenisation(pairs, Ranker(model, tokenizer), args.rounds)
            print("\n\nTokenised pairs/CPU-s:", {name: round(rate) for name, rate in results["tokenisation"].items()})
        if args.trained:
            results["trained"] = trained(args.trained, args.judgments)
            print("\nTrained ranker:", results["trained"])
    if args.out:
        Path(args.out).write_text(json.dumps(results, indent=2), encoding="utf-8")


def _student(
    name: str, folder: Path, pairs: list[tuple[str, str]], args: argparse.Namespace, peaks: dict[str, float]
) -> list[dict[str, Any]]:
    dtypes, device = precisions(peaks), args.device
    variants, flops, tokens = student_rows(folder / name, SHAPES[name], pairs, dtypes, device)
    found = measure(variants, args.rounds, device)
    return show(f"Student, {name}, {len(pairs)} pairs of {tokens:.0f} tokens", found, flops, peaks)


if __name__ == "__main__":
    main()
