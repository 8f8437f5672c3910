"""Regular expressions of a user or of a stranger, matched in a child with limits. Imports only `re`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .errors import UserError
from .limited import Refused, run_limited


def matching(pattern: str, names: Sequence[str], key: str) -> list[str]:
    """The names that a pattern matches as a whole. `key` says where the pattern stands.

    Raises UserError for a pattern that is malformed, or that takes too long: `(a+)+` may need years.
    """
    try:
        return run_limited(_matching, pattern, list(names))
    except Refused as refused:
        raise UserError(
            f"{key}={pattern[:80]!r} cannot be used as a regular expression: {refused}. Write a list of names, such as "
            "[q_proj, v_proj]."
        ) from None


def _matching(pattern: str, names: Sequence[str]) -> list[str]:
    compiled = re.compile(pattern)
    return [name for name in names if compiled.fullmatch(name)]
