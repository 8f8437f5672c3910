"""Predictor tokens: `<|predictor_1|>`...`<|predictor_k|>`, appended to the context view (arXiv:2509.14252, 3.1).

They are inputs only. The LM loss masks their logits and the saved generation config suppresses them, so a model with
predictor tokens and its plain baseline are trained on the same next-token distribution.
"""

from __future__ import annotations

from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from ..core.errors import UserError
from .keys import MAX_PREDICTOR_TOKENS
from .token_rows import draw_rows, grow, vocabulary_size
from .views import PREDICTOR_TOKEN


def predictor_token_names(num_predictor_tokens: int) -> list[str]:
    return [PREDICTOR_TOKEN.format(i) for i in range(1, num_predictor_tokens + 1)]


def predictor_token_ids(tokenizer: PreTrainedTokenizerBase, num_predictor_tokens: int) -> list[int]:
    """Ids of tokens that the tokenizer must have already. Raises UserError that names the missing ones."""
    vocabulary = tokenizer.get_vocab()
    names = predictor_token_names(num_predictor_tokens)
    missing = [name for name in names if name not in vocabulary]
    if missing:
        raise UserError(
            f"The tokenizer lacks {', '.join(missing)}: it does not belong to a model trained with "
            f"num_predictor_tokens={num_predictor_tokens}; load the tokenizer saved with the checkpoint."
        )
    return [vocabulary[name] for name in names]


def known_predictor_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of every predictor token that the tokenizer has, also of those from an earlier stage of training."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[name] for name in predictor_token_names(MAX_PREDICTOR_TOKENS) if name in vocabulary]


def add_predictor_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num_predictor_tokens: int
) -> list[int]:
    """Add the tokens to tokenizer and model, in place, and return their ids. A second call changes nothing.

    The embedding grows only if it has no spare rows. A new row is drawn with the mean and spread of the old rows.
    """
    names = predictor_token_names(num_predictor_tokens)
    new = [name for name in names if name not in tokenizer.get_vocab()]
    known = len(tokenizer)
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in new], special_tokens=True)
    ids = predictor_token_ids(tokenizer, num_predictor_tokens)
    grow(model, vocabulary_size(tokenizer))
    new_ids = [i for i, name in zip(ids, names, strict=True) if name in new]
    if new_ids:
        draw_rows(model, new_ids, known=known, seed=0)
    if ids and model.generation_config is not None:
        model.generation_config.suppress_tokens = sorted({*(model.generation_config.suppress_tokens or []), *ids})
    return ids
