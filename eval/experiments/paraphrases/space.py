"""What a model's embedding space is good for: picking among sampled answers, and abstaining."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_jepa import generate
from llm_jepa.lm import JEPACollator, add_view_columns, known_predictor_ids
from llm_jepa.synthetic import nl_rx as generator

from ... import graders
from ..reranking import Similarity, contrastive_head, embedded, log_probabilities, rerank, risk_coverage, sample
from ..small_runs import MAX_NEW_TOKENS
from .arms import ARMS, training_rows
from .data import Line, messages, prepared, prompts_of

Scores = list[list[float]]  # by line: the greedy answer, then the samples


def uses_of_the_space(
    arm: str,
    seed: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lines: Sequence[Line],
    readout: str,
    work: Path,
    plan: dict[str, Any],
) -> dict[str, Any]:
    """Reranking and abstention on the turk wording, by similarity, log-probability and vote."""
    answers = _answers(model, tokenizer, lines, plan["rerank"]["samples"], seed)
    correct, keys = _graded(lines, answers)
    collator = JEPACollator(tokenizer.pad_token_id, known_predictor_ids(tokenizer), readout=readout)
    similarity = _similarity(arm, seed, model, collator, work, plan["labels"])
    scores = _scored(lines, answers, model, tokenizer, collator, similarity)
    scores["votes"] = _votes(keys)
    greedy, samples = [row[0] for row in correct], [row[1:] for row in correct]
    figures: dict[str, Any] = {
        "lines": len(lines),
        "greedy": statistics.mean(greedy),
        "any_sample": statistics.mean(any(row) for row in samples),
        "reranked": {},
        "abstention": {},
    }
    for name, score in scores.items():
        figures["reranked"][name] = rerank([row[1:] for row in score], samples)
        figures["abstention"][name] = risk_coverage([row[0] for row in score], greedy)
    return figures


def _answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, lines: Sequence[Line], num_samples: int, seed: int
) -> list[list[str]]:
    """By line: the greedy answer, then the samples."""
    prompts = prompts_of(lines, "turk")
    greedy = generate(model, tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS, batch_size=256)
    samples = sample(model, tokenizer, prompts, num_samples=num_samples, max_new_tokens=MAX_NEW_TOKENS, seed=seed)
    return [[one.text, *more] for one, more in zip(greedy, samples, strict=True)]


def _graded(lines: Sequence[Line], answers: list[list[str]]) -> tuple[list[list[bool]], list[list[Any]]]:
    """(is it right?, key of its meaning) of every answer, by line."""
    correct, keys = [], []
    for line, texts in zip(lines, answers, strict=True):
        grades = [graders.regex(line.regex, text, True) for text in texts]
        correct.append([grade.scores["equivalent"] == 1 for grade in grades])
        keys.append([grade.answer_key for grade in grades])
    return correct, keys


def _similarity(
    arm: str, seed: int, model: PreTrainedModel, collator: JEPACollator, work: Path, num_labels: int
) -> Similarity:
    """The cosine of the JEPA term, if the arm has one. Otherwise a contrastive head on the frozen states.

    The head is trained on the rows of the arm, so it sees the same number of labels.
    """
    if ARMS[arm].pairs != "none":
        return F.cosine_similarity
    rows = training_rows(ARMS[arm], seed, prepared(work).views, num_labels=num_labels).rows
    predicted, target = embedded(model, rows, collator)
    target_key, context_key = torch.tensor(rows["target_key"]), torch.tensor(rows["context_key"])
    return contrastive_head(predicted, target, target_key, context_key=context_key, seed=seed)


def _scored(
    lines: Sequence[Line],
    answers: list[list[str]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    collator: JEPACollator,
    similarity: Similarity,
) -> dict[str, Scores]:
    """Similarity and log-probability of every answer. Each different answer of a line is computed once."""
    distinct = []  # (line number, answer)
    for i, texts in enumerate(answers):
        distinct += [(i, text) for text in dict.fromkeys(texts) if text]
    views = []
    for i, text in distinct:
        row = {"messages": messages(generator.SYSTEM_PROMPT, lines[i].turk, text)}
        views.append(add_view_columns(row, i, tokenizer=tokenizer))
    values = {
        "similarity": similarity(*embedded(model, views, collator)).tolist(),
        "log_probability": log_probabilities(model, views, tokenizer.pad_token_id).tolist(),
    }
    scores: dict[str, Scores] = {}
    for name, of_distinct in values.items():
        score_of = dict(zip(distinct, of_distinct, strict=True))
        # An empty answer has no view, so it scores worst.
        scores[name] = [[score_of.get((i, text), -math.inf) for text in texts] for i, texts in enumerate(answers)]
    return scores


def _votes(keys: list[list[Any]]) -> Scores:
    """By line, for every answer: how many samples mean the same. The greedy answer does not vote."""
    votes: Scores = []
    for of_line in keys:
        samples = of_line[1:]
        votes.append([float(samples.count(key)) for key in of_line])
    return votes
