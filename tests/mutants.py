"""Would a test fail if this line were wrong?  make mutants, or python -m tests.mutants [--only NAME ...] [--out FILE]

mutmut makes the mutants of a module, one small change each: `<` for `<=`, another number, an argument left out, a text
between XX. The mutants are written into a copy of the tree, never into the tree itself. pytest collects the tests of
the module there, and a forked process for each mutant runs those tests that reach the changed function, the quickest
first, until one fails. Then the mutant is killed.

A mutant that survives is either named in `EQUIVALENT`, with the reason why no test could fail, or a test is missing.
"""

from __future__ import annotations

import argparse
import difflib
import gc
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from _pytest.runner import runtestprotocol
from hypothesis import Phase, settings

ROOT = Path(__file__).parent.parent
EQUIVALENT = Path(__file__).with_name("mutants_equivalent.json")
BY_HAND = (  # of `tests.lm.test_batching`; the others train models, and take too long for each mutant
    "who_sees_whom_of_a_row_worked_by_hand", "plain_collator_adds_no_token", "pad_to_multiple_of",
    "share_rows_loses_nothing_and_never_costs_more", "share_rows_worked_by_hand",
)  # fmt: skip
TESTS = {  # module -> the tests that judge its mutants
    "core/losses": ("core/test_losses.py",),
    "core/pairs": ("core/test_pairs.py",),
    "core/distributed": ("core/test_gather.py", "core/test_pairs.py"),
    "lm/batching": ("lm/test_batching_properties.py", *(f"lm/test_batching.py::test_{name}" for name in BY_HAND)),
    "lm/attention": ("lm/test_attention.py", "lm/test_batching_properties.py"),
    "stream/segments": ("stream/test_segments.py",),
    "core/files": ("core/test_files.py", "core/test_publish.py"),
    "core/publish": ("core/test_publish.py", "core/test_saving.py"),
    "core/checkpoint": ("core/test_checkpoint.py", "core/test_publish.py", "core/test_identity.py"),
}
SURVIVED, KILLED, HUNG, UNREACHED = "survived", "killed", "hung", "no test reaches it"
ENVIRONMENT = "LLM_JEPA_MUTANTS"  # names the file that the process of pytest reads its task from and writes it to


class Mutant(NamedTuple):
    """One change of one function. name: mutmut's; function: what the tests reach; diff: lines taken out and put in."""

    name: str
    function: str
    taken: tuple[str, ...]
    put: tuple[str, ...]


# -- the tree ---------------------------------------------------------------------------------------------------------


def copy_tree(folder: Path) -> None:
    """Copy what git knows of, so that no run and no cache comes along."""
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True,
        text=True,
    ).stdout.splitlines()  # fmt: skip
    for name in names:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)


def mutate(path: Path, module: str) -> list[Mutant]:
    """Replace a file by one that holds all its mutants, and return them. `mutmut` picks one by its name."""
    from mutmut.mutation.file_mutation import mutate_file_contents

    mutated = mutate_file_contents(str(path), path.read_text())
    path.write_text(mutated.code)
    lines = mutated.code.splitlines()

    def source(name: str) -> list[str]:
        span = mutated.line_span_by_function_name[name]
        body = lines[span.start - 1 : span.end]
        return [line.replace(name, name.split("__mutmut_")[0]) for line in body]

    mutants = []
    for name in mutated.mutant_names:
        function = name.rpartition("__mutmut_")[0]
        changes = list(difflib.ndiff(source(f"{function}__mutmut_orig"), source(name)))
        taken, put = (tuple(c[2:].strip() for c in changes if c.startswith(sign)) for sign in ("- ", "+ "))
        mutants.append(Mutant(f"{module}.{name}", f"{module}.{function}", taken, put))
    return mutants


# -- in the process of pytest -----------------------------------------------------------------------------------------


