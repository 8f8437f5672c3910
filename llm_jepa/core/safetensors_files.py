"""Weights of strangers: safetensors files, checked by their headers, and a limit for the models that they fill."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers import PreTrainedConfig
from transformers.utils import cached_file

from .errors import UserError, first_line
from .files import WEIGHTS
from .json_files import read_json

SPARE_TENSORS, SPARE_ELEMENTS = 1_000, 10**8  # that a model may have beyond its weights: tied heads, masks, positions


def find_file(source: str, name: str, *, revision: str | None = None, subfolder: str = "") -> Path | None:
    """A file of a folder, or of the Hub through its local cache; None if there is no such file. Raises OSError."""
    path = cached_file(
        source, name, revision=revision, subfolder=subfolder, _raise_exceptions_for_missing_entries=False
    )  # fmt: skip
    return None if path is None else Path(path)


@dataclass(frozen=True)
class Weights:
    """How many tensors, and numbers in them, the files of a model hold."""

    num_tensors: int
    num_elements: int


def read_weights(
    source: str, config: PreTrainedConfig | None = None, *, revision: str | None = None, subfolder: str = ""
) -> Weights:
    """Check the weights of a model, reading headers only. Raises UserError."""
    place: dict[str, Any] = {"revision": revision, "subfolder": subfolder}
    name = getattr(config, "transformers_weights", None) or WEIGHTS
    if Path(source).is_dir() and any(Path(source, subfolder).glob("shard-*-model-*-of-*.safetensors")):
        raise UserError(
            f"{source} holds a distributed checkpoint (shard-...-model-...); merge it into {WEIGHTS} first."
        )
    path = find_file(source, name, **place)
    if path is not None:
        return _count(tensors_of(path).values())
    index = find_file(source, f"{name}.index.json", **place)
    if index is not None:
        return _read_shards(source, index, place)
    message = f"{source} has no {name}. Weights are read from safetensors only; pickles (.bin) could run code."
    raise UserError(
        f"{message} Save it again with save_pretrained, or, from the Hub, name a revision that has safetensors."
    )


def _read_shards(source: str, index: Path, place: dict[str, Any]) -> Weights:
    weight_map = read_json(index, {"metadata": dict, "weight_map": {str: str}})["weight_map"]
    if not weight_map:
        raise UserError(f"{index} names no files: the model would be random. Take a whole copy of the folder.")
    tensors: dict[str, tuple[str, list[int]]] = {}
    for shard in sorted(set(weight_map.values())):
        parts = re.split(r"[/\\]", shard)
        if not shard.endswith(".safetensors") or any(part in ("", ".", "..") for part in parts) or ":" in shard:
            raise UserError(f"{index} names the file {shard!r}: only .safetensors files inside the folder are read.")
        path = find_file(source, shard, **place)
        if path is None:
            raise UserError(f"{index} names {shard}, which is missing; take a whole copy of the folder.")
        held = tensors_of(path)
        listed = {name for name, file in weight_map.items() if file == shard}
        wrong = sorted(listed ^ held.keys())
        if wrong:
            where = "does not hold" if wrong[0] in listed else "holds, and which is not listed in it"
            raise UserError(f"{index} does not fit its files: {wrong[0]!r} is a tensor that {shard} {where}.")
        tensors |= held
    return _count(tensors.values())


def tensors_of(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Name -> type and shape of the tensors in a file. Raises UserError if it is not a whole safetensors file."""
    if not path.is_file():
        raise UserError(f"{path} is not a file; take a whole copy of the folder.")
    try:
        with safe_open(path, "pt") as file:
            views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            tensors = {name: (view.get_dtype(), view.get_shape()) for name, view in views.items()}
    except (SafetensorError, ValueError, OverflowError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({first_line(error)}); take a whole copy.") from None
    if not tensors:
        raise UserError(f"{path} holds no tensors: the model would be random. Take a whole copy.")
    return tensors


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file. Raises UserError if it is not a whole safetensors file."""
    tensors_of(path)
    return load_file(path)


def _count(tensors: Iterable[tuple[str, list[int]]]) -> Weights:
    elements = [torch.Size(shape).numel() for _, shape in tensors]
    return Weights(len(elements), sum(elements))


@contextlib.contextmanager
def no_larger_than(weights: Weights, source: str) -> Iterator[None]:
    """Models that are built in this block may not be much larger than the weights. Raises UserError as soon as one is.

    transformers builds a model on the meta device, without memory, and allocates what is missing from the weights
    afterwards. So this stops a config with 100,000 layers or a table of 10^12 numbers before anything is allocated.
    """

    def refuse(num_tensors: int, num_elements: int) -> NoReturn:
        raise UserError(
            f"The config of {source} describes a larger model than its weights: more than {num_tensors:,} tensors "
            f"of {num_elements:,} numbers, and the files hold {weights.num_tensors:,} of {weights.num_elements:,}."
        )

    most_tensors = 4 * weights.num_tensors + SPARE_TENSORS
    with building_at_most(most_tensors, 4 * weights.num_elements + SPARE_ELEMENTS, refuse):
        yield


@contextlib.contextmanager
def building_at_most(most_tensors: int, most_elements: float, refuse: Callable[[int, int], NoReturn]) -> Iterator[None]:
    """Calls `refuse` with the tensors and numbers so far when a model that is built in this block has more."""
    num_tensors = num_elements = 0

    def count(module: Any, name: str, tensor: Any) -> None:
        nonlocal num_tensors, num_elements
        if not isinstance(tensor, torch.Tensor):
            return
        num_tensors, num_elements = num_tensors + 1, num_elements + tensor.numel()
        if num_tensors > most_tensors or num_elements > most_elements:
            refuse(num_tensors, num_elements)

    hooks = [register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(count)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
