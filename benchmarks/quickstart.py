"""The quickstart with several seeds: how much of its table is chance.

    python benchmarks/quickstart.py --seeds 0 1 2 --out runs/quickstart_seeds

Runs `disranker quickstart` once for each seed (finished runs are kept) and prints markdown: every ranker's measures by
seed, and the paired tests by seed.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from hf_disranker.recipes.quickstart.results import TITLES


def main() -> None:
    """Run what has not run, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart_seeds"))
    args = parser.parse_args()
    folders = [args.out / str(seed) for seed in args.seeds]
    for seed, folder in zip(args.seeds, folders, strict=True):
        command = [sys.executable, "-m", "hf_disranker.cli", "quickstart", "--out", str(folder), "--seed", str(seed)]
        subprocess.run(command, check=True, stdout=sys.stderr)
    print(measures_table([json.loads((folder / "report" / "results.json").read_text()) for folder in folders]))
    print()
    print(tests_table([json.loads((folder / "report" / "comparison.json").read_text()) for folder in folders]))


def measures_table(runs: list[list[dict]]) -> str:
    """NDCG@10 and PNR of every ranker, and its speed, a number for each seed."""
    lines = ["| ranker | NDCG@10 | PNR | pairs/s |", "|---|---|---|---|"]
    for rows in zip(*runs, strict=True):
        name, speeds = rows[0]["name"], [row["pairs_per_s"] for row in rows]
        cells = [", ".join(f"{row['ndcg@10']:.3f}" for row in rows), ", ".join(f"{row['pnr']:.2f}" for row in rows)]
        cells.append(", ".join(f"{speed:,.0f}" for speed in speeds) if all(speeds) else "")
        lines.append(f"| {TITLES[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tests_table(runs: list[dict]) -> str:
    """Differences in NDCG@10 with their interval and p-value, a column for each seed."""
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
