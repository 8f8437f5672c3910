"""When to decode: a stream of embeddings is cut into scenes, and one decode serves each scene.

VL-JEPA (arXiv:2512.10942, section 4.6) embeds sliding windows of a video, clusters the embeddings of the whole video
into N stretches of time and decodes one embedding per stretch, its mean or the one at its midpoint. That protocol is
`segment_offline`; `segment_uniform` is its baseline and `segment_at` the oracle. A live stream has no end to wait for:
`WardSegmenter` finds the same kind of cuts while windows arrive (the paper only suggests an online rule, section 2),
and `SelectiveDecoder` puts a model on both sides of it.

Two neighbouring stretches of n and k windows with means a and b have the Ward gain

    gain = n k / (n + k) * ||a - b||^2,

the sum of squares saved by keeping them apart. Of white noise it is the variance of one window on average, whatever n
and k are; of a change it grows with the number of windows that have seen it.

The time of a window is that of its *centre*: its embedding tells as much of what follows as of what went before. The
edge between two segments lies halfway between the windows on its sides, so segments cover the stream without a gap.
Shape legend: T windows, D embedding.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

# The constants of `WardSegmenter`, chosen on simulated streams: rests of 4-12 s between events of 1-1.8 s, windows of
# 2 s every 0.5 s, noise of 2 to 30 % of an embedding's length. There, 0.93 to 1.01 cuts are made for each true one, at
# a boundary F1 (within 1 s) of 0.96 to 0.99; in noise alone, of 16 dimensions or more, at most one in half an hour.
NOISE_FACTOR = 7.0  # 6 sometimes cuts noise in 16 dimensions, 8 misses every seventh cut at 30 % noise
NOISE_QUANTILE = 0.1  # so low because in a busy stream few moments are quiet
NOISE_MEMORY = 128  # statistics kept: the noise of the last minute, at two windows a second
WARM_UP = 8  # windows before the first estimate
ROUNDING = (
    1e-5  # of the squared length of an embedding: no gain below it is a change, or a still stream cuts on float32
)
SCATTER = 4.0  # 0 makes 14 cuts a minute where every 8th window is an odd one
AFTERGLOW = 0.04  # 0.02 cuts one change twice, 0.12 misses a quarter of the cuts in rendered frames
MAX_KEPT = 32  # windows remembered of a long scene, for its midpoint


@dataclass(frozen=True, eq=False)
class Segment:
    """A scene: neighbouring windows between two edges.

    start_s, end_s: its edges, in the time of window centres. A stream starts and ends at a centre, not at an edge.
    embedding: [D] float32, the mean of its windows as given; it is *not* scaled to unit norm again.
    core_embedding: [D] float32, the mean without the first and the last window, where it has three or more. These two
        show the neighbouring scenes, too: of an event shorter than a window, half of what they show (ours).
    midpoint_embedding: [D] float32, that of the window nearest to the middle. Of a long segment `WardSegmenter`
        remembers every 2nd, 4th, ... window: there it may be off by 1/32 of the windows.
    num_windows: how many the mean is of.
    """

    start_s: float
    end_s: float
    embedding: NDArray[np.float32]
    core_embedding: NDArray[np.float32]
    midpoint_embedding: NDArray[np.float32]
    num_windows: int


class WardSegmenter:
    """Cuts a stream into scenes while it arrives, at O(block * D) a window and with a state that does not grow.

    Of the open segment, the last k <= block windows (mean b) are compared with all before (n windows, mean a), for
    every k: the split with the largest Ward gain is where a change would have been. It becomes a cut when

    1.  gain > threshold, and more than the two below;
    2.  at least half of the k windows have come half the way from a to b. One odd window moves b, but the others
        are still at a: it is no scene;
    3.  k = block, or the gain has begun to fall. Before, windows that show more of the new scene still arrive, and
        the best split still moves with them;
    4.  the segment that ends here lasts at least `min_duration_s`.

    Where a share f of the n windows is d away from the others, these others gain k f^2 d^2 over the mean of all, and
    cutting them off would be wrong; so the gain must also exceed SCATTER * (mean ||z||^2 - ||a||^2) = 4 f (1 - f) d^2.
    Windows overlap, so the first ones after a cut show both scenes, and must not become a segment of their own: after
    a cut of gain g the gain must exceed AFTERGLOW * g * block / n.

    The threshold, unless given, is NOISE_FACTOR * noise / sensitivity, from two statistics of the last windows,

        p = h / 2 * ||mean of the last h - mean of the h before||^2,  h = block // 2, within the open segment
        q = 1 / 2 * ||last - last but one||^2

    each taken at the NOISE_QUANTILE of its last NOISE_MEMORY values:

        noise = min(p * max(p / q, 1), 2 * block * q)

    For independent noise p = q = the variance of a window, which is then the gain without a change. Windows that
    overlap `block` times move slowly: p falls to 3/4 and q to 1/4 of the variance at block 4, and the gain rises to
    11/4; p * p / q is 9/4. A busy stream has no quiet stretch for p but quiet moments for q: hence the bound.

    So threshold and cuts are those of the rotated or scaled stream too. The threshold is at least ROUNDING of the mean
    squared length. Until max(WARM_UP, 2 * block) windows were seen it is infinite; a change among these is found if it
    is large, but later and less exactly. So is one in a stream that is never quiet, until it is.

    Args:
        block: how many windows show one moment, window / stride, and at least 3. With fewer, one change is cut twice
            (1.5 cuts with 4 for windows that overlap 8 times). It is also the latency: a cut is known `block` windows
            later at most. Events much shorter than a window cannot be told from each other, whatever the block.
        threshold: fixed, from the first window on, in squared units of the embeddings. Of unit embeddings, 4 windows
            that turn by 60 degrees after a long rest gain 4. Default: calibrated, as above.
        sensitivity: > 0, of the calibrated threshold. 2 cuts at half the gain.
        min_duration_s: of a segment. `flush` may close a shorter one.

    Raises ValueError for arguments out of range.
    """

    def __init__(
        self,
        *,
        block: int = 4,
        threshold: float | None = None,
        sensitivity: float = 1.0,
        min_duration_s: float = 1.0,
    ) -> None:
        if block < 2:
            raise ValueError(f"block={block}: a change is told from one odd window by 2 windows or more.")
        if threshold is not None and not (threshold >= 0 and math.isfinite(threshold)):
            raise ValueError(f"threshold={threshold} must be a finite number >= 0, or None to calibrate it.")
        if not (sensitivity > 0 and math.isfinite(sensitivity)):
            raise ValueError(f"sensitivity={sensitivity} must be a finite number > 0; 1 is the default.")
        if not (min_duration_s >= 0 and math.isfinite(min_duration_s)):
            raise ValueError(f"min_duration_s={min_duration_s} must be a finite number of seconds >= 0.")
        self._block, self._given = block, threshold
        self._sensitivity, self._min_duration_s = sensitivity, min_duration_s
        self._dim: int | None = None
        self._last_s = -math.inf
        self._num_seen = 0
        self._previous: NDArray[np.float64] | None = None  # the newest window, for the lag-1 statistic
        self._block_statistics: deque[float] = deque(maxlen=NOISE_MEMORY)
        self._lag_statistics: deque[float] = deque(maxlen=NOISE_MEMORY)
        self._recent: deque[tuple[float, NDArray[np.float64]]] = deque()  # times and windows, the last <= block
        self._start_new(math.nan, gain=0.0)

    def push(self, embedding: ArrayLike, time_s: float) -> Segment | None:
        """Take the next window; the segment that it closes, if any.

        Args:
            embedding: [D], finite. It is copied.
            time_s: of the window's centre, later than that of the window before.

        Raises ValueError for any other embedding or time, or another D. The state is then as before.
        """
        z = np.array(embedding, dtype=np.float64)
        self._check(z, time_s)
        self._dim, self._last_s = len(z), float(time_s)
        self._num_seen += 1
        if not self._recent:
            self._start_s = self._last_s
        if len(self._recent) == self._block:
            self._to_head(*self._recent.popleft())
        self._recent.append((self._last_s, z))
        self._measure_noise(z)
        return self._cut()

    def flush(self) -> Segment | None:
        """Close the open segment, as at the end of the stream. A change younger than `block` windows may be in it.

        The noise estimate and the order of time stay: what is pushed afterwards starts a new segment.
        """
        segment = self.open
        self._recent.clear()
        self._start_new(math.nan, gain=0.0)
        return segment

    @property
    def open(self) -> Segment | None:
        """The running segment up to the newest window, None before the first. Its last windows may still be cut off."""
        return self._segment(len(self._recent), self._last_s) if self._recent else None

    @property
    def threshold(self) -> float:
        """What a gain has to exceed now; infinite while warming up."""
        if self._given is not None:
            return self._given
        if self._num_seen < max(WARM_UP, 2 * self._block) or not self._block_statistics or not self._recent:
            return math.inf
        p = float(np.quantile(self._block_statistics, NOISE_QUANTILE))
        q = float(np.quantile(self._lag_statistics, NOISE_QUANTILE))
        noise = min(p * max(p / q, 1), 2 * self._block * q) if q > 0 else 0.0
        rounding = ROUNDING * sum(float(z @ z) for _, z in self._recent) / len(self._recent)
        return max(NOISE_FACTOR * noise / self._sensitivity, rounding)

    def _check(self, z: NDArray[np.float64], time_s: float) -> None:
        if z.ndim != 1 or not len(z) or (self._dim is not None and len(z) != self._dim):
            wanted = "D" if self._dim is None else self._dim
            raise ValueError(f"embedding {z.shape} must be one vector [{wanted}], of one length in all the stream.")
        if not np.isfinite(z).all():
            raise ValueError(f"The embedding at {time_s} s is not finite; a stream cannot be cut through NaN or inf.")
        if not (math.isfinite(time_s) and time_s > self._last_s):
            raise ValueError(f"time_s={time_s} does not follow {self._last_s}; push windows in the order of time.")

    def _start_new(self, start_s: float, *, gain: float) -> None:
        """An empty head; `_recent` is the caller's business."""
        self._start_s = start_s
        self._opening_gain = gain  # of the cut at its start
        self._rising_gain = 0.0  # the largest since gains exceed the threshold; 0 = none does
        self._num_head = 0  # the head: windows of the open segment that have left `_recent`
        self._head_sum: NDArray[np.float64] | float = 0.0
        self._head_squares = 0.0
        self._head_end_s = math.nan
        self._head_last: NDArray[np.float64] | float = 0.0
        self._kept: list[tuple[float, NDArray[np.float64]]] = []  # every `_keep_every`-th window of the head
        self._keep_every = 1

    def _to_head(self, time_s: float, z: NDArray[np.float64]) -> None:
        if self._num_head % self._keep_every == 0:
            self._kept.append((time_s, z))
            if len(self._kept) > MAX_KEPT:
                self._kept, self._keep_every = self._kept[::2], 2 * self._keep_every
        self._num_head += 1
        self._head_sum = self._head_sum + z
        self._head_squares += float(z @ z)
        self._head_end_s, self._head_last = time_s, z

    def _measure_noise(self, z: NDArray[np.float64]) -> None:
        if self._previous is not None:
            step = z - self._previous
            self._lag_statistics.append(float(step @ step / 2))
        self._previous = z
        half = self._block // 2
        if len(self._recent) >= 2 * half:  # within the open segment, so what is already known as a change is left out
            x = np.stack([z for _, z in self._recent])
            step = x[-half:].mean(axis=0) - x[-2 * half : -half].mean(axis=0)
            self._block_statistics.append(float(half / 2 * step @ step))

    def _cut(self) -> Segment | None:
        times = np.array([time_s for time_s, _ in self._recent])
        x = np.stack([z for _, z in self._recent])  # [block, D], oldest first
        before = np.arange(len(x))  # windows of `x` before the split
        edges = (np.concatenate([[self._head_end_s], times[:-1]]) + times) / 2  # NaN before the very first window
        # 1e-9: 0.1 + 0.2 is not 0.3, and a segment of exactly the minimum is long enough.
        before = before[(self._num_head + before > 0) & (edges - self._start_s >= self._min_duration_s - 1e-9)]
        if not len(before):
            return None
        n, k = self._num_head + before, len(x) - before
        sums = np.concatenate([np.zeros((1, x.shape[1])), x.cumsum(axis=0)])
        a = (self._head_sum + sums[before]) / n[:, None]
        b = (sums[-1] - sums[before]) / k[:, None]
        gains = n * k / (n + k) * np.square(b - a).sum(axis=1)
        best = int(gains.argmax())
        gain, split = float(gains[best]), int(before[best])
        squares = self._head_squares + float(np.square(x[:split]).sum())
        scatter = SCATTER * (squares / n[best] - float(a[best] @ a[best]))
        afterglow = AFTERGLOW * self._opening_gain * self._block / n[best]
        # The threshold comes last of the three: its quantiles cost more than all the rest, and are seldom needed.
        surprising = gain > max(scatter, afterglow) and gain > self.threshold
        if not (surprising and _has_moved(x[split:], a[best], b[best])):
            self._rising_gain = 0.0
            return None
        if k[best] < self._block and gain >= self._rising_gain:
            self._rising_gain = gain
            return None
        edge = float(edges[split])
        segment = self._segment(split, edge)
        for _ in range(split):
            self._recent.popleft()
        self._start_new(edge, gain=gain)
        return segment

    def _segment(self, num_recent: int, end_s: float) -> Segment:
        """The open segment up to and with the first `num_recent` of `_recent`."""
        recent = list(self._recent)[:num_recent]
        total = np.asarray(self._head_sum + sum(z for _, z in recent))
        num_windows = self._num_head + num_recent
        middle = (self._start_s + end_s) / 2
        windows = self._kept + recent  # the first of all is always kept
        _, nearest = min(windows, key=lambda window: abs(window[0] - middle))
        mean = core = total / num_windows
        if num_windows > 2:
            core = (total - windows[0][1] - (recent[-1][1] if recent else self._head_last)) / (num_windows - 2)
        return Segment(self._start_s, end_s, _frozen(mean), _frozen(core), _frozen(nearest), num_windows)


