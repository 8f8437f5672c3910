"""Loads models, tokenizers and image processors that a stranger may have written, from a folder or the Hub.

Before transformers reads them: JSON files have their shape and size, a config names no code and no attention but
transformers' own, weights are safetensors inside the folder, and their index fits them. While a model is built: it may
not be much larger than its weights. After that: no weight is missing, left over or of another shape.

Everything that is wrong is one UserError, whatever a library raises.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch.nn import ModuleList
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from .errors import UserError, first_line, one_line
from .folders import check_folder, refuse_adapter
from .json_files import read_json, shape_fault
from .safetensors_files import find_file, no_larger_than, read_weights
from .templates import check_templates, use_template

logger = logging.get_logger(__name__)

# Of attention, and of mixtures of experts. Any other name is a repository of the Hub whose native code would be run.
IMPLEMENTATIONS = {
    "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention", "paged|eager",
    "paged|sdpa", "grouped_mm", "batched_mm",
}  # fmt: skip
# Keys of a config.json that choose other files, patches or kernels.
FORBIDDEN = {
    "configuration_files", "distributed_config", "fusion_config", "gguf_file", "kernel_config", "trust_remote_code",
    "use_kernels",
}  # fmt: skip
COUNTS = re.compile(
    r"(^|_)(n|num)_(\w+_)?(layers?|blocks?|labels|stages|experts)$|^(depth|encoder_layers|decoder_layers)$"
)
POSITIVE = {
    "d_model", "head_dim", "hidden_size", "max_position_embeddings", "n_embd", "n_head", "n_positions",
    "num_attention_heads", "num_key_value_heads", "patch_size", "vocab_size",
}  # fmt: skip
MOST = 100_000  # layers, labels, experts: lists of that length are made before any weight
LARGEST_TOKENIZER = 500_000_000  # bytes; that of Gemma has 33 million
LARGEST_SIDE = 8_192  # pixels to which an image processor may resize
NULL = type(None)
CONFIG = {"model_type?": str, "architectures?": (list, NULL), "auto_map?": (dict, NULL), "id2label?": (dict, NULL)}
TOKENIZER_FILES: dict[str, Any] = {
    "tokenizer_config.json": {
        "tokenizer_class?": (str, NULL), "chat_template?": (str, list, NULL), "model_max_length?": (float, NULL),
        "added_tokens_decoder?": (dict, NULL), "additional_special_tokens?": (list, NULL),
        "extra_special_tokens?": (list, dict, NULL),
    },
    "special_tokens_map.json": dict,
    "added_tokens.json": {str: int},
}  # fmt: skip
IMAGE_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")


@contextlib.contextmanager
def loading(what: str, source: str) -> Iterator[None]:
    """Turn whatever a library raises about the files of `source` into one UserError, except lack of memory."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UserError(f"Cannot load {what} from {source!r}{_no_folder(source)}: {_reason(error)}") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of a library in Rust
            raise
        raise UserError(f"Cannot load {what} from {source!r}: its files are damaged ({first_line(error)}).") from None


# -- configs ----------------------------------------------------------------------------------------------------------


def read_options(
    source: str, *, what: str = "a model", revision: str | None = None, subfolder: str = ""
) -> dict[str, Any]:
    """The checked contents of config.json; empty if there is none. Raises UserError."""
    with loading(what, source):
        path = find_file(source, "config.json", revision=revision, subfolder=subfolder)
        if path is None:
            return {}
        options: dict[str, Any] = read_json(path, CONFIG, is_finite=False)
        fault = config_fault(options)
        if fault:
            raise UserError(f"{path}: {fault}")
        return options


