"""The quickstart with several seeds: results, their spread and the time of each stage.

    python benchmarks/quickstart.py --seeds 0 1 2 --out runs/quickstart_seeds
    python benchmarks/quickstart.py --avx2 --busy      # like a CPU without AVX-512 and BF16, one core busy

Runs `disranker quickstart` once per seed (finished runs are kept) and prints markdown, also written to OUT/results.md:
the machine, the seconds of each stage, the measures of every ranker and the paired tests by seed.
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_disranker.recipes.outputs import save_json
from hf_disranker.recipes.quickstart.results import TITLES
from hf_disranker.recipes.quickstart.run import STAGES

# Environment variables that restrict the libraries to AVX2.
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
_CAPABILITY = "import torch; print(torch.__version__, torch.backends.cpu.get_cpu_capability())"


def main() -> None:
    """Run the seeds that are missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart_seeds"))
    parser.add_argument("--avx2", action="store_true", help="use no instructions newer than AVX2")
    parser.add_argument("--busy", action="store_true", help="keep one core busy during the runs")
    args = parser.parse_args()
    folders = [args.out / str(seed) for seed in args.seeds]
    with busy_core() if args.busy else contextlib.nullcontext():
        for seed, folder in zip(args.seeds, folders, strict=True):
            if not (folder / "machine.json").exists():
                run(seed, folder, os.environ | (AVX2 if args.avx2 else {}), args.busy)
    rankers, tests, machines = (
        [json.loads((folder / name).read_text()) for folder in folders]
        for name in ("report/results.json", "report/comparison.json", "machine.json")
    )
    seconds = [seconds_of(folder) for folder in folders]
    text = "\n\n".join([time_table(machines, seconds), measures_table(rankers), tests_table(tests)])
    (args.out / "results.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def run(seed: int, folder: Path, environment: dict[str, str], busy: bool) -> None:
    """Run the quickstart with one seed; record the machine and the seconds of the whole command."""
    shown = subprocess.run([sys.executable, "-c", _CAPABILITY], env=environment, capture_output=True, text=True)
    command = [sys.executable, "-m", "hf_disranker.cli", "quickstart", "--out", str(folder), "--seed", str(seed)]
    begin, load = time.perf_counter(), os.getloadavg()[0]
    subprocess.run(command, check=True, stdout=sys.stderr, env=environment)
    seconds = round(time.perf_counter() - begin, 1)
    machine = {"cpu": cpu_model(), "cores": len(os.sched_getaffinity(0)), "torch": shown.stdout.strip()}
    save_json({**machine, "busy": busy, "load_before": load, "seconds": seconds}, f"{folder}/machine.json")


@contextlib.contextmanager
def busy_core() -> Iterator[None]:
    """Keep one core busy within the context."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()


def cpu_model() -> str:
    """Return the name of the CPU."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().split("\n"):
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def seconds_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the record of each stage of a run: wall-clock seconds, CPU seconds and threads."""
    return {stage.name: json.loads((folder / stage.name / "finished.json").read_text()) for stage in STAGES}


def time_table(machines: list[dict], seconds: list[dict[str, dict[str, Any]]]) -> str:
    """Format wall-clock seconds, CPU seconds and threads of each stage, one column per seed."""
    lines = ["| stage: seconds (CPU seconds), threads |" + " seed |" * len(machines), "|---|" + "---|" * len(machines)]
    for name in seconds[0]:
        cells = [
            f"{run[name]['seconds']:.0f} ({run[name]['cpu_seconds']:.0f}), {run[name]['threads']}" for run in seconds
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    cpu = [sum(stage["cpu_seconds"] for stage in run.values()) for run in seconds]
    cells = [f"{machine['seconds']:.0f} ({total:.0f})" for machine, total in zip(machines, cpu, strict=True)]
    lines.append(f"| the whole command | {' | '.join(cells)} |")
    known = {
        f"{one['cpu']}, {one['cores']} cores{', one kept busy' * one['busy']}, torch {one['torch']}"
        for one in machines
    }
    return "\n".join(sorted(known)) + "\n\n" + "\n".join(lines)


def measures_table(runs: list[list[dict]]) -> str:
    """Format NDCG@10, PNR and speed of every ranker, one number per seed."""
    lines = ["| ranker | NDCG@10 | PNR | pairs/s |", "|---|---|---|---|"]
    for rows in zip(*runs, strict=True):
        name, speeds = rows[0]["name"], [row["pairs_per_s"] for row in rows]
        cells = [", ".join(f"{row['ndcg@10']:.3f}" for row in rows), ", ".join(f"{row['pnr']:.2f}" for row in rows)]
        cells.append(", ".join(f"{speed:,.0f}" for speed in speeds) if all(speeds) else "")
        lines.append(f"| {TITLES[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tests_table(runs: list[dict]) -> str:
    """Format differences in NDCG@10 with interval and p-value, one column per seed."""
    lines = ["| NDCG@10 of | less that of |" + " seed |" * len(runs), "|---|---|" + "---|" * len(runs)]
    for rows in zip(*(run["ndcg@10"] for run in runs), strict=True):
        better, worse = rows[0]["rankers"]
        cells = [
            f"{row['difference']:+.3f} [{row['interval'][0]:+.3f}, {row['interval'][1]:+.3f}], p = {row['p']:.4f}"
            for row in rows
        ]
        lines.append(f"| {TITLES[better]} | {TITLES[worse]} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
