"""Claims about `llm-jepa watch` and its report: what is decoded, what is written, and what ends a stream."""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import io
import json
import math
import re
import signal
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertConfig, LlamaConfig, ViTConfig, ViTImageProcessorPil, set_seed

from llm_jepa.core.errors import UserError
from llm_jepa.lm.from_scratch import train_tokenizer
from llm_jepa.stream.decoder import Caption, SelectiveDecoder
from llm_jepa.stream.frames import Frame, source_name, windows
from llm_jepa.stream.opening import open_frames
from llm_jepa.stream.segments import WardSegmenter
from llm_jepa.vl import watch_command
from llm_jepa.vl import watch_page as report
from llm_jepa.vl.inference import VLJEPA
from llm_jepa.vl.modeling import VLJEPAModel
from llm_jepa.vl.processing import VLJEPAProcessor
from llm_jepa.vl.watch import MAX_FAILURES, default_fps, to_json, to_srt, watch
from llm_jepa.vl.watch_command import add_arguments, run
from llm_jepa.vl.watch_page import Timeline, clock, one_line, write_report
from llm_jepa.vl.y_decoder import MemoryProjection, YDecoder, fingerprint

av = pytest.importorskip("av")
TEXTS = ("a red room", "a green room", "a blue room", "nothing at all")
FPS = 2.0  # of the tiny model: 4 frames are a window of 2 s


def build(num_frames=4):
    set_seed(0)
    tokenizer = train_tokenizer([{"prompt": text, "completion": text} for text in TEXTS], 320)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    model = VLJEPAModel.from_parts(
        ViTConfig(image_size=32, patch_size=16, initializer_range=0.1, **small),
        LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, initializer_range=0.1, **small),
        BertConfig(vocab_size=len(tokenizer), initializer_range=0.1, **small),
        shared_dim=24,
        num_frames=num_frames,
    )
    frames = ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return model, VLJEPAProcessor(frames, tokenizer, tokenizer, num_frames=num_frames)


def with_texts(model, processor, texts=TEXTS):
    use = VLJEPA(model, processor)
    memory = MemoryProjection(use.embed_texts(texts), tuple(texts))
    return VLJEPA(model, processor, y_decoder=YDecoder(fingerprint(model), memory))


@pytest.fixture(autouse=True)
def ctrl_c_interrupts():
    """As at a terminal. Parallel test workers and jobs in the background start with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def model():
    return with_texts(*build())


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """The same without a y_decoder."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    VLJEPA(model.model, model.processor).save_pretrained(path)
    return path