def segment_offline(embeddings: ArrayLike, times_s: ArrayLike, *, num_segments: int) -> list[Segment]:
    """Exactly `num_segments` segments of a whole stream: Ward clustering in which only neighbours in time may merge.

    Starting from one segment per window, the two neighbours of least Ward gain are merged, the earlier pair where two
    gains are equal, until N are left (the paper's adaptive protocol, section 4.6). O(T log T + T D). The paper does
    not say whether embeddings have unit norm first; they are taken as given here.

    Args:
        embeddings: [T, D], finite.
        times_s: [T], increasing: the centres of the windows.
        num_segments: N, 1..T.

    Raises ValueError for anything else.
    """
    x, times = _stream(embeddings, times_s, num_segments)
    count = len(x)
    # Sums of a..b are differences of these; without the common part of all embeddings they lose no digits.
    sums = np.concatenate([np.zeros((1, x.shape[1])), (x - x.mean(axis=0)).cumsum(axis=0)])
    end = list(range(1, count + 1))  # of the segment that starts here; 0 where none does
    start = [0, *range(count)]  # of the segment that ends here

    def gain(a: int, b: int, c: int) -> float:
        n, k = b - a, c - b
        step = (sums[b] - sums[a]) / n - (sums[c] - sums[b]) / k
        return float(n * k / (n + k) * (step @ step))

    heap = [(gain(i, i + 1, i + 2), i, i + 1, i + 2) for i in range(count - 1)]
    heapq.heapify(heap)
    left = count
    while left > num_segments:
        _, a, b, c = heapq.heappop(heap)
        if end[a] != b or end[b] != c:
            continue  # one of the two has merged since
        end[a], end[b], start[c] = c, 0, a
        left -= 1
        if a > 0:
            heapq.heappush(heap, (gain(start[a], a, c), start[a], a, c))
        if c < count:
            heapq.heappush(heap, (gain(a, c, end[c]), a, c, end[c]))
    return _split(x, times, [i for i in range(1, count) if end[i]])


