"""Hidden states -> embeddings: read a batch's pairs, or run the model over batches to embed them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..core.diagnostics import evaluating
from ..core.pairs import PairKeys
from .attention import attention_of_views, model_inputs
from .batching import KEYS, KINDS, LM_ROW, Layout, keys_of


def gather_states(hidden: Tensor, at: Tensor) -> Tensor:
    """States [R, L, D] at flat places [P], or averaged over [P, W] places (-1: none) -> [P, D]."""
    flat = hidden.flatten(0, 1)  # [R * L, D]
    if at.dim() == 1:
        return flat[at]
    exists = (at >= 0)[..., None]  # [P, W, 1]
    return (flat[at.clamp(min=0)] * exists).sum(dim=1) / exists.sum(dim=1)


def read_pairs(hidden: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """States [R, L, D] of one layer -> `predicted`, `target`, both [P, D]."""
    return gather_states(hidden, batch["context_at"]), gather_states(hidden, batch["target_at"])


def no_logits(device: torch.device) -> Tensor:
    """A `logits_to_keep` that skips the LM head: even one logit a row would read all of its weights."""
    return torch.empty(0, dtype=torch.long, device=device)


@torch.no_grad()
def embed_targets(model: torch.nn.Module, batch: dict[str, Tensor], *, layer: int = -1) -> Tensor:
    """`target` [P, D] of a batch whose targets lie apart: a forward pass over them alone, without gradient."""
    output = model(
        input_ids=batch["apart_input_ids"],  # [T, L']
        attention_mask=batch["apart_attention_mask"],
        use_cache=False,
        logits_to_keep=no_logits(batch["apart_input_ids"].device),
        output_hidden_states=layer,
    )
    return gather_states(output.hidden_states[layer], batch["target_at"])


@torch.no_grad()
def embed_pairs(
    model: torch.nn.Module,
    base: PreTrainedModel,
    batches: Iterable[dict[str, Tensor]],
    *,
    layout: Layout = "packed",
    layer: int = -1,
) -> tuple[Tensor, Tensor, PairKeys]:
    """`predicted`, `target` [N, D] float32 and the keys [N] of batches with views, in evaluation mode.

    Args:
        model: is called; its training mode is put back afterwards.
        base: the same model without its DDP or PEFT wrapper.
        layout: of the collator that made the batches.
        layer: the hidden state that is read; -1 is the last.
    """
    attention = attention_of_views(layout)
    parts: list[tuple[Tensor, ...]] = []
    with evaluating(model), without_router_loss(base):
        for cpu_batch in batches:
            batch = {key: value.to(base.device) for key, value in cpu_batch.items()}
            inputs = model_inputs(batch, base, attention)
            output = model(**inputs, logits_to_keep=no_logits(base.device), output_hidden_states=layer)
            predicted, target = read_pairs(output.hidden_states[layer], batch)
            parts.append((predicted.float(), target.float(), *(batch[name] for name in KEYS)))
    predicted, target, *keys = (torch.cat(column) for column in zip(*parts, strict=True))
    return predicted, target, keys_of(dict(zip(KEYS, keys, strict=True)))


# -- mixtures of experts ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def without_router_loss(model: PreTrainedModel) -> Iterator[None]:
    """Compute no router loss inside, whatever the config says: it takes the mask of a packed row for padding."""
    config = model.config.get_text_config()
    before = getattr(config, "output_router_logits", None)
    if before:
        config.output_router_logits = False
    try:
        yield
    finally:
        if before:
            config.output_router_logits = before


@contextlib.contextmanager
def router_logits_of(model: PreTrainedModel, enabled: bool) -> Iterator[list[Tensor]]:
    """Collect the router logits of the forward passes inside, one [tokens, experts] per layer, if `enabled`.

    `output_router_logits=True` on the whole model would also compute its own loss, which takes the mask of a packed row
    for padding. Hooks on the decoder ask for the logits alone.
    """
    logits: list[Tensor] = []
    if not enabled:
        yield logits
        return

    def request(module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "output_router_logits": True}

    def collect(module: Any, args: Any, output: Any) -> None:
        logits[:] = output.router_logits

    decoder = model.get_decoder()
    hooks = [decoder.register_forward_pre_hook(request, with_kwargs=True), decoder.register_forward_hook(collect)]
    try:
        yield logits
    finally:
        for hook in hooks:
            hook.remove()


def router_loss(model: PreTrainedModel, router_logits: Sequence[Tensor], batch: dict[str, Tensor]) -> Tensor:
    """The load-balancing loss of a mixture of experts over the tokens of the LM rows alone, as in plain SFT. []"""
    balance = sys.modules[type(model).__module__].load_balancing_loss_func  # each family has its own
    config = model.config.get_text_config()
    lm_tokens = ((batch["doc"] >= 0) & (batch["doc"] % KINDS == LM_ROW)).long()  # [R, L]
    experts = getattr(config, "num_experts", None) or config.num_local_experts
    loss: Tensor = balance(tuple(router_logits), experts, config.num_experts_per_tok, lm_tokens)
    return loss
