"""The JEPA term of a training run: what a step compares, over which pairs, at which weight.

`core.losses` has the formulas and `core.pairs` brings the pairs of all ranks together. Here are the choices that a
recipe makes around them (`JEPATerm`: the source of the targets, the projector that is thrown away, the schedule of the
weight), and the forward pass that turns a micro-batch into losses (`LLMJEPALoss`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ..core.averaging import MovingAverage
from ..core.losses import at_least_float32
from ..core.pairs import PairKeys, compare_pairs
from .arguments import LLMJEPAConfig
from .attention import model_inputs
from .batching import keys_of
from .plan import KnownLoss, LMStepPlan, MicroBatch
from .reading import embed_targets, gather_states, no_logits, router_logits_of, router_loss
from .token_nll import token_nll
from .tubes import tube_distance
from .views import IGNORE


class JEPATerm:
    """Args: the configuration of the run, the width of the hidden states, the device of this rank, the dtype."""

    def __init__(
        self, args: LLMJEPAConfig, hidden_size: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self.args = args
        self.average: MovingAverage | None = None
        self.projector: torch.nn.Linear | None = None
        if args.uses_views and args.regularizer is not None and args.projector_dim:
            with torch.random.fork_rng(devices=[]):  # the run's own random numbers stay as they are
                # Not torch.manual_seed, which would seed the GPUs as well.
                torch.random.default_generator.manual_seed(args.seed)
                self.projector = torch.nn.Linear(hidden_size, args.projector_dim)
            self.projector.to(device, torch.promote_types(dtype, torch.float32))

    def weight(self, progress: float) -> float:
        """`jepa_weight`; with `jepa_weight_end`, the point at `progress` (0 to 1) of the straight line between them."""
        start, end = self.args.jepa_weight, self.args.jepa_weight_end
        return start if end is None else start + (end - start) * min(progress, 1.0)

    # -- what is compared ---------------------------------------------------------------------------------------------

    def fixed_target(self, model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor | None:
        """[P, D] of a target encoder that does not learn; None if the targets are in the rows (`target_encoder: self`).

        Cached (base), or from a forward pass without gradient. Call it *before* the forward pass that learns.
        """
        if self.args.target_placement == "inside":
            return None
        if self.args.target_placement == "cached":
            return batch["target_embedding"]
        if self.average is None:
            return embed_targets(model, batch, layer=self.args.readout_layer)
        with self.average.in_place_of_weights():
            return embed_targets(model, batch, layer=self.args.readout_layer)

    def compare(self, predicted: Tensor, target: Tensor, keys: PairKeys, *, step: int) -> Tensor:
        """Embeddings [P, D] of pairs -> a loss per pair [P], among those of all ranks if the objective asks for it."""
        args = self.args
        if self.projector is not None:
            with torch.autocast(predicted.device.type, enabled=False):
                both = torch.cat([predicted, target]).to(self.projector.weight.dtype)  # [2 P, D]
                predicted, target = self.projector(both).chunk(2)
        return compare_pairs(
            predicted,
            target,
            keys.target,
            context_key=keys.context,
            objective=args.objective,
            temperature=args.temperature,
            regularizer=args.regularizer,
            regularizer_weight=args.regularizer_weight,
            both_sides=args.target_encoder == "self",
            seed=args.seed,
            step=step,
        )

    def compare_step(self, embeddings: list[tuple[Tensor, Tensor]], keys: PairKeys, *, step: int) -> list[KnownLoss]:
        """InfoNCE over all micro-batches and ranks of a step, as known losses of each micro-batch.

        Args:
            embeddings: `predicted`, `target` [P, D] of each micro-batch, computed without gradient.
            keys: of the pairs of all micro-batches, in their order.
        """
        predicted, target = (torch.cat(side).detach() for side in zip(*embeddings, strict=True))
        sides = [predicted.requires_grad_()]
        if self.args.target_encoder == "self":
            sides.append(target.requires_grad_())
        loss = self.compare(predicted, target, keys, step=step)
        gradients = torch.autograd.grad(loss.sum(), sides)
        sizes = [len(side) for side, _ in embeddings]
        losses = loss.detach().split(sizes)
        by_batch = [gradient.split(sizes) for gradient in gradients]  # predicted, and perhaps target
        known = []
        for i in range(len(sizes)):
            target_gradient = by_batch[1][i] if len(by_batch) > 1 else None
            known.append(KnownLoss(losses[i], by_batch[0][i], target_gradient))
        return known

    # -- around the optimizer step, and across runs -------------------------------------------------------------------

    def start_averaging(self, model: torch.nn.Module) -> None:
        if self.args.uses_views and self.args.target_encoder == "ema":
            self.average = MovingAverage(model, self.args.ema_decay)

    def before_optimizer_step(self, reduce_mean: Callable[[Tensor], Tensor]) -> None:
        """Average the gradients of the projector over ranks, as DDP does for the model."""
        for p in self.projector.parameters() if self.projector is not None else ():
            if p.grad is not None:
                p.grad = reduce_mean(p.grad)

    def after_optimizer_step(self, progress: float) -> None:
        """Update the moving average and clear the gradients of the projector."""
        if self.average is not None:
            self.average.update(progress)
        if self.projector is not None:
            self.projector.zero_grad()

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs besides model and optimizer. It is not a part of the saved model."""
        state = self.average.state() if self.average is not None else {}
        if self.projector is not None:
            state |= {f"projector.{name}": value for name, value in self.projector.state_dict().items()}
        return state

    def load(self, state: dict[str, Tensor]) -> None:
        if self.average is not None:
            self.average.load(state)
        if self.projector is not None:
            prefix = "projector."
            self.projector.load_state_dict(
                {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            )


class Losses(NamedTuple):
    """The losses of one micro-batch, before anything is averaged."""

    token_nll: Tensor  # [labels] negative log-likelihood in nats, float32 (float64 of a float64 model)
    label_at: Tensor  # [labels] the flat place in [R * L] that predicts each label
    pair_loss: Tensor | None  # [P]; None without a JEPA term
    router_loss: Tensor | None  # [] of a mixture of experts
    num_tokens: Tensor  # [] real tokens, views included


@dataclass(frozen=True)
class LLMJEPALoss:
    """One collated micro-batch -> its losses, in one forward pass of the model.

    Args:
        args: the configuration of the run.
        base_model: the model without the wrappers of PEFT and DDP.
        term: the JEPA term of the run.
        masked_ids: ids of predictor tokens, which are inputs and never outputs.
        balances_experts: whether a mixture of experts gets its load-balancing loss.
    """

    args: LLMJEPAConfig
    base_model: PreTrainedModel
    term: JEPATerm
    masked_ids: list[int]
    balances_experts: bool

    def __call__(self, model: torch.nn.Module, batch: dict[str, Tensor], plan: LMStepPlan, part: MicroBatch) -> Losses:
        """`model` is the wrapped model. Logits are computed at label positions only."""
        next_token = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)  # [R, L]
        has_label = next_token != IGNORE  # [R, L]
        fixed_target = self.term.fixed_target(model, batch) if plan.compares == "views" else None  # [P, D]
        with (
            seeded_dropout(part.dropout_seed, batch["doc"].device),
            router_logits_of(self.base_model, self.balances_experts) as router_logits,
        ):
            output = self._run(model, batch, part, has_label)
        pair_loss = None
        if plan.compares != "nothing":
            hidden = output.hidden_states[self.args.readout_layer]  # [R, L, D]
            pair_loss = self._pair_loss(hidden, batch, fixed_target, plan, part)
        num_tokens = (batch["doc"] >= 0).sum()
        if plan.compares != "nothing" and self.args.target_placement == "apart":
            num_tokens = num_tokens + batch["apart_attention_mask"].sum()
        return Losses(
            token_nll=self._token_nll(output.logits, next_token[has_label]),
            label_at=has_label.flatten().nonzero()[:, 0],
            pair_loss=pair_loss,
            router_loss=router_loss(self.base_model, router_logits, batch) if router_logits else None,
            num_tokens=num_tokens,
        )

    def _run(self, model: torch.nn.Module, batch: dict[str, Tensor], part: MicroBatch, logits_to_keep: Tensor) -> Any:
        """One forward pass, which keeps the hidden state that is read and no other."""
        inputs = model_inputs(batch, self.base_model, part.attention)
        if part.example_of_pair is not None:
            inputs["output_hidden_states"] = self.args.readout_layer
        if self.balances_experts:
            inputs["output_router_logits"] = False  # `router_logits_of` collects them
        return model(**inputs, logits_to_keep=logits_to_keep)

    def _token_nll(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits at label positions and [labels] their tokens -> negative log-likelihoods [labels].

        Predictor tokens are impossible outputs: without their logits the LM term is that of the baseline.
        """
        masked_ids = torch.tensor(self.masked_ids, dtype=torch.long, device=logits.device)
        return token_nll(logits.reshape(-1, logits.shape[-1]), labels, masked_ids)

    def _pair_loss(
        self, hidden: Tensor, batch: dict[str, Tensor], fixed_target: Tensor | None, plan: LMStepPlan, part: MicroBatch
    ) -> Tensor:
        """States [R, L, D] of the layer that is read -> a loss per pair, or per tube, [P]."""
        if part.tubes is not None:
            return tube_distance(hidden, part.tubes)
        predicted = gather_states(hidden, batch["context_at"])  # [P, D]
        target = fixed_target
        if self.args.target_placement == "inside":
            target = gather_states(hidden, batch["target_at"])  # [P, D]
        if part.known is not None:
            return part.known.at(predicted, target)
        assert target is not None
        return self.term.compare(predicted, target, keys_of(batch), step=plan.step)

    @torch.no_grad()
    def embed(self, model: torch.nn.Module, batch: dict[str, Tensor], part: MicroBatch) -> tuple[Tensor, Tensor]:
        """`predicted`, `target` [P, D] without gradient, on the random numbers that the pass with gradient will use."""
        device = batch["doc"].device
        with seeded_dropout(part.dropout_seed, device):
            hidden = self._run(model, batch, part, no_logits(device)).hidden_states[self.args.readout_layer]
            target = self.term.fixed_target(model, batch)  # last, because the second pass does not run it again
        if target is None:
            target = gather_states(hidden, batch["target_at"])
        return at_least_float32(gather_states(hidden, batch["context_at"])), at_least_float32(target)


def sums_of_examples(losses: Losses, batch: dict[str, Tensor], part: MicroBatch) -> Tensor:
    """[B, 4]: the LM loss, labels, pair loss and pairs of each example of a micro-batch."""
    # A label belongs to the last LM row that starts before it.
    starts, order = batch["lm_at"].sort()  # [B] each
    example_of_label = order[torch.searchsorted(starts, losses.label_at, right=True) - 1]  # [labels]
    sums = losses.token_nll.new_zeros(4, len(starts))  # [4, B]
    sums[0].index_add_(0, example_of_label, losses.token_nll)
    sums[1] += torch.bincount(example_of_label, minlength=len(starts))
    if losses.pair_loss is not None and part.example_of_pair is not None:
        sums[2].index_add_(0, part.example_of_pair, losses.pair_loss.to(sums))
        sums[3] += torch.bincount(part.example_of_pair, minlength=len(starts))
    return sums.T


@contextlib.contextmanager
def seeded_dropout(name: str | None, device: torch.device) -> Iterator[None]:
    """Seed dropout from `name` inside the block; restore the run's random state afterwards. None changes nothing."""
    if name is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(Random(name).getrandbits(63))
        yield
