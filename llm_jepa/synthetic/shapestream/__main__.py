"""Write samples of ShapeStream: a contact sheet of clips, streams to look at, clips to train on.

python -m llm_jepa.synthetic.shapestream --out DIR [--clips N --streams N --train N --test N]
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import ArgumentParser
from ...core.files import write_whole, written_whole
from ...core.options import whole
from .events import NUM_FRAMES
from .pictures import write_video
from .samples import Clip, clip, stream, write_clips
from .texts import KINDS, captions

if TYPE_CHECKING:
    from PIL import Image

# Of the contact sheet, in pixels.
TEXT_WIDTH, LINE_HEIGHT, MARGIN = 400, 14, 4
ZOOM = 2


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exits with code 2 and one line for a value that cannot work."""
    parser = ArgumentParser(
        prog="python -m llm_jepa.synthetic.shapestream", description="Write samples of ShapeStream."
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write to; made if missing")
    parser.add_argument(
        "--clips", type=whole(0), default=26, metavar="N", help="clips on the sheet (default: %(default)s)"
    )
    parser.add_argument(
        "--streams", type=whole(0), default=1, metavar="N", help="streams of 120 s (default: %(default)s)"
    )
    parser.add_argument(
        "--train", type=whole(0), default=0, metavar="N", help="training clips, as mp4, and train.jsonl"
    )
    parser.add_argument("--test", type=whole(0), default=0, metavar="N", help="test clips, as mp4, and test.jsonl")
    try:
        options = parser.parse_args(argv)
        folder = Path(options.out)
        folder.mkdir(parents=True, exist_ok=True)
        if options.clips > 0:
            _write_sheet(folder / "clips.png", options.clips)
        if options.streams > 0:
            _write_streams(folder, options.streams)
        for split, count in (("train", options.train), ("test", options.test)):
            if count > 0:
                print(f"{write_clips(folder, count, split=split)}: {count} clips")
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    return 0


def _write_streams(folder: Path, count: int) -> None:
    """stream_0.mp4 ... and events.json, which names the events of each."""
    events: dict[str, list[dict[str, Any]]] = {}
    for seed in range(count):
        sample, video = stream(seed), folder / f"stream_{seed}.mp4"
        write_video(video, sample.frames, sample.fps)
        events[video.name] = [{**asdict(event), "caption": captions(event)[0]} for event in sample.events]
        print(f"{video}: {len(sample.events)} events")
    write_whole(folder / "events.json", json.dumps(events, indent=1) + "\n")


def _write_sheet(path: Path, count: int) -> None:
    sheet = contact_sheet([clip(index, kind=KINDS[index % len(KINDS)]) for index in range(count)])
    with written_whole(path) as temporary:
        sheet.save(temporary)
    print(f"{path}: {count} clips")


def contact_sheet(clips: Sequence[Clip]) -> Image.Image:
    """A picture with a row for each clip: its texts, then every second frame, twice as large."""
    from PIL import Image, ImageDraw

    side = clips[0].frames.shape[1] * ZOOM
    texts = [_lines_of(sample) for sample in clips]
    heights = [max(side, LINE_HEIGHT * len(lines)) + 2 * MARGIN for lines in texts]
    sheet = Image.new("RGB", (TEXT_WIDTH + (side + 2) * NUM_FRAMES // 2, sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    top = 0
    for sample, lines, height in zip(clips, texts, heights, strict=True):
        for row, (text, colour) in enumerate(lines):
            draw.text((6, top + MARGIN + row * LINE_HEIGHT), text, fill=colour)
        for column, frame in enumerate(sample.frames[1::2]):
            picture = Image.fromarray(frame).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(picture, (TEXT_WIDTH + column * (side + 2), top + MARGIN))
        top += height
    return sheet


def _lines_of(sample: Clip) -> list[tuple[str, str]]:
    """(text, colour) of each line beside the frames."""
    event = sample.event
    held_out = captions(event, wordings="held_out")
    return [
        (f"{event.kind}  {event.start_s:.2f} to {event.end_s:.2f} s", "blue"),
        (captions(event)[0], "black"),
        (f"{held_out[-1]}  (held-out wording)", "black"),
        *((f"{question.question}  {question.answer}", "dimgray") for question in sample.questions),
    ]


if __name__ == "__main__":
    raise SystemExit(main())
