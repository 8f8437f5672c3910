"""A byte-level BPE tokenizer with a chat template, trained without any download; and what a saved one must not say."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .errors import UserError
from .files import write_json
from .json_files import read_json

LOCAL_KEYS = ("is_local", "local_files_only")  # `local_files_only` would break loading from the Hub
BOS, END_OF_TURN = "<|begin|>", "<|end|>"
ROLES = ("system", "user", "assistant")
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


MOST_TOKENS = 10_000_000  # the trainer reserves memory for as many


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE over `texts`, with a chat template.

    pad = eos = end of turn, as for Llama-3-Instruct (which has no pad token), so that both label protocols have the
    same meaning as there. Raises UserError if vocab_size is too small for the 256 bytes and the special tokens.
    """
    special = [BOS, END_OF_TURN, *(f"<|{role}|>" for role in ROLES)]
    if vocab_size < 256 + len(special):
        raise UserError(
            f"tokenizer_vocab_size={vocab_size} is below the {256 + len(special)} bytes and special tokens; raise it."
        )
    if vocab_size > MOST_TOKENS:
        raise UserError(
            f"tokenizer_vocab_size={vocab_size} is above {MOST_TOKENS:,}; lower it. Large ones have 260,000."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TURN,
        additional_special_tokens=special[2:],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def forget_local_keys(folder: str | Path) -> None:
    """Remove what says "loaded from a folder of this machine" from the tokenizers saved in `folder`, and just below it.

    transformers writes these keys into the config of every tokenizer that it had loaded from a folder.
    """
    for pattern in ("tokenizer_config.json", "*_tokenizer/tokenizer_config.json"):
        for path in Path(folder).glob(pattern):
            options = read_json(path, is_finite=False)
            write_json(path, {key: value for key, value in options.items() if key not in LOCAL_KEYS})
