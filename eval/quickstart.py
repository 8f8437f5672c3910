"""make quickstart: generate data, train plain SFT and LLM-JEPA on the CPU, score both, print a table, draw a picture.

It downloads nothing. Both arms are recipes in recipes/lm/tiny-llama, trained by the same command as any other recipe.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a 0.7M-parameter model runs slower on several threads

import torch

from llm_jepa import cli
from llm_jepa.core.files import write_json, written_whole
from llm_jepa.core.json_files import read_json
from llm_jepa.lm import (
    JEPACollator,
    add_view_columns,
    embed_pairs,
    model_from,
    predictor_token_ids,
    read_rows,
    tokenizer_from,
)
from llm_jepa.synthetic import nl_rx as generator

from .command import ArgumentParser, one_line_errors, require, whole
from .run import score_model
from .tasks.nl_rx import METRICS, WORDINGS

ARMS = {
    "sft": ("plain SFT", "lm/tiny-llama/nl-rx-quickstart-baseline"),
    "llm-jepa": ("LLM-JEPA", "lm/tiny-llama/nl-rx-quickstart"),
}
SPACE = ("recall_at_1", "cosine_matched", "raw_cosine_mismatched", "effective_rank_predicted", "effective_rank_target")
COLORS = {"sft": "#7f7f7f", "llm-jepa": "#1f77b4"}
NUM_SHOWN = 40  # pairs in the picture of the cosines
READING = """\
How to read this. It is one seed of a 0.7M-parameter model from random weights, on generated data.
- The geometry rows (step 0 -> best step) are what a run of this size can show. With the JEPA term the context finds its
  own target among 512 (recall_at_1, chance 0.002). Without the term the two views are not aligned.
- Ignore the accuracy gap: it is one seed on a steep learning curve. Another seed or length changes it by tens of
  points, and its sign.
- The additional training tokens are the cost of the views.
docs/results/nl_rx.md has repeated runs on real NL-RX."""


@one_line_errors("eval.quickstart")
def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m eval.quickstart", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder for data, models, picture")
    parser.add_argument("--steps", type=whole(1), help="training steps of each arm (default: as in its recipe)")
    parser.add_argument("--test", type=whole(1), default=300, help="number of test requests, each in two wordings")
    options = parser.parse_args(argv)
    require("matplotlib")
    torch.set_num_threads(1)
    started = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    files = generator.write(options.out / "data", test=options.test)
    results: dict[str, dict[str, Any]] = {}
    for arm in ARMS:
        code = train(arm, files, options)
        if code:
            return code
        results[arm], _ = score_model(str(options.out / arm), str(options.out / "data"), max_new_tokens=48)
    write_json(options.out / "results.json", results)
    print("\n" + table(results))
    print("\n" + READING)
    picture = draw(options.out, results)
    seconds = time.perf_counter() - started
    print(f"\nPicture: {picture}   Figures: {options.out / 'results.json'}   {seconds:.0f} s in all")
    return 0


def train(arm: str, files: dict[str, Path], options: argparse.Namespace) -> int:
    """Train one arm with the command line. Returns its exit code."""
    title, recipe = ARMS[arm]
    folder = options.out / arm
    if (folder / "run.json").exists():  # of an earlier quickstart; always start again
        shutil.rmtree(folder)
    print(f"\n=== {title}: llm-jepa train {recipe}", flush=True)
    overrides = ["--train_data", str(files["train"]), "--validation_data", str(files["validation"])]
    overrides += ["--output_dir", str(folder)]
    if not sys.stderr.isatty():  # progress bars make a log file unreadable
        overrides += ["--disable_tqdm", "true"]
    if options.steps is not None:
        overrides += ["--max_steps", str(options.steps)]
    return cli.main(["train", recipe, *overrides])


def table(results: dict[str, dict[str, Any]]) -> str:
    """Plain text: a row for each figure, a column for each arm."""
    rows: list[tuple[str, list[str]]] = []
    for wording in WORDINGS:
        for metric in METRICS:
            shares = [f"{100 * result['metrics'][wording][metric]:.1f} %" for result in results.values()]
            rows.append((f"{metric}, {wording} wording", shares))
    models = [result["model"] for result in results.values()]
    for key in SPACE:
        changes = [f"{model['space_at_start'][key]:.2f} -> {model['validation'][key]:.2f}" for model in models]
        rows.append((key, changes))
    rows.append(("validation LM loss", [f"{model['validation']['lm_loss']:.3f}" for model in models]))
    rows.append(("training tokens", [f"{model['train_tokens']:,}" for model in models]))
    rows.append(("training seconds", [f"{model['train_seconds']:.0f}" for model in models]))
    lines = [_line("", [ARMS[arm][0] for arm in results])]
    lines += [_line(name, values) for name, values in rows]
    return "\n".join(lines)


def _line(name: str, values: Sequence[str]) -> str:
    return f"{name:36s}" + "".join(f"{value:>18s}" for value in values)


def pairs_of(folder: Path, data: Path, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Centred, unit-norm predicted and target embeddings [N, D] of at most `count` test requests."""
    model, tokenizer = model_from(str(folder), dtype=torch.float32), tokenizer_from(str(folder))
    settings = model.config.llm_jepa
    rows = read_rows(str(data))
    rows = rows.select(range(min(count, len(rows))))
    views = [
        add_view_columns(row, i, tokenizer=tokenizer, context_view=settings["context_view"])
        for i, row in enumerate(rows)
    ]
    collator = JEPACollator(tokenizer.pad_token_id, predictor_token_ids(tokenizer, settings["num_predictor_tokens"]))
    predicted, target, _ = embed_pairs(model, model, [collator(views)], layer=settings["readout_layer"])
    return _centred(predicted), _centred(target)


