"""The figures of `eval.robustness` in a model card."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, RepoCard
from huggingface_hub.repocard_data import eval_results_to_model_index

from llm_jepa import UserError

from .groups import read_answers, robustness
from .inference import Interval
from .robustness_analysis import Run
from .robustness_report import TITLES, number_or_range

CARD_METRICS = ("accuracy", "worst_of_k", "consistency", "consistent_and_correct", "drop_rate")


def write_card(folder: str | Path, run: Run, *, dataset: str, metric: str) -> Path:
    """Put a run's figures into the `model-index` of its folder's README.md, and keep everything else in the card.

    An entry of the same task, data set and metric is replaced, so writing twice changes nothing. (Comments in the YAML
    block are lost, because it is parsed and written again.) Values are shares in 0..1, with their 95 % intervals.
    """
    path = Path(folder) / "README.md"
    results = _results(run, dataset, metric)
    [new] = eval_results_to_model_index(Path(folder).name, results)
    try:
        card = RepoCard.load(path) if path.is_file() else RepoCard(f"---\n{{}}\n---\n# {Path(folder).name}\n")
        index = card.data.get("model-index") or [{"name": Path(folder).name, "results": []}]
        _merge(index[0]["results"], new["results"][0])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"The metadata of {path} cannot be read ({error}); correct its first lines.") from None
    card.data["model-index"] = index
    card.save(path)
    return path


def _results(run: Run, dataset: str, metric: str) -> list[EvalResult]:
    answers = read_answers(run.samples, metric)
    num_wordings = answers.present.sum(axis=1)
    k = number_or_range(num_wordings.min(), num_wordings.max())
    intervals = robustness([answers]).metrics
    results = []
    for name in CARD_METRICS:
        interval = intervals[name]
        if math.isnan(interval.estimate):
            continue
        result = EvalResult(
            task_type="text-generation",
            task_name="Text Generation",
            dataset_type=dataset,
            dataset_name=f"{run.result['task']} in several wordings",
            dataset_args={"sha256": run.result["data_sha256"]},
            metric_type=name,
            metric_name=f"{TITLES[name]} ({metric})",
            metric_value=round(interval.estimate, 4),
            metric_args={"groups": len(answers.groups), "wordings": k, **_interval(interval)},
        )
        results.append(result)
    return results


def _interval(interval: Interval) -> dict[str, list[float]]:
    if math.isnan(interval.low):
        return {}
    return {"interval_95": [round(interval.low, 4), round(interval.high, 4)]}


def _merge(results: list[dict[str, Any]], new: dict[str, Any]) -> None:
    """Add `new` to the results of a card. In an entry of the same task and data set, metrics of ours are replaced."""
    old = next((entry for entry in results if _task_and_data(entry) == _task_and_data(new)), None)
    if old is None:
        results.append(new)
        return
    ours = {(metric["type"], metric.get("name")): metric for metric in new["metrics"]}
    metrics = [ours.pop((metric["type"], metric.get("name")), metric) for metric in old["metrics"]]
    old |= {"task": new["task"], "dataset": new["dataset"], "metrics": [*metrics, *ours.values()]}


def _task_and_data(entry: dict[str, Any]) -> tuple[Any, ...]:
    dataset = entry["dataset"]
    return entry["task"]["type"], *(dataset.get(key) for key in ("type", "config", "split", "revision"))
