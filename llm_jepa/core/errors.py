"""Errors that a user can cause, and their one-line form."""

from __future__ import annotations

import argparse
from typing import NoReturn


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
