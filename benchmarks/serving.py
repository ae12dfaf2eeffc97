"""Student formats compared: speed, agreement, size and memory.

    python benchmarks/serving.py --model runs/quickstart/student --pairs runs/quickstart/data/judgments.parquet
    pip install flashrank               # for its row: the same ONNX file, loaded by FlashRank

Each format is exported and then scores the same pairs in a separate process. The formats alternate and use
`--threads` cores. Speed is pairs per CPU second, including tokenisation, after a warm-up: median, lowest and highest
round. Start is the CPU time from the first import to the first score. Memory is the peak resident memory. Differences
are relative to PyTorch in fp32: largest score difference, Kendall's tau (mean over queries) and share of queries with
the same top document.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

SYSTEMS: dict[str, tuple[Any, str]] = {  # name -> (format, what its size on disk is)
    "PyTorch": ("cross-encoder", "model.safetensors"),
    "sentence-transformers": ("cross-encoder", "model.safetensors"),
    "onnx": ("onnx", "onnx/model.onnx"),
    "openvino": ("openvino", "openvino/openvino_model.*"),
}
if importlib.util.find_spec("flashrank"):
    SYSTEMS["FlashRank"] = ("onnx", "onnx/model.onnx")


def measure(system: str, folder: str, pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """Load a format and score the pairs."""
    start = time.process_time()
    predict: Callable[[list[Any]], Any]
    if system == "PyTorch":
        from hf_disranker import Ranker

        predict = Ranker.from_pretrained(folder, device="cpu").predict
    elif system == "sentence-transformers":
        from sentence_transformers import CrossEncoder

        predict = CrossEncoder(folder, device="cpu").predict
    elif system == "FlashRank":
        predict = flashrank(Path(folder))
    else:
        from hf_disranker.runtime import Ranker as LightRanker

        threads = int(os.environ["OMP_NUM_THREADS"])
        predict = LightRanker(folder, SYSTEMS[system][1].replace(".*", ".xml"), threads).predict
    predict(pairs[:1])
    ready = time.process_time() - start
    predict(pairs[:500])
    start = time.process_time()
    scores = predict(pairs)
    speed = len(pairs) / (time.process_time() - start)
    memory = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
    return {"scores": [float(score) for score in scores], "speed": speed, "start": ready, "memory": memory}


def flashrank(folder: Path) -> Callable[[list[tuple[str, str]]], list[float]]:
    """Load the exported ONNX file in FlashRank, which scores one query at a time."""
    import numpy as np
    from flashrank import Ranker, RerankRequest
    from flashrank.Config import model_file_map

    name = "ms-marco-TinyBERT-L-2-v2"
    cache = Path(tempfile.mkdtemp())
    (cache / name).mkdir()
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (cache / name / file).symlink_to((folder / file).absolute())
    (cache / name / "special_tokens_map.json").write_text("{}")  # transformers 5 does not write it
    (cache / name / model_file_map[name]).symlink_to((folder / "onnx/model.onnx").absolute())
    limit = json.loads((folder / "config.json").read_text())["disranker"]["max_length"]
    ranker = Ranker(name, str(cache), max_length=limit)

    def predict(pairs: list[tuple[str, str]]) -> list[float]:
        scores = np.zeros(len(pairs))
        for query, group in groupby(enumerate(pairs), key=lambda item: item[1][0]):
            passages = [{"id": place, "text": text} for place, (_, text) in group]
            for one in ranker.rerank(RerankRequest(query, passages)):
                probability = float(one["score"])  # FlashRank applies a sigmoid
                scores[one["id"]] = np.log(probability / (1 - probability))
        return scores.tolist()

    return predict


def in_turns(args: argparse.Namespace, folder: str, pairs: list[tuple[str, str]]) -> dict[str, list[dict[str, Any]]]:
    """Run all rounds of all systems."""
    Path(folder, "pairs.json").write_text(json.dumps(pairs))
    runs: dict[str, list[dict[str, Any]]] = {system: [] for system in SYSTEMS}
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    for _ in range(args.rounds):
        for system in SYSTEMS:
            command = [sys.executable, __file__, "--system", system, "--model", folder]
            command += ["--threads", str(args.threads)]
            ended = subprocess.run(
                command, env=environment, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            runs[system].append(json.loads(ended.stdout.splitlines()[-1]))
    return runs


def main() -> None:
    """Export and measure all formats and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the student")
    parser.add_argument("--pairs", help="table of judgments or candidates with texts")
    parser.add_argument("--split", default="dev")
    parser.add_argument("--max_pairs", type=int, default=5000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--system", choices=SYSTEMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.system:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-args.threads :])  # FlashRank uses all visible cores
        pairs = json.loads(Path(args.model, "pairs.json").read_text())
        print(json.dumps(measure(args.system, args.model, [tuple(pair) for pair in pairs])))
        return
    import numpy as np

    from hf_disranker import Ranker
    from hf_disranker.evaluation import metrics
    from hf_disranker.recipes import export

    ranker = Ranker.from_pretrained(args.model, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        options = {"pairs": args.pairs, "split": args.split, "max_pairs": args.max_pairs}
        for kind in dict.fromkeys(kind for kind, _ in SYSTEMS.values()):
            export.main(export.ExportArguments(args.model, folder, kind, **options))
        rows = export.read_pairs(export.ExportArguments(args.model, folder, "onnx", **options), ranker)
        texts = [
            ranker.collator.templates.render_document(*texts)
            for texts in zip(rows["title"], rows["summary"], strict=True)
        ]
        runs = in_turns(args, folder, list(zip(rows["query"], texts, strict=True)))
        sizes = {
            name: sum(path.stat().st_size for path in Path(folder).glob(files)) for name, (_, files) in SYSTEMS.items()
        }
    queries = rows["query_id"].to_numpy()
    expected = np.array(runs["PyTorch"][0]["scores"])
    load = os.getloadavg()[0]
    print(f"{len(rows):,} pairs, {args.threads} thread(s), {args.rounds} rounds, load {load:.1f} at the end\n")
    print("| format | pairs/CPU-s | lowest-highest | largest difference | tau | same first | MB | start s | MiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, rounds in runs.items():
        scores, speeds = np.array(rounds[0]["scores"]), [one["speed"] for one in rounds]
        tau = metrics.query_mean(metrics.kendall_tau(scores, expected, queries))
        groups = rows.reset_index(drop=True).groupby("query_id").indices.values()
        first = np.mean([scores[group].argmax() == expected[group].argmax() for group in groups])
        start, memory = (median(one[key] for one in rounds) for key in ("start", "memory"))
        print(
            f"| {name} | {median(speeds):,.0f} | {min(speeds):,.0f}-{max(speeds):,.0f} "
            f"| {np.abs(scores - expected).max():.1e} | {tau:.4f} | {first:.1%} | {sizes[name] / 1e6:.1f} "
            f"| {start:.2f} | {memory:,.0f} |"
        )


if __name__ == "__main__":
    main()
