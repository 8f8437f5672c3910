"""Memory of a training step, computed from the config of a model. `python -m eval.memory` compares it with peaks.

It counts tensors only: a GPU adds about 1 GB for its context, and what its allocator cannot reuse.

Bytes that a process holds, of N weights, T of them trained. FSDP2 and ZeRO-3 share the first three among all processes:

    weights       4 N             2 for frozen weights in bfloat16, 0.52 in 4 bits; ZeRO-3: 2 N and 4 T
    optimizer     8 T             AdamW: two moments in float32; `moment_bytes` has the others
    gradients     4 T             FSDP2 with accumulation: 2 T under autocast, and not shared
    average       4 T             only with target_encoder: ema
    buckets       4 T             DDP only: what it sends to the others, a second copy of the gradients
    copies        2 N             bf16 autocast of float32 weights, without sharding
    tied          4 v h           one matrix is embedding and head, and is trained: two gradients before they are added
    token rows    8 or 12 v h     LoRA that trains rows of the embedding: copies of the matrix, and their gradient
    gathered      2 or 4 a weight with sharding: two layers and the embeddings; of the trained, their gradients, too

Activations of the layers, for t tokens of hidden size h and intermediate size i, in values:

    kept for the backward pass    t (11 h + 4 i) a layer
    with checkpointing            t h a layer, and one layer in full
    with LoRA dropout             t (6 h + i) a layer more, and a byte each for what was dropped
    head                          logits, softmax, gradient: 3 v for each token with a label (vocabulary v)

This is a layer of a Llama with sdpa. Eager attention keeps more: its weights, for every pair of tokens of a row.

Without gradient accumulation, the gradients come when the activations go, so only the larger of the two counts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..core.random_weights import MOST_TENSORS
from ..core.safetensors_files import building_at_most

# A byte for the scale of each 64 weights, and 4 for the scale of 256 scales (QLoRA, arXiv:2305.14314, section 3).
BYTES_IN_4BIT = 0.5 + 1 / 64 + 4 / (64 * 256)


class Counts(NamedTuple):
    """Of a model: all weights, those of its largest layer, and those of the embedding and the head together."""

    total: int
    layer: int
    embeddings: int
    hidden: int
    intermediate: int  # of a mixture of experts: of all experts that a token is sent to
    layers: int
    vocab: int
    is_tied: bool = False  # one matrix is the embedding and the head


class Batch(NamedTuple):
    """Of a micro-batch: tokens with padding, and tokens whose logits are computed."""

    tokens: int
    labels: int


class Way(NamedTuple):
    """How a model is trained. sharing: one, ddp, fsdp2 or zero3."""

    sharing: str = "one"
    ranks: int = 1
    autocast: bool = False  # to bfloat16
    checkpointing: bool = False
    accumulates: bool = False
    frozen_bytes: int = 4  # of a weight that is not trained
    in_4bit: bool = False  # the frozen weights of the layers; embedding and head stay
    trained_bytes: int = 4  # of a weight that is trained
    moments: int = 8  # bytes of the optimizer's state for such a weight
    average: bool = False  # target_encoder: ema
    lora_dropout: bool = False
    token_rows: bool = False  # an adapter that also trains rows of the embedding

    @property
    def is_sharded(self) -> bool:
        return self.sharing in ("fsdp2", "zero3")

    @property
    def compute_bytes(self) -> int:
        return 2 if self.autocast else self.trained_bytes


def without_weights(config: PreTrainedConfig) -> PreTrainedModel | None:
    """The model of a config on the meta device, which takes no memory; None if it cannot be built there."""

    def refuse(num_tensors: int, num_elements: int) -> None:
        raise ValueError(f"{num_tensors} tensors")

    try:
        with (
            torch.random.fork_rng(devices=[]),
            building_at_most(MOST_TENSORS, 1e15, refuse),  # type: ignore[arg-type]
            torch.device("meta"),
        ):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except Exception:  # of the model's own code; loading the model says what is wrong
        return None
    return model


def counts_of(model: PreTrainedModel) -> Counts:
    """Counts the weights of a model, which may be on the meta device."""
    config = model.config.get_text_config()
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    matrices = {id(m.weight): m.weight.numel() for m in ends if m is not None}
    layers = _layers(model, config.num_hidden_layers)
    hidden = config.hidden_size
    intermediate = getattr(config, "intermediate_size", None) or 4 * hidden
    if experts := getattr(config, "num_experts_per_tok", None):
        intermediate = experts * (getattr(config, "moe_intermediate_size", None) or intermediate)
    return Counts(
        total=sum(p.numel() for p in model.parameters()),
        layer=max((sum(p.numel() for p in layer.parameters()) for layer in layers), default=0),
        embeddings=sum(matrices.values()),
        hidden=hidden,
        intermediate=intermediate,
        layers=config.num_hidden_layers,
        vocab=config.vocab_size,
        is_tied=ends[1] is not None and len(matrices) == 1,
    )


def _layers(model: nn.Module, count: int) -> list[nn.Module]:
    """The layers of a transformer: its first list of so many modules."""
    lists = (list(module) for module in model.modules() if isinstance(module, nn.ModuleList))
    return next((layers for layers in lists if len(layers) == count), [])


def moment_bytes(optim: str, each: int = 4) -> int:
    """Bytes of an optimizer's state for a weight of `each` bytes. What is not named here counts as AdamW."""
    if "8bit" in optim:
        return 2
    if optim in ("sgd", "adafactor"):
        return 0
    return each if any(name in optim for name in ("lion", "rmsprop", "adagrad")) else 2 * each


