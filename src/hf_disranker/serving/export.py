"""Export a ranker to other formats, each checked against the ranker before it is written."""

from __future__ import annotations

import copy
import json
import logging
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers
from huggingface_hub import ModelCard

from hf_disranker.data.tables import pair_texts
from hf_disranker.data.templates import Templates
from hf_disranker.evaluation import metrics
from hf_disranker.evaluation.significance import changed_tops
from hf_disranker.models.card import model_card
from hf_disranker.models.families import is_decoder
from hf_disranker.models.hub import check_padding
from hf_disranker.models.ranker import Ranker
from hf_disranker.models.student import BertDistilledRanker
from hf_disranker.runtime import FILES
from hf_disranker.runtime import Ranker as LightRanker

logger = logging.getLogger(__name__)

Predict = Callable[[Sequence[tuple[str, dict[str, str]]]], np.ndarray]

_OPSET, _IR_VERSION = 18, 8  # read by onnxruntime 1.14 and later
logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns about operators of packages that are not installed
_TOLERANCE = 1e-3  # largest allowed difference of a raw score
_HEADING = "\n\n## Exports\n\n"
_TABLE = """\
Compared with the ranker in PyTorch on the same pairs and machine, in alternation.

| format | pairs | largest difference | Kendall tau | same first | NDCG@10 | pairs/s | |
|---|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Parity:
    """Comparison of an exported format with the ranker; means are over queries."""

    pairs: int
    max_difference: float  # of raw scores
    tau: float  # mean Kendall tau
    top1: float  # share of queries with the same first document
    ndcg_change: float | None  # mean change of NDCG@10; None without labels
    pairs_per_s: list[float]  # of each round
    ranker_pairs_per_s: list[float]

    @property
    def verdict(self) -> str:
        """Summary in words, which claims no more than was measured."""
        new, old = self.pairs_per_s, self.ranker_pairs_per_s
        same = "same scores" if self.max_difference <= _TOLERANCE and self.top1 == 1 else "different scores"
        speed = (
            "faster" if min(new) > max(old) else "slower" if max(new) < min(old) else "no clear difference in speed"
        )
        return f"{same}, {speed} ({np.median(new) / np.median(old):.2f} times the pairs/s)"


def export(ranker: Ranker, source: str, file_format: str, out: str, rows: pd.DataFrame) -> Parity:
    """Export a ranker if its scores in the new format equal its own.

    Args:
        ranker: Ranker in fp32 on the CPU.
        source: Folder or Hub id that it was loaded from; its model card is extended.
        file_format: "cross-encoder", "onnx", "openvino" or "vllm".
        out: Folder to write to; other formats in it are kept.
        rows: Pairs to compare on: query_id, query, title, summary and, for NDCG, label.

    Raises:
        ValueError: If the format does not suit the model, needs a package that is missing, or changes the scores.
    """
    role, family = ranker.model.config.marker.role, ranker.model.config.model_type
    if (file_format == "vllm") != (role == "teacher"):
        raise ValueError(f"{source} is a {role}: vllm is the format for teachers, the others are for students.")
    if file_format not in formats(family):
        raise ValueError(f"{source} is a {family} model: {file_format} is for BERT students; choose cross-encoder.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "export")
        write_checkpoint(ranker, folder, weights=file_format in ("cross-encoder", "vllm"))
        try:
            predict = write_format(file_format, ranker, folder)
        except ImportError as error:
            raise ValueError(f"{error}: pip install hf-disranker[onnx] or hf-disranker[openvino]") from error
        parity = compare(ranker.predict, predict, rows)
        if parity.max_difference > _TOLERANCE:
            raise ValueError(f"Nothing was written: {file_format} changes the scores too much: {asdict(parity)}")
        write_figures(ranker, source, folder, out, file_format, parity)
        shutil.copytree(folder, out, dirs_exist_ok=True)
    return parity


def formats(model_type: str) -> tuple[str, ...]:
    """Return the formats that a ranker of a family can be exported to."""
    if is_decoder(model_type):
        return ("vllm",)
    return ("cross-encoder", "onnx", "openvino") if model_type == "bert" else ("cross-encoder",)


def compare(old: Predict, new: Predict, rows: pd.DataFrame) -> Parity:
    """Score the rows with both, in alternation."""
    pairs, queries = pair_texts(rows), rows["query_id"].to_numpy()
    speeds: dict[str, list[float]] = {"old": [], "new": []}
    scores: dict[str, np.ndarray] = {}
    for predict in (old, new):
        predict(pairs[:256])
    for name, predict in [("old", old), ("new", new)] * 3:
        start = time.perf_counter()
        scores[name] = predict(pairs)
        speeds[name].append(round(len(pairs) / (time.perf_counter() - start), 1))
    change = None
    if "label" in rows.columns:
        ndcg = {key: metrics.ndcg(rows["label"].to_numpy(), values, queries, k=10) for key, values in scores.items()}
        change = metrics.query_mean(ndcg["new"] - ndcg["old"])
    return Parity(
        pairs=len(pairs),
        max_difference=float(np.abs(scores["new"] - scores["old"]).max()),
        tau=metrics.query_mean(metrics.kendall_tau(scores["new"], scores["old"], queries)),
        top1=1 - changed_tops(scores["old"], scores["new"], queries, k=1),
        ndcg_change=change,
        pairs_per_s=speeds["new"],
        ranker_pairs_per_s=speeds["old"],
    )


def write_checkpoint(ranker: Ranker, folder: Path, weights: bool) -> None:
    """Write config and tokenizer for stock loaders, with or without the weights."""
    model, collator = ranker.model, ranker.collator
    # The light runtime has no defaults.
    model.config.update_marker(max_length=collator.max_length, max_query_length=collator.max_query_length)
    collator.tokenizer.model_max_length = collator.max_length
    collator.tokenizer.backend_tokenizer.no_truncation()  # else the settings of the last call are saved
    collator.tokenizer.backend_tokenizer.no_padding()
    (model if weights else model.config).save_pretrained(folder)
    collator.tokenizer.save_pretrained(folder)
    if isinstance(model, BertDistilledRanker):
        words = sorted(collator.tokenizer.get_vocab().items(), key=lambda entry: entry[1])
        (folder / "vocab.txt").write_text("".join(f"{word}\n" for word, _ in words), encoding="utf-8")


def write_format(file_format: str, ranker: Ranker, folder: Path) -> Predict:
    """Write a format next to a checkpoint of `write_checkpoint`; return its scoring function."""
    writers = {"cross-encoder": write_cross_encoder, "onnx": write_onnx, "openvino": write_openvino}
    return writers.get(file_format, write_vllm)(ranker, folder)


def write_cross_encoder(ranker: Ranker, folder: Path) -> Predict:
    """Score with sentence-transformers; the checkpoint needs no further file."""
    from sentence_transformers import CrossEncoder

    model, templates = CrossEncoder(str(folder), device="cpu"), ranker.collator.templates

    def predict(pairs: Sequence[tuple[str, dict[str, str]]]) -> np.ndarray:
        texts = [(templates.render_query(query), templates.render_document(**document)) for query, document in pairs]
        return model.predict(texts, show_progress_bar=False)

    return predict


def write_onnx(ranker: Ranker, folder: Path) -> Predict:
    """Write the graph in ONNX, in fp32."""
    (folder / FILES[0]).parent.mkdir(exist_ok=True)
    (folder / FILES[0]).write_bytes(onnx_model(ranker).SerializeToString())
    return LightRanker(folder, FILES[0]).predict


def write_openvino(ranker: Ranker, folder: Path) -> Predict:
    """Write the graph in the OpenVINO format, in fp32."""
    import openvino

    with tempfile.TemporaryDirectory() as name:
        Path(name, "model.onnx").write_bytes(onnx_model(ranker).SerializeToString())
        openvino.save_model(openvino.convert_model(f"{name}/model.onnx"), folder / FILES[1], compress_to_fp16=False)
    return LightRanker(folder, FILES[1]).predict


def write_vllm(ranker: Ranker, folder: Path) -> Predict:
    """Write the chat template that renders the roles query and document; score with the stock class."""
    model, collator = ranker.model, ranker.collator
    check_padding(model.config)
    if not hasattr(model, "score"):
        raise ValueError("A label-expectation teacher has no score row: vLLM cannot serve it as a ranker.")
    template = score_template(collator.templates)
    (folder / "score_template.jinja").write_text(template, encoding="utf-8")
    stock = getattr(transformers, model.config.architecture).from_pretrained(folder).eval()

    @torch.inference_mode()
    def score(query: str, document: dict[str, str]) -> float:
        contents = {"query": query, "document": collator.templates.render_document(**document)}
        roles = [{"role": role, "content": content} for role, content in contents.items()]
        text = collator.tokenizer.apply_chat_template(roles, chat_template=template, tokenize=False)
        inputs = collator.tokenizer(text, truncation=True, max_length=collator.max_length, return_tensors="pt")
        return stock(inputs["input_ids"], inputs["attention_mask"]).logits[0, 0].item()

    return lambda pairs: np.array([score(*pair) for pair in pairs], dtype=np.float32)


def score_template(templates: Templates) -> str:
    """Return the Jinja template with which vLLM renders query and document as in training."""
    content = "{{ (messages | selectattr('role', 'eq', 'ROLE') | first).content }}"
    query = templates.query.replace("{query}", content.replace("ROLE", "query"))
    assert templates.text is not None, "a teacher reads one text"
    return templates.text.replace("{query}", query).replace("{document}", content.replace("ROLE", "document"))


class _Logits(torch.nn.Module):
    """BERT with positional inputs and the logits as its only output."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        # Stock code slices by lengths here, which torch 2.7 does not export for axes of any size.
        bias = torch.where(mask.unsqueeze(1).unsqueeze(1) > 0, 0.0, torch.finfo(torch.float32).min)
        positions = torch.arange(ids.shape[1]).unsqueeze(0)
        return self.model(ids, bias, types, positions, return_dict=False)[0]


