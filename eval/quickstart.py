"""make quickstart: generate data, train plain SFT and LLM-JEPA on the CPU, score both, print a table, draw a picture.

Nothing is downloaded. Both arms are recipes in recipes/lm/tiny-llama, run by the same command line as any other run.
"""

from __future__ import annotations

import argparse
import json
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

from llm_jepa import UserError, cli
from llm_jepa.core.files import write_json
from llm_jepa.lm.batching import JEPACollator
from llm_jepa.lm.loading import model_from, read_rows, tokenizer_from
from llm_jepa.lm.predictor_tokens import predictor_token_ids
from llm_jepa.lm.reading import embed_pairs
from llm_jepa.lm.views import add_view_columns
from llm_jepa.synthetic import nl_rx as generator

from .run import score_model
from .tasks.nl_rx import METRICS, WORDINGS

RECIPES = Path(__file__).parent.parent / "recipes" / "lm" / "tiny-llama"
ARMS = {
    "sft": ("plain SFT", RECIPES / "nl-rx-quickstart-baseline.yaml"),
    "llm-jepa": ("LLM-JEPA", RECIPES / "nl-rx-quickstart.yaml"),
}
SPACE = ("recall_at_1", "cosine_matched", "raw_cosine_mismatched", "effective_rank_predicted", "effective_rank_target")
READING = """\
How to read this. One seed of a 0.7M-parameter model from random weights, on generated data. The geometry rows (step 0
-> best step) are what a run of this size can show: with the JEPA term the context picks its own target among 512
(recall_at_1, chance 0.002), without it the two views are not aligned. The accuracy rows are no evidence for or against
LLM-JEPA: learning curves are steep here, so another seed or length changes the gap between two single runs by tens of
points, and its sign. The extra training tokens are the cost of the views. README.md has repeated runs on real NL-RX."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m eval.quickstart", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder for data, models, picture")
    parser.add_argument("--steps", type=int, help="training steps an arm (default: the recipe's)")
    parser.add_argument("--test", type=int, default=300, help="test requests, each in two wordings")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    started = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    files = generator.write(options.out / "data", test=options.test)
    results: dict[str, dict[str, Any]] = {}
    for arm, (title, recipe) in ARMS.items():
        folder = options.out / arm
        if (folder / "run.json").exists():  # an earlier quickstart's: always start afresh
            shutil.rmtree(folder)
        print(f"\n=== {title}: llm-jepa train {recipe.relative_to(RECIPES.parent.parent)}", flush=True)
        overrides = ["--train_data", str(files["train"]), "--validation_data", str(files["validation"])]
        overrides += ["--output_dir", str(folder)]
        if not sys.stderr.isatty():  # a log file full of progress bars helps nobody
            overrides += ["--disable_tqdm", "true"]
        if options.steps is not None:
            overrides += ["--max_steps", str(options.steps)]
        code = cli.main(["train", str(recipe), *overrides])
        if code:
            return code
        try:
            results[arm], _ = score_model(str(folder), str(options.out / "data"), max_new_tokens=48)
        except UserError as error:
            print(f"quickstart: error: {error}", file=sys.stderr)
            return 2
    write_json(options.out / "results.json", results)
    print("\n" + table(results))
    print("\n" + READING)
    picture = draw(options.out, results)
    print(
        f"\nPicture: {picture}   Figures: {options.out / 'results.json'}   {time.perf_counter() - started:.0f} s in all"
    )
    return 0


def table(results: dict[str, dict[str, Any]]) -> str:
    """One row a figure, one column an arm."""
    rows: list[tuple[str, list[str]]] = []
    for wording in WORDINGS:
        for metric in METRICS:
            shares = [f"{100 * result['metrics'][wording][metric]:.1f} %" for result in results.values()]
            rows.append((f"{metric}, {wording} wording", shares))
    for key in SPACE:
        shown = []
        for result in results.values():
            start, now = result["model"]["space_at_start"][key], result["model"]["validation"][key]
            shown.append(f"{start:.2f} -> {now:.2f}")
        rows.append((key, shown))
    rows.append(("validation LM loss", [f"{r['model']['validation']['lm_loss']:.3f}" for r in results.values()]))
    rows.append(("training tokens", [f"{r['model']['train_tokens']:,}" for r in results.values()]))
    rows.append(("training seconds", [f"{r['model']['train_seconds']:.0f}" for r in results.values()]))
    header = f"{'':36s}" + "".join(f"{ARMS[arm][0]:>18s}" for arm in results)
    return "\n".join([header, *(f"{name:36s}" + "".join(f"{v:>18s}" for v in values) for name, values in rows)])


def pairs_of(folder: Path, data: Path, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Centred, unit-norm predicted and target embeddings [N, D] of the first test requests, at most `count`."""
    model, tokenizer = model_from(str(folder), dtype=torch.float32), tokenizer_from(str(folder))
    how = model.config.llm_jepa
    rows = read_rows(str(data))
    rows = rows.select(range(min(count, len(rows))))
    views = [
        add_view_columns(row, i, tokenizer=tokenizer, context_view=how["context_view"]) for i, row in enumerate(rows)
    ]
    collator = JEPACollator(tokenizer.pad_token_id, predictor_token_ids(tokenizer, how["num_predictor_tokens"]))
    predicted, target, _ = embed_pairs(model, model, [collator(views)], layer=how["readout_layer"])
    centre = lambda x: torch.nn.functional.normalize(x - x.mean(dim=0), dim=-1)  # noqa: E731
    return centre(predicted), centre(target)


