"""Stage 2: fit a ranker to graded judgments, with a pairwise hinge loss on each query's documents.

    disranker fit_teacher --model_name_or_path runs/cpt --judgments judgments.parquet --output_dir runs/teacher

`judgments` is a table with the columns query_id, query, doc_id, title, summary, label and, if it holds both, split.
A decoder becomes a teacher that scores by its last token; a BERT becomes the baseline student that never saw a
teacher. With `--use_peft` LoRA weights and the score row are trained and merged at the end. A run that was cut off
goes on from its last checkpoint.
"""

import logging
from dataclasses import dataclass, field

from transformers import set_seed
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from hf_disranker.data.tables import load_groups, usual_split
from hf_disranker.models.checkpoint import LABEL_EXPECTATION, load_config, load_tokenizer
from hf_disranker.models.hub import publish
from hf_disranker.models.loading import load_ranker_model
from hf_disranker.models.teacher import expect_labels
from hf_disranker.training.monitor import warn_shared_queries
from hf_disranker.training.ranking_trainer import RankingConfig, RankingTrainer
from hf_disranker.training.runs import (
    check_output_dir,
    recipe_parser,
    resume_point,
    save_json,
    save_model,
    save_record,
)

logger = logging.getLogger("hf_disranker")


@dataclass
class ScriptArguments:
    """What the stage reads."""

    judgments: str = field(metadata={"help": "Table of judgments: file, URL, Hub data set id or BEIR folder."})
    train_split: str | None = field(
        default=None, metadata={"help": "Split to train on, by default train where there are splits; '' for all rows."}
    )
    eval_judgments: str | None = field(
        default=None, metadata={"help": "Judgments to evaluate on, if in another table."}
    )
    eval_split: str | None = field(
        default=None,
        metadata={"help": "Split to evaluate on, by default dev where there are splits; '' for all rows."},
    )
    head: str = field(
        default="last_token",
        metadata={"help": "How a decoder scores a text.", "choices": ["last_token", LABEL_EXPECTATION]},
    )
    label_words: list[str] = field(
        default_factory=lambda: list("01234"),
        metadata={"help": "With label_expectation: the word of each grade from 0 up, one token each."},
    )


def make_parser() -> TrlParser:
    """The command line of this stage."""
    return recipe_parser("fit_teacher", __doc__, ScriptArguments, RankingConfig, ModelConfig)


def main(script_args: ScriptArguments, training_args: RankingConfig, model_args: ModelConfig) -> None:
    """Read the judgments, train, evaluate, save."""
    check_output_dir(training_args, model_args.model_name_or_path)
    source, revision = model_args.model_name_or_path, model_args.model_revision
    config = load_config(source, revision=revision)  # a wrong name is seen before the tables are read
    train_split = usual_split(script_args.judgments, script_args.train_split, "train")
    train_dataset = load_groups(script_args.judgments, split=train_split)
    eval_dataset = None
    if training_args.eval_strategy != "no":
        eval_judgments = script_args.eval_judgments or script_args.judgments
        eval_split = usual_split(eval_judgments, script_args.eval_split, "dev")
        if script_args.eval_judgments is None and eval_split is None:
            logger.warning("%s has no splits: trained on as a whole, without evaluation.", script_args.judgments)
            training_args.eval_strategy = "no"
        else:
            eval_dataset = load_groups(eval_judgments, split=eval_split)
            warn_shared_queries(train_dataset["query"], eval_dataset["query"])

    set_seed(training_args.seed)  # a new head is random: the same in every run and process
    tokenizer = load_tokenizer(source, revision=revision)
    if script_args.head == LABEL_EXPECTATION:
        config = expect_labels(config, tokenizer, script_args.label_words)
    model, tokenizer = load_ranker_model(
        source,
        config=config,
        tokenizer=tokenizer,
        new_head=True,
        revision=revision,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        quantization_config=get_quantization_config(model_args),  # QLoRA: --load_in_4bit --use_peft
    )
    model_args.lora_task_type = "SEQ_CLS"  # trains and keeps the score row too

    trainer = RankingTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=resume_point(training_args.output_dir))
    measures = trainer.evaluate() if eval_dataset else {}
    if trainer.is_world_process_zero():
        model = save_model(
            trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class, training_args.output_dir
        )
        if measures:
            save_json(measures, f"{training_args.output_dir}/eval.json")
        tables = {"judgments": script_args.judgments, "eval_judgments": script_args.eval_judgments}
        save_record(training_args.output_dir, (script_args, training_args, model_args), tables)
        if training_args.push_to_hub:
            publish(trainer, model, trainer.processing_class)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