def onnx_model(ranker: Ranker) -> Any:
    """Convert a student to ONNX: input_ids, attention_mask, token_type_ids (batch, sequence) to logits (batch, 1)."""
    model = BertDistilledRanker(copy.deepcopy(ranker.model.config))
    model.load_state_dict(ranker.model.state_dict())
    model.set_attn_implementation("eager")  # other implementations leave shape arithmetic in the graph
    limits = {"batch": 2**31 - 1, "sequence": model.config.max_position_embeddings}  # torch 2.7 wants both
    axes = {axis: torch.export.Dim(name, max=limit) for axis, (name, limit) in enumerate(limits.items())}
    warnings.filterwarnings("ignore", "(?s).*(# The axis name|LeafSpec)")  # from torch; the inputs share their axes
    program = torch.onnx.export(
        _Logits(model).eval(),
        tuple(torch.ones(3, 2, 8, dtype=torch.long)),  # the same tensor three times would become one input
        input_names=["input_ids", "attention_mask", "token_type_ids"],
        output_names=["logits"],
        dynamic_shapes=(axes,) * 3,
        opset_version=_OPSET,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    proto = program.model_proto  # each access builds a new one
    proto.ir_version = _IR_VERSION
    return proto


def write_figures(ranker: Ranker, source: str, folder: Path, out: str, file_format: str, parity: Parity) -> None:
    """Write export.json and the table of the model card, together with the formats that `out` already contains."""
    before = Path(out, "export.json")
    figures = json.loads(before.read_text()) if before.exists() else {}
    figures[file_format] = asdict(parity) | {"verdict": parity.verdict}
    (folder / "export.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    cards = [path for path in (Path(out, "README.md"), Path(source, "README.md")) if path.exists()]
    card = ModelCard.load(cards[0]) if cards else model_card(ranker.model.config, Path(source).name)
    table = _TABLE + "".join(_row(*item) for item in figures.items())
    card.text = card.text.split(_HEADING)[0].rstrip() + _HEADING + table
    card.save(folder / "README.md")


def _row(name: str, figures: Mapping[str, Any]) -> str:
    change = "-" if figures["ndcg_change"] is None else f"{figures['ndcg_change']:+.4f}"
    return (
        f"| {name} | {figures['pairs']:,} | {figures['max_difference']:.1e} | {figures['tau']:.4f} "
        f"| {figures['top1']:.1%} | {change} | {np.median(figures['pairs_per_s']):,.0f} | {figures['verdict']} |\n"
    )
