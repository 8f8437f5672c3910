"""Simulated streams of embeddings, whose true edges are known."""

from __future__ import annotations

import math

import numpy as np

D = 48
A, B, C = np.eye(D)[:3]


def noisy(rng, centre, count, noise):
    """[count, D]: `noise` is the expected length of what is added."""
    return centre + noise / math.sqrt(D) * rng.standard_normal((count, D))


def push_all(segmenter, embeddings, times=None, *, flush=True):
    times = 0.5 * np.arange(len(embeddings)) if times is None else times
    segments = [closed for z, t in zip(embeddings, times, strict=True) if (closed := segmenter.push(z, t))]
    return segments + [segmenter.flush()] if flush and len(embeddings) else segments


def cuts(segments):
    return [segment.start_s for segment in segments[1:]]


def unit(v):
    return v / np.linalg.norm(v, axis=-1, keepdims=True)


def video(seed, *, window_s=2.0, stride_s=0.5, noise=0.02, frame_noise=0.0, seconds=120, rest_s=(4, 12)):
    """Windows over frames at 8 per second: rests, between them events of 1-1.8 s; each rest a little unlike the last.

    -> embeddings [T, D], centres [T], true edges. `frame_noise` is shared by the windows that share frames.
    """
    rng = np.random.default_rng(seed)

    def like(v, cosine):
        other = rng.standard_normal(D)
        return cosine * v + math.sqrt(1 - cosine**2) * unit(other - other @ v * v)

    rest, frames, edges = unit(rng.standard_normal(D)), [], []
    while len(frames) < seconds * 8:
        frames += [rest] * int(rng.uniform(*rest_s) * 8)
        edges.append(len(frames) / 8)
        frames += [like(rest, 0.5)] * int(rng.uniform(1, 1.8) * 8)
        edges.append(len(frames) / 8)
        rest = like(rest, 0.9)
    width = int(window_s * 8)
    latent = np.array(frames[: seconds * 8])
    latent = latent + frame_noise * math.sqrt(width / D) * rng.standard_normal(latent.shape)
    first = range(0, len(latent) - width + 1, int(stride_s * 8))
    z = np.array([unit(latent[i : i + width].mean(axis=0)) for i in first]) + noise / math.sqrt(
        D
    ) * rng.standard_normal((len(first), D))
    edges = [edge for edge in edges if window_s / 2 < edge < seconds - window_s / 2]
    return unit(z), np.array([(i + width / 2) / 8 for i in first]), edges
