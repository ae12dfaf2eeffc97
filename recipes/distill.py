"""Stage 3b: distil a teacher's scores into a BERT, with mixed Point-MSE and Margin-MSE.

    disranker distill --student bert-base-uncased --student_layers 0,2,4,6,8,10 --scores runs/scores
              --judgments judgments.parquet --output_dir runs/student

`scores` is the folder that `disranker score` wrote, or any table with its columns; `judgments`, if given, measures
the student as it learns. A run that was cut off goes on from its last checkpoint.
"""

from dataclasses import dataclass, field

import numpy as np
from transformers import set_seed
from trl import TrlParser

from hf_disranker.data.sampling import KINDS, sample_documents
from hf_disranker.data.tables import load_groups, usual_split
from hf_disranker.models.checkpoint import load_config, load_tokenizer
from hf_disranker.models.hub import publish
from hf_disranker.models.student import BertDistilledRanker
from hf_disranker.scoring.store import teacher_of
from hf_disranker.training.distillation import DistillationConfig, DistillationTrainer
from hf_disranker.training.monitor import sample_groups, warn_shared_queries
from hf_disranker.training.runs import (
    check_output_dir,
    recipe_parser,
    resume_point,
    save_json,
    save_model,
    save_record,
)


@dataclass
class ScriptArguments:
    """What the stage reads."""

    student: str = field(metadata={"help": "A BERT to start from: folder or Hub id."})
    scores: str = field(metadata={"help": "Teacher scores: a score store, or a table of scores."})
    more_scores: list[str] = field(
        default_factory=list, metadata={"help": "Scores of further teachers over the same pairs: all are averaged."}
    )
    corpus: str | None = field(default=None, metadata={"help": "Table with the texts, if the scores have none."})
    streaming: bool = field(
        default=False, metadata={"help": "Read the scores as you go; they hold their texts. Needs --max_steps."}
    )
    document_sampling: str = field(
        default="all",
        metadata={
            "help": "Documents of a query to train on: all, the top, or stratified over the teacher's scores.",
            "choices": list(KINDS),
        },
    )
    documents_per_query: int = field(default=32, metadata={"help": "How many, unless all."})
    judgments: str | None = field(default=None, metadata={"help": "Judgments to evaluate on."})
    eval_split: str | None = field(
        default=None,
        metadata={"help": "Split to evaluate on, by default dev where there are splits; '' for all rows."},
    )
    student_layers: str | None = field(default=None, metadata={"help": "Layers to keep, from 0: for example 0,3,6,9."})
    revision: str = field(default="main", metadata={"help": "Revision of the student on the Hub."})
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention: sdpa, eager ..."})


def make_parser() -> TrlParser:
    """The command line of this stage."""
    return recipe_parser("distill", __doc__, ScriptArguments, DistillationConfig)


def main(script_args: ScriptArguments, training_args: DistillationConfig) -> None:
    """Read the scores, train, evaluate, save."""
    check_output_dir(training_args, script_args.student)
    load_config(script_args.student, revision=script_args.revision)  # a wrong name is seen before the tables are read
    sources = [script_args.scores, *script_args.more_scores]
    teachers = [teacher for teacher in map(teacher_of, sources) if teacher]
    source = sources if script_args.more_scores else script_args.scores
    train_dataset = load_groups(source, corpus=script_args.corpus, streaming=script_args.streaming)
    train_dataset = sample_documents(
        train_dataset, script_args.documents_per_query, script_args.document_sampling, training_args.seed
    )
    eval_dataset = None
    if script_args.judgments and training_args.eval_strategy != "no":
        eval_split = usual_split(script_args.judgments, script_args.eval_split, "dev")
        eval_dataset = load_groups(script_args.judgments, split=eval_split)
        warn_shared_queries(sample_groups(train_dataset)["query"], eval_dataset["query"])

    set_seed(training_args.seed)  # a new head is random: the same in every run and process
    tokenizer = load_tokenizer(script_args.student, revision=script_args.revision)
    student = BertDistilledRanker.from_pretrained(
        script_args.student,
        revision=script_args.revision,
        dtype=training_args.weights_dtype,
        attn_implementation=script_args.attn_implementation,
    )
    if script_args.student_layers:
        student.keep_layers([int(layer) for layer in script_args.student_layers.split(",")])
    if not student.config.marker.teacher and training_args.score_transform == "none":
        student.start_at(float(np.mean(np.concatenate(sample_groups(train_dataset)["teacher_scores"]))))
    several = {"id": " + ".join(str(teacher["id"]) for teacher in teachers), "revision": None}
    student.config.update_marker(teacher=several if len(teachers) > 1 else next(iter(teachers), None))

    trainer = DistillationTrainer(
        model=student,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=resume_point(training_args.output_dir))
    measures = trainer.evaluate() if eval_dataset else {}
    if trainer.is_world_process_zero():
        student = save_model(
            trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class, training_args.output_dir
        )
        if measures:
            save_json(measures, f"{training_args.output_dir}/eval.json")
        tables = {"corpus": script_args.corpus, "judgments": script_args.judgments}
        tables |= {f"scores_{number}": path for number, path in enumerate(sources)}
        save_record(training_args.output_dir, (script_args, training_args), tables)
        if training_args.push_to_hub:
            publish(trainer, student, trainer.processing_class)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
