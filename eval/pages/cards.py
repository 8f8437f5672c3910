"""The model cards of the checkpoints that the committed results are about. Their figures are also the model-index.

Each is also the README of a checkpoint of the package, with the hashes of its files.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..checkpoints import file_hashes
from . import nl_rx, vl


class Figure(NamedTuple):
    kind: str  # the Hub's name of the metric
    title: str
    values: Sequence[float]  # by seed


class Card(NamedTuple):
    name: str
    checkpoint: str  # of the package
    text: str


def cards() -> list[Card]:
    return [_lm_card(), _vl_card()]


def _lm_card() -> Card:
    """The LLM-JEPA arm on NL-RX."""
    name = "tiny-llama-nl-rx-info-nce"
    runs = {key: results for key, results in nl_rx.load().items() if key[0] == "completion"}
    results = runs["completion", "info_nce"]
    figures = []
    for title, wording in (("synth", "original"), ("turk", "paraphrase")):
        exact = [result["metrics"][wording]["exact"] for result in results]
        figures.append(Figure("exact_match", f"exact match, {title}, mean of {len(results)} seeds", exact))
    run = results[0]["model"]["run"]
    metadata = _metadata(
        name, "transformers", "text-generation", ("nl_rx", "NL-RX-SYNTH, lines not known from training"), figures
    )
    text = _card(
        "lm_card",
        metadata,
        name=name,
        shape=run["model_config"],
        weight=run["jepa_weight"],
        table=nl_rx.table(runs),
        hashes=file_hashes("nl-rx"),
    )
    return Card(name, "nl-rx", text)


def _vl_card() -> Card:
    """The VL-JEPA from scratch on ShapeStream."""
    name = "vl-jepa-shapestream"
    runs = vl.shapestream_runs()
    results = runs["scratch"]
    figures = []
    for kind, title, key in (
        ("accuracy", "kind of event, 13-way", "kind_accuracy"),
        ("recall_at_1", "text to video, same event", "same_event_recall_at_1"),
        ("accuracy", "questions, mean of all types", "questions_mean"),
    ):
        values = [result["test"][key] for result in results]
        figures.append(Figure(kind, f"{title}, mean of {len(results)} seeds", values))
    world = f"ShapeStream {results[0]['world_version']}"
    metadata = _metadata(name, "llm-jepa", "video-text-to-text", ("generated", world), figures)
    text = _card(
        "vl_card",
        metadata,
        name=name,
        parameters=sum(results[0]["weights"].values()),
        seconds=statistics.mean(result["summary"]["process_seconds"] for result in results),
        table=vl.shapestream_table(runs),
        decoder=vl.read_all("shapestream_decoder-seed0.json")[0],
        hashes=file_hashes("shapestream"),
    )
    return Card(name, "shapestream", text)


def _metadata(name: str, library: str, task: str, data: tuple[str, str], figures: Sequence[Figure]) -> ModelCardData:
    """The YAML head. library: the import that the model needs. data: (type, name) as the Hub has them."""
    results = [
        EvalResult(
            task_type=task, dataset_type=data[0], dataset_name=data[1], metric_type=figure.kind,
            metric_name=figure.title, metric_value=round(statistics.mean(figure.values), 4),
        )
        for figure in figures
    ]  # fmt: skip
    return ModelCardData(
        library_name=library, pipeline_tag=task, license="apache-2.0", tags=["llm-jepa", "jepa"],
        model_name=name, eval_results=results,
    )  # fmt: skip


def _card(template: str, metadata: ModelCardData, **facts: Any) -> str:
    path = Path(__file__).with_name(f"{template}.md.jinja")
    return f"{ModelCard.from_template(metadata, template_path=str(path), **facts)}\n"
