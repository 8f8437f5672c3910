"""Claim: what a stranger named is shown by every printer of a command, and obeyed by none."""

from __future__ import annotations

import io
import json
import logging
import re
import shlex
import subprocess
import sys
import warnings

import pytest
from tqdm import tqdm

from eval.command import one_line_errors
from llm_jepa.cli import main
from llm_jepa.core.errors import ArgumentParser, UserError, print_error
from llm_jepa.core.printing import UNSAFE, escaped, safe_output, shown

BAD = [
    "\x1b[2J",
    "\x1b]0;title\x07",
    "\x9b31m",
    "a\rllm-jepa: error: forged",
    "\u202eabc",
    "\u2066x",
    "\ud800",
    "\0",
    "\x7f",
]
GOOD = "中文, \u05e2\u05d1, e\u0301, \U0001f469\u200d\U0001f4bb, ü, 'quoted', a\\b"


@pytest.mark.parametrize("bad", BAD, ids=ascii)
def test_every_printer_escapes(bad, capsys):
    """print, a logger that existed before, `warnings` and the line of an error."""
    logger, handler = logging.getLogger("llm_jepa.tests.printing"), logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    try:
        with safe_output(), warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = lambda message, category, name, line, *_: sys.stderr.write(
                warnings.formatwarning(message, category, name, line, "")
            )
            print(f"print {bad} {GOOD}")
            logger.warning("logged %s %s", bad, GOOD)
            warnings.warn(f"warned {bad} {GOOD}", stacklevel=1)
            assert print_error("llm-jepa", UserError(f"raised {bad} {GOOD}")) == 2
    finally:
        logger.removeHandler(handler)
    output = capsys.readouterr()
    assert not UNSAFE.search(output.out + output.err)
    assert output.out.count(GOOD) == 1 and output.err.count(GOOD) == 3
    assert sum(line.startswith("llm-jepa: error: ") for line in output.err.splitlines()) == 1


def test_a_bold_report_of_a_library_is_logged_as_plain_text(capsys):
    logger, handler = logging.getLogger("llm_jepa.tests.printing"), logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    try:
        with safe_output():
            logger.warning("\x1b[1mLlama LOAD REPORT\x1b[0m from: x")
    finally:
        logger.removeHandler(handler)
    assert capsys.readouterr().err == "Llama LOAD REPORT from: x\n"


def test_lines_of_a_message_cannot_be_lines_of_their_own(capsys):
    logger, handler = logging.getLogger("llm_jepa.tests.printing"), logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    try:
        with safe_output():
            logger.warning("a key\nllm-jepa: error: forged")
            print_error("llm-jepa", UserError("a key\nllm-jepa: error: forged"))
    finally:
        logger.removeHandler(handler)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "a key", "    llm-jepa: error: forged", "llm-jepa: error: a key llm-jepa: error: forged",
    ]  # fmt: skip


def test_the_commands_print_so(capsys, tmp_path):
    """The escaping streams are in place during a command, and gone after it."""
    streams = sys.stdout, sys.stderr
    assert main(["generate", str(tmp_path / "\x1b[2J"), "--prompt", "x"]) == 2

    @one_line_errors("eval.x")
    def command(words):
        print("\x1b[2J 中文")
        warnings.warn("a\nwarning \x1b[2J", stacklevel=1)
        return 0

    assert command([]) == 0
    assert (sys.stdout, sys.stderr) == streams
    output = capsys.readouterr()
    assert "\x1b" not in output.out + output.err
    assert "\\x1b[2J 中文" in output.out and "Warning: a warning \\x1b[2J" in output.err


def test_json_keeps_its_value(capsys):
    """Models and rows may hold any character, and JSON that is printed is read by a program."""
    value = {"text": "".join(map(chr, [*range(0x3000), *range(0xD800, 0xD810)])) + GOOD}
    with safe_output():
        print(json.dumps(value, ensure_ascii=False))
        print(json.dumps(value))
    first, second = capsys.readouterr().out.rstrip("\n").split("\n")
    assert json.loads(first) == value and second == json.dumps(value)


def test_real_progress_bars_are_written_as_without_escapes(capsys):
    def bars():
        with tqdm(total=3, desc="outer", mininterval=0, leave=False, ascii=True) as outer:
            for _ in range(3):
                for _ in tqdm(range(2), desc="inner", mininterval=0, position=1, leave=False, ascii=True):
                    pass
                outer.update()
        tqdm.write("a line", file=sys.stderr)

    def moves() -> list[str]:
        return re.findall(r"\r|\n|\x1b\[A|outer|inner|a line|\\\\", capsys.readouterr().err)

    bars()
    plain = moves()
    with safe_output():
        bars()
    assert moves() == plain and plain.count("outer") > 2 and "\x1b[A" in plain


def test_help_is_printed_as_it_is(capsys):
    parser = ArgumentParser(prog="x", description="A description with \t a tab.")
    parser.add_argument("--name", help="Ümlaut, 中文")
    expected = parser.format_help()
    with safe_output(), pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    assert capsys.readouterr().out == expected


def test_progress_bars_move(capsys):
    with safe_output():
        sys.stderr.write("\r 10%")
        sys.stderr.write("\x1b[A")
        sys.stderr.write("\n")
    assert capsys.readouterr().err == "\r 10%\x1b[A\n"


@pytest.mark.parametrize("text", ["\x1b[A\x1b[A", "\r", "\rforged"], ids=ascii)
def test_a_name_that_is_printed_alone_moves_nothing(text, capsys):
    """Only progress bars may move, and they are on stderr."""
    with safe_output():
        print("name:", text)
    assert not UNSAFE.search(capsys.readouterr().out)


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "ascii", "utf-8", "gbk"])
def test_a_terminal_of_any_encoding_shows_any_text(encoding, monkeypatch):
    """What it lacks is escaped as in JSON; before, one letter of an answer ended the command."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    value = {"text": f"é {GOOD}"}
    with safe_output():
        print(json.dumps(value, ensure_ascii=False))
    stream.flush()
    printed = stream.buffer.getvalue().decode(encoding)
    assert json.loads(printed) == value
    assert ("\\u4e2d" in printed) == (encoding not in ("utf-8", "gbk")) and ("é" in printed) == (encoding != "ascii")


def test_the_traceback_of_a_logged_error_is_escaped(capsys):
    logger, handler = logging.getLogger("llm_jepa.tests.printing"), logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    try:
        with safe_output():
            try:
                raise ValueError("\x1b[2J 中文")
            except ValueError:
                logger.warning("failed", exc_info=True)
    finally:
        logger.removeHandler(handler)
    errors = capsys.readouterr().err
    assert "\\x1b[2J 中文" in errors and "\x1b" not in errors and "Traceback" in errors


def test_escaping_twice_is_escaping_once():
    for bad in [*BAD, GOOD]:
        assert escaped(escaped(bad)) == escaped(bad) and shown(shown(bad)) == shown(bad)
    assert escaped(GOOD) == GOOD


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&- <&-"])
def test_a_command_with_closed_streams_runs(closed, tmp_path):
    """Started so by a service or by cron. The exit code is that of the command."""
    command = shlex.join([sys.executable, "-c", "from llm_jepa.cli import command; command()", "train"])
    for word, code in (("--help", 0), (str(tmp_path / "nothing.yaml"), 2), (f"--launch=cpu {tmp_path}/no.yaml", 2)):
        done = subprocess.run(["sh", "-c", f"{command} {word} {closed}"], capture_output=True, text=True)
        assert done.returncode == code, (word, done)
        assert "Traceback" not in done.stderr and "NoneType" not in done.stderr