def segment_uniform(embeddings: ArrayLike, times_s: ArrayLike, *, num_segments: int) -> list[Segment]:
    """`num_segments` segments of as equal a number of windows as possible: the paper's baseline, one decode per stride.

    Arguments and errors as for `segment_offline`. The mean is over the stride; the paper does not give its own width.
    """
    x, times = _stream(embeddings, times_s, num_segments)
    return _split(x, times, [i * len(x) // num_segments for i in range(1, num_segments)])


def segment_at(embeddings: ArrayLike, times_s: ArrayLike, *, boundaries_s: Sequence[float]) -> list[Segment]:
    """The segments between given boundaries, as an oracle has them. A window at a boundary belongs to what follows.

    Raises ValueError where two boundaries, or one and an end of the stream, have no window between them; otherwise as
    `segment_offline`. The edges of the segments are between windows, so up to half a stride off the boundaries.
    """
    x, times = _stream(embeddings, times_s, 1)
    cuts = [int(i) for i in np.searchsorted(times, np.asarray(boundaries_s, dtype=np.float64), side="left")]
    for before, after in zip([0, *cuts], [*cuts, len(x)], strict=True):
        if after <= before:
            raise ValueError(
                f"No window lies in one of the segments of boundaries_s (near {times[min(before, len(x) - 1)]} s): "
                "sort the boundaries, use a smaller stride, or leave out what is shorter than a stride."
            )
    return _split(x, times, cuts)


class BoundaryScore(NamedTuple):
    precision: float
    recall: float
    f1: float


def boundary_f1(found_s: Sequence[float], true_s: Sequence[float], *, tolerance_s: float) -> BoundaryScore:
    """Precision, recall and their harmonic mean of boundaries, one found for one true one at most `tolerance_s` apart.

    The largest possible matching. 1 for all where there is nothing to find and nothing was found; otherwise a share
    of nothing is 0.

    Raises ValueError for a negative or non-finite tolerance.
    """
    if not (tolerance_s >= 0 and math.isfinite(tolerance_s)):
        raise ValueError(f"tolerance_s={tolerance_s} must be a finite number of seconds >= 0.")
    found, true = sorted(found_s), sorted(true_s)
    if not found and not true:
        return BoundaryScore(1.0, 1.0, 1.0)
    matched = i = j = 0
    while i < len(found) and j < len(true):  # with one tolerance for all, the earliest partner is never a bad choice
        if abs(found[i] - true[j]) <= tolerance_s:
            matched, i, j = matched + 1, i + 1, j + 1
        elif found[i] < true[j]:
            i += 1
        else:
            j += 1
    return BoundaryScore(
        matched / len(found) if found else 0.0,
        matched / len(true) if true else 0.0,
        2 * matched / (len(found) + len(true)),
    )


@dataclass(frozen=True)
class Caption:
    """What is said of a scene. Emitted captions are never changed: the final one is appended to the provisional one.

    start_s, end_s: of the scene as `Segment` has them; of a provisional caption, of what was seen of it so far.
    emitted_s: the end of the newest window at that moment.
    score: the decoder's, None if it gives none.
    final: the scene is over.
    """

    start_s: float
    end_s: float
    emitted_s: float
    text: str
    score: float | None
    final: bool


class SelectiveDecoder:
    """Windows in, captions out: every window is embedded, and text is decoded only for scenes.

    A scene gets a provisional caption of its mean so far once it has lasted `provisional_after_s`, and a final one of
    its core when it closes (the paper: of its mean or midpoint). Where mean and core have a cosine of `reuse_cosine` or
    more the text of the first is said again, without a decode; so a scene costs one or two decodes, a still one one.

    Args:
        embed: window -> [D]. Anything may be a window.
        decode: [D] float32 -> text, or (text, score).
        segmenter: a fresh `WardSegmenter`, or what has its `push`, `flush` and `open`.
        provisional_after_s: None for no provisional captions; then there is one decode per segment, as in the paper.
        reuse_cosine: above 1, every final caption is decoded.

    `num_windows` and `num_decodes` count calls of `embed` and `decode` that came back.
    """

    def __init__(
        self,
        embed: Callable[[Any], ArrayLike],
        decode: Callable[[NDArray[np.float32]], str | tuple[str, float]],
        segmenter: WardSegmenter,
        *,
        provisional_after_s: float | None = 1.0,
        reuse_cosine: float = 0.99,
    ) -> None:
        if provisional_after_s is not None and not provisional_after_s >= 0:
            raise ValueError(f"provisional_after_s={provisional_after_s} must be >= 0 s, or None for none.")
        self._embed, self._decode, self._segmenter = embed, decode, segmenter
        self._provisional_after_s, self._reuse_cosine = provisional_after_s, reuse_cosine
        self._said: tuple[NDArray[np.float32], str, float | None] | None = None  # provisionally, of the open segment
        self._now_s = math.nan
        self.num_windows = 0
        self.num_decodes = 0

    def step(self, window: Any, start_s: float, end_s: float) -> list[Caption]:
        """Take the window from `start_s` to `end_s`; what there is to say now, mostly nothing.

        Raises ValueError for a window without duration, and as `WardSegmenter.push`.
        """
        if not end_s > start_s:
            raise ValueError(f"A window from {start_s} to {end_s} s has no duration; give its start and its end.")
        embedding = self._embed(window)
        self.num_windows += 1
        closed = self._segmenter.push(embedding, (start_s + end_s) / 2)
        self._now_s = end_s
        captions = [] if closed is None else [self._final(closed)]
        running = self._segmenter.open
        if (
            self._provisional_after_s is not None
            and self._said is None
            and running is not None
            and running.end_s - running.start_s >= self._provisional_after_s
        ):
            text, score = self._text(running.embedding)
            self._said = running.embedding, text, score
            captions.append(Caption(running.start_s, running.end_s, self._now_s, text, score, final=False))
        return captions

    def finish(self) -> list[Caption]:
        """The final caption of the scene that the end of the stream closes; nothing if there is none."""
        closed = self._segmenter.flush()
        return [] if closed is None else [self._final(closed)]

    def _final(self, segment: Segment) -> Caption:
        said, self._said = self._said, None
        if said is not None and _cosine(said[0], segment.core_embedding) >= self._reuse_cosine:
            _, text, score = said
        else:
            text, score = self._text(segment.core_embedding)
        return Caption(segment.start_s, segment.end_s, self._now_s, text, score, final=True)

    def _text(self, embedding: NDArray[np.float32]) -> tuple[str, float | None]:
        answer = self._decode(embedding)
        self.num_decodes += 1
        return (answer, None) if isinstance(answer, str) else answer


def _has_moved(x: NDArray[np.float64], a: NDArray[np.float64], b: NDArray[np.float64]) -> bool:
    """Have at least half of the windows `x` [k, D], whose mean is `b`, come at least half the way from `a` to `b`?"""
    way = b - a
    share = np.sort((x - a) @ way / (way @ way))  # mean 1; a single odd one among k has share k, the others 0
    return bool(share[(len(share) - 1) // 2] >= 0.5)


def _stream(
    embeddings: ArrayLike, times_s: ArrayLike, num_segments: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x, times = np.array(embeddings, dtype=np.float64), np.array(times_s, dtype=np.float64)
    if x.ndim != 2 or 0 in x.shape or times.shape != x.shape[:1]:
        raise ValueError(f"embeddings {x.shape} and times_s {times.shape} must be [T, D] and [T], T >= 1.")
    if not (np.isfinite(x).all() and np.isfinite(times).all()):
        raise ValueError("embeddings and times_s must be finite; a stream cannot be cut through NaN or inf.")
    if (np.diff(times) <= 0).any():
        first = int((np.diff(times) <= 0).argmax())
        raise ValueError(f"times_s must increase; {times[first + 1]} follows {times[first]} at position {first + 1}.")
    if not 1 <= num_segments <= len(x):
        raise ValueError(f"num_segments={num_segments} must be 1..{len(x)}: no segment is without a window.")
    return x, times


def _split(x: NDArray[np.float64], times: NDArray[np.float64], cuts: Sequence[int]) -> list[Segment]:
    """The segments of a stream that start at window 0 and at `cuts`."""
    segments = []
    for first, end in zip([0, *cuts], [*cuts, len(x)], strict=True):
        start_s = float(times[0] if first == 0 else (times[first - 1] + times[first]) / 2)
        end_s = float(times[-1] if end == len(x) else (times[end - 1] + times[end]) / 2)
        nearest = first + int(np.abs(times[first:end] - (start_s + end_s) / 2).argmin())
        within = x[first:end]
        core = within[1:-1] if end - first > 2 else within
        means = _frozen(within.mean(axis=0)), _frozen(core.mean(axis=0))
        segments.append(Segment(start_s, end_s, *means, _frozen(x[nearest]), end - first))
    return segments


def _frozen(z: NDArray[np.float64]) -> NDArray[np.float32]:
    copy = z.astype(np.float32)
    copy.setflags(write=False)
    return copy


def _cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """0 where one of the two is 0."""
    length = float(np.linalg.norm(a.astype(np.float64)) * np.linalg.norm(b.astype(np.float64)))
    return float(a.astype(np.float64) @ b.astype(np.float64)) / length if length else 0.0
