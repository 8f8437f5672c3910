"""The figures of `eval.robustness` in a model card."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, RepoCard
from huggingface_hub.repocard_data import eval_results_to_model_index
from ruamel.yaml import YAMLError

from llm_jepa import UserError
from llm_jepa.core.card import NOT_EVALUATED
from llm_jepa.core.errors import one_line
from llm_jepa.core.files import write_whole
from llm_jepa.core.strict_yaml import MAX_BYTES, load_yaml

from .groups import read_answers, robustness
from .inference import Interval
from .robustness_analysis import Run
from .robustness_report import TITLES, number_or_range
from .tables import markdown_table

BEGIN, END = "<!-- robustness: {} -->", "<!-- end of robustness -->"
CARD_METRICS = ("accuracy", "worst_of_k", "consistency", "consistent_and_correct", "drop_rate")


def write_card(folder: str | Path, run: Run, *, dataset: str, metric: str) -> Path:
    """Put a run's figures into its folder's README.md: into the `model-index`, and as a table that a reader sees.

    Everything else in the card stays, but for the sentence that nothing is known about the model. An entry and a table
    of the same task, data set and metric are replaced, so writing twice changes nothing. (Comments in the YAML block
    are lost, because it is parsed and written again.) Values of the index are shares in 0..1, with 95 % intervals.

    Raises UserError for metadata that cannot be read.
    """
    path = Path(folder) / "README.md"
    results = _results(run, dataset, metric)
    [new] = eval_results_to_model_index(Path(folder).name, results)
    card = read_card(folder)
    index = card.data.get("model-index") or [{"name": Path(folder).name, "results": []}]
    try:
        _merge(index[0]["results"], new["results"][0])
    except (KeyError, TypeError) as error:
        raise UserError(f"The metadata of {path} cannot be read ({error}); correct its first lines.") from None
    card.data["model-index"] = index
    card.text = _with_table(card.text, run, results, dataset, metric)
    write_whole(path, str(card))
    return path


def read_card(folder: str | Path) -> RepoCard:
    """The README.md of a model's folder, or an empty card. Raises UserError if its metadata cannot be read."""
    path = Path(folder) / "README.md"
    if not path.is_file():
        return RepoCard(f"---\n{{}}\n---\n# {Path(folder).name}\n")
    try:
        _check_metadata(path)
        card = RepoCard.load(path)
        for entry in card.data.get("model-index") or []:
            entry["results"]
    except (ValueError, KeyError, TypeError, AttributeError, YAMLError) as error:
        reason = one_line(error, 200)
        raise UserError(f"The metadata of {path} cannot be read ({reason}); correct its first lines.") from None
    return card


def _check_metadata(path: Path) -> None:
    """Raises ValueError or YAMLError for a card that would take long to parse: by its size, depth, or aliases."""
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"the card has {path.stat().st_size} bytes, and the limit is {MAX_BYTES}")
    parts = path.read_text(encoding="utf-8").split("---\n", maxsplit=2)
    if len(parts) == 3 and not parts[0].strip("\ufeff \n"):
        load_yaml(parts[1])


def _with_table(text: str, run: Run, results: list[EvalResult], dataset: str, metric: str) -> str:
    """The body of a card with the table of these results: in the place of the last one, or at the end."""
    sentence = r"\s+".join(map(re.escape, NOT_EVALUATED.split()))  # templates break its lines
    text = re.sub(rf"[ \n]*{sentence}", "", text)
    # A name of a stranger must not end the comment.
    begin = BEGIN.format(re.sub(r"[^\w./: ]", "_", f"{run.result['task']}, {metric}, {dataset}"))
    table = f"{begin}\n{_table(run, results, metric)}\n{END}"
    before, found, rest = text.partition(begin)
    if found and END in rest:
        return f"{before}{table}{rest.partition(END)[2]}"
    return f"{text.rstrip()}\n\n{table}\n"


def _table(run: Run, results: list[EvalResult], metric: str) -> str:
    """Heading, what was asked, and the figures in per cent."""
    rows = []
    for result in results:
        low, high = (result.metric_args or {}).get("interval_95", (None, None))
        interval = "" if low is None else f"{100 * low:.1f} to {100 * high:.1f}"
        rows.append([str(result.metric_name), f"{100 * result.metric_value:.1f}", interval])
    asked = results[0].metric_args or {}
    data = ", ".join(sha256[:12] for sha256 in run.result["data_sha256"].values())
    weights = run.result["model"].get("weights_sha256") or "unknown"
    lines = [
        f"## {run.result['task']} in several wordings",
        "",
        f"{asked['groups']} requests, each in {asked['wordings']} wordings. Data (SHA-256): {data}; weights: "
        f"{weights[:12]}. Accuracy is `{metric}` over all wordings.",
        "",
        markdown_table(["figure", "%", "95 % interval over requests"], rows),
    ]
    return "\n".join(lines)


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
