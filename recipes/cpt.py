"""Stage 1: continued pre-training of a language model on clicks: query in, clicked title + summary out.

    disranker cpt --model Qwen/Qwen3-0.6B-Base --clicks clicks.parquet --out runs/cpt

`clicks` is a table with the columns query, title, summary and, optionally, weight and users. Duplicate rows are
merged, and a row is repeated according to its weight. The loss covers title and summary only. With `--use_peft`, LoRA
weights are trained and merged at the end. An interrupted run resumes from its last checkpoint.
"""

import logging
import math
from dataclasses import dataclass, field

from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import ModelConfig, get_peft_config, get_quantization_config

from hf_disranker.data.tables import read_table
from hf_disranker.data.templates import TEACHER_TEMPLATES, Templates
from hf_disranker.models.checkpoint import load_config
from hf_disranker.models.checks import check_length, position_limit
from hf_disranker.models.families import is_encoder
from hf_disranker.models.loading import load_language_model
from hf_disranker.recipes.command_line import GGUF_HELP, RecipeParser, TableArguments, recipe_parser, run_stage
from hf_disranker.recipes.runs import check_output_dir, save_run, train
from hf_disranker.training.cpt import ClickTrainer, CptConfig, click_dataset, click_losses, prepare_clicks

logger = logging.getLogger("hf_disranker")


@dataclass
class ScriptArguments(TableArguments):
    """Data and source of the model."""

    clicks: str = field(metadata={"help": "Table of clicks: file, URL or Hub data set id."})
    min_users: int = field(default=0, metadata={"help": "Drop queries of fewer users; needs a column users."})
    text_template: str = field(
        default=str(TEACHER_TEMPLATES.text), metadata={"help": "Text of a click; the teacher keeps the template."}
    )
    eval_clicks: str | None = field(default=None, metadata={"help": "Held-out clicks for the evaluation loss."})
    eval_rows: int = field(default=1000, metadata={"help": "Maximum number of held-out clicks."})
    gguf_file: str | None = field(default=None, metadata={"help": GGUF_HELP})


def make_parser() -> RecipeParser:
    """Return the argument parser of this stage."""
    return recipe_parser("cpt", __doc__, ScriptArguments, CptConfig, ModelConfig)


def main(script_args: ScriptArguments, training_args: CptConfig, model_args: ModelConfig) -> None:
    """Read the clicks, train, measure the held-out loss before and after, save."""
    check_output_dir(training_args, model_args.model_name_or_path)
    where = {"revision": model_args.model_revision, "gguf_file": script_args.gguf_file}
    config = load_config(model_args.model_name_or_path, **where)
    if is_encoder(config.model_type):
        raise ValueError(
            f"{model_args.model_name_or_path} is a {config.model_type}: cpt trains a decoder, such as Qwen3."
        )
    check_length(config, training_args.max_length or 1)  # before the tables are read
    templates = Templates(text=script_args.text_template)
    templates.prompt("")  # refuses a text without a query to start from
    columns = script_args.column_names()
    clicks = read_table(script_args.clicks, "clicks", columns=columns)
    clicks = prepare_clicks(clicks, script_args.min_users, training_args.seed)
    held_out = None
    if script_args.eval_clicks:
        held_out = read_table(script_args.eval_clicks, "clicks", columns=columns)[: script_args.eval_rows]

    set_seed(training_args.seed)  # same new LoRA weights in every run and process
    model, tokenizer = load_model(model_args, script_args.gguf_file)
    model.config.click_templates = templates.to_dict()
    limit = position_limit(config) or tokenizer.model_max_length
    max_length = training_args.max_length or min(tokenizer.model_max_length, limit)
    train_dataset = click_dataset(clicks, tokenizer, max_length, templates)
    cut = sum(len(ids) == max_length for ids in train_dataset["input_ids"])
    logger.info("cpt: training on %d clicks, %d of them truncated to %d tokens.", len(train_dataset), cut, max_length)
    if left_out := len(clicks) - len(train_dataset):
        logger.warning("%d clicks are left out: their queries alone have %d tokens or more.", left_out, max_length)
    eval_dataset = click_dataset(held_out, tokenizer, max_length, templates) if held_out is not None else None

    trainer = ClickTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )

    def losses(moment: str, measures: dict[str, float]) -> dict[str, float]:
        if held_out is None:
            return {}
        parts = click_losses(trainer.model, tokenizer, held_out, max_length, templates)
        return {f"loss_{moment}": measures["eval_loss"]} | {f"{part}_loss_{moment}": parts[part] for part in parts}

    measures = losses("before", trainer.evaluate() if held_out is not None else {})
    measures |= losses("after", train(trainer))
    tables = {"clicks": script_args.clicks, "eval_clicks": script_args.eval_clicks}
    next_step = f"disranker fit_teacher --model {training_args.output_dir} --judgments TABLE --out FOLDER"
    measures |= {name.replace("loss", "perplexity"): math.exp(loss) for name, loss in measures.items()}
    save_run(trainer, (script_args, training_args, model_args), tables, measures, next_step, "cpt.json")


def load_model(
    model_args: ModelConfig, gguf_file: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the language model and its tokenizer."""
    return load_language_model(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        gguf_file=gguf_file,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        quantization_config=get_quantization_config(model_args),  # QLoRA: --load_in_4bit --use_peft
    )


if __name__ == "__main__":
    run_stage("cpt", make_parser, main)
