"""Cut a stream of embeddings into scenes, online (`WardSegmenter`) or when it is complete (`segment_offline`).

VL-JEPA (arXiv:2512.10942, section 4.6) embeds sliding windows of a video, clusters the embeddings of the whole video
into N stretches of time and decodes one embedding for each stretch, its mean or the one at its midpoint. That protocol
is `segment_offline`. `segment_uniform` is its baseline and `segment_at` the oracle. A live stream has no end to wait
for: `WardSegmenter` finds the same kind of cuts while windows arrive (the paper only suggests an online rule, section
2).

Two neighbouring stretches of n and k windows with means a and b have the Ward gain

    gain = n k / (n + k) * ||a - b||^2,

the sum of squares saved by keeping them apart. For white noise its expectation is the variance of one window, for every
n and k. For a change it grows with the number of windows that have seen the change.

The time of a window is that of its *centre*, because an embedding says as much about the second half of its window as
about the first. The edge between two segments is halfway between the windows on its sides, so segments cover the stream
without a gap.
Shape legend: T windows, D embedding.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

# The constants of `WardSegmenter`, chosen on simulated streams: rests of 4-12 s between events of 1-1.8 s, windows of
# 2 s every 0.5 s, noise of 2 to 30 % of an embedding's length. There it makes 0.93 to 1.01 cuts for each true one, at
# a boundary F1 (within 1 s) of 0.96 to 0.99. In noise alone, of 16 dimensions or more, it cuts at most once in half an
# hour.
NOISE_FACTOR = 7.0  # 6 sometimes cuts noise in 16 dimensions, 8 misses every seventh cut at 30 % noise
NOISE_QUANTILE = 0.1  # so low because a busy stream has few quiet moments
NOISE_MEMORY = 128  # statistics kept: the noise of the last minute, at two windows a second
WARM_UP = 8  # windows before the first estimate
# Of the squared length of an embedding. A smaller gain is not a change: a still stream would cut on float32 rounding.
ROUNDING = 1e-5
SCATTER = 4.0  # 0 makes 14 cuts a minute if every 8th window is an outlier
AFTERGLOW = 0.04  # 0.02 cuts one change twice, 0.12 misses a quarter of the cuts in rendered frames
MAX_KEPT = 32  # windows remembered of a long scene, for its midpoint
# Seconds. 0.1 + 0.2 is not 0.3 in floats, and a segment of exactly the minimum duration is long enough.
_TIME_ROUNDING_S = 1e-9


@dataclass(frozen=True, eq=False)
class Segment:
    """A scene: neighbouring windows between two edges.

    Args:
        start_s, end_s: its edges, in the time of window centres. A stream starts and ends at a centre, not at an edge.
        embedding: [D] float32, the mean of its windows as given; it is *not* scaled to unit norm again.
        core_embedding: [D] float32, the mean without the first and the last window, if it has three or more. These two
            also show the neighbouring scenes: half of their content, if the event is shorter than a window (ours).
        midpoint_embedding: [D] float32, that of the window nearest to the middle. Of a long segment `WardSegmenter`
            remembers every 2nd, 4th, ... window, so there it may be off by 1/32 of the windows.
        num_windows: number of windows in the mean.
    """

    start_s: float
    end_s: float
    embedding: NDArray[np.float32]
    core_embedding: NDArray[np.float32]
    midpoint_embedding: NDArray[np.float32]
    num_windows: int


class WardSegmenter:
    """Cuts a stream into scenes while it arrives, at O(block * D) a window and with a state that does not grow.

    For every k, the last k <= block windows of the open segment (mean b) are compared with all before them (n windows,
    mean a). The split with the largest Ward gain is the candidate. It becomes a cut if

    1.  gain > threshold, and gain > the two further bounds below;
    2.  more than half of the k windows have come half the way from a to b. One outlier moves b, but leaves the other
        windows at a, so it is not a scene;
    3.  k = block, or the gain has begun to fall. Before that, windows that show more of the new scene still arrive, and
        the best split still moves with them;
    4.  the segment that ends here lasts at least `min_duration_s`.

    Two further bounds:

    *   Scatter. If a share f of the n windows is at a distance d from the others, then k of the others gain k f^2 d^2
        over the mean of all, although the scene has not changed. So the gain must exceed SCATTER * (mean ||z||^2 -
        ||a||^2) = 4 f (1 - f) d^2.
    *   Afterglow. Windows overlap, so the first ones after a cut show both scenes and must not become a segment. After
        a cut of gain g the gain must exceed AFTERGLOW * g * block / n.

    The threshold, unless given, is NOISE_FACTOR * noise / sensitivity. Two statistics of the last windows estimate the
    noise, each by the NOISE_QUANTILE of its last NOISE_MEMORY values:

        p = h / 2 * ||mean of the last h - mean of the h before||^2,  h = block // 2, within the open segment
        q = 1 / 2 * ||last - last but one||^2
        noise = min(p * max(p / q, 1), 2 * block * q)

    For independent noise p = q = the variance of a window, which is then the gain without a change. Windows that
    overlap `block` times move slowly: at block 4, p falls to 3/4 and q to 1/4 of the variance, and the gain rises to
    11/4; p * p / q is 9/4. A busy stream has no quiet stretch for p but quiet moments for q: hence the bound.

    So rotating or scaling the stream does not change the cuts; the threshold scales along. It is at least ROUNDING of
    the mean squared length, and infinite until max(WARM_UP, 2 * block) windows were seen. A large change among these
    windows is still found, but later and less exactly. The same holds in a stream until its first quiet moment.

    Args:
        block: number of windows that show one moment, window / stride. 2 is accepted, 3 or more is advised. With a
            smaller block than window / stride, one change is cut twice (2 cuts with a block of 2 for windows that
            overlap 3 times, 1.5 cuts with 4 for windows that overlap 8 times). The block is also the latency: a cut is
            known at most `block` windows later. Events much shorter than a window cannot be distinguished from each
            other, whatever the block.
        threshold: fixed, from the first window on, in squared units of the embeddings. With unit embeddings, 4 windows
            that turn by 60 degrees after a long rest gain 4. Default: calibrated, as above.
        sensitivity: > 0, divides the calibrated threshold. 2 cuts at half the gain.
        min_duration_s: shortest segment. `flush` may close a shorter one.

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
            raise ValueError(
                f"block={block} is too small: a single outlier would look like a scene change. Use window / stride, at "
                "least 3."
            )
        if threshold is not None and not (threshold >= 0 and math.isfinite(threshold)):
            raise ValueError(f"threshold={threshold} must be a finite number >= 0, or None to calibrate it.")
        if not (sensitivity > 0 and math.isfinite(sensitivity)):
            raise ValueError(f"sensitivity={sensitivity} must be a finite number > 0; 1 is the default.")
        if not (min_duration_s >= 0 and math.isfinite(min_duration_s)):
            raise ValueError(f"min_duration_s={min_duration_s} must be a finite number of seconds >= 0.")
        self._block, self._fixed_threshold = block, threshold
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
        """Take the next window and return the segment that it closes, if any.

        Args:
            embedding: [D], finite. It is copied.
            time_s: of the window's centre, later than that of the window before.

        Raises ValueError for any other embedding or time, or another D, and leaves the state unchanged.
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
        """Close the open segment, as at the end of the stream. It may contain a change younger than `block` windows.

        The noise estimate and the order of time stay. The next window starts a new segment.
        """
        segment = self.open
        self._recent.clear()
        self._start_new(math.nan, gain=0.0)
        return segment

    @property
    def open(self) -> Segment | None:
        """The running segment up to the newest window, if any. A later cut may remove its last windows."""
        if not self._recent:
            return None
        return self._segment(len(self._recent), self._last_s)

    @property
    def threshold(self) -> float:
        """The value that a gain has to exceed now; infinite while warming up."""
        if self._fixed_threshold is not None:
            return self._fixed_threshold
        if self._num_seen < max(WARM_UP, 2 * self._block) or not self._block_statistics or not self._recent:
            return math.inf
        p = float(np.quantile(self._block_statistics, NOISE_QUANTILE))
        q = float(np.quantile(self._lag_statistics, NOISE_QUANTILE))
        noise = min(p * max(p / q, 1), 2 * self._block * q) if q > 0 else 0.0
        rounding = ROUNDING * sum(float(z @ z) for _, z in self._recent) / len(self._recent)
        return max(NOISE_FACTOR * noise / self._sensitivity, rounding)

    def _check(self, z: NDArray[np.float64], time_s: float) -> None:
        if z.ndim != 1 or not len(z) or (self._dim is not None and len(z) != self._dim):
            expected = "D" if self._dim is None else self._dim
            raise ValueError(f"embedding {z.shape} must be one vector [{expected}], as long as all others in a stream.")
        if not np.isfinite(z).all():
            raise ValueError(f"The embedding at {time_s} s is not finite; a stream cannot be cut through NaN or inf.")
        if not (math.isfinite(time_s) and time_s > self._last_s):
            raise ValueError(f"time_s={time_s} does not follow {self._last_s}; push windows in the order of time.")

    def _start_new(self, start_s: float, *, gain: float) -> None:
        """Empty the head; the caller takes care of `_recent`."""
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
        # `_recent` holds the open segment only, so a change that has already been cut does not count as noise.
        if len(self._recent) >= 2 * half:
            x = np.stack([z for _, z in self._recent])  # [<= block, D]
            step = x[-half:].mean(axis=0) - x[-2 * half : -half].mean(axis=0)
            self._block_statistics.append(float(half / 2 * step @ step))

    def _cut(self) -> Segment | None:
        """Find the best split of the open segment, and close the part before it if all four conditions hold."""
        x = np.stack([z for _, z in self._recent])  # [<= block, D], oldest first
        edges = self._edges_before_recent()  # [<= block]
        before = np.arange(len(x))  # [splits] number of windows of `x` before each split
        long_enough = edges - self._start_s >= self._min_duration_s - _TIME_ROUNDING_S
        before = before[(self._num_head + before > 0) & long_enough]
        if not len(before):
            return None
        n, k = self._num_head + before, len(x) - before  # [splits] windows before and after each split
        sums = np.concatenate([np.zeros((1, x.shape[1])), x.cumsum(axis=0)])
        a = (self._head_sum + sums[before]) / n[:, None]  # [splits, D]
        b = (sums[-1] - sums[before]) / k[:, None]  # [splits, D]
        gains = n * k / (n + k) * np.square(b - a).sum(axis=1)  # [splits]
        best = int(gains.argmax())
        gain, split = float(gains[best]), int(before[best])

        squares = self._head_squares + float(np.square(x[:split]).sum())
        scatter = SCATTER * (squares / n[best] - float(a[best] @ a[best]))
        afterglow = AFTERGLOW * self._opening_gain * self._block / n[best]
        # The threshold comes last: its quantiles cost more than everything else here, and are seldom needed.
        surprising = gain > max(scatter, afterglow) and gain > self.threshold
        if not (surprising and _has_moved(x[split:], a[best], b[best])):
            self._rising_gain = 0.0
            return None
        # While the gain still rises, later windows show more of the new scene and may move the best split.
        if k[best] < self._block and gain >= self._rising_gain:
            self._rising_gain = gain
            return None
        edge_s = float(edges[split])
        segment = self._segment(split, edge_s)
        for _ in range(split):
            self._recent.popleft()
        self._start_new(edge_s, gain=gain)
        return segment

    def _edges_before_recent(self) -> NDArray[np.float64]:
        """Times [<= block] halfway between each recent window and the one before it; NaN before the very first one."""
        times = np.array([time_s for time_s, _ in self._recent])
        return (np.concatenate([[self._head_end_s], times[:-1]]) + times) / 2

    def _segment(self, num_recent: int, end_s: float) -> Segment:
        """The open segment up to and including the first `num_recent` of `_recent`."""
        recent = list(self._recent)[:num_recent]
        total = np.asarray(self._head_sum + sum(z for _, z in recent))  # [D]
        num_windows = self._num_head + num_recent
        middle = (self._start_s + end_s) / 2
        windows = self._kept + recent  # the first window of the segment is never thinned out
        _, nearest = min(windows, key=lambda window: abs(window[0] - middle))
        mean = core = total / num_windows
        if num_windows > 2:
            last = recent[-1][1] if recent else self._head_last
            core = (total - windows[0][1] - last) / (num_windows - 2)
        return Segment(self._start_s, end_s, _frozen(mean), _frozen(core), _frozen(nearest), num_windows)


def segment_offline(embeddings: ArrayLike, times_s: ArrayLike, *, num_segments: int) -> list[Segment]:
    """Exactly `num_segments` segments of a whole stream: Ward clustering in which only neighbours in time may merge.

    Starting from one segment per window, the two neighbours of least Ward gain are merged until N are left; if two
    gains are equal, the earlier pair is merged (the paper's adaptive protocol, section 4.6). O(T log T + T D). The
    paper does not say whether embeddings are scaled to unit norm first; here they are not.

    Args:
        embeddings: [T, D], finite.
        times_s: [T], increasing: the centres of the windows.
        num_segments: N, 1..T.

    Raises ValueError for anything else.
    """
    x, times = _stream(embeddings, times_s, num_segments)
    count = len(x)
    # The sum of windows a..b is a difference of two of these. Subtracting the common mean first keeps its digits.
    sums = np.concatenate([np.zeros((1, x.shape[1])), (x - x.mean(axis=0)).cumsum(axis=0)])
    end = list(range(1, count + 1))  # end[a]: of the segment that starts at window a; 0 if none does
    start = [0, *range(count)]  # start[b]: of the segment that ends before window b

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
            continue  # stale: one of the two has merged since this gain was computed
        end[a], end[b], start[c] = c, 0, a
        left -= 1
        if a > 0:
            heapq.heappush(heap, (gain(start[a], a, c), start[a], a, c))
        if c < count:
            heapq.heappush(heap, (gain(a, c, end[c]), a, c, end[c]))
    return _split(x, times, [i for i in range(1, count) if end[i]])


def segment_uniform(embeddings: ArrayLike, times_s: ArrayLike, *, num_segments: int) -> list[Segment]:
    """`num_segments` segments of as equal a number of windows as possible: the paper's baseline, one decode per stride.

    Arguments and errors as for `segment_offline`. The mean is over the stride; the paper does not say over how much.
    """
    x, times = _stream(embeddings, times_s, num_segments)
    return _split(x, times, [i * len(x) // num_segments for i in range(1, num_segments)])


def segment_at(embeddings: ArrayLike, times_s: ArrayLike, *, boundaries_s: Sequence[float]) -> list[Segment]:
    """The segments between given boundaries, as an oracle knows them. A window at a boundary belongs to the later one.

    The edges of the segments are between windows, so up to half a stride off the boundaries.

    Raises ValueError if a segment would have no window, and as `segment_offline`.
    """
    x, times = _stream(embeddings, times_s, 1)
    cuts = [int(i) for i in np.searchsorted(times, np.asarray(boundaries_s, dtype=np.float64), side="left")]
    for before, after in zip([0, *cuts], [*cuts, len(x)], strict=True):
        if after <= before:
            raise ValueError(
                f"One of the segments of boundaries_s has no window (near {times[min(before, len(x) - 1)]} s): "
                "sort the boundaries, use a smaller stride, or leave out segments shorter than a stride."
            )
    return _split(x, times, cuts)


class BoundaryScore(NamedTuple):
    precision: float
    recall: float
    f1: float


def boundary_f1(found_s: Sequence[float], true_s: Sequence[float], *, tolerance_s: float) -> BoundaryScore:
    """Precision, recall and F1 of found boundaries. A found and a true one match if at most `tolerance_s` apart.

    Each boundary matches at most one other; the matching is the largest possible. All three are 1 if both lists are
    empty, and 0 if one of them is.

    Raises ValueError for a negative or non-finite tolerance.
    """
    if not (tolerance_s >= 0 and math.isfinite(tolerance_s)):
        raise ValueError(f"tolerance_s={tolerance_s} must be a finite number of seconds >= 0.")
    found, true = sorted(found_s), sorted(true_s)
    if not found and not true:
        return BoundaryScore(1.0, 1.0, 1.0)
    if not found or not true:
        return BoundaryScore(0.0, 0.0, 0.0)
    matched = i = j = 0
    while i < len(found) and j < len(true):  # the tolerance is the same for all, so the earliest partner is best
        if abs(found[i] - true[j]) <= tolerance_s:
            matched, i, j = matched + 1, i + 1, j + 1
        elif found[i] < true[j]:
            i += 1
        else:
            j += 1
    return BoundaryScore(matched / len(found), matched / len(true), 2 * matched / (len(found) + len(true)))


def _has_moved(x: NDArray[np.float64], a: NDArray[np.float64], b: NDArray[np.float64]) -> bool:
    """Whether most of the windows `x` [k, D], whose mean is `b`, have come half the way from `a` to `b`."""
    way = b - a
    share = np.sort((x - a) @ way / (way @ way))  # [k], mean 1; a single outlier has share k, and the others have 0
    return bool(share[(len(share) - 1) // 2] >= 0.5)


def _stream(
    embeddings: ArrayLike, times_s: ArrayLike, num_segments: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Checked float64 copies: embeddings [T, D] and times [T]."""
    x, times = np.array(embeddings, dtype=np.float64), np.array(times_s, dtype=np.float64)
    if x.ndim != 2 or 0 in x.shape or times.shape != x.shape[:1]:
        raise ValueError(f"embeddings {x.shape} and times_s {times.shape} must be [T, D] and [T], T >= 1.")
    if not (np.isfinite(x).all() and np.isfinite(times).all()):
        raise ValueError("embeddings and times_s must be finite; a stream cannot be cut through NaN or inf.")
    if (np.diff(times) <= 0).any():
        first = int((np.diff(times) <= 0).argmax())
        raise ValueError(f"times_s must increase; {times[first + 1]} follows {times[first]} at position {first + 1}.")
    if not 1 <= num_segments <= len(x):
        raise ValueError(f"num_segments={num_segments} must be 1..{len(x)}: every segment needs a window.")
    return x, times


def _split(x: NDArray[np.float64], times: NDArray[np.float64], cuts: Sequence[int]) -> list[Segment]:
    """The segments of a stream that start at window 0 and at `cuts`."""
    # [T + 1]: edges[i] is before window i. The stream itself starts and ends at the centre of a window.
    edges = np.concatenate([times[:1], (times[:-1] + times[1:]) / 2, times[-1:]])
    segments = []
    for first, end in zip([0, *cuts], [*cuts, len(x)], strict=True):
        start_s, end_s = float(edges[first]), float(edges[end])
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
