"""Tiny VL-JEPAs, clips and training runs for the tests."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, set_seed

from llm_jepa.lm.from_scratch import train_tokenizer
from llm_jepa.vl.arguments import VLJEPATrainingArguments
from llm_jepa.vl.data import Clip, ClipDataset, Pair
from llm_jepa.vl.loading import plain_frames
from llm_jepa.vl.modeling import VLJEPAModel
from llm_jepa.vl.processing import VLJEPAProcessor
from llm_jepa.vl.trainer import VLJEPATrainer
from tests.conftest import LAYER_NORM

# A large spread of the weights, so that an error in what goes in is no small difference in what comes out.
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "initializer_range": 0.2}
X_ENCODERS = {
    "vit": {**SMALL, "image_size": 16, "patch_size": 8, "num_hidden_layers": 3},
    "vjepa2": {"hidden_size": 16, "crop_size": 16, "patch_size": 8, "mlp_ratio": 2, "num_hidden_layers": 3,
               "num_attention_heads": 2, "pred_hidden_size": 8, "pred_num_hidden_layers": 1,
               "pred_num_attention_heads": 2, "initializer_range": 0.2},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 8, 16], "depths": [1, 1, 1]},
    "mobilenet_v2": {"image_size": 16, "depth_multiplier": 0.1, "min_depth": 8},
}  # fmt: skip
TEXTS = ("a red square", "it moves left", "blue", "two circles that meet and part", "yes")
QUERIES = (None, "what colour is it?", "where does it go?")


@functools.cache
def tokenizer():
    rows = [{"prompt": query or text, "completion": text} for query in QUERIES for text in TEXTS]
    return train_tokenizer(rows, 280)


def parts(x: str = "vit", *, y_dropout: float = 0.0, exact: bool = False, **options):
    """A tiny model, the same at every call, and its processor. `exact`: in float64 from end to end."""
    words = {"num_hidden_layers": 1, "vocab_size": len(tokenizer())}
    dropout = {"hidden_dropout_prob": y_dropout, "attention_probs_dropout_prob": y_dropout}
    predictor = AutoConfig.for_model("llama", **SMALL, **words, num_key_value_heads=2)
    if exact:  # layer norms: the RMS norms of transformers round to float32
        options = {"dtype": torch.float64, **options}
        predictor = AutoConfig.for_model(**{**LAYER_NORM, **SMALL, **words})
    set_seed(0)
    model = VLJEPAModel.from_parts(
        AutoConfig.for_model(x, **X_ENCODERS[x]),
        predictor,
        AutoConfig.for_model("bert", **SMALL, **words, **dropout),
        **{"shared_dim": 8, "num_frames": 2, **options},
    )
    return model, processor_of(model)


def processor_of(model, tokens=None, frames=None):
    return VLJEPAProcessor.from_parts(
        model.config,
        tokenizer=tokens or tokenizer(),
        target_tokenizer=tokens or tokenizer(),
        image_processor=frames or plain_frames(16),
    )


def exact() -> dict[str, Any]:
    """The model and the processor of a run that is compared with another by the bound `EXACT`."""
    model, processor = parts(exact=True)
    return {"model": model, "processor": processor}


def make_clips(count: int = 10, seed: int = 0) -> list[Clip]:
    """Clip i has 1 + i % 3 pairs; texts recur within and across clips, and so do queries."""
    draw = np.random.default_rng(seed)
    return [
        Clip(
            draw.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8),
            tuple(Pair(QUERIES[(i + j) % 3], TEXTS[(i * 2 + j * (1 + i % 2)) % 5]) for j in range(1 + i % 3)),
        )
        for i in range(count)
    ]


def arguments(folder, **options) -> VLJEPATrainingArguments:
    """Quiet, on the CPU; SGD, so that a step is the gradient. All pairs of a clip, unless a test says otherwise."""
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "optim": "sgd",
        "learning_rate": 0.1,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "pairs_per_clip": 3,
        "diagnostics_pairs": 0,
    }
    return VLJEPATrainingArguments(**{**defaults, **options})


def make(folder, clips=None, validation=None, *, model=None, processor=None, **options) -> VLJEPATrainer:
    if model is None:
        model, processor = parts()
    sets = [clips if isinstance(clips, ClipDataset) else ClipDataset(clips or make_clips(), num_frames=2), None]
    if validation is not None:
        sets[1] = ClipDataset(validation, num_frames=2, pairs_per_clip=3)
    return VLJEPATrainer(model, arguments(folder, **options), *sets, processor or processor_of(model))


def run(folder, clips=None, validation=None, **options):
    trainer = make(folder, clips, validation, **options)
    start = weights(trainer)
    trainer.train()
    return trainer, start


def weights(trainer_or_model) -> dict[str, Tensor]:
    model = getattr(trainer_or_model, "model", trainer_or_model)
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def history(trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def moved(start: dict[str, Tensor], now: dict[str, Tensor]) -> set[str]:
    return {name for name in start if not torch.equal(start[name], now[name])}


def count_calls(module) -> list:
    """One entry per forward pass of `module`: how many rows it had."""
    calls: list[int] = []
    module.register_forward_hook(lambda _, args, kwargs, out: calls.append(len(out[0])), with_kwargs=True)
    return calls
