"""The JEPA term of a training run: what is compared with what, over which pairs, at which weight.

`losses` has the formulas. Here are the choices of a recipe around them: where targets come from, whose pairs meet, the
projector that is thrown away, the weight's schedule; and what of it a resumed run must find again.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedConfig

from ..core.averaging import MovingAverage
from ..core.errors import UserError
from ..core.pairs import compare_pairs
from .arguments import LLMJEPAConfig
from .batching import embed_targets, read
from .tubes import draw_tube, tube_distance

EVALUATION = -1  # the "step" of evaluations: tubes and slices stay the same from one to the next


class Objective:
    """Args: the run's configuration, the width of the hidden states, the device of this rank, the model's dtype."""

    def __init__(
        self, args: LLMJEPAConfig, hidden_size: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self.args = args
        self.average: MovingAverage | None = None
        self.projector: torch.nn.Linear | None = None
        if args.uses_views and args.regularizer is not None and args.projector_dim:
            with torch.random.fork_rng(devices=[]):  # the run's own seed stays unmoved
                torch.random.default_generator.manual_seed(args.seed)  # torch.manual_seed is that of the GPUs as well
                self.projector = torch.nn.Linear(hidden_size, args.projector_dim)
            self.projector.to(device, torch.promote_types(dtype, torch.float32))

    def weight(self, progress: float) -> float:
        """`jepa_weight`, or where the straight line from it to `jepa_weight_end` is at `progress` in 0..1."""
        start, end = self.args.jepa_weight, self.args.jepa_weight_end
        return start if end is None else start + (end - start) * min(progress, 1.0)

    # -- embeddings ---------------------------------------------------------------------------------------------------

    def has_pairs(self, batch: dict[str, Any]) -> bool:
        """Whether this batch has pairs or tubes: not after `lm_rows_only`, not in plain SFT."""
        return "context_at" in batch or "tubes" in batch

    def target_without_gradient(self, model: torch.nn.Module, batch: dict[str, Any]) -> Tensor | None:
        """[P, D] of a target encoder that does not learn: cached (base), or from a forward-only pass, *before* the
        forward pass that learns. None for `target_encoder: self`, whose targets are in the rows."""
        if "target_embedding" in batch:
            embedding: Tensor = batch["target_embedding"]
            return embedding
        if "apart_input_ids" not in batch:
            return None
        if self.average is None:
            return embed_targets(model, batch, layer=self.args.readout_layer)
        with self.average.in_place_of_weights():
            return embed_targets(model, batch, layer=self.args.readout_layer)

    def draw_tubes(self, batch: dict[str, Any], step: int) -> dict[str, Any]:
        """`objective: stp`: a tube per example that is long enough for one, of (seed, step, row of the data set)."""
        tubes, examples = [], []
        places = zip(*(batch[key].tolist() for key in ("lm_at", "content", "index")), strict=True)
        for example, (at, (a, b, c, d), index) in enumerate(places):
            tube = draw_tube([(a, b), (c, d)], self.args.stp_formula, Random(f"{self.args.seed} {step} {index}"))
            if tube is not None:
                tubes.append((0, at, tube))
                examples.append(example)
        owners = torch.tensor(examples, dtype=torch.long, device=batch["lm_at"].device)
        # As a function: Trainer would take tuples in a batch apart.
        return {"tubes": functools.partial(tube_distance, tubes=tubes), "example_of_pair": owners}

    # -- loss ---------------------------------------------------------------------------------------------------------

    def pair_loss(self, hidden: Tensor, batch: dict[str, Any], target: Tensor | None, *, step: int) -> Tensor:
        """States [R, L, D] of the layer that is read -> a loss per pair, [P]."""
        if "tubes" in batch:
            distance: Tensor = batch["tubes"](hidden.flatten(0, 1)[None])
            return distance
        predicted = read(hidden, batch["context_at"])
        if "known_loss" in batch:  # see `compare_all`: the values, and embeddings times their known gradients
            loss: Tensor = batch["known_loss"]
            for name, gradient in batch["known_gradients"].items():
                side = predicted if name == "predicted" else read(hidden, batch["target_at"])
                linear = (side * gradient).sum(dim=-1)
                loss = loss + linear - linear.detach()
            return loss
        target = read(hidden, batch["target_at"]) if target is None else target
        return self.compare(predicted, target, batch["target_key"], step=step)

    def compare(self, predicted: Tensor, target: Tensor, target_key: Tensor, *, step: int) -> Tensor:
        """Embeddings [P, D] -> a loss per pair [P]. Where all pairs meet, those of all ranks do."""
        args = self.args
        if self.projector is not None:
            with torch.autocast(predicted.device.type, enabled=False):
                both = torch.cat([predicted, target]).to(self.projector.weight.dtype)
                predicted, target = self.projector(both).chunk(2)
        return compare_pairs(
            predicted,
            target,
            target_key,
            objective=args.objective,
            temperature=args.temperature,
            regularizer=args.regularizer,
            regularizer_weight=args.regularizer_weight,
            both_sides=args.target_encoder == "self",
            seed=args.seed,
            step=step,
        )

    def compare_all(self, batches: list[dict[str, Any]], found: list[tuple[Tensor, Tensor]], *, step: int) -> None:
        """InfoNCE over all micro-batches and ranks of a step (GradCache, arXiv:2101.06983).

        `found` has the embeddings of each batch, computed without gradient. Their loss and its gradients in them go
        into the batches, where `pair_loss` meets them again: the gradient in the weights is that of one big batch.
        """
        predicted, target = (torch.cat(side).detach() for side in zip(*found, strict=True))
        sides = {"predicted": predicted.requires_grad_()}
        if self.args.target_encoder == "self":
            sides["target"] = target.requires_grad_()
        key = torch.cat([batch["target_key"] for batch in batches])
        loss = self.compare(predicted, target, key, step=step)
        gradients = torch.autograd.grad(loss.sum(), list(sides.values()))
        sizes = [len(batch["target_key"]) for batch in batches]
        parts = [gradient.split(sizes) for gradient in gradients]
        for i, (batch, values) in enumerate(zip(batches, loss.detach().split(sizes), strict=True)):
            batch["known_loss"] = values
            batch["known_gradients"] = {name: part[i] for name, part in zip(sides, parts, strict=True)}

    # -- around the optimizer step, and across runs -------------------------------------------------------------------

    def start_averaging(self, model: torch.nn.Module) -> None:
        if self.args.uses_views and self.args.target_encoder == "ema":
            self.average = MovingAverage(model, self.args.ema_decay)

    def before_optimizer_step(self, reduce_mean: Callable[[Tensor], Tensor]) -> None:
        """What DDP does for the model's gradients, for the projector's."""
        for p in self.projector.parameters() if self.projector is not None else ():
            if p.grad is not None:
                p.grad = reduce_mean(p.grad)

    def after_optimizer_step(self, progress: float) -> None:
        if self.average is not None:
            self.average.update(progress)
        if self.projector is not None:
            self.projector.zero_grad()

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs beside model and optimizer. It is no part of the saved model."""
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


