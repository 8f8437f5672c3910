"""Compare models by how much the wording of a request matters, and write a report:

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
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from llm_jepa import UserError, cli
from llm_jepa.core.files import write_json, write_json_lines, write_whole, written_whole
from llm_jepa.core.json_files import read_json, read_json_lines
from llm_jepa.core.signals import INTERRUPTED, TRY_AGAIN, Stopped
from llm_jepa.lm import check_model, tokenizer_from

from .command import ArgumentParser, one_line_errors, require, whole
from .figures.groups import embedding_view, refuse_single
from .figures.inference import Interval
from .figures.robustness_analysis import SCHEMA, Run, analyse, shortened
from .figures.robustness_card import read_card, write_card
from .figures.robustness_plots import plot_phrasing, plot_worst
from .figures.robustness_report import PHRASING, SCATTER, differences, report, summary
from .run import evaluate_model
from .tasks import TASKS, Data, Group, Task, task_named, turns_of

RESULTS, SAMPLES, REPORT = "results.json", "samples.jsonl", "report.md"
Sources = dict[str, list[str]]  # of each arm

ONLY_WITH_MODELS = {
    "task": "--task",
    "data": "--data",
    "limit": "--limit",
    "embeddings": "--embeddings",
    "write_card": "--write-card",
}


def parse_arms(entries: Sequence[str]) -> Sources:
    """{name: [sources]} of entries `NAME=one,two`, or of a folder or Hub id alone, whose last part is the name."""
    arms: Sources = {}
    for entry in entries:
        if "=" in entry and not Path(entry).exists():
            name, _, listed = entry.partition("=")
            sources = listed.split(",")
        else:
            name, sources = _name_of(entry), [entry]
        if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
            raise UserError(
                f"{name!r} cannot be the name of a model's folder; write NAME={','.join(sources)} with letters and "
                "digits."
            )
        if name in arms:
            raise UserError(f"Two models are named {name!r}; give one another name: NAME={','.join(sources)}.")
        if not all(sources) or len(set(sources)) < len(sources):
            raise UserError(f"{entry!r} names a run twice, or none; write NAME=run1,run2.")
        arms[name] = sources
    return arms


def _name_of(source: str) -> str:
    if Path(source).exists():
        return Path(source).resolve().name.removesuffix(".json")
    return source.split("/")[-1].removesuffix(".json")


def claim(out: Path, settings: dict[str, Any]) -> None:
    """Reserve the folder for these settings. Raises UserError if it holds something else, or other settings."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder.")
    if not out.is_dir() or not any(out.iterdir()):
        write_json(out / RESULTS, {"schema": SCHEMA, "kind": "robustness", "finished": False, "settings": settings})
        return
    before = _settings_of(out)
    if before is None:
        raise UserError(f"--out {out} holds something else; choose another --out.")
    for key, value in settings.items():
        if before.get(key) != value:
            raise UserError(
                f"--out {out} was made with another {key} ({shortened(before.get(key))}, now {shortened(value)}); "
                "choose another --out."
            )


def _settings_of(out: Path) -> dict[str, Any] | None:
    """The settings of an earlier call; None if the folder is not of this command."""
    try:
        before = read_json(out / RESULTS, is_finite=False)
        settings: dict[str, Any] = before["settings"]
        return settings if before["kind"] == "robustness" else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_scored(source: str) -> Run:
    """A run that was scored before: its folder with results.json and samples.jsonl, or FILE.json of `eval.run`."""
    path = Path(source)
    file, lines = path, path.with_suffix(".samples.jsonl")
    if path.is_dir():
        file, lines = path / RESULTS, path / SAMPLES
    missing = [str(file_or_lines) for file_or_lines in (file, lines) if not file_or_lines.is_file()]
    if missing:
        raise UserError(f"There is no {' and no '.join(missing)}; give the folder or the file of a scored run.")
    try:
        result = read_json(file, is_finite=False)
        samples = read_json_lines(lines, {"group": (str, int)})
    except ValueError as error:
        raise UserError(f"{source} cannot be read: {error}") from None
    lacking = [key for key in ("task", "primary", "data_sha256", "decoding", "groups", "model") if key not in result]
    if lacking:
        raise UserError(f"{file} is not the result of one model: it has no {', '.join(lacking)}.")
    if len({row["group"] for row in samples}) != result["groups"]:
        raise UserError(f"{lines} does not hold the {result['groups']} groups of {file.name}; score the model again.")
    return Run(result, samples)


def embed_prompts(model: str, groups: Sequence[Group], out: Path, *, batch_size: int) -> dict[str, Interval]:
    """`embedding_view` of the prompts of all groups. `llm-jepa embed` embeds them; the embeddings stay in `out`."""
    embeddings = out / "embeddings.safetensors"
    if not embeddings.is_file():
        _embed(model, _rows(groups), embeddings, batch_size)
    group_of_row: list[int] = []
    for index, group in enumerate(groups):
        group_of_row += [index] * len(group.prompts)
    return embedding_view(load_file(embeddings)["context"], torch.tensor(group_of_row))


