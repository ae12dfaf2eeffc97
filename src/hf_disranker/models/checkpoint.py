"""Checkpoint format of rankers: the marker in config.json, config classes, and plain loading errors.

On disk a ranker is a stock `<Family>ForSequenceClassification` with one label, so every loader and server reads it
without this package. The key `disranker` of its config.json is a `Marker`.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import HfApi
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GgufConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.peft_utils import find_adapter_config_file

from hf_disranker.data.templates import STUDENT_TEMPLATES, TEACHER_TEMPLATES, Templates
from hf_disranker.models.families import MARKER

FORMAT = 1
LABEL_EXPECTATION = "label_expectation"
HEADS = {"student": "cls", "teacher": "last_token"}  # by default
# Without it, CrossEncoder and vLLM apply a sigmoid to a single label.
RAW_LOGITS = {"activation_fn": "torch.nn.modules.linear.Identity"}
_LOCATION = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "gguf_file")


@dataclass(frozen=True)
class Marker:
    """Description of a ranker, stored as a json object under the key `disranker` of config.json.

    Args:
        role: "student" or "teacher".
        head: "cls" for a student, "last_token" or "label_expectation" for a teacher.
        templates: How a query and a document become the model's input.
        format: Version of this description.
        max_length: Maximum number of tokens of an input; None for the default of `Ranker`.
        max_query_length: Maximum number of tokens of a query; None for the default of `Ranker`.
        score_transform: Affine transform of the teacher's scores, `{"scale", "shift"}`; None for raw scores.
        teacher: `{"id", "revision"}` of the teacher that a student was distilled from.
        ending: Text that ends each input in place of the end-of-sequence token (label_expectation).
        label_tokens: Token ids of the grades (label_expectation).
        grades: Grade of each label token (label_expectation).
    """

    role: str
    head: str
    templates: Templates
    format: int = FORMAT
    max_length: int | None = None
    max_query_length: int | None = None
    score_transform: dict[str, Any] | None = None
    teacher: dict[str, Any] | None = None
    ending: str | None = None
    label_tokens: list[int] | None = None
    grades: list[float] | None = None

    @classmethod
    def from_dict(cls, content: Any, role: str) -> Marker:
        """Read the json object of a config.

        Args:
            content: Value of the key `disranker`.
            role: Role that the model has by its family.

        Raises:
            ValueError: If it is no such object, has a newer format, or describes a model of another role.
        """
        if not isinstance(content, dict):
            raise ValueError(f"The key {MARKER} of config.json is {content!r}, not the description of a ranker.")
        if content.get("format", 0) > FORMAT:
            raise ValueError(
                f"The checkpoint's marker has format {content['format']}, this package supports up to {FORMAT}: "
                "pip install --upgrade hf-disranker"
            )
        if content.get("role", role) != role:
            raise ValueError(f"This checkpoint is a {content['role']}, not a {role}.")
        default = STUDENT_TEMPLATES if role == "student" else TEACHER_TEMPLATES
        values = {field.name: content[field.name] for field in fields(cls) if field.name in content}
        try:
            values["templates"] = Templates(**values["templates"]) if "templates" in values else default
        except TypeError as error:
            raise ValueError(f"The templates in the key {MARKER} of config.json cannot be read: {error}.") from error
        for limit in ("max_length", "max_query_length"):
            if not isinstance(values.get(limit, 1), int | None):
                raise ValueError(f"{limit} in the key {MARKER} of config.json is {values[limit]!r}, not an integer.")
        return cls(**{"role": role, "head": HEADS[role]} | values)

    def to_dict(self) -> dict[str, Any]:
        """Return the json object; optional keys are left out where they are None."""
        content = asdict(self) | {"templates": self.templates.to_dict()}
        return {key: value for key, value in content.items() if value is not None or key == "score_transform"}


@dataclass
class RankerOutput(SequenceClassifierOutput):
    """Output of a sequence classifier with one label, with `scores`."""

    @property
    def scores(self) -> Tensor:
        """Raw logits, shape (rows,), fp32."""
        return self.logits.squeeze(-1).float()


class RankerConfigMixin:
    """Config of a marked checkpoint, mixed in before the stock class; `to_dict` writes the stock architecture."""

    stock: type[PreTrainedConfig]
    architecture: str
    role: str
    disranker: dict[str, Any]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read a config as transformers does.

        A config without a marker is returned as the stock config. So is a marked one of another architecture, or with
        several labels: it belongs to a model that was saved out of a ranker.

        Raises:
            ValueError: If the config is of another family, or its marker is invalid.
        """
        found = config_dict.get("model_type", cls.stock.model_type)
        if found != cls.stock.model_type:
            raise ValueError(
                f"This checkpoint contains a {found} model; {cls.architecture} reads {cls.stock.model_type}."
            )
        if MARKER not in config_dict:
            return cls.stock.from_dict(config_dict, **kwargs)
        head = Marker.from_dict(config_dict[MARKER], cls.role).head
        labels = kwargs.get("num_labels") or len(config_dict.get("id2label") or "ab")
        architecture = cls.architecture_of(head)
        if architecture is None:
            raise ValueError(_claims(labels, head, cls.role))
        if labels != 1 or (config_dict.get("architectures") or [architecture]) != [architecture]:
            return cls.stock.from_dict(config_dict, **kwargs)
        for reference in (config_dict.get("auto_map") or {}).values():
            if "--" in str(reference):
                raise ValueError(
                    f"The checkpoint's auto_map names code of another repository ({reference}). Refused: a ranker "
                    "needs no such code. Remove auto_map from its config.json if you trust the weights."
                )
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]

    @classmethod
    def architecture_of(cls, head: str) -> str | None:
        """Return the stock class that stores a model with this head; None for an unknown head."""
        if cls.role == "teacher" and head == LABEL_EXPECTATION:
            return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[cls.stock.model_type]
        return cls.architecture if head == HEADS[cls.role] else None

    @classmethod
    def mark(cls, config: PreTrainedConfig) -> Any:
        """Return the ranker config of a stock one, with a new marker and one label; a ranker config is kept.

        Raises:
            ValueError: If the config is of another family, or is a ranker's with several labels.
        """
        if isinstance(config, cls):
            return config
        if config.model_type != cls.stock.model_type:
            raise ValueError(f"A {config.model_type} config; {cls.architecture} needs {cls.stock.model_type}.")
        if hasattr(config, MARKER) and config.num_labels != 1:
            raise ValueError(_claims(config.num_labels, Marker.from_dict(config.disranker, cls.role).head, cls.role))
        config = copy.deepcopy(config)
        # Only the class changes: what transformers keeps on the object (dtype, attention) stays.
        config.__class__ = cls
        config.num_labels = 1
        config.sentence_transformers = dict(RAW_LOGITS)
        marker = Marker.from_dict({}, cls.role)
        # A language model that was pre-trained on clicks keeps its template.
        if templates := getattr(config, "click_templates", None):
            marker = replace(marker, templates=Templates(**templates))
        config.disranker = marker.to_dict()
        return config

    @property
    def marker(self) -> Marker:
        """The marker, read from `disranker`; change it by `update_marker`."""
        return Marker.from_dict(self.disranker, self.role)

    def update_marker(self, **changes: Any) -> None:
        """Set fields of the marker."""
        self.disranker = replace(self.marker, **changes).to_dict()

    def to_dict(self) -> dict[str, Any]:
        """Return the config as plain data; `architectures` names a stock class, and there is no `auto_map`."""
        marker = getattr(self, MARKER, {})  # transformers compares with instances that have no marker
        content = super().to_dict()  # type: ignore[misc]
        architectures = content.get("architectures") or [""]
        if not hasattr(transformers, architectures[0]):  # not a stock class: a ranker class
            content["architectures"] = [self.architecture_of(marker.get("head", HEADS[self.role]))]
        content.pop("auto_map", None)
        return content


