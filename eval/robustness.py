"""Compare models by how much the wording of a request matters, and write down what was found:

  python -m eval.robustness --models sft=runs/sft jepa=runs/jepa --task nl_rx --data DIR --out FOLDER
  python -m eval.robustness --models sft=runs/sft-0,runs/sft-1 jepa=runs/jepa-0,runs/jepa-1 ...     (seeds of two arms)
  python -m eval.robustness --samples sft=FOLDER/sft jepa=OTHER/jepa --out THIRD                    (scored before)

FOLDER gets results.json (every figure with its interval), report.md with two plots, and every answer. A second call
with the same settings scores only what is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_jepa import UserError
from llm_jepa.core.files import write_json

from .command import one_line_errors
from .figures.groups import compare, embedding_view, figures, read_answers, refuse_single, robustness
from .figures.inference import Interval, holm
from .figures.robustness_report import (
    PHRASING,
    SCATTER,
    TITLES,
    differences,
    plot_phrasing,
    plot_worst,
    report,
    summary,
)
from .provenance import environment
from .run import evaluate_model
from .tasks import TASKS, Group, task_named

SCHEMA = 1
RESULTS, SAMPLES, REPORT = "results.json", "samples.jsonl", "report.md"
# What has to be equal for two runs to be compared: otherwise a difference says nothing about the models.
SAME = ("task", "data_sha256", "limit", "groups", "wordings")
# Whose p values are shown: fixed before looking, and few, as each costs the others power.
TESTED = ("accuracy", "worst_of_k", "consistency")


@dataclass(frozen=True)
class Run:
    """One scored model: what `eval.run` writes about it."""

    result: dict[str, Any]
    samples: list[dict[str, Any]]
    embedding: dict[str, Interval] | None = None


# -- figures -----------------------------------------------------------------------------------------------------------


def analyse(arms: Mapping[str, Sequence[Run]], *, baseline: str, metric: str) -> dict[str, Any]:
    """All figures, as results.json has them. An arm is a model, or several runs (seeds) of one recipe.

    Raises UserError if the runs differ in task, data, groups, wordings or decoding, or lack the metric.
    """
    runs = [(name, run) for name, of_arm in arms.items() for run in of_arm]
    first_name, first = runs[0]
    for name, run in runs[1:]:
        ours, theirs = ({**{key: r.get(key) for key in SAME}, **_decoding(r)} for r in (first.result, run.result))
        for key, value in ours.items():
            if theirs[key] != value:
                raise UserError(
                    f"{first_name} and {name} differ in {key} ({_short(value)} and {_short(theirs[key])}), so they "
                    "cannot be compared; score both alike."
                )
    answers = {name: [read_answers(run.samples, metric) for run in of_arm] for name, of_arm in arms.items()}
    some = answers[first_name][0]
    counts = some.present.sum(axis=1)
    models = {name: _figures_of(arms[name], answers[name]) for name in arms}
    comparisons = {name: _compared(answers[name], answers[baseline]) for name in arms if name != baseline}
    for kind in ("mcnemar", "over_seeds"):  # one family each: all p values that the report shows
        every = {f"{name}\n{key}": test["p"] for name, pair in comparisons.items() for key, test in pair[kind].items()}
        for where, p in holm(every).items():
            name, key = where.split("\n", 1)
            comparisons[name][kind][key]["p_holm"] = p
    return {
        "schema": SCHEMA,
        "kind": "robustness",
        "finished": True,
        "metric": metric,
        **{key: first.result.get(key) for key in SAME},
        "decoding": _decoding(first.result),
        "counted_groups": len(some.groups),
        "left_out": some.left_out,
        "wordings": list(some.wordings),
        "k": [int(counts.min()), int(counts.max())],
        "baseline": baseline,
        "order": list(arms),
        "models": models,
        "comparisons": comparisons,
        "environment": environment(),
    }


def _decoding(result: Mapping[str, Any]) -> dict[str, Any]:
    """What of the decoding must be equal. Stop tokens belong to the tokenizer, the batch size to the machine."""
    return {key: result["decoding"].get(key) for key in ("greedy", "max_new_tokens")}


def _figures_of(runs: Sequence[Run], answers: Sequence[Any]) -> dict[str, Any]:
    found = robustness(answers)
    by_seed = [figures(one) for one in answers]
    result: dict[str, Any] = {"runs": [run.result for run in runs]}
    for kind, intervals in (("metrics", found.metrics), ("wordings", found.wordings)):
        result[kind] = {
            name: {**_plain(interval), "by_seed": [_or_none(one[kind, name]) for one in by_seed]}
            for name, interval in intervals.items()
        }
    names = dict.fromkeys(name for run in runs for row in run.samples for name in row["scores"])
    result["scores"] = {
        name: statistics.mean(figures(read_answers(run.samples, name))["metrics", "accuracy"] for run in runs)
        for name in names
    }
    views = [run.embedding for run in runs if run.embedding is not None]
    if views:
        result["embedding"] = {
            name: {
                **_plain(views[0][name] if len(views) == 1 else Interval(math.nan, math.nan, math.nan)),
                "estimate": statistics.mean(view[name].estimate for view in views),
                "by_seed": [view[name].estimate for view in views],
            }
            for name in views[0]
        }
    return result


def _compared(model: Sequence[Any], baseline: Sequence[Any]) -> dict[str, Any]:
    found = compare(model, baseline)
    return {
        "metrics": {name: _plain(interval) for name, interval in found.metrics.items()},
        "wordings": {name: _plain(interval) for name, interval in found.wordings.items()},
        "mcnemar": {
            wording: {"only_model": test.only_a, "only_baseline": test.only_b, "p": test.p}
            for wording, test in found.mcnemar.items()
        },
        "over_seeds": {
            name: {
                "by_seed": list(seeds.by_seed),
                "t": _plain(seeds.t),
                "p": seeds.p,
                "crossed": _plain(seeds.crossed) if seeds.crossed else None,
            }
            for name, seeds in found.over_seeds.items()
            if name in TESTED
        },
    }


def _plain(interval: Interval) -> dict[str, float | None]:
    return {key: _or_none(value) for key, value in interval._asdict().items()}  # JSON has no NaN


def _or_none(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


# -- model card --------------------------------------------------------------------------------------------------------

CARD_METRICS = ("accuracy", "worst_of_k", "consistency", "consistent_and_correct", "drop_rate")


def write_card(folder: str | Path, run: Run, *, dataset: str, metric: str) -> Path:
    """Put a run's figures into the `model-index` of its folder's README.md; everything else in the card stays.

    An entry of the same task, data set and metric is replaced, so writing twice changes nothing. (Comments in the
    YAML block are lost: it is read and written again.) Values are shares in 0..1, with their 95 % intervals.
    """
    from huggingface_hub import EvalResult, RepoCard
    from huggingface_hub.repocard_data import eval_results_to_model_index

    path = Path(folder) / "README.md"
    answers = read_answers(run.samples, metric)
    counts = answers.present.sum(axis=1)
    k = f"{counts.min()}" if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"
    results = [
        EvalResult(
            task_type="text-generation",
            task_name="Text Generation",
            dataset_type=dataset,
            dataset_name=f"{run.result['task']} in several wordings",
            dataset_args={"sha256": run.result["data_sha256"]},
            metric_type=name,
            metric_name=f"{TITLES[name]} ({metric})",
            metric_value=round(interval.estimate, 4),
            metric_args={
                "groups": len(answers.groups),
                "wordings": k,
                **({} if math.isnan(interval.low) else {"interval_95": [round(x, 4) for x in interval[1:]]}),
            },
        )
        for name, interval in robustness([answers]).metrics.items()
        if name in CARD_METRICS and not math.isnan(interval.estimate)
    ]
    [new] = eval_results_to_model_index(Path(folder).name, results)
    try:
        card = RepoCard.load(path) if path.is_file() else RepoCard(f"---\n{{}}\n---\n# {Path(folder).name}\n")
        index = card.data.get("model-index") or [{"name": Path(folder).name, "results": []}]
        _merge(index[0]["results"], new["results"][0])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"The metadata of {path} cannot be read ({error}); mend its first lines.") from None
    card.data["model-index"] = index
    card.save(path)
    return path


def _merge(results: list[dict[str, Any]], new: dict[str, Any]) -> None:
    def same(entry: dict[str, Any]) -> tuple[Any, ...]:
        return entry["task"]["type"], *(entry["dataset"].get(key) for key in ("type", "config", "split", "revision"))

    old = next((entry for entry in results if same(entry) == same(new)), None)
    if old is None:
        results.append(new)
        return
    ours = {(metric["type"], metric.get("name")): metric for metric in new["metrics"]}
    kept = [ours.pop((metric["type"], metric.get("name")), metric) for metric in old["metrics"]]
    old |= {"task": new["task"], "dataset": new["dataset"], "metrics": [*kept, *ours.values()]}


# -- scoring -----------------------------------------------------------------------------------------------------------


def parse_arms(entries: Sequence[str]) -> dict[str, list[str]]:
    """`NAME=one,two`, or a folder or Hub id by itself (its last part is the name) -> {name: [sources]}."""
    arms: dict[str, list[str]] = {}
    for entry in entries:
        name, named, sources = ("", "", entry) if "=" not in entry or Path(entry).exists() else entry.partition("=")
        parts = sources.split(",") if named else [sources]
        if not named:
            name = (Path(sources).resolve().name if Path(sources).exists() else sources.split("/")[-1]).removesuffix(
                ".json"
            )
        if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
            raise UserError(f"{name!r} is no name for a model's folder; write NAME={sources} with letters and digits.")
        if name in arms:
            raise UserError(f"Two models are named {name!r}; write NAME={sources} to tell them apart.")
        if not all(parts) or len(set(parts)) < len(parts):
            raise UserError(f"{entry!r} names a run twice, or none; write NAME=run1,run2.")
        arms[name] = parts
    return arms


def claim(out: Path, settings: dict[str, Any]) -> None:
    """Make the folder ours, or see that it is ours with the same settings. Raises UserError otherwise."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder.")
    if out.is_dir() and any(out.iterdir()):
        try:
            before = json.loads((out / RESULTS).read_text())
            found = before["settings"] if before["kind"] == "robustness" else None
        except (OSError, ValueError, KeyError, TypeError):
            found = None
        if found is None:
            raise UserError(f"--out {out} holds something else; choose another --out.")
        for key, value in settings.items():
            if found.get(key) != value:
                raise UserError(
                    f"--out {out} was made with another {key} ({_short(found.get(key))}, now {_short(value)}); choose "
                    "another --out."
                )
        return
    write_json(out / RESULTS, {"schema": SCHEMA, "kind": "robustness", "finished": False, "settings": settings})


