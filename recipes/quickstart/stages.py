"""All stages on real text, from nothing: a search over the Python documentation that is installed on this machine.

    disranker quickstart

A small language model is fitted to clicks and to a few judgments, once as it is and once after continued pre-training
on the clicks. Both score many unlabelled pairs, and a small BERT learns from the mean of their scores. Rivals show
what each step is worth: the same BERT without a teacher, each teacher alone. A stage is the recipe of that name with a
config of configs/quickstart; finished stages are skipped.
"""

import importlib
import json
import shutil
import time
import timeit
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from transformers import AutoConfig
from trl import TrlParser

from hf_disranker.data.bm25 import bm25_scores, click_judgments, with_random_documents
from hf_disranker.data.tables import read_table, write_table
from hf_disranker.evaluation import metrics
from hf_disranker.evaluation.evaluate import describe, score_with
from hf_disranker.evaluation.rankings import Evaluation, compare_evaluations
from hf_disranker.models.ranker import Ranker
from hf_disranker.recipes.command_line import recipe_parser
from hf_disranker.recipes.quickstart import from_scratch, python_docs
from hf_disranker.recipes.report.page import TITLES, results_picture, results_table, search_examples, write_report
from hf_disranker.training.runs import save_json

CONFIGS = Path(__file__).parents[1] / "configs"


@dataclass(frozen=True)
class Preset:
    """What the quickstart starts from: a folder of configs and two checkpoints, or none, to make them from nothing."""

    configs: Path
    decoder: str | None = None
    bert: str | None = None


PRESETS = {
    "tiny": Preset(CONFIGS / "quickstart"),
    "hub": Preset(CONFIGS / "quickstart_hub", "Qwen/Qwen3-0.6B-Base", "sentence-transformers/all-MiniLM-L6-v2"),
}
STUDENTS, TEACHERS = ("label_student", "click_student", "student"), ("teacher", "teacher_no_cpt")
SHOWN = ("bm25", "label_student", "click_student", "teacher_no_cpt", "teacher", "teachers", "student")
# Who is compared with whom: better, worse if the step between them is worth something.
COMPARED = (
    ("teacher", "bm25"),
    ("teacher", "teacher_no_cpt"),
    ("teachers", "teacher"),
    ("student", "bm25"),
    ("student", "label_student"),
    ("student", "click_student"),
)
TYPED_QUERIES = (
    "read a json file",
    "how to sort a dict by value",
    "plot a histogram",
    "split a string",
    "download a file from the hub",
    "compute the mean of an array",
    "shortest path between two nodes",
    "parse command line arguments",
    "train a random forest",
    "convert a string to a date",
)
# Queries of the click log beside the judged ones; all others are unlabelled.
CLICKED_QUERIES = 2000
# Beside each clicked or relevant document: some of the 20 that BM25 finds, and one random document.
OTHERS = 3
# The unlabelled documents of a query: BM25's first, some of its further ones, and one random document.
FIRST, FURTHER = 3, 3
MAX_LENGTH = 48


@dataclass
class QuickstartArguments:
    """Where the quickstart works."""

    out: str = field(default="runs/quickstart", metadata={"help": "Folder for data, models, scores and report."})
    preset: Literal["tiny", "hub"] = field(
        default="tiny",
        metadata={
            "help": "tiny: models from nothing, for two CPU cores. hub: a real LLM and BERT, for a GPU, online."
        },
    )
    configs: str | None = field(
        default=None, metadata={"help": "Folder with the config of each stage; by the preset."}
    )
    decoder: str | None = field(default=None, metadata={"help": "The LLM: folder or Hub id; by the preset."})
    bert: str | None = field(default=None, metadata={"help": "The student's start: folder or Hub id; by the preset."})
    seed: int = field(default=0, metadata={"help": "Seed of first weights and of the order of training."})


def make_parser() -> TrlParser:
    """The command line of the quickstart."""
    return recipe_parser("quickstart", __doc__, QuickstartArguments)


def main(args: QuickstartArguments) -> None:
    """Run every stage that is not finished, then show the results."""
    begin = time.perf_counter()
    out = Path(args.out)
    check_folder(out)
    make_data(out / "data")
    preset = PRESETS[args.preset]
    decoder, bert = args.decoder or preset.decoder, args.bert or preset.bert
    if not (decoder and bert):
        make_base_models(out, args.seed)
    decoder, bert = decoder or str(out / "base" / "decoder"), bert or str(out / "base" / "bert")
    precision = fast_precision()
    for name, recipe, arguments in stages(out, Path(args.configs or preset.configs), decoder, bert):
        training = recipe != "score"
        run_recipe(
            out / name,
            recipe,
            [*arguments, "--seed", str(args.seed)] if training else arguments,
            precision if training else [],
        )
    show_results(out)
    print(f"\nDone in {(time.perf_counter() - begin) / 60:.1f} minutes. All of it lies in {out}/.")