class Plugin:
    """Runs all tests once, and then, for each mutant, those that reach it."""

    def __init__(self, mutants: Sequence[Mutant], results: Path) -> None:
        self.mutants, self.results = mutants, results
        self.place: str | None = None  # the test or the shared fixture that runs now
        self.reached: dict[str, set[str]] = defaultdict(set)  # place -> functions
        self.seconds: dict[str, float] = defaultdict(float)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = session.items
        gc.collect()
        gc.freeze()  # collections in the forked processes would copy the heap of all that is imported
        with open(self.results, "w") as file:
            costs, reached = self.run_once(items)
            for number, mutant in enumerate(self.mutants, 1):
                tests = sorted((item for item in items if mutant.function in reached[item.nodeid]),
                               key=lambda item: costs[item.nodeid])  # fmt: skip
                began = time.monotonic()
                outcome = judge(mutant.name, tests, sum(costs[item.nodeid] for item in tests)) if tests else UNREACHED
                print(json.dumps([mutant.name, outcome]), file=file, flush=True)
                seconds = time.monotonic() - began
                print(f"{number}/{len(self.mutants)} {outcome} {mutant.name} {seconds:.1f} s", flush=True)
        return True

    def run_once(self, items: list[pytest.Item]) -> tuple[dict[str, float], dict[str, set[str]]]:
        """Run every test without a mutant, in a forked process -> its seconds and the functions that it reaches."""
        read, write = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(read)
            code = 1
            try:
                os.environ["MUTANT_UNDER_TEST"] = "stats"
                failed = self.baseline(items)
                found = {}
                for item in items:
                    places = self.places_of(item)
                    functions = set().union(*(self.reached[place] for place in places))
                    found[item.nodeid] = (sum(self.seconds[place] for place in places), sorted(functions))
                with os.fdopen(write, "w") as file:
                    json.dump({"failed": failed, "found": found}, file)
                code = 0
            finally:
                os._exit(code)
        os.close(write)
        with os.fdopen(read) as file:
            said = json.load(file)
        os.waitpid(process, 0)
        if said["failed"]:
            raise pytest.UsageError(f"these tests fail without a mutant: {said['failed']}")
        return {k: v[0] for k, v in said["found"].items()}, {k: set(v[1]) for k, v in said["found"].items()}

    def baseline(self, items: list[pytest.Item]) -> list[str]:
        import mutmut.mutation.trampoline as trampoline

        # A file, because the processes that a test forks reach functions, too.
        descriptor, log = tempfile.mkstemp()

        def record(name: str, caller: str | None = None) -> None:
            os.write(descriptor, f"{self.place}\t{name}\n".encode())

        trampoline.record_trampoline_hit = record
        failed = []
        for number, item in enumerate(items):
            with self.at(item.nodeid):
                reports = runtestprotocol(item, log=False, nextitem=(items[number + 1 :] or [None])[0])
            failed += [f"{item.nodeid}: {report.longreprtext[-2000:]}" for report in reports if report.failed]
        for line in sorted(set(Path(log).read_text().splitlines())):
            place, name = line.split("\t")
            self.reached[place].add(name)
        os.unlink(log)
        return failed

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        outer, self.place = self.place, place
        began = time.process_time() + sum(os.times()[2:4])
        try:
            yield
        finally:
            used = time.process_time() + sum(os.times()[2:4]) - began
            self.seconds[place] += used
            if outer is not None:
                self.seconds[outer] -= used
            self.place = outer

    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Iterator[None]:
        if fixturedef.scope == "function" or self.place is None:
            yield
            return
        with self.at(f"fixture {fixturedef.baseid} {fixturedef.argname}"):  # it counts for every test that uses it
            yield

    def places_of(self, item: Any) -> list[str]:
        fixtures = [defs[-1] for defs in item._fixtureinfo.name2fixturedefs.values()]
        return [item.nodeid, *(f"fixture {f.baseid} {f.argname}" for f in fixtures if f.scope != "function")]


def judge(name: str, tests: list[pytest.Item], seconds: float) -> str:
    """Run tests with one mutant in a forked process until one fails."""
    process = os.fork()
    if process == 0:
        os.setpgid(0, 0)
        limit = int(10 + 5 * seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        _be_mutant(name, tests)
    end = time.monotonic() + 100 + 20 * seconds
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            _end(process)
            code = os.waitstatus_to_exitcode(status)
            return SURVIVED if code == 0 else HUNG if code == -signal.SIGXCPU else KILLED
        time.sleep(0.005)
    _end(process)
    os.waitpid(process, 0)
    return HUNG


def _end(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _be_mutant(name: str, tests: list[pytest.Item]) -> None:
    """Never returns. Exit code 0 if every test passed."""
    from mutmut.mutation.trampoline import set_mutant_under_test

    code = 1
    folder = Path(tempfile.mkdtemp())
    try:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 1)
        os.dup2(null, 2)
        tests[0].config._tmp_path_factory._basetemp = folder  # type: ignore[attr-defined]
        set_mutant_under_test(name)
        for number, item in enumerate(tests):
            reports = runtestprotocol(item, log=False, nextitem=(tests[number + 1 :] or [None])[0])
            if any(report.failed for report in reports):
                break
        else:
            code = 0
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(code)


def fork_ranks() -> None:
    """Ranks of `tests.ranks` are forked from the mutant's process, since its server would not know of the mutant.

    That process has one thread, so forking it is safe.
    """
    import functools
    import multiprocessing

    import tests.ranks as ranks

    ranks.forkserver = multiprocessing.get_context("fork")

    @functools.wraps(ranks.start_processes)
    def start_processes(*arguments: Any, **options: Any) -> Any:
        return original(*arguments, **{**options, "start_method": "fork"})

    original, ranks.start_processes = ranks.start_processes, start_processes


def run_tests(task: Path) -> int:
    """The process of pytest: cwd is the copy."""
    values = json.loads(task.read_text())
    fork_ranks()
    # The first counterexample kills a mutant; nobody reads the shortest. `conftest` builds on this profile.
    settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate], database=None)
    settings.load_profile("mutants")
    words = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:timeout",
        "-p",
        "no:xdist",
        "-o",
        "addopts=",
        "-s",
        "--tb",
        "native",
    ]
    words += ["-m", "not slow and not gpu", "--hypothesis-seed", "0", "--basetemp", str(task.with_suffix(".tmp"))]
    mutants = [Mutant(*mutant) for mutant in values["mutants"]]
    return pytest.main([*words, *values["tests"]], plugins=[Plugin(mutants, Path(values["results"]))])


