"""Command line of the recipes: help, defaults, spellings and errors of the options."""

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hf_disranker import cli
from hf_disranker.recipes import distill, score

REQUIRED = {"cpt": ["--clicks", "c"], "fit_teacher": ["--judgments", "j"], "distill": ["--scores", "s"]}
HEAVY = ("torch", "transformers", "trl", "pandas", "datasets")


def parser_of(recipe):
    return importlib.import_module(f"hf_disranker.recipes.{recipe}").make_parser()


def parse(recipe, *arguments):
    parsed = parser_of(recipe).parse_args_and_config([*map(str, arguments), *REQUIRED[recipe], "--use_cpu", "true"])
    values = {name: value for part in parsed for name, value in vars(part).items()}
    return values.get("model") or values["model_name_or_path"], values["output_dir"]


def test_help_shows_required_options_first_then_ours_and_leaves_the_libraries_to_help_all():
    text = distill.make_parser().format_help()
    titles = ["Required", "Output", "Student and data", "Options of the distillation"]
    titles += ["Training options of the ranking stages", "Options of all training stages", "Help and configuration"]
    places = [text.index(f"\n{title}:\n") for title in titles]
    assert places == sorted(places)
    assert places[0] < text.index("  --model MODEL") < text.index("  --scores SCORES") < places[1]
    assert places[2] < text.index("  --more_scores SCORES ...") < places[3] < text.index("  --kl_weight X") < places[4]
    assert "(default: 0.5)" in text and "(default: None)" not in text and "(default: False)" not in text
    assert "--max_query_length N" in text and "--max-query-length" not in text and "--no_" not in text
    assert "adam_beta1" not in text and "such as --num_train_epochs" in text
    everything = distill.make_parser().format_help(everything=True)
    assert everything.index("TrainingArguments of transformers:") < everything.index("  --adam_beta1 X")


@pytest.mark.parametrize("stage", cli.STAGES)
def test_stored_help_matches_the_code(stage):
    text = cli.load_stage(stage).make_parser().format_help()
    assert cli.help_file(stage).read_text(encoding="utf-8") == text, "out of date: run `make help-texts`"
    assert str(Path.cwd()) not in text


def test_help_of_every_stage_imports_nothing_heavy():
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        assert name.split(".")[0] not in {HEAVY}, name
sys.meta_path.insert(0, Refuse())
from hf_disranker import cli
for stage in (None, *cli.STAGES):
    cli.main([stage, "--help"] if stage else ["--help"])
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert all(f"\nusage: disranker {stage} [--config" in ended.stdout for stage in cli.STAGES)


@pytest.mark.slow
def test_help_takes_less_than_a_second():
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "hf_disranker.cli", "distill", "--help"], check=True, capture_output=True)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("recipe", REQUIRED)
def test_model_and_out_have_one_name_in_all_stages_and_keep_their_old_ones(recipe, tmp_path):
    old = "student" if recipe == "distill" else "model_name_or_path"
    for model, out in (("model", "out"), (old, "output_dir"), (old.replace("_", "-"), "output-dir")):
        assert parse(recipe, f"--{model}", "m", f"--{out}", "o") == ("m", "o")
        (tmp_path / "config.yaml").write_text(f"{model}: m\n{out}: o\n")
        assert parse(recipe, "--config", tmp_path / "config.yaml") == ("m", "o")
        assert parse(recipe, "--config", tmp_path / "config.yaml", "--out", "other") == ("m", "other")
    text = parser_of(recipe).format_help()
    assert "--model MODEL" in text and "--out OUT" in text
    assert f"--{old} " not in text and "--output_dir " not in text


@pytest.mark.parametrize("recipe", REQUIRED)
def test_a_model_is_required(recipe, capsys):
    with pytest.raises(SystemExit):
        parse(recipe, "--out", "o")
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"disranker {recipe}: the following arguments are required: --model"
    assert second == f"Options: disranker {recipe} --help"


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("--lr", " Did you mean --learning_rate?"),
        ("--scors", " Did you mean --scores?"),
        ("--judgment=j", " Did you mean --judgments?"),
        ("--margin-wieght", " Did you mean --margin_weight?"),
        ("--zzz", ""),
    ],
)
def test_an_unknown_option_names_the_likely_one(option, meant, capsys, tmp_path):
    name, value = option.split("=")[0], 1
    (tmp_path / "config.yaml").write_text(f"{name[2:]}: {value}\n")
    for arguments, where in (([option, value], ""), (["--config", tmp_path / "config.yaml"], "config.yaml: ")):
        with pytest.raises(SystemExit) as end:
            parse("distill", "--model", "m", *arguments)
        assert end.value.code == 2
        assert f"{where}there is no option {name}.{meant}\n" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", ""])
def test_a_config_file_is_a_mapping_of_options(text, capsys, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(SystemExit):
        parse("distill", "--config", tmp_path / "config.yaml")
    assert "config.yaml" in capsys.readouterr().err.splitlines()[0]


def test_a_config_file_sets_lists_numbers_and_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("A_VARIABLE", "old")
    config = tmp_path / "config.yaml"
    config.write_text(
        "env: {A_VARIABLE: 3}\nmodel: m\npairs: p\nout: o\ntolerance: 1e-2\nverify: yes\nshard_rows: 5\n"
    )
    (args,) = score.make_parser().parse_args_and_config([f"--config={config}"])
    assert (args.tolerance, args.verify, args.shard_rows) == (0.01, True, 5)
    assert os.environ["A_VARIABLE"] == "3"
    config.write_text("more_scores: t\n")
    args, _ = distill.make_parser().parse_args_and_config(["--config", str(config), "--model", "m", "--scores", "s"])
    assert args.more_scores == ["t"]


def test_a_value_without_an_option_is_quoted_back(capsys):
    with pytest.raises(SystemExit):
        score.make_parser().parse_args_and_config(["--columns", "query=search", "title=product", "--out", "o"])
    assert "'title=product' belongs to no option; a value with spaces needs quotes." in capsys.readouterr().err


def test_columns_may_be_separated_as_a_chinese_keyboard_does():
    names = score.ScoreArguments(columns="query=查询，title=标题").column_names()
    assert names == {"query": "查询", "title": "标题"}
