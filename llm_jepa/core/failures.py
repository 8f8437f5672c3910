"""Failures of the machine and not of the run: a full disk, lack of memory, a lost process. Needs no torch.

They arrive as many types. A full disk is an `OSError`, a `SafetensorError` or a `RuntimeError` of torch's zip writer.
Lack of memory is a `MemoryError`, an `OutOfMemoryError` or a `RuntimeError` of the CPU allocator.
"""

from __future__ import annotations

import errno
import math
import shutil
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None  # type: ignore[assignment]

DISK_FULL, OUT_OF_MEMORY, LOST_RANK = 4, 5, 6  # exit codes
# torch's zip writer does not say why a write failed.
TORCH_WORDS = ("PytorchStreamWriter failed writing", "inline_container.cc", "basic_ios::clear")
FILE_WORDS = ("File too large", "os error 27")
DISK_WORDS = (
    "No space left on device", "os error 28", "Disk quota exceeded", "os error 122", *TORCH_WORDS,
)  # fmt: skip
MEMORY_WORDS = (
    "DefaultCPUAllocator", "out of memory", "Cannot allocate memory", "os error 12", "std::bad_alloc",
    "not enough memory", "can't start new thread",
)  # fmt: skip
ONEDNN_MEMORY = "could not create a primitive"  # its whole message; longer ones are about operations it does not have
LOST_WORDS = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "gloo/transport",
    "Application timeout caused pair closure", "Read timeout", "Write timeout", "Connect timeout", "Socket closed",
    "Socket Timeout", "wait timeout after", "failed to recv, got 0 bytes", "No route to host", "Network is unreachable",
    "Connection timed out", "Connection refused", "Watchdog caught collective operation timeout",
    "NCCL communicator was aborted", "remote process exited or there was a network error",
)  # fmt: skip


def machine_failure(error: BaseException, recipe: Any) -> tuple[str, int] | None:
    """What to do about a full disk, lack of memory or a lost process, and the exit code; None for other errors.

    recipe: of the run, a `core.recipe.Recipe`.
    """
    training = recipe.training
    # First: a process that is lost is one that others wait for, whatever else its peers report.
    if training.world_size > 1 and _has(error, (), LOST_WORDS):
        code = LOST_RANK
        reason = f"another process ended or did not answer within ddp_timeout: {training.ddp_timeout} seconds"
    elif _has(error, (errno.EFBIG,), FILE_WORDS) or (_has(error, (), TORCH_WORDS) and _is_limited(training)):
        code, reason = DISK_FULL, _file_is_too_large(training)
    elif _has(error, (errno.ENOSPC, errno.EDQUOT), DISK_WORDS):
        code, reason = DISK_FULL, _disk_is_full(training)
    elif str(error) == ONEDNN_MEMORY or _has(error, (errno.ENOMEM,), MEMORY_WORDS, MemoryError):
        code, reason = OUT_OF_MEMORY, _out_of_memory(error, training)
    else:
        return None
    from .checkpoint import newest_sealed

    last = newest_sealed(training.output_dir)
    return f"stopped: {reason}. Last good checkpoint: {last or 'none yet'}.", code


def _has(
    error: BaseException, numbers: tuple[int, ...], words: tuple[str, ...], kinds: tuple[type, ...] | type = ()
) -> bool:
    """Whether an error or one of its causes has such an errno or message, or is of such a type."""
    return any(
        isinstance(link, kinds)
        or (isinstance(link, OSError) and link.errno in numbers)
        or any(word in str(link) for word in words)
        for link in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _disk_is_full(training: Any) -> str:
    """How much is needed and how much there is, now that the unfinished checkpoint has been removed."""
    from .checkpoint import newest_sealed

    folder = Path(training.output_dir)
    last = newest_sealed(folder)
    free = f"{_size(_free(folder))} are free"
    room = (
        f"a checkpoint needs {_size(_bytes_of(last))}, and {free}" if last else f"{free}, and a checkpoint needs more"
    )
    return (
        f"the disk of {folder} is full, or its limit is reached: {room}; make room, or keep fewer checkpoints with "
        "save_total_limit"
    )


def _free(folder: Path) -> int:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def _largest_file() -> float:
    """How many bytes a file of this process may have."""
    if resource is None:
        return math.inf
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    return math.inf if soft == resource.RLIM_INFINITY else soft


def _is_limited(training: Any) -> bool:
    """Whether a file reaches its limit before the disk is full."""
    return _largest_file() < _free(Path(training.output_dir))


def _file_is_too_large(training: Any) -> str:
    folder, limit = Path(training.output_dir), _largest_file()
    if limit == math.inf:
        return f"the file system of {folder} takes no file as large as one of a checkpoint; choose another output_dir"
    return (
        f"a file in {folder} would be larger than the {_size(limit)} that the limit on the size of a file allows "
        "(ulimit -f, RLIMIT_FSIZE); raise it: ulimit -f unlimited"
    )


def _out_of_memory(error: BaseException, training: Any) -> str:
    """The batch and accumulation to try: the same rows in an optimizer step, half as many at a time."""
    functions = {frame.name for link in _chain(error) for frame in traceback.extract_tb(link.__traceback__)}
    batch, steps = training.per_device_train_batch_size, training.gradient_accumulation_steps
    if "evaluation_loop" in functions or "measure_space" in functions:
        size = training.per_device_eval_batch_size
        smaller = f"set per_device_eval_batch_size: {size // 2}" if size > 1 else "evaluate shorter rows"
        return f"out of memory in an evaluation; {smaller}"
    if "_inner_training_loop" not in functions:
        return "out of memory outside of training: model and data do not fit; take a smaller model or more memory"
    if batch > 1:
        smaller = f"set per_device_train_batch_size: {batch // 2} and gradient_accumulation_steps: {steps * 2}"
        return f"out of memory in training; {smaller}, or gradient_checkpointing: true"
    return "out of memory in training with a batch of 1; set gradient_checkpointing: true or shorten the rows"


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
