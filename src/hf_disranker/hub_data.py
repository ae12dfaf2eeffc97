"""Tables as data sets on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset, DatasetDict, Features, Value
from huggingface_hub import DatasetCard, DatasetCardData, HfApi

from hf_disranker.data import Source, read_table
from hf_disranker.hub import pushing

_TYPES = {"label": "int64", "teacher_score": "float32", "weight": "float64", "users": "float64"}


def push_table(source: Source, table: str, repo_id: str, *, private: bool | None = None, **options: Any) -> None:
    """Publish a table as a data set: parquet with typed features, a split for each value of `split`, and a card.

    A card that is there and was not written here is kept.

    Args:
        source: what `read_table` reads.
        table: clicks, judgments, corpus, candidates or scores.
        repo_id: owner/name, or name alone for your own.
        private: None makes a new repository private for clicks and scores, and by the account's habit for others.
        options: `revision`, `token`.

    Raises:
        TableError: the table breaks its contract; nothing is pushed.
        PushError: the push was cut off.
    """
    frame = read_table(source, table, texts=False)
    if private is None and table in ("clicks", "scores"):
        private = True
    splits = dict(iter(frame.groupby("split", sort=False))) if "split" in frame.columns else {"train": frame}
    parts = DatasetDict({str(split): _typed(rows) for split, rows in splits.items()})
    api = HfApi(token=options.get("token"))
    revision = options.get("revision")
    with pushing(api, repo_id, revision, "dataset"):
        repo_id = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
        if revision:
            api.create_branch(repo_id, branch=revision, repo_type="dataset", exist_ok=True)
        # The card first, to which `datasets` adds the features in the commit that brings the rows.
        if _is_our_card(api, repo_id, revision):
            card = str(_card(repo_id, table, parts)).encode()
            api.upload_file(
                repo_id=repo_id, repo_type="dataset", path_in_repo="README.md", path_or_fileobj=card, revision=revision
            )
        parts.push_to_hub(repo_id, **options)


def _is_our_card(api: HfApi, repo_id: str, revision: str | None) -> bool:
    """Whether a repository has no card but one of `push_table`."""
    if not api.file_exists(repo_id, "README.md", repo_type="dataset", revision=revision):
        return True
    path = api.hf_hub_download(repo_id, "README.md", repo_type="dataset", revision=revision)
    return " table of hf-disranker: " in Path(path).read_text(encoding="utf-8")


def _typed(rows: pd.DataFrame) -> Dataset:
    part = Dataset.from_pandas(rows, preserve_index=False)
    kinds = {name: Value("string") for name, kind in part.features.items() if "string" in getattr(kind, "dtype", "")}
    kinds |= {name: Value(kind) for name, kind in _TYPES.items() if name in part.features}
    return part.cast(Features({**part.features, **kinds}))


def _card(repo_id: str, table: str, parts: DatasetDict) -> DatasetCard:
    data = DatasetCardData(task_categories=["text-ranking"], tags=["hf-disranker", table])
    sizes = ", ".join(f"{len(rows):,} rows in {split}" for split, rows in parts.items())
    columns = ", ".join(next(iter(parts.values())).column_names)
    return DatasetCard(
        f"---\n{data.to_yaml()}\n---\n\n# {repo_id.split('/')[-1]}\n\nA {table} table of hf-disranker: {sizes}. "
        f"Columns: {columns}.\n\n```python\nfrom hf_disranker import read_table\n\n"
        f'rows = read_table("{repo_id}", "{table}")\n```\n'
    )