def held(counts: Counts, trained: int, way: Way) -> dict[str, float]:
    """Bytes by term of what stays from step to step, and of copies that are there in every pass."""
    frozen, share, each = counts.total - trained, way.ranks if way.is_sharded else 1, way.trained_bytes
    whole = min(frozen, counts.embeddings) if way.in_4bit else frozen
    weights = way.frozen_bytes * whole + BYTES_IN_4BIT * (frozen - whole) + each * trained
    copies, gathered = 0.0, 0.0
    if way.sharing == "zero3" and way.autocast:
        weights = 2 * counts.total + each * trained
    elif way.autocast and not way.is_sharded:
        copies = 2 * (trained + (whole if way.frozen_bytes == 4 else 0))
    if way.is_sharded:
        gathered = way.compute_bytes * (2 * counts.layer + counts.embeddings)
        gathered += way.compute_bytes * (counts.layer + counts.embeddings) * trained / counts.total
    return {
        "weights": weights / share,
        "optimizer": way.moments * trained / share,
        "average": max(4, each) * trained / share if way.average else 0.0,
        "buckets": each * trained if way.sharing == "ddp" else 0.0,
        "copies": copies,
        "tied": each * counts.vocab * counts.hidden if counts.is_tied and not frozen else 0.0,
        "token rows": (3 if counts.is_tied else 2) * each * counts.vocab * counts.hidden if way.token_rows else 0.0,
        "gathered": gathered,
    }


def gradients(trained: int, way: Way) -> float:
    """Bytes of the gradients at the end of the backward pass."""
    if way.sharing == "fsdp2" and way.accumulates:  # Accelerate shards them at the last micro-batch only
        return way.compute_bytes * trained
    return way.trained_bytes * trained / (way.ranks if way.is_sharded else 1)


def activations(counts: Counts, batch: Batch, way: Way) -> float:
    """Bytes at the start of the backward pass. Values between the layers are float32 under autocast, too."""
    h, i, each, residual = counts.hidden, counts.intermediate, way.compute_bytes, way.trained_bytes
    # Inputs, scaled inputs and outputs of two norms; q, k, v, the attention's output and its copy; four of the MLP.
    layer = batch.tokens * (6 * h * residual + (5 * h + 4 * i) * each)
    if way.lora_dropout:  # the inputs of seven maps, three of which are one value without it
        layer += batch.tokens * (6 * h + i) * (each + 1)
    kept = batch.tokens * h * residual * counts.layers + layer if way.checkpointing else layer * counts.layers
    logits = batch.labels * counts.vocab * (each + 4 + 4)
    return kept + logits + 4 * batch.tokens * h * residual  # final norm, states that are read


def predicted(counts: Counts, trained: int, batch: Batch, way: Way) -> float:
    """Bytes of the peak: at the start of the backward pass, or at its end, when all gradients are there."""
    work, gained = activations(counts, batch, way), gradients(trained, way)
    return sum(held(counts, trained, way).values()) + (work + gained if way.accumulates else max(work, gained))