def load_config(
    source: str, *, what: str = "a model", revision: str | None = None, subfolder: str = ""
) -> PreTrainedConfig:
    """The config of a model, without a choice of attention: code is chosen by who runs it. Raises UserError."""
    check_folder(str(Path(source, subfolder)) if Path(source).is_dir() else source)
    options = read_options(source, what=what, revision=revision, subfolder=subfolder)
    if method := options.get("quantization_config"):
        method = method.get("quant_method") if isinstance(method, dict) else method
        raise UserError(
            f"{source} is quantized ({str(method)[:40]!r}), and only whole weights are read; take the original model, "
            "or save a dequantized copy."
        )
    with loading(what, source):
        if find_file(source, "adapter_config.json", revision=revision, subfolder=subfolder) is not None:
            refuse_adapter(source)
        config = AutoConfig.from_pretrained(
            source, revision=revision or "main", subfolder=subfolder, trust_remote_code=False
        )
        return plain_config(config)


def plain_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of a config that leaves attention and experts to transformers' defaults, in its sub-configs, too."""
    config = copy.deepcopy(config)
    config._attn_implementation = config._experts_implementation = None
    return config


def config_fault(options: Mapping[str, Any]) -> str | None:
    """Why a config.json is not used, in words, or None."""
    for key, value in options.items():
        fault = _key_fault(key, value)
        if fault is None and isinstance(value, dict):
            fault = config_fault(value)
        if fault is None and isinstance(value, list):
            inner = (config_fault(item) for item in value if isinstance(item, dict))
            fault = next((found for found in inner if found), None)
        if fault:
            return fault
    if "model_type" in options:
        names = (key for key in options if callable(getattr(PreTrainedConfig, key, None)) or key.startswith("__"))
        if method := next(names, None):
            return f"its key {method!r} would replace a method of the config; remove it."
    return None


def _key_fault(key: str, value: Any) -> str | None:
    if "attn_implementation" in key or "experts_implementation" in key:
        for name in value.values() if isinstance(value, dict) else [value]:
            if name is not None and not (isinstance(name, str) and name in IMPLEMENTATIONS):
                return (
                    f"{key} is {name!r}, which is code to download and run; only the names of transformers' own, such "
                    "as sdpa, are allowed. Remove the key, and choose attention with attn_implementation in the recipe."
                )
    if key in FORBIDDEN and value:
        return f"its key {key!r} chooses code or files beyond the model's own; remove it."
    if (
        key == "transformers_weights"
        and value is not None
        and not re.fullmatch(r"[\w-][\w.-]*\.safetensors", str(value))
    ):
        return f"transformers_weights is {value!r}: only a .safetensors file in the folder itself is read."
    if key in ("dtype", "torch_dtype") and isinstance(value, str) and not _is_dtype(value):
        return f"{key} is {value!r}, which is not a type of numbers; write float32 or bfloat16."
    if isinstance(value, float) and value != value:
        return f"{key} is NaN; write a number."
    if key in POSITIVE and type(value) in (int, float) and value < 1:
        return f"{key} is {value}; it must be 1 or more."
    if COUNTS.search(key) and type(value) is int and not 0 <= value <= MOST:
        return f"{key} is {value}; 0 to {MOST:,} are possible."
    return None


def _is_dtype(name: str) -> bool:
    return name == "auto" or isinstance(getattr(torch, name.removeprefix("torch."), None), torch.dtype)


# -- weights ----------------------------------------------------------------------------------------------------------


def load_model(
    model_class: Any, source: str, config: PreTrainedConfig, *, what: str = "a model", revision: str | None = None,
    subfolder: str = "", unused: str = "", **options: Any,
) -> PreTrainedModel:  # fmt: skip
    """A model from safetensors. Raises UserError if it cannot be loaded, or if its weights do not fit its config.

    Args:
        model_class: with `from_pretrained`, such as AutoModel.
        config: from `load_config`.
        what: a name of the model for messages.
        unused: a pattern of weights that may be missing, since they will not be used.
    """
    place: dict[str, Any] = {"revision": revision, "subfolder": subfolder}
    model, report = load_with_report(model_class, source, config, what=what, **place, **options)
    check_report(model, report, source, unused=unused)
    return model


