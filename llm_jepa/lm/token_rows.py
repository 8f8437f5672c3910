"""Rows of the embedding and the head for tokens that a model does not have yet: how they start, and who trains them.

Both arms of a comparison use this: an added token of the user starts from the same row with and without a JEPA term.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..core.errors import UserError

logger = logging.get_logger(__name__)


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that a model needs for every token: the largest id + 1. (`len` is smaller if ids have gaps.)"""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def add_missing_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Give every token of the tokenizer a row, in place, and return the ids whose rows are new.

    A second call changes nothing.
    """
    size = model.get_input_embeddings().weight.shape[0]
    new = sorted(token for token in tokenizer.get_vocab().values() if token >= size)
    if new:
        grow(model, vocabulary_size(tokenizer))
        draw_rows(model, new, known=size, seed=1)
        names = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(new[:3])))
        logger.warning(
            f"The tokenizer has {len(new)} tokens for which the model has no rows ({names}{', ...' * (len(new) > 3)}); "
            "they get new rows, which are trained."
        )
    return new


def grow(model: PreTrainedModel, size: int) -> None:
    """Grow embedding and head to `size` rows if they have fewer. Leaves the training seed alone."""
    if size > model.get_input_embeddings().weight.shape[0]:
        with torch.random.fork_rng(devices=[]):  # transformers first draws other rows
            model.resize_token_embeddings(size, mean_resizing=False)


@torch.no_grad()
def draw_rows(model: PreTrainedModel, ids: Sequence[int], *, known: int, seed: int) -> None:
    """Draw the rows `ids` with the mean and spread of the first `known` rows, per dimension.

    transformers uses the mean alone, which is nearly zero in a fresh model; a norm layer turns that into a gradient
    several times too large. The generator does not touch the training seed.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = {id(m): m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    for weight in rows.values():  # one entry if tied: the two modules then hold one parameter
        old = weight[:known].float()
        noise = torch.randn(len(ids), weight.shape[1], generator=generator).to(weight.device)
        weight[list(ids)] = (old.mean(dim=0) + old.std(dim=0) * noise).to(weight.dtype)


# -- adapters ---------------------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """The embedding or the head of a model, and what an adapter does with it."""

    name: str  # in the model
    module: nn.Module
    is_target: bool  # of the adapter's target_modules
    is_saved: bool  # in modules_to_save: trained as a whole

    @property
    def key(self) -> str:
        """How PEFT names it: the last part of its name."""
        return self.name.rpartition(".")[2]

    @classmethod
    def of(cls, model: PreTrainedModel, module: nn.Module, adapter: PeftConfig) -> _Place:
        name = next(name for name, known in model.named_modules() if known is module)
        is_target = getattr(adapter, "target_modules", None) is not None and bool(
            check_target_module_exists(adapter, name)
        )
        saved = getattr(adapter, "modules_to_save", None) or ()
        return cls(name, module, is_target, any(_is_called(name, key) for key in saved))


def train_token_rows(
    adapter: PeftConfig, model: PreTrainedModel, *, inputs: Sequence[int] = (), labels: Sequence[int] = ()
) -> None:
    """Let an adapter train rows of new tokens, in place; plain LoRA would leave them as they were drawn.

    Args:
        inputs: tokens that are read and never predicted (predictor tokens): rows of the embedding.
        labels: tokens that are also predicted (added ones): rows of the embedding and of the head.

    Raises UserError for an adapter that cannot be trained or merged with these rows, or with the rows of our batches.
    """
    if adapter.is_prompt_learning:
        raise UserError(
            f"{type(adapter).__name__} puts virtual tokens in front of every row, which the masks and positions of "
            "packed rows do not know; use LoRA."
        )
    embedding = _Place.of(model, model.get_input_embeddings(), adapter)
    output = model.get_output_embeddings()
    head = None if output is None else _Place.of(model, output, adapter)
    is_tied = output is not None and output.weight is model.get_input_embeddings().weight
    if head is not None:
        _check_head(adapter, embedding, head, is_tied)
    rows = {embedding.key: {*inputs, *labels}}
    if head is not None and not is_tied:
        rows[head.key] = set(labels)
    for place in filter(None, (embedding, head)):
        if place.is_saved:
            rows.pop(place.key, None)  # all of its rows are trained
    if any(rows.values()):
        _add_rows(adapter, rows, embedding, head, is_tied)


def _check_head(adapter: PeftConfig, embedding: _Place, head: _Place, is_tied: bool) -> None:
    """Raises UserError for an adapter of the head that would be dropped, or that would untie it silently."""
    if head.is_target:
        raise UserError(
            f"target_modules holds the head, {head.key}, for which an adapter would not be trained; remove it."
        )
    if not is_tied:
        return
    if embedding.is_target:
        raise UserError(
            f"target_modules holds {embedding.key}, whose weights are also those of the head: merged, an adapter of "
            "one would change both. Remove it."
        )
    if (embedding.is_saved or head.is_saved) and not getattr(adapter, "ensure_weight_tying", False):
        raise UserError(
            f"modules_to_save holds {embedding.key if embedding.is_saved else head.key}, but embedding and head are "
            "one tied weight, and only one of them would be trained; remove it, or set ensure_weight_tying=True."
        )


def _add_rows(
    adapter: PeftConfig, rows: dict[str, set[int]], embedding: _Place, head: _Place | None, is_tied: bool
) -> None:
    """Write rows that must be trained into `trainable_token_indices`, together with those of the user."""
    count = len(set().union(*rows.values()))
    if not hasattr(adapter, "trainable_token_indices"):
        raise UserError(
            f"{type(adapter).__name__} cannot train the rows of {count} new tokens (predictor tokens or added ones); "
            "use LoRA, or num_predictor_tokens: 0 and a tokenizer without added tokens."
        )
    if embedding.is_target and rows.get(embedding.key):
        raise UserError(
            f"target_modules holds {embedding.key}, where the rows of {count} new tokens (predictor tokens or added "
            "ones) are trained themselves; PEFT cannot do both. Remove it from target_modules."
        )
    if head is not None and getattr(head.module, "bias", None) is not None and (is_tied or rows.get(head.key)):
        raise UserError(
            f"The head {head.key} has a bias, which PEFT drops if it trains single rows of the head; train without "
            "an adapter."
        )
    own = adapter.trainable_token_indices or {}
    if isinstance(own, list):
        own = {embedding.key: own}
    for key, ids in own.items():
        # A tied head has the rows of the embedding. PEFT would wrap one module twice under two names.
        if _is_called(embedding.name, key) or is_tied and head is not None and _is_called(head.name, key):
            key = embedding.key
        elif head is not None and _is_called(head.name, key):
            key = head.key
        rows.setdefault(key, set()).update(ids)
    adapter.trainable_token_indices = {key: sorted(ids) for key, ids in rows.items() if ids}


def _is_called(name: str, key: str) -> bool:
    """Whether PEFT would find the module `name` under `key`: its whole name, or the end of it."""
    return name == key or name.endswith(f".{key}")
