"""Damage: files of a checkpoint or of the final model that are removed, torn, zeroed, or have one other bit.

The run must go on from the checkpoint before and say so, or save the final model again and say so.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from llm_jepa.core.checkpoint import CARD, RUN_FILE
from llm_jepa.core.publish import MANIFEST

from .cases import LOST, SILENT, SURVIVED, Case, Outcome
from .runs import RESUME, Run, ended_badly, is_one_line, judge, train, undisturbed


def _remove(path: Path) -> None:
    path.unlink()


def _tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


WAYS: dict[str, Callable[[Path], None]] = {
    "removed": _remove, "torn": _tear, "zeroed": _zero, "a bit flipped": _flip_a_bit,
}  # fmt: skip


def cases(work: Path, *, seed: int, quick: bool) -> Iterator[Case]:
    """Every file of the newest checkpoint and of the final model, in every way."""
    found = []
    for name in ("lm", "vl") if quick else ("lm", "lm, ema", "lm, lora", "vl"):
        run = undisturbed(name, work)
        for file in _names(run.whole / "checkpoint-4"):
            found += [Case("damaged", f"{name}, checkpoint, {file} {way}", damaged, (run, file, way)) for way in WAYS]
        if name == "lm, lora":
            continue
        for file in [file for file in _names(run.whole) if not file.startswith(("checkpoint-", RUN_FILE))]:
            found += [Case("damaged", f"{name}, final, {file} {way}", damaged_final, (run, file, way)) for way in WAYS]
    for file in ("model.safetensors", "optimizer.pt", MANIFEST):
        found.append(Case("damaged", f"lm, all checkpoints, {file}", all_damaged, (undisturbed("lm", work), file)))
    yield from found[::40] if quick else found


def _names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def unfinished(run: Run, folder: Path) -> Path:
    """Copy a run as it was after its second checkpoint, and return that. Two steps are left, which need its state."""
    (folder / "run").mkdir()
    shutil.copy(run.whole / RUN_FILE, folder / "run")
    for name in ("checkpoint-2", "checkpoint-4"):
        shutil.copytree(run.whole / name, folder / "run" / name)
    return folder / "run" / "checkpoint-4"


def damaged(folder: Path, run: Run, file: str, way: str) -> Outcome:
    """Damage the newest checkpoint. The run goes on from the one before, and says so."""
    WAYS[way](unfinished(run, folder) / file)
    said = train(run, folder, *RESUME)
    outcome = judge(said, folder / "run", run.whole)
    if outcome.verdict == SURVIVED and "Skipped 1 damaged checkpoint(s): checkpoint-4" not in said.out:
        return Outcome(SILENT, "it fell back and did not say so")
    return outcome


def damaged_final(folder: Path, run: Run, file: str, way: str) -> Outcome:
    """Damage the final model. It is saved again from the last checkpoint. An edited card is left as it is."""
    shutil.copytree(run.whole, folder / "run")
    WAYS[way](folder / "run" / file)
    said = train(run, folder, *RESUME)
    outcome = judge(said, folder / "run", run.whole)
    is_edited = file == CARD and way != "removed"
    if outcome.verdict == SURVIVED and not is_edited and "saved again" not in said.out and file != MANIFEST:
        return Outcome(SILENT, "it saved the model again and did not say so")
    return outcome


def all_damaged(folder: Path, run: Run, file: str) -> Outcome:
    """Damage every checkpoint. Nothing can be resumed, and one line says so."""
    unfinished(run, folder)
    for path in (folder / "run").glob(f"checkpoint-*/{file}"):
        _tear(path)
    said = train(run, folder, *RESUME)
    if (bad := ended_badly(said)) is not None:
        return bad
    return Outcome(SURVIVED) if is_one_line(said) else Outcome(LOST, f"exit {said.code}: {said.err[-300:]}")
