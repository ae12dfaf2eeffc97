"""A ranker in other forms for other software, each checked against the ranker itself before it is written.

    disranker export --model runs/student --format onnx --pairs judgments.parquet --out runs/onnx

cross-encoder  the checkpoint with all files that stock loaders and JVM tools ask for
onnx           onnx/model.onnx: fp32, opset 18, axes batch and sequence
openvino       openvino/openvino_model.xml: fp32; compile it with INFERENCE_PRECISION_HINT f32
vllm           a teacher: the checkpoint and score_template.jinja, for `vllm serve --chat-template`

Several formats may go to one folder. The pairs are scored in both forms; a form that moves the scores by more than it
may is not written. The figures go into export.json and into the model card.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from trl import TrlParser

from hf_disranker.data.outputs import check_output_folder
from hf_disranker.data.tables import read_table
from hf_disranker.models.ranker import Ranker
from hf_disranker.recipes.command_line import recipe_parser
from hf_disranker.serving.export import Parity, export

logger = logging.getLogger(__name__)

_FEW = [  # query, then documents
    ("how to plot a histogram", "numpy.histogram bins of data", "smtplib send mail", "matplotlib plot lines"),
    ("read a json file", "json.load read a file", "csv.reader read rows of a table", "os.path join parts of a path"),
    ("如何读取文件", "open 打开并读取一个文件", "random 生成随机数", "json 读取和写入 json 文件"),
]


@dataclass
class ExportArguments:
    """What is exported, and the pairs on which it is checked."""

    model: str = field(metadata={"help": "The ranker: folder or Hub id."})
    out: str = field(metadata={"help": "Folder for the exported files."})
    format: Literal["cross-encoder", "onnx", "openvino", "vllm"] = field(metadata={"help": "See above."})
    pairs: str | None = field(
        default=None, metadata={"help": "Judgments or candidates; by default nine built-in pairs."}
    )
    corpus: str | None = field(default=None, metadata={"help": "Where the texts of candidates lie."})
    split: str = field(default="", metadata={"help": "Split of the pairs; '' for all rows."})
    max_pairs: int = field(default=2000, metadata={"help": "Pairs to check, of whole queries."})


def make_parser() -> TrlParser:
    """The command line of this stage."""
    return recipe_parser("export", __doc__, ExportArguments)


def main(args: ExportArguments) -> Parity:
    """Load the ranker, export it, compare the scores."""
    check_output_folder(args.out, Path(args.out, "export.json").is_file(), [args.model])
    ranker = Ranker.from_pretrained(args.model, device="cpu", dtype=torch.float32)
    parity = export(ranker, args.model, args.format, args.out, read_pairs(args, ranker))
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


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
