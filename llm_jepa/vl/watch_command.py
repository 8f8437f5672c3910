"""`llm-jepa watch`: its arguments, the terminal and the output files. `watch` is the loop behind it."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ..core.errors import UserError
from ..core.files import write_whole
from ..core.options import number, plain_text
from ..core.printing import escaped, raw
from ..core.row_files import text_lines
from ..stream.decoder import Caption
from ..stream.frames import Limits, source_name
from ..stream.opening import is_image, open_frames
from .watch import Watcher, WatchResult, WatchSettings, to_json, to_srt
from .watch_page import COSINE, PROBABILITY, Timeline, clock, film_link, film_name, one_line, write_report

if TYPE_CHECKING:  # they import torch, and `llm-jepa --help` should not
    from .inference import VLJEPA

_ENDLESS = Limits(max_frames=None, max_seconds=None)  # only the list of captions grows with the stream
_SHOWN_LABELS = 100

DESCRIPTION = """\
Caption a video or a camera. Every window is embedded; text is decoded once a scene.

  llm-jepa watch MODEL talk.mp4 --srt talk.srt --report talk.html
  llm-jepa watch MODEL webcam:0 --query "What is the person doing?" --provisional
  llm-jepa watch MODEL rtsp://camera/stream --labels "a person,a car,nobody" --jsonl events.jsonl

Ctrl-C, SIGTERM, and SIGUSR1 end the stream: the last scene gets its caption, all files are completed, and the exit code
is 0. A second one ends the command at once.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments and the help text of `llm-jepa watch`."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", metavar="MODEL", help="model folder or Hub id of a VL-JEPA")
    parser.add_argument(
        "source", metavar="SOURCE", help="video file, - (standard input), URL, webcam:0, lavfi:testsrc=rate=8"
    )
    parser.add_argument("--query", type=plain_text, help='the question (default: the model\'s own; "" for none)')
    words = parser.add_mutually_exclusive_group()
    words.add_argument(
        "--labels", type=plain_text, metavar="A,B,C", help="caption with the nearest of these texts; needs no y_decoder"
    )
    words.add_argument("--memory", metavar="FILE", help="the same, with a file of one text per line")

    timing = parser.add_argument_group("windows")
    timing.add_argument(
        "--stride",
        type=number(0.001, 86_400),
        default=0.5,
        metavar="S",
        help="seconds between two windows (default: 0.5)",
    )
    timing.add_argument(
        "--fps", type=number(0.001, 1000), metavar="N", help="frames a second in a window (default: a window lasts 2 s)"
    )
    timing.add_argument(
        "--max-seconds",
        "--max_seconds",
        type=number(above=True),
        metavar="S",
        help="stop after so many seconds of the stream",
    )
    timing.add_argument(
        "--live", action="store_true", help="drop frames that come too fast (always on for cameras and rtsp)"
    )

    scenes = parser.add_argument_group("scenes")
    level = scenes.add_mutually_exclusive_group()
    level.add_argument(
        "--sensitivity", type=number(above=True), default=1.0, metavar="X",
        help="2 cuts at half the change, 0.5 at twice the change (default: 1, calibrated to the stream's noise)",
    )  # fmt: skip
    level.add_argument(
        "--threshold", type=number(), metavar="T", help="a fixed Ward gain to cut at, instead of calibration"
    )
    scenes.add_argument(
        "--min-duration",
        "--min_duration",
        type=number(),
        metavar="S",
        help="shortest scene in seconds (default: three quarters of a window)",
    )
    scenes.add_argument(
        "--provisional", action="store_true", help="also caption a scene after its first second, marked ~"
    )

    output = parser.add_argument_group("output", "Captions are printed at once. Files must not exist yet.")
    output.add_argument("--jsonl", metavar="FILE", help="one event per line, written at once")
    output.add_argument("--srt", metavar="FILE", help="final captions as subtitles, at the end")
    output.add_argument(
        "--report", metavar="FILE", help="one HTML page with pictures, a curve and captions, at the end"
    )


