"""Write the help of every stage to recipes/help, where `disranker STAGE --help` reads it without importing torch."""

from hf_disranker.cli import STAGES, help_file, load_stage

if __name__ == "__main__":
    for stage in STAGES:
        help_file(stage).write_text(load_stage(stage).make_parser().format_help(), encoding="utf-8")