def check_folder(out: Path) -> None:
    """Refuse a folder that holds folders of the names of the stages and was not made here."""
    stages = ("base", "cpt", "scores", "scores_no_cpt", "report", *STUDENTS, *TEACHERS)
    foreign = [name for name in stages if (out / name).exists()]
    if foreign and not (out / "data" / "manifest.json").is_file():
        raise ValueError(f"{out / foreign[0]} exists and is of no quickstart: choose another --out.")


def make_data(folder: Path) -> None:
    """The tables of the embedded data set, and from them what each ranker learns from."""
    print("== data: reading the Python documentation installed here", flush=True)
    print(", ".join(f"{rows:,} rows of {table}" for table, rows in python_docs.build(folder).items()))
    corpus = read_table(f"{folder}/corpus.parquet", "corpus")
    train = corpus[corpus["split"] == "train"]
    candidates = read_table(f"{folder}/candidates.parquet", "candidates", corpus=corpus)
    shuffled = candidates.sample(frac=1, random_state=0)

    clicks = read_table(f"{folder}/clicks.parquet", "clicks")
    judged = read_table(f"{folder}/judgments.parquet", "judgments", split="train")
    clicked = candidates["query_id"].drop_duplicates().head(CLICKED_QUERIES)
    clicks = clicks[clicks["query_id"].isin([*clicked, *judged["query_id"]])]
    others = shuffled[shuffled["query_id"].isin(clicked)].groupby("query_id").head(OTHERS)
    weak = click_judgments(clicks, with_random_documents(others, train, 1))
    # Of the many documents of grade 0 as many as beside a click.
    others = judged[judged["label"] == 0].sample(frac=1, random_state=0).groupby("query_id").head(OTHERS + 1)
    labels = pd.concat([judged[judged["label"] > 0], others]).sort_values(["query_id", "doc_id"])
    pairs = pd.concat([candidates[candidates["rank"] <= FIRST], shuffled[shuffled["rank"] > FIRST]])
    pairs = pairs.groupby("query_id").head(FIRST + FURTHER).sort_values(["query_id", "rank"])

    write_table(clicks, f"{folder}/click_log.parquet")
    write_table(labels, f"{folder}/labels.parquet")
    write_table(pd.concat([weak, labels[weak.columns]]), f"{folder}/clicks_and_labels.parquet")
    write_table(with_random_documents(pairs, train, 1), f"{folder}/unlabelled.parquet")


def make_base_models(out: Path, seed: int) -> None:
    """A decoder and a BERT that know which words go together and where a word stands again, and nothing else."""
    if (out / "base" / "bert" / "config.json").exists():
        return
    print("\n== base: vocabularies and first weights, from the training side's documents", flush=True)
    corpus = read_table(f"{out}/data/corpus.parquet", "corpus")
    train = corpus[corpus["split"] == "train"]
    texts = (train["title"] + " " + train["summary"]).tolist()
    torch.manual_seed(seed)
    decoder_tokens = from_scratch.train_bpe(texts, vocab_size=4000, max_length=MAX_LENGTH)
    decoder = from_scratch.small_llama(decoder_tokens, layers=3, size=192, initializer_range=0.05)
    bert_tokens = from_scratch.train_wordpiece(texts, vocab_size=4000, max_length=MAX_LENGTH)
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    bert = from_scratch.small_bert(bert_tokens, layers=2, size=128, initializer_range=0.06, **no_dropout)
    for name, model, tokenizer in (("decoder", decoder, decoder_tokens), ("bert", bert, bert_tokens)):
        from_scratch.embed_by_svd(model, tokenizer, texts)
        from_scratch.match_words(model, tokenizer)
        tokenizer.save_pretrained(out / "base" / name)
        model.save_pretrained(out / "base" / name)


