"""What a command prints: texts of strangers are shown, and a terminal does not obey them.

File names, keys, tensor names, labels and rows come from strangers. Escape sequences in them could clear a terminal,
hide lines, or forge the line of an error. So the command line escapes everything that it prints, in one place.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TextIO

# Control characters except tab and line break, line separators, changes of direction, and halves of characters.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_COLOR = re.compile(r"\x1b\[[0-9;]*m")  # transformers writes its reports in bold, also into files
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
    """Escape all that is printed inside this block: on stdout and stderr, by loggers, and by `warnings`.

    A service may start a command with closed streams, which Python calls None. What is printed there is dropped.
    """
    streams, factory, format_warning = (sys.stdout, sys.stderr), logging.getLogRecordFactory(), warnings.formatwarning

    def one_warning(message: Warning | str, *arguments: Any, **options: Any) -> str:
        return format_warning(_indented(str(message)), *arguments, **options)

    # Loggers keep the stream that they found first, so their messages are escaped before.
    logging.setLogRecordFactory(_Record)
    warnings.formatwarning = one_warning
    with ExitStack() as dropped:
        out, err = (stream or dropped.enter_context(open(os.devnull, "w", encoding="utf-8")) for stream in streams)
        sys.stdout, sys.stderr = _Escaping(out, has_bars=False), _Escaping(err, has_bars=True)
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

    def __init__(self, stream: Any, *, has_bars: bool) -> None:
        self.stream, self._has_bars = stream, has_bars

    def write(self, text: str) -> int:
        start = ""
        if self._has_bars:  # print(name) writes a name alone, so on stdout `\x1b[A` would be obeyed
            if _PROGRESS.fullmatch(text):
                return self.stream.write(text)
            start = "\r" if text.startswith("\r") else ""  # a progress bar overwrites itself
        return self.stream.write(start + _encodable(escaped(text[len(start) :]), self.stream))

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _encodable(text: str, stream: Any) -> str:
    """The text with `\\u` escapes, as in JSON, for what the stream's encoding lacks, such as cp1252."""
    encoding, errors = getattr(stream, "encoding", None), getattr(stream, "errors", None)
    if text.isascii() or not encoding or errors not in (None, "strict"):
        return text
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return "".join(letter if _holds(encoding, letter) else json.dumps(letter)[1:-1] for letter in text)
    return text


def _holds(encoding: str, letter: str) -> bool:
    try:
        letter.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


class _Record(logging.LogRecord):
    """A log record whose message is escaped; its further lines cannot look like lines of their own."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if self.exc_info and self.exc_info[0]:  # formatters write this text where there is one
            self.exc_text = escaped(logging.Formatter().formatException(self.exc_info))

    def getMessage(self) -> str:
        return _indented(_COLOR.sub("", super().getMessage()))


def _indented(message: str) -> str:
    return escaped(message).replace("\n", "\n    ")
