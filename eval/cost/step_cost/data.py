"""The rows and the model that all arms share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    set_seed,
)

from llm_jepa.lm import data_sha256, model_from, parse_row, read_rows, tokenizer_from, train_tokenizer
from llm_jepa.synthetic import nl_rx

# Like Llama-3's: a header of four tokens for each turn, one bos, and a system turn only if the row has one.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
TOKENIZER_SIZE = 8000  # at most; a few thousand generated rows have fewer pairs to merge
SHAPES: dict[str, dict[str, int]] = {
    # Nearly all of the work is in the layers, as in a model of 1B parameters and more.
    "body": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "vocab_size": 8192},
    # Llama-3's vocabulary on a small body.
    "vocabulary": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "vocab_size": 128256},
}
NUM_HEADS = 8
FILES = {"nl_rx": "synth_train.jsonl", "longer": "spider_train.jsonl"}  # data set -> its file
DATA_SETS = tuple(FILES)
GENERATED_ROWS = 2000
REQUESTS_PER_TURN = 8  # of the generated `longer` rows: answers of about 100 tokens


@dataclass(frozen=True)
class Data:
    name: str
    source: str  # a file name, or the generator of the rows
    sha256: str | None
    rows: list[dict[str, Any]]  # prompt and completion turns, so that TRL trains the completion alone, as we do
    tokenizer: PreTrainedTokenizerBase


def load_data(name: str, folder: Path | None, *, seed: int) -> Data:
    """Load one of DATA_SETS from `folder`, or generate its rows if there is no folder. Raises UserError."""
    if folder is not None:
        path = folder / FILES[name]
        raw, source = read_rows(str(path)), path.name
    else:
        generated = nl_rx.generate(GENERATED_ROWS, seed=seed)
        if name == "longer":
            generated = _several_in_one_turn(generated)
        raw = Dataset.from_list(generated)
        source = f"llm_jepa.synthetic.nl_rx version {nl_rx.VERSION}, seed {seed}"
    rows = []
    for number, row in enumerate(raw):
        example = parse_row(row, f"{source}, row {number}")
        rows.append({"prompt": example.prompt, "completion": example.completion})
    return Data(name, source, data_sha256(raw), rows, _tokenizer(rows))


def _several_in_one_turn(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Numbered requests in one user turn, and the numbered answers in one assistant turn."""
    joined = []
    for start in range(0, len(rows) - REQUESTS_PER_TURN + 1, REQUESTS_PER_TURN // 4):  # every request is in four rows
        conversations = [row["messages"] for row in rows[start : start + REQUESTS_PER_TURN]]
        systems, requests, answers = zip(*conversations, strict=True)
        user = {"role": "user", "content": _numbered(requests)}
        assistant = {"role": "assistant", "content": _numbered(answers)}
        joined.append({"messages": [systems[0], user, assistant]})
    return joined


def _numbered(turns: Sequence[dict[str, str]]) -> str:
    return "\n".join(f"{n}. {turn['content']}" for n, turn in enumerate(turns, 1))


def _tokenizer(rows: list[dict[str, Any]]) -> PreTrainedTokenizerFast:
    """Train byte-level BPE on the rows. Roles and the blank line of a header are one token each, as in Llama-3's."""
    roles = [{"prompt": "system\nuser", "completion": "assistant"}] * len(rows)
    tokenizer = train_tokenizer([*rows, *roles], TOKENIZER_SIZE)
    tokenizer.add_tokens(["\n\n"])
    tokenizer.add_tokens(["<|start_header_id|>", "<|end_header_id|>"], special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def random_llama(shape: Mapping[str, int], tokenizer: PreTrainedTokenizerBase, *, seed: int) -> PreTrainedModel:
    """A Llama with random float32 weights. Its vocabulary has spare rows, so predictor tokens do not enlarge it."""
    set_seed(seed)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(
        **{"num_attention_heads": NUM_HEADS, "num_key_value_heads": NUM_HEADS, **shape, **ids},
        tie_word_embeddings=False,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    return model


def load_model(name: str, data: Data, *, seed: int) -> tuple[PreTrainedModel, Data]:
    """One of SHAPES, or a model of a folder or the Hub with the data in its own tokens. Raises UserError."""
    if name in SHAPES:
        return random_llama(SHAPES[name], data.tokenizer, seed=seed), data
    tokenizer = tokenizer_from(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # as the trainer does
    return model_from(name, dtype=torch.float32), replace(data, tokenizer=tokenizer)
