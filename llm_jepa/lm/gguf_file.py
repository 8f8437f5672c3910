"""Write a causal LM as one GGUF file, for llama.cpp and what is built on it.

Llama, Mistral, Qwen 2 and Qwen 3, with a byte-level BPE. Names and layout of the tensors are those of llama.cpp's own
converter. Whatever the format, or these architectures in llama.cpp, cannot hold is refused in one line.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import UserError
from ..core.json_files import read_json
from ..core.untrusted import LARGEST_TOKENIZER

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedConfig, PreTrainedModel

# model_type -> the name of the architecture in llama.cpp, and whether it keeps the two halves of each head interleaved.
ARCHITECTURES = {
    "llama": ("llama", True), "mistral": ("llama", True), "qwen2": ("qwen2", False), "qwen3": ("qwen3", False),
}  # fmt: skip
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}
BLOCK = 32  # numbers in a block of Q8_0; a row holds whole blocks

LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How the pieces of a text are cut before BPE merges them -> llama.cpp's name for it.
SPLITS = {
    ("bytes",): "gpt-2",
    ("digits", "bytes"): "smollm",
    (LETTERS + r"\p{N}{1,3}" + REST, "plain bytes"): "llama-bpe",
    (LETTERS + r"\p{N}" + REST, "plain bytes"): "qwen2",
}


def write_gguf(model: PreTrainedModel, folder: Path, path: Path, *, kind: str | None, name: str) -> None:
    """Write a model and the tokenizer of `folder` into the file `path`.

    Args:
        kind: a key of TYPES; None keeps the type of the weights. Vectors are always float32, as llama.cpp wants them.
        name: of the model, for people.

    Raises UserError for an architecture, a tokenizer or weights that the file cannot hold.
    """
    import gguf

    config = model.config
    _check(config)
    kind = TYPES[kind or str(model.dtype).removeprefix("torch.")]
    arch = ARCHITECTURES[config.model_type][0]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(int(getattr(gguf.LlamaFileType, FILE_TYPES[kind])))
    if kind == "Q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_shape(writer, config)
    _add_tokenizer(writer, folder, config)
    _add_weights(writer, model, arch, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _check(config: PreTrainedConfig) -> None:
    """Raises UserError for what the file or llama.cpp's architecture cannot hold."""
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise UserError(
            f"--to gguf writes {', '.join(ARCHITECTURES)}, and this is a {kind} model; export it with "
            "--to transformers and use llama.cpp's convert_hf_to_gguf.py."
        )
    rope = config.rope_parameters or {}
    uses_window = getattr(config, "use_sliding_window", kind == "mistral") and config.sliding_window is not None
    faults = {
        f"hidden_act is {config.hidden_act!r} instead of silu": config.hidden_act != "silu",
        f"its rope_type is {rope.get('rope_type')!r}": rope.get("rope_type") not in ("default", "linear", "llama3"),
        "it has a sliding window": kind in ("mistral", "qwen2", "qwen3") and uses_window,
        "its projections have biases": kind not in ("qwen2",) and bool(getattr(config, "attention_bias", False)),
        "its MLP has biases": bool(getattr(config, "mlp_bias", False)),
    }
    if fault := next((reason for reason, is_so in faults.items() if is_so), None):
        raise UserError(f"--to gguf cannot hold this {kind} model: {fault}.")


