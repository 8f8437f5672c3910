"""The command `llm-jepa watch`: its arguments, its output files and the terminal. The loop is in `watch`."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from ..core.errors import UserError
from ..core.files import write_whole
from ..stream.decoder import Caption
from ..stream.frames import Limits, source_name
from ..stream.opening import open_frames
from .watch import MIN_DURATION, WatchResult, default_fps, to_json, to_srt, watch
from .watch_page import Timeline, clock, one_line, write_report

if TYPE_CHECKING:  # they import torch, and `llm-jepa --help` should not
    from .inference import VLJEPA

_ENDLESS = Limits(max_frames=None, max_seconds=None)  # nothing here grows with the stream but the list of captions

DESCRIPTION = """\
Caption a video or a camera: every window is embedded, text is decoded once a scene.

  llm-jepa watch MODEL talk.mp4 --srt talk.srt --report talk.html
  llm-jepa watch MODEL webcam:0 --query "What is the person doing?" --provisional
  llm-jepa watch MODEL rtsp://camera/stream --labels "a person,a car,nobody" --jsonl events.jsonl

Ctrl-C ends the stream, not the program: the last scene gets its caption, the files are closed, and the exit code is 0.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments and the help text of `llm-jepa watch`."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", metavar="MODEL", help="model folder or Hub id of a VL-JEPA")
    parser.add_argument(
        "source", metavar="SOURCE", help="video file, - (standard input), URL, webcam:0, lavfi:testsrc=rate=8"
    )
    parser.add_argument("--query", help='what is asked (default: the model\'s own; "" asks nothing)')
    words = parser.add_mutually_exclusive_group()
    words.add_argument("--labels", metavar="A,B,C", help="say the nearest of these texts; needs no y_decoder")
    words.add_argument("--memory", metavar="FILE", help="the same with one text per line of a file")

    timing = parser.add_argument_group("windows")
    timing.add_argument("--stride", type=_positive, default=0.5, metavar="S", help="seconds between two (default: 0.5)")
    timing.add_argument(
        "--fps", type=_positive, metavar="N", help="frames a second in a window (default: as many as make it last 2 s)"
    )
    timing.add_argument("--max-seconds", "--max_seconds", type=_positive, metavar="S", help="stop there")
    timing.add_argument(
        "--live", action="store_true", help="drop frames that come too fast (always so for cameras and rtsp)"
    )

    scenes = parser.add_argument_group("scenes")
    level = scenes.add_mutually_exclusive_group()
    level.add_argument(
        "--sensitivity", type=_positive, default=1.0, metavar="X",
        help="2 cuts at half the change, 0.5 at twice (default: 1, calibrated to the stream's noise)",
    )  # fmt: skip
    level.add_argument(
        "--threshold", type=_not_negative, metavar="T", help="a fixed Ward gain to cut at, instead of calibration"
    )
    scenes.add_argument(
        "--min-duration",
        "--min_duration",
        type=_not_negative,
        metavar="S",
        help="seconds of a scene (default: three quarters of a window)",
    )
    scenes.add_argument(
        "--provisional", action="store_true", help="caption a scene after 1 s, marked ~, and again when it is over"
    )

    output = parser.add_argument_group("output", "Captions are printed as they come. Files must not exist yet.")
    output.add_argument("--jsonl", metavar="FILE", help="one event a line, written at once")
    output.add_argument("--srt", metavar="FILE", help="final captions as subtitles, at the end")
    output.add_argument("--report", metavar="FILE", help="one HTML page with film, curve and captions, at the end")


