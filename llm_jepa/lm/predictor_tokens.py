"""Predictor tokens: `<|predictor_1|>`...`<|predictor_k|>`, appended to the context view (arXiv:2509.14252, 3.1).

They are inputs only. The LM loss masks their logits and the saved generation config suppresses them, so a model with
predictor tokens and its plain baseline are trained on the same next-token distribution.
"""

from __future__ import annotations

import torch
from peft import PeftConfig
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from ..core.errors import UserError
from .views import PREDICTOR_TOKEN

MAX_PREDICTOR_TOKENS = 10  # as many as the reference code defines


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


@torch.no_grad()
def add_predictor_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num_predictor_tokens: int
) -> list[int]:
    """Add the tokens to tokenizer and model, in place, and return their ids. A second call changes nothing.

    The embedding grows only if it has no spare rows. A new row is drawn with the mean and spread of the old rows, per
    dimension. (transformers uses the mean alone, which is nearly zero in a fresh model; a norm layer turns that into a
    gradient several times too large.) The rows are drawn with a generator that does not touch the training seed.
    """
    names = predictor_token_names(num_predictor_tokens)
    new = [name for name in names if name not in tokenizer.get_vocab()]
    old_size = len(tokenizer)
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in new], special_tokens=True)
    ids = predictor_token_ids(tokenizer, num_predictor_tokens)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        with torch.random.fork_rng(devices=[]):  # transformers first draws other rows
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    new_ids = [i for i, name in zip(ids, names, strict=True) if name in new]
    if new_ids:
        generator = torch.Generator().manual_seed(0)
        rows = {id(m): m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
        for weight in rows.values():  # one entry if tied: the two modules then hold one parameter
            known = weight[:old_size].float()
            noise = torch.randn(len(new_ids), weight.shape[1], generator=generator).to(weight.device)
            weight[new_ids] = (known.mean(dim=0) + known.std(dim=0) * noise).to(weight.dtype)
    if ids and model.generation_config is not None:
        model.generation_config.suppress_tokens = sorted({*(model.generation_config.suppress_tokens or []), *ids})
    return ids


def train_token_rows(peft_config: PeftConfig, model: PreTrainedModel, token_ids: list[int]) -> None:
    """Make a LoRA run train the embedding rows of the predictor tokens; plain LoRA would leave them random.

    Works for tied and untied embeddings. Raises UserError for a PEFT method that cannot train single rows.
    """
    if not token_ids:
        return
    if not hasattr(peft_config, "trainable_token_indices"):
        raise UserError(
            f"{type(peft_config).__name__} cannot train the rows of the predictor tokens; "
            "use LoRA or set num_predictor_tokens: 0."
        )
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding).rsplit(".", 1)[-1]
    trained = peft_config.trainable_token_indices or {}
    if isinstance(trained, list):
        trained = {name: trained}
    peft_config.trainable_token_indices = {**trained, name: sorted({*trained.get(name, []), *token_ids})}