def read_scored(source: str) -> Run:
    """A run scored before: its folder with results.json and samples.jsonl, or FILE.json of `eval.run`."""
    path = Path(source)
    file, lines = (path / RESULTS, path / SAMPLES) if path.is_dir() else (path, path.with_suffix(".samples.jsonl"))
    missing = [str(each) for each in (file, lines) if not each.is_file()]
    if missing:
        raise UserError(f"There is no {' and no '.join(missing)}; give the folder or the file of a scored run.")
    try:
        result = json.loads(file.read_text())
        samples = [json.loads(line) for line in lines.read_text().splitlines() if line.strip()]
    except ValueError as error:
        raise UserError(f"{source} cannot be read: {error}") from None
    lacking = [key for key in ("task", "primary", "data_sha256", "decoding", "groups", "model") if key not in result]
    if lacking:
        raise UserError(f"{file} is no result of one model: it has no {', '.join(lacking)}.")
    if len({row["group"] for row in samples}) != result["groups"]:
        raise UserError(f"{lines} does not hold the {result['groups']} groups of {file.name}; score the model again.")
    return Run(result, samples)


def embed_prompts(model: str, groups: Sequence[Group], out: Path, *, batch_size: int) -> dict[str, Interval]:
    """`embedding_view` of the prompts of all groups, embedded by `llm-jepa embed` and kept in `out`."""
    import torch
    from safetensors.torch import load_file

    from llm_jepa.cli import main as llm_jepa

    rows = [
        {"prompt": prompt, "completion": group.answer}
        if isinstance(prompt, str)
        else {"messages": [*prompt, {"role": "assistant", "content": group.answer}]}
        for group in groups
        for prompt in group.prompts
    ]
    done, inputs, partial = (out / name for name in ("embeddings.safetensors", "prompts.jsonl", "embeddings.partial"))
    if not done.is_file():
        partial.unlink(missing_ok=True)
        inputs.write_text("".join(json.dumps(row) + "\n" for row in rows))
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            code = llm_jepa(
                ["embed", model, "--input", str(inputs), "--output", str(partial), "--batch_size", str(batch_size)]
            )
        if code:
            raise UserError(said.getvalue().strip().removeprefix("llm-jepa: error: "))
        sys.stderr.write(said.getvalue())
        os.replace(partial, done)
        inputs.unlink()
    index = torch.tensor([i for i, group in enumerate(groups) for _ in group.prompts])
    return embedding_view(load_file(done)["context"], index)


