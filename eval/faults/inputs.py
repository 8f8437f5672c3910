"""Hostile inputs: give one to the package in a forked process with limits, and see what happens.

    Input("torn header", make, says="header")          make(folder) writes the input and returns a command
    outcome(input, folder)                             -> Outcome(kind="one_line", ...)

A list of inputs is a function `inputs(shared)` that yields them; it builds in the folder `shared` what many need.
Fork from a process with one thread that has imported what the commands need.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Command = list[str] | Callable[[], Any]  # words of `llm-jepa`, or a call that returns an exit code or raises

ACCEPTED = "accepted"  # exit code 0, or the call returned
ONE_LINE = "one_line"  # exit code 2 and one line on stderr, or the call raised UserError
STOPPED = "stopped"  # one line and another exit code, such as 5 for lack of memory
TRACEBACK = "traceback"  # also an error that is only named by its type, not explained
DIED = "died"  # by a signal of its own
HUNG = "hung"  # reached the limit of seconds
EXECUTED = "executed"  # something the input names was run: `canary(folder)` exists
WROTE = "wrote"  # a file outside of the work folder was written, created or removed
RAW = "raw"  # a control character of the input reached the terminal

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
WRITING = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}


@dataclass(frozen=True)
class Input:
    """One hostile input and what must happen.

    Attributes:
        name: unique in its list.
        make: make(folder) -> a command. It may write into the folder; the command runs in `folder / "work"`, the only
            place where it may write.
        says: words of the one line with which the command must end, exit code 2. None: it must be accepted.
        either: it may be accepted as well, or end in one line with another exit code. (Is 1e300 a learning rate?)
    """

    name: str
    make: Callable[[Path], Command]
    says: str | None = None
    either: bool = False


@dataclass(frozen=True)
class Outcome:
    kind: str
    code: int | None  # exit code; negative: the signal
    seconds: float
    output: str
    errors: str

    def fault(self, given: Input) -> str | None:
        """What is wrong, in words; None if this is what must happen."""
        if given.either and self.kind in (ACCEPTED, ONE_LINE, STOPPED):
            return None
        wanted = ACCEPTED if given.says is None else ONE_LINE
        last = (self.errors.strip().splitlines() or [""])[-1]
        if self.kind != wanted:
            return (
                f"{given.name}: {self.kind} (exit {self.code}, {self.seconds:.1f} s) instead of {wanted}: {last[:300]}"
            )
        if given.says is not None and given.says not in last:
            return f"{given.name}: does not say {given.says!r}: {last[:300]}"
        return None


def canary(folder: Path) -> Path:
    """The file that code in an input creates; if it exists, the code was run."""
    return folder / "canary"


def outcomes(
    inputs: Iterable[Input], folder: Path, *, seconds: float = 20, megabytes: int = 2000, jobs: int = 2
) -> Iterator[tuple[Input, Outcome]]:
    """Try many inputs, `jobs` at a time, each in a folder of its own; as they end."""
    waiting: list[tuple[Input, _Child]] = []
    for number, given in enumerate(inputs):
        waiting.append((given, _Child(given, folder / f"{number:04d}", seconds, megabytes)))
        if len(waiting) == jobs:
            first, child = waiting.pop(0)
            yield first, child.wait()
    for given, child in waiting:
        yield given, child.wait()


def outcome(given: Input, folder: Path, *, seconds: float = 20, megabytes: int = 2000) -> Outcome:
    """Try one input in a forked process. The folder must not exist.

    Args:
        seconds: of processor time. Time on the clock is limited to six times that, since other processes may compute.
        megabytes: of address space that it may take beyond what this process has.
    """
    return _Child(given, folder, seconds, megabytes).wait()


class _Child:
    """A forked process that runs one input."""

    def __init__(self, given: Input, folder: Path, seconds: float, megabytes: int) -> None:
        self.folder, self.seconds, self.start = folder, seconds, time.monotonic()
        (folder / "work").mkdir(parents=True)
        sys.stdout.flush()
        sys.stderr.flush()
        self.process = os.fork()
        if self.process == 0:
            _run(given, folder, seconds, megabytes)

    def wait(self) -> Outcome:
        deadline = self.start + 6 * self.seconds
        status, is_late = None, False
        while status is None:
            done, found = os.waitpid(self.process, os.WNOHANG)
            if done:
                status = found
            elif time.monotonic() > deadline:
                is_late = True
                os.kill(self.process, signal.SIGKILL)
                status = os.waitpid(self.process, 0)[1]
            else:
                time.sleep(0.005)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process, signal.SIGKILL)  # what it started
        code = os.waitstatus_to_exitcode(status)
        took = time.monotonic() - self.start
        output, errors = (_read(self.folder / name) for name in ("stdout", "stderr"))
        return Outcome(self._kind(code, is_late, output, errors), code, took, output, errors)

    def _kind(self, code: int, is_late: bool, output: str, errors: str) -> str:
        if canary(self.folder).exists():
            return EXECUTED
        if (self.folder / "wrote").stat().st_size:
            return WROTE
        if is_late or code in (-signal.SIGXCPU, -signal.SIGKILL):
            return HUNG
        if code < 0:
            return DIED
        lines = [line for line in errors.splitlines() if re.match(r"[\w.-]+: (error|stopped): ", line)]
        if "Traceback" in errors or code == 1 or "run again with --traceback" in errors:
            return TRACEBACK
        if CONTROL.search(output) or CONTROL.search(errors):
            return RAW
        if code == 0:
            return ACCEPTED
        if len(lines) != 1 or errors.strip().splitlines()[-1] != lines[0]:
            return TRACEBACK
        return ONE_LINE if code == 2 else STOPPED


def _run(given: Input, folder: Path, seconds: float, megabytes: int) -> None:
    """In the child: make the input, set the limits, run the command, and leave."""
    code = 1
    try:
        os.setpgid(0, 0)
        _redirect(folder)
        command = given.make(folder)
        before = _state_of(folder)
        os.chdir(folder / "work")
        os.environ["TMPDIR"] = str(folder / "work")
        _watch(folder)
        _limit(seconds, megabytes)
        try:
            code = _exit_code(command)
        finally:
            if _state_of(folder) != before:  # libraries that are not Python write, too
                _note(folder, "a file of the input has changed")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _exit_code(command: Command) -> int:
    from llm_jepa.cli import main
    from llm_jepa.core.errors import UserError, print_error

    if isinstance(command, list):
        return main(command)
    try:
        found = command()
    except UserError as error:
        return print_error("call", error)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return found if type(found) is int else 0


def _redirect(folder: Path) -> None:
    (folder / "wrote").touch()
    for number, name in enumerate((os.devnull, "stdout", "stderr")):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND
        descriptor = os.open(folder / name, flags, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    # A test's runner may have replaced these.
    sys.stdin = os.fdopen(0, "r", closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False, encoding="utf-8")  # strict, as a terminal
    sys.stderr = os.fdopen(2, "w", closefd=False, errors="backslashreplace")


def _watch(folder: Path) -> None:
    """Note what is written outside of the work folder. Devices may be written."""
    work, notes = os.path.realpath(folder / "work"), str(folder / "wrote")

    def hook(event: str, arguments: tuple) -> None:
        if arguments and arguments[0] == notes:
            return
        if event == "open":
            if not isinstance(arguments[2], int) or not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event not in WRITING:
            return
        for path in arguments[: 2 if event in ("os.rename", "os.link") else 1]:
            if not isinstance(path, (str, bytes, os.PathLike)):
                continue  # a descriptor
            real = os.path.realpath(os.fsdecode(path)) if event == "open" else _own_path(os.fsdecode(path))
            if not (real + "/").startswith(work + "/") and not real.startswith(("/dev/", "/proc/")):
                _note(folder, f"{event} {real}")

    sys.addaudithook(hook)


def _own_path(path: str) -> str:
    """The real path of a name that may be a link itself."""
    return os.path.join(os.path.realpath(os.path.dirname(path) or "."), os.path.basename(path))


def _note(folder: Path, text: str) -> None:
    descriptor = os.open(str(folder / "wrote"), os.O_WRONLY | os.O_APPEND)
    os.write(descriptor, f"{text}\n".encode(errors="backslashreplace"))
    os.close(descriptor)


def _state_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """Every file of the input -> what changes if it is written. Not the work folder, nor what this module writes."""
    state: dict[str, tuple[int, ...]] = {}
    for parent, folders, files in os.walk(folder):
        if Path(parent) == folder:
            folders[:] = [name for name in folders if name != "work"]
            files = [name for name in files if name not in ("stdout", "stderr", "wrote", "canary")]
        for name in (*folders, *files):
            path = os.path.join(parent, name)
            info = os.lstat(path)
            state[path] = (info.st_mode, info.st_ino, info.st_size, info.st_mtime_ns)
    return state


def _limit(seconds: float, megabytes: int) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 10**6,) * 2)
    times = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(times.ru_utime + times.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
