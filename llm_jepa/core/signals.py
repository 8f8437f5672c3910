"""Requests to stop a command: SIGTERM and SIGUSR1 of a scheduler, Ctrl-C, and the time limit `stop_after`.

A scheduler sends a signal some time before it kills. While a model is trained, the request waits for the end of the
optimizer step, where a checkpoint is saved (`stopping.StoppableTrainer`). Before that there is nothing to save, and the
command ends at once. So do commands whose work is kept as it is done. Needs no torch.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from .errors import UserError

TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, the same command may be run again
INTERRUPTED = 130  # the shell's code for SIGINT
# Of a scheduler. Windows has no SIGUSR1.
SCHEDULER = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
TIME_LIMIT = 1000  # a "signal" number that no signal has
SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
Handler = Callable[[int, Any], None]


class Stopped(BaseException):
    """The run was asked to stop and did. Like KeyboardInterrupt not an `Exception`, which libraries catch.

    code: the number of the signal, or TIME_LIMIT.
    kept: what is saved, and how to go on, in words.
    """

    def __init__(self, code: int, kept: str = "") -> None:
        super().__init__(code)
        self.code, self.kept = code, kept

    def __str__(self) -> str:
        if self.code == TIME_LIMIT:
            why = "stopped, because the time of stop_after is over"
        else:
            why = "interrupted" if self.code == signal.SIGINT else f"stopped by {signal.Signals(self.code).name}"
        return f"{why}. {self.kept}" if self.kept else why

    @property
    def exit_code(self) -> int:
        return INTERRUPTED if self.code == signal.SIGINT else TRY_AGAIN


class StopRequest:
    """What has asked the run to stop. Nothing, until `listening` is entered.

    stop_after: the run asks itself after this time, as "2h" or "1h30m", counted from the start of listening.
    """

    def __init__(self, stop_after: str | None = None) -> None:
        self._seconds = seconds_of(stop_after) if stop_after is not None else None
        self._end: float | None = None
        self._signal = 0
        self.is_listening = False

    @property
    def code(self) -> int:
        """0, the number of a signal, or TIME_LIMIT."""
        is_over = self._end is not None and time.monotonic() >= self._end
        return self._signal or (TIME_LIMIT if is_over else 0)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside the block, signals are noted instead of ending the process. A second Ctrl-C leaves at once."""
        self.is_listening = True
        if self._seconds is not None:
            self._end = time.monotonic() + self._seconds
        try:
            with handled((*SCHEDULER, signal.SIGINT), self._note):
                yield
        finally:
            self.is_listening = False

    def _note(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT == self._signal:
            raise KeyboardInterrupt
        self._signal = number


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Inside the block, SIGTERM and SIGUSR1 raise `Stopped`, as Ctrl-C raises KeyboardInterrupt."""
    with handled(SCHEDULER, end_at_once):
        yield


def end_at_once(number: int, frame: Any) -> None:
    """The handler of `ending_at_once`."""
    raise Stopped(number)


@contextmanager
def waiting_until_started() -> Iterator[None]:
    """Inside the block, the signals of a scheduler wait; child processes that start in it call `leave_to_parent`."""
    if not hasattr(signal, "sigwaitinfo"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SCHEDULER)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_to_parent() -> None:
    """In a child process: leave the signals of a scheduler, which go to all processes, to the parent.

    SIGTERM from the parent itself ends this process. macOS does not say who sends a signal; there, nothing changes.
    """
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, SCHEDULER)  # also of the thread below, which takes them
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo(SCHEDULER).si_pid != os.getppid():
        pass
    os._exit(0)


@contextmanager
def handled(numbers: Iterable[int], handler: Handler) -> Iterator[None]:
    """Inside the block, `handler` is called for these signals. Only the main thread can have handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old if old is not None else signal.SIG_DFL)


def seconds_of(text: str) -> float:
    """ "2h", "1h30m" or "90s" in seconds. Raises UserError."""
    if not re.fullmatch(r"(\d+(\.\d+)?[dhms])+", text):
        raise UserError(f"stop_after: {text!r} is not a time; write 2h, 1h30m or 90s.")
    return sum(float(number) * SECONDS[unit] for number, unit in re.findall(r"([\d.]+)([dhms])", text))
