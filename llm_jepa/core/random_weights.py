"""Models with random weights from the options of a recipe. Sizes that cannot work are one line before they are built.

A recipe is the user's own, so this is about slips: a zero too many builds for minutes, or takes all memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import psutil
import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from .errors import UserError, first_line, one_line
from .safetensors_files import building_at_most
from .untrusted import COUNTS, config_fault

MOST_LAYERS = 1_000  # 1,000 of a small GPT-2 are built in 4 seconds; published models have at most 200
MOST_TENSORS = 200_000  # published mixtures of experts have up to 50,000


def config_of(options: Mapping[str, Any], *, what: str, **more: Any) -> PreTrainedConfig:
    """The config that a recipe describes. Raises UserError, which begins with `what`, the key of the recipe.

    more: options that the recipe does not set, such as the vocabulary.
    """
    options = dict(options)
    model_type = options.pop("model_type")
    try:
        known = AutoConfig.for_model(model_type)
    except ValueError:
        raise UserError(
            f"{what}: transformers does not know model_type {model_type!r}; e.g. llama, bert, vjepa2."
        ) from None
    unknown = sorted(key for key in options if not hasattr(known, key))
    if unknown:
        raise UserError(f"{what}: {model_type} has no {', '.join(unknown)}; see its transformers config class.")
    if fault := config_fault(options) or _too_many_layers(options):
        raise UserError(f"{what}: {fault}")
    try:
        return AutoConfig.for_model(model_type, **{**options, **more})
    except MemoryError:
        raise
    except Exception as error:
        raise UserError(f"{what}: {one_line(error, 300)}") from None


def random_weights(
    model_class: Any, config: PreTrainedConfig, *, what: str, dtype: torch.dtype | None = None, **options: Any
) -> PreTrainedModel:
    """A model with random weights. Raises UserError if it cannot be built, or if this machine cannot hold it.

    Args:
        model_class: with `from_config`, such as AutoModel.
        what: the key of the recipe, for messages.
    """
    _check_memory(model_class, config, what=what, dtype=dtype or torch.get_default_dtype(), **options)
    if dtype is not None:
        options["dtype"] = dtype
    try:
        model: PreTrainedModel = model_class.from_config(config, **options)
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if "alloc" in str(error):  # lack of memory has a line and an exit code of its own
            raise
        kind = f"a model of model_type {config.model_type!r}"
        raise UserError(f"{what}: cannot build {kind}: {_cause(error, config)}") from None
    return model


def _check_memory(model_class: Any, config: PreTrainedConfig, *, what: str, dtype: torch.dtype, **options: Any) -> None:
    """Build the model on the meta device, without memory, and stop when its weights are larger than all memory."""
    memory = psutil.virtual_memory().total

    def refuse(num_tensors: int, num_elements: int) -> NoReturn:
        if num_tensors > MOST_TENSORS:
            size = f"more than {MOST_TENSORS:,} tensors"
        else:
            size = f"{num_elements * dtype.itemsize / 1e9:,.0f} GB or more, and this machine has {memory / 1e9:,.0f} GB"
        raise UserError(f"{what}: the weights of this {config.model_type} are {size}; lower {_largest(config)}.")

    try:
        with (
            torch.random.fork_rng(devices=[]),  # the weights are those of a model that nobody has counted
            building_at_most(MOST_TENSORS, memory / dtype.itemsize, refuse),
            torch.device("meta"),
        ):
            model_class.from_config(config, dtype=dtype, **options)
    except (UserError, MemoryError):
        raise
    except Exception:
        return  # if the model cannot be built, the real attempt says so


def _cause(error: Exception, config: PreTrainedConfig) -> str:
    """An error of a model's code in words of the recipe."""
    if isinstance(error, KeyError) and error.args:  # a name that a table does not have, such as an activation
        keys = [key for key, value in _given(config) if value == error.args[0]]
        return f"{f'{keys[0]}: ' if keys else ''}{error.args[0]!r} is unknown."
    if isinstance(error, (ValueError, ImportError)):
        return first_line(error, 300)
    below = [f"{key}: {value}" for key, value in _given(config) if type(value) is int and value < 0]
    if below:
        return f"{below[0]} is below 0."
    return f"{type(error).__name__}: {one_line(error, 200)}. Its largest size is {_largest(config)}."


def _too_many_layers(options: Mapping[str, Any]) -> str | None:
    for key, value in _flat(options):
        is_layers = COUNTS.search(key) and not key.endswith(("labels", "experts"))
        if is_layers and isinstance(value, int) and value > MOST_LAYERS:
            return f"{key} is {value:,}; {MOST_LAYERS:,} are the most."
    return None


def _largest(config: PreTrainedConfig) -> str:
    """The largest number that is not a default, with its key."""
    sizes = [(key, value) for key, value in _given(config) if type(value) is int]
    if not sizes:
        return "its sizes"
    key, value = max(sizes, key=lambda size: size[1])  # the first one: others follow from it
    return f"{key}: {value:,}"


def _given(config: PreTrainedConfig) -> Iterator[tuple[str, Any]]:
    return _flat(config.to_diff_dict())


def _flat(options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The keys and values of a mapping and of those in it; a list gives its items."""
    for key, value in options.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        elif isinstance(value, list):
            yield from ((key, item) for item in value)
        else:
            yield key, value
