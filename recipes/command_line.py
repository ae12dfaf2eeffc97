"""Command line of the recipes: dataclass fields as options, one spelling for one thing."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import logging
import os
import re
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml
from transformers.hf_argparser import HfArgumentParser, string_to_bool
from transformers.utils import logging as library

# Options of the libraries, and our name for them in every stage.
NAMES = {"model_name_or_path": "model", "output_dir": "out"}
_HELP = {
    "model_name_or_path": "Model to start from: folder or Hub id.",
    "output_dir": "Folder for the model and its checkpoints.",
}
# Options of the libraries that the short help names.
_COMMON = (
    *("num_train_epochs", "max_steps", "gradient_accumulation_steps", "bf16", "seed", "report_to", "push_to_hub"),
    *("use_peft", "lora_r", "lora_target_modules", "load_in_4bit", "dtype", "attn_implementation"),
)
# What users of other libraries type for an option.
_HABITS = {"lr": "learning_rate", "epochs": "num_train_epochs", "batch_size": "per_device_train_batch_size"}
_WIDTH = 96
GGUF_HELP = "GGUF file of the model, in its folder or Hub repository; its weights are dequantized."
TEXT_HELP = "Text that a decoder reads, with {query} and {document} in any order. Default: the model's."
# Extras by the package that the libraries name when they miss it.
EXTRAS = {"bitsandbytes": "qlora"}
# Messages of transformers: new heads and embeddings, which a stage trains, and file systems without exact times.
_NOISE = ("LOAD REPORT", "new embeddings will be initialized", "new lm_head weights", "mtime may not be reliable")


@dataclass(kw_only=True)
class TableArguments:
    """Tables with other column names."""

    columns: str | None = field(
        default=None, metadata={"help": "Columns as OURS=YOURS, for example query=search_term,title=product_name."}
    )

    def __post_init__(self) -> None:
        self.column_names()  # refuse a mistake early

    def column_names(self) -> dict[str, str]:
        """Return the table's name of each of our columns."""
        pairs = [pair.partition("=") for pair in re.split("[,，]", str(self.columns or "")) if pair.strip()]
        names = {ours.strip(): theirs.strip() for ours, _, theirs in pairs}
        if len(names) < len(pairs) or not all(names) or not all(names.values()):
            raise ValueError(f"--columns is OURS=YOURS,OURS=YOURS with each of ours once, got {self.columns!r}.")
        return names


def recipe_parser(stage: str, description: str | None, *arguments: type) -> RecipeParser:
    """Build the parser of a recipe.

    Options come from a YAML file (`--config`) and the command line, which wins. `--help` shows required options first,
    then a group for each of our dataclasses; `--help-all` adds the options of the libraries.

    Args:
        stage: Name of the stage, for the usage line.
        description: Text above the options.
        arguments: Dataclasses to parse into.
    """
    return RecipeParser(
        arguments,
        prog=f"disranker {stage}",
        usage=f"disranker {stage} [--config FILE.yaml] [--option value ...]",
        description=description,
        formatter_class=_Formatter,
        add_help=False,
        allow_abbrev=False,
    )


