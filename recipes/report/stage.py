"""Write an HTML report of one or more evaluations from `disranker evaluate --out`.

    disranker report runs/eval/student.json runs/eval/teacher.json runs/eval/bm25.json --out report.html
    disranker report runs/eval --out report.html --texts false
    disranker report runs/eval --abtest abtest.json

The page uses no scripts and no external resources. All evaluations must be of the same judgments.
"""

from dataclasses import dataclass, field
from pathlib import Path

from hf_disranker.recipes.command_line import RecipeParser, recipe_parser, run_stage
from hf_disranker.recipes.outputs import check_output, json_in, made_by
from hf_disranker.recipes.rankings import load_evaluations
from hf_disranker.recipes.report.page import is_report, write_report


@dataclass
class ReportArguments:
    """Arguments of the report."""

    runs: list[str] = field(metadata={"help": "JSON files from `disranker evaluate --out`, or folders of them."})
    out: str = field(default="report.html", metadata={"help": "Path of the HTML file."})
    abtest: str | None = field(default=None, metadata={"help": "JSON file from `disranker abtest --out` to include."})
    texts: bool = field(default=True, metadata={"help": "Include queries and documents; --no_texts shows ids only."})


def make_parser() -> RecipeParser:
    """Return the argument parser of this stage."""
    return recipe_parser("report", __doc__, ReportArguments)


def main(args: ReportArguments) -> None:
    """Load the evaluations and write the report."""
    check_output(args.out, is_report, args.runs)
    if args.abtest and not made_by(args.abtest, "disranker abtest"):
        raise SystemExit(f"disranker report: {args.abtest} was not written by `disranker abtest --out`.")
    abtest = json_in(args.abtest) if args.abtest else None
    write_report(load_evaluations(args.runs), Path(args.out), args.texts, abtest=abtest)
    print(f"Report written to {args.out}; open it in a browser.")


if __name__ == "__main__":
    run_stage("report", make_parser, main)