def load_with_report(
    model_class: Any, source: str, config: PreTrainedConfig, *, what: str = "a model", revision: str | None = None,
    subfolder: str = "", **options: Any,
) -> tuple[PreTrainedModel, dict[str, Any]]:  # fmt: skip
    """`load_model`, and the names of weights that do not fit instead of an error about them."""
    with loading(what, source):
        _check_generation_config(source, revision, subfolder)
        weights = read_weights(source, config, revision=revision, subfolder=subfolder)
        with no_larger_than(weights, source), _no_load_report():
            model, report = model_class.from_pretrained(
                source, config=config, revision=revision or "main", subfolder=subfolder, use_safetensors=True,
                trust_remote_code=False, output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the report
                **options,
            )  # fmt: skip
    return model, report


@contextlib.contextmanager
def _no_load_report() -> Iterator[None]:
    """transformers prints the names of weights that do not fit as they are, escape sequences included."""
    reporter = logging.get_logger("transformers.modeling_utils")
    reporter.addFilter(_is_no_report)  # a higher level would make transformers verify its tensor parallelism
    try:
        yield
    finally:
        reporter.removeFilter(_is_no_report)


def _is_no_report(record: Any) -> bool:
    return "LOAD REPORT" not in record.getMessage()


def check_report(model: PreTrainedModel, report: Mapping[str, Any], source: str, *, unused: str = "") -> None:
    """Raises UserError for weights that are missing, of another shape, or of layers that the config does not have.

    Warns of weights of other parts, such as a vision tower or a head of another task.
    """
    misfits = []
    missing = [key for key in map(str, report["missing_keys"]) if not (unused and re.search(unused, key))]
    left = sorted(map(str, report["unexpected_keys"]))
    of_layers = _of_layers(model, left)
    for kind, keys in (
        ("missing_keys", missing), ("mismatched_keys", [_misfit(*item) for item in report["mismatched_keys"]]),
        ("unexpected_keys", of_layers),
    ):  # fmt: skip
        if keys:
            misfits.append(f"{kind}: {', '.join(sorted(keys)[:3])}")
    if misfits:
        raise UserError(
            f"The weights of {source!r} do not fit its config ({'; '.join(misfits)}): the model would be partly random "
            "or cut."
        )
    if left:
        logger.warning(f"{source}: {len(left)} weights are of other parts and are not used ({left[0]}, ...).")


def _misfit(name: str, saved: Any, expected: Any) -> str:
    return f"{name} {list(saved)} instead of {list(expected)}"


def _of_layers(model: PreTrainedModel, names: list[str]) -> list[str]:
    """The names that are those of further layers of a list of layers in the model."""
    known = {re.sub(r"\d+", "N", name) for name in model.state_dict()}
    empty = [f"{name}." for name, module in model.named_modules() if isinstance(module, ModuleList) and not len(module)]
    return [name for name in names if re.sub(r"\d+", "N", name) in known or name.startswith(tuple(empty))]


def _check_generation_config(source: str, revision: str | None, subfolder: str) -> None:
    """transformers takes a torn generation_config.json for none: predictor tokens would be generated."""
    path = find_file(source, "generation_config.json", revision=revision, subfolder=subfolder)
    if path is None:
        return
    options = read_json(path)
    tokens = options.get("suppress_tokens")
    if tokens is not None and (fault := shape_fault(tokens, [int], "its suppress_tokens")):
        raise UserError(f"{path}: {fault}.")


# -- tokenizers and image processors ----------------------------------------------------------------------------------