def _centred(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(x - x.mean(dim=0), dim=-1)


def draw(out: Path, results: dict[str, dict[str, Any]]) -> Path:
    """Draw the training curves (above), and the embedding geometry and the answers of both arms (below)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(14, 8.2), layout="constrained")
    _draw_curves(axes[0], out)
    for axis, (arm, (title, _)) in zip(axes[1], ARMS.items(), strict=False):
        predicted, target = pairs_of(out / arm, out / "data" / "original_test.jsonl", NUM_SHOWN)
        image = axis.imshow(predicted @ target.T, cmap="RdBu_r", vmin=-1, vmax=1)
        axis.set(title=f"{title}: centred cosine", xlabel="target of request", ylabel="context of request")
        figure.colorbar(image, ax=axis, shrink=0.8)
    _draw_answers(axes[1, 2], results)
    figure.suptitle("llm_jepa quickstart: 0.7M-parameter Llama from scratch on generated NL-RX-like rows")
    path = out / "quickstart.png"
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)
    return path


def _draw_curves(axes: Any, out: Path) -> None:
    """Three panels: LM loss, recall@1 and effective rank over the steps of both arms."""
    from matplotlib.ticker import NullFormatter

    loss, recall, rank = axes
    for arm, (title, _) in ARMS.items():
        log = read_json(out / arm / "trainer_state.json", is_finite=False)["log_history"]
        color = COLORS[arm]
        loss.plot(*_series(log, "lm_loss"), color=color, alpha=0.4)
        loss.plot(*_series(log, "eval_lm_loss"), "o-", color=color, label=title)
        recall.plot(*_series(log, "eval_recall_at_1"), "o-", color=color, label=title)
        rank.plot(*_series(log, "eval_effective_rank_predicted"), "o-", color=color, label=f"{title}, context")
        rank.plot(*_series(log, "eval_effective_rank_target"), "s--", color=color, label=f"{title}, target")
    loss.set(title="LM loss: train (line), validation (dots)", xlabel="step", ylabel="nats per token", yscale="log")
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_formatter(NullFormatter())
    recall.set(title="Context picks its own target", xlabel="step", ylabel="recall@1 of 512 pairs", ylim=(0, 1))
    rank.set(title="Directions in use", xlabel="step", ylabel="effective rank", ylim=(0, None))
    for axis in axes:
        axis.legend(frameon=False)
        axis.grid(alpha=0.2)
        axis.spines[["top", "right"]].set_visible(False)


def _series(log: list[dict[str, float]], key: str) -> tuple[list[float], list[float]]:
    """(steps, values) of the log entries that have the key."""
    entries = [entry for entry in log if key in entry]
    return [entry["step"] for entry in entries], [entry[key] for entry in entries]


def _draw_answers(axis: Any, results: dict[str, dict[str, Any]]) -> None:
    """Bars: exact and startswith in both wordings, for both arms."""
    shown = list(itertools.product(WORDINGS, ("exact", "startswith")))
    width = 0.38
    for offset, (arm, result) in zip((-width / 2, width / 2), results.items(), strict=True):
        heights = [100 * result["metrics"][wording][metric] for wording, metric in shown]
        positions = [i + offset for i in range(len(shown))]
        bars = axis.bar(positions, heights, width, color=COLORS[arm], label=ARMS[arm][0])
        axis.bar_label(bars, fmt="%.0f", fontsize=8)
    axis.set_xticks(range(len(shown)), [f"{wording}\n{metric}" for wording, metric in shown], fontsize=8)
    axis.set(title="Test answers, one seed", ylabel="%", ylim=(0, 105))
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    sys.exit(main())
