"""Export a ranker for other software and check the scores of the export against it.

    disranker export --model runs/student --format onnx --pairs judgments.parquet --out runs/onnx

cross-encoder  checkpoint with all files for stock loaders and JVM tools
onnx           onnx/model.onnx: fp32, opset 18, axes batch and sequence
openvino       openvino/openvino_model.xml: fp32; compile it with INFERENCE_PRECISION_HINT f32
vllm           teacher checkpoint and score_template.jinja, for `vllm serve --chat-template`

Several formats can share a folder. The pairs are scored in both formats; an export whose scores differ beyond its
tolerance is not written. The differences are saved in export.json and in the model card.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pandas as pd
import torch

from hf_disranker.data.tables import read_table
from hf_disranker.models.ranker import Ranker
from hf_disranker.recipes.command_line import RecipeParser, TableArguments, recipe_parser, run_stage
from hf_disranker.recipes.outputs import check_output_folder
from hf_disranker.serving.export import Parity, export

logger = logging.getLogger(__name__)

_FEW = [  # query, then documents
    ("how to plot a histogram", "numpy.histogram bins of data", "smtplib send mail", "matplotlib plot lines"),
    ("read a json file", "json.load read a file", "csv.reader read rows of a table", "os.path join parts of a path"),
    ("如何读取文件", "open 打开并读取一个文件", "random 生成随机数", "json 读取和写入 json 文件"),
]


@dataclass
class ExportArguments(TableArguments):
    """Ranker, format and pairs to check."""

    model: str = field(metadata={"help": "Ranker: folder or Hub id."})
    out: str = field(metadata={"help": "Folder for the exported files."})
    format: Literal["cross-encoder", "onnx", "openvino", "vllm"] = field(metadata={"help": "Format, see above."})
    pairs: str | None = field(
        default=None, metadata={"help": "Judgments or candidates to check on; default: nine built-in pairs."}
    )
    corpus: str | None = field(default=None, metadata={"help": "Table with the texts of candidates."})
    split: str = field(default="", metadata={"help": "Split of the pairs; '' uses all rows."})
    max_pairs: int = field(default=2000, metadata={"help": "Maximum number of pairs to check, from whole queries."})


def make_parser() -> RecipeParser:
    """Return the argument parser of this stage."""
    return recipe_parser("export", __doc__, ExportArguments)


def main(args: ExportArguments) -> Parity:
    """Load the ranker, export it and compare the scores."""
    check_output_folder(args.out, Path(args.out, "export.json").is_file(), [args.model])
    ranker = Ranker.from_pretrained(args.model, device="cpu", dtype=torch.float32)
    parity = export(ranker, args.model, args.format, args.out, read_pairs(args, ranker))
    logger.info("%s: %s; Kendall tau %.4f on %d pairs.", args.out, parity.verdict, parity.tau, parity.pairs)
    return parity


def read_pairs(args: ExportArguments, ranker: Ranker) -> pd.DataFrame:
    """Read pairs of whole queries, without those of truncated queries: stock loaders have no query limit."""
    if args.pairs is None:
        logger.warning("No --pairs: checked on nine built-in pairs, which say little about your data.")
        few = [(query, query, text, "", text) for query, *texts in _FEW for text in texts]
        return pd.DataFrame(few, columns=["query_id", "query", "doc_id", "title", "summary"])
    columns = args.column_names()
    rows = read_table(args.pairs, "candidates", split=args.split, corpus=args.corpus, columns=columns)
    sizes = rows.groupby("query_id", sort=False).size().cumsum()
    rows = rows[rows["query_id"].isin(sizes.index[: max(1, int((sizes <= args.max_pairs).sum()))])]
    encode, limit = ranker.collator.encode, ranker.collator.max_query_length
    cut = rows["query"].isin([query for query in rows["query"].unique() if encode([query], [""]).queries_cut])
    if cut.any():
        logger.warning("Not compared: %d pairs with a query of more than %d tokens.", int(cut.sum()), limit)
    return rows[~cut]


if __name__ == "__main__":
    run_stage("export", make_parser, main)