class RecipeParser(HfArgumentParser):
    """`HfArgumentParser` with YAML files, a short help, and `--model` and `--out` for the libraries' names."""

    _more: str | None = None

    def __init__(self, dataclass_types: Sequence[type], **kwargs: Any) -> None:
        super().__init__(dataclass_types, **kwargs)
        fields = (one for kind in dataclass_types for one in dataclasses.fields(kind))
        made: dict[str, Any] = {one.name: one.default_factory for one in fields}
        for action in self._actions:
            if action.nargs == "?" and made[action.dest] is not dataclasses.MISSING:
                action.default = made[action.dest]()  # HfArgumentParser sets a bool to False
            _simplify(action)
            if name := NAMES.get(action.dest):
                self._option_string_actions[f"--{name}"] = action
                action.option_strings, action.metavar = [f"--{name}"], name.upper()
                action.required, action.help = action.required or name == "model", _HELP[action.dest]
        options = list(self._actions)
        self.add_argument("--config", metavar="FILE.yaml", help="Read options from this file.")
        self.add_argument("-h", "--help", action=_Help, help="Show this help.")
        self._group(options)

    def _group(self, options: list[argparse.Action]) -> None:
        """Put required options first, then those of each dataclass, ours before the libraries'."""
        first = sorted((one for one in options if one.required), key=lambda one: one.dest not in NAMES)
        groups = {"Required": first, "Output": [one for one in options if one.dest in NAMES and not one.required]}
        placed = [*first, *groups["Output"]]
        left = {one.dest: one for one in options if one not in placed and one.help != argparse.SUPPRESS}
        theirs = {}
        for kind in (kind for parsed in self.dataclass_types for kind in parsed.__mro__):
            actions = [left.pop(name) for name in inspect.get_annotations(kind) if name in left]
            if actions and _is_ours(kind.__module__):
                groups[(kind.__doc__ or "").split("\n")[0].rstrip(".")] = actions
            elif actions:
                theirs[f"{kind.__name__} of {kind.__module__.split('.')[0]}"] = actions
        self._theirs = {*theirs}
        about = "Show the options of the libraries too." if self._theirs else argparse.SUPPRESS
        self.add_argument("--help-all", action=_Help, help=about)
        groups["Help and configuration"] = [action for action in self._actions if action not in options]
        self._optionals._group_actions.clear()
        for title, actions in (groups | theirs).items():
            self.add_argument_group(title)._group_actions += actions
        found = {action.dest for actions in theirs.values() for action in actions}
        if common := [f"--{name}" for name in _COMMON if name in found]:
            self._more = textwrap.fill(f"--help-all adds the libraries' options, such as {', '.join(common)}.", _WIDTH)

    def format_help(self, everything: bool = False) -> str:
        """Return the help with our options, or with all."""
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, [])
        formatter.add_text(self.description)
        for group in self._action_groups:
            if everything or group.title not in self._theirs:
                formatter.start_section(group.title)
                formatter.add_arguments(group._group_actions)
                formatter.end_section()
        formatter.add_text(None if everything else self._more)
        return formatter.format_help()

    def parse_args_and_config(self, args: Sequence[str] | None = None) -> tuple[Any, ...]:
        """Parse the command line and the YAML file that it names into the dataclasses.

        Args:
            args: Command line; None uses that of this process.

        Raises:
            OSError: If the YAML file cannot be read.
            SystemExit: If an option is unknown, missing or has a wrong value; the message is on stderr.
        """
        args = list(sys.argv[1:] if args is None else args)
        config = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        config.add_argument("--config")
        known, args = config.parse_known_args(args)
        if known.config:
            self._read_config(known.config)
        *parsed, unknown = self.parse_args_into_dataclasses(
            args, return_remaining_strings=True, look_for_args_file=False
        )
        if unknown and not unknown[0].startswith("-"):
            self.error(f"'{unknown[0]}' belongs to no option; a value with spaces needs quotes.")
        if unknown:
            self.error(self._unknown(unknown[0].split("=")[0]))
        return tuple(part for part in parsed if not isinstance(part, argparse.Namespace))

    def error(self, message: str) -> NoReturn:
        """Exit with a plain line."""
        print(f"{self.prog}: {message}\nOptions: {self.prog} --help", file=sys.stderr)
        sys.exit(2)

    def _read_config(self, path: str) -> None:
        """Take the values of a YAML file as defaults; its key `env` sets environment variables."""
        with open(path, encoding="utf-8") as file:
            try:
                values = yaml.safe_load(file)
            except yaml.YAMLError as error:
                self.error(f"{path} is not YAML: {error}")
        if not isinstance(values, dict):
            self.error(f"{path} must contain lines of `option: value`.")
        os.environ.update({name: str(value) for name, value in values.pop("env", {}).items()})
        for name, value in values.items():
            action = self._option_string_actions.get(f"--{name}")
            if action is None or action.nargs == 0:
                self.error(f"{path}: {self._unknown(str(name))}")
            action.default = [value] if action.nargs == "+" and isinstance(value, str) else value
            action.required = False

    def _unknown(self, name: str) -> str:
        """Describe an option that does not exist, with those that it may mean."""
        if not name.startswith("-"):
            name = f"--{name}"
        plain, options = name.lstrip("-").replace("-", "_"), [action.option_strings[0][2:] for action in self._actions]
        close = [_HABITS[plain]] if _HABITS.get(plain) in options else []
        close += [option for option in options if option.startswith(plain)] if len(plain) > 2 else []
        close = close or difflib.get_close_matches(plain, options, 1, 0.7)
        meant = f" Did you mean {' or '.join(f'--{option}' for option in dict.fromkeys(close[:3]))}?" if close else ""
        return f"there is no option {name}.{meant}"