@one_line_errors("eval.robustness")
def main(argv: Sequence[str] | None = None) -> int:
    about, _, examples = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m eval.robustness",
        description=about,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--models", nargs="+", default=[], metavar="[NAME=]DIR", help="model folders or Hub ids")
    parser.add_argument("--samples", nargs="+", default=[], metavar="[NAME=]DIR", help="runs that were scored before")
    parser.add_argument("--task", help=f"{', '.join(TASKS)}")
    parser.add_argument("--data", help="a folder or file of the task, or a Hub id")
    parser.add_argument("--out", required=True, help="folder for results, report and answers")
    parser.add_argument("--baseline", metavar="NAME", help="what the others are compared with (default: the first)")
    parser.add_argument("--metric", help="of the task's metrics (default: its primary one)")
    parser.add_argument("--limit", type=int, help="use the first N groups only")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--embeddings", action="store_true", help="also look at where the prompts lie")
    parser.add_argument("--write-card", action="store_true", help="put the figures into each model's README.md")
    return _run(parser.parse_args(argv))


def _run(options: argparse.Namespace) -> int:
    models, scored = parse_arms(options.models), parse_arms(options.samples)
    _check(options, models, scored)
    out = Path(options.out)
    arms: dict[str, list[Run]] = {name: [read_scored(source) for source in scored[name]] for name in scored}
    if models:
        task = task_named(options.task)
        data = task.load(options.data)
        groups = data.groups[: options.limit]
        refuse_single([len(group.prompts) for group in groups])
        if len(groups) < 2:
            raise UserError(f"{len(groups)} group(s) to ask: an interval over groups needs two or more.")
        settings = {"task": task.name, "data_sha256": data.sha256, "limit": options.limit}
    else:
        settings = {key: next(iter(arms.values()))[0].result.get(key) for key in ("task", "data_sha256", "limit")}
    claim(out, settings)
    for name, sources in models.items():
        arms[name] = []
        for number, source in enumerate(sources, start=1):
            folder = out / name if len(sources) == 1 else out / name / str(number)
            print(f"{name}: {source}")
            result, samples = evaluate_model(
                source,
                task,
                data,
                out=folder / RESULTS,
                samples=folder / SAMPLES,
                batch_size=options.batch_size,
                limit=options.limit,
            )
            view = embed_prompts(source, groups, folder, batch_size=options.batch_size) if options.embeddings else None
            arms[name].append(Run(result, samples, view))
    arms = {name: arms[name] for name in (*models, *scored)}
    metric = options.metric or next(iter(arms.values()))[0].result["primary"]
    analysis = analyse(arms, baseline=options.baseline or next(iter(arms)), metric=metric) | {"settings": settings}
    plot_worst(analysis).savefig(out / SCATTER, dpi=150)
    plot_phrasing(analysis).savefig(out / PHRASING, dpi=150)
    (out / REPORT).write_text(report(analysis))
    write_json(out / RESULTS, analysis)
    print("\n" + summary(analysis))
    if analysis["comparisons"]:
        print("\n" + differences(analysis))
    print(f"\nWrote {out / REPORT}, {RESULTS} and two plots.")
    if options.write_card:
        dataset = task.name if Path(options.data).exists() else options.data
        for name, sources in models.items():
            for source, run in zip(sources, arms[name], strict=True):
                print(f"Wrote {write_card(source, run, dataset=dataset, metric=metric)}")
    return 0


