"""Claims about cutting a stream of embeddings into scenes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_jepa.stream import segments as sd
from llm_jepa.stream.segments import (
    Segment,
    WardSegmenter,
    boundary_f1,
    segment_at,
    segment_offline,
    segment_uniform,
)
from tests.properties import examples
from tests.stream.streams import A, B, C, D, cuts, noisy, push_all, unit, video

# --- offline


def brute_force_ward(x, num_segments):
    parts = [[row] for row in x]
    while len(parts) > num_segments:
        gains = [
            len(a) * len(b) / (len(a) + len(b)) * np.square(np.mean(a, axis=0) - np.mean(b, axis=0)).sum()
            for a, b in zip(parts, parts[1:], strict=False)
        ]
        i = int(np.argmin(gains))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [len(part) for part in parts]


@examples(60)
@given(st.integers(1, 24), st.data())
def test_offline_merges_the_cheapest_neighbours(count, data):
    num_segments = data.draw(st.integers(1, count))
    x = np.random.default_rng(data.draw(st.integers(0, 10**6))).standard_normal((count, 3)) + 5
    segments = segment_offline(x, np.arange(count), num_segments=num_segments)
    assert [segment.num_windows for segment in segments] == brute_force_ward(x, num_segments)


@examples(60)
@given(st.integers(1, 24), st.data())
def test_offline_of_a_stream_that_runs_backwards_is_the_mirror_image(count, data):
    num_segments = data.draw(st.integers(1, count))
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    x, times = rng.standard_normal((count, 3)), np.cumsum(rng.uniform(0.1, 2, count))
    forwards = segment_offline(x, times, num_segments=num_segments)
    backwards = segment_offline(x[::-1], -times[::-1], num_segments=num_segments)[::-1]
    for one, other in zip(forwards, backwards, strict=True):
        assert (one.start_s, one.end_s, one.num_windows) == (-other.end_s, -other.start_s, other.num_windows)
        np.testing.assert_allclose(one.embedding, other.embedding, atol=1e-6)


def test_offline_survives_a_large_common_offset():
    """Embeddings of one space are alike: here 1e13 in common, differences of 1, known to 1e-3. Plain sums know 0.3."""
    offset = np.array([1e13, -1e13, 5e12])
    x = np.random.default_rng(0).standard_normal((200, 3)) + offset
    sizes = [[s.num_windows for s in segment_offline(z, np.arange(200), num_segments=50)] for z in (x, x - offset)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("num_segments", [1, 2, 7, 40, 120])
def test_offline_is_the_clustering_of_sklearn(num_segments):
    cluster = pytest.importorskip("sklearn.cluster")
    sparse = pytest.importorskip("scipy.sparse")
    x = np.cumsum(np.random.default_rng(num_segments).standard_normal((120, 8)), axis=0)
    chain = sparse.diags([np.ones(119), np.ones(119)], [-1, 1])
    labels = cluster.AgglomerativeClustering(n_clusters=num_segments, linkage="ward", connectivity=chain).fit(x).labels_
    expected = np.diff([0, *(np.flatnonzero(np.diff(labels)) + 1), 120])
    segments = segment_offline(x, np.arange(120), num_segments=num_segments)
    assert [segment.num_windows for segment in segments] == list(expected)


def test_offline_by_hand():
    """0 0 | 4 4 4 | 5: merging 4 4 4 with 5 costs 3/4, with 0 0 it costs 6/5 * 16. So 5 goes first, then 0 0."""
    x, times = np.array([[0.0], [0], [4], [4], [4], [5]]), np.array([0.0, 1, 2, 3, 4, 6])
    three, two = (segment_offline(x, times, num_segments=n) for n in (3, 2))
    assert [segment.num_windows for segment in three] == [2, 3, 1]
    assert [(segment.start_s, segment.end_s, segment.num_windows) for segment in two] == [(0, 1.5, 2), (1.5, 6, 4)]
    assert two[1].embedding == pytest.approx([17 / 4])
    assert two[1].midpoint_embedding == pytest.approx([4])  # middle at 3.75: the window at 4


STRATEGIES = {
    "offline": lambda x, t, n: segment_offline(x, t, num_segments=n),
    "uniform": lambda x, t, n: segment_uniform(x, t, num_segments=n),
    "at": lambda x, t, n: segment_at(x, t, boundaries_s=t[1:n]),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@examples(40)
@given(count=st.integers(1, 30), data=st.data())
def test_n_segments_cover_all_windows_without_a_gap(strategy, count, data):
    num_segments = data.draw(st.integers(1, count))
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    x, times = rng.standard_normal((count, 4)), np.cumsum(rng.uniform(0.1, 2, count))
    segments = STRATEGIES[strategy](x, times, num_segments)
    assert len(segments) == num_segments and segments[0].start_s == times[0] and segments[-1].end_s == times[-1]
    assert [segment.end_s for segment in segments[:-1]] == cuts(segments)
    first = 0
    for segment in segments:
        own = slice(first, first + segment.num_windows)
        first += segment.num_windows
        np.testing.assert_allclose(segment.embedding, x[own].mean(axis=0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(segment.core_embedding, inner(x[own]).mean(axis=0), rtol=1e-5, atol=1e-6)
        middle = (segment.start_s + segment.end_s) / 2
        nearest = x[own][np.abs(times[own] - middle).argmin()]
        np.testing.assert_array_equal(segment.midpoint_embedding, nearest.astype(np.float32))
        assert segment.start_s <= times[own][0] and times[own][-1] <= segment.end_s
    assert first == count


def test_uniform_and_oracle_by_hand():
    """8 windows in 3: 2, 3, 3. Boundaries of 7 at 2 and 4.5: the window at 2 belongs to what follows."""
    x, times = np.arange(8.0)[:, None], np.arange(8.0)
    assert [s.num_windows for s in segment_uniform(x, times, num_segments=3)] == [2, 3, 3]
    x, times = x[:7], times[:7]
    oracle = segment_at(x, times, boundaries_s=[2, 4.5])
    assert [s.num_windows for s in oracle] == [2, 3, 2] and cuts(oracle) == [1.5, 4.5]
    for empty in ([2.1, 2.9], [0.0], [7.0], [4.0, 2.0]):
        with pytest.raises(ValueError, match="has no window"):
            segment_at(x, times, boundaries_s=empty)


@pytest.mark.parametrize(
    ("x", "times", "n", "said"),
    [
        (np.ones((3, 2)), [0, 1, 2], 4, "num_segments=4 must be 1..3"),
        (np.ones((3, 2)), [0, 1, 2], 0, "num_segments=0"),
        (np.ones((3, 2)), [0, 1], 1, r"\(3, 2\) and times_s \(2,\)"),
        (np.ones((0, 2)), [], 1, "T >= 1"),
        (np.ones(3), [0, 1, 2], 1, "T, D"),
        (np.ones((3, 2)), [0, 1, 1], 1, "1.0 follows 1.0 at position 2"),
        (np.ones((3, 2)), [0, 2, 1], 1, "1.0 follows 2.0"),
        (np.full((3, 2), np.nan), [0, 1, 2], 1, "finite"),
        (np.ones((3, 2)), [0, 1, np.inf], 1, "finite"),
    ],
)
def test_offline_refuses_what_is_no_stream(x, times, n, said):
    for strategy in (segment_offline, segment_uniform):
        with pytest.raises(ValueError, match=said):
            strategy(x, times, num_segments=n)


# --- online


@examples(15)
@given(st.integers(0, 10**6), st.sampled_from([1e-6, 0.01, 0.1, 0.5]))
def test_a_still_scene_is_one_segment(seed, noise):
    z = noisy(np.random.default_rng(seed), A, 300, noise)
    (only,) = push_all(WardSegmenter(), z)
    assert only.num_windows == 300 and (only.start_s, only.end_s) == (0, 149.5)
    np.testing.assert_allclose(only.embedding, z.mean(axis=0), atol=1e-6)


@pytest.mark.parametrize("shared", [False, True])
def test_noise_is_cut_less_than_once_in_ten_minutes(shared):
    """10 streams of 5 minutes; `shared`: by windows that overlap four times, so that noise moves slowly."""
    found = 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        e = rng.standard_normal((603, 24))
        z = (e[:-3] + e[1:-2] + e[2:-1] + e[3:]) / 2 if shared else e[:600]
        found += len(cuts(push_all(WardSegmenter(), A[:24] * 20 + z)))
    assert found <= 5


def test_a_perfectly_still_scene_is_not_cut_by_float_rounding_but_by_the_first_change():
    rng = np.random.default_rng(0)
    still = (unit(rng.standard_normal(D))[None] * np.ones((200, 1))).astype(np.float32)
    jittered = still * (1 + 1e-7 * rng.integers(-1, 2, size=(200, 1)))
    for z in (still, np.zeros((200, D)), jittered):
        assert len(push_all(WardSegmenter(), z)) == 1
    changed = still.copy()
    changed[100:] = unit(still[0] + 0.1 * A)  # 0.01 * 4 windows, far above the rounding, far below a scene
    assert cuts(push_all(WardSegmenter(), changed)) == [49.75]


def test_rule_by_hand_with_a_given_threshold():
    """4 windows of A, then B: the gain of k windows of B is 4k / (4 + k) * 2 = 1.6, 2.67, 3.43, 4 for k = 1..4.

    The best split is always at the change, and k = block = 4 decides: cut iff 4 > threshold, 4 windows after it.
    """
    z = np.stack([A] * 4 + [B] * 4)
    segmenter = WardSegmenter(block=4, threshold=3.99, min_duration_s=0)
    closed = [segmenter.push(row, t) for t, row in enumerate(z)]
    assert closed[:7] == [None] * 7
    assert (closed[7].start_s, closed[7].end_s, closed[7].num_windows) == (0, 3.5, 4)
    np.testing.assert_array_equal(closed[7].embedding, A)
    assert (segmenter.open.start_s, segmenter.open.end_s, segmenter.open.num_windows) == (3.5, 7, 4)
    np.testing.assert_array_equal(segmenter.open.embedding, B)
    assert len(push_all(WardSegmenter(block=4, threshold=4.0, min_duration_s=0), z)) == 1


def by_definition(z, times, *, block, threshold, shortest):
    """(end, number of windows) of each segment, by the four conditions of the docstring over all windows so far."""
    z, found, first, opening, rising, start = np.asarray(z, float), [], 0, 0.0, 0.0, times[0]
    for now in range(1, len(z) + 1):
        best = None
        for split in range(max(first + 1, now - block), now):
            edge, head, tail = (times[split - 1] + times[split]) / 2, z[first:split], z[split:now]
            if edge - start < shortest - 1e-9:
                continue
            n, k = len(head), len(tail)
            a, b = head.mean(axis=0), tail.mean(axis=0)
            gain = n * k / (n + k) * np.square(b - a).sum()
            if best is None or gain > best[0] + 1e-12:
                best = gain, split, edge, head, tail
        if best is None:
            continue
        gain, split, edge, head, tail = best
        a, b = head.mean(axis=0), tail.mean(axis=0)
        scatter = sd.SCATTER * (np.square(head).sum(axis=1).mean() - np.square(a).sum())
        afterglow = sd.AFTERGLOW * opening * block / len(head)
        has_moved = sum((row - a) @ (b - a) >= np.square(b - a).sum() / 2 - 1e-12 for row in tail) * 2 > len(tail)
        if not (gain > max(scatter, afterglow, threshold) and has_moved):
            rising = 0.0
        elif len(tail) < block and gain >= rising:
            rising = gain
        else:
            found.append((edge, len(head)))
            first, opening, rising, start = split, gain, 0.0, edge
    return [*found, (times[-1], len(z) - first)]


@examples(100)
@given(
    block=st.integers(2, 6), threshold=st.sampled_from([0.0, 0.3, 1.0]), shortest=st.sampled_from([0.0, 1.0, 2.5]),
    seed=st.integers(0, 10**6), lengths=st.lists(st.integers(1, 9), min_size=1, max_size=10),
)  # fmt: skip
def test_every_cut_is_the_one_that_the_four_conditions_define(block, threshold, shortest, seed, lengths):
    """Scenes of any lengths, single outliers and slow drifts among them, against a plain search over all splits."""
    rng = np.random.default_rng(seed)
    z = np.concatenate([rng.standard_normal(3) + 0.2 * rng.standard_normal((n, 3)).cumsum(axis=0) for n in lengths])
    times = np.cumsum(rng.uniform(0.2, 1, len(z)))
    segmenter = WardSegmenter(block=block, threshold=threshold, min_duration_s=shortest)
    found = [(segment.end_s, segment.num_windows) for segment in push_all(segmenter, z, times)]
    expected = by_definition(z, times, block=block, threshold=threshold, shortest=shortest)
    assert [count for _, count in found] == [count for _, count in expected]
    assert [end for end, _ in found] == pytest.approx([end for end, _ in expected])


def test_more_than_half_of_the_windows_must_have_come_half_the_way():
    """From 0 to a mean of 2, half the way is 1: of 1 and 3 both have come so far, of 0.9 and 3.1 only half of them."""

    def moved(*x):
        return sd._has_moved(np.array(x, float)[:, None], np.zeros(1), np.array([np.mean(x)]))

    assert moved(1, 3) and not moved(0.9, 3.1) and not moved(0, 0, 6)
    assert moved(0, 2, 4) and moved(1, 1, 3, 3) and not moved(0.9, 0.9, 3.1, 3.1) and moved(0.5, 2, 2, 3.5)


def test_after_a_flush_a_stream_begins_as_new():
    """With a fixed threshold, nothing of before counts: small changes right after the start are cut as in a new one."""
    z = 0.2 * np.stack([A] * 2 + [B] * 6 + [C] * 6)
    options = {"threshold": 0.01, "min_duration_s": 0}
    used = WardSegmenter(**options)
    push_all(used, np.stack([A] * 9 + [B] * 9), np.arange(18) / 2)
    assert used.open is None
    times = 100 + np.arange(len(z)) / 2
    fresh = [described(s) for s in push_all(WardSegmenter(**options), z, times)]
    assert [described(s) for s in push_all(used, z, times)] == fresh and len(fresh) == 3


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int16])
def test_a_stream_of_another_dtype_is_computed_in_float64(dtype):
    """In float16, squares beyond 65504 are inf; in int16 they wrap at 32767."""
    z = (200 * np.stack([A] * 9 + [B] * 9 + [C] * 9)).astype(dtype)
    one, other = (push_all(WardSegmenter(threshold=1.0), x) for x in (z, z.astype(np.float64)))
    assert [described(segment) for segment in one] == [described(segment) for segment in other] and len(one) == 3
    for strategy in (segment_offline, segment_uniform):
        one, other = (strategy(x, np.arange(len(z)), num_segments=3) for x in (z, z.astype(np.float64)))
        assert [described(segment) for segment in one] == [described(segment) for segment in other]


def test_a_gain_that_falls_decides_before_the_block_is_full():
    """A * 8, B * 3, A: at the 3rd B k = 3 < block = 6 waits; the window of A after it lowers the gain, and cuts."""
    z = np.stack([A] * 8 + [B] * 3 + [A] * 8)
    segmenter = WardSegmenter(block=6, threshold=1.0, min_duration_s=0)
    closed = [segmenter.push(row, t) for t, row in enumerate(z)]
    assert [t for t, segment in enumerate(closed) if segment][0] == 11 and closed[11].end_s == 7.5


def test_noise_of_an_odd_block_is_that_of_two_halves_without_the_oldest_window():
    """Block 5: the mean of the newest 2 windows against that of the 2 before them."""
    z = A + noisy(np.random.default_rng(3), 0 * A, 31, 0.3)
    segmenter = WardSegmenter(block=5, sensitivity=0.001)
    for t, row in enumerate(z):
        assert segmenter.push(row, t) is None
    q = np.quantile([np.square(b - a).sum() / 2 for a, b in zip(z, z[1:], strict=False)], 0.1)
    p = np.quantile([np.square(z[i - 1 : i + 1].mean(0) - z[i - 3 : i - 1].mean(0)).sum() for i in range(3, 31)], 0.1)
    assert segmenter.threshold == pytest.approx(7 * min(max(p, p * p / q), 10 * q) / 0.001)


@pytest.mark.parametrize("moves", ["to and fro", "averaged", "smoothly"])
def test_the_threshold_follows_the_formula(moves):
    """p and q by numpy, for noise where each of the three terms is the one that counts. Infinite for 7 windows.

    p / q is 1/2 for differences, 5/2 for averages of neighbouring draws, and 8 for a steady motion.
    """
    e = noisy(np.random.default_rng(3), 0 * A, 41, 0.3)
    z = A + {"to and fro": e[1:] - e[:-1], "averaged": e[1:] + e[:-1], "smoothly": e[1:].cumsum(0).cumsum(0)}[moves]
    segmenter = WardSegmenter(block=4, sensitivity=0.001)  # so that nothing is cut
    for t, row in enumerate(z):
        assert segmenter.push(row, t) is None
        assert math.isinf(segmenter.threshold) == (t + 1 < 8)
    q = np.quantile([np.square(b - a).sum() / 2 for a, b in zip(z, z[1:], strict=False)], 0.1)
    p = np.quantile([np.square(z[i - 1 : i + 1].mean(0) - z[i - 3 : i - 1].mean(0)).sum() for i in range(3, 40)], 0.1)
    terms = {"to and fro": p, "averaged": p * p / q, "smoothly": 8 * q}
    assert terms[moves] == min(max(p, p * p / q), 8 * q)
    assert segmenter.threshold == pytest.approx(7 * terms[moves] / 0.001)


def test_a_stream_that_is_hardly_ever_quiet_is_still_cut():
    """Rests of 1-3 s, windows of 2 s: nearly every window is on the move. Two of three cuts are made, in place."""
    found, true = [], []
    for seed in range(3):
        z, times, edges = video(seed, rest_s=(1, 3))
        found += [1000 * seed + cut for cut in cuts(push_all(WardSegmenter(), z, times))]
        true += [1000 * seed + edge for edge in edges]
    score = boundary_f1(found, true, tolerance_s=1.0)
    assert score.recall >= 0.55 and score.precision >= 0.9, score


@pytest.mark.parametrize("noise", [0.02, 0.1, 0.2])
@pytest.mark.parametrize("overlap", [{}, {"stride_s": 0.25}, {"window_s": 1.0}], ids=["x4", "x8", "x2"])
@pytest.mark.parametrize("shared", [False, True], ids=["white", "shared"])
def test_cuts_lie_at_the_changes_and_nowhere_else(noise, overlap, shared):
    """Known changes, +-1 s. The transition through overlapping windows is no segment: at most 1.1 cuts for each."""
    block = max(4, int(overlap.get("window_s", 2.0) / overlap.get("stride_s", 0.5)))
    found, true = [], []
    for seed in range(3):
        kinds = {"noise": noise / 2, "frame_noise": noise / 2} if shared else {"noise": noise}
        z, times, edges = video(seed, **kinds, **overlap)
        found += [1000 * seed + cut for cut in cuts(push_all(WardSegmenter(block=block), z, times))]
        true += [1000 * seed + edge for edge in edges]
    score = boundary_f1(found, true, tolerance_s=1.0)
    assert score.f1 >= 0.9 and len(found) <= 1.1 * len(true), (score, len(found), len(true))


@pytest.mark.parametrize(("every", "noise"), [(60, 0.05), (20, 0.01), (8, 0.05)])
def test_one_odd_window_is_no_scene(every, noise):
    """Nor is what lies between odd windows, though their mean is off by 1 / every of the way."""
    z = noisy(np.random.default_rng(0), A, 400, noise)
    z[30::every] = noisy(np.random.default_rng(1), B, len(z[30::every]), noise)
    assert len(push_all(WardSegmenter(), z)) == 1


@pytest.mark.parametrize("noise", [1e-3, 0.05])
@pytest.mark.parametrize("overlap", [2, 3, 4, 5, 6, 8])
def test_a_change_seen_through_overlapping_windows_is_cut_once_in_its_middle(overlap, noise):
    """Window 49 shows A, window 49 + overlap B, those between both: the middle is overlap / 2 windows after 49.

    At a noise of 1e-3 each of them stands far above it.
    """
    share = np.clip((np.arange(100) - 49) / overlap, 0, 1)[:, None]
    z = (1 - share) * A + share * B + noisy(np.random.default_rng(0), 0 * A, 100, noise)
    (cut,) = cuts(push_all(WardSegmenter(block=max(3, overlap)), z))
    assert abs(cut - (49 + overlap / 2) / 2) <= 0.25


def test_a_short_event_and_the_rests_around_it_are_three_segments():
    z = np.concatenate([noisy(np.random.default_rng(i), v, n, 0.05) for i, v, n in ((0, A, 20), (1, B, 3), (2, A, 20))])
    segments = push_all(WardSegmenter(), z)
    assert cuts(segments) == [9.75, 11.25]
    assert [int(np.argmax(segment.embedding)) for segment in segments] == [0, 1, 0]


@pytest.mark.parametrize(("shortest", "expected"), [(1.5, [9.75, 11.25]), (1.6, [9.75])])
def test_no_segment_but_the_last_is_shorter_than_the_minimum(shortest, expected):
    """B lasts 3 windows, 1.5 s. Forbidden to end there, it may not end within `shortest` of 9.75."""
    z = np.stack([A] * 20 + [B] * 3 + [C] * 30)
    found = cuts(push_all(WardSegmenter(threshold=0.5, min_duration_s=shortest), z))
    assert found[: len(expected)] == expected
    assert all(b - a >= shortest for a, b in zip(found, found[1:], strict=False))


def test_sensitivity_cuts_at_smaller_changes():
    """A turn whose gain stands between the thresholds of sensitivity 1 and 4."""
    rng = np.random.default_rng(0)
    z = noisy(rng, A, 120, 0.2)
    z[60:] += 0.2 * B  # gain about 4 * 0.04 + 0.04 of noise; threshold about 7 * 0.04 / sensitivity
    assert cuts(push_all(WardSegmenter(sensitivity=1.0), z)) == []
    (cut,) = cuts(push_all(WardSegmenter(sensitivity=2.5), z))
    assert abs(cut - 29.75) <= 1


@examples(10)
@given(st.integers(0, 10**6), st.sampled_from([1e-3, 1.0, 1e4]))
def test_cuts_do_not_depend_on_rotation_or_scale(seed, scale):
    z, times, _ = video(seed, noise=0.1, seconds=60)
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((D, D)))
    plain, turned = push_all(WardSegmenter(), z, times), push_all(WardSegmenter(), scale * z @ rotation, times)
    assert cuts(plain) == cuts(turned) and len(plain) > 3
    for a, b in zip(plain, turned, strict=True):
        np.testing.assert_allclose(scale * a.embedding @ rotation, b.embedding, atol=1e-5 * scale)


@examples(10)
@given(st.integers(0, 10**6), st.integers(1, 110))
def test_what_was_emitted_does_not_depend_on_the_future(seed, known):
    z, times, _ = video(seed, seconds=60)
    other = z.copy()
    other[known:] = np.random.default_rng(seed + 1).standard_normal(other[known:].shape)
    one, two = WardSegmenter(), WardSegmenter()
    for a, b, t in zip(z[:known], other[:known], times, strict=False):
        assert described(one.push(a, t)) == described(two.push(b, t))


def inner(x):
    """Without the first and the last window, if any is left."""
    return x[1:-1] if len(x) > 2 else x


def described(segment):
    return segment and (segment.start_s, segment.end_s, segment.num_windows, segment.core_embedding.tobytes())


@examples(10)
@given(st.integers(0, 10**6))
def test_online_segments_cover_all_windows_and_remember_their_middle(seed):
    z, times, _ = video(seed, seconds=90)
    segments = push_all(WardSegmenter(), z, times)
    assert segments[0].start_s == times[0] and segments[-1].end_s == times[-1] and len(segments) > 3
    first = 0
    for segment, start in zip(segments, [times[0], *cuts(segments)], strict=True):
        own = slice(first, first + segment.num_windows)
        assert segment.start_s == start
        np.testing.assert_allclose(segment.embedding, z[own].mean(axis=0), atol=1e-6)
        np.testing.assert_allclose(segment.core_embedding, inner(z[own]).mean(axis=0), atol=1e-6)
        middle = np.abs(times[own] - (segment.start_s + segment.end_s) / 2).argmin()
        expected = z[own][middle].astype(np.float32)
        np.testing.assert_array_equal(segment.midpoint_embedding, expected)  # under 32 windows: exact
        first += segment.num_windows
    assert first == len(z)


RUNS = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40)), min_size=1, max_size=12)


@examples(60)
@given(
    runs=RUNS, noise=st.sampled_from([0.0, 1e-3, 0.3]), scale=st.sampled_from([1e-6, 1.0, 1e6]),
    shortest=st.sampled_from([None, 0.0, 2.0]), start=st.sampled_from([0.0, 1e5, -7.5]), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_any_stream_is_covered_once_by_a_bounded_state(runs, noise, scale, shortest, start, seed):
    """Scenes of any lengths, one window too, equal neighbours, no noise or much, and windows at uneven times."""
    rng = np.random.default_rng(seed)
    z = np.concatenate([noisy(rng, (A, B, C, 0 * A)[scene], count, noise) for scene, count in runs]) * scale
    times = start + np.cumsum(rng.uniform(0.05, 3, len(z)))
    options = {} if shortest is None else {"min_duration_s": shortest}
    segmenter, segments, held = WardSegmenter(**options), [], 0
    for row, t in zip(z, times, strict=True):
        segments.append(segmenter.push(row, t))
        held = max(held, sum(size_of(value) for value in vars(segmenter).values()))
    segments = [segment for segment in [*segments, segmenter.flush()] if segment]
    assert segmenter.flush() is None and segmenter.open is None
    assert held <= 2 * sd.NOISE_MEMORY + (sd.MAX_KEPT + 4 + 3) * (D + 1) + 20
    assert segments[0].start_s == times[0] and segments[-1].end_s == times[-1]
    assert [segment.end_s for segment in segments[:-1]] == [segment.start_s for segment in segments[1:]]
    assert sum(segment.num_windows for segment in segments) == len(z)
    if shortest is not None:
        assert all(segment.end_s - segment.start_s >= shortest for segment in segments[:-1])
    first = 0
    for segment in segments:
        own = slice(first, first := first + segment.num_windows)
        np.testing.assert_allclose(segment.embedding, z[own].mean(axis=0), atol=2e-6 * scale)
        assert segment.start_s <= times[own][0] and times[own][-1] <= segment.end_s


def size_of(value):
    """Floats that a state holds."""
    if isinstance(value, (np.ndarray, float, int)):
        return np.size(value)
    return sum(size_of(v) for v in value) if isinstance(value, (list, tuple)) or hasattr(value, "maxlen") else 0


def test_the_middle_of_a_long_segment_is_known_to_a_32nd():
    """Window i holds i, and nothing is cut: the middle of 1,000 windows is 499.5; 32 of them may be kept."""
    segmenter = WardSegmenter(threshold=1e12)
    for i in range(1000):
        segmenter.push([float(i)], float(i))
    closed = segmenter.flush()
    assert closed.midpoint_embedding[0] == 512, "every 32nd is kept: 480 and 512 are nearest"
    assert closed.core_embedding == pytest.approx([499.5]) and closed.num_windows == 1000


def test_the_state_does_not_grow():
    """Floats held after 500 and after 10,000 windows with changes now and then; both are under what 50 windows hold."""

    segmenter, rng = WardSegmenter(), np.random.default_rng(0)
    sizes = []
    for i in range(10_000):
        segmenter.push((A, B)[i // 3000 % 2] + 0.01 * rng.standard_normal(D), 0.5 * i)
        if i % 500 == 499:
            sizes.append(sum(size_of(value) for value in vars(segmenter).values()))
    assert max(sizes) <= 2 * sd.NOISE_MEMORY + (sd.MAX_KEPT + 4 + 3) * (D + 1) + 20
    assert len(vars(segmenter)) == len(vars(WardSegmenter()))


def test_the_middle_of_32_windows_beside_the_newest_is_exact():
    """32 may be kept, and the newest 4 are there anyway: of 36, the windows 17 and 18 are nearest; the earlier wins."""
    segmenter = WardSegmenter(threshold=1e12)
    for i in range(36):
        segmenter.push([float(i)], float(i))
    assert segmenter.flush().midpoint_embedding == [17]


@pytest.mark.parametrize("time_s", [1.0, 0.5, math.nan, math.inf])
def test_time_must_advance(time_s):
    segmenter = WardSegmenter()
    segmenter.push(A, 1.0)
    with pytest.raises(ValueError, match="does not follow 1.0"):
        segmenter.push(A, time_s)
    segmenter.flush()
    with pytest.raises(ValueError, match="does not follow"):
        segmenter.push(A, 1.0)


def test_a_refused_window_leaves_no_trace():
    one, two = WardSegmenter(), WardSegmenter()
    z, times, _ = video(0, seconds=60)
    for row, t in zip(z, times, strict=True):
        a = one.push(row, t)
        for bad, at, said in ((row * np.nan, t + 0.1, "not finite"), (row[1:], t + 0.1, "48"), (row, t, "not follow")):
            with pytest.raises(ValueError, match=said):
                one.push(bad, at)
        assert described(a) == described(two.push(row, t))
    with pytest.raises(ValueError, match="one vector"):
        WardSegmenter().push(np.ones((2, 3)), 0.0)


def test_segments_are_the_segmenters_own_and_cannot_be_written():
    """The caller may reuse its buffer for the next window."""
    segmenter, buffer = WardSegmenter(), np.zeros(3)
    for t in range(5):
        buffer[:] = t
        segmenter.push(buffer, t)
    segment = segmenter.open
    assert segment.embedding == pytest.approx([2, 2, 2]) and segment.embedding.dtype == np.float32
    for array in (segment.embedding, segment.core_embedding, segment.midpoint_embedding):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_an_empty_segmenter_has_nothing_open_and_one_window_is_a_segment():
    segmenter = WardSegmenter()
    assert segmenter.open is None and segmenter.flush() is None
    segmenter.push([2.0], 3.0)
    only = segmenter.flush()
    assert (only.start_s, only.end_s, only.num_windows) == (3, 3, 1)
    assert only.embedding == only.core_embedding == only.midpoint_embedding == [2]
    assert segmenter.flush() is None
    segmenter.push([4.0], 5.0)  # a new segment, of one window, without the old one
    assert (segmenter.open.start_s, segmenter.open.num_windows) == (5, 1) and segmenter.open.embedding == [4]


@pytest.mark.parametrize(
    "bad",
    [{"block": 1}, {"threshold": -1.0}, {"threshold": math.nan}, {"sensitivity": 0.0}, {"min_duration_s": -1.0}],
)
def test_arguments_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        WardSegmenter(**bad)


def test_the_smallest_arguments_are_accepted_and_messages_are_whole():
    WardSegmenter(block=2, threshold=0.0, min_duration_s=0.0)
    with pytest.raises(ValueError, match="^block=1 is too small: .* Use window / stride, at least 3.$"):
        WardSegmenter(block=1)
    with pytest.raises(ValueError, match=r"^embedding \(2, 3\) must be one vector \[D\], as long as"):
        WardSegmenter().push(np.ones((2, 3)), 0.0)
    with pytest.raises(ValueError, match="^embeddings and times_s must be finite; .* through NaN or inf.$"):
        segment_uniform(np.full((3, 2), np.nan), [0, 1, 2], num_segments=1)
    x, times = np.arange(7.0)[:, None], np.arange(7.0)
    with pytest.raises(ValueError, match=r"no window \(near 6.0 s\): sort the .* segments shorter than a stride.$"):
        segment_at(x, times, boundaries_s=[7.0])


def test_selective_decoding_needs_fewer_decodes_than_a_uniform_stride_for_the_same_scenes():
    """Decodes until every event has a segment whose mean is nearer to it than to the rest."""
    z, times, edges = video(1, noise=0.05)
    selective = push_all(WardSegmenter(), z, times)

    def missed(segments):
        return len(edges) - 2 * sum(
            any(s.start_s <= middle <= s.end_s and s.end_s - s.start_s < 3 for s in segments)
            for middle in (np.array(edges[::2]) + np.array(edges[1::2])) / 2
        )

    assert missed(selective) == 0
    assert missed(segment_uniform(z, times, num_segments=len(selective))) > 0


# --- boundaries


def test_boundary_f1_by_hand():
    """Found 1, 5, 9.4, 9.6; true 1.5, 9, 20, 30, 40, 1 s: 1 with 1.5, one of the two with 9. 2 / 4, 2 / 5, 4 / 9."""
    assert boundary_f1([9.6, 1, 5, 9.4], [1.5, 9, 20, 30, 40], tolerance_s=1.0) == pytest.approx((0.5, 0.4, 4 / 9))
    assert boundary_f1([], [], tolerance_s=1.0) == (1, 1, 1)
    assert boundary_f1([], [3.0], tolerance_s=1.0) == boundary_f1([3.0], [], tolerance_s=1.0) == (0, 0, 0)
    assert boundary_f1([2.0], [3.0], tolerance_s=1.0).f1 == 1 and boundary_f1([1.9], [3.0], tolerance_s=1.0).f1 == 0
    with pytest.raises(ValueError, match="tolerance_s"):
        boundary_f1([], [], tolerance_s=-1.0)


@examples(80)
@given(
    st.lists(st.integers(0, 20), max_size=6),
    st.lists(st.integers(0, 20), max_size=6),
    st.integers(0, 4),
)
def test_boundary_matching_is_the_largest_one(found, true, tolerance):
    def largest(rest, taken):
        if not rest:
            return 0
        partners = [i for i, t in enumerate(true) if i not in taken and abs(t - rest[0]) <= tolerance]
        return max([largest(rest[1:], taken), *(1 + largest(rest[1:], taken | {i}) for i in partners)])

    score = boundary_f1(found, true, tolerance_s=tolerance)
    matched = largest(tuple(found), frozenset())
    if found and true:
        assert score == pytest.approx(
            (matched / len(found), matched / len(true), 2 * matched / (len(found) + len(true)))
        )


def test_segments_are_frozen():
    segment = Segment(0, 1, *[np.zeros(1, np.float32)] * 3, 1)
    with pytest.raises(AttributeError):
        segment.start_s = 2
