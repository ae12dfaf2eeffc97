"""Command line interface: `disranker STAGE` runs the recipe of that name."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_disranker import recipes
from hf_disranker.version import __version__

STAGES = {
    "quickstart": "all stages on the Python documentation of this machine, in seven minutes",
    "showcase": "a pretrained language model distilled, from its shipped scores, in 20 minutes",
    "cpt": "1   continued pre-training of a language model on clicks",
    "fit_teacher": "2   fit a ranker to graded judgments",
    "score": "3a  score unlabelled pairs with a teacher",
    "distill": "3b  distil the scores into a BERT",
    "evaluate": "4   PNR, NDCG, MRR and MAP of a model, scores, a run or BM25",
    "compare": "    significance tests between evaluated rankers",
    "abtest": "    analyse an A/B test of rankers from its impression log",
    "interleave": "    team-draft interleaving of two rankers, and its analysis",
    "report": "    HTML report of evaluated rankers",
    "export": "    export a ranker to ONNX, OpenVINO or vLLM and check it",
    "demo": "    search page: BM25, student and teacher side by side",
}
# Stages whose first option may be given without its name.
FIRST = {"compare": "--runs", "report": "--runs", "abtest": "--log"}
# Stages with a folder of their own.
_FOLDERS = {
    "quickstart": "quickstart.run",
    "showcase": "showcase.stages",
    "report": "report.stage",
    "demo": "demo.page",
}

USAGE = """disranker {version}: distil a large language model's ranking skill into a BERT.

usage: disranker STAGE [--config FILE.yaml] [--option value ...]

{stages}

disranker STAGE --help         inputs, outputs and options of a stage
disranker STAGE --help-all     the options of transformers and trl too
accelerate launch -m hf_disranker.recipes.STAGE ...     run a stage on several GPUs or machines
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one stage; report an invalid option, table, path or checkpoint in one line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return
    if arguments[0] == "--version":
        print(__version__)
        return
    stage, rest = arguments[0].replace("-", "_"), arguments[1:]
    if stage not in STAGES:
        sys.exit(f"disranker: there is no stage '{stage}'; there are: {', '.join(STAGES)}.")
    if {"-h", "--help"} & set(rest):
        print(help_file(stage).read_text(encoding="utf-8"), end="")
        return
    if stage in FIRST and rest and not rest[0].startswith("-"):
        rest = [FIRST[stage], *rest]
    sys.argv = [f"disranker {stage}", *rest]
    # Read when torch loads. Threads that spin while they wait take the core from the thread that they wait for.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    recipe = load_stage(stage)
    from hf_disranker.recipes.command_line import run_stage  # imports transformers

    run_stage(stage, recipe.make_parser, recipe.main)


def load_stage(stage: str) -> Any:
    """Import the recipe of a stage, with its `make_parser` and `main`."""
    return importlib.import_module(f"hf_disranker.recipes.{_FOLDERS.get(stage, stage)}")


def help_file(stage: str) -> Path:
    """Return the file with the help of a stage, which is read instead of importing torch; see docs/help_texts.py."""
    return Path(recipes.__path__[0], "help", f"{stage}.txt")


def usage() -> str:
    """Return the text of `disranker --help`."""
    return USAGE.format(version=__version__, stages="\n".join(f"  {name:<12} {what}" for name, what in STAGES.items()))


if __name__ == "__main__":
    main()
