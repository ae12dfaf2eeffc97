"""A ranker in other forms for other software, each checked against the ranker itself before it is written.

    disranker export --model runs/student --format onnx --pairs judgments.parquet --out runs/onnx

cross-encoder  the checkpoint with all files that stock loaders and JVM tools ask for
onnx           onnx/model.onnx: fp32, opset 18, axes batch and sequence
onnx-int8      onnx/model_quantized.onnx: weights and activations in int8, with a scale for each 32 values of a row,
               so that a score does not depend on its batch
openvino       openvino/openvino_model.xml: fp32; compile it with INFERENCE_PRECISION_HINT f32
vllm           a teacher: the checkpoint and score_template.jinja, for `vllm serve --chat-template`

Several formats may go to one folder. The pairs are scored in both forms; a form that moves the scores by more than it
may is not written. The figures go into export.json and into the model card.
"""

from __future__ import annotations

import copy
import importlib
import json
import logging
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
import transformers
from huggingface_hub import ModelCard
from sentence_transformers import CrossEncoder
from trl import TrlParser

from hf_disranker import metrics
from hf_disranker.card import model_card
from hf_disranker.data import pair_texts, read_table
from hf_disranker.hub import check_padding
from hf_disranker.outputs import check_output_folder
from hf_disranker.ranker import Ranker
from hf_disranker.runs import recipe_parser, save_json
from hf_disranker.runtime import FILES
from hf_disranker.runtime import Ranker as LightRanker
from hf_disranker.student import BertDistilledRanker
from hf_disranker.texts import Templates

logger = logging.getLogger(__name__)

Predict = Callable[[Sequence[tuple[str, dict[str, str]]]], np.ndarray]

_OPSET, _IR_VERSION = 18, 8  # read by onnxruntime 1.14 and later
logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it names every operator of packages that are not installed
_EXACT, _MOST_NDCG_LOST = 1e-3, 0.01  # what a raw score may move by in fp32, and NDCG@10 fall by in int8
_FEW = [  # query, then documents
    ("how to plot a histogram", "numpy.histogram bins of data", "smtplib send mail", "matplotlib plot lines"),
    ("read a json file", "json.load read a file", "csv.reader read rows of a table", "os.path join parts of a path"),
    ("如何读取文件", "open 打开并读取一个文件", "random 生成随机数", "json 读取和写入 json 文件"),
]
_HEADING = "\n\n## Exports\n\n"
_TABLE = """\
Compared with the ranker in PyTorch on the same pairs and the same machine, in turns.

| format | pairs | largest difference | Kendall tau | same first | NDCG@10 | pairs/s | |
|---|---|---|---|---|---|---|---|
"""


@dataclass
class ExportArguments:
    """What is exported, and the pairs on which it is checked."""

    model: str = field(metadata={"help": "The ranker: folder or Hub id."})
    out: str = field(metadata={"help": "Folder for the exported files."})
    format: Literal["cross-encoder", "onnx", "onnx-int8", "openvino", "vllm"] = field(metadata={"help": "See above."})
    pairs: str | None = field(
        default=None, metadata={"help": "Judgments or candidates; by default nine pairs of ours."}
    )
    corpus: str | None = field(default=None, metadata={"help": "Where the texts of candidates lie."})
    split: str = field(default="", metadata={"help": "Split of the pairs; '' for all rows."})
    max_pairs: int = field(default=2000, metadata={"help": "Pairs to check, of whole queries."})
    min_tau: float = field(default=0.98, metadata={"help": "Kendall tau with the scores in fp32 that int8 must keep."})


@dataclass(frozen=True)
class Parity:
    """How scores in a new form compare with the ranker's own: means over queries, speeds of each round."""

    pairs: int
    max_difference: float
    tau: float
    top1: float
    ndcg_change: float | None
    pairs_per_s: list[float]
    ranker_pairs_per_s: list[float]

    @property
    def verdict(self) -> str:
        """What may be said of the new form: no more than was measured."""
        new, old = self.pairs_per_s, self.ranker_pairs_per_s
        same = "same scores" if self.max_difference <= _EXACT and self.top1 == 1 else "other scores"
        speed = "faster" if min(new) > max(old) else "slower" if max(new) < min(old) else "speed not told apart"
        return f"{same}, {speed} ({np.median(new) / np.median(old):.2f} times the pairs/s)"


