"""What a command prints: texts of strangers are shown, and a terminal does not obey them.

File names, keys, tensor names, labels and rows come from strangers. Escape sequences in them could clear a terminal,
hide lines, or forge the line of an error. So the command line escapes everything that it prints, in one place.
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

# Control characters except tab and line break, line separators, changes of direction, and halves of characters.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_PROGRESS = re.compile(r"(\r|\n|\x1b\[A)*")  # how tqdm moves between its bars; it writes these alone


def escaped(text: str) -> str:
    """The text with unsafe characters as backslash escapes; other characters, also Chinese and emoji, as they are.

    JSON stays JSON with the same value: it holds no control character below 7f, and it knows the escapes of the others.
    """
    return UNSAFE.sub(lambda match: f"\\x{ord(match[0]):02x}" if match[0] < " " else f"\\u{ord(match[0]):04x}", text)


def shown(text: str) -> str:
    """The text in one line, escaped."""
    return escaped(" ".join(text.split()))


@contextmanager
def safe_output() -> Iterator[None]:
    """Escape all that is printed inside this block: on stdout and stderr, by loggers, and by `warnings`."""
    streams, factory, format_warning = (sys.stdout, sys.stderr), logging.getLogRecordFactory(), warnings.formatwarning

    def one_warning(message: Warning | str, *arguments: Any, **options: Any) -> str:
        return format_warning(_indented(str(message)), *arguments, **options)

    # Loggers keep the stream that they found first, so their messages are escaped before.
    logging.setLogRecordFactory(_Record)
    warnings.formatwarning = one_warning
    sys.stdout, sys.stderr = (_Escaping(stream) for stream in streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
        logging.setLogRecordFactory(factory)
        warnings.formatwarning = format_warning


def raw(stream: TextIO) -> TextIO:
    """The stream under an escaping one, for our own escape sequences. The caller escapes what it puts between them."""
    return stream.stream if isinstance(stream, _Escaping) else stream


class _Escaping:
    """A text stream that escapes what is written to it."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        if _PROGRESS.fullmatch(text):
            return self.stream.write(text)
        start = "\r" if text.startswith("\r") else ""  # a progress bar overwrites itself
        return self.stream.write(start + escaped(text[len(start) :]))

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class _Record(logging.LogRecord):
    """A log record whose message is escaped; its further lines cannot look like lines of their own."""

    def getMessage(self) -> str:
        return _indented(super().getMessage())


def _indented(message: str) -> str:
    return escaped(message).replace("\n", "\n    ")
