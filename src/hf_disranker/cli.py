"""The command `disranker STAGE`: runs the recipe of that name."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence
from typing import Any

from hf_disranker.version import __version__

STAGES = {
    "quickstart": "all stages on the Python documentation of this machine, in 15 to 30 minutes",
    "cpt": "1   continued pre-training of a language model on clicks",
    "fit_teacher": "2   fit a ranker to graded judgments",
    "score": "3a  a teacher's scores for unlabelled pairs",
    "distill": "3b  distil the scores into a BERT",
    "evaluate": "4   PNR, NDCG, MRR and MAP of a model, of scores, of a run or of BM25",
    "compare": "    whether evaluated rankers differ by more than chance",
    "abtest": "    what an A/B test of rankers says, from its impression log",
    "interleave": "    team-draft lists of two rankers, and the clicks on them",
    "report": "    one HTML page of evaluated rankers",
    "export": "    a ranker as ONNX, OpenVINO or for vLLM, checked against it",
    "demo": "    a search page: BM25, student and teacher side by side",
}
# Stages whose first option may stand without its name.
FIRST = {"compare": "--runs", "report": "--runs", "abtest": "--log"}
# Stages whose recipe is more than a page.
_FOLDERS = {"quickstart": "quickstart.stages", "report": "report.stage", "demo": "demo.page"}

USAGE = """disranker {version}: distil a large language model's ranking skill into a BERT.

usage: disranker STAGE [--config FILE.yaml] [--option value ...]

{stages}

disranker STAGE --help     the options of a stage, and what it reads and writes
accelerate launch -m hf_disranker.recipes.STAGE ...     the same on several GPUs or machines
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one stage; a wrong option, table, path or checkpoint ends in one plain line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return
    if arguments[0] == "--version":
        print(__version__)
        return
    stage, *rest = arguments
    if stage not in STAGES:
        sys.exit(f"disranker: there is no stage '{stage}'; there are: {', '.join(STAGES)}.")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("hf_disranker").setLevel(logging.INFO)
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    if stage in FIRST and rest and not rest[0].startswith("-"):
        rest = [FIRST[stage], *rest]
    sys.argv = [f"disranker {stage}", *rest]
    recipe = load_stage(stage)
    try:
        options = recipe.make_parser().parse_args_and_config()
    except (ValueError, OSError) as error:
        sys.exit(f"disranker {stage}: {error}")
    try:
        recipe.main(*options)
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) or _raised_here(error):
            sys.exit(f"disranker {stage}: {error}")
        raise


def load_stage(stage: str) -> Any:
    """The module of a stage, with `make_parser` and `main`."""
    return importlib.import_module(f"hf_disranker.recipes.{_FOLDERS.get(stage, stage)}")


def _raised_here(error: ValueError) -> bool:
    """Whether our own code refused something in plain words; another library's error keeps its traceback."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and frame.tb_frame.f_globals["__name__"].split(".")[0] == "hf_disranker"


def usage() -> str:
    """The text of `disranker --help`."""
    return USAGE.format(version=__version__, stages="\n".join(f"  {name:<12} {what}" for name, what in STAGES.items()))


if __name__ == "__main__":
    main()