def make_parser() -> TrlParser:
    """The command line of the export."""
    return recipe_parser("export", __doc__, ExportArguments)


def main(args: ExportArguments) -> Parity:
    """Export, check, write.

    Raises:
        ValueError: the format does not suit the model or moves its scores, or the folder holds other files.
    """
    check_output_folder(args.out, Path(args.out, "export.json").is_file(), [args.model])
    ranker = Ranker.from_pretrained(args.model, device="cpu", dtype=torch.float32)
    role = ranker.model.config.disranker["role"]
    if (args.format == "vllm") != (role == "teacher"):
        raise ValueError(f"{args.model} is a {role}: vllm is the format for teachers, the others are for students.")
    rows = read_pairs(args, ranker)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "export")
        write_checkpoint(ranker, folder, weights=args.format in ("cross-encoder", "vllm"))
        try:
            predict = WRITERS[args.format](ranker, folder)
        except ImportError as error:
            raise ValueError(f"{error}: pip install hf-disranker[onnx] or hf-disranker[openvino]") from error
        parity = compare(ranker.predict, predict, rows)
        if args.format == "onnx-int8" and parity.tau < args.min_tau:
            logger.warning("Kendall tau %.4f: the activations stay in fp32.", parity.tau)
            parity = compare(ranker.predict, write_int8(ranker, folder, activations=False), rows)
        good = parity.max_difference <= _EXACT
        if args.format == "onnx-int8":
            good = parity.tau >= args.min_tau and (parity.ndcg_change or 0.0) >= -_MOST_NDCG_LOST
        if not good:
            raise ValueError(f"Nothing was written: {args.format} moves the scores too far: {asdict(parity)}")
        write_figures(ranker, args, folder, parity)
        shutil.copytree(folder, args.out, dirs_exist_ok=True)
    logger.info("%s: %s; Kendall tau %.4f on %d pairs.", args.out, parity.verdict, parity.tau, parity.pairs)
    return parity


def read_pairs(args: ExportArguments, ranker: Ranker) -> pd.DataFrame:
    """The pairs to compare on: whole queries, without those that would be cut, a limit that stock loaders lack."""
    if args.pairs is None:
        logger.warning("No --pairs: checked on nine pairs of ours, which say little about your data.")
        few = [(query, query, text, "", text) for query, *texts in _FEW for text in texts]
        return pd.DataFrame(few, columns=["query_id", "query", "doc_id", "title", "summary"])
    rows = read_table(args.pairs, "candidates", split=args.split, corpus=args.corpus)
    sizes = rows.groupby("query_id", sort=False).size().cumsum()
    rows = rows[rows["query_id"].isin(sizes.index[: max(1, int((sizes <= args.max_pairs).sum()))])]
    encode, limit = ranker.collator.encode, ranker.collator.max_query_length
    cut = rows["query"].isin([query for query in rows["query"].unique() if encode([query], [""]).queries_cut])
    if cut.any():
        logger.warning("Not compared: %d pairs with a query of more than %d tokens.", int(cut.sum()), limit)
    return rows[~cut]


def compare(old: Predict, new: Predict, rows: pd.DataFrame) -> Parity:
    """Score the rows both ways, in turns."""
    pairs, queries = pair_texts(rows), rows["query_id"].to_numpy()
    speeds: dict[str, list[float]] = {"old": [], "new": []}
    scores: dict[str, np.ndarray] = {}
    for predict in (old, new):
        predict(pairs[:256])
    for name, predict in [("old", old), ("new", new)] * 3:
        start = time.perf_counter()
        scores[name] = predict(pairs)
        speeds[name].append(round(len(pairs) / (time.perf_counter() - start), 1))
    groups = pd.Series(range(len(rows))).groupby(queries).indices.values()
    change = None
    if "label" in rows.columns:
        ndcg = {key: metrics.ndcg(rows["label"].to_numpy(), values, queries, k=10) for key, values in scores.items()}
        change = metrics.query_mean(ndcg["new"] - ndcg["old"])
    return Parity(
        pairs=len(pairs),
        max_difference=float(np.abs(scores["new"] - scores["old"]).max()),
        tau=metrics.query_mean(metrics.kendall_tau(scores["new"], scores["old"], queries)),
        top1=float(np.mean([scores["old"][group].argmax() == scores["new"][group].argmax() for group in groups])),
        ndcg_change=change,
        pairs_per_s=speeds["new"],
        ranker_pairs_per_s=speeds["old"],
    )


