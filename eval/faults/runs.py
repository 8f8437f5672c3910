"""Tiny runs to disturb, the command that trains them in a process of its own, and the comparison of two results."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from llm_jepa.core.checkpoint import fault_of_model
from llm_jepa.core.files import file_sha256
from llm_jepa.core.publish import MANIFEST
from llm_jepa.core.strict_yaml import dump_yaml

from .cases import HUNG, LOST, SILENT, SURVIVED, TRACEBACK, Outcome, start

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "initializer_range": 0.2}
LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "attention_dropout": 0.1,
}  # fmt: skip
COMMON = {
    "max_steps": 6, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "learning_rate": 0.01,
    "per_device_train_batch_size": 4, "eval_strategy": "no", "use_cpu": True, "report_to": "none",
    "disable_tqdm": True, "diagnostics_pairs": 8,
}  # fmt: skip
LM: dict[str, Any] = {
    "family": "lm", "model_config": LLAMA, "tokenizer_vocab_size": 320, "activation_checkpointing": False, **COMMON,
}  # fmt: skip
VL: dict[str, Any] = {
    "family": "vl", "frame_size": 16, "num_frames": 1, "shared_dim": 8, "num_predictor_layers": 1,
    "tokenizer_vocab_size": 290, "pairs_per_clip": 1,
    "x_encoder": {"model_type": "vit", **SMALL, "image_size": 16, "patch_size": 8, "num_hidden_layers": 2},
    "predictor": {"model_type": "llama", **SMALL, "num_key_value_heads": 2, "num_hidden_layers": 2},
    "y_encoder": {"model_type": "bert", **SMALL, "num_hidden_layers": 1, "attention_probs_dropout_prob": 0.0},
    **COMMON,
}  # fmt: skip
BEST = {
    "validation_rows": 6, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True,
    "save_total_limit": 1,
}  # fmt: skip
# Longer, with everything that a resumed run must bring back: dropout, a coin, accumulation, the best weights. An epoch
# has 5 steps, and an evaluation 4 batches.
LONG = {
    "max_steps": 8, "gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 3, "save_steps": 3,
    "validation_rows": 8, "load_best_model_at_end": True, "per_device_eval_batch_size": 2,
}  # fmt: skip
RECIPES: dict[str, dict[str, Any]] = {
    "lm": LM,
    "lm, best": {**LM, **BEST},
    "lm, other seed": {**LM, "seed": 7},
    "lm, ema": {**LM, "target_encoder": "ema"},
    "lm, lora": {**LM, "use_peft": True, "lora_r": 2, "lora_target_modules": "all-linear"},
    "lm, no checkpoint": {**LM, "save_strategy": "no"},
    "lm, long": {**LM, **LONG, "target_encoder": "ema", "jepa_dropout": 0.3},
    # Steps that need more than a few MB.
    "lm, wide": {
        **LM,
        **LONG,
        "model_config": {**LLAMA, "hidden_size": 256, "num_key_value_heads": 4},
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 8,
        "gradient_accumulation_steps": 1,
    },
    "vl": VL,
    "vl, best": {**VL, **BEST},
    "vl, cached": {**VL, "feature_cache": "cache"},
    "vl, long": {**VL, **LONG},
    "vl, wide": {
        **VL,
        **LONG,
        "x_encoder": {**VL["x_encoder"], "hidden_size": 128, "image_size": 128},
        "frame_size": 128,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 8,
        "gradient_accumulation_steps": 1,
    },
}
RESUME = ("--resume_from_checkpoint", "true")
SPEED = ("runtime", "_per_second", "preparation_time", "train_")  # of the last process alone

LEFT = "the folder is not tidy"  # the result is right


class Run(NamedTuple):
    """A recipe and the result of its undisturbed run."""

    recipe: Path
    whole: Path


class Said(NamedTuple):
    """How a command ended. code: negative for a signal, None if it did not end in time."""

    code: int | None
    out: str
    err: str
    seconds: float

    @property
    def lines(self) -> list[str]:
        """Our own lines on stderr; libraries print there, too."""
        return [line for line in self.err.splitlines() if line.startswith(("llm-jepa:", "eval."))]


# -- commands ---------------------------------------------------------------------------------------------------------


def train(run: Run, folder: Path, *words: str, output_dir: str = "run", **options: Any) -> Said:
    """Train in `folder`/run. The path is relative, so that a killed run's folder can be copied elsewhere."""
    return command(["train", str(run.recipe), "--output_dir", output_dir, *words], folder, **options)


def command(
    words: Sequence[str],
    folder: Path,
    *,
    before: Callable[[], object] | None = None,
    meanwhile: Callable[[int], object] | None = None,
    main: Callable[[Sequence[str]], int] | None = None,
    limit_s: float = 100.0,
) -> Said:
    """Run `llm-jepa WORDS` in a forked process whose working directory is `folder`.

    Args:
        before: called in the process first.
        meanwhile: called with its id while it runs.
        main: another command than `llm-jepa`.
        limit_s: it is killed after these seconds.
    """
    out, err = folder / "stdout", folder / "stderr"
    began = time.monotonic()
    process = os.fork()
    if process == 0:
        _be_command(words, folder, out, err, before, main)
    if meanwhile is not None:
        meanwhile(process)
    code = _wait(process, began + limit_s)
    seconds = time.monotonic() - began
    return Said(code, out.read_text(errors="replace"), err.read_text(errors="replace"), seconds)


