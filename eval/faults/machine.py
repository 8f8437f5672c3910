"""Failures of the machine and of the figures: a full disk, a limit on files or on memory, NaN.

One line says what to do, the exit code is its own, nothing unfinished is left, every checkpoint is whole, and, once
there is room again, the resumed run is the undisturbed one.
"""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from llm_jepa.core.checkpoint import RUN_FILE, checkpoints, fault
from llm_jepa.core.failures import DISK_FULL, OUT_OF_MEMORY

from .cases import LOST, SKIPPED, Case, Outcome
from .runs import RESUME, Run, Said, ended_badly, is_one_line, judge, train, undisturbed

NOT_FINITE = 3  # exit code
# How much of a checkpoint the disk holds: too little for a small file, the weights, the optimizer; for the second
# checkpoint, the third, the final model.
DISK_SHARES = (0.05, 0.3, 0.6, 0.9, 1.1, 1.5, 1.9, 2.5, 3.1)
FILE_SHARES = (0.1, 0.9)  # of the largest file
MORE_MEMORY = 4 << 20  # bytes that a process may still take from some moment on
HELD: list[bytearray] = []  # what it has freed before
HELD_PIECE = 1 << 18  # bytes; smaller holes stay free, as they do when a large tensor finds no room
# The method of the trainer at whose call memory runs out, and the step
MEMORY = {
    "loading": ("__init__", 0),
    "the first step": ("compute_loss", 0),
    "a later step": ("compute_loss", 4),
    "the optimizer": ("before_optimizer_step", 4),
    "an evaluation": ("example_sums", 6),
}
NUMBERS = {
    "the loss": ("compute_loss", 4),
    "the gradient": ("compute_loss", 5),
    "an evaluation": ("figures", 6),
}


def cases(work: Path, *, seed: int, quick: bool) -> Iterator[Case]:
    families = ("lm",) if quick else ("lm", "vl")
    for family in families:
        run = undisturbed(f"{family}, long", work)
        for share in (1.5,) if quick else DISK_SHARES:
            yield Case("disk full", f"{family}, room for {share} checkpoints", full_disk, (run, share))
        for share in (0.9,) if quick else FILE_SHARES:
            yield Case("file size limit", f"{family}, {share} of the largest file", limited_files, (run, share))
        for place in ("an evaluation",) if quick else NUMBERS:
            yield Case("NaN", f"{family}, in {place}", not_a_number, (run, family, place))
        if not quick:
            yield Case("NaN", f"{family}, learning rate 1e30", diverging, (run,))
            wide = undisturbed(f"{family}, wide", work)
            for place in MEMORY:
                yield Case("no memory", f"{family}, in {place}", no_memory, (wide, family, place))


def full_disk(folder: Path, run: Run, share: float) -> Outcome:
    """Train on a disk that holds `share` checkpoints; then enlarge it, and go on."""
    disk = folder / "disk"
    disk.mkdir()
    size = sum(file.stat().st_size for file in (run.whole / "checkpoint-3").iterdir())
    # 50 kB: run.json, and blocks that are not full
    mounting = _mount(disk, int(share * size) + 50_000, "-t", "tmpfs")
    if mounting is not None:
        return Outcome(SKIPPED, f"no tmpfs can be mounted: {mounting}")
    try:
        said = train(run, folder, output_dir="disk/run")
        if (wrong := _wrong_end(said, disk / "run", DISK_FULL, "is full")) is not None:
            return wrong
        _mount(disk, 20 * size, "-o", "remount")
        return _go_on(run, folder, "disk/run")
    finally:
        subprocess.run(["umount", disk], capture_output=True)


def _mount(disk: Path, size: int, *options: str) -> str | None:
    """None, or why not."""
    try:
        words = ["mount", *options, "-o", f"size={size}", *(["tmpfs"] if "-t" in options else []), str(disk)]
        result = subprocess.run(words, capture_output=True, text=True)
    except FileNotFoundError:
        return "there is no mount command"
    return None if result.returncode == 0 else result.stderr.strip().rpartition(": ")[2]


def limited_files(folder: Path, run: Run, share: float) -> Outcome:
    """No file may be larger than a share of the largest one, as under a quota; then it may."""
    size = max(file.stat().st_size for file in (run.whole / "checkpoint-3").iterdir())
    limit = (int(share * size), resource.RLIM_INFINITY)
    said = train(run, folder, before=partial(resource.setrlimit, resource.RLIMIT_FSIZE, limit))
    wrong = _wrong_end(said, folder / "run", DISK_FULL, "ulimit -f")
    return wrong or _go_on(run, folder)


