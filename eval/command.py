"""How every command of `eval` ends: an error is one line on stderr and exit code 2."""

from __future__ import annotations

import functools
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from llm_jepa import UserError
from llm_jepa.core import errors
from llm_jepa.core.errors import is_panic, print_error, report, traceback_flag
from llm_jepa.core.options import number, seed_number, whole
from llm_jepa.core.printing import safe_output, shown
from llm_jepa.core.signals import Stopped, ending_at_once

__all__ = [
    "ArgumentParser", "check_writable", "number", "one_line_errors", "require", "seed_number", "whole",
]  # fmt: skip

PACKAGE = __name__.partition(".")[0]  # `eval` in the repository, `llm_jepa_eval` if it is installed
Words = Sequence[str] | None  # of a command line; None: those of this process


class ArgumentParser(errors.ArgumentParser):
    """argparse that raises UserError, and names a command as it is called: `python -m llm_jepa_eval.run`."""

    def __init__(self, prog: str | None = None, **options: Any) -> None:
        super().__init__(prog and prog.replace("-m eval.", f"-m {PACKAGE}."), **options)


def one_line_errors(name: str, *, if_stopped: str = "") -> Callable[[Callable[[Words], int]], Callable[..., int]]:
    """Decorate a `main(argv)` so that an error prints `name: error: ...` and returns 2.

    SIGTERM and SIGUSR1 return 75 and Ctrl-C returns 130, after a line. `--traceback` among the words of the command
    line shows where the error was raised.

    if_stopped: what a stopped command has kept, and what to do then.
    """

    name = name.replace("eval.", f"{PACKAGE}.", 1)

    def decorate(main: Callable[[Words], int]) -> Callable[..., int]:
        @functools.wraps(main)
        def guarded(argv: Words = None) -> int:
            with traceback_flag(sys.argv[1:] if argv is None else argv) as words, safe_output():
                try:
                    with ending_at_once(), warnings.catch_warnings():
                        warnings.showwarning = _show_warning
                        return main(words)
                except (KeyboardInterrupt, Stopped) as end:
                    stopped = end if isinstance(end, Stopped) else Stopped(signal.SIGINT)
                    return report(name, ". ".join(filter(None, (str(stopped), if_stopped))), stopped.exit_code)
                except Exception as error:  # a model's own code may raise anything
                    return print_error(name, error)
                except BaseException as error:
                    if not is_panic(error):
                        raise
                    return print_error(name, error)

        return guarded

    return decorate


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"Warning: {shown(str(message))}", file=sys.stderr)


def require(*packages: str) -> None:
    """Raises ModuleNotFoundError for a missing package, for which `one_line_errors` prints the install command.

    Commands call it, and `check_writable`, before the work that would be lost.
    """
    for package in packages:
        import_module(package)


def check_writable(*paths: Path | None) -> None:
    """Raises UserError for a file that could not be written. Writes nothing itself. None is left out."""
    for path in paths:
        if path is None:
            continue
        if path.is_dir():
            raise UserError(f"{path} is a folder; choose another file.")
        nearest = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
        if not (path.exists() or nearest.is_dir()) or not os.access(nearest, os.W_OK):
            raise UserError(f"{path} cannot be written ({nearest} is in the way); choose another file.")
