"""Accuracy of a VL-JEPA on ShapeStream: kinds of event, retrieval and questions."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llm_jepa.synthetic import shapestream as world
from llm_jepa.vl import VLJEPA

SIZE = 40  # pixels
QUERY = "what happens in the video?"
FIRST_MEASURED = 4_000_000  # number of the first clip of a split; the stages were chosen while looking at earlier clips


def measure(model: VLJEPA, split: str, wordings: str, *, num_clips: int, seed: int = 0) -> dict[str, Any]:
    """The kind of event (13-way), text to video retrieval of the same event, and questions by candidates.

    Kinds follow CLIP's protocol: the embedding of a kind is the mean of its wordings. `kind_accuracy_one_wording` takes
    one random wording of each kind instead.
    """
    rng = random.Random(seed)
    clips = [world.clip(FIRST_MEASURED + i, split=split, size=SIZE) for i in range(num_clips)]
    features = encode(model, [clip.frames for clip in clips])
    predicted = predict(model, features, list(range(num_clips)), [QUERY] * num_clips)  # [clips, D]
    by_mean, by_one = _kinds_right(model, clips, predicted, wordings, rng)
    ranks = _retrieval_ranks(model, clips, predicted, wordings, rng)
    questions = _question_accuracy(model, clips, features)
    kinds = {}
    for kind in world.KINDS:
        right = [hit for hit, clip in zip(by_mean, clips, strict=True) if clip.event.kind == kind]
        if right:
            kinds[kind] = float(np.mean(right))
    return {
        "num_clips": num_clips,
        "wordings": wordings,
        "kind_accuracy": float(np.mean(by_mean)),
        "kind_accuracy_one_wording": float(np.mean(by_one)),
        "same_event_recall_at_1": float(np.mean([rank == 0 for rank in ranks])),
        "same_event_recall_at_10": float(np.mean([rank < 10 for rank in ranks])),
        "questions": questions,
        "questions_mean": float(np.mean(list(questions.values()))),
        "kinds": kinds,
    }


def _kinds_right(
    model: VLJEPA, clips: Sequence[world.Clip], predicted: Tensor, wordings: str, rng: random.Random
) -> tuple[list[bool], list[bool]]:
    """For each clip: is its kind right, by the mean of the wordings of a kind, and by one wording of each?"""
    prompts = list(itertools.chain.from_iterable(kind_prompts(clip, wordings) for clip in clips))
    means = torch.stack([F.normalize(embed(model, texts).mean(dim=0), dim=-1) for texts in prompts])
    ones = embed(model, [rng.choice(texts) for texts in prompts])
    right = []
    for embeddings in (means, ones):
        chosen = nearest(predicted, embeddings.unflatten(0, (len(clips), -1)))
        right.append([world.KINDS[kind] == clip.event.kind for kind, clip in zip(chosen, clips, strict=True)])
    by_mean, by_one = right
    return by_mean, by_one


def kind_prompts(clip: world.Clip, wordings: str) -> list[list[str]]:
    """The captions of each kind, about the things of the event. If it has fewer, other things of the scene are used."""
    event = clip.event
    others = [thing for thing in (*clip.objects, *world.THINGS) if thing != event.actor]
    actor = event.actor or others[0]
    patient = event.patient or next(thing for thing in others if thing != actor)
    prompts = []
    for kind in world.KINDS:
        roles = world.NUM_ROLES[kind]
        things = (actor, patient)[:roles]
        prompts.append(world.captions(world.Event(kind, 0.0, 1.0, *things), wordings=wordings))
    return prompts


def _retrieval_ranks(
    model: VLJEPA, clips: Sequence[world.Clip], predicted: Tensor, wordings: str, rng: random.Random
) -> list[int]:
    """For the caption of each clip: the rank of the first clip with the same event. 0 is the best."""
    texts = [rng.choice(world.captions(clip.event, wordings=wordings)) for clip in clips]
    order = (embed(model, texts) @ predicted.T).argsort(dim=1, descending=True)
    events = [(clip.event.kind, clip.event.actor, clip.event.patient) for clip in clips]
    ranks = []
    for event, row in zip(events, order.tolist(), strict=True):
        ranks.append(next(rank for rank, clip in enumerate(row) if events[clip] == event))
    return ranks


def _question_accuracy(model: VLJEPA, clips: Sequence[world.Clip], features: Tensor) -> dict[str, float]:
    """The share of right answers by kind of question. An answer is the candidate nearest to the prediction."""
    numbers: list[int] = []
    questions: list[world.Question] = []
    for number, clip in enumerate(clips):
        questions += clip.questions
        numbers += [number] * len(clip.questions)
    predicted = predict(model, features, numbers, [question.question for question in questions])
    by_kind: dict[str, list[bool]] = {}
    for embedding, question in zip(predicted, questions, strict=True):
        best = int((embed(model, question.candidates) @ embedding).argmax())
        by_kind.setdefault(question.kind, []).append(question.candidates[best] == question.answer)
    return {kind: float(np.mean(hits)) for kind, hits in sorted(by_kind.items())}


_EMBEDDED: dict[tuple[int, str], Tensor] = {}


def embed(model: VLJEPA, texts: Sequence[str]) -> Tensor:
    """[N, D]. Each text is embedded once in a process, because candidates repeat."""
    new = sorted({text for text in texts if (id(model), text) not in _EMBEDDED}, key=len)
    for text, embedding in zip(new, model.embed_texts(new), strict=True):
        _EMBEDDED[id(model), text] = embedding
    return torch.stack([_EMBEDDED[id(model), text] for text in texts])


@torch.no_grad()
def encode(model: VLJEPA, clips: Sequence[np.ndarray]) -> Tensor:
    """[clips, N, D]: visual features."""
    batches = (model.processor(videos=clips[i : i + 32])["pixel_values_videos"] for i in range(0, len(clips), 32))
    return torch.cat([model.model.encode_frames(pixels) for pixels in batches])


@torch.no_grad()
def predict(model: VLJEPA, features: Tensor, clip_of_query: Sequence[int], queries: Sequence[str]) -> Tensor:
    """[B, D] of unit norm. Queries of one clip share its features."""
    parts = []
    for start in range(0, len(queries), 128):
        batch = model.processor(query=queries[start : start + 128])
        clips, clip_of_row = torch.tensor(clip_of_query[start : start + 128]).unique(return_inverse=True)
        parts.append(model.model.predict(features[clips], batch["query_ids"], batch["query_mask"], clip_of_row))
    return F.normalize(torch.cat(parts), dim=-1)


def nearest(predicted: Tensor, candidates: Tensor) -> list[int]:
    """For each row of [B, D]: the number of the nearest of its own candidates [B, K, D]."""
    numbers: list[int] = torch.einsum("bd,bkd->bk", predicted, candidates).argmax(dim=1).tolist()
    return numbers
