"""Where a command may write: over nothing that it did not make."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

# What a model's folder holds, and what is written into one.
_MODEL_FILES = ("*.json", "*.safetensors", "*.bin", "*.txt", "*.jinja", "README.md", "onnx/*", "openvino/*")


def json_in(path: str | os.PathLike[str]) -> Any:
    """What a json file holds; None where there is no such file, or another kind of file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return None


def check_output(
    path: str | os.PathLike[str], is_ours: Callable[[Path], bool], inputs: Iterable[str | None] = ()
) -> None:
    """Refuse a file that the command may not write, before it begins its work; make the file's folder.

    Args:
        path: the file that will be written.
        is_ours: whether a file is an earlier output of the same command, which may be replaced.
        inputs: what the command reads: paths, or names of another kind.

    Raises:
        ValueError: the path is a folder, one of the inputs, or a file of another origin.
        OSError: the folder cannot be made or written to.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file to write.")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path.parent}: cannot be written to.")
    if not path.exists():
        return
    if any(os.path.exists(name) and path.samefile(name) for name in inputs if name):
        raise ValueError(f"{path} is read by this command and would be overwritten: choose another output.")
    if not is_ours(path):
        raise ValueError(f"{path} exists and was not written by this command: move it away or choose another output.")


def check_output_folder(path: str | os.PathLike[str], is_ours: bool, inputs: Iterable[str | None] = ()) -> None:
    """Refuse a folder whose model files would be overwritten and are not the command's own.

    Args:
        path: the folder that will be written to.
        is_ours: whether the command has written into it before.
        inputs: the models that the command reads: folders, or names of another kind.

    Raises:
        ValueError: an input is the folder or a checkpoint in it, or the folder holds files of another origin.
    """
    folder = Path(path).resolve()
    for name in filter(None, inputs):
        source = Path(name).resolve()
        in_it = source.parent == folder and source.name.startswith("checkpoint-")  # old checkpoints are removed
        if source.is_dir() and (source == folder or in_it):
            raise ValueError(f"{name} is read by this command and {path} would overwrite it: choose another folder.")
    foreign = [] if is_ours else sorted(file.name for pattern in _MODEL_FILES for file in folder.glob(pattern))
    if foreign:
        raise ValueError(
            f"{path} holds files that this command did not make, such as {foreign[0]}: choose another folder."
        )