def _simplify(action: argparse.Action) -> None:
    """Show one spelling of an option, and a short name for its value; the others still parse."""
    name = action.option_strings[0]
    if name.startswith("--no_"):
        action.help = argparse.SUPPRESS
    action.option_strings = [name]
    if action.type is string_to_bool:
        action.metavar, action.nargs, action.const = "true|false", "?", True  # `bool | None` lacks the last two
    elif not action.choices:
        last = action.dest.rsplit("_", 1)[-1].upper()
        action.metavar = "N" if action.type is int else "X" if action.type is float else last


def _is_ours(module: str) -> bool:
    return module.split(".")[0] in ("hf_disranker", "recipes", "__main__")


class _Help(argparse.Action):
    """Print the short help, or all of it."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:  # noqa: A002
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        print(parser.format_help(everything=option_string == "--help-all"), end="")
        parser.exit()


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keep the line breaks of the description; show defaults that say something."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=_WIDTH)

    def _get_help_string(self, action: argparse.Action) -> str:
        text, value = action.help or "", action.default
        if action.required or value is None or value is False or value in ("", []) or _explains_default(action):
            return text
        shown = " ".join(map(str, value)) if isinstance(value, list) else str(getattr(value, "value", value))
        shown = shown.replace("\n", "\\n").replace("%", "%%")
        return f"{text} (default: {shown})" if value != argparse.SUPPRESS else text

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.nargs == "?" and (not action.default or _explains_default(action)):
            return ""  # a flag
        if action.nargs == "+":
            return f"{action.metavar} ..."
        return "true|false" if action.nargs == "?" else super()._format_args(action, default_metavar)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return super()._format_action_invocation(action).rstrip()


def _explains_default(action: argparse.Action) -> bool:
    return "; default:" in (action.help or "")


def run_stage(stage: str, make_parser: Callable[[], RecipeParser], main: Callable[..., Any]) -> None:
    """Run a stage with the options in sys.argv; report an invalid option, table, path or checkpoint in one line."""
    set_up_logging()
    try:
        options = make_parser().parse_args_and_config()
    except (ValueError, OSError) as error:
        sys.exit(f"disranker {stage}: {error}")
    try:
        main(*options)
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) or _raised_here(error):
            sys.exit(f"disranker {stage}: {error}")
        raise
    except ImportError as error:
        if extra := next((extra for name, extra in EXTRAS.items() if name in str(error).lower()), None):
            sys.exit(f"disranker {stage}: {str(error).splitlines()[0]} Or: pip install hf-disranker[{extra}]")
        raise


def set_up_logging() -> None:
    """Show our messages as plain lines; silence messages of the libraries that do not concern users.

    Missing heads or weights that must not be new raise an error in this package.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if os.environ.get("RANK", "0") == "0":
        for name in ("hf_disranker", "__main__"):  # the latter is a recipe under `accelerate launch`
            logging.getLogger(name).setLevel(logging.INFO)
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler: each line would be printed twice
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # set to DEBUG by its import
    library.disable_progress_bar()  # of loading and saving weights; those of training are kept
    for handler in (*logging.getLogger("transformers").handlers, *logging.getLogger().handlers):
        handler.addFilter(_is_relevant)
    if "datasets" in sys.modules:
        from datasets import disable_progress_bars

        disable_progress_bars()


def _is_relevant(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in _NOISE)


def _raised_here(error: ValueError) -> bool:
    """Return whether our code raised the error; errors of other libraries keep their traceback."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return _is_ours(frame.f_globals["__name__"])
