"""Claims about windows that share frames: the embeddings of `VLJEPA.embed`, and no frame is encoded twice."""

from __future__ import annotations

import pytest
import torch

from llm_jepa.stream.frames import windows
from llm_jepa.vl.inference import VLJEPA
from llm_jepa.vl.sliding import SlidingEncoder
from tests.vl import runs
from tests.vl.watch.rooms import rooms


def stream(seconds: float = 12, stride_s: float = 0.5, num_frames: int = 4):
    return list(windows(rooms(seconds, size=16), num_frames=num_frames, stride_s=stride_s, fps=2.0))


def a_model(x: str = "vit", **options) -> VLJEPA:
    return VLJEPA(*runs.parts(x, num_frames=4, **options))


@pytest.mark.parametrize("at_once", [1, 3, 8])
@pytest.mark.parametrize("x", [*runs.X_ENCODERS, "pooled"])
@pytest.mark.parametrize("query", [None, "", "what colour is it?"])
def test_they_are_the_embeddings_of_each_window_alone(x, query, at_once):
    """Visual tokens to the bit; the predictor sees a batch of another size."""
    model = a_model("vit", pool_frames=True) if x == "pooled" else a_model(x)
    film = stream()
    slides = SlidingEncoder(model, query)
    for start in range(0, len(film), at_once):
        batch = film[start : start + at_once]
        pixels = model.processor(videos=[window.frames for window in batch])["pixel_values_videos"]
        with torch.no_grad():
            alone = torch.cat([model.model.encode_frames(one[None]) for one in pixels])
        assert torch.equal(SlidingEncoder(model, query).features(batch), alone)
        torch.testing.assert_close(slides(batch), model.embed([w.frames for w in batch], query), atol=1e-6, rtol=0)


def test_a_frame_is_encoded_once():
    model = a_model()
    encoded = runs.count_calls(model.model.x_encoder)
    slides, film = SlidingEncoder(model), stream()
    for window in film:
        slides([window])
    assert len(film) == 21 and encoded == [4] + [1] * 20
    encoded.clear()
    slides = SlidingEncoder(model)
    slides(film[:8])
    slides(film[8:16])
    assert encoded == [11, 8]


def test_of_a_stream_that_goes_on_for_long_the_last_window_is_kept():
    slides = SlidingEncoder(a_model())
    for window in stream(30):
        slides([window])
        assert [image is kept for image, (kept, _) in zip(window.images, slides._kept, strict=True)] == [True] * 4


def test_an_encoder_over_time_is_given_whole_windows():
    model = a_model("vjepa2")
    encoded = runs.count_calls(model.model.x_encoder)
    slides, film = SlidingEncoder(model), stream(4)
    assert slides.at_once == 1
    for window in film:
        slides([window])
    assert encoded == [1] * len(film)