def write_checkpoint(ranker: Ranker, folder: Path, weights: bool) -> None:
    """Config and tokenizer as every loader wants them, with or without the weights."""
    model, collator = ranker.model, ranker.collator
    for limit in ("max_length", "max_query_length"):  # the light runtime has no defaults of its own
        model.config.disranker[limit] = getattr(collator, limit)
    collator.tokenizer.model_max_length = collator.max_length
    collator.tokenizer.backend_tokenizer.no_truncation()  # else what the last call set is saved
    collator.tokenizer.backend_tokenizer.no_padding()
    (model if weights else model.config).save_pretrained(folder)
    collator.tokenizer.save_pretrained(folder)
    if model.config.model_type == "bert":
        words = sorted(collator.tokenizer.get_vocab().items(), key=lambda entry: entry[1])
        (folder / "vocab.txt").write_text("".join(f"{word}\n" for word, _ in words), encoding="utf-8")


def write_cross_encoder(ranker: Ranker, folder: Path) -> Predict:
    """Nothing more to write; scored as sentence-transformers does."""
    model, templates = CrossEncoder(str(folder), device="cpu"), ranker.collator.templates

    def predict(pairs: Sequence[tuple[str, dict[str, str]]]) -> np.ndarray:
        texts = [(templates.render_query(query), templates.render_document(**document)) for query, document in pairs]
        return model.predict(texts, show_progress_bar=False)

    return predict


def write_int8(ranker: Ranker, folder: Path, activations: bool = True) -> Predict:
    """The same graph with weights in int8, and activations too unless told otherwise."""
    model = onnx_model(ranker)
    nbits = importlib.import_module("onnxruntime.quantization.matmul_nbits_quantizer")
    nbits.logger.setLevel(logging.WARNING)
    level = 4 if activations else 1  # onnxruntime: 4 computes in int8, 1 in fp32
    quantizer = nbits.MatMulNBitsQuantizer(model, bits=8, block_size=32, is_symmetric=True, accuracy_level=level)
    quantizer.process()
    quantize_embeddings(quantizer.model.model.graph, ranker.model.config.vocab_size)
    return _save(quantizer.model.model, folder, FILES[1])


def write_openvino(ranker: Ranker, folder: Path) -> Predict:
    """The graph in OpenVINO's own form, in fp32."""
    import openvino

    with tempfile.TemporaryDirectory() as name:
        Path(name, "model.onnx").write_bytes(onnx_model(ranker).SerializeToString())
        openvino.save_model(openvino.convert_model(f"{name}/model.onnx"), folder / FILES[2], compress_to_fp16=False)
    return LightRanker(folder, FILES[2]).predict


def write_vllm(ranker: Ranker, folder: Path) -> Predict:
    """The template that makes the teacher's text of the roles query and document; scored by the stock class."""
    model, collator = ranker.model, ranker.collator
    check_padding(model.config)
    if not hasattr(model, "score"):
        raise ValueError("A teacher by label expectation has no score row: vLLM cannot serve it as a ranker.")
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


WRITERS: dict[str, Callable[[Ranker, Path], Predict]] = {
    "cross-encoder": write_cross_encoder,
    "onnx": lambda ranker, folder: _save(onnx_model(ranker), folder, FILES[0]),
    "onnx-int8": write_int8,
    "openvino": write_openvino,
    "vllm": write_vllm,
}


def score_template(templates: Templates) -> str:
    """The Jinja template with which vLLM makes of a query and a document the text that the teacher was trained on."""
    content = "{{ (messages | selectattr('role', 'eq', 'ROLE') | first).content }}"
    query = templates.query.replace("{query}", content.replace("ROLE", "query"))
    assert templates.text is not None, "a teacher reads one text"
    return templates.text.replace("{query}", query).replace("{document}", content.replace("ROLE", "document"))


