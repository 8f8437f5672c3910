"""Score a checkpoint on a task:  python -m eval.run --model DIR --data DIR --out FILE.json

Greedy decoding; one JSON per run with the figures and everything needed to repeat them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_jepa import UserError, generate
from llm_jepa.checkpoint import write_json
from llm_jepa.loading import model_from, tokenizer_from

from . import nl_rx
from .provenance import environment, sha256, weights_sha256

# A benchmark is a module with `load(folder)`, `score(answers, generations)`, WORDINGS and METRICS.
TASKS = {"nl_rx": nl_rx}


def score_model(
    model_dir: str,
    data_dir: str,
    *,
    task: str = "nl_rx",
    limit: int | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 256,
    progress: bool = True,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(result, samples) of a saved model on a task in all wordings. `limit` keeps the first items, for a quick look."""
    import torch

    started = time.perf_counter()
    benchmark = TASKS[task]
    items, dropped, files = benchmark.load(data_dir)
    items = items[:limit]
    model = model_from(model_dir, dtype=torch.float32).to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = tokenizer_from(model_dir)
    samples: list[dict[str, Any]] = [{"line": item.line, "answer": item.answer} for item in items]
    metrics = {}
    for wording in benchmark.WORDINGS:
        prompts = [list(getattr(item, wording)) for item in items]
        texts = generate(
            model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress
        )
        metrics[wording] = benchmark.score([item.answer for item in items], texts)
        for sample, prompt, generation in zip(samples, prompts, texts, strict=True):
            sample[wording] = {
                "prompt": prompt[-1]["content"],
                "text": generation.text,
                "stopped": generation.stopped,
            }
    folder = Path(model_dir)
    result = {
        "task": task,
        "metrics": metrics,
        "items": len(items),
        "dropped_as_known_from_train": dropped,
        "decoding": {"greedy": True, "max_new_tokens": max_new_tokens, "batch_size": batch_size},
        "data_sha256": {path.name: sha256(path) for path in files},
        "model": {"name": folder.name, "weights_sha256": weights_sha256(folder), **_training_of(folder)},
        "environment": environment(),
        "seconds": round(time.perf_counter() - started, 1),
    }
    return result, samples


def _training_of(folder: Path) -> dict[str, Any]:
    """What the run itself recorded: recipe, cost, and the geometry of its space at the start and at the best step."""
    if not (folder / "run.json").is_file():
        return {"run": None}
    log = json.loads((folder / "trainer_state.json").read_text())
    history = log["log_history"]
    evaluations = [e for e in history if "eval_recall_at_1" in e]
    best = [e for e in evaluations if e["step"] == (log.get("best_global_step") or log["global_step"])]
    keep = lambda e: {k.removeprefix("eval_"): v for k, v in e.items() if "per_second" not in k}  # noqa: E731
    return {
        "run": json.loads((folder / "run.json").read_text()),
        "train_tokens": max((e["num_tokens"] for e in history if "num_tokens" in e), default=None),
        "train_seconds": next((e["train_runtime"] for e in reversed(history) if "train_runtime" in e), None),
        "space_at_start": keep(evaluations[0]) if evaluations else None,
        "validation": keep(best[-1]) if best else None,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m eval.run", description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a saved model, or a Hub id")
    parser.add_argument("--task", default="nl_rx", choices=list(TASKS))
    parser.add_argument("--data", required=True, help="folder with the task's files")
    parser.add_argument("--out", required=True, help="result JSON")
    parser.add_argument("--samples", help="also write every generation here, as JSON lines")
    parser.add_argument("--limit", type=int, help="score the first N items only")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=256)
    options = parser.parse_args(argv)
    try:
        result, samples = score_model(
            options.model,
            options.data,
            task=options.task,
            limit=options.limit,
            max_new_tokens=options.max_new_tokens,
            batch_size=options.batch_size,
        )
    except UserError as error:
        print(f"eval.run: error: {error}", file=sys.stderr)
        return 2
    write_json(options.out, result)
    if options.samples:
        Path(options.samples).write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    names = TASKS[options.task].METRICS
    print(f"{'':12s}" + "".join(f"{name:>12s}" for name in names))
    for wording, figures in result["metrics"].items():
        print(f"{wording:12s}" + "".join(f"{100 * figures[name]:11.1f}%" for name in names))
    print(f"{result['items']} items ({result['dropped_as_known_from_train']} dropped, known from train)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
