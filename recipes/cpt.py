"""Stage 1: continued pre-training of a language model on clicks: query in, clicked title + summary out.

    disranker cpt --model_name_or_path Qwen/Qwen3-0.6B-Base --clicks clicks.parquet --output_dir runs/cpt

`clicks` is a table with the columns query, title, summary. The loss is on title and summary only. With `--use_peft`
LoRA weights are trained and merged at the end. A run that was cut off goes on from its last checkpoint.
"""

import math
from dataclasses import dataclass, field

from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, TrlParser, get_peft_config

from hf_disranker.cpt import ClickTrainer, CptConfig, click_dataset
from hf_disranker.data import read_table
from hf_disranker.runs import recipe_parser, resume_point, save_json, save_model


@dataclass
class ScriptArguments:
    """What the stage reads."""

    clicks: str = field(metadata={"help": "Table of clicks: file, URL or Hub data set id."})
    eval_clicks: str | None = field(default=None, metadata={"help": "Held-out clicks, to measure the loss on."})
    eval_rows: int = field(default=1000, metadata={"help": "Held-out clicks that are used at most."})


def make_parser() -> TrlParser:
    """The command line of this stage."""
    return recipe_parser("cpt", __doc__, ScriptArguments, CptConfig, ModelConfig)


def main(script_args: ScriptArguments, training_args: CptConfig, model_args: ModelConfig) -> None:
    """Read the clicks, train, measure the held-out loss before and after, save."""
    clicks = read_table(script_args.clicks, "clicks")
    held_out = (
        read_table(script_args.eval_clicks, "clicks")[: script_args.eval_rows] if script_args.eval_clicks else None
    )
    if held_out is None:
        training_args.eval_strategy = "no"

    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, revision=model_args.model_revision)
    model = AutoModelForCausalLM.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
    )
    max_length = training_args.max_length or tokenizer.model_max_length
    train_dataset = click_dataset(clicks, tokenizer, max_length)
    eval_dataset = click_dataset(held_out, tokenizer, max_length) if held_out is not None else None
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))

    trainer = ClickTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )
    before = trainer.evaluate()["eval_loss"] if eval_dataset else None
    trainer.train(resume_from_checkpoint=resume_point(training_args.output_dir))
    after = trainer.evaluate()["eval_loss"] if eval_dataset else None
    if trainer.is_world_process_zero():
        save_model(trainer.accelerator.unwrap_model(trainer.model), tokenizer, training_args.output_dir)
        if before is not None and after is not None:
            losses = {"loss_before": before, "loss_after": after}
            perplexity = {"perplexity_before": math.exp(before), "perplexity_after": math.exp(after)}
            save_json(losses | perplexity, f"{training_args.output_dir}/cpt.json")


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