def picture(index, rng, size=32):
    """Room `index`, with the noise of a camera."""
    colour = np.random.default_rng(100 + index).integers(30, 226, (4, 4, 3)).repeat(size // 4, 0).repeat(size // 4, 1)
    return np.clip(colour + rng.normal(0, 2, colour.shape), 0, 255).astype(np.uint8)


def rooms(seconds, *, every_s=7.0, rate=FPS, size=32) -> Iterator[Frame]:
    """A new room every `every_s` seconds; the noise of a frame does not depend on how many follow."""
    for k in range(round(seconds * rate)):
        yield Frame(k / rate, picture(int(k / rate // every_s), np.random.default_rng(k), size))


def video(path, seconds, *, every_s=7.0, size=64, rate=4, **options):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height = stream.width = size
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "10", **options}
        for frame in rooms(seconds, every_s=every_s, rate=rate, size=size):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.image, "rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """24 s, a new room at 7, 14 and 21 s."""
    return video(tmp_path_factory.mktemp("film") / "rooms.mp4", 24)


def command(*words):
    parser = argparse.ArgumentParser(prog="llm-jepa watch", allow_abbrev=False)
    add_arguments(parser)
    return run(parser.parse_args([str(word) for word in words]))


def events(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return lines[0]["header"], [line for line in lines if "text" in line], lines[-1].get("summary")


def calls(monkeypatch, owner, name):
    """The arguments of every call of a method, which still does what it did."""
    seen, original = [], getattr(owner, name)

    def spy(self, *args, **options):
        seen.append(args)
        return original(self, *args, **options)

    monkeypatch.setattr(owner, name, spy)
    return seen


# -- the loop --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("provisional", [False, True])
def test_watch_is_windows_embed_segment_decode(model, provisional):
    """The same four steps by hand. 2 s of window by 0.5 s of stride: a block of 4. Only the ends differ: a stream's
    first scene starts with its first window (0 s, not its centre 0.75), its last ends with the last one (29.5)."""
    segmenter = WardSegmenter(block=4, min_duration_s=1.5)
    by_hand = SelectiveDecoder(
        lambda window: model.embed([window.frames], "why?")[0].numpy(),
        lambda z: tuple(model.decode(torch.tensor(z)[None])[0]),
        segmenter,
        provisional_after_s=1.0 if provisional else None,
    )
    expected = []
    for window in windows(rooms(30), num_frames=4, stride_s=0.5, fps=2.0):
        expected += by_hand.step(window, window.start_s, window.end_s)
    expected += by_hand.finish()
    heard = []
    result = watch(model, rooms(30), query="why?", provisional=provisional, on_caption=heard.append)
    assert [(c.text, c.score, c.final, c.emitted_s) for c in heard] == [
        (c.text, c.score, c.final, c.emitted_s) for c in expected
    ]
    assert [c.start_s for c in heard if c.start_s] == [c.start_s for c in expected if c.start_s != 0.75]
    assert [c.end_s for c in heard[:-1]] == [c.end_s for c in expected[:-1]]
    assert heard[0].start_s == 0 and heard[-1].end_s == 29.5 != expected[-1].end_s
    assert result.captions == tuple(c for c in heard if c.final)
    assert (result.num_windows, result.num_decodes) == (by_hand.num_windows, by_hand.num_decodes)
    assert result.query == "why?" and result.seconds == 29.5 and not result.lost


def test_a_scene_is_found_for_every_room_and_they_cover_the_stream(model):
    captions = watch(model, rooms(35)).captions
    assert [c.start_s for c in captions[1:]] == pytest.approx([7, 14, 21, 28], abs=0.8)
    assert [c.end_s for c in captions[:-1]] == [c.start_s for c in captions[1:]]
    assert (captions[0].start_s, captions[-1].end_s) == (0, 34.5)


@pytest.mark.parametrize("provisional", [False, True])
def test_a_still_video_decodes_once(model, provisional):
    still = np.full((32, 32, 3), 90, np.uint8)
    result = watch(model, (Frame(k / 2, still) for k in range(80)), provisional=provisional)
    assert (result.num_decodes, result.num_windows, len(result.captions)) == (1, 77, 1)


def test_what_was_said_does_not_depend_on_what_follows(model):
    """20 s and 40 s of one stream: all events of the first but those of its end, in order, open the second."""
    short, long = [], []
    watch(model, rooms(20), provisional=True, on_caption=short.append)
    watch(model, rooms(40), provisional=True, on_caption=long.append)
    assert len([c for c in short if c.final]) >= 3
    assert short[:-1] == long[: len(short) - 1]
    last_s = short[-1].emitted_s
    assert [c for c in long if c.emitted_s <= last_s] == short[:-1], "nothing more was known at that time"


def test_the_options_reach_the_segmenter_the_windows_and_the_query(model, monkeypatch):
    seen = calls(monkeypatch, VLJEPA, "embed")
    assert len(watch(model, rooms(30), threshold=1e9).captions) == 1
    assert seen[0][1] == "What happens in the video?" and len(seen) == 57
    assert len(watch(model, rooms(30), min_duration_s=12).captions) < len(watch(model, rooms(30)).captions)
    assert len(watch(model, rooms(30), sensitivity=1e-9).captions) == 1
    seen.clear()
    result = watch(model, rooms(30), stride_s=1.5, query="")
    assert result.query == "" and seen[0][1] == "" and len(seen) == 20 - 1
    seen.clear()
    fast = watch(model, rooms(10, rate=8), fps=4, max_seconds=6)
    assert fast.captions[-1].end_s == 5.75 and fast.seconds == 5.875, "of frames 0 .. 47 every second one is used"
    assert (seen[0][0][0] == np.stack([f.image for f in rooms(1, rate=8)][:8:2])).all()


def test_a_block_of_windows_is_one_window_long(model, monkeypatch):
    """A scene lasts 3/4 of a window or more."""
    blocks = []
    original = WardSegmenter.__init__
    monkeypatch.setattr(
        WardSegmenter,
        "__init__",
        lambda self, **o: (blocks.append((o["block"], o["min_duration_s"])), original(self, **o))[1],
    )
    for stride_s, fps in ((0.5, None), (0.25, 2), (2, None), (0.5, 8)):
        watch(model, rooms(3), stride_s=stride_s, fps=fps)
    assert blocks == [(4, 1.5), (8, 1.5), (3, 1.5), (3, 0.375)], "2 s / 0.5 s; at least 3"


@pytest.mark.parametrize(("num_frames", "stride_s", "fps"), [(16, 0.5, 8), (4, 0.5, 2), (1, 0.5, 2), (2, 0.25, 4)])
def test_a_window_lasts_two_seconds_if_it_has_frames_enough(num_frames, stride_s, fps):
    assert default_fps(num_frames, stride_s) == fps


def test_a_model_of_single_images_and_a_stream_of_one_image_work():
    images = with_texts(*build(num_frames=1))
    result = watch(images, rooms(14))
    assert (result.num_windows, len(result.captions)) == (28, 2)
    one = watch(images, rooms(0.5))
    assert [(c.start_s, c.end_s) for c in one.captions] == [(0, 0.5)]


def test_without_y_decoder_it_fails_before_the_first_frame(model):
    def frames():
        raise AssertionError("a frame was asked for")
        yield

    with pytest.raises(UserError, match="no y_decoder"):
        watch(VLJEPA(model.model, model.processor), frames())


@pytest.mark.parametrize("wrong", [{"stride_s": 0}, {"fps": math.nan}, {"max_seconds": -1}, {"sensitivity": 0}])
def test_numbers_out_of_range_are_refused(model, wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        watch(model, rooms(3), **wrong)


# -- what must not end a stream --------------------------------------------------------------------------------------


def test_odd_frames_are_resized_or_left_out_and_counted(model):
    """Four frames of another size; one float, one grey, one without time, one from the far future, one that is late."""
    good = list(rooms(30))
    mixed = list(good)
    for k in range(10, 14):
        mixed[k] = Frame(good[k].time_s, good[k].image.repeat(2, 0).repeat(3, 1))
    mixed[20] = Frame(good[20].time_s, good[20].image.astype(np.float32))
    mixed[22] = Frame(good[22].time_s, good[22].image[..., 0])
    mixed[24] = Frame(math.nan, good[24].image)
    mixed[26] = Frame(1e308, good[26].image)
    mixed.insert(30, good[5])
    with pytest.warns(UserWarning, match="4 frames resized, 5 frames skipped"):
        result = watch(model, mixed)
    assert result.lost == {"frames resized": 4, "frames skipped": 5}
    assert [c.start_s for c in result.captions[1:]] == pytest.approx([7, 14, 21], abs=1.1)
    assert "4 frames resized" in result.summary


def test_a_window_that_cannot_be_embedded_is_left_out(model, monkeypatch):
    original, count = VLJEPA.embed, iter(range(1000))

    def embed(self, *args, **options):
        index = next(count)
        if index in (8, 9):
            raise RuntimeError("out of memory")
        z = original(self, *args, **options)
        return z * math.nan if index == 20 else z

    monkeypatch.setattr(VLJEPA, "embed", embed)
    with pytest.warns(UserWarning, match="3 windows skipped"):
        result = watch(model, rooms(20))
    assert result.lost == {"windows skipped": 3} and result.num_windows == 37 - 3 and result.error is None
    assert len(result.captions) == 3


def test_a_model_that_refuses_every_window_ends_it(model, monkeypatch):
    """The first refusal is the answer; later ones only if there are MAX_FAILURES in a row, and captions stay."""
    original = VLJEPA.embed
    working = [0]

    def embed(self, *args, **options):
        working[0] -= 1
        if working[0] < 0:
            raise ValueError("image size")
        return original(self, *args, **options)

    monkeypatch.setattr(VLJEPA, "embed", embed)
    with pytest.raises(UserError, match="does not take 4 frames of 32x32: image size"):
        watch(model, rooms(20))
    working[0] = 20
    with pytest.warns(UserWarning, match=f"{MAX_FAILURES} windows skipped"):
        result = watch(model, rooms(30))
    assert str(result.error) == "image size" and result.num_windows == 20 and result.captions[-1].final


def test_a_stream_that_breaks_off_keeps_what_it_said(model):
    def frames():
        yield from rooms(20)
        raise UserError("the sender is gone")

    result = watch(model, frames())
    assert str(result.error) == "the sender is gone" and not result.interrupted
    assert result.captions == watch(model, rooms(20)).captions
    with pytest.raises(UserError, match="the sender is gone"):
        watch(model, (frame for frame in frames() if frame.time_s < 0))
    with pytest.raises(UserError, match="No frames"):
        watch(model, [])


def test_damage_in_a_video_costs_frames_there_and_no_more(folder, tmp_path, capsys):
    """Every frame is a key frame; five of them, at 10 s, are overwritten."""
    path = video(tmp_path / "damaged.mp4", 24, g="1", bf="0")
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    for at, size in packets[40:45]:
        data[at : at + size] = b"\xff" * size
    path.write_bytes(data)
    with pytest.warns(UserWarning, match="5 corrupt"):
        assert command(folder, path, "--labels", "a,b", "--jsonl", tmp_path / "o.jsonl") == 0
    _, found, summary = events(tmp_path / "o.jsonl")
    assert [e["start_s"] for e in found[1:]] == pytest.approx([7, 14, 21], abs=1.1)
    assert summary["lost"] == {"corrupt": 5} and ", 5 corrupt" in capsys.readouterr().out


# -- Ctrl-C ----------------------------------------------------------------------------------------------------------


def test_ctrl_c_in_the_middle_of_a_window_waits_for_its_caption(model, monkeypatch):
    """The signal comes while the window is embedded that closes the first scene, whose caption must not be lost."""
    complete = []
    watch(model, rooms(20), on_caption=complete.append)
    closing = round((complete[0].emitted_s - 1.5) / 0.5)  # window k ends at 1.5 + k/2 s
    original, count = VLJEPA.embed, iter(range(1000))

    def embed(self, *args, **options):
        if next(count) == closing:
            signal.raise_signal(signal.SIGINT)
        return original(self, *args, **options)

    monkeypatch.setattr(VLJEPA, "embed", embed)
    before = signal.getsignal(signal.SIGINT)
    result = watch(model, rooms(20))
    assert result.interrupted and result.num_windows == closing + 1
    assert result.captions[0] == complete[0] and len(result.captions) == 2
    assert result.captions[1].end_s == complete[0].emitted_s, "the open scene is captioned, too"
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_ends_the_wait_for_a_frame(model):
    class Stalled:
        def __init__(self):
            self.frames = rooms(20)
            self.asked = 0

        def __iter__(self):
            return self

        def __next__(self):
            self.asked += 1
            if self.asked <= 30:
                return next(self.frames)
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("the wait went on")

    stalled = Stalled()
    result = watch(model, stalled)
    assert result.interrupted and result.error is None and result.seconds == 14.5 and stalled.asked == 31
    assert result.captions[-1].end_s == 14.5
    stalled.asked = 31
    nothing = watch(model, stalled)
    assert nothing.interrupted and nothing.summary.startswith("decoded 0 of 0 windows")


class Interrupting:
    """Frames, then a Ctrl-C that a library turned into nothing: the wait goes on, and so do the frames."""

    def __init__(self, count):
        self.count = count

    def __iter__(self):
        for k, frame in enumerate(rooms(40)):
            if k == self.count:
                with contextlib.suppress(KeyboardInterrupt):
                    signal.raise_signal(signal.SIGINT)
            yield frame


def test_a_ctrl_c_that_a_library_swallows_counts(model):
    """As FFmpeg does with exceptions in its reads."""
    result = watch(model, Interrupting(20))
    assert result.interrupted and result.seconds <= 10.5


def test_after_ctrl_c_the_files_are_whole_and_the_exit_code_is_0(folder, film, tmp_path, monkeypatch, capsys):
    count = iter(range(1000))
    original = VLJEPA.embed

    def embed(self, *args, **options):
        if next(count) == 30:
            signal.raise_signal(signal.SIGINT)
        return original(self, *args, **options)

    monkeypatch.setattr(VLJEPA, "embed", embed)
    out = [tmp_path / f"o.{kind}" for kind in ("jsonl", "srt", "html")]
    words = ["--labels", "a,b", "--jsonl", out[0], "--srt", out[1], "--report", out[2]]
    assert command(folder, film, *words) == 0
    assert out[0].read_text().endswith("\n")
    _, found, summary = events(out[0])
    assert summary["interrupted"] is True and summary["num_windows"] == 31
    assert [(s, e) for s, e, _ in srt(out[1])] == [
        (round(1000 * e["start_s"]), round(1000 * e["end_s"])) for e in found
    ]
    assert "decoded 3 of 31 windows" in capsys.readouterr().out and len(found) == 3
    assert "decoded 3 of 31 windows" in out[2].read_text()


def test_a_second_ctrl_c_is_obeyed_at_once_and_the_captions_are_kept(folder, film, tmp_path, monkeypatch):
    count = iter(range(1000))
    original = VLJEPA.embed

    def embed(self, *args, **options):
        if next(count) == 30:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return original(self, *args, **options)

    monkeypatch.setattr(VLJEPA, "embed", embed)
    with pytest.raises(KeyboardInterrupt):
        command(folder, film, "--labels", "a,b", "--jsonl", tmp_path / "o.jsonl", "--srt", tmp_path / "o.srt")
    assert len(srt(tmp_path / "o.srt")) == 2
    lines = (tmp_path / "o.jsonl").read_text().splitlines()
    assert [bool(json.loads(line).get("final")) for line in lines] == [False, True, True]


# -- the command -----------------------------------------------------------------------------------------------------


def srt(path):
    """[(start ms, end ms, text)], every line accounted for."""
    blocks = path.read_text(encoding="utf-8").removesuffix("\n").split("\n\n")
    found = []
    for number, block in enumerate(blocks, start=1):
        index, times, text = block.split("\n")
        match = re.fullmatch(r"(\d\d):(\d\d):(\d\d),(\d{3}) --> (\d\d):(\d\d):(\d\d),(\d{3})", times)
        assert index == str(number) and match and text
        h, m, s, ms, h2, m2, s2, ms2 = map(int, match.groups())
        found.append(((h * 60 + m) * 60_000 + s * 1000 + ms, (h2 * 60 + m2) * 60_000 + s2 * 1000 + ms2, text))
    assert all(a < b for a, b, _ in found) and all(a[1] <= b[0] for a, b in zip(found, found[1:], strict=False))
    return found


@pytest.mark.parametrize("provisional", [False, True])
def test_screen_events_subtitles_and_summary_agree_with_the_calls(
    folder, film, tmp_path, monkeypatch, capsys, provisional
):
    embedded, decoded = calls(monkeypatch, VLJEPA, "embed"), calls(monkeypatch, YDecoder, "decode")
    out = [tmp_path / f"o.{kind}" for kind in ("jsonl", "srt", "html")]
    words = ["--labels", "a red room, a green room", "--jsonl", out[0], "--srt", out[1], "--report", out[2]]
    assert command(folder, film, *words, *(["--provisional"] if provisional else [])) == 0
    header, found, summary = events(out[0])
    assert header["fps"] == 2 and header["num_frames"] == 4 and header["source"] == str(film)
    final = [event for event in found if event["final"]]
    assert summary["num_windows"] == len(embedded) == 45 and summary["num_decodes"] == len(decoded)
    assert len(final) == 4 <= len(decoded) <= len(found) == (8 if provisional else 4)
    assert set(found[0]) == {"start_s", "end_s", "emitted_s", "text", "score", "final", "query"}
    assert {event["text"] for event in found} <= {"a red room", "a green room"}
    assert found[0]["query"] == "What happens in the video?"
    assert [(round(1000 * e["start_s"]), round(1000 * e["end_s"]), e["text"]) for e in final] == srt(out[1])
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines == [
        f"{'' if e['final'] else '~'}{clock(e['start_s'])}-{clock(e['end_s'])}  {e['text']}   ({e['score']:.2f})"
        for e in found
    ]
    assert re.fullmatch(rf"decoded {len(decoded)} of 45 windows, 23\.5 s of video, \d+\.\d windows/s", last)
    assert f"decoded {len(decoded)} of 45 windows" in out[2].read_text()


def test_an_event_is_on_disk_when_it_is_said(folder, film, tmp_path, monkeypatch):
    path, seen = tmp_path / "o.jsonl", []
    original = VLJEPA.embed
    monkeypatch.setattr(
        VLJEPA, "embed", lambda self, *a, **o: (seen.append(path.read_text()), original(self, *a, **o))[1]
    )
    command(folder, film, "--labels", "a,b", "--jsonl", path)
    assert "header" in seen[0] and all(text.endswith("\n") for text in seen)
    assert seen[-1].count("\n") == 3 and "summary" not in seen[-1], "the header and the two scenes known to be over"
    assert all(path.read_text().startswith(text) for text in seen)


def test_the_nearest_of_the_given_texts_is_said(folder, film, model, tmp_path, capsys):
    """--labels and --memory with the same texts, blanks and repetitions aside, say the same; as `nearest` would."""
    (tmp_path / "texts.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(["", *TEXTS, TEXTS[0], "  "]).encode())
    command(folder, film, "--labels", " ,".join([*TEXTS, ""]))
    labels = capsys.readouterr().out.splitlines()[:-1]
    command(folder, film, "--memory", tmp_path / "texts.txt")
    assert labels == capsys.readouterr().out.splitlines()[:-1]
    with open_frames(film, fps=FPS) as frames:
        expected = watch(model, frames).captions
    assert [line.split("  ")[1] for line in labels] == [caption.text for caption in expected]


def test_a_model_with_a_y_decoder_needs_no_texts_and_one_without_says_what_to_give(
    model, folder, film, tmp_path, capsys
):
    model.save_pretrained(tmp_path / "with")
    try:
        assert command(tmp_path / "with", film, "--max-seconds", 5) == 0
    finally:
        model.model.config._name_or_path = ""
    assert capsys.readouterr().out.splitlines()[-1].startswith("decoded 1 of 7 windows, 4.5 s of video")
    with pytest.raises(UserError, match="no y_decoder.*--labels or --memory"):
        command(folder, film)


@pytest.mark.parametrize("kind", ["jsonl", "srt", "report"])
def test_existing_files_are_refused_before_anything_is_loaded(film, tmp_path, kind):
    (tmp_path / "there").write_text("mine")
    with pytest.raises(UserError, match=f"--{kind} .*exists"):
        command("no-such-model", "no-such-source", f"--{kind}", tmp_path / "there")
    assert (tmp_path / "there").read_text() == "mine"
    with pytest.raises(UserError, match="No folder"):
        command("no-such-model", film, f"--{kind}", tmp_path / "nowhere" / "o")
    with pytest.raises(UserError, match="different files"):
        other = "srt" if kind != "srt" else "report"
        command("no-such-model", film, f"--{kind}", tmp_path / "o", f"--{other}", tmp_path / "o")


@pytest.mark.parametrize("source", ["missing.mp4", "text.mp4", "concat:a|b", "ftp://x/y", "lavfi:movie=x", ""])
def test_a_bad_source_is_one_line_and_leaves_no_files(folder, tmp_path, source):
    (tmp_path / "text.mp4").write_text("this is no video")
    given = tmp_path / source if source.endswith(".mp4") else source
    with pytest.raises(UserError) as raised:
        command(folder, given, "--labels", "a,b", "--jsonl", tmp_path / "o.jsonl", "--srt", tmp_path / "o.srt")
    assert "\n" not in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.mp4"]


def test_a_bad_file_is_told_before_the_model_is_loaded(tmp_path):
    with pytest.raises(UserError, match="missing.mp4"):
        command("no-such-model", tmp_path / "missing.mp4")


def test_a_run_that_says_nothing_leaves_no_files(folder, film, tmp_path):
    """A query beyond the model's limit is refused at the first window; the names are free for the next try."""
    files = ["--jsonl", tmp_path / "o.jsonl", "--srt", tmp_path / "o.srt", "--report", tmp_path / "o.html"]
    with pytest.raises(UserError, match="limit"):
        command(folder, film, "--labels", "a,b", "--query", "why " * 600, *files)
    assert not list(tmp_path.iterdir())


def test_a_file_that_breaks_off_is_captioned_so_far_and_then_an_error(folder, tmp_path, capsys):
    """Raw H.264 of 64 x 64, then of 128 x 128, which no `FrameSource` delivers."""
    parts = [video(tmp_path / f"{size}.h264", 12, size=size, rate=25).read_bytes() for size in (64, 128)]
    (tmp_path / "a.h264").write_bytes(b"".join(parts))
    with pytest.raises(UserError, match="128x128 after 64x64"):
        command(
            folder, tmp_path / "a.h264", "--labels", "a,b", "--srt", tmp_path / "o.srt", "--jsonl", tmp_path / "o.jsonl"
        )
    assert len(srt(tmp_path / "o.srt")) == 2
    assert "128x128" in events(tmp_path / "o.jsonl")[2]["error"]
    assert "decoded 2 of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--labels", " , "], "--labels has no text"),
        (["--memory", "latin.txt"], "--memory latin.txt cannot be read"),
        (["--memory", "missing.txt"], "--memory missing.txt cannot be read"),
    ],
)
def test_texts_that_are_none_are_refused(words, message, film, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("latin.txt").write_bytes("Käse".encode("latin-1"))
    with pytest.raises(UserError, match=message):
        command("no-such-model", film, *words)


@pytest.mark.parametrize(
    "words",
    [["--fps", "0"], ["--stride", "nan"], ["--threshold", "-1"], ["--min-duration", "inf"], ["--max-seconds", "x"],
     ["--threshold", "1", "--sensitivity", "2"], ["--labels", "a", "--memory", "b"]],
)  # fmt: skip
def test_arguments_that_cannot_work_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        command("model", "source", *words)
    assert "error: argument" in capsys.readouterr().err


class Terminal(io.StringIO):
    encoding = "ascii"

    def isatty(self):
        return True


def test_a_terminal_overwrites_what_is_provisional_and_obeys_no_caption(monkeypatch):
    """The final line starts where the provisional one did; escapes are gone, and so is what ASCII cannot show."""
    monkeypatch.setenv("COLUMNS", "30")
    terminal = Terminal()
    printer = watch_command._Printer(terminal)
    printer.caption(Caption(0, 2.25, 3, "x" * 99, None, False))
    printer.caption(Caption(0, 5, 6, "red\x1b]0;own\x07\n\u202eé", 0.5, True))
    first, second = terminal.getvalue().split("\r\x1b[K")[1:]
    assert first == "~00:00.0-00:02.2  " + "x" * 11 and len(first) == 29
    assert second == "00:00.0-00:05.0  red ]0;own ?   (0.50)\n"


def test_a_login_in_a_url_is_not_written():
    assert source_name("rtsp://me:p@ss@cam:554/a@b") == "rtsp://***@cam:554/a@b"
    assert source_name("https://host/x@y.mp4") == "https://host/x@y.mp4"
    assert source_name("a@b.mp4") == "a@b.mp4"


def test_times_are_shown_as_a_clock():
    assert [clock(s) for s in (0, 12.5, 59.96, 61, 3599.97, 3661.25)] == [
        "00:00.0", "00:12.5", "01:00.0", "01:01.0", "1:00:00.0", "1:01:01.2",
    ]  # fmt: skip


def test_subtitles_and_events_are_valid_whatever_is_said():
    captions = [
        Caption(0, 1.5, 2, "a\n\n2\n00:00:01,000 --> 00:00:09,000\nb", None, True),
        Caption(0.2, 1.5, 2, "provisional", None, False),
        Caption(1.5, 1.5, 2, "\u2028", math.nan, True),
        Caption(3599.9996, 90_000.25, 4, "c\ud800", 0.123456, True),
    ]
    assert to_srt(captions) == (
        "1\n00:00:00,000 --> 00:00:01,500\na 2 00:00:01,000 -> 00:00:09,000 b\n\n"
        "2\n00:00:01,500 --> 00:00:01,501\n(no text)\n\n"
        "3\n01:00:00,000 --> 25:00:00,250\nc\n"
    )
    lines = [to_json(caption, "q\u2028?") for caption in captions]
    assert all(len(line.splitlines()) == 1 for line in lines)
    assert json.loads(lines[2])["score"] is None and json.loads(lines[2])["text"] == "\u2028"
    assert json.loads(lines[3]) == {
        "start_s": 3600.0, "end_s": 90000.25, "emitted_s": 4, "text": "c\ud800", "score": 0.1235, "final": True,
        "query": "q\u2028?",
    }  # fmt: skip


# -- the report ------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag, css=None):
        return [attrs for name, attrs in self.tags if name == tag and css in (None, attrs.get("class"))]


def page(tmp_path, *, source="film.mp4", query="why?", captions=(), timeline=None, **options):
    numbers = {"num_windows": 40, "num_decodes": 4, "seconds": 20.0, **options}
    path = tmp_path / "report.html"
    write_report(path, source=source, query=query, captions=captions, timeline=timeline or Timeline(), **numbers)
    return path.read_text(encoding="utf-8")


EVIL = "</script></style></title><script>alert(1)</script><img src=x onerror=alert(1)>\" onclick='alert(2)' \u202e&amp;"


def test_no_text_of_a_stranger_becomes_markup(tmp_path):
    captions = [Caption(0, 5, 6, EVIL, 0.5, True), Caption(5, 9, 9, "plain", None, True)]
    harmless = Page(
        page(tmp_path, source="a", query="b", captions=[Caption(0, 5, 6, "c", 0.5, True), captions[1]], details="d")
    )
    text = page(tmp_path, source=EVIL, query=EVIL, captions=captions, details=EVIL)
    found = Page(text)
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in harmless.tags]
    assert [set(attrs) for _, attrs in found.tags] == [set(attrs) for _, attrs in harmless.tags]
    assert "\u202e" not in text
    assert sum(one_line(EVIL) in word for word in found.words) == 6, "title, heading, query, details, block, list"
    assert one_line(EVIL) in found.all("button", "block")[0]["title"]


