"""Command line of the recipes: groups, defaults and spellings of the options."""

import importlib

import pytest

from hf_disranker.recipes import distill

REQUIRED = {"cpt": ["--clicks", "c"], "fit_teacher": ["--judgments", "j"], "distill": ["--scores", "s"]}


def parse(recipe, *arguments):
    parser = importlib.import_module(f"hf_disranker.recipes.{recipe}").make_parser()
    parsed = parser.parse_args_and_config([*map(str, arguments), *REQUIRED[recipe], "--use_cpu", "true"])
    values = {name: value for part in parsed for name, value in vars(part).items()}
    return values.get("model") or values["model_name_or_path"], values["output_dir"]


def test_help_groups_the_options_and_shows_defaults():
    text = distill.make_parser().format_help()
    titles = ["Student and data:", "Options of the distillation:", "Training options of the ranking stages:"]
    places = [text.index(f"\n{title}\n") for title in [*titles, "TrainingArguments of transformers:"]]
    assert places == sorted(places)
    assert places[0] < text.index("--more_scores") < places[1] < text.index("--kl_weight") < places[2]
    assert places[2] < text.index("--token_budget") < places[3] < text.index("--adam_beta1")
    assert text.count("--kl_weight KL_WEIGHT") == 1
    assert "order. (default: 0.5)" in " ".join(text.split())
    assert "--max_query_length MAX_QUERY_LENGTH" in text and "--max-query-length" not in text


@pytest.mark.parametrize("recipe", REQUIRED)
def test_model_and_out_have_one_name_in_all_stages_and_keep_their_old_ones(recipe, tmp_path):
    old = "student" if recipe == "distill" else "model_name_or_path"
    for model, out in (("model", "out"), (old, "output_dir"), (old.replace("_", "-"), "output-dir")):
        assert parse(recipe, f"--{model}", "m", f"--{out}", "o") == ("m", "o")
        (tmp_path / "config.yaml").write_text(f"{model}: m\n{out}: o\n")
        assert parse(recipe, "--config", tmp_path / "config.yaml") == ("m", "o")
        assert parse(recipe, "--config", tmp_path / "config.yaml", "--out", "other") == ("m", "other")
    text = importlib.import_module(f"hf_disranker.recipes.{recipe}").make_parser().format_help()
    assert "--model MODEL" in text and "--out OUT" in text
    assert f"--{old} " not in text and "--output_dir " not in text


@pytest.mark.parametrize("recipe", REQUIRED)
def test_a_model_is_required(recipe, capsys):
    with pytest.raises(SystemExit):
        parse(recipe, "--out", "o")
    assert "required: --model" in capsys.readouterr().err
