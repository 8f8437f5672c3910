"""What a model can read: tokens that have a row, and sequences no longer than its positions. One check, every door."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

from ..core.errors import UserError

# Models whose config states a number of positions, although they have none, or make more when they need them.
UNLIMITED = (
    *("inkling_text", "inkling2_text", "inkling2_loop_text"),
    *("jamba", "kimi_linear", "nemotron_h", "rwkv", "xglm", "xlnet", "zamba"),
)


def position_limit(config: PreTrainedConfig) -> int | None:
    """How many positions a model has if they are learned (GPT-2, OPT); None if they are computed, or there are none.

    Beyond a table of positions there is an index error; beyond the length that rotary positions were trained on, worse
    answers only.
    """
    config = config.get_text_config()
    if getattr(config, "rope_parameters", None) is not None or config.model_type in UNLIMITED:
        return None
    limit: int | None = getattr(config, "max_position_embeddings", None)
    return limit


def check_sequences(config: PreTrainedConfig, sequences: Sequence[Sequence[int]], name: str, advice: str) -> None:
    """`check_tokens` and `check_lengths` of token ids."""
    check_tokens(config, sequences, name)
    check_lengths(config, [len(sequence) for sequence in sequences], name, advice)


def check_tokens(config: PreTrainedConfig, sequences: Iterable[Sequence[int]], name: str) -> None:
    """Raises UserError if token ids have no row in the model. `name`: what the sequences are, in the plural."""
    num_rows = getattr(config.get_text_config(), "vocab_size", None)
    largest = max((max(sequence, default=-1) for sequence in sequences), default=-1)
    if num_rows is not None and largest >= num_rows:
        raise UserError(
            f"The {name} hold the token {largest}, but the model has rows for {num_rows} tokens only: the tokenizer is "
            "not that of the model. Load the one saved with it, or train the added tokens first."
        )


def check_lengths(config: PreTrainedConfig, lengths: Sequence[int], name: str, advice: str) -> None:
    """Raises UserError if some of the lengths, in tokens, are beyond learned positions.

    name: what has these lengths, in the plural. advice: what to do.
    """
    limit = position_limit(config)
    if limit is None:
        return
    too_long = sum(length > limit for length in lengths)
    if too_long:
        raise UserError(
            f"{too_long} of {len(lengths)} {name} are longer than the {limit} positions of the model (the longest: "
            f"{max(lengths)} tokens); {advice}."
        )


def check_views(
    config: PreTrainedConfig, rows: Iterable[Mapping[str, Any]], name: str, num_predictor_tokens: int, advice: str
) -> None:
    """`check_lengths` of rows with the columns of `views.Views`: each counts with its longest sequence.

    `{room}` in the advice becomes the number of tokens that leave room for the predictor tokens.
    """
    limit = position_limit(config)
    if limit is None:
        return
    lengths = []
    for row in rows:
        contexts = [len(context) + num_predictor_tokens for context in row["contexts"]]
        lengths.append(max([len(row["input_ids"]), *contexts, *map(len, row["targets"])]))
    check_lengths(config, lengths, name, advice.format(room=limit - num_predictor_tokens))