def _add_shape(writer: GGUFWriter, config: PreTrainedConfig) -> None:
    from gguf import RopeScalingType

    head_dim = _head_dim(config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _head_dim(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


# -- tokenizer --------------------------------------------------------------------------------------------------------


def _add_tokenizer(writer: GGUFWriter, folder: Path, config: PreTrainedConfig) -> None:
    from gguf import TokenType

    content = read_json(folder / "tokenizer.json", {"model": {"type": str, "vocab?": dict}}, largest=LARGEST_TOKENIZER)
    options = read_json(folder / "tokenizer_config.json", is_finite=False)
    bpe, added = content["model"], content.get("added_tokens") or []
    # Qwen's tokenizers compose characters (NFC). llama.cpp does not, nor does its converter mind.
    is_plain = content.get("normalizer") in (None, {"type": "NFC"})
    if bpe["type"] != "BPE" or bpe.get("byte_fallback") or not is_plain:
        raise UserError("--to gguf writes byte-level BPE tokenizers, and this is another one; use --to transformers.")
    tokens = {id: (token, TokenType.NORMAL) for token, id in bpe["vocab"].items()}
    for token in added:
        tokens[token["id"]] = (token["content"], TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED)
    if max(tokens) >= config.vocab_size:
        raise UserError(f"The tokenizer has the id {max(tokens)}, and the model {config.vocab_size} rows.")
    listed = [tokens.get(id, (f"[PAD{id}]", TokenType.UNUSED)) for id in range(config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_name_of_split(content.get("pre_tokenizer")))
    writer.add_token_list([token for token, _ in listed])
    writer.add_token_types([kind for _, kind in listed])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in bpe["merges"]])
    ids = {token["content"]: token["id"] for token in added} | bpe["vocab"]
    bos, eos, pad = (ids.get(_text(options.get(f"{name}_token"))) for name in ("bos", "eos", "pad"))
    if bos is not None:
        writer.add_bos_token_id(bos)
    if eos is not None:
        writer.add_eos_token_id(eos)
    if pad is not None:
        writer.add_pad_token_id(pad)
    # A chat template writes the first token itself; a plain text gets it if the tokenizer adds it.
    writer.add_add_bos_token(bos is not None and _adds_first(content, _text(options.get("bos_token"))))
    template = folder / "chat_template.jinja"
    if template.is_file():
        writer.add_chat_template(template.read_text(encoding="utf-8"))


def _text(token: Any) -> str:
    return str(token.get("content") if isinstance(token, dict) else token)


def _adds_first(content: dict[str, Any], token: str) -> bool:
    """Whether the tokenizer puts `token` in front of every text."""
    processor = content.get("post_processor") or {}
    for step in [processor, *processor.get("processors", [])]:
        first: dict[str, Any] = next(iter(step.get("single") or []), {})
        if first.get("SpecialToken", {}).get("id") == token:
            return True
    return False


def _name_of_split(pre_tokenizer: dict[str, Any] | None) -> str:
    """llama.cpp's name for how a tokenizer cuts texts. Raises UserError if it has none: other tokens would come out."""
    steps = (pre_tokenizer or {}).get("pretokenizers") or [pre_tokenizer or {}]
    key = []
    for step in steps:
        if step.get("type") == "ByteLevel" and not step.get("add_prefix_space"):
            key.append("bytes" if step.get("use_regex", True) else "plain bytes")
        elif step.get("type") == "Digits" and step.get("individual_digits"):
            key.append("digits")
        elif step.get("type") == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            key.append(step.get("pattern", {}).get("Regex", ""))
        else:
            key.append(str(step.get("type")))
    if tuple(key) not in SPLITS:
        raise UserError(
            f"llama.cpp has no name that we know for how this tokenizer cuts texts ({' + '.join(key)[:120]}), and "
            "would read other tokens; export with --to transformers and use its convert_hf_to_gguf.py."
        )
    return SPLITS[tuple(key)]


# -- weights ----------------------------------------------------------------------------------------------------------


def _add_weights(writer: GGUFWriter, model: PreTrainedModel, arch: str, kind: str) -> None:
    import gguf

    config, is_interleaved = model.config, ARCHITECTURES[model.config.model_type][1]
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    if (factors := _rope_factors(config)) is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    for name, tensor in model.state_dict().items():
        if name in model.all_tied_weights_keys:
            continue  # a file without output.weight is one with tied weights
        stem, _, suffix = name.rpartition(".")
        known = names.get_name(stem)
        if known is None:
            raise UserError(f"--to gguf has no place for the weight {name}.")
        part = stem.rpartition(".")[2]
        if is_interleaved and part in heads:
            tensor = _interleave(tensor, heads[part])
        data, written = _encode(tensor, kind, name)
        writer.add_tensor(f"{known}.{suffix}", data, raw_dtype=written)


def _interleave(weight: Tensor, num_heads: int) -> Tensor:
    """[H * D, ...] with the two halves of each head one after the other -> their rows in turn, as llama.cpp rotates."""
    rows = weight.shape[0] // num_heads // 2
    return weight.reshape(num_heads, 2, rows, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _encode(tensor: Tensor, kind: str, name: str) -> tuple[np.ndarray, Any]:
    """A tensor as the bytes of a type. Raises UserError for numbers beyond float16."""
    import gguf

    values = tensor.detach().to(torch.float32).contiguous().numpy()
    if tensor.dim() < 2:
        kind = "F32"
    elif kind == "Q8_0" and tensor.shape[-1] % BLOCK:
        kind = "F16"  # as llama.cpp's converter does: a row must hold whole blocks
    if kind == "F16" and not np.isfinite(values.astype(np.float16)).all():
        raise UserError(f"{name} holds numbers beyond float16 (65,504); write --dtype bfloat16 or float32.")
    number = getattr(gguf.GGMLQuantizationType, kind)
    return gguf.quantize(values, number), number


def _rope_factors(config: PreTrainedConfig) -> np.ndarray | None:
    """[D / 2] by which llama.cpp divides the frequencies: the scaling of Llama 3.1. None for other models."""
    rope = config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    dim = _head_dim(config)
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    context = rope["original_max_position_embeddings"]
    factors = []
    for i in range(0, dim, 2):
        length = 2 * math.pi * rope["rope_theta"] ** (i / dim)  # of one turn, in tokens
        smooth = (context / length - low) / (high - low)
        weight = min(max(smooth, 0.0), 1.0)
        factors.append(1 / ((1 - weight) / factor + weight))
    return np.array(factors, dtype=np.float32)