def _be_command(
    words: Sequence[str],
    folder: Path,
    out: Path,
    err: Path,
    before: Callable[[], object] | None,
    main: Callable[[Sequence[str]], int] | None,
) -> None:
    """Never returns."""
    code = 1  # of Python, after a traceback
    try:
        os.chdir(folder)
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_APPEND, 0o600), number)
        if before is not None:
            before()
        if main is None:
            from llm_jepa import cli

            main = cli.main
        code = main(words)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _wait(process: int, end: float) -> int | None:
    pause = 0.002
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(pause)
        pause = min(pause * 1.2, 0.05)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


# -- results ----------------------------------------------------------------------------------------------------------


def difference(run: Path, whole: Path, *, is_exact: bool = True) -> str | None:
    """How a run's folder differs from that of the undisturbed run, or None: weights, every step's log, files.

    is_exact: False if the folder may hold other checkpoints; a run that was asked to stop saved one more.
    """
    if (fault := fault_of_model(run)) is not None:
        return f"the final model is not whole: {fault}"
    if file_sha256(run / "model.safetensors") != file_sha256(whole / "model.safetensors"):
        return "other weights"
    if log_of(run) != log_of(whole):
        return "other losses"
    if list(run.rglob(".stage-*")):
        return f"{LEFT}: the stage of a killed process"
    if any(b".stage-" in path.read_bytes() for path in run.rglob("*") if path.is_file()):
        return "a file names a stage"
    files, expected = _files(run, is_exact), _files(whole, is_exact)
    if files != expected:
        return f"{LEFT}: files differ: {', '.join(sorted(map(str, files ^ expected)))}"
    for name in sorted(expected):
        # The others tell times, and where the run was.
        is_fixed = name.suffix in (".json", ".jinja") and name.name not in (MANIFEST, "trainer_state.json", "run.json")
        if is_fixed and (run / name).read_bytes() != (whole / name).read_bytes():
            return f"another {name}"
    return None


def log_of(folder: Path) -> tuple[list[dict[str, str]], str]:
    """Every figure of every step as a hex float, and the best checkpoint."""
    state = json.loads((folder / "trainer_state.json").read_text())
    log = [
        {key: float(value).hex() for key, value in entry.items() if not any(word in key for word in SPEED)}
        for entry in state["log_history"]
        if "train_runtime" not in entry
    ]
    return log, os.path.basename(str(state["best_model_checkpoint"]))


def _files(folder: Path, is_exact: bool) -> set[Path]:
    files = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    return {name for name in files if is_exact or not name.parts[0].startswith("checkpoint-")}


def ended_badly(said: Said) -> Outcome | None:
    """HUNG or TRACEBACK if a command ended that way. An error of a type that nobody foresaw counts as a traceback."""
    if said.code is None:
        return Outcome(HUNG, f"after {said.seconds:.0f} s: {said.err[-200:]}")
    is_unforeseen = "Traceback (most recent call last)" in said.err or "(run again with --traceback" in said.err
    if said.code < 0 or is_unforeseen:
        return Outcome(TRACEBACK, f"exit {said.code}: {said.err[-400:]}")
    return None


def is_one_line(said: Said, codes: Sequence[int] = (2,)) -> bool:
    """Whether a command ended with one of these exit codes and a single line of ours."""
    return said.code in codes and len(said.lines) == 1


def judge(said: Said, run: Path, whole: Path, *, is_exact: bool = True) -> Outcome:
    """SURVIVED if the command has ended with the result of the undisturbed run."""
    bad = ended_badly(said)
    if bad is not None:
        return bad
    if said.code != 0:
        return Outcome(LOST, f"exit {said.code}: {said.err[-300:]}")
    wrong = difference(run, whole, is_exact=is_exact)
    if wrong is None:
        return Outcome(SURVIVED)
    return Outcome(LOST if wrong.startswith(LEFT) else SILENT, f"exit 0, but {wrong}")


# -- undisturbed runs -------------------------------------------------------------------------------------------------


def undisturbed(name: str, work: Path) -> Run:
    """Train RECIPES[name] in `work`, once."""
    folder = work / "whole" / name.replace(", ", "-").replace(" ", "-")
    run = Run(folder / "recipe.yaml", folder / "run")
    if not run.whole.exists():
        in_child(_train_undisturbed, name, folder)
    return run


def in_child(function: Callable[..., None], *arguments: Any) -> None:
    """Call a function in a process that has imported everything. Raises RuntimeError if it fails."""
    with tempfile.NamedTemporaryFile() as log:
        process = start(_logged, log.name, function, *arguments)
        process.join()
        if process.exitcode != 0:
            raise RuntimeError(f"{function.__name__}{arguments} failed: {log.read().decode()[-2000:]}")


def _logged(log: str, function: Callable[..., None], *arguments: Any) -> None:
    descriptor = os.open(log, os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    function(*arguments)


def _train_undisturbed(name: str, folder: Path) -> None:
    write_recipe(name, folder)
    said = command(["train", "recipe.yaml", "--output_dir", "run"], folder)
    assert said.code == 0, said.err


def write_recipe(name: str, folder: Path, **changes: Any) -> Path:
    """Write a recipe and its data into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {**RECIPES[name], **changes}
    if "train_data" not in changes:
        values["train_data"] = str(_write_clips(folder) if values["family"] == "vl" else _write_rows(folder))
    path = folder / "recipe.yaml"
    path.write_text(dump_yaml(values))
    return path


def _write_rows(folder: Path) -> Path:
    from llm_jepa.synthetic import nl_rx

    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in nl_rx.generate(48, seed=3, wordings=(0, 1, 2, 3))))
    return path


def _write_clips(folder: Path) -> Path:
    import numpy as np
    from PIL import Image

    draw, path = np.random.default_rng(0), folder / "clips.jsonl"
    rows = []
    for i in range(48):
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        rows.append(json.dumps({"image": f"{i}.png", "target": f"number {i % 5}"}) + "\n")
    path.write_text("".join(rows))
    return path
