"""Resuming after a crash: which run a folder belongs to, which checkpoints are complete, and whether it is finished.

`run.json` names the run. Every checkpoint and the final model have a manifest (size and SHA-256 of every file, see
`publish`). A run never resumes from a checkpoint whose manifest is missing or does not fit. It is finished only if its
final model is what was saved.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .errors import UserError
from .files import WEIGHTS
from .identity import (
    ENDED_AT,
    LENGTHS,
    OF_OPTIMIZER,
    OWNER,
    RUN_ID,
    UNMARKED,
    Change,
    changes,
    check_names,
    is_only_longer,
)
from .json_files import read_json
from .publish import MANIFEST, broken, is_cut_move, leftovers, read_manifest, run_of

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

RUN_FILE = "run.json"
STATE_FILE = "trainer_state.json"
CARD = "README.md"
SAVED = ("*.safetensors", "*.bin", "adapter")  # what training leaves in a folder besides checkpoints
# Of the names that a manifest lists, one a line. FSDP and DeepSpeed write folders.
WEIGHTS_FILE = re.compile(
    r"^((adapter_)?model\b[^/\n]*\.safetensors|pytorch_model[^\n]*|global_step\d+/[^\n]+)$", re.MULTILINE
)
OPTIMIZER = re.compile(r"^(optimizer\.pt|optimizer\.bin|optimizer_\d+/[^\n]+|global_step\d+/[^\n]+)$", re.MULTILINE)
DEEPSPEED = re.compile(r"^global_step\d+/", re.MULTILINE)
# What `from_pretrained` looks for in a folder; an adapter would change the model.
MODEL_FILE = re.compile(r"(model|pytorch_model|adapter_model)\b.*\.(safetensors|bin|index\.json)|adapter_config\.json")


NO_RECORD: Mapping[str, Any] = MappingProxyType({})


def fault(
    folder: str | Path,
    *,
    run: Mapping[str, Any] = NO_RECORD,
    num_processes: int | None = None,
    has_state: bool = True,
    has_scaler: bool = False,
) -> str | None:
    """Why a checkpoint cannot be used, or None if it is complete.

    Args:
        run: the record that it must belong to; an empty one for any.
        num_processes: of the run; every one has its own state of the random generators. None if that is not known.
        has_state: False if the run saves models only, which no run resumes from.
        has_scaler: the run scales its gradients, or its record says so (fp16).
    """
    folder = Path(folder)

    def required(names: set[str]) -> str | None:
        missing = None if WEIGHTS_FILE.search("\n".join(names)) else "weights"
        if has_state and missing is None:
            missing = _missing_state(names, num_processes, has_scaler or bool(run.get("fp16")))
        return f"it has no {missing}" if missing else None

    return broken(folder, required=required) or _fault_of_state(folder) or _fault_of_owner(folder, run)


def _missing_state(names: set[str], num_processes: int | None, has_scaler: bool) -> str | None:
    """What a resumed run needs and transformers would start afresh, silently, if it is not among the files."""
    lines = "\n".join(names)
    if not OPTIMIZER.search(lines):
        return "optimizer state (save_only_model: true saves none)"
    if "scheduler.pt" not in names and not DEEPSPEED.search(lines):
        return "scheduler state (scheduler.pt)"
    if has_scaler and "scaler.pt" not in names and not DEEPSPEED.search(lines):
        return "state of the gradient scaler (scaler.pt)"
    generators = {name for name in names if re.fullmatch(r"rng_state(_\d+)?\.pth", name)}
    if num_processes == 1:
        needed = {"rng_state.pth"}
    else:
        needed = {f"rng_state_{rank}.pth" for rank in range(num_processes or 0)}
    if not generators or needed - generators:
        return f"state of the random generators ({min(needed - generators, default='rng_state.pth')})"
    return None


def _fault_of_owner(folder: Path, run: Mapping[str, Any]) -> str | None:
    """Whether another run saved it. Earlier versions did not mark what they saved."""
    owner = run_of(folder)
    if RUN_ID not in run or owner == run[RUN_ID]:
        return None
    if owner is None and _read_state(folder)["global_step"] <= run.get(UNMARKED, 0):
        return None
    return "it is of another run"


def _read_state(folder: str | Path) -> dict[str, Any]:
    """The trainer's state in a checkpoint or beside a final model. Raises UserError, and OSError if it is missing.

    Its log may hold NaN and Infinity: in fp16 the norm of a gradient that overflows, and the run goes on.
    """
    state: dict[str, Any] = read_json(Path(folder) / STATE_FILE, is_finite=False)
    return state


def _fault_of_state(folder: Path) -> str | None:
    """Whether trainer_state.json counts the steps that the folder's name says."""
    try:
        state = _read_state(folder)
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


