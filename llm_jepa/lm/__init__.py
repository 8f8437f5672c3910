"""LLM-JEPA: fine-tune any causal LM to predict the embedding of a target view as well as its tokens.

    from llm_jepa.lm import LLMJEPAConfig, LLMJEPATrainer

There is no `modeling` here: the model is the user's. Names are imported when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import names_from

if TYPE_CHECKING:
    from ..core.source_files import FILE_SUFFIXES
    from ..core.sources import data_sha256, read_rows
    from .arguments import LLMJEPAConfig
    from .attention import model_inputs
    from .batching import JEPACollator
    from .data import bank_collator, training_collator
    from .embedder import Embedder
    from .formats import format_of
    from .from_scratch import random_model, train_tokenizer
    from .inference import (
        Choice,
        Generation,
        choose_batches,
        decode_tokens,
        generate,
        generate_batches,
    )
    from .loading import check_model, form_from, model_from, tokenizer_from
    from .predictor_tokens import add_predictor_tokens, known_predictor_ids, predictor_token_ids
    from .prompts import Prompt, PromptForm, answer_row, encode, end_of_turn_ids, form_of, other_format, turn_end
    from .reading import embed_pairs
    from .rows import parse_row, render_kwargs_of, with_kwargs
    from .trainer import LLMJEPATrainer
    from .views import IGNORE, add_view_columns, build_views

_HOMES = {
    "Choice": ".inference",
    "Embedder": ".embedder",
    "FILE_SUFFIXES": "..core.source_files",
    "Generation": ".inference",
    "IGNORE": ".views",
    "JEPACollator": ".batching",
    "LLMJEPAConfig": ".arguments",
    "LLMJEPATrainer": ".trainer",
    "Prompt": ".prompts",
    "PromptForm": ".prompts",
    "add_predictor_tokens": ".predictor_tokens",
    "add_view_columns": ".views",
    "answer_row": ".prompts",
    "bank_collator": ".data",
    "build_views": ".views",
    "check_model": ".loading",
    "choose_batches": ".inference",
    "data_sha256": "..core.sources",
    "decode_tokens": ".inference",
    "embed_pairs": ".reading",
    "encode": ".prompts",
    "end_of_turn_ids": ".prompts",
    "form_from": ".loading",
    "form_of": ".prompts",
    "format_of": ".formats",
    "generate": ".inference",
    "generate_batches": ".inference",
    "known_predictor_ids": ".predictor_tokens",
    "model_from": ".loading",
    "model_inputs": ".attention",
    "other_format": ".prompts",
    "parse_row": ".rows",
    "render_kwargs_of": ".rows",
    "predictor_token_ids": ".predictor_tokens",
    "random_model": ".from_scratch",
    "read_rows": "..core.sources",
    "tokenizer_from": ".loading",
    "train_tokenizer": ".from_scratch",
    "training_collator": ".data",
    "turn_end": ".prompts",
    "with_kwargs": ".rows",
}
__all__ = [
    "Choice",
    "Embedder",
    "FILE_SUFFIXES",
    "Generation",
    "IGNORE",
    "JEPACollator",
    "LLMJEPAConfig",
    "LLMJEPATrainer",
    "Prompt",
    "PromptForm",
    "add_predictor_tokens",
    "add_view_columns",
    "answer_row",
    "bank_collator",
    "build_views",
    "check_model",
    "choose_batches",
    "data_sha256",
    "decode_tokens",
    "embed_pairs",
    "encode",
    "end_of_turn_ids",
    "form_from",
    "form_of",
    "format_of",
    "generate",
    "generate_batches",
    "known_predictor_ids",
    "model_from",
    "model_inputs",
    "other_format",
    "parse_row",
    "predictor_token_ids",
    "random_model",
    "read_rows",
    "render_kwargs_of",
    "tokenizer_from",
    "train_tokenizer",
    "training_collator",
    "turn_end",
    "with_kwargs",
]
__getattr__ = names_from(__name__, _HOMES)