def _check(options: argparse.Namespace, models: Mapping[str, list[str]], scored: Mapping[str, list[str]]) -> None:
    """What can be seen to be wrong before anything is computed."""
    if not models and not scored:
        raise UserError("Which models? Give --models DIR ... or --samples DIR ...")
    for name in ("limit", "batch_size"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name} must be 1 or more, not {getattr(options, name)}.")
    if both := set(models) & set(scored):
        raise UserError(f"--models and --samples both have a {min(both)!r}; write NAME=DIR to tell them apart.")
    if options.baseline is not None and options.baseline not in {**models, **scored}:
        raise UserError(f"--baseline {options.baseline!r} is none of {', '.join([*models, *scored])}.")
    if models and (options.task is None or options.data is None):
        raise UserError("--models needs --task and --data.")
    given = ("task", "data", "limit", "embeddings", "write_card")
    if not models and (odd := [name for name in given if getattr(options, name)]):
        raise UserError(
            f"--{odd[0].replace('write_card', 'write-card')} goes with --models; --samples are scored already."
        )
    if options.write_card:
        remote = [source for sources in models.values() for source in sources if not Path(source).is_dir()]
        if remote:
            raise UserError(f"--write-card writes README.md in a model's folder, and {remote[0]} is none.")


if __name__ == "__main__":
    sys.exit(main())