def run(options: argparse.Namespace) -> int:
    """`llm-jepa watch`. 0 at the end of the stream and after a signal.

    Raises UserError; if the stream breaks off, after its captions are written.
    """
    _check_outputs(options)
    texts = _texts(options)
    if _can_be_opened_twice(options.source):
        open_frames(options.source).close()  # report its errors first, because loading a model takes longer
    model = _load(options.model, texts)
    settings = WatchSettings.resolve(
        model, query=options.query, stride_s=options.stride, fps=options.fps, threshold=options.threshold,
        sensitivity=options.sensitivity, min_duration_s=options.min_duration, provisional=options.provisional,
        max_seconds=options.max_seconds,
    )  # fmt: skip
    name = one_line(source_name(options.source))
    timeline = Timeline() if options.report else None
    started = datetime.now().astimezone()
    live = True if options.live else None  # None: live if it is a camera or a live stream
    with (
        open_frames(options.source, fps=settings.fps, live=live, limits=_ENDLESS) as frames,
        _Outputs(options.jsonl, options.srt, settings) as outputs,
    ):
        outputs.header(options.model, name)
        watcher = Watcher(model, settings, on_caption=outputs.caption, timeline=timeline)
        result = watcher.watch(frames)
        outputs.summary(result)
    if timeline is not None:
        film, no_film = _film(options)
        write_report(
            options.report,
            source=film_name(options.source),
            query=settings.query,
            captions=result.captions,
            timeline=timeline,
            num_windows=result.num_windows,
            num_decodes=result.num_decodes,
            seconds=result.seconds,
            details=result.details,
            film=film,
            no_film=no_film,
            scale=COSINE if model.y_decoder.decoder is None else PROBABILITY,
            table=_table(options, settings, texts, started),
        )
    outputs.printer.line(result.summary)
    if result.error is not None:
        raise result.error
    return 0


def _can_be_opened_twice(source: str) -> bool:
    """Whether opening it to look for errors costs nothing: a file or a test pattern."""
    if "://" in source or source.startswith("webcam:") or source == "-":
        return False
    return not Path(source).is_fifo()


def _film(options: argparse.Namespace) -> tuple[str | None, str]:
    """The film's address relative to the report, or None and why the report cannot play it."""
    if not _can_be_opened_twice(options.source) or not Path(options.source).is_file():
        return None, "The film does not play here: it was not a file."
    if is_image(options.source):
        return None, "This was one picture, not a film."
    link = film_link(options.report, options.source)
    if link is None:
        return None, "The film does not play here: it and this page have no folder in common."
    return link, ""


def _table(
    options: argparse.Namespace, settings: WatchSettings, texts: list[str] | None, started: datetime
) -> list[tuple[str, list[str]]]:
    """What the report says about the run. Of files and folders only the names."""
    model = Path(options.model)
    level = f"sensitivity {settings.sensitivity:g}, calibrated to the noise of the stream"
    if settings.threshold is not None:
        level = f"threshold {settings.threshold:g}"
    window_s = settings.num_frames / settings.fps
    rows = [
        ("model", [model.resolve().name if model.is_dir() else options.model]),
        ("date", [f"{started:%Y-%m-%d %H:%M %z}"]),
        ("windows", [f"{settings.num_frames} frames in {window_s:g} s, one every {settings.stride_s:g} s"]),
        ("scenes", [f"{level}; shortest {settings.min_duration_s:g} s"]),
    ]
    if settings.max_seconds is not None:
        rows.append(("stopped after", [f"{settings.max_seconds:g} s of the stream"]))
    if texts is None:
        rows.append(("captions", ["the model's own y_decoder"]))
    else:
        more = len(texts) - _SHOWN_LABELS
        shown = texts[:_SHOWN_LABELS] + ([f"and {more} more"] if more > 0 else [])
        rows.append((f"nearest of {len(texts)} labels", shown))
    return rows


