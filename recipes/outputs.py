"""Output files: no command overwrites files that it did not write."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

# Files of a model folder.
_MODEL_FILES = ("*.json", "*.safetensors", "*.bin", "*.txt", "*.jinja", "README.md", "onnx/*", "openvino/*")


def json_in(path: str | os.PathLike[str]) -> Any:
    """Load a json file; None if it does not exist or is not json."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return None


def save_json(content: Any, path: str, default: Callable[[Any], Any] | None = None) -> None:
    """Write indented json atomically, creating the folder; inf and nan, which json lacks, become null.

    `default` converts what json cannot store, as in `json.dumps`.
    """
    from hf_disranker.data.files import write_atomically  # imports pandas; reading json does without

    content = json.loads(json.dumps(content, default=default), parse_constant=lambda _: None)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    write_atomically(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def made_by(path: str | os.PathLike[str], command: str) -> bool:
    """Return True if a file is json with the name of the command as `made_by`."""
    content = json_in(path)
    return isinstance(content, dict) and content.get("made_by") == command


def check_output(
    path: str | os.PathLike[str], is_ours: Callable[[Path], bool], inputs: Iterable[str | None] = ()
) -> None:
    """Check that a command may write a file, and create its folder.

    An existing file must be none of the command's inputs, which are paths, Hub ids or None, and `is_ours` must return
    True for it: the same command wrote it.

    Raises:
        ValueError: If the path is a folder, one of the inputs, or a file that the command did not write.
        OSError: If the folder cannot be created or written to.
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
    """Check that a command may write a model into a folder; `is_ours` if it has written there before.

    Raises:
        ValueError: If an input is the folder or one of its checkpoints, or the folder has other model files.
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
            f"{path} has files that this command did not write, such as {foreign[0]}: choose another folder."
        )