class _Logits(torch.nn.Module):
    """A BERT with inputs by position and the logits as its only output."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.model(*inputs, return_dict=False)[0]


def onnx_model(ranker: Ranker) -> Any:
    """The student in ONNX: input_ids, attention_mask, token_type_ids (batch, sequence) to logits (batch, 1)."""
    model = BertDistilledRanker(copy.deepcopy(ranker.model.config))
    model.load_state_dict(ranker.model.state_dict())
    model.set_attn_implementation("eager")  # the other kinds leave shape arithmetic in the graph
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=model.config.max_position_embeddings)}
    warnings.filterwarnings(
        "ignore", "(?s).*(# The axis name|LeafSpec)"
    )  # of torch's own; the inputs share their axes
    program = torch.onnx.export(
        _Logits(model).eval(),
        tuple(torch.ones(3, 2, 8, dtype=torch.long)),  # one tensor three times would be taken for one input
        input_names=["input_ids", "attention_mask", "token_type_ids"],
        output_names=["logits"],
        dynamic_shapes=((axes,) * 3,),
        opset_version=_OPSET,
        verbose=False,
    )
    assert program is not None
    (made := program.model_proto).ir_version = _IR_VERSION  # a new one each time
    return made


def quantize_embeddings(graph: Any, vocabulary: int) -> None:
    """Turn the table of word embeddings into int8 rows, each with its scale, in place."""
    from onnx import TensorProto, helper, numpy_helper

    (table,) = (tensor for tensor in graph.initializer if [*tensor.dims][:1] == [vocabulary])
    (place,) = (place for place, node in enumerate(graph.node) if table.name in node.input)
    tokens, vectors = graph.node[place].input[1], graph.node[place].output[0]
    values = numpy_helper.to_array(table)
    scales = (np.abs(values).max(axis=1, keepdims=True).clip(1e-12) / 127).astype(np.float32)
    rows = np.round(values / scales).astype(np.int8)
    graph.initializer.remove(table)
    graph.initializer.extend([numpy_helper.from_array(rows, "rows"), numpy_helper.from_array(scales, "scales")])
    del graph.node[place]
    for node in (
        helper.make_node("Mul", ["word", "scale"], [vectors]),
        helper.make_node("Cast", ["row"], ["word"], to=TensorProto.FLOAT),
        helper.make_node("Gather", ["scales", tokens], ["scale"]),
        helper.make_node("Gather", ["rows", tokens], ["row"]),
    ):
        graph.node.insert(place, node)


def _save(model: Any, folder: Path, file: str) -> Predict:
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_bytes(model.SerializeToString())
    return LightRanker(folder, file).predict


def write_figures(ranker: Ranker, args: ExportArguments, folder: Path, parity: Parity) -> None:
    """The figures of all formats in the folder, as export.json and as a part of the model card."""
    before = Path(args.out, "export.json")
    figures = json.loads(before.read_text()) if before.exists() else {}
    figures[args.format] = asdict(parity) | {"verdict": parity.verdict}
    save_json(figures, str(folder / "export.json"))
    cards = [path for path in (Path(args.out, "README.md"), Path(args.model, "README.md")) if path.exists()]
    card = ModelCard.load(cards[0]) if cards else model_card(ranker.model.config, Path(args.model).name)
    card.text = (
        card.text.split(_HEADING)[0].rstrip() + _HEADING + _TABLE + "".join(_row(*item) for item in figures.items())
    )
    card.save(folder / "README.md")


def _row(name: str, figures: Mapping[str, Any]) -> str:
    change = "-" if figures["ndcg_change"] is None else f"{figures['ndcg_change']:+.4f}"
    return (
        f"| {name} | {figures['pairs']:,} | {figures['max_difference']:.1e} | {figures['tau']:.4f} "
        f"| {figures['top1']:.1%} | {change} | {np.median(figures['pairs_per_s']):,.0f} | {figures['verdict']} |\n"
    )