def _rows(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Every prompt with its gold answer, in the formats of training."""
    rows: list[dict[str, Any]] = []
    for group in groups:
        for prompt in group.prompts:
            turns = turns_of(prompt)
            if isinstance(turns, str):
                rows.append({"prompt": turns, "completion": group.answer})
                continue
            row: dict[str, Any] = {"messages": [*turns, {"role": "assistant", "content": group.answer}]}
            if isinstance(prompt, dict):
                row["chat_template_kwargs"] = prompt["chat_template_kwargs"]
            rows.append(row)
    return rows


def _embed(model: str, rows: Sequence[dict[str, Any]], out: Path, batch_size: int) -> None:
    """Run `llm-jepa embed`. Its result appears under its name only when it is complete."""
    inputs = out.with_name("prompts.jsonl")
    write_json_lines(inputs, rows)
    messages = io.StringIO()
    files = ["--input", str(inputs), "--output", str(out)]
    with contextlib.redirect_stderr(messages):
        code = cli.main(["embed", model, *files, "--batch_size", str(batch_size)])
    if code in (TRY_AGAIN, INTERRUPTED):
        raise Stopped(signal.SIGINT if code == INTERRUPTED else signal.SIGTERM)
    if code:
        raise UserError(messages.getvalue().strip().removeprefix("llm-jepa: error: "))
    sys.stderr.write(messages.getvalue())
    inputs.unlink()


# -- the command -------------------------------------------------------------------------------------------------------


@one_line_errors("eval.robustness", if_stopped="The answers so far are kept; the same command continues.")
def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    models, scored = parse_arms(options.models), parse_arms(options.samples)
    _check(options, models, scored)
    out = Path(options.out)
    arms: dict[str, list[Run]] = {}
    for name, sources in scored.items():
        arms[name] = [read_scored(source) for source in sources]
    for sources in models.values():
        for source in sources:  # before the first one is scored
            check_model(source)
            tokenizer_from(source)
    if models:
        task = task_named(options.task)
        data = task.load(options.data)
        _check_groups(data.groups[: options.limit])
        settings = {"task": task.name, "data_sha256": data.sha256, "limit": options.limit}
    else:
        first = next(iter(arms.values()))[0].result
        settings = {key: first.get(key) for key in ("task", "data_sha256", "limit")}
    claim(out, settings)
    for name, sources in models.items():
        arms[name] = _score_arm(name, sources, task, data, out, options)
    arms = {name: arms[name] for name in (*models, *scored)}
    metric = options.metric or next(iter(arms.values()))[0].result["primary"]
    analysis = analyse(arms, baseline=options.baseline or next(iter(arms)), metric=metric) | {"settings": settings}
    _write(out, analysis)
    if options.write_card:
        dataset = task.name if Path(options.data).exists() else options.data
        for name, sources in models.items():
            for source, run in zip(sources, arms[name], strict=True):
                if note := run.result.get("prompts_in_another_format"):
                    print(f"No figures in the card of {source}, because {note}", file=sys.stderr)
                    continue
                print(f"Wrote {write_card(source, run, dataset=dataset, metric=metric)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    about, _, examples = str(__doc__).partition("\n\n")
    parser = ArgumentParser(
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
    parser.add_argument(
        "--baseline", metavar="NAME", help="the model that others are compared with (default: the first)"
    )
    parser.add_argument("--metric", help="one of the task's metrics (default: its primary one)")
    parser.add_argument("--limit", type=whole(1), help="use the first N groups only")
    parser.add_argument("--batch_size", type=whole(1), default=64)
    parser.add_argument("--embeddings", action="store_true", help="also embed the prompts and measure their geometry")
    parser.add_argument("--write-card", action="store_true", help="put the figures into each model's README.md")
    return parser


def _check(options: argparse.Namespace, models: Mapping[str, list[str]], scored: Mapping[str, list[str]]) -> None:
    """Raises UserError for options that cannot work, before anything is computed."""
    require("scipy", "matplotlib")
    if not models and not scored:
        raise UserError("No model is given; use --models DIR ... or --samples DIR ...")
    if both := set(models) & set(scored):
        raise UserError(f"--models and --samples both have a {min(both)!r}; give one another name: NAME=DIR.")
    if options.baseline is not None and options.baseline not in {**models, **scored}:
        raise UserError(f"--baseline {options.baseline!r} is none of {', '.join([*models, *scored])}.")
    if models and (options.task is None or options.data is None):
        raise UserError("--models needs --task and --data.")
    if not models:
        for name, option in ONLY_WITH_MODELS.items():
            if getattr(options, name):
                raise UserError(f"{option} goes with --models; --samples are scored already.")
    if options.write_card:
        for sources in models.values():
            for source in sources:
                if not Path(source).is_dir():
                    raise UserError(f"--write-card writes README.md in a model's folder, but {source} is not a folder.")
                read_card(source)


def _check_groups(groups: Sequence[Group]) -> None:
    refuse_single([len(group.prompts) for group in groups])
    if len(groups) < 2:
        raise UserError(f"{len(groups)} group(s) to ask: an interval over groups needs two or more.")


def _score_arm(
    name: str, sources: Sequence[str], task: Task, data: Data, out: Path, options: argparse.Namespace
) -> list[Run]:
    """Score the runs of an arm, each in a folder below `out`. Finished runs are read from there."""
    runs = []
    for number, source in enumerate(sources, start=1):
        folder = out / name
        if len(sources) > 1:
            folder = folder / str(number)
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
        view = None
        if options.embeddings:
            view = embed_prompts(source, data.groups[: options.limit], folder, batch_size=options.batch_size)
        runs.append(Run(result, samples, view))
    return runs


def _write(out: Path, analysis: Mapping[str, Any]) -> None:
    """The plots, the report, and last the results; the short tables go to the terminal."""
    for name, draw in ((SCATTER, plot_worst), (PHRASING, plot_phrasing)):
        with written_whole(out / name) as temporary:
            draw(analysis).savefig(temporary, dpi=150)
    write_whole(out / REPORT, report(analysis))
    write_json(out / RESULTS, analysis)
    print("\n" + summary(analysis))
    if analysis["comparisons"]:
        print("\n" + differences(analysis))
    print(f"\nWrote {out / REPORT}, {RESULTS} and two plots.")


if __name__ == "__main__":
    sys.exit(main())
