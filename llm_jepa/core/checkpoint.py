"""Resuming after a crash: which run a folder belongs to, which checkpoints are complete, and whether it is finished.

`run.json` names the run. Every checkpoint and the final model have a manifest (size and SHA-256 of every file, see
`publish`). A run never resumes from a checkpoint whose manifest is missing or does not fit. It is finished only if its
final model is what was saved.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .errors import UserError
from .files import WEIGHTS
from .publish import MANIFEST, broken, is_cut_move, leftovers, read_manifest, read_object

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

RUN_FILE = "run.json"
STATE_FILE = "trainer_state.json"
CARD = "README.md"
CONTENTS = "contents"  # in RUN_FILE: key -> hash of the folder, file or Hub repository that the key names
SAVED = ("*.safetensors", "*.bin", "adapter")  # what training leaves in a folder besides checkpoints
LENGTHS = {"max_steps", "num_train_epochs"}
# Of the names that a manifest lists, one a line. FSDP and DeepSpeed write folders.
WEIGHTS_FILE = re.compile(
    r"^((adapter_)?model\b[^/\n]*\.safetensors|pytorch_model[^\n]*|global_step\d+/[^\n]+)$", re.MULTILINE
)
OPTIMIZER = re.compile(r"^(optimizer\.pt|optimizer\.bin|optimizer_\d+/[^\n]+|global_step\d+/[^\n]+)$", re.MULTILINE)
DEEPSPEED = re.compile(r"^global_step\d+/", re.MULTILINE)
# What `from_pretrained` looks for in a folder; an adapter would change the model.
MODEL_FILE = re.compile(r"(model|pytorch_model|adapter_model)\b.*\.(safetensors|bin|index\.json)|adapter_config\.json")


def fault(folder: str | Path, *, num_processes: int | None = None, has_state: bool = True) -> str | None:
    """Why a checkpoint cannot be used, or None if it is complete.

    Args:
        num_processes: of the run; every one has its own state of the random generators. None if that is not known.
        has_state: False if the run saves models only, which no run resumes from.
    """
    folder = Path(folder)

    def required(names: set[str]) -> str | None:
        missing = None if WEIGHTS_FILE.search("\n".join(names)) else "weights"
        if has_state and missing is None:
            missing = _missing_state(names, num_processes)
        return f"it has no {missing}" if missing else None

    return broken(folder, required=required) or _fault_of_state(folder)


def _missing_state(names: set[str], num_processes: int | None) -> str | None:
    """What a resumed run needs and transformers would start afresh, silently, if it is not among the files."""
    lines = "\n".join(names)
    if not OPTIMIZER.search(lines):
        return "optimizer state (save_only_model: true saves none)"
    if "scheduler.pt" not in names and not DEEPSPEED.search(lines):
        return "scheduler state (scheduler.pt)"
    generators = {name for name in names if re.fullmatch(r"rng_state(_\d+)?\.pth", name)}
    if num_processes == 1:
        needed = {"rng_state.pth"}
    else:
        needed = {f"rng_state_{rank}.pth" for rank in range(num_processes or 0)}
    if not generators or needed - generators:
        return f"state of the random generators ({min(needed - generators, default='rng_state.pth')})"
    return None


def _fault_of_state(folder: Path) -> str | None:
    """Whether trainer_state.json counts the steps that the folder's name says."""
    try:
        state = read_object(folder / STATE_FILE)
    except (OSError, ValueError):
        return f"{STATE_FILE} is missing or unreadable"
    step, last = state.get("global_step"), state.get("max_steps")
    named = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    if type(step) is not int or type(last) is not int or step < 1 or (named and int(named[1]) != step):
        return f"its {STATE_FILE} says global_step {step!r} of {last!r}"
    log = state.get("log_history")
    if not isinstance(log, list) or not all(isinstance(entry, dict) for entry in log):
        return f"its {STATE_FILE} has no log_history"
    return None