def stages(out: Path, configs: Path, decoder: str, bert: str) -> Iterator[tuple[str, str, list[str]]]:
    """Each stage's folder, recipe and command line, in order."""
    data = out / "data"

    def stage(name: str, recipe: str, config: str, *options: object) -> tuple[str, str, list[str]]:
        to = "--out" if recipe == "score" else "--output_dir"
        return name, recipe, ["--config", f"{configs}/{config}.yaml", *map(str, options), to, str(out / name)]

    def fit(name: str, config: str, start: str | Path, judgments: str) -> tuple[str, str, list[str]]:
        return stage(name, "fit_teacher", config, "--model_name_or_path", start, "--judgments", data / judgments)

    clicks = ["--clicks", data / "click_log.parquet", "--eval_clicks", data / "heldout_clicks.parquet"]
    yield stage("cpt", "cpt", "cpt", "--model_name_or_path", decoder, *clicks)
    yield fit("teacher", "teacher", out / "cpt", "clicks_and_labels.parquet")
    yield fit("teacher_no_cpt", "teacher", decoder, "clicks_and_labels.parquet")
    pairs = ["--pairs", data / "unlabelled.parquet"]
    yield stage("scores", "score", "score", "--model", out / "teacher", *pairs)
    yield stage("scores_no_cpt", "score", "score", "--model", out / "teacher_no_cpt", *pairs)
    both = ["--scores", out / "scores", "--more_scores", out / "scores_no_cpt"]
    yield stage("student", "distill", "distill", "--student", bert, *both)
    yield fit("click_student", "fit_student", bert, "clicks_and_labels.parquet")
    yield fit("label_student", "fit_student", bert, "labels.parquet")


def show_results(out: Path) -> None:
    """Measure every ranker on the development queries and show what there is to see."""
    print("\n== report: every ranker on the same development queries", flush=True)
    source = f"{out}/data/judgments.parquet"
    dev = read_table(source, "judgments", split="dev")
    corpus = read_table(f"{out}/data/corpus.parquet", "corpus")
    rankers = {name: Ranker.from_pretrained(out / name) for name in (*STUDENTS, *TEACHERS)}
    facts: dict[str, Any] = {"judgments": source, "split": "dev"}
    scores = bm25_scores(dev, corpus[corpus["split"] == "dev"])
    evaluations = {"bm25": Evaluation.of("bm25", dev.assign(score=scores), role="bm25", **facts)}
    for name, ranker in rankers.items():
        scores, speed = score_with(ranker, dev, progress=False)
        about = facts | describe(ranker) | {"source": str(out / name), "pairs_per_s": speed}
        evaluations[name] = Evaluation.of(name, dev.assign(score=scores), **about)
    evaluations["teachers"] = mean_of([evaluations[name] for name in TEACHERS], facts)
    report = out / "report"
    for name, evaluation in evaluations.items():
        evaluation.save(report / "eval" / f"{name}.json")
    shown = [evaluations[name] for name in SHOWN]
    save_json([summary(evaluation) for evaluation in shown], f"{report}/results.json")
    (report / "results.svg").write_text(results_picture(shown), encoding="utf-8")
    write_report(shown, report / "report.html", pairs=COMPARED, titles=TITLES)
    print("\n" + results_table([summary(evaluation) for evaluation in shown]))
    student, teachers = (summary(evaluations[name]) for name in ("student", "teachers"))
    kept, faster = (student[name] / teachers[name] for name in ("ndcg@10", "pairs_per_s"))
    print(f"\nThe distilled BERT has {kept:.0%} of its teachers' NDCG@10 at {faster:.1f} times their pairs/s.")
    show_method(out, evaluations)
    searches = search_examples(TYPED_QUERIES, corpus, rankers["student"])
    (report / "searches.txt").write_text("\n\n".join(searches) + "\n", encoding="utf-8")
    print(f"""
{searches[0]}

Open {report}/report.html: scores, curves, gains and losses. More searches are in {report}/searches.txt.

The student is a plain BERT classifier; sentence-transformers loads it as it is:

    from sentence_transformers import CrossEncoder
    ranker = CrossEncoder("{out}/student")
    print(ranker.rank("plot a histogram", ["smtplib: send mail", "numpy.histogram: bins of a data set"]))

Next, your own data: the same stages one by one, `disranker cpt --help` and so on; the README names the tables.""")


