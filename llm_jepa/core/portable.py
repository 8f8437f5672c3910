"""Models and tokenizers in files for readers of any age: what transformers 5 writes, and what others look for.

transformers 4, older versions of vLLM and converters read the same files, but other keys. Some of them go on with
defaults if a key is missing, so the model is silently worse.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .files import write_json, write_whole
from .json_files import read_json
from .tokenizer import forget_local_keys
from .untrusted import LARGEST_TOKENIZER

logger = logging.get_logger(__name__)

SHARD_SIZE = "5GB"
# Found by comparing logits with transformers 4.57: numbers written in another way, or another computation.
NOT_FOR_4 = ("mamba2", "modernbert-decoder", "recurrent_gemma")


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Write a model into `folder`, without the paths of this machine, and with `use_cache` as it is used.

    Beside `rope_parameters`, the config has `rope_theta` and `rope_scaling`, see `old_rope`.
    """
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    config = read_json(folder / "config.json", is_finite=False)
    config |= old_rope(config)
    if "num_local_experts" in config and model.config.model_type == "qwen3_moe":
        config["num_experts"] = config["num_local_experts"]
    if model.config.model_type in NOT_FOR_4:
        logger.warning(f"transformers 4 does not read the {model.config.model_type} model that version 5 writes.")
    for options in [config, *(value for value in config.values() if isinstance(value, dict))]:
        if options.get("use_cache") is False:  # training switches it off
            options["use_cache"] = True
    if Path(str(config.get("_name_or_path") or ".")).exists():
        config.pop("_name_or_path", None)
    write_json(folder / "config.json", config)
    path = folder / "generation_config.json"
    generation = read_json(path, is_finite=False) if path.is_file() else {}
    if generation.get("use_cache") is False:
        write_json(path, {**generation, "use_cache": True})


def old_rope(config: dict[str, Any]) -> dict[str, Any]:
    """The keys by which transformers 4 knows the rotary positions of a config of version 5; {} if it has none.

    Without `rope_theta`, old readers take 10,000.
    """
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return {}
    local: dict[str, Any] = {}
    if isinstance(rope.get("full_attention"), dict):  # one set for each kind of layer, as in Gemma 3
        local = rope.get("sliding_attention") or {}
        rope = rope["full_attention"]
    if "rope_theta" not in rope:
        return {}
    keys = {"rope_theta": rope["rope_theta"]}
    kind = config.get("model_type", "")
    if "rope_theta" in local:
        keys["rope_local_base_freq"] = local["rope_theta"]
    if "partial_rotary_factor" in rope:
        keys["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if kind == "gpt_neox":
        keys["rotary_emb_base"] = rope["rope_theta"]
        keys["rotary_pct"] = rope.get("partial_rotary_factor", 0.25)
    if rope.get("rope_type", "default") != "default":
        keys["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return keys


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, *, without: Collection[str] = ()) -> None:
    """Write a tokenizer into `folder`, without the added tokens `without`; the library can only add tokens.

    Old readers do not know the class TokenizersBackend, and take the list `extra_special_tokens` for an object.
    """
    tokenizer.save_pretrained(folder)
    forget_local_keys(folder)
    path = folder / "tokenizer_config.json"
    options = read_json(path, is_finite=False)
    if options.get("tokenizer_class") == "TokenizersBackend":
        options["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(options.get("extra_special_tokens"), list):
        special = [token for token in options.pop("extra_special_tokens") if _content(token) not in without]
        options["additional_special_tokens"] = special
    if isinstance(decoder := options.get("added_tokens_decoder"), dict):
        options["added_tokens_decoder"] = {id: token for id, token in decoder.items() if _content(token) not in without}
    write_json(path, options)
    if without:
        path = folder / "tokenizer.json"
        content = read_json(path, largest=LARGEST_TOKENIZER, is_finite=False)
        content["added_tokens"] = [token for token in content["added_tokens"] if _content(token) not in without]
        # json, not `write_json`: the order of its keys stays, and texts stay readable.
        write_whole(path, json.dumps(content, ensure_ascii=False, indent=2) + "\n")


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)
