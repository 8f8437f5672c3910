"""Decoding that the generation config of a checkpoint cannot steer: what is measured is the model, not its advice."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

logger = logging.get_logger(__name__)


def generate_as_asked(model: PreTrainedModel, decoding: GenerationConfig, **inputs: Any) -> Any:
    """`model.generate` with `decoding` and defaults alone; what it returns.

    `generate` fills each field that `decoding` leaves empty from `model.generation_config` (beams, penalties, a static
    cache, a dict as result, fields of its own), so a new config alone would not be enough. The model gets an empty one
    meanwhile. So does the base model of an adapter: PEFT's `generate` hands the config down to it.
    """
    own = model.generation_config
    stop_strings = getattr(own, "stop_strings", None)
    if stop_strings:
        logger.warning_once(
            f"The checkpoint's generation config has stop_strings={stop_strings!r}. They are ignored: decoding stops "
            "at the end of turn and at the eos token."
        )
    base = getattr(model, "get_base_model", lambda: model)()
    own_of_base = base.generation_config
    model.generation_config = GenerationConfig()
    try:
        return model.generate(generation_config=decoding, **inputs)
    finally:
        base.generation_config = own_of_base
        model.generation_config = own


def suppressed_ids(model: PreTrainedModel) -> list[int]:
    """`suppress_tokens` of the model's generation config (predictor tokens), as far as its vocabulary has them."""
    tokens = getattr(model.generation_config, "suppress_tokens", None) or []
    return [token for token in tokens if 0 <= token < model.config.get_text_config().vocab_size]