def fault_of_model(folder: str | Path, run: Mapping[str, Any] = NO_RECORD) -> str | None:
    """Why the folder of a run does not hold the finished model that was saved in it, or None if it does.

    The card may have been edited since. Other files may be there, but none that `from_pretrained` would read as well.

    run: the record that it must belong to; an empty one for any.
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
    reason = broken(folder, required=required, may_change=(CARD,), is_shared=True)
    return reason or _fault_of_state(folder) or _fault_of_owner(folder, run)


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoint-N folders in `output_dir`, newest step first."""
    if not os.path.isdir(output_dir):
        return []
    folders = [p for p in Path(output_dir).iterdir() if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]
    return sorted(folders, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)


def newest_complete(
    output_dir: str | Path,
    *,
    run: Mapping[str, Any] = NO_RECORD,
    num_processes: int | None = None,
    has_state: bool = True,
    has_scaler: bool = False,
) -> Path | None:
    """The newest checkpoint that `fault` accepts, or None."""
    for path in checkpoints(output_dir):
        if fault(path, run=run, num_processes=num_processes, has_state=has_state, has_scaler=has_scaler) is None:
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
    allowed: Collection[str] = (),
    defaults: Mapping[str, Any] = NO_RECORD,
    needs_its_length: Callable[[dict[str, Any]], str | None] = lambda state: "a schedule",
    further: str = "start a new run from its model",
    num_processes: int | None = None,
) -> str | None:
    """The checkpoint to continue from, or None for a fresh start. Writes nothing.

    Args:
        run: the record of the run, plain JSON. RUN_FILE must hold the same to resume.
        resume: None, "true" (the newest complete checkpoint), "auto" ("true" if the folder holds a run, else None) or
            a checkpoint folder.
        may_change: keys that are not compared; earlier versions wrote some of them.
        allowed: keys that may differ this time.
        defaults: the value of keys that a record may leave out.
        needs_its_length: the state of a checkpoint -> what of the run depends on its number of steps, or None.
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
    if resume is not None and resume.lower() == "auto":
        resume = "true" if (folder / RUN_FILE).exists() else None
    if resume is None:
        if allowed:
            raise UserError("--allow_changed goes with --resume_from_checkpoint: a new run has nothing to compare.")
        _check_is_free(folder)
        if (folder / RUN_FILE).exists():
            _say_start(folder)
        return None
    before = {key: value for key, value in read_run(folder).items() if key not in may_change}
    if _has_saved_nothing(folder) and resume.lower() == "true":
        _say_start(folder)
        return None
    check_names(allowed, (before, run))
    found = changes(before, run, defaults)
    is_longer = is_only_longer({name: change for name, change in found.items() if name not in allowed})
    if not is_longer:
        _check_is_same_run(folder, found, allowed, further)
    owner = NO_RECORD if OWNER in allowed else before
    if "num_processes" in found:
        num_processes = None
    if resume.lower() != "true":
        is_there = Path(resume).is_dir()
        reason = fault(resume, run=owner, num_processes=num_processes) if is_there else "there is no such folder"
        if reason:
            raise UserError(f"Cannot resume from {resume}: {reason}.")
        newest: str | None = resume
    else:
        finished = None if found.keys() & LENGTHS else _finished(folder, owner)
        newest = finished or _newest(folder, owner, num_processes)
    if newest is not None and found.keys() & LENGTHS:
        if is_longer:
            _check_may_be_longer(folder, found, newest, needs_its_length, further)
        _check_is_ahead(newest, run)
    return newest


def _check_is_ahead(newest: str, run: Mapping[str, Any]) -> None:
    step, last = _read_state(newest)["global_step"], run.get("max_steps", -1)
    if 0 < last <= step:
        raise UserError(f"max_steps: {last} is over: {newest} has taken {step} steps; set more.")


def _check_may_be_longer(
    folder: Path,
    found: Mapping[str, Change],
    newest: str,
    needs_its_length: Callable[[dict[str, Any]], str | None],
    further: str,
) -> None:
    """Raises UserError if a run of more steps would not be what it would have been from the start."""
    text = next(found[name].text for name in found.keys() & LENGTHS)
    if Path(newest).name != checkpoints(folder)[0].name:
        raise UserError(f"A longer run ({text}) goes on at the last checkpoint: write --resume_from_checkpoint true.")
    if reason := needs_its_length(_read_state(newest)):
        raise UserError(
            f"Cannot resume {folder}: the run has changed ({text}), and {reason} depends on its length, so a longer "
            f"run is another run. Put it back, or {_further(folder, further)}."
        )
    say(f"{folder}: a longer run ({text}). It goes on as if it had been that long from the start.")


def _further(folder: Path, further: str) -> str:
    return further if (folder / "config.json").is_file() else "start a new run in another output_dir"


def ended_at(folder: str | Path) -> int:
    """The last step of the finished run in a folder; 0 if it is not finished."""
    paths = [*checkpoints(folder)[:1], Path(folder)]
    steps = []
    for path in paths:
        try:
            state = _read_state(path)
            steps.append(state["global_step"] if state["global_step"] >= state["max_steps"] else 0)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return max(steps, default=0)


def is_last(folder: str | Path, run: Mapping[str, Any]) -> bool:
    """Whether no step is left after a checkpoint. Of a run that was made longer, its old end is not the last one."""
    state = _read_state(folder)
    step: int = state["global_step"]
    return step >= state["max_steps"] and step > run.get(ENDED_AT, 0)


def _finished(folder: Path, run: Mapping[str, Any]) -> str | None:
    """The folder itself if its run is finished, as far as that can be known without a checkpoint."""
    if not (folder / MANIFEST).exists():
        return str(folder) if is_finished_of_before(folder, run) else None
    reason = fault_of_model(folder, run)
    if reason is None:
        return str(folder) if is_last(folder, run) else None
    if newest_sealed(folder) is None:
        raise UserError(
            f"The run in {folder} is finished, but {reason}, and there is no checkpoint to save the model again from; "
            "start a new run in another output_dir."
        )
    if not run.get(ENDED_AT):
        say(f"The run in {folder} is finished, but {reason}: the model is saved again from the last checkpoint.")
    return None


def is_finished_of_before(folder: Path, run: Mapping[str, Any] = NO_RECORD) -> bool:
    """Whether an earlier version finished this run. It left no manifest, but wrote the card and the state last.

    A run with an id is of a version that writes one: without it, the final model is not whole.
    """
    try:
        if RUN_ID in read_json(folder / RUN_FILE):
            return False
        is_at_end = is_last(folder, run)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    names = {path.name for path in folder.iterdir()}
    is_saved = {"config.json", CARD} <= names and bool({WEIGHTS, f"{WEIGHTS}.index.json"} & names)
    return is_at_end and is_saved and not is_cut_move(folder)


def _newest(folder: Path, run: Mapping[str, Any], num_processes: int | None) -> str | None:
    """The newest complete checkpoint. None for a start at step 0, if no save was ever completed."""
    if newest_sealed(folder) is None:
        _say_start(folder)
        return None
    candidates = checkpoints(folder)
    newest = newest_complete(folder, run=run, num_processes=num_processes)
    if newest is None:
        reason = fault(candidates[0], run=run, num_processes=num_processes)
        raise UserError(f"No checkpoint in {folder} is complete ({reason}); start a new run in another output_dir.")
    skipped = candidates[: candidates.index(newest)]
    if skipped:
        names = ", ".join(path.name for path in skipped)
        reason = fault(skipped[0], run=run, num_processes=num_processes)
        say(f"Skipped {len(skipped)} damaged checkpoint(s): {names} ({reason}).")
    return str(newest)


def _say_start(folder: Path) -> None:
    cut = " (a save was cut short)" if leftovers(folder) or checkpoints(folder) else ""
    say(f"{folder} has no checkpoint yet{cut}: starting at step 0.")


def say(line: str) -> None:
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


def read_run(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / RUN_FILE)
    except FileNotFoundError:
        raise UserError(
            f"output_dir {folder} has no {RUN_FILE}, so there is no run to resume; leave out --resume_from_checkpoint "
            "to start one, or write `--resume_from_checkpoint auto`, which does both."
        ) from None
    except OSError as error:
        raise UserError(
            f"{folder / RUN_FILE} cannot be read ({error.strerror}), so nobody knows which run this is; make it "
            "readable, or choose another output_dir."
        ) from None


def _check_is_same_run(folder: Path, found: Mapping[str, Change], allowed: Collection[str], further: str) -> None:
    """Raises UserError for a change that is not allowed."""
    refused = {name: change.text for name, change in found.items() if name not in allowed}
    if not refused:
        return
    examples = "; ".join(list(refused.values())[:3])
    flags = " ".join(f"--allow_changed {name}" for name in refused)
    hint = "" if OF_OPTIMIZER & refused.keys() else f" (To go on with the change: {flags}.)"
    if refused.keys() <= LENGTHS:
        raise UserError(
            f"Cannot resume {folder}: the run has changed ({examples}). Put it back, or {_further(folder, further)}."
            + hint
        )
    raise UserError(
        f"Cannot resume {folder}: the run has changed in {len(refused)} place(s) ({examples}). "
        "Put them back, or start a new run in another output_dir." + hint
    )
