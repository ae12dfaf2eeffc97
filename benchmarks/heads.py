"""How a decoder says its score: by its last token, by the mean of all tokens, by the expected grade of label tokens.

    python benchmarks/heads.py run --quickstart runs/quickstart --out runs/heads
    python benchmarks/heads.py show --out runs/heads

The quickstart's decoder after its continued pre-training is fitted to the same clicks and labels once for each head,
with the options of recipes/configs/quickstart/teacher.yaml and the quickstart's seed; the heads alone differ. The
last token at the quickstart's own steps is its teacher. Several quickstarts are several seeds. `run` goes on where it
stopped; `show` prints markdown: means over the seeds, 95% intervals by query, paired tests corrected for both
comparisons (Holm).
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, set_seed

import hf_disranker.recipes
from hf_disranker import Ranker
from hf_disranker.data.tables import load_groups, pair_texts, read_table
from hf_disranker.evaluation.evaluate import describe
from hf_disranker.evaluation.rankings import Evaluation
from hf_disranker.evaluation.significance import bootstrap, compare
from hf_disranker.models.checkpoint import RankerOutput
from hf_disranker.models.loading import fit_tokenizer
from hf_disranker.models.teacher import LlamaForLastTokenRanking, LLMForLastTokenRanking, expect_labels
from hf_disranker.recipes.quickstart.stages import bf16_is_faster
from hf_disranker.training.ranking_trainer import RankingConfig, RankingTrainer

CONFIG = Path(hf_disranker.recipes.__path__[0]) / "configs" / "quickstart" / "teacher.yaml"
HEADS = ("last token", "mean pooling", "label expectation")
WORDS = "01234"


class MeanPooledLlama(LlamaForLastTokenRanking):
    """A decoder that scores a text by the mean of its tokens' hidden states; only for this comparison."""

    def forward(  # type: ignore[override]
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> RankerOutput:
        """As in `LLMForLastTokenRanking`, but for the pooling."""
        assert attention_mask is not None
        kwargs.pop("return_dict", None)
        hidden = self.model(input_ids, attention_mask=attention_mask, use_cache=False, **kwargs).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return RankerOutput(logits=self.score((hidden * weight).sum(dim=1) / weight.sum(dim=1)))


def make(head: str, start: Path, seed: int, attention: str | None) -> tuple[LLMForLastTokenRanking, Any]:
    """The pre-trained decoder with a new head, and its tokenizer."""
    set_seed(seed)
    tokenizer, config = AutoTokenizer.from_pretrained(start), AutoConfig.from_pretrained(start)
    if head == "label expectation":
        config = expect_labels(config, tokenizer, WORDS)
    kind = MeanPooledLlama if head == "mean pooling" else LLMForLastTokenRanking
    model = kind.from_pretrained(start, config=config, attn_implementation=attention)
    fit_tokenizer(model, tokenizer)
    return model, tokenizer


def fit(head: str, quickstart: Path, work: Path, steps: int | None) -> tuple[Ranker, int]:
    """A teacher of one head, and its seed."""
    seed = json.loads((quickstart / "teacher" / "run.json").read_text())["options"]["RankingConfig"]["seed"]
    if head == HEADS[0] and not steps:
        return Ranker.from_pretrained(quickstart / "teacher"), seed
    options = yaml.safe_load(CONFIG.read_text())
    attention, _ = options.pop("attn_implementation"), options.pop("train_split")
    options |= {"save_strategy": "no", "seed": seed, "max_steps": steps or options["max_steps"], "report_to": "none"}
    options |= {"bf16": torch.cuda.is_available() or bf16_is_faster(), "use_cpu": not torch.cuda.is_available()}
    options.pop("save_steps")
    model, tokenizer = make(head, quickstart / "cpt", seed, attention)
    rows = load_groups(quickstart / "data" / "clicks_and_labels.parquet")
    args = RankingConfig(str(work), disable_tqdm=True, **options)
    RankingTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer).train()
    ranker = Ranker(model, tokenizer)
    # What is shared between the documents of a query is computed once, and then the last token alone is read.
    ranker.share_prefix &= head != "mean pooling"
    return ranker, seed


def run(args: argparse.Namespace) -> None:
    """Fit and evaluate every head that is not finished, quickstart by quickstart."""
    for quickstart in args.quickstart:
        judgments = str(quickstart / "data" / "judgments.parquet")
        dev = read_table(judgments, "judgments", split="dev")
        for head in HEADS:
            folder = args.out / head / quickstart.name
            if (folder / "eval.json").exists():
                continue
            begin = time.process_time()
            ranker, seed = fit(head, quickstart, folder / "work", args.steps)
            seconds = time.process_time() - begin
            scores = ranker.predict(pair_texts(dev))
            about = describe(ranker) | {"judgments": judgments, "split": "dev", "seed": seed, "cpu_seconds": seconds}
            Evaluation.of(head, dev.assign(score=scores), **about).save(folder / "eval.json")
            print(f"{head}, {quickstart}: {seconds:.0f} CPU seconds", flush=True)


def show(args: argparse.Namespace) -> None:
    """Print the table."""
    files = {head: sorted((args.out / head).glob("*/eval.json")) for head in HEADS}
    found = {head: [json.loads(file.read_text()) for file in paths] for head, paths in files.items() if paths}
    values = {
        head: np.mean([pd.read_parquet(f"{file}.parquet")["ndcg@10"] for file in files[head]], axis=0)
        for head in found
    }
    tests = {one.first: one for one in compare(values, [(head, HEADS[0]) for head in list(found)[1:]])}
    print(f"| head | seeds | NDCG@10 | less {HEADS[0]} | p, Holm | PNR | CPU s |\n|" + "---|" * 7)
    for head, measures in found.items():
        means = {name: np.mean([one[name] for one in measures]) for name in ("ndcg@10", "pnr")}
        low, high = bootstrap(values[head])
        cells = [head, str(len(measures)), f"{means['ndcg@10']:.3f} [{low:.3f}, {high:.3f}]"]
        if test := tests.get(head):
            ends = f"[{test.interval[0]:+.3f}, {test.interval[1]:+.3f}]"
            cells += [f"{test.difference:+.3f} {ends}", f"{test.p_holm:.4f}"]
        else:
            cells += ["", ""]
        seconds = np.mean([one["about"]["cpu_seconds"] for one in measures])
        cells += [f"{means['pnr']:.2f}", f"{seconds:.0f}" if seconds > 1 else ""]  # the quickstart's was only loaded
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    """Run or show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "show"])
    parser.add_argument("--quickstart", type=Path, nargs="+", default=[Path("runs/quickstart")], help="finished ones")
    parser.add_argument("--out", type=Path, default=Path("runs/heads"))
    parser.add_argument("--steps", type=int, help="other than the quickstart's")
    args = parser.parse_args()
    {"run": run, "show": show}[args.what](args)


if __name__ == "__main__":
    main()
