from __future__ import annotations


class UserError(ValueError):
    """Something the user gave cannot work. The message says what was given, why it cannot work and what to do.

    The command line prints it as one line and exits with code 2; a `UserError` is never a bug of ours.
    """


class NonFiniteLossError(RuntimeError):
    """Training met a NaN or infinite loss or gradient and stopped before the optimizer took that step."""


def first_line(error: BaseException) -> str:
    """The first line of an error that is not empty, at most 200 characters; its type if it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]
