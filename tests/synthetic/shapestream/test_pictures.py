"""The pixels show what the labels say; videos are read back."""

from __future__ import annotations

import numpy as np
import pytest

from llm_jepa.core.errors import UserError
from llm_jepa.synthetic.shapestream import COLOURS, FPS, KINDS, NUM_FRAMES, OUTLINE, Event, clip, stream, write_video
from llm_jepa.synthetic.shapestream.pictures import noise_table

from .helpers import AXIS, assert_shows, changed_colours, planned


@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_shows_what_its_event_says(kind):
    for seed in range(12):
        sample = clip(seed, kind=kind, split=("train", "test", "compose")[seed % 3])
        start, end = round(sample.event.start_s * FPS), round(sample.event.end_s * FPS)
        if kind == "idle":
            assert (start, end) == (0, NUM_FRAMES)
            start = 1
        assert start >= 1 and end - start >= 10 and end <= NUM_FRAMES
        assert_shows(sample.event, sample.frames[start - 1], sample.frames[start:end])
        assert_shows(Event("idle", 0, 0), sample.frames[0], sample.frames[:start])
        assert_shows(Event("idle", 0, 0), sample.frames[end - 1], sample.frames[end - 1 :])
        first_change = changed_colours(sample.frames[start - 1], sample.frames[start : start + 2])
        if kind in AXIS or kind in ("spin", "hit", "pass"):
            assert first_change == {sample.event.actor[0]}, "the event starts where it says"


@pytest.mark.parametrize("gap", [(4, 12), (1, 3)])
def test_a_stream_shows_what_its_events_say(gap):
    shown = set()
    for seed in range(3):
        sample = stream(seed, seconds=100, gap=gap, split=("train", "test")[seed % 2])
        for event in sample.events:
            start, end = round(event.start_s * FPS), round(event.end_s * FPS)
            if event.kind == "flash" and end - start < 12:
                continue  # some phases last a single frame there; geometry is checked below
            shown.add(event.kind)
            assert_shows(event, sample.frames[max(start - 1, 0)], sample.frames[start:end])
    assert len(shown) > 8


def test_noise_is_independent_gaussian_of_3_levels():
    frames = clip(2, kind="idle").frames.astype(float)
    noise = (frames - frames.mean(axis=0)) * np.sqrt(16 / 15)
    assert noise.std() == pytest.approx(3, abs=0.1) and abs(noise.mean()) < 0.01
    assert (np.abs(noise) > 6).mean() == pytest.approx(0.045, abs=0.015)  # beyond 2 sigma
    for one, other in ((noise[0], noise[1]), (noise[:, 1:], noise[:, :-1]), (noise[..., 0], noise[..., 1])):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.1
    other = clip(3, kind="idle").frames.astype(float)
    assert abs(np.corrcoef(noise[0].ravel(), (other - other.mean(axis=0))[0].ravel())[0, 1]) < 0.05


def test_noise_cannot_wrap_around():
    """Levels are added modulo 256: 0 - 1 would be white."""
    levels = {level for colour in (*COLOURS.values(), OUTLINE) for level in colour}
    noise = noise_table().astype(np.int8).astype(int)
    assert min(levels) + noise.min() >= 0 and max(levels) + noise.max() <= 255
    grounds = [planned(seed, "train", "idle")[2] for seed in range(200)]
    assert np.min(grounds) >= 222 and np.max(grounds) + noise.max() <= 255


# --- Videos -----------------------------------------------------------------------------------------------------------


def test_a_video_is_read_back_frame_by_frame(tmp_path):
    av = pytest.importorskip("av")
    sample = clip(0, kind="left")
    write_video(tmp_path / "clip.mp4", sample.frames, FPS)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        video = container.streams.video[0]
        read = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video)]
        assert video.average_rate == FPS
    assert [time for time, _ in read] == [frame / FPS for frame in range(NUM_FRAMES)]
    assert np.abs(np.stack([frame for _, frame in read]).astype(float) - sample.frames).mean() < 8
    assert_shows(sample.event, read[0][1], np.stack([frame for _, frame in read]))
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize("shape", [(0, 64, 64, 3), (4, 64, 64), (4, 63, 64, 3), (4, 64, 65, 3)])
def test_frames_that_are_no_video(shape, tmp_path):
    pytest.importorskip("av")
    with pytest.raises(UserError):
        write_video(tmp_path / "clip.mp4", np.zeros(shape, np.uint8), FPS)
    assert not list(tmp_path.iterdir())
