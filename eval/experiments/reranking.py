"""Can a checkpoint's own embeddings separate its right answers from its wrong ones?

Two uses of the same samples: *reranking* (which of 8 sampled answers?) and *abstention* (answer at all?). Each is tried
with embedding similarity, log-probability and majority vote. For a model without a JEPA term, the similarity comes from
a contrastive head that is trained on its frozen states afterwards. So the term is compared with an alternative that
needs no change of training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from llm_jepa import info_nce
from llm_jepa.core.decoding import generate_as_asked
from llm_jepa.core.diagnostics import evaluating
from llm_jepa.lm import (
    IGNORE,
    JEPACollator,
    decode_tokens,
    embed_pairs,
    encode,
    form_of,
    known_predictor_ids,
    model_inputs,
    turn_end,
)

Similarity = Callable[[Tensor, Tensor], Tensor]  # predicted, target [N, D] -> [N]
BATCH = 64


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[dict[str, Any]]],
    *,
    num_samples: int,
    max_new_tokens: int,
    seed: int,
) -> list[list[str]]:
    """Sample `num_samples` answers to each prompt at temperature 1, from all tokens except predictor tokens."""
    end = turn_end(tokenizer)
    decoding = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=num_samples,
        max_new_tokens=max_new_tokens,
        eos_token_id=end.ids,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=known_predictor_ids(tokenizer) or None,
    )
    encoded = encode(tokenizer, prompts, form_of(model.config))
    torch.manual_seed(seed)
    samples: list[list[str]] = []
    for start in range(0, len(encoded), BATCH):
        batch = {"input_ids": encoded[start : start + BATCH]}
        inputs = tokenizer.pad(batch, padding_side="left", return_tensors="pt").to(model.device)
        with evaluating(model):
            output = generate_as_asked(model, decoding, **inputs)
        rows = output[:, inputs["input_ids"].shape[1] :].tolist()
        answers = [decode_tokens(tokenizer, row, end).text for row in rows]
        samples += [answers[i : i + num_samples] for i in range(0, len(answers), num_samples)]
    return samples


@torch.inference_mode()
def log_probabilities(model: PreTrainedModel, views: Sequence[dict[str, Any]], pad_token_id: int) -> Tensor:
    """[N] mean log-probability, in nats a token, of each row's completion with its end of turn.

    views: rows with the columns of `add_view_columns`.
    """
    model.eval()
    means = []
    for start in range(0, len(views), BATCH):
        rows = JEPACollator(pad_token_id, with_views=False)(list(views[start : start + BATCH]))
        batch = {name: value.to(model.device) for name, value in rows.items()}
        logits = model(**model_inputs(batch, model, "rows")).logits[:, :-1].float()
        label = batch["labels"][:, 1:]
        token = logits.log_softmax(dim=-1).gather(-1, label.clamp(min=0)[..., None])[..., 0]
        has_label = label != IGNORE
        means.append(token.masked_fill(~has_label, 0).sum(dim=1) / has_label.sum(dim=1))
    return torch.cat(means)


def embedded(
    model: PreTrainedModel, views: Sequence[dict[str, Any]] | Dataset, collator: JEPACollator
) -> tuple[Tensor, Tensor]:
    """(`predicted`, `target`), both [N, D], of rows of views."""
    predicted, target, _ = embed_pairs(model, model, map(collator, _batches(views, 128)))
    return predicted, target


def _batches(views: Sequence[dict[str, Any]] | Dataset, size: int) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, len(views), size):
        yield [views[i] for i in range(start, min(start + size, len(views)))]


def contrastive_head(
    predicted: Tensor,
    target: Tensor,
    target_key: Tensor,
    *,
    context_key: Tensor | None = None,
    dim: int = 64,
    steps: int = 500,
    seed: int = 0,
) -> Similarity:
    """Train one linear map for each side with InfoNCE (temperature 0.07) on frozen states [N, D] of pairs.

    target_key, context_key: [N] ints, see `info_nce`. A batch draws with replacement, so it may hold a pair twice;
    without `context_key`, all N pairs have different contexts.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sides = torch.nn.ModuleList(torch.nn.Linear(predicted.shape[1], dim) for _ in range(2)).to(predicted.device)
    optimizer = torch.optim.AdamW(sides.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    contexts = torch.arange(len(predicted)) if context_key is None else context_key
    target_key, contexts = target_key.to(predicted.device), contexts.to(predicted.device)
    for _ in range(steps):
        batch = torch.randint(len(predicted), (128,), generator=generator).to(predicted.device)
        z, s = sides[0](predicted[batch]), sides[1](target[batch])
        loss = info_nce(z, s, target_key=target_key[batch], context_key=contexts[batch]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return lambda one, other: F.cosine_similarity(sides[0](one), sides[1](other)).detach()


def rerank(scores: Sequence[Sequence[float]], correct: Sequence[Sequence[bool]]) -> float:
    """The accuracy of the sample with the best score of each group. Of equal scores the first one counts."""
    best = [row[int(np.argmax(score))] for score, row in zip(scores, correct, strict=True)]
    return float(np.mean(best))


def risk_coverage(scores: Sequence[float], correct: Sequence[bool]) -> dict[str, float]:
    """Risk and coverage if the answers with the best scores are given first.

    `aurc` is the mean error over all coverages 1/n .. 1 (Geifman et al. 2019, arXiv:1805.08206); smaller is better.
    `accuracy_at_half` is the accuracy of the better half. Equal scores share their mean error, so their order does not
    matter.
    """
    score, wrong = np.asarray(scores, dtype=np.float64), 1.0 - np.asarray(correct, dtype=np.float64)
    _, group = np.unique(-score, return_inverse=True)
    mean_of_group = np.bincount(group, wrong) / np.bincount(group)
    risk = np.cumsum(mean_of_group[np.sort(group)]) / np.arange(1, len(score) + 1)
    return {"aurc": float(risk.mean()), "accuracy_at_half": float(1 - risk[(len(score) + 1) // 2 - 1])}
