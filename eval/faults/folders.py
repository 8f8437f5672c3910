"""Hostile model folders: what a stranger may have written into config, weights, index and tokenizer of a causal LM."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .bases import Damage, damaged, hostile_pickle, lm_folder, with_bytes, with_options
from .folder_configs import config_inputs
from .inputs import Input
from .vl_folders import vl_inputs
from .weight_files import headers

JSON_FILES = {
    "config.json": "config.json", "generation_config.json": "generation_config.json",
    "tokenizer_config.json": "tokenizer_config.json", "tokenizer.json": "tokenizer.json",
}  # fmt: skip
CONTENTS: dict[str, bytes] = {
    "a list": b"[]",
    "null": b"null",
    "a number": b"1",
    "a text": b'"x"',
    "empty": b"",
    "torn": b'{"model_type": "ll',
    "brackets": b"[" * 100_000,
    "objects": b'{"a":' * 100_000,
    "deep": b'{"a":' + b"[" * 500 + b"]" * 500 + b"}",
    "twice": b'{"a": 1, "a": 2}',
    "bytes": b'{"a": "\xff\xfe"}',
    "byte order mark": b"\xef\xbb\xbf{}",
    "half a surrogate": b'{"a": "\\ud800"}',
    "a huge number": b'{"a": ' + b"1" * 5000 + b"}",
    "not a number": b'{"a": nan}',
}
# Names of huggingface_hub's test of unsafe file names, and ours.
OUTSIDE = (
    "../outside.safetensors", "a/../../outside.safetensors", "/var/outside.safetensors", "..",
    "..\\outside.safetensors", "C:\\outside.safetensors", "//host/outside.safetensors",
    "./../outside.safetensors", "sub/./x.safetensors", "", "a//b.safetensors", "file:///etc/passwd",
    "pytorch_model.bin", "model.pt", "notes.txt", "model.safetensors\0.bin", "model.safetensors/",
)  # fmt: skip


def inputs(shared: Path) -> Iterator[Input]:
    """All hostile folders of causal LMs."""
    base = lm_folder(shared / "lm")
    shards = lm_folder(shared / "shards")
    _shard(shards)
    yield from _accepted(base, shards, shared)
    yield from _json(base)
    yield from _special_files(base)
    yield from _weights(base, shared)
    yield from _index(shards)
    yield from config_inputs(base, shared)
    yield from vl_inputs(shared)


# -- what must be accepted --------------------------------------------------------------------------------------------


def _accepted(base: Path, shards: Path, shared: Path) -> Iterator[Input]:
    fine: dict[str, Damage] = {
        "whole": lambda model, folder: None,
        "names sdpa": with_options({"_attn_implementation": "sdpa"}),
        "names flash": with_options({"attn_implementation": "flash_attention_2"}),
        "unknown keys": with_options({"my_key": {"a": [1]}, "auto_map": {"AutoConfig": "x.Y"}}),
        "a million positions": with_options({"max_position_embeddings": 10**6}),
        "a table of labels": with_options({"id2label": {str(i): f"class {i}" for i in range(20_000)}}),
        "Infinity": with_options({"time_step_limit": [0.0, float("inf")]}),
        "of version 4": with_options(
            {"torch_dtype": "float32", "transformers_version": "4.57.0", "rope_scaling": None}
        ),
        "no generation config": lambda model, folder: (model / "generation_config.json").unlink(),
    }
    for name, damage in fine.items():
        yield Input(f"accepted: {name}", damaged(base, damage))
    yield Input("accepted: shards", damaged(shards, lambda model, folder: None))
    tied = lm_folder(shared / "tied", tie_word_embeddings=True)
    yield Input("accepted: tied weights", damaged(tied, lambda model, folder: None))


# -- JSON -------------------------------------------------------------------------------------------------------------


def _json(base: Path) -> Iterator[Input]:
    for file, says in JSON_FILES.items():
        for name, content in CONTENTS.items():
            if file == "tokenizer.json" and name in ("twice", "half a surrogate", "a huge number"):
                continue  # said by another library, in the same words as "a list"
            yield Input(f"json: {file} is {name}", damaged(base, with_bytes(file, content)), says)
        yield Input(f"json: {file} is large", damaged(base, _of_zeros(file)), says)
    yield Input("json: config.json is empty object", damaged(base, with_bytes("config.json", b"{}")), "model")
    yield Input("json: added_tokens", damaged(base, with_bytes("added_tokens.json", b'{"a": "b"}')), "added_tokens")
    for name, tokens in {"text": "all", "texts": ["a"], "number": 5, "nested": [[1]]}.items():
        damage = with_options({"suppress_tokens": tokens}, "generation_config.json")
        yield Input(f"json: suppress_tokens {name}", damaged(base, damage), "suppress_tokens")


def _of_zeros(file: str) -> Damage:
    """600 MB that take no room."""

    def damage(model: Path, folder: Path) -> None:
        with open(model / file, "wb") as opened:
            opened.truncate(600_000_000)

    return damage


def _special_files(base: Path) -> Iterator[Input]:
    """Things that are not files: to read them would wait, or never end."""

    def replaced(file: str, make: Callable[[Path], None]) -> Damage:
        def damage(model: Path, folder: Path) -> None:
            (model / file).unlink()
            make(model / file)

        return damage

    kinds: dict[str, Callable[[Path], None]] = {
        "a pipe": lambda path: os.mkfifo(path),
        "a folder": lambda path: path.mkdir(),
        "a device": lambda path: path.symlink_to("/dev/zero"),
        "a link to itself": lambda path: path.symlink_to(path.name),
        "a link to nothing": lambda path: path.symlink_to("nothing"),
    }
    for kind, make in kinds.items():
        for file in ("config.json", "model.safetensors"):
            yield Input(f"special: {file} is {kind}", damaged(base, replaced(file, make)), file)


# -- weights ----------------------------------------------------------------------------------------------------------


def _weights(base: Path, shared: Path) -> Iterator[Input]:
    for name, content in headers().items():
        yield Input(f"weights: {name}", damaged(base, with_bytes("model.safetensors", content)), "model.safetensors")

    def half(model: Path, folder: Path) -> None:
        path = model / "model.safetensors"
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    yield Input("weights: half of the file", damaged(base, half), "model.safetensors")
    misfits: dict[str, tuple[dict[str, list[int] | None], str]] = {
        "one is missing": ({"model.norm.weight": None}, "model.norm.weight"),
        "one has another shape": ({"model.norm.weight": [17]}, "model.norm.weight"),
        "a layer is left over": ({"model.layers.2.mlp.up_proj.weight": [24, 16]}, "model.layers.2"),
        "one has no dimension": ({"model.norm.weight": []}, "model.norm.weight"),
        "one is empty": ({"model.embed_tokens.weight": [0, 16]}, "model.embed_tokens"),
    }
    for name, (change, says) in misfits.items():
        yield Input(f"weights: {name}", damaged(base, _changed(change)), says)
    yield Input("weights: of another part", damaged(base, _changed({"vision.proj": [2]})))
    for name, file in (("a .bin", "pytorch_model.bin"), ("an index of .bin", "pytorch_model.bin.index.json")):

        def pickled(model: Path, folder: Path, file: str = file) -> None:
            (model / "model.safetensors").unlink()
            (model / file).write_bytes(hostile_pickle(folder))

        yield Input(f"weights: {name} alone", damaged(base, pickled), "no model.safetensors")
    for file in ("pytorch_model.bin", "training_args.bin", "adapter_model.bin", "rng_state.pth"):

        def beside(model: Path, folder: Path, file: str = file) -> None:
            (model / file).write_bytes(hostile_pickle(folder))

        yield Input(f"weights: {file} beside them", damaged(base, beside))

    def distributed(model: Path, folder: Path) -> None:
        shutil.copy(model / "model.safetensors", model / "shard-00000-model-00001-of-00001.safetensors")

    yield Input("weights: distributed", damaged(base, distributed), "distributed checkpoint")


def _changed(shapes: dict[str, list[int] | None]) -> Damage:
    """Tensors of the weights get another shape, are added, or (None) are removed."""

    def damage(model: Path, folder: Path) -> None:
        import torch
        from safetensors.torch import load_file, save_file

        path = model / "model.safetensors"
        tensors = load_file(path)
        for name, shape in shapes.items():
            tensors.pop(name, None)
            if shape is not None:
                tensors[name] = torch.zeros(shape)
        save_file(tensors, path, metadata={"format": "pt"})

    return damage


# -- the index of shards ----------------------------------------------------------------------------------------------


def _shard(model: Path) -> None:
    """Split the weights into two files with an index."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), dict[str, str]()
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, model / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def _index(shards: Path) -> Iterator[Input]:
    file = "model.safetensors.index.json"
    for name, content in CONTENTS.items():
        yield Input(f"index: {name}", damaged(shards, with_bytes(file, content)), file)
    shapes: dict[str, Any] = {
        "no weight_map": {"metadata": {}}, "no metadata": {"weight_map": {}}, "a list": {"metadata": {},
        "weight_map": []}, "numbers": {"metadata": {}, "weight_map": {"a": 1}}, "nothing": {"metadata": {},
        "weight_map": {}}, "metadata is a list": {"metadata": [], "weight_map": {}},
    }  # fmt: skip
    for name, value in shapes.items():
        says = "names no files" if name == "nothing" else file
        yield Input(f"index: {name} in it", damaged(shards, with_bytes(file, json.dumps(value).encode())), says)
    first, second = (f"model-{number:05d}-of-00002.safetensors" for number in (1, 2))

    def pointing(target: str) -> Damage:
        def damage(model: Path, folder: Path) -> None:
            shutil.copy(model / first, folder / "outside.safetensors")
            shutil.copy(model / first, model / "notes.txt")
            (model / "pytorch_model.bin").write_bytes(hostile_pickle(folder))
            (model / "model.pt").write_bytes(hostile_pickle(folder))
            path = model / file
            path.write_text(path.read_text().replace(first, json.dumps(target)[1:-1]))

        return damage

    for target in OUTSIDE:
        yield Input(f"index: names {target!r}", damaged(shards, pointing(target)), file)
    yield Input("index: names a missing file", damaged(shards, lambda m, f: (m / first).unlink()), "missing")
    yield Input("index: a shard is text", damaged(shards, with_bytes(second, b"a text" * 99)), second)
    yield Input("index: a shard is empty", damaged(shards, with_bytes(second, b"")), second)
    yield Input("index: files are exchanged", damaged(shards, _exchanged(first, second)), "does not fit its files")
    yield Input(
        "index: a tensor is in no file", damaged(shards, with_options({"weight_map__x": first}, file)), "does not fit"
    )


def _exchanged(first: str, second: str) -> Damage:
    def damage(model: Path, folder: Path) -> None:
        (model / first).rename(model / "other")
        (model / second).rename(model / first)
        (model / "other").rename(model / second)

    return damage