# -- the command ------------------------------------------------------------------------------------------------------


def run_module(name: str, tree: Path, only: str, sample: int | None) -> list[tuple[Mutant, str]]:
    """All mutants of a module of the tree and what came of each. The module is whole again afterwards."""
    path = tree / "llm_jepa" / f"{name}.py"
    code = path.read_text()
    mutants = mutate(path, f"llm_jepa.{name.replace('/', '.')}")
    mutants = [mutant for mutant in mutants if only in mutant.name]
    if sample is not None and sample < len(mutants):
        chosen = {mutant.name for mutant in random.Random(0).sample(mutants, sample)}
        mutants = [mutant for mutant in mutants if mutant.name in chosen]
    task = tree / "task.json"
    results = tree / "results.jsonl"
    tests = [f"tests/{test}" for test in TESTS[name] if (tree / "tests" / test.split("::")[0]).exists()]
    task.write_text(json.dumps({"mutants": mutants, "tests": tests, "results": str(results)}))
    environ = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "tests.mutants", "--run", str(task)]
    subprocess.run(words, cwd=tree, env=environ, check=True)
    path.write_text(code)
    outcomes = dict(json.loads(line) for line in results.read_text().splitlines())
    return [(mutant, outcomes[mutant.name]) for mutant in mutants]


def figures(judged: Sequence[tuple[Mutant, str]], module: str, equivalent: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts of a module, and its survivors apart: those that are equivalent, and those that lack a test."""
    reasons = {(tuple(e["taken"]), tuple(e["put"])): e["why"] for e in equivalent if e["module"] == module}
    alive = [(mutant, outcome) for mutant, outcome in judged if outcome in (SURVIVED, UNREACHED)]
    survivors: dict[str, list[Any]] = {"equivalent": [], "not killed": []}
    for mutant, outcome in alive:
        entry = {"function": mutant.function.rpartition(".")[2], "taken": mutant.taken, "put": mutant.put}
        why = reasons.get((mutant.taken, mutant.put))
        if why is None:
            survivors["not killed"].append({**entry, "outcome": outcome})
        else:
            survivors["equivalent"].append({**entry, "why": why})
    return {
        "mutants": len(judged),
        "killed": len(judged) - len(alive),
        "hung": sum(outcome == HUNG for _, outcome in judged),
        **{key.replace(" ", "_"): value for key, value in survivors.items()},
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=TESTS, default=list(TESTS), metavar="MODULE")
    parser.add_argument("--name", default="", help="only mutants with this in their name")
    parser.add_argument("--sample", type=int, help="so many mutants of each module, drawn at random (default: all)")
    parser.add_argument("--out", type=Path, help="JSON file; modules that were not asked for keep their figures")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.run:
        return run_tests(options.run)
    from eval.provenance import environment
    from llm_jepa.core.files import write_json

    equivalent = json.loads(EQUIVALENT.read_text())
    result = json.loads(options.out.read_text()) if options.out and options.out.exists() else {"modules": {}}
    for name in options.only:
        with tempfile.TemporaryDirectory() as tree:
            copy_tree(Path(tree))
            judged = run_module(name, Path(tree), options.name, options.sample)
        counts = figures(judged, name, equivalent)
        result["modules"][name] = {**counts, "tests": TESTS[name], "environment": environment()}
        print(json.dumps(counts["not_killed"], indent=1))
        print(f"{name}: {counts['killed']} of {counts['mutants']} killed, {len(counts['equivalent'])} equivalent")
        if options.out:
            write_json(options.out, {**result, "summary": summary(result["modules"])})
    return 0


def summary(modules: dict[str, Any]) -> dict[str, int]:
    """The counts of all modules together."""
    counts = {key: sum(module[key] for module in modules.values()) for key in ("mutants", "killed")}
    for key in ("equivalent", "not_killed"):
        counts[key] = sum(len(module[key]) for module in modules.values())
    return counts


if __name__ == "__main__":
    sys.exit(main())
