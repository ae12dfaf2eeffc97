"""Command line of the recipes: dataclass fields as options, one spelling for one thing."""

from __future__ import annotations

import argparse
import copy
import inspect
from typing import Any

from trl import TrlParser

# Options of the libraries, and our name for them in every stage.
NAMES = {"model_name_or_path": "model", "output_dir": "out"}


def recipe_parser(stage: str, description: str | None, *arguments: type) -> TrlParser:
    """Build the parser of a recipe.

    Options come from a YAML file (`--config`) and the command line, which wins. The help has a group for model and
    output and one for each dataclass, ours before those of the libraries.

    Args:
        stage: Name of the stage, for the usage line.
        description: Text above the options.
        arguments: Dataclasses to parse into.
    """
    parser = RecipeParser(
        arguments,
        prog=f"disranker {stage}",
        usage=f"disranker {stage} [--config FILE.yaml] [--option value ...]",
        description=description,
        formatter_class=_Formatter,
    )
    bases = dict.fromkeys(base for kind in arguments for base in kind.__mro__ if inspect.get_annotations(base))
    owner = {name: base for base in reversed(bases) for name in inspect.get_annotations(base)}
    options = parser._optionals._group_actions
    if renamed := [action for action in options if action.dest in NAMES]:
        parser.add_argument_group("Model and output")._group_actions += renamed
        options[:] = [action for action in options if action.dest not in NAMES]
    for base in sorted(bases, key=lambda base: not _is_ours(base)):
        title = f"{base.__name__} of {_package(base)}"
        if _is_ours(base):
            title = (base.__doc__ or "").split("\n")[0].rstrip(".")
        group = parser.add_argument_group(title)
        group._group_actions += [action for action in options if owner.get(action.dest) is base]
    options[:] = [action for action in options if action.dest not in owner]
    return parser


class RecipeParser(TrlParser):
    """`TrlParser` with `--model` and `--out` for the libraries' names, which keep working in YAML files too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._dest_of: dict[str, str] = {}
        for action in self._actions:
            if name := NAMES.get(action.dest):
                action.option_strings = [f"--{name}", *action.option_strings]
                self._option_string_actions[f"--{name}"] = action
                action.metavar = name.upper()
                action.required = action.required or name == "model"
            if action.nargs != 0:
                self._dest_of |= {option.lstrip("-"): action.dest for option in action.option_strings}

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        """Accept as a key of the YAML file what the command line accepts as an option."""
        return super().set_defaults_with_config(**{self._dest_of.get(key, key): kwargs[key] for key in kwargs})


def _package(kind: type) -> str:
    return kind.__module__.split(".")[0]


def _is_ours(kind: type) -> bool:
    return _package(kind) in ("hf_disranker", "recipes", "__main__")


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keep the line breaks of the description; show defaults and the first spelling of an option."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.option_strings and action.option_strings[0].startswith("--"):
            action = copy.copy(action)
            action.option_strings = action.option_strings[:1]
        return super()._format_action_invocation(action)