def fault_of_model(folder: str | Path) -> str | None:
    """Why the folder of a run does not hold the finished model that was saved in it, or None if it does.

    The card may have been edited since. Other files may be there, but none that `from_pretrained` would read as well.
    """
    folder = Path(folder)
    files = read_manifest(folder)

    def required(names: set[str]) -> str | None:
        missing = [name for name in ("config.json", CARD, STATE_FILE) if name not in names]
        if not WEIGHTS_FILE.search("\n".join(names)):
            missing.append("weights")
        return f"its {MANIFEST} has no {missing[0]}" if missing else None

    strays = [path.name for path in folder.iterdir() if MODEL_FILE.fullmatch(path.name)]
    strays = sorted(name for name in strays if files is not None and name not in files)
    if strays:
        return f"{strays[0]} is not in its {MANIFEST}"
    return broken(folder, required=required, may_change=(CARD,), is_shared=True)


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoint-N folders in `output_dir`, newest step first."""
    if not os.path.isdir(output_dir):
        return []
    folders = [p for p in Path(output_dir).iterdir() if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]
    return sorted(folders, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)


def newest_complete(output_dir: str | Path, *, num_processes: int | None = None, has_state: bool = True) -> Path | None:
    """The newest checkpoint that `fault` accepts, or None."""
    for path in checkpoints(output_dir):
        if fault(path, num_processes=num_processes, has_state=has_state) is None:
            return path
    return None


def newest_sealed(output_dir: str | Path) -> Path | None:
    """The newest checkpoint that has a manifest, or None. Reads no weights, unlike `newest_complete`."""
    return next((path for path in checkpoints(output_dir) if (path / MANIFEST).is_file()), None)


def find_resume(
    output_dir: str | Path,
    run: dict[str, Any],
    *,
    resume: str | None,
    may_change: Collection[str] = (),
    defaults: Mapping[str, Any] = MappingProxyType({}),
    further: str = "start a new run from its model",
    num_processes: int | None = None,
) -> str | None:
    """The checkpoint to continue from, or None for a fresh start. Writes nothing.

    Args:
        run: the identity of the run (resolved recipe, data hashes), plain JSON. RUN_FILE must hold the same to resume.
        resume: None, "true" (the newest complete checkpoint) or a checkpoint folder.
        may_change: keys that are not compared; earlier versions wrote some of them.
        defaults: the value of keys that an identity may leave out.
        further: how to train a finished model for more steps, in words.
        num_processes: of the run, see `fault`.

    Returns the folder itself if "true" is asked and the run is finished.

    Raises UserError if the folder holds anything else, or nothing to resume from.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir {folder} is a file; choose another output_dir.")
    if _is_held(folder):
        raise UserError(f"Another process trains in {folder} now; wait until it ends, or choose another output_dir.")
    if resume is None:
        _check_is_free(folder)
        if (folder / RUN_FILE).exists():
            _say_start(folder)
        return None
    before = {key: value for key, value in _read_run(folder).items() if key not in may_change}
    if _has_saved_nothing(folder) and resume.lower() == "true":
        _say_start(folder)
        return None
    _check_is_same_run(folder, before, run, defaults, further)
    if resume.lower() != "true":
        reason = fault(resume, num_processes=num_processes) if Path(resume).is_dir() else "there is no such folder"
        if reason:
            raise UserError(f"Cannot resume from {resume}: {reason}.")
        return resume
    return _finished(folder) or _newest(folder, num_processes)


def _finished(folder: Path) -> str | None:
    """The folder itself if its run is finished, as far as that can be known without a checkpoint."""
    if not (folder / MANIFEST).exists():
        return str(folder) if is_finished_of_before(folder) else None
    reason = fault_of_model(folder)
    if reason is None:
        return str(folder)
    if newest_sealed(folder) is None:
        raise UserError(
            f"The run in {folder} is finished, but {reason}, and there is no checkpoint to save the model again from; "
            "start a new run in another output_dir."
        )
    _say(f"The run in {folder} is finished, but {reason}: the model is saved again from the last checkpoint.")
    return None


