"""The plan of an optimizer step of LLM-JEPA: everything that decides what the step does, made once before it runs.

Batches hold tensors only. Whether a step is dropped, what it compares, its random choices and the known gradients of
`negatives: optimizer_step` are in the plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..core.trainer import StepPlan
from .arguments import LLMJEPAConfig
from .attention import Attention, attention_of_lm_rows, attention_of_views
from .batching import Layout
from .tubes import Tubes, draw_tube, stack_tubes
from .views import IGNORE

Compares = Literal["nothing", "views", "tubes", "known"]


class KnownLoss(NamedTuple):
    """The loss of the pairs of one micro-batch among all pairs of the step, and its gradients in the embeddings.

    (GradCache, arXiv:2101.06983.) A first pass without gradient embeds the whole step. The pass that learns then
    multiplies its embeddings by these gradients, so that the gradient in the weights is that of one big batch.
    """

    loss: Tensor  # [P]
    predicted_gradient: Tensor  # [P, D]
    target_gradient: Tensor | None  # [P, D]; None if the target encoder does not learn

    def at(self, predicted: Tensor, target: Tensor | None) -> Tensor:
        """[P]: the known values, with the known gradients in `predicted` and `target` [P, D]."""
        loss = self.loss
        for side, gradient in ((predicted, self.predicted_gradient), (target, self.target_gradient)):
            if side is not None and gradient is not None:
                linear = (side * gradient).sum(dim=-1)
                loss = loss + linear - linear.detach()
        return loss


@dataclass(frozen=True)
class MicroBatch:
    """What the step plan says of one micro-batch."""

    attention: Attention
    example_of_pair: Tensor | None = None  # [P] which example each pair or tube belongs to; None without a JEPA term
    tubes: Tubes | None = None  # objective: stp
    dropout_seed: str | None = None  # negatives: optimizer_step runs the model twice on the same random numbers
    known: KnownLoss | None = None  # negatives: optimizer_step

    @property
    def num_pairs(self) -> int:
        return 0 if self.example_of_pair is None else len(self.example_of_pair)


@dataclass(frozen=True)
class LMStepPlan(StepPlan):
    """What one optimizer step of LLM-JEPA does.

    compares: "nothing" in plain SFT and if the coin of `jepa_dropout` says so; "views"; "tubes" (objective: stp); or
        "known" (negatives: optimizer_step), views whose loss and gradients a first pass has computed.
    labels: [] labels over all micro-batches and ranks, at least 1; divides the LM term.
    micro_batches: in the order in which they run.
    """

    compares: Compares
    labels: Tensor
    micro_batches: tuple[MicroBatch, ...]


def comparison(args: LLMJEPAConfig, *, dropped: bool = False) -> Compares:
    """`LMStepPlan.compares` of a training step. `dropped`: the coin of `jepa_dropout` took the JEPA term out."""
    if dropped or not args.uses_jepa:
        return "nothing"
    if args.objective == "stp":
        return "tubes"
    return "known" if args.negatives == "optimizer_step" else "views"


def plan_micro_batch(
    batch: dict[str, Tensor], args: LLMJEPAConfig, layout: Layout, compares: Compares, *, step: int
) -> MicroBatch:
    """The plan of one micro-batch; for `negatives: optimizer_step` its known loss comes later."""
    if compares in ("views", "known"):
        return MicroBatch(attention_of_views(layout), batch["example_of_pair"])
    attention = attention_of_lm_rows(layout, batch)
    if compares == "tubes":
        tubes, owners = draw_tubes(batch, args, step=step)
        return MicroBatch(attention, owners, tubes)
    return MicroBatch(attention)


def plan_alone(batch: dict[str, Tensor], args: LLMJEPAConfig, layout: Layout, *, step: int) -> LMStepPlan:
    """The plan of a batch that is a step by itself: in evaluation, and for a caller that has no step."""
    compares = comparison(args)
    if compares == "known":
        compares = "views"  # the batch is the whole step
    part = plan_micro_batch(batch, args, layout, compares, step=step)
    labels = count_labels(batch)
    pairs = torch.as_tensor(max(part.num_pairs, 1), device=labels.device)
    return LMStepPlan(step, pairs, compares, labels.clamp(min=1), (part,))


def count_labels(batch: dict[str, Tensor]) -> Tensor:
    """[] labels of a batch; the first token of a row is never predicted."""
    return (batch["labels"][:, 1:] != IGNORE).sum()


def draw_tubes(batch: dict[str, Tensor], args: LLMJEPAConfig, *, step: int) -> tuple[Tubes, Tensor]:
    """`objective: stp`: a tube per example that is long enough, and [n] which example each belongs to.

    A tube depends on (seed, step, row of the data set) only.
    """
    tubes, examples = [], []
    starts, content, index = (batch[key].tolist() for key in ("lm_at", "content", "index"))
    for example, (start, row) in enumerate(zip(starts, index, strict=True)):
        prompt_start, prompt_end, completion_start, completion_end = content[example]
        spans = [(prompt_start, prompt_end), (completion_start, completion_end)]
        tube = draw_tube(spans, args.stp_formula, Random(f"{args.seed} {step} {row}"))
        if tube is not None:
            tubes.append((0, start, tube))  # all rows as one row of R * L tokens
            examples.append(example)
    device = batch["lm_at"].device
    owners = torch.tensor(examples, dtype=torch.long, device=device)
    return stack_tubes(tubes, batch["input_ids"].numel(), device), owners
