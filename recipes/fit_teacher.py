"""Stage 2: fit a ranker to graded judgments, with a pairwise hinge loss on each query's documents.

    disranker fit_teacher --model runs/cpt --judgments judgments.parquet --out runs/teacher
    disranker fit_teacher --model bert-base-uncased --student_layers 0,2,4,6,8,10 --judgments judgments.parquet
              --out runs/label_student

`judgments` is a table with the columns query_id, query, doc_id, title, summary, label and, optionally, split. A
decoder becomes a teacher that scores by its last token; an encoder becomes the baseline student without a teacher.
With `--use_peft`, LoRA weights and the score head are trained and merged at the end. An interrupted run resumes from
its last checkpoint.
"""

import logging
from dataclasses import dataclass, field

from datasets import Dataset
from transformers import set_seed
from trl import ModelConfig, get_peft_config, get_quantization_config

from hf_disranker.data.groups import load_groups
from hf_disranker.data.tables import usual_split
from hf_disranker.models.checkpoint import LABEL_EXPECTATION, load_config, load_tokenizer
from hf_disranker.models.families import is_encoder
from hf_disranker.models.loading import load_ranker_model
from hf_disranker.models.teacher import expect_labels
from hf_disranker.recipes.command_line import (
    GGUF_HELP,
    TEXT_HELP,
    RecipeParser,
    TableArguments,
    recipe_parser,
    run_stage,
)
from hf_disranker.recipes.runs import (
    check_output_dir,
    report_data,
    save_run,
    starting_config,
    train,
    warn_shared_queries,
)
from hf_disranker.training.ranking_trainer import RankingConfig, RankingTrainer

logger = logging.getLogger("hf_disranker")


@dataclass
class ScriptArguments(TableArguments):
    """Data, head and source of the model."""

    judgments: str = field(metadata={"help": "Table of judgments: file, URL, Hub data set id or BEIR folder."})
    train_split: str | None = field(
        default=None, metadata={"help": "Split to train on; default: train if there are splits. '' uses all rows."}
    )
    eval_judgments: str | None = field(
        default=None, metadata={"help": "Judgments to evaluate on, if in another table."}
    )
    eval_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on; default: dev if there are splits. '' uses all rows."}
    )
    head: str = field(
        default="last_token",
        metadata={"help": "Ranking head of a decoder.", "choices": ["last_token", LABEL_EXPECTATION]},
    )
    label_words: list[str] = field(
        default_factory=lambda: list("01234"),
        metadata={"help": "Words of the grades from 0 up for label_expectation, one token each."},
    )
    text_template: str | None = field(default=None, metadata={"help": TEXT_HELP})
    student_layers: str | None = field(
        default=None, metadata={"help": "Encoder layers of a student to keep, counted from 0, for example 0,3,6,9."}
    )
    gguf_file: str | None = field(default=None, metadata={"help": GGUF_HELP})


def make_parser() -> RecipeParser:
    """Return the argument parser of this stage."""
    return recipe_parser("fit_teacher", __doc__, ScriptArguments, RankingConfig, ModelConfig)


def main(script_args: ScriptArguments, training_args: RankingConfig, model_args: ModelConfig) -> None:
    """Read the judgments, train, evaluate, save."""
    check_output_dir(training_args, model_args.model_name_or_path)
    source = model_args.model_name_or_path
    where = {"revision": model_args.model_revision, "gguf_file": script_args.gguf_file}
    config = load_config(source, **where)  # before the tables are read
    config = starting_config(config, source, script_args.student_layers, script_args.text_template)
    train_dataset, eval_dataset = load_datasets(script_args, training_args)

    report_data("fit_teacher", train_dataset, eval_dataset)
    set_seed(training_args.seed)  # same new head in every run and process
    tokenizer = load_tokenizer(source, **where)
    if script_args.head == LABEL_EXPECTATION:
        config = expect_labels(config, tokenizer, script_args.label_words)
    model, tokenizer = load_ranker_model(
        source,
        config=config,
        tokenizer=tokenizer,
        new_head=True,
        **where,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        quantization_config=get_quantization_config(model_args),  # QLoRA: --load_in_4bit --use_peft
    )
    if script_args.student_layers:
        model.keep_layers([int(layer) for layer in script_args.student_layers.split(",")])
    model_args.lora_task_type = "SEQ_CLS"  # trains and saves the score head too

    trainer = RankingTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )
    measures = train(trainer)
    tables = {"judgments": script_args.judgments, "eval_judgments": script_args.eval_judgments}
    next_step = f"disranker score --model {training_args.output_dir} --pairs TABLE --out FOLDER"
    if is_encoder(config.model_type):
        next_step = f"disranker evaluate --model {training_args.output_dir} --judgments {script_args.judgments}"
        next_step += f" --columns {script_args.columns}" if script_args.columns else ""
    save_run(trainer, (script_args, training_args, model_args), tables, measures, next_step)


def load_datasets(script_args: ScriptArguments, training_args: RankingConfig) -> tuple[Dataset, Dataset | None]:
    """Load the judgments to train and to evaluate on; a table without splits is not evaluated on."""
    columns = script_args.column_names()
    train_split = usual_split(script_args.judgments, script_args.train_split, "train", columns)
    train_dataset = load_groups(script_args.judgments, split=train_split, columns=columns)
    if training_args.eval_strategy == "no":
        return train_dataset, None
    eval_judgments = script_args.eval_judgments or script_args.judgments
    eval_split = usual_split(eval_judgments, script_args.eval_split, "dev", columns)
    if script_args.eval_judgments is None and eval_split is None:
        logger.warning("%s has no splits: training on all rows, without evaluation.", script_args.judgments)
        training_args.eval_strategy = "no"
        return train_dataset, None
    eval_dataset = load_groups(eval_judgments, split=eval_split, columns=columns)
    warn_shared_queries(train_dataset["query"], eval_dataset["query"])
    return train_dataset, eval_dataset


if __name__ == "__main__":
    run_stage("fit_teacher", make_parser, main)
