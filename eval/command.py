"""How every command of `eval` ends: a mistake of the user is one line on stderr and exit code 2."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec

from llm_jepa import UserError

P = ParamSpec("P")


def one_line_errors(name: str) -> Callable[[Callable[P, int]], Callable[P, int]]:
    """Decorate a `main` so that an error which the user can mend prints `name: error: ...` and returns 2.

    Such an error is a UserError or an OSError (a full disk, a folder without write permission). Any other error is a
    bug of ours and keeps its traceback; LLM_JEPA_TRACEBACK=1 shows the traceback of all of them.
    """

    def decorate(main: Callable[P, int]) -> Callable[P, int]:
        @functools.wraps(main)
        def guarded(*arguments: P.args, **options: P.kwargs) -> int:
            try:
                return main(*arguments, **options)
            except (UserError, OSError) as error:
                if os.environ.get("LLM_JEPA_TRACEBACK"):
                    raise
                print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
                return 2

        return guarded

    return decorate
