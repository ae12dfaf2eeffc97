"""Stage 3b: distil a teacher's scores into an encoder such as BERT, with mixed Point-MSE and Margin-MSE.

    disranker distill --model bert-base-uncased --student_layers 0,2,4,6,8,10 --scores runs/scores
              --judgments judgments.parquet --out runs/student

`scores` is a folder written by `disranker score`, or any table with the same columns. If `judgments` are given, the
student is evaluated on them during training. With `labels` it learns from graded queries too, mixed with the scored
ones, by the losses on labels (`--hinge_weight 1`). An interrupted run resumes from its last checkpoint.
"""

from dataclasses import dataclass, field

from datasets import Dataset, IterableDataset, concatenate_datasets
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, set_seed

from hf_disranker.data.groups import SAMPLINGS, load_groups, sample_documents
from hf_disranker.data.tables import usual_split
from hf_disranker.models.checkpoint import load_config
from hf_disranker.models.loading import RankerModel, load_ranker_model
from hf_disranker.recipes.command_line import TEXT_HELP, RecipeParser, TableArguments, recipe_parser, run_stage
from hf_disranker.recipes.runs import (
    check_output_dir,
    report_data,
    save_run,
    starting_config,
    train,
    warn_shared_queries,
)
from hf_disranker.scoring.store import teacher_of
from hf_disranker.training.distillation import LABEL_LOSSES, DistillationConfig, DistillationTrainer
from hf_disranker.training.monitor import sample_groups


@dataclass
class ScriptArguments(TableArguments):
    """Student and data."""

    model: str = field(
        metadata={
            "help": "Encoder to start from, such as BERT, or a decoder: folder or Hub id.",
            "aliases": ["--student"],
        }
    )
    scores: str = field(metadata={"help": "Teacher scores: score store or table."})
    more_scores: list[str] = field(
        default_factory=list, metadata={"help": "Scores of more teachers for the same pairs, averaged with the first."}
    )
    corpus: str | None = field(default=None, metadata={"help": "Table of the texts, if the scores have none."})
    streaming: bool = field(
        default=False, metadata={"help": "Read the scores while training; they need texts. Requires --max_steps."}
    )
    document_sampling: str = field(
        default="all",
        metadata={
            "help": "Documents of a query to train on: all, the top, or stratified over the teacher's scores.",
            "choices": list(SAMPLINGS),
        },
    )
    documents_per_query: int = field(default=32, metadata={"help": "Number of sampled documents per query."})
    labels: str | None = field(
        default=None,
        metadata={
            "help": "Judgments to train on too, in the same batches: --hinge_weight, --ranknet_weight or "
            "--softmax_weight weighs them. Its split train, if it has splits."
        },
    )
    judgments: str | None = field(default=None, metadata={"help": "Judgments to evaluate on."})
    eval_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on; default: dev if there are splits. '' uses all rows."}
    )
    student_layers: str | None = field(
        default=None, metadata={"help": "Encoder layers to keep, counted from 0, for example 0,3,6,9."}
    )
    text_template: str | None = field(default=None, metadata={"help": TEXT_HELP})
    model_revision: str = field(
        default="main", metadata={"help": "Revision of the model on the Hub.", "aliases": ["--revision"]}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention implementation: sdpa, eager ..."}
    )


def make_parser() -> RecipeParser:
    """Return the argument parser of this stage."""
    return recipe_parser("distill", __doc__, ScriptArguments, DistillationConfig)


def main(script_args: ScriptArguments, training_args: DistillationConfig) -> None:
    """Read the scores, train, evaluate, save."""
    check_output_dir(training_args, script_args.model)
    config = load_config(script_args.model, revision=script_args.model_revision)  # before the tables are read
    config = starting_config(config, script_args.model, script_args.student_layers, script_args.text_template)
    sources = [script_args.scores, *script_args.more_scores]
    teachers = [teacher for teacher in map(teacher_of, sources) if teacher]
    source = sources if script_args.more_scores else script_args.scores
    columns = script_args.column_names()
    train_dataset = load_groups(source, corpus=script_args.corpus, streaming=script_args.streaming, columns=columns)
    if "teacher_scores" not in (train_dataset.column_names or ["teacher_scores"]):
        raise ValueError(f"{script_args.scores} has no column teacher_score; `disranker score` writes it.")
    train_dataset = sample_documents(
        train_dataset, script_args.documents_per_query, script_args.document_sampling, training_args.seed
    )
    eval_dataset = None
    if script_args.judgments and training_args.eval_strategy != "no":
        eval_split = usual_split(script_args.judgments, script_args.eval_split, "dev", columns)
        eval_dataset = load_groups(script_args.judgments, split=eval_split, columns=columns)

    if script_args.labels:
        train_dataset = with_labelled(train_dataset, script_args.labels, training_args, columns)
    if eval_dataset is not None:
        warn_shared_queries(sample_groups(train_dataset)["query"], eval_dataset["query"])
    report_data("distill", train_dataset, eval_dataset)
    student, tokenizer = load_student(script_args, training_args, config)
    several = {"id": " + ".join(str(teacher["id"]) for teacher in teachers), "revision": None}
    student.config.update_marker(teacher=several if len(teachers) > 1 else next(iter(teachers), None))

    trainer = DistillationTrainer(
        model=student,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
    )
    measures = train(trainer)
    tables = {"corpus": script_args.corpus, "labels": script_args.labels, "judgments": script_args.judgments}
    tables |= {f"scores_{number}": path for number, path in enumerate(sources)}
    next_step = f"disranker evaluate --model {training_args.output_dir} --judgments {script_args.judgments or 'TABLE'}"
    next_step += f" --columns {script_args.columns}" if script_args.judgments and script_args.columns else ""
    save_run(trainer, (script_args, training_args), tables, measures, next_step)


def with_labelled(
    groups: Dataset | IterableDataset, labels: str, training_args: DistillationConfig, columns: dict[str, str]
) -> Dataset:
    """Add the queries of a table of judgments, without teacher scores, to the scored ones, without labels.

    A query in both is two groups: each loss has its own documents of it.

    Raises:
        ValueError: If the scores are streamed, or no loss on labels has a weight.
    """
    if not isinstance(groups, Dataset):
        raise ValueError("--labels needs the scores in memory: leave out --streaming.")
    weights = training_args.loss_weights()
    if not any(weights[name] for name in LABEL_LOSSES):
        raise ValueError("--labels needs the weight of a loss on labels, such as --hinge_weight 1; all of them are 0.")
    labelled = load_groups(labels, split=usual_split(labels, None, "train", columns), columns=columns)
    if "labels" in groups.column_names:
        groups = groups.remove_columns("labels")
    return concatenate_datasets([groups, labelled])


def load_student(
    script_args: ScriptArguments, training_args: DistillationConfig, config: PreTrainedConfig
) -> tuple[RankerModel, PreTrainedTokenizerBase]:
    """Load the model to start from, with the chosen layers, and its tokenizer."""
    set_seed(training_args.seed)  # same new head in every run and process
    student, tokenizer = load_ranker_model(
        script_args.model,
        config=config,
        new_head=True,
        revision=script_args.model_revision,
        dtype=training_args.weights_dtype,
        attn_implementation=script_args.attn_implementation,
    )
    if script_args.student_layers:
        student.keep_layers([int(layer) for layer in script_args.student_layers.split(",")])
    return student, tokenizer


if __name__ == "__main__":
    run_stage("distill", make_parser, main)