def no_memory(folder: Path, run: Run, family: str, place: str) -> Outcome:
    """From some call on, the process may take only 4 MB more. Then it is run again without that limit."""
    if not os.path.exists("/proc/self/status"):
        return Outcome(SKIPPED, "the size of a process is known on Linux only")
    method, step = MEMORY[place]
    said = train(run, folder, before=partial(_at_call, family, method, step, _limit_memory))
    return _wrong_end(said, folder / "run", OUT_OF_MEMORY, "out of memory") or _go_on(run, folder)


def _limit_memory() -> None:
    """Leave the process 4 MB, and nothing of what it has freed before."""
    import torch

    # torch starts its threads first: OpenMP itself ends a process that has no room for the stack of a thread.
    torch.ones(1 << 20).add_(1)
    resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes(), resource.RLIM_INFINITY))
    with suppress(MemoryError):
        while True:
            HELD.append(bytearray(HELD_PIECE))
    resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + MORE_MEMORY, resource.RLIM_INFINITY))


def _data_bytes() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmData:"))


def not_a_number(folder: Path, run: Run, family: str, place: str) -> Outcome:
    """The loss, the gradient or the validation loss is NaN once. Then it is run again without that."""
    method, step = NUMBERS[place]
    spoil = {"the loss": _nan_loss, "the gradient": _nan_gradient, "an evaluation": _nan_figures}[place]
    said = train(run, folder, before=partial(_at_call, family, method, step, None, spoil))
    return _wrong_end(said, folder / "run", NOT_FINITE, "Last good checkpoint") or _go_on(run, folder)


def _nan_loss(result: Any) -> Any:
    return (result[0] * float("nan"), *result[1:]) if isinstance(result, tuple) else result * float("nan")


def _nan_gradient(result: Any) -> Any:
    loss = result[0] if isinstance(result, tuple) else result
    loss.register_hook(lambda gradient: gradient * float("nan"))
    return result


def _nan_figures(result: dict[str, float]) -> dict[str, float]:
    return {**result, "loss": float("nan")}


def diverging(folder: Path, run: Run) -> Outcome:
    """Weights grow without bounds. No checkpoint of such weights is left."""
    said = train(run, folder, "--learning_rate", "1e30", "--max_grad_norm", "0")
    return _wrong_end(said, folder / "run", NOT_FINITE, "") or Outcome("survived")


def _at_call(
    family: str, method: str, step: int, fault: Callable[[], object] | None, spoil: Callable[[Any], Any] | None = None
) -> None:
    """Cause a fault before a method of the trainer is called at a step, or spoil what it returns."""
    if family == "lm":
        from llm_jepa.lm.trainer import LLMJEPATrainer as Trainer
    else:
        from llm_jepa.vl.trainer import VLJEPATrainer as Trainer  # type: ignore[assignment]
    call = getattr(Trainer, method)

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        is_now = (self.state.global_step if hasattr(self, "state") else 0) == step
        if is_now and fault is not None:
            fault()
        result = call(self, *args, **kwargs)
        return spoil(result) if is_now and spoil is not None else result

    setattr(Trainer, method, wrapped)


def _wrong_end(said: Said, run: Path, code: int, words: str) -> Outcome | None:
    """What is wrong with how a command ended, or None: this exit code, one line, and whole checkpoints alone."""
    bad = ended_badly(said)
    if bad is not None:
        return bad
    if not is_one_line(said, (code,)) or words not in said.lines[0]:
        return Outcome(LOST, f"exit {said.code}, not {code}: {said.err[-300:]}")
    for checkpoint in checkpoints(run):
        if (reason := fault(checkpoint)) is not None:
            return Outcome(LOST, f"{checkpoint.name} is not whole: {reason}")
    if list(run.rglob(".stage-*")):
        return Outcome(LOST, "a stage is left")
    return None


def _go_on(run: Run, folder: Path, output_dir: str = "run") -> Outcome:
    words = RESUME if (folder / output_dir / RUN_FILE).exists() else ()
    return judge(train(run, folder, *words, output_dir=output_dir), folder / output_dir, run.whole, is_exact=False)