def mean_of(teachers: list[Evaluation], facts: dict[str, Any]) -> Evaluation:
    """What the student learned from: the teachers' mean score, at the price of both."""
    scores = np.mean([one.rows["score"] for one in teachers], axis=0)
    about = {"role": "teacher", "source": " + ".join(one.about["source"] for one in teachers)}  # as the student says
    about["parameters"] = sum(one.about["parameters"] for one in teachers)
    about["pairs_per_s"] = 1 / sum(1 / one.about["pairs_per_s"] for one in teachers)
    return Evaluation.of("teachers", teachers[0].rows.assign(score=scores), **facts, **about)


def summary(evaluation: Evaluation) -> dict[str, Any]:
    """What the table of results shows of a ranker."""
    measures, about = evaluation.measures, evaluation.about
    row = {"name": evaluation.name, "parameters": about.get("parameters"), "pairs_per_s": about.get("pairs_per_s")}
    return row | {kind: measures[kind] for kind in ("ndcg@5", "ndcg@10", "pnr", "intervals")}


def show_method(out: Path, evaluations: dict[str, Evaluation]) -> None:
    """What the stages did: the loss of the pre-training, who agrees with the teacher, who is better than whom."""
    losses = json.loads((out / "cpt" / "cpt.json").read_text())
    before, after = losses["loss_before"], losses["loss_after"]
    guess = np.log(AutoConfig.from_pretrained(out / "cpt").vocab_size)
    print(f"\nHeld-out loss on title + summary: {before:.2f} -> {after:.2f} nats per token (guessing: {guess:.2f}).")
    teachers = evaluations["teachers"].rows
    queries, scores = teachers["query_id"], teachers["score"]
    taus = {
        name: metrics.query_mean(metrics.kendall_tau(evaluations[name].rows["score"], scores, queries))
        for name in STUDENTS
    }
    shown = ", ".join(f"{name} {tau:.3f}" for name, tau in taus.items())
    print(f"Kendall tau with the teachers, mean over queries: {shown}.")
    print("NDCG@10, one less the other on the same queries (95% interval; p of a paired randomisation test, Holm):")
    compared = compare_evaluations([*evaluations.values()], pairs=COMPARED)
    for one in compared:
        names, (low, high) = f"{TITLES[one.first]:22} - {TITLES[one.second]:22}", one.interval
        print(f"  {names} {one.difference:+.3f}  [{low:+.3f}, {high:+.3f}]  p = {one.p:.4f}, {one.p_holm:.4f}")
    comparisons = [asdict(one) | {"rankers": [one.first, one.second]} for one in compared]
    save_json({"kendall_tau_with_teachers": taus, "ndcg@10": comparisons}, f"{out}/report/comparison.json")


def run_recipe(folder: Path, recipe: str, arguments: list[str], passing: list[str]) -> None:
    """Run a recipe as a stage of a longer run, unless it has finished before.

    Args:
        folder: the stage's; `finished.json` in it tells what ran.
        recipe: name of a module of `hf_disranker.recipes`.
        arguments: its command line, beginning with `--config FILE`. When they or the file change, the stage runs again
            from its beginning.
        passing: further arguments that change nothing about the result's meaning, such as the precision.
    """
    run = {"recipe": recipe, "arguments": arguments, "config": Path(arguments[1]).read_text()}
    finished = folder / "finished.json"
    if finished.exists() and json.loads(finished.read_text()).items() >= run.items():
        print(f"\n== {folder}: finished before, skipped", flush=True)
        return
    print(f"\n== {folder}: disranker {recipe} {' '.join(arguments)}", flush=True)
    started = folder / "started.json"
    if not started.exists() or json.loads(started.read_text()) != run:
        # Checkpoints of other options are no point to go on from.
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        save_json(run, str(started))
    begin = time.perf_counter()
    module = importlib.import_module(f"hf_disranker.recipes.{recipe}")
    module.main(*module.make_parser().parse_args_and_config(arguments + passing))
    save_json({**run, "seconds": round(time.perf_counter() - begin, 1)}, str(finished))


def fast_precision() -> list[str]:
    """Options that train in bf16 where the CPU multiplies clearly faster in it, else not; none where a GPU is."""
    if torch.accelerator.is_available():
        return []
    return ["--bf16", "true", "--use_cpu", "true"] if bf16_is_faster() else ["--bf16", "false"]


def bf16_is_faster() -> bool:
    """Whether the CPU multiplies clearly faster in bf16 than in fp32."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.randn(1024, 1024).to(dtype)
        seconds[dtype] = min(timeit.repeat("matrix @ matrix", globals={"matrix": matrix}, number=1, repeat=5))
    return 1.5 * seconds[torch.bfloat16] < seconds[torch.float32]


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
