"""Claims about captions of a stream: what is decoded, how often, when, and which stretch a caption is for."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jepa.stream.decoder import Caption, SelectiveDecoder
from llm_jepa.stream.segments import WardSegmenter
from tests.stream.streams import A, B, C, noisy, video


def decoder_of(calls=None, **options):
    def decode(embedding):
        if calls is not None:
            calls.append(embedding)
        return f"scene {int(np.argmax(embedding))}", float(np.max(embedding))

    return SelectiveDecoder(lambda window: window, decode, WardSegmenter(), **options)


def run(decoder, z):
    """2 s windows every 0.5 s: window i is i / 2 .. i / 2 + 2, its centre i / 2 + 1."""
    captions = [caption for i, row in enumerate(z) for caption in decoder.step(row, i / 2, i / 2 + 2)]
    return captions + decoder.finish()


def scenes(*lengths):
    rng = np.random.default_rng(0)
    return np.concatenate([noisy(rng, v, n, 0.05) for v, n in zip((A, B, C), lengths, strict=False)])


def test_a_still_scene_is_decoded_once_and_captioned_early_and_finally():
    calls = []
    decoder = decoder_of(calls)
    early, late = run(decoder, scenes(200))
    assert (early.start_s, early.end_s, early.emitted_s, early.final) == (1, 2, 3, False)  # 3 windows: 1 s of centres
    assert (late.start_s, late.end_s, late.emitted_s, late.final) == (1, 100.5, 101.5, True)
    assert early.text == late.text == "scene 0" and early.score == late.score == pytest.approx(1, abs=0.05)
    assert len(calls) == decoder.num_decodes == 1 and decoder.num_windows == 200


def test_without_provisional_captions_there_is_one_decode_per_segment():
    calls = []
    decoder = decoder_of(calls, provisional_after_s=None)
    z = scenes(20, 10, 20)
    captions = run(decoder, z)
    assert [(c.text, c.start_s, c.end_s, c.final) for c in captions] == [
        ("scene 0", 1, 10.75, True),
        ("scene 1", 10.75, 15.75, True),
        ("scene 2", 15.75, 25.5, True),
    ]
    assert [c.emitted_s for c in captions] == [13.5, 18.5, 26.5]  # the 4th window after each change ends there
    assert len(calls) == decoder.num_decodes == 3
    np.testing.assert_allclose(calls[0], z[1:19].mean(axis=0), atol=1e-6)
    assert run(decoder_of(provisional_after_s=None), z) == captions
    assert decoder.finish() == []


def test_a_provisional_caption_follows_the_cut_and_is_never_edited():
    """The second scene has 4 windows when it is known, 1.75 s from its edge: both captions come in one step."""
    decoder = decoder_of()
    steps = [decoder.step(row, i / 2, i / 2 + 2) for i, row in enumerate(scenes(20, 20))]
    assert [i for i, captions in enumerate(steps) if captions] == [2, 23]
    final, provisional = steps[23]
    assert (final.text, final.final, provisional.text, provisional.final) == ("scene 0", True, "scene 1", False)
    assert (provisional.start_s, provisional.end_s, provisional.emitted_s) == (10.75, 12.5, 13.5)
    with pytest.raises(AttributeError):
        final.text = "other"
    (last,) = decoder.finish()
    assert last.text == "scene 1" and last.final and decoder.num_decodes == 2


@pytest.mark.parametrize(("reuse", "decodes"), [(0.99, 1), (1.1, 2), (-1.0, 1)])
def test_the_provisional_text_is_kept_while_the_mean_points_the_same_way(reuse, decodes):
    decoder = decoder_of(reuse_cosine=reuse)
    run(decoder, scenes(50))
    assert decoder.num_decodes == decodes


def test_a_scene_that_drifts_away_is_decoded_again():
    """Nothing is cut, but the mean turns from A to about (A + 3 B) / 4: cosine 0.32 with what was said."""
    calls = []
    decoder = SelectiveDecoder(
        lambda w: w, lambda e: calls.append(e) or f"{np.argmax(e)}", WardSegmenter(threshold=1e9), reuse_cosine=0.99
    )
    early, late = run(decoder, np.stack([A] * 20 + [B] * 60))
    assert (early.text, late.text, early.score, late.score) == ("0", "1", None, None) and len(calls) == 2
    np.testing.assert_allclose(calls[1], (19 * A + 59 * B) / 78, atol=1e-7)


def test_a_provisional_text_is_not_carried_into_the_next_scene():
    """Reuse at any cosine: each scene still says its own first text."""
    captions = run(decoder_of(reuse_cosine=-1.0), scenes(20, 10, 20))
    assert [c.text for c in captions if c.final] == ["scene 0", "scene 1", "scene 2"]
    assert [c.text for c in captions if not c.final] == ["scene 0", "scene 1", "scene 2"]


def test_a_window_without_duration_is_refused_and_not_embedded():
    decoder = decoder_of()
    for end in (1.0, 0.5, math.nan):
        with pytest.raises(ValueError, match="no duration"):
            decoder.step(A, 1.0, end)
    assert decoder.num_windows == 0 and decoder.finish() == []
    with pytest.raises(ValueError, match="provisional_after_s"):
        decoder_of(provisional_after_s=-1.0)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 110))
def test_captions_do_not_depend_on_the_future(seed, known):
    z, times, _ = video(seed, seconds=60)
    other = z.copy()
    other[known:] = np.random.default_rng(seed + 1).standard_normal(other[known:].shape)
    captions = [
        [decoder.step(row, t - 1, t + 1) for row, t in zip(x, times, strict=True)][:known]
        for decoder, x in ((decoder_of(), z), (decoder_of(), other))
    ]
    assert captions[0] == captions[1]


@pytest.mark.parametrize("provisional_after_s", [None, 1.0])
def test_whole_windows_move_the_two_ends_of_the_stream_and_nothing_else(provisional_after_s):
    """The first scene starts with its first window (0 s, not its centre 1); the last ends with the last one (26.5)."""
    z = scenes(20, 10, 20)
    centres = run(decoder_of(provisional_after_s=provisional_after_s), z)
    whole = run(decoder_of(provisional_after_s=provisional_after_s, whole_windows=True), z)
    expected = [dataclasses.replace(c, start_s=0) if c.start_s == 1 else c for c in centres]
    expected[-1] = dataclasses.replace(expected[-1], end_s=26.5)
    assert whole == expected and centres[0].start_s == 1 and centres[-1].end_s == 25.5


def test_captions_are_frozen():
    caption = Caption(0, 1, 1, "a", None, True)
    with pytest.raises(AttributeError):
        caption.text = "b"