class _Outputs:
    """The terminal, --jsonl and --srt: each caption is shown and written at once, the subtitles on every way out.

    An hour of captions survives a second signal. If a run ends without a caption and without a result, its --jsonl file
    is removed, so that the name is free again.
    """

    def __init__(self, jsonl: str | None, srt: str | None, settings: WatchSettings) -> None:
        self.printer = _Printer(raw(sys.stdout))
        self._jsonl, self._srt, self._settings = jsonl, srt, settings
        self._captions: list[Caption] = []
        self._events: TextIO | None = None
        self._complete = False

    def __enter__(self) -> _Outputs:
        if self._jsonl:
            self._events = open(self._jsonl, "x", encoding="ascii")
        return self

    def __exit__(self, *_: object) -> None:
        worth_keeping = self._complete or self._captions
        if worth_keeping and self._srt:
            write_whole(self._srt, to_srt(self._captions))
        if self._events is not None:
            self._events.close()
            if not worth_keeping:
                Path(self._events.name).unlink()

    def header(self, model: str, source: str) -> None:
        settings = self._settings
        header = {
            "model": model, "source": source, "query": settings.query, "num_frames": settings.num_frames,
            "fps": settings.fps, "stride_s": settings.stride_s, "threshold": settings.threshold,
            "sensitivity": settings.sensitivity, "min_duration_s": settings.min_duration_s,
            "provisional": settings.provisional,
        }  # fmt: skip
        self._write({"header": header})

    def caption(self, caption: Caption) -> None:
        self._captions.append(caption)
        self._write_line(to_json(caption, self._settings.query))
        self.printer.caption(caption)

    def summary(self, result: WatchResult) -> None:
        self._complete = True
        error = None if result.error is None else str(result.error)
        summary = {
            "num_windows": result.num_windows, "num_decodes": result.num_decodes, "seconds": round(result.seconds, 3),
            "lost": dict(result.lost), "interrupted": result.interrupted, "error": error,
        }  # fmt: skip
        self._write({"summary": summary})

    def _write(self, event: dict[str, Any]) -> None:
        self._write_line(json.dumps(event))

    def _write_line(self, line: str) -> None:
        if self._events is not None:
            self._events.write(line + "\n")
            self._events.flush()


class _Printer:
    """Captions on a terminal or in a pipe. On a terminal the next line overwrites a provisional caption."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._on_terminal = stream, stream.isatty()

    def caption(self, caption: Caption) -> None:
        score = "" if caption.score is None else f"   ({caption.score:.2f})"
        line = f"{clock(caption.start_s)}-{clock(caption.end_s)}  {one_line(caption.text)}{score}"
        if caption.final:
            self.line(line)
        elif self._on_terminal:  # cut to the width, because a line that wraps cannot be overwritten
            self._write(f"\r\x1b[K~{line}"[: 4 + shutil.get_terminal_size().columns - 1])
        else:
            self._write(f"~{line}\n")

    def line(self, text: str) -> None:
        self._write(("\r\x1b[K" if self._on_terminal else "") + escaped(text) + "\n")

    def _write(self, text: str) -> None:
        encoding = self._stream.encoding or "utf-8"
        self._stream.write(text.encode(encoding, "replace").decode(encoding))  # an accent must not end the stream
        self._stream.flush()


def _load(source: str, texts: list[str] | None) -> VLJEPA:
    """The model; `texts`, if any, replace its y_decoder. Raises UserError if there is neither."""
    from .inference import VLJEPA
    from .y_decoder import MemoryProjection, YDecoder, fingerprint

    model = VLJEPA.from_pretrained(source)
    if texts is not None:
        memory = MemoryProjection(model.embed_texts(texts).cpu(), tuple(texts))
        return VLJEPA(model.model, model.processor, y_decoder=YDecoder(fingerprint(model.model), memory))
    try:
        _ = model.y_decoder
    except UserError as error:
        raise UserError(f"{error} To caption with your own texts, give --labels or --memory.") from None
    return model


def _texts(options: argparse.Namespace) -> list[str] | None:
    """--labels or the lines of --memory, each once; None without either."""
    if options.labels is not None:
        option, lines = "--labels", options.labels.split(",")
    elif options.memory is not None:
        option = f"--memory {options.memory}"
        try:
            lines = list(text_lines(options.memory))
        except UserError as error:
            raise UserError(f"{option} cannot be read: {error} It is one text a line, in UTF-8.") from None
    else:
        return None
    texts = list(dict.fromkeys(text.strip() for text in lines if text.strip()))
    if not texts:
        raise UserError(f"{option} has no text; give one or more.")
    return texts


def _check_outputs(options: argparse.Namespace) -> None:
    paths = []
    for name in ("jsonl", "srt", "report"):
        if not getattr(options, name):
            continue
        path = Path(getattr(options, name))
        if path.exists():
            raise UserError(f"--{name} {path} exists; name a new file.")
        if not path.absolute().parent.is_dir():
            raise UserError(f"No folder for --{name} {path}; make it first.")
        paths.append(path.resolve())
    if len(set(paths)) < len(paths):
        raise UserError("--jsonl, --srt and --report must be different files.")
