"""Model card: use, training and measures of a ranker."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import TrainingArguments

from hf_disranker.data.tables import is_hub_id

TEMPLATES = Path(__file__).parent / "templates"
MEASURES = {"pnr": "PNR", "ndcg@5": "NDCG@5", "ndcg@10": "NDCG@10", "mrr": "MRR"}
# Baselines that every student should be compared with.
BASELINES = ("before training", "BM25", "teacher")
_GENERAL = (
    *("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("warmup_steps", "weight_decay", "lr_scheduler_type", "optim", "bf16", "seed"),
)


@dataclass
class CardFacts:
    """Facts for a model card that the config does not contain.

    `results` has a mapping for each ranker, the published model first, with `name` and the measures of `evaluate`
    (pnr, ndcg@5, ndcg@10, mrr, pairs_per_s); `data` one for each data set with use, name, rows and fingerprint.
    """

    base_model: str | None = None  # that training started from; named only if it is a Hub id
    results: Sequence[Mapping[str, Any]] = ()
    dataset: str = "held-out judgments"  # that `results` were measured on
    data: Sequence[Mapping[str, Any]] = ()
    losses: Mapping[str, float] = field(default_factory=dict)  # weights by name
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)


def model_card(config: Any, repo_id: str, facts: CardFacts | None = None, adapter: bool = False) -> ModelCard:
    """Write the model card of a ranker, with the metadata of the Hub.

    Without `facts` about its training, it says that they were not recorded. If `adapter`, the repository has LoRA
    weights for `facts.base_model`.
    """
    facts, marker = facts or CardFacts(), config.marker
    student = marker.role == "student"
    title = repo_id.split("/")[-1]
    base_model = facts.base_model if _is_public(facts.base_model) else None
    sources = [*dict.fromkeys(found["name"] for found in facts.data if _is_public(found["name"]))]
    card_data = ModelCardData(
        base_model=base_model,
        datasets=sources or None,
        library_name="peft" if adapter else "sentence-transformers" if student else "transformers",
        pipeline_tag="text-ranking",
        tags=["hf-disranker", "reranker", *(["cross-encoder"] if student else [])],
        model_name=title,
        eval_results=_eval_results(facts) or None,
    )
    missing = [name for name in BASELINES if name not in {row["name"] for row in facts.results}]
    templates = marker.templates.to_dict()
    # ModelCard.from_template would leave an empty line for each block tag, which ends a table.
    template = jinja2.Template((TEMPLATES / "model_card.md").read_text(encoding="utf-8"), trim_blocks=True)
    text = template.render(
        card_data=card_data.to_yaml(),
        name=title,
        repo_id=repo_id,
        adapter=adapter,
        config=config,
        marker=marker,
        facts=facts,
        templates=templates,
        example=repr(templates.get("text", "").format(query="how to plot", document="numpy.histogram: bins of data")),
        teacher=_teacher(marker.teacher),
        base_model=base_model,
        results=[_row(row) for row in facts.results],
        missing=missing if student else [],
    )
    return ModelCard(text)


def training_facts(trainer: Any, results: Sequence[Mapping[str, Any]] = ()) -> CardFacts:
    """Collect the facts that a `RankingTrainer` has about its model.

    `results` are measures of baselines; the model's own are added, and with `eval_on_start` those before training.
    """
    args, model = trainer.args, trainer.model
    measured = [entry for entry in trainer.state.log_history if "eval_pnr" in entry]
    rows = [_measured("this model", measured[-1])] if measured else []
    if measured and measured[0]["step"] == 0 and len(measured) > 1:
        rows.append(_measured("before training", measured[0]))
    own = {field.name for field in fields(args)} - {field.name for field in fields(TrainingArguments)}
    given = args.to_dict()  # enums as their values, no token
    values = {name: given[name] for name in (*_GENERAL, *sorted(own))}
    losses = {name.removesuffix("_weight"): value for name, value in values.items() if name.endswith("_weight")}
    adapters = getattr(model, "peft_config", {})
    base = next(iter(adapters.values())).base_model_name_or_path if adapters else model.config._name_or_path
    return CardFacts(
        base_model=base,
        results=[*rows, *results],
        data=[
            _data(use, data)
            for use, data in (("training", trainer.train_dataset), ("evaluation", trainer.eval_dataset))
            if hasattr(data, "_fingerprint") and hasattr(data, "__len__")
        ],
        losses=losses,
        hyperparameters={name: value for name, value in values.items() if name.removesuffix("_weight") not in losses},
    )


def _measured(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": name} | {measure: entry.get(f"eval_{measure}") for measure in MEASURES}


def _data(use: str, groups: Any) -> dict[str, Any]:
    name = groups.info.dataset_name
    shown = name if _is_public(name) else "not published"
    return {"use": use, "name": shown, "rows": len(groups), "fingerprint": groups._fingerprint}


def _is_public(name: str | None) -> bool:
    return bool(name) and is_hub_id(str(name))


def _teacher(teacher: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return id and revision; of a local path only its last part."""
    if not teacher:
        return None
    name = str(teacher["id"])
    shown = name if _is_public(name) else f"{os.path.basename(name.rstrip('/'))} (not published)"
    return {"id": shown, "revision": teacher.get("revision")}


def _eval_results(facts: CardFacts) -> list[EvalResult]:
    measured = facts.results[0] if facts.results else {}
    return [
        EvalResult(
            task_type="text-ranking",
            dataset_type=facts.dataset if _is_public(facts.dataset) else "judgments",
            dataset_name=facts.dataset,
            metric_type=measure,
            metric_name=title,
            metric_value=round(measured[measure], 4),
        )
        for measure, title in MEASURES.items()
        if measured.get(measure) is not None and math.isfinite(measured[measure])
    ]


def _row(row: Mapping[str, Any]) -> dict[str, str]:
    digits = dict.fromkeys(MEASURES, 4) | {"pairs_per_s": 0}
    values = {name: row.get(name) for name in digits}
    shown = {name: "-" if value is None else f"{value:,.{digits[name]}f}" for name, value in values.items()}
    return {name.replace("@", "_"): text for name, text in shown.items()} | {"name": str(row["name"])}
