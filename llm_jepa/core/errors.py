"""Errors that a user can cause, and their one-line form."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from .printing import shown

TRACEBACK = "--traceback"
# Package -> our extra
EXTRAS = {
    "PIL": "vl",
    "av": "vl",
    "matplotlib": "eval",
    "scipy": "eval",
    "evaluate": "eval",
    "gguf": "gguf",
    "gradio": "demo",
    "bitsandbytes": "quant",
}
LAUNCHED = "LLM_JEPA_LAUNCHED"  # in the environment of a launched process: a folder for its failure
_ASKED_FOR_TRACEBACK = "LLM_JEPA_TRACEBACK"  # in the environment, so that the processes of a launch see it too


class UserError(ValueError):
    """Something the user gave cannot work. The message says what was given, why it cannot work and what to do.

    The command line prints it as one line and exits with code 2. A `UserError` never means a bug of ours.
    """


class NonFiniteLossError(RuntimeError):
    """Training met a NaN or infinite loss or gradient and stopped before the optimizer took that step."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse that raises UserError instead of printing its usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first non-empty line of an error, at most `limit` characters; the error's type if it has no message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:limit]


def one_line(error: BaseException, limit: int | None = None) -> str:
    """The whole message of an error in one line, at most `limit` characters; its type if it has no message."""
    return (" ".join(str(error).split()) or type(error).__name__)[:limit]


@contextmanager
def traceback_flag(words: Sequence[str]) -> Iterator[list[str]]:
    """Yield the words of a command line without `--traceback`; if it was there, `print_error` shows tracebacks."""
    before = os.environ.get(_ASKED_FOR_TRACEBACK, "")
    if TRACEBACK in words:
        os.environ[_ASKED_FOR_TRACEBACK] = "1"
    try:
        yield [word for word in words if word != TRACEBACK]
    finally:
        os.environ[_ASKED_FOR_TRACEBACK] = before


def is_panic(error: BaseException) -> bool:
    """Whether a library in Rust failed, such as `tokenizers` at a regular expression that takes too long."""
    return type(error).__name__ == "PanicException"  # not an Exception, and its class cannot be imported


def print_error(program: str, error: BaseException) -> int:
    """Print an error as one line on stderr and return the exit code, 2.

    `UserError` and `OSError` speak for themselves, and a package of an extra gets the command that
    installs it. Any other error comes from the code of a model or a
    library, or is a bug of ours; its line begins with its type and says how to see where it was raised.
    """
    show_traceback(error)
    # An error in a DataLoader worker carries the worker's traceback before its message.
    message = str(error).rpartition(f"{UserError.__module__}.{UserError.__name__}: ")[2]
    if isinstance(error, (UserError, OSError)):
        line = " ".join(message.split())
    elif isinstance(error, ModuleNotFoundError) and (package := str(error.name).partition(".")[0]) in EXTRAS:
        line = f'this needs {package}: pip install "llm-jepa[{EXTRAS[package]}]"'
    elif is_panic(error):
        line = f"a library failed while it read the model or its tokenizer: {message[:300]}"
    else:
        lines = [text.strip() for text in message.splitlines() if text.strip()]
        is_of_worker = any("Original Traceback" in text for text in lines)
        name = type(error).__name__
        text = (lines[-1] if is_of_worker else " ".join(lines)).removeprefix(f"{name}: ")[:300]
        line = f"{name}: {text} (run again with {TRACEBACK} to see where)"
    return report(program, f"error: {line}", 2)


def report(program: str, line: str, exit_code: int) -> int:
    """Print a line on stderr. A launched process hands it to its launcher, which prints one for all of them."""
    line = shown(line)
    folder = os.environ.get(LAUNCHED)
    if folder is None or not os.path.isdir(folder):
        print(f"{program}: {line}", file=sys.stderr)
        return exit_code
    rank = os.environ.get("RANK", "0")
    failure = {"time": time.time(), "rank": int(rank), "line": line, "exit_code": exit_code}
    try:
        (Path(folder) / f"{rank}.json").write_text(json.dumps(failure))
    except OSError:  # for example a full disk
        print(f"{program}: rank {rank}: {line}", file=sys.stderr)
    return exit_code


@contextmanager
def announced() -> Iterator[None]:
    """Inside the block, a launched process saves something that its launcher must not cut off: see `announces`."""
    folder = os.environ.get(LAUNCHED)
    if folder is None or not os.path.isdir(folder):
        yield
        return
    mark = _mark(folder, os.getpid())
    with suppress(OSError):
        mark.touch()
    try:
        yield
    finally:
        with suppress(OSError):
            mark.unlink()


def announces(folder: str, process: int) -> bool:
    """Whether a launched process is inside of `announced`."""
    return _mark(folder, process).exists()


def _mark(folder: str, process: int) -> Path:
    return Path(folder) / f"{process}.saves"


def first_failure(folder: str) -> tuple[int, str] | None:
    """The exit code and the line of the launched process that failed first; the others missed it then."""
    failures = []
    for path in Path(folder).glob("*.json"):
        with suppress(OSError, ValueError):  # a process that was killed, or a full disk, leaves half a file
            failures.append(json.loads(path.read_text()))
    if not failures:
        return None
    first = min(failures, key=lambda failure: failure["time"])
    is_same = all(failure["line"] == first["line"] for failure in failures) and len(failures) > 1
    return first["exit_code"], first["line"] if is_same else f"rank {first['rank']}: {first['line']}"


def show_traceback(error: BaseException) -> None:
    """Print where an error was raised, with all of its causes, if `--traceback` asked for it."""
    if not os.environ.get(_ASKED_FOR_TRACEBACK):
        return
    link: BaseException | None = error
    while link is not None:
        link.__suppress_context__ = False  # undo `from None`: what a library said is wanted now
        link = link.__cause__ or link.__context__
    traceback.print_exception(error)