def draw(out: Path, results: dict[str, dict[str, Any]]) -> Path:
    """Training curves above, the embedding geometry of both arms below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    colors = {"sft": "#7f7f7f", "llm-jepa": "#1f77b4"}
    figure, axes = plt.subplots(2, 3, figsize=(14, 8.2), layout="constrained")
    for arm, (title, _) in ARMS.items():
        log = json.loads((out / arm / "trainer_state.json").read_text())["log_history"]
        series = lambda key, log=log: zip(*[(e["step"], e[key]) for e in log if key in e], strict=True)  # noqa: E731
        axes[0, 0].plot(*series("lm_loss"), color=colors[arm], alpha=0.4)
        axes[0, 0].plot(*series("eval_lm_loss"), "o-", color=colors[arm], label=title)
        axes[0, 1].plot(*series("eval_recall_at_1"), "o-", color=colors[arm], label=title)
        axes[0, 2].plot(*series("eval_effective_rank_predicted"), "o-", color=colors[arm], label=f"{title}, context")
        axes[0, 2].plot(*series("eval_effective_rank_target"), "s--", color=colors[arm], label=f"{title}, target")
    axes[0, 0].set(
        title="LM loss: train (line), validation (dots)", xlabel="step", ylabel="nats per token", yscale="log"
    )
    axes[0, 0].yaxis.set_major_formatter("{x:g}")
    axes[0, 0].yaxis.set_minor_formatter(NullFormatter())
    axes[0, 1].set(title="Context picks its own target", xlabel="step", ylabel="recall@1 of 512 pairs", ylim=(0, 1))
    axes[0, 2].set(title="Directions in use", xlabel="step", ylabel="effective rank", ylim=(0, None))
    for axis in axes[0]:
        axis.legend(frameon=False)
        axis.grid(alpha=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    count = 40
    for axis, (arm, (title, _)) in zip(axes[1], ARMS.items(), strict=False):
        predicted, target = pairs_of(out / arm, out / "data" / "original_test.jsonl", count)
        image = axis.imshow(predicted @ target.T, cmap="RdBu_r", vmin=-1, vmax=1)
        axis.set(title=f"{title}: centred cosine", xlabel="target of request", ylabel="context of request")
        figure.colorbar(image, ax=axis, shrink=0.8)
    width = 0.38
    for offset, (arm, result) in zip((-width / 2, width / 2), results.items(), strict=True):
        heights = [100 * result["metrics"][w][m] for w in WORDINGS for m in ("exact", "startswith")]
        bars = axes[1, 2].bar([i + offset for i in range(4)], heights, width, color=colors[arm], label=ARMS[arm][0])
        axes[1, 2].bar_label(bars, fmt="%.0f", fontsize=8)
    names = [f"{wording}\n{metric}" for wording in WORDINGS for metric in ("exact", "startswith")]
    axes[1, 2].set_xticks(range(4), names, fontsize=8)
    axes[1, 2].set(title="Test answers, one seed", ylabel="%", ylim=(0, 105))
    axes[1, 2].legend(frameon=False)
    axes[1, 2].spines[["top", "right"]].set_visible(False)
    figure.suptitle("llm_jepa quickstart: 0.7M-parameter Llama from scratch on generated NL-RX-like rows")
    path = out / "quickstart.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


if __name__ == "__main__":
    sys.exit(main())
