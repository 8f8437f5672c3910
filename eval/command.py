"""How every command of `eval` ends: an error is one line on stderr and exit code 2."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence

from llm_jepa.core.errors import print_error, traceback_flag

Words = Sequence[str] | None  # of a command line; None: those of this process


def one_line_errors(name: str) -> Callable[[Callable[[Words], int]], Callable[..., int]]:
    """Decorate a `main(argv)` so that an error prints `name: error: ...` and returns 2.

    `--traceback` among the words of the command line shows where the error was raised.
    """

    def decorate(main: Callable[[Words], int]) -> Callable[..., int]:
        @functools.wraps(main)
        def guarded(argv: Words = None) -> int:
            with traceback_flag(sys.argv[1:] if argv is None else argv) as words:
                try:
                    return main(words)
                except Exception as error:  # a model's own code may raise anything
                    return print_error(name, error)

        return guarded

    return decorate