def load_tokenizer(
    source: str, *, revision: str | None = None, subfolder: str = "", chat_template_path: str | None = None
) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder or the Hub, whose chat templates have been tried. Raises UserError.

    chat_template_path: a file whose template takes the place of those in the folder.
    """
    check_tokenizer(source, revision=revision, subfolder=subfolder)
    with loading("a tokenizer", source):
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                source, revision=revision or "main", subfolder=subfolder, trust_remote_code=False
            )
        except ValueError:  # transformers names three kinds of file then, and no way out
            folder = Path(source, subfolder)
            if not folder.is_dir() or (folder / "tokenizer.json").is_file():
                raise
            raise UserError(
                f"The folder {folder} holds no tokenizer that can be read: it has no tokenizer.json. Copy the files of "
                "the tokenizer there, or name another one."
            ) from None
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise UserError(f"{source} names the tokenizer_class {type(tokenizer).__name__}, which is not a tokenizer.")
    if chat_template_path is None:
        check_templates(tokenizer, source)
    else:
        use_template(tokenizer, chat_template_path)
    return tokenizer


def check_tokenizer(source: str, *, revision: str | None = None, subfolder: str = "") -> None:
    """Check the files of a tokenizer before transformers reads them. Raises UserError."""
    place: dict[str, Any] = {"revision": revision, "subfolder": subfolder}
    read_options(source, what="a tokenizer", **place)  # transformers builds the config, too
    with loading("a tokenizer", source):
        for name, shape in TOKENIZER_FILES.items():
            path = find_file(source, name, **place)
            options = {} if path is None else read_json(path, shape, is_finite=False)
            fault = _tokenizer_fault(options) if name == "tokenizer_config.json" else None
            if fault:
                raise UserError(f"{path}: {fault}")
        path = find_file(source, "tokenizer.json", **place)
        if path is not None:
            _check_tokenizer_json(path)


def _is_plain_name(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w-][\w.-]*", value) is not None


def _tokenizer_fault(options: Mapping[str, Any]) -> str | None:
    for key, value in options.items():
        # In place of the files of the folder, transformers would read what these keys name.
        if key.endswith("_file") and value is not None and not _is_plain_name(value):
            return f"{key} is {value!r}; only files of the folder itself are read."
    kind = options.get("tokenizer_class")
    if kind is not None and not re.fullmatch(r"\w*(Tokenizer|Backend)\w*", kind):
        return f"tokenizer_class is {kind!r}, which is not a tokenizer."
    return None


def _check_tokenizer_json(path: Path) -> None:
    """If this file is torn, transformers silently takes another tokenizer: of vocab.json, or of the folder above."""
    if not path.is_file() or path.stat().st_size > LARGEST_TOKENIZER:
        raise UserError(f"{path} is not a file of at most {LARGEST_TOKENIZER:,} bytes; take a whole copy.")
    try:
        Tokenizer.from_file(str(path))
    except Exception as error:
        raise UserError(f"{path} is not a whole tokenizer ({first_line(error)}); take a whole copy.") from None


def load_image_processor(source: str, *, revision: str | None = None) -> Any:
    """The PIL image processor of a model. Raises UserError."""
    with loading("an image processor", source):
        check_image_files(source, revision=revision)
        return AutoImageProcessor.from_pretrained(
            source, revision=revision or "main", backend="pil", trust_remote_code=False
        )


def check_image_files(source: str, *, revision: str | None = None) -> None:
    """Raises UserError for settings of an image processor that would make frames too large for memory."""
    for name in IMAGE_FILES:
        path = find_file(source, name, revision=revision)
        if path is not None and (side := _largest_side(read_json(path))) > LARGEST_SIDE:
            raise UserError(f"{path} resizes images to {side:,} pixels; {LARGEST_SIDE:,} are the most.")


def _largest_side(options: Mapping[str, Any]) -> float:
    sides = [0.0]
    for key, value in options.items():
        if isinstance(value, dict):
            sides.append(_largest_side(value))
        elif key in ("height", "width", "shortest_edge", "size", "crop_size"):
            sides += [
                abs(side) for side in (value if isinstance(value, list) else [value]) if isinstance(side, (int, float))
            ]
    return max(sides)


def _no_folder(source: str) -> str:
    """A hint for who mistyped a folder: it was taken for a Hub id."""
    return "" if Path(source).is_dir() else " (a Hub id, because the current folder has no such folder)"


def _reason(error: BaseException) -> str:
    named = isinstance(error, (OSError, ValueError, RuntimeError)) and not isinstance(error, RecursionError)
    return (
        first_line(error)
        if named
        else f"its files make no such thing ({type(error).__name__}: {one_line(error, 200)})."
    )
