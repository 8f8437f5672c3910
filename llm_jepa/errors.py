from __future__ import annotations


class UserError(ValueError):
    """Something the user gave cannot work. The message says what was given, why it cannot work and what to do.

    The command line prints it as one line and exits with code 2; a `UserError` is never a bug of ours.
    """


class NonFiniteLossError(RuntimeError):
    """Training met a NaN or infinite loss or gradient and stopped before the optimizer took that step."""
