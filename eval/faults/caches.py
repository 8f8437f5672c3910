"""Feature caches: killed while they are built, damaged afterwards.

A training with such a cache ends as one with a good cache, or one line says what is damaged. Features of zeros must not
train a model.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from .cases import SURVIVED, Case, Outcome
from .damage import WAYS
from .runs import Run, ended_badly, in_child, is_one_line, judge, train, undisturbed
from .states import add_torn_files, watch

CACHED = "vl, cached"


def cases(work: Path, *, seed: int, quick: bool) -> Iterator[Case]:
    """The recipe names the cache by a relative path, so every case has its own copy."""
    run = undisturbed(CACHED, work)
    cache, states = run.recipe.parent / "cache", work / "states" / "cache"
    for file in sorted(path.relative_to(cache).as_posix() for path in cache.rglob("*") if path.is_file()):
        for way in list(WAYS)[:: 3 if quick else 1]:
            yield Case("damaged cache", f"{Path(file).name} {way}", damaged_cache, (run, file, way))
    if not states.exists():
        in_child(_record, run, states)
    for state in sorted(states.iterdir())[:: 6 if quick else 1]:
        yield Case("killed cache", state.name, killed_cache, (run, state))


def damaged_cache(folder: Path, run: Run, file: str, way: str) -> Outcome:
    shutil.copytree(run.recipe.parent / "cache", folder / "cache")
    WAYS[way](folder / "cache" / file)
    said = train(run, folder)
    is_refused = ended_badly(said) is None and is_one_line(said) and "cache" in said.lines[0]
    return Outcome(SURVIVED) if is_refused else judge(said, folder / "run", run.whole)


def killed_cache(folder: Path, run: Run, state: Path) -> Outcome:
    shutil.copytree(state, folder / "cache", symlinks=True)
    return judge(train(run, folder), folder / "run", run.whole)


def _record(run: Run, states: Path) -> None:
    folder, taken = states.with_name("cache.run"), states.with_name("cache.taken")
    for path in (folder / "cache", taken):
        path.mkdir(parents=True)
    said = train(run, folder, before=partial(watch, folder / "cache", taken))
    assert said.code == 0, said.err
    add_torn_files(taken)
    taken.rename(states)
