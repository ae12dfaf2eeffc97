"""Test whether evaluated rankers differ significantly, from the files of `disranker evaluate --out`.

    disranker compare runs/eval/student.json runs/eval/teacher.json runs/eval/bm25.json
    disranker compare runs/eval --measure mrr --out comparison.json

For each pair of rankers: difference on the same queries with a 95% paired bootstrap interval, p-value of a paired
randomisation test, with and without Holm correction, effect size, number of queries needed to detect the difference,
and share of queries whose top 1, 5 and 10 documents changed.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hf_disranker.evaluation.significance import Comparison, bootstrap, marks, refusal
from hf_disranker.recipes.command_line import RecipeParser, recipe_parser, run_stage
from hf_disranker.recipes.outputs import check_output, json_in, save_json
from hf_disranker.recipes.rankings import compare_evaluations, load_evaluations


@dataclass
class CompareArguments:
    """Evaluations to compare."""

    runs: list[str] = field(metadata={"help": "Json files of `disranker evaluate --out`, or folders of them."})
    measure: str = field(default="ndcg@10", metadata={"help": "Measure per query; use pair_accuracy for PNR."})
    out: str | None = field(default=None, metadata={"help": "Json file for the comparisons."})


def make_parser() -> RecipeParser:
    """Return the argument parser of this stage."""
    return recipe_parser("compare", __doc__, CompareArguments)


HEAD = f"{'':5}{'difference':>11}{'95% interval':>20}{'p':>9}{'Holm':>9}{'effect':>8}{'needs':>9}  top 1/5/10 changed"


def main(args: CompareArguments) -> list[Comparison]:
    """Compare all pairs of rankers and print two tables."""
    if args.out:
        check_output(args.out, is_comparison, args.runs)
    evaluations = load_evaluations(args.runs)
    comparisons = compare_evaluations(evaluations, args.measure)
    letters = {one.name: chr(ord("a") + place) for place, one in enumerate(evaluations)}
    queries = min((one.queries for one in comparisons), default=0)
    bm25 = next((one.measures[args.measure] for one in evaluations if one.about.get("role") == "bm25"), None)
    why_not = refusal(queries, bm25)
    beaten = dict.fromkeys(letters, "") if why_not else marks(comparisons, letters)
    width = max(map(len, letters))
    for one in evaluations:
        low, high = bootstrap(one.queries[args.measure])
        name, value = one.name, one.queries[args.measure].mean()
        print(f"{letters[name]}  {name:{width}}  {value:.4f}  [{low:.4f}, {high:.4f}]  {beaten[name]}")
    print(f"\n{HEAD}")
    for found in comparisons:
        print(line(found, letters))
    print(f"\n{args.measure} on {queries:,} queries. ", end="")
    print(f"No difference is called significant: {why_not}." if why_not else "Letters: beaten, p < 0.05 after Holm.")
    if args.out:
        save_json([asdict(one) for one in comparisons], args.out)
    return comparisons


def is_comparison(path: Path) -> bool:
    """Return whether a file was written by this command."""
    found = json_in(path)
    return isinstance(found, list) and all(
        isinstance(one, dict) and {"first", "p_holm"} <= one.keys() for one in found
    )


def line(one: Comparison, letters: Mapping[str, str]) -> str:
    """Format a comparison as a line below `HEAD`."""
    (low, high), needed = one.interval, f"{one.queries_needed:,}" if one.queries_needed else "-"
    changed = " / ".join(f"{share:.0%}" for share in one.changed.values())
    return (
        f"{letters[one.first]} - {letters[one.second]}{one.difference:+11.4f}{f'[{low:+.4f}, {high:+.4f}]':>20}"
        f"{one.p:9.4f}{one.p_holm:9.4f}{one.effect:+8.2f}{needed:>9}  {changed}"
    )


if __name__ == "__main__":
    run_stage("compare", make_parser, main)