def is_finished_of_before(folder: Path) -> bool:
    """Whether an earlier version finished this run. It left no manifest, but wrote the card and the state last."""
    try:
        state = read_object(folder / STATE_FILE)
        is_last = 0 < state["global_step"] >= state["max_steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    names = {path.name for path in folder.iterdir()}
    is_saved = {"config.json", CARD} <= names and bool({WEIGHTS, f"{WEIGHTS}.index.json"} & names)
    return is_last and is_saved and not is_cut_move(folder)


def _newest(folder: Path, num_processes: int | None) -> str | None:
    """The newest complete checkpoint. None for a start at step 0, if no save was ever completed."""
    if newest_sealed(folder) is None:
        _say_start(folder)
        return None
    candidates = checkpoints(folder)
    newest = newest_complete(folder, num_processes=num_processes)
    if newest is None:
        reason = fault(candidates[0], num_processes=num_processes)
        raise UserError(f"No checkpoint in {folder} is complete ({reason}); start a new run in another output_dir.")
    damaged = [path.name for path in candidates[: candidates.index(newest)]]
    if damaged:
        _say(f"Skipped {len(damaged)} damaged checkpoint(s): {', '.join(damaged)}.")
    return str(newest)


def _say_start(folder: Path) -> None:
    cut = " (a save was cut short)" if leftovers(folder) or checkpoints(folder) else ""
    _say(f"{folder} has no checkpoint yet{cut}: starting at step 0.")


def _say(line: str) -> None:
    """Print a line once, although every process of a run looks into the folder."""
    if os.environ.get("RANK", "0") == "0":
        print(line)


def rotate(output_dir: str | Path, *, step: int, best: str | None, limit: int | None) -> None:
    """Remove checkpoints of earlier steps until `limit` are left; never that of `step`, nor the best.

    Those of later steps are damaged ones that this run skipped; it will replace them. transformers takes the latest of
    them for the one to keep.
    """
    if limit is None or limit <= 0:
        return
    current = Path(output_dir) / f"checkpoint-{step}"
    reached = [path for path in checkpoints(output_dir) if int(path.name.rpartition("-")[2]) <= step]
    protected = {current} | ({Path(best)} if best is not None else set())
    removable = [path for path in reached if path not in protected]
    kept = len(reached) - len(removable)
    for path in removable[max(0, limit - kept) :]:
        shutil.rmtree(path, ignore_errors=True)


def hold(folder: str | Path) -> int | None:
    """Lock RUN_FILE as long as the returned file descriptor is open. None if the system has no such locks."""
    if fcntl is None:
        return None
    descriptor = os.open(Path(folder) / RUN_FILE, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # a file system without locks, or a process that looks at this moment
        os.close(descriptor)
        return None
    return descriptor


def _is_held(folder: Path) -> bool:
    """Whether another process has called `hold`. Several processes may ask at once."""
    if fcntl is None or not (folder / RUN_FILE).is_file():
        return False
    with open(folder / RUN_FILE, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return False


def _has_saved_nothing(folder: Path) -> bool:
    """Whether a run has claimed the folder and ended before it had saved anything whole.

    A checkpoint without a manifest is a save of an earlier version that was cut short.
    """
    if newest_sealed(folder) is not None or (folder / MANIFEST).exists():
        return False
    return is_cut_move(folder) or not any(any(folder.glob(pattern)) for pattern in SAVED)


def _check_is_free(folder: Path) -> None:
    if not folder.is_dir() or not set(folder.iterdir()) - set(leftovers(folder)):
        return
    if not (folder / RUN_FILE).exists():
        raise UserError(f"output_dir {folder} is not empty and holds no run of ours; choose another output_dir.")
    if not _has_saved_nothing(folder):
        raise UserError(
            f"output_dir {folder} holds a run already; continue it with --resume_from_checkpoint true, or choose "
            "another output_dir."
        )


def _read_run(folder: Path) -> dict[str, Any]:
    try:
        return read_object(folder / RUN_FILE)
    except (OSError, ValueError):
        raise UserError(
            f"output_dir {folder} has no {RUN_FILE}, so there is no run to resume; "
            "leave out --resume_from_checkpoint to start one."
        ) from None


def _check_is_same_run(
    folder: Path, before: dict[str, Any], run: dict[str, Any], defaults: Mapping[str, Any], further: str
) -> None:
    changed = _changes(before, run, defaults)
    if not changed:
        return
    examples = "; ".join(list(changed.values())[:3])
    if changed.keys() <= LENGTHS:
        if not (folder / "config.json").is_file():
            further = "start a new run in another output_dir"
        raise UserError(
            f"Cannot resume {folder}: the run has changed ({examples}). The learning rate and other schedules depend "
            f"on its length from the first step on, so a longer run is another run. Put it back, or {further}."
        )
    raise UserError(
        f"Cannot resume {folder}: the run has changed in {len(changed)} place(s) ({examples}). "
        "Put them back, or start a new run in another output_dir."
    )


def _changes(before: dict[str, Any], run: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, str]:
    """key -> how it differs between two identities.

    Where a key names a folder, a file or a Hub repository, `CONTENTS` has its hash. If both identities have the hash,
    it decides, and not the name. Runs of earlier versions have no hash.
    """
    before, run = dict(before), dict(run)
    hashes, hashes_now = before.pop(CONTENTS, {}), run.pop(CONTENTS, {})
    changes = {}
    for key in sorted({*before, *run}):
        old, new = before.get(key, defaults.get(key)), run.get(key, defaults.get(key))
        if hashes.get(key) and hashes_now.get(key):
            if hashes[key] != hashes_now[key]:
                changes[key] = f"{key}: {old!r} -> {new!r}" if old != new else f"{key}: the files of {new!r} differ"
        elif old != new:
            changes[key] = f"{key}: {old!r} -> {new!r}"
    return changes