def _claims(labels: int, head: str, role: str) -> str:
    return (
        f"The config claims a ranker, which has one label and the head {HEADS[role]}, and says {labels} labels and "
        f"the head {head}: it was changed by hand or belongs to other weights."
    )


def hub_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return those keywords of a model's `from_pretrained` that its config and its tokenizer take too."""
    return {key: options[key] for key in _LOCATION if key in options}


def load_config(name: str | os.PathLike, **hub: Any) -> Any:
    """Load a checkpoint's config by `AutoConfig`.

    Args:
        name: Folder or Hub id.
        hub: Keywords of `hub_options`.

    Raises:
        OSError: If there is no such folder, Hub repository or GGUF file.
        ValueError: If it is a folder of LoRA weights, or the marker is invalid; if the package gguf is missing for a
            GGUF file, or transformers cannot read it.
    """
    if hub.get("gguf_file") and not importlib.util.find_spec("gguf"):
        raise ValueError(f"Reading {hub['gguf_file']} needs the package gguf: pip install 'hf-disranker[gguf]'")
    with _plain_errors(name, hub):
        return AutoConfig.from_pretrained(name, **hub)


def load_tokenizer(name: str | os.PathLike, **hub: Any) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer by `AutoTokenizer`; arguments and errors as in `load_config`."""
    with _plain_errors(name, hub):
        return AutoTokenizer.from_pretrained(name, **hub)


def load_weights(load: Callable[..., Any], name: str | os.PathLike, *args: Any, **options: Any) -> tuple[Any, Any]:
    """Load a model, from safetensors unless told otherwise, with plain errors.

    Args:
        load: Stock `from_pretrained`.
        name: Folder or Hub id; None for weights from a state dict.
        args: Further arguments of `load`.
        options: Keywords of `load`. With `gguf_file` the weights are dequantized, and the model can be trained and
            saved like any other.

    Returns:
        The model and its loading info.

    Raises:
        OSError: If there is no such folder or Hub repository, or the weights are pickles or damaged.
        ValueError: If the weights do not fit, or a GGUF file is to be quantized.
    """
    options.setdefault("use_safetensors", True)
    if options.get("gguf_file"):
        if options.get("quantization_config"):
            raise ValueError(f"{options['gguf_file']} is dequantized; it cannot be loaded in 4 or 8 bits.")
        # By default a model is marked as quantized, so that it cannot be trained or saved.
        options["quantization_config"] = GgufConfig(dequantize=True)
    with _plain_errors(name, options):
        return load(name, *args, output_loading_info=True, **options)


@contextlib.contextmanager
def _plain_errors(name: str | os.PathLike, options: dict[str, Any]) -> Iterator[None]:
    """Turn loading errors of a known cause into plain ones.

    Args:
        name: Folder or Hub id; None for weights from a state dict.
        options: Keywords of transformers' `from_pretrained`.
    """
    try:
        yield
    except Exception as error:  # many kinds, by version and by source
        if name is not None:
            _explain_weights(error, name, options)
            _explain_absence(error, name)
        if isinstance(error, ValueError) and options.get("gguf_file"):
            raise ValueError(f"{options['gguf_file']} of {name} cannot be read: {error}") from error
        raise


def _explain_absence(error: Exception, name: str | os.PathLike) -> None:
    """Raise a plain error for a name without a model, or with LoRA weights alone; return in any other case."""
    if (base := adapter_base(name)) is not None:
        raise ValueError(
            f"{name} contains an adapter (LoRA) of {base} without the model itself. Merge them first: save the result "
            f"of merge_and_unload() of PeftModel.from_pretrained(LLMForLastTokenRanking.from_pretrained({base!r}), "
            f"{str(name)!r}) with its tokenizer, and use that folder."
        ) from error
    if not os.path.isdir(name) and isinstance(error, OSError) and "no such folder" not in str(error):
        raise OSError(f"{name}: no such folder, and as a Hub id: {str(error).splitlines()[0]}") from error


def adapter_base(name: str | os.PathLike) -> str | None:
    """Return the base model of a checkpoint that has LoRA weights and no model; None for any other name."""
    if Path(name, "config.json").exists():
        return None
    try:
        path = find_adapter_config_file(os.fspath(name))
    except OSError:  # no folder and no Hub id
        return None
    if path is None:
        return None
    return json.loads(Path(path).read_text(encoding="utf-8")).get("base_model_name_or_path") or "BASE_MODEL"


def _explain_weights(error: Exception, name: str | os.PathLike, options: dict[str, Any]) -> None:
    """Raise a plain error for weights that are damaged, pickles or do not fit; return in any other case."""
    if isinstance(error, SafetensorError):
        raise OSError(
            f"The weights of {name} cannot be read ({error}): the file is truncated or damaged. Download it "
            "again, with force_download=True, or copy it again."
        ) from error
    if isinstance(error, RuntimeError) and "mismatch" in str(error):
        config = load_config(name, **hub_options(options))
        if config.num_labels != 1 and str(config.architectures).endswith("ForSequenceClassification']"):
            raise ValueError(
                f"{name} is a classifier with {config.num_labels} labels; a ranker has one score. To train a new head "
                f"on its layers, save them alone: AutoModel.from_pretrained({str(name)!r}).save_pretrained(FOLDER), "
                "with the tokenizer."
            ) from error
        raise ValueError(f"The weights of {name} do not fit what its config claims: {error}") from error
    files = _files(name, options) if options.get("use_safetensors") and isinstance(error, OSError) else []
    pickles = [file for file in files if file.endswith((".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack"))]
    if pickles and not any(file.endswith(".safetensors") for file in files):
        raise OSError(
            f"{name} has its weights as {pickles[0]} and not as safetensors. Refused, since reading a pickle can "
            "run code. If you trust it: load it with use_safetensors=False, and save_pretrained writes safetensors."
        ) from error


def _files(name: str | os.PathLike, options: dict[str, Any]) -> list[str]:
    if os.path.isdir(name):
        return os.listdir(name)
    try:
        return HfApi(token=options.get("token")).list_repo_files(os.fspath(name), revision=options.get("revision"))
    except Exception:  # from transport, client or Hub; the first error says more
        return []