def test_a_page_needs_nothing_from_outside_and_runs_its_own_script_only(model, tmp_path):
    timeline = Timeline()
    result = watch(model, rooms(30), timeline=timeline)
    text = page(tmp_path, captions=result.captions, timeline=timeline)
    found = Page(text)
    for _, attrs in found.tags:
        assert not {"href", "srcset", "data", "action"} & set(attrs)
        assert attrs.get("src", "data:").startswith("data:")
    assert "http:" not in text and "https:" not in text and "url(" not in text and "@import" not in text
    policy = next(attrs["content"] for attrs in found.all("meta") if "http-equiv" in attrs)
    script = re.search(r"<script>(.*?)</script>", text, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_film_curve_cuts_and_captions_share_one_axis(model, tmp_path):
    timeline = Timeline()
    frames = [Frame(100 + frame.time_s, frame.image) for frame in rooms(30)]  # a stream whose time starts at 100 s
    result = watch(model, frames, timeline=timeline)
    found = Page(page(tmp_path, captions=result.captions, timeline=timeline, seconds=result.seconds))
    assert result.captions[0].start_s == 100 and len(result.captions) == 4
    lane = found.all("div", "lane")[0]
    assert (float(lane["data-start"]), float(lane["data-seconds"])) == (100, 29.5)
    assert [float(attrs["data-t"]) for attrs in found.all("img") if "data-t" in attrs] == [100 + s for s in range(30)]
    starts = [float(attrs["data-start"]) for attrs in found.all("button", "block")]
    assert starts == pytest.approx([c.start_s for c in result.captions])
    cuts = [float(attrs["x1"]) for attrs in found.all("line", "cut")]
    assert cuts == pytest.approx([c.start_s - 100 for c in result.captions[1:]])
    for attrs, caption in zip(found.all("button", "block"), result.captions, strict=True):
        style = dict(part.split(":") for part in attrs["style"].split(";"))
        assert float(style["--at"]) == pytest.approx(caption.start_s - 100, abs=1e-3)
        assert float(style["--for"]) == pytest.approx(caption.end_s - caption.start_s, abs=1e-3)
    points = [tuple(map(float, p.split(","))) for p in found.all("polyline")[0]["points"].split()]
    assert len(points) == len(timeline.distances) == result.num_windows - 1
    assert points[0][0] == pytest.approx(1.0), "between the centres 0.75 and 1.25 of the first two windows"
    highest = min(points, key=lambda point: point[1])
    assert highest[1] == pytest.approx(6) and min(abs(highest[0] - cut) for cut in (7, 14, 21, 28)) <= 1


def test_the_curve_is_the_distance_of_neighbouring_windows():
    timeline = Timeline()
    for t, z in ((1, [0, 0]), (2, [3, 4]), (4, [3, 5])):
        timeline.add_window(t, np.array(z, np.float32))
    assert timeline.distances == [(1.5, 5.0), (3.0, 1.0)]


def test_a_day_takes_no_more_room_than_an_hour(tmp_path):
    """86 400 frames and 172 800 windows; the one jump among them is still in the curve, as high as it was."""
    timeline, image = Timeline(), picture(1, np.random.default_rng(0), 64)
    z, jump = np.zeros(2, np.float32), np.array([0.75, 0], np.float32)
    for k in range(86_400):
        timeline.add_frame(Frame(k, image))
        assert len(timeline.thumbnails) <= report.MAX_THUMBNAILS
    for k in range(172_800):
        timeline.add_window(k / 2, z if k < 100_001 else jump)
        assert len(timeline.distances) < report.MAX_POINTS
    assert max(timeline.distances, key=lambda point: point[1]) == (50_000.25, 0.75)
    times = [t for t, _ in timeline.thumbnails]
    assert len(times) > report.MAX_THUMBNAILS / 2 and set(np.diff(times)) == {256}, "a second, doubled eight times"
    captions = [Caption(30 * k, 30 * k + 30, 30 * k + 31, f"scene {k}", 0.5, True) for k in range(2880)]
    assert len(page(tmp_path, captions=captions, timeline=timeline, seconds=86_400)) < 4_000_000


def test_thumbnails_are_small_pictures_of_the_frames(model):
    timeline = Timeline()
    for k, (height, width) in enumerate([(90, 320), (32, 32), (900, 30)]):
        timeline.add_frame(Frame(k, np.full((height, width, 3), (200, 40, 90), np.uint8)))
    images = [Image.open(io.BytesIO(jpeg)) for _, jpeg in timeline.thumbnails]
    assert [(image.format, image.size) for image in images] == [
        ("JPEG", (160, 45)), ("JPEG", (160, 160)), ("JPEG", (160, 320)),
    ]  # fmt: skip
    assert np.abs(np.asarray(images[0], int) - (200, 40, 90)).max() <= 4


def test_provisional_captions_are_left_out_and_one_text_has_one_colour(tmp_path):
    captions = [
        Caption(0, 3, 4, "one", 0.5, False), Caption(0, 5, 6, "one", 0.5, True), Caption(5, 9, 9, "two", None, True),
        Caption(9, 20, 20, "one", 0.25, True),
    ]  # fmt: skip
    found = Page(page(tmp_path, captions=captions))
    hues = [re.search("--h:(\\d+)", attrs["style"])[1] for attrs in found.all("button", "block")]
    assert hues[0] == hues[2] != hues[1] and len(hues) == 3 == len(found.all("li"))
    assert "decoded 4 of 40 windows: 10.0 times fewer than one per window" in found.words
    assert {"0.25", "00:09.0–00:20.0"} <= set(found.words)


def test_a_page_without_anything_is_still_a_page(tmp_path):
    text = page(tmp_path, query="", num_windows=0, num_decodes=0, seconds=0.0)
    assert "decoded 0 of 0 windows: nothing to decode" in text and "no query" in text
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"], "no temporary file stays"