def run(options: argparse.Namespace) -> int:
    """`llm-jepa watch`. 0 at the end of the stream and after Ctrl-C.

    Raises UserError; for a stream that broke off, after its captions are written.
    """
    _check_outputs(options)
    texts = _texts(options)
    source = options.source
    if "://" not in source and not source.startswith("webcam:") and source != "-" and not Path(source).is_fifo():
        open_frames(source).close()  # its errors first: loading a model takes longer
    model = _load(options.model, texts)
    num_frames = model.model.config.num_frames
    fps = options.fps or default_fps(num_frames, options.stride)
    query = model.model.config.default_query if options.query is None else options.query
    min_duration_s = MIN_DURATION * num_frames / fps if options.min_duration is None else options.min_duration
    name = one_line(source_name(source))
    header = {
        "model": options.model, "source": name, "query": query, "num_frames": num_frames, "fps": fps,
        "stride_s": options.stride, "threshold": options.threshold, "sensitivity": options.sensitivity,
        "min_duration_s": min_duration_s, "provisional": options.provisional,
    }  # fmt: skip
    timeline = Timeline() if options.report else None
    captions: list[Caption] = []
    printer = _Printer(sys.stdout)
    result: WatchResult | None = None
    events: TextIO | None = None

    def leave() -> None:  # on every way out: an hour of captions survives a second Ctrl-C
        if result is None and not captions:
            if events is not None:
                Path(options.jsonl).unlink()  # nothing came of it, so the name is free again
        elif options.srt:
            write_whole(options.srt, to_srt(captions))

    with contextlib.ExitStack() as stack:
        frames = stack.enter_context(open_frames(source, fps=fps, live=options.live or None, limits=_ENDLESS))
        stack.callback(leave)
        if options.jsonl:
            events = stack.enter_context(open(options.jsonl, "x", encoding="ascii"))
        _write_line(events, json.dumps({"header": header}))

        def on_caption(caption: Caption) -> None:
            captions.append(caption)
            _write_line(events, to_json(caption, query))
            printer.caption(caption)

        result = watch(
            model,
            frames,
            query=query,
            stride_s=options.stride,
            fps=fps,
            threshold=options.threshold,
            sensitivity=options.sensitivity,
            min_duration_s=min_duration_s,
            provisional=options.provisional,
            max_seconds=options.max_seconds,
            on_caption=on_caption,
            timeline=timeline,
        )
        summary = {
            "num_windows": result.num_windows, "num_decodes": result.num_decodes, "seconds": round(result.seconds, 3),
            "lost": dict(result.lost), "interrupted": result.interrupted,
            "error": None if result.error is None else str(result.error),
        }  # fmt: skip
        _write_line(events, json.dumps({"summary": summary}))
    if timeline is not None:
        write_report(
            options.report,
            source=name,
            query=query,
            captions=result.captions,
            timeline=timeline,
            num_windows=result.num_windows,
            num_decodes=result.num_decodes,
            seconds=result.seconds,
            details=result.details,
        )
    printer.line(result.summary)
    if result.error is not None:
        raise result.error
    return 0


class _Printer:
    """Captions on a terminal or in a pipe. On a terminal a provisional one is overwritten by what comes next."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._on_terminal = stream, stream.isatty()

    def caption(self, caption: Caption) -> None:
        score = "" if caption.score is None else f"   ({caption.score:.2f})"
        line = f"{clock(caption.start_s)}-{clock(caption.end_s)}  {one_line(caption.text)}{score}"
        if caption.final:
            self.line(line)
        elif self._on_terminal:  # cut to the width: what wraps cannot be overwritten
            self._write(f"\r\x1b[K~{line}"[: 4 + shutil.get_terminal_size().columns - 1])
        else:
            self._write(f"~{line}\n")

    def line(self, text: str) -> None:
        self._write(("\r\x1b[K" if self._on_terminal else "") + text + "\n")

    def _write(self, text: str) -> None:
        encoding = self._stream.encoding or "utf-8"
        self._stream.write(text.encode(encoding, "replace").decode(encoding))  # no stream dies of an accent
        self._stream.flush()


def _write_line(file: TextIO | None, line: str) -> None:
    if file is not None:
        file.write(line + "\n")
        file.flush()


def _load(source: str, texts: list[str] | None) -> VLJEPA:
    """The model, with the given texts in place of its y_decoder. Raises UserError without either."""
    from .inference import VLJEPA
    from .y_decoder import MemoryProjection, YDecoder, fingerprint

    model = VLJEPA.from_pretrained(source)
    if texts is not None:
        memory = MemoryProjection(model.embed_texts(texts).cpu(), tuple(texts))
        return VLJEPA(model.model, model.processor, y_decoder=YDecoder(fingerprint(model.model), memory))
    try:
        _ = model.y_decoder
    except UserError as error:
        raise UserError(f"{error} To choose among texts of yours, give --labels or --memory.") from None
    return model


def _texts(options: argparse.Namespace) -> list[str] | None:
    """--labels or the lines of --memory, each once; None without either."""
    if options.labels is None and options.memory is None:
        return None
    if options.labels is not None:
        given, where = options.labels.split(","), "--labels"
    else:
        where = f"--memory {options.memory}"
        try:
            given = Path(options.memory).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{where} cannot be read ({error}); give a UTF-8 file with one text per line.") from None
    texts = list(dict.fromkeys(text.strip() for text in given if text.strip()))
    if not texts:
        raise UserError(f"{where} has no text; give one or more.")
    return texts


def _check_outputs(options: argparse.Namespace) -> None:
    given = {name: Path(path) for name in ("jsonl", "srt", "report") if (path := getattr(options, name))}
    for name, path in given.items():
        if path.exists():
            raise UserError(f"--{name} {path} exists; name a new file.")
        if not path.absolute().parent.is_dir():
            raise UserError(f"No folder for --{name} {path}; make it first.")
    if len({path.resolve() for path in given.values()}) < len(given):
        raise UserError("--jsonl, --srt and --report must be different files.")


def _positive(text: str) -> float:
    return _number(text, lambda value: value > 0, "> 0")


def _not_negative(text: str) -> float:
    return _number(text, lambda value: value >= 0, ">= 0")


def _number(text: str, fits: Callable[[float], bool], wanted: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and fits(value)):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number {wanted}")
    return value