def check_objective(
    args: LLMJEPAConfig, config: PreTrainedConfig, train: Dataset, *, sharded: bool, opaque: bool
) -> None:
    """Raises UserError for what can only be refused once model (its text `config`), data and ranks are there."""
    if not 1 <= abs(args.readout_layer) <= config.num_hidden_layers:
        raise UserError(
            f"readout_layer={args.readout_layer} does not exist: the model has layers 1 to "
            f"{config.num_hidden_layers} (-1 is the last)."
        )
    pairs = args.per_device_train_batch_size * args.world_size
    if args.negatives == "optimizer_step":
        pairs *= args.gradient_accumulation_steps
    # Not in the config: the process that starts the ranks knows nothing of their number.
    if args.objective == "info_nce" and pairs < 2:
        raise UserError(
            "objective: info_nce needs other pairs in the batch as negatives; set per_device_train_batch_size to 2 "
            "or more, negatives: optimizer_step, or objective: cosine."
        )
    if args.regularizer is not None and pairs < (8 if args.regularizer == "sigreg" else 2):
        raise UserError(
            f"regularizer: {args.regularizer} cannot estimate a distribution from {pairs} pair(s) per micro-batch; "
            "raise per_device_train_batch_size."
        )
    if args.objective == "info_nce":
        key = "context_key" if args.direction == "reverse" else "target_key"
        distinct = len(set(train[key]))
        if distinct < min(pairs, len(train)):
            raise UserError(
                f"objective: info_nce needs different targets as negatives, and the training rows have {distinct} "
                f"for batches of {pairs}; use objective: cosine with a regularizer, or smaller batches."
            )
    if args.regularizer is not None:
        if sharded:
            raise UserError(f"regularizer: {args.regularizer} has no sharded projector; use --launch ddp.")
        if not args.projector_dim and pairs < config.hidden_size:
            raise UserError(
                f"regularizer: {args.regularizer} without a projector would judge {config.hidden_size} dimensions "
                f"by {pairs} pairs; set projector_dim: 128, or a batch of {config.hidden_size} pairs."
            )
    if args.target_encoder == "ema" and opaque:
        raise UserError(
            "target_encoder: ema cannot follow weights that DeepSpeed or FSDP version 1 holds; use --launch fsdp2 or "
            "ddp."
        )
    if args.target_encoder == "base" and sharded:
        raise UserError("target_encoder: base embeds its targets before the model is sharded; use --launch ddp.")


@contextlib.contextmanager
def random_numbers_of(name: str, device: torch.device) -> Iterator[None]:
    """Random numbers (dropout) that depend on `name` alone; the run's own do not move."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(Random(name).getrandbits(63))
        yield
