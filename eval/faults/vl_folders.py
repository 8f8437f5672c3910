"""Hostile folders of a VL-JEPA, of its y_decoder and of the parts of a new one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .bases import TEXTS, Damage, damaged, hostile_pickle, vl_folder, with_bytes, with_options
from .folder_configs import KERNELS, SPELLINGS, config_damages, watching_kernels
from .inputs import Command, Input
from .weight_files import headers

BAD_JSON = {"a list": b"[]", "null": b"null", "torn": b'{"a', "brackets": b"[" * 100_000, "bytes": b"\xff"}


def vl_inputs(shared: Path) -> Iterator[Input]:
    base = vl_folder(shared / "vl")
    clip = _picture(shared)
    describe, classify = _describe(clip), _classify(clip)
    yield Input("vl accepted: whole", damaged(base, lambda model, folder: None, describe))
    yield Input("vl accepted: pickles beside", damaged(base, lambda m, f: _put(m, f, "training_args.bin"), describe))
    for file in ("config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json",
                 "target_tokenizer/tokenizer.json", "target_tokenizer/tokenizer_config.json",
                 "y_decoder/y_decoder.json", "y_decoder/memory.json", "y_decoder/config.json",
                 "y_decoder/tokenizer.json"):  # fmt: skip
        for name, content in BAD_JSON.items():
            if file == "y_decoder/memory.json" and name == "a list":
                continue  # a memory of no texts, see below
            yield Input(f"vl json: {file} is {name}", damaged(base, with_bytes(file, content), describe), file)
    yield from _weights(base, describe)
    yield from _configs(base, describe, classify)
    yield from _parts(base, shared)
    for name, (damage, says) in config_damages().items():
        if name != "layers":
            yield Input(f"door watch: {name}", damaged(base, damage, _watch(clip)), says)


def _picture(shared: Path) -> Path:
    from PIL import Image

    for name, color in {"red": (200, 30, 30), "blue": (30, 30, 200)}.items():
        Image.new("RGB", (16, 16), color).save(shared / f"{name}.png")
    return shared / "red.png"


def _describe(clip: Path) -> Callable[[Path], Command]:
    """Loads everything, the y_decoder too."""

    def command(model: Path) -> Command:
        from llm_jepa.vl import VLJEPA

        def run() -> None:
            VLJEPA.from_pretrained(model, device="cpu").caption(str(clip), images=True)

        return run

    return command


def _watch(clip: Path) -> Callable[[Path], Command]:
    return lambda model: ["watch", str(model), str(clip), "--labels", "red,blue"]


def _classify(clip: Path) -> Callable[[Path], Command]:
    def command(model: Path) -> Command:
        from llm_jepa.vl import VLJEPA

        def run() -> None:
            VLJEPA.from_pretrained(model, device="cpu").classify(str(clip), TEXTS, images=True)

        return run

    return command


def _put(model: Path, folder: Path, file: str) -> None:
    (model / file).write_bytes(hostile_pickle(folder))


def _weights(base: Path, describe: Callable[[Path], Command]) -> Iterator[Input]:
    for file in ("model.safetensors", "y_decoder/memory.safetensors", "y_decoder/model.safetensors"):
        for name in ("empty", "text", "no tensors", "a header of brackets", "a shape that overflows", "a pickle"):
            damage = with_bytes(file, headers()[name])
            yield Input(f"vl weights: {file}: {name}", damaged(base, damage, describe), file.rpartition("/")[2])

    def without(file: str) -> Damage:
        return lambda model, folder: (model / file).unlink()

    for file in ("model.safetensors", "y_decoder/memory.safetensors", "y_decoder/memory.json", "y_decoder/config.json",
                 "target_tokenizer/tokenizer.json", "target_tokenizer/tokenizer_config.json"):  # fmt: skip
        says = file.rpartition("/")[2] if "target" not in file else "target_tokenizer"
        yield Input(f"vl weights: {file} is missing", damaged(base, without(file), describe), says)


def _configs(base: Path, describe: Callable[[Path], Command], classify: Callable[[Path], Command]) -> Iterator[Input]:
    places = ("", "x_encoder_config__", "predictor_config__", "y_encoder_config__")
    for place in places:
        for spelling in SPELLINGS[:3]:
            for name in KERNELS[:3]:
                make = damaged(base, with_options({place + spelling: name}), classify)
                yield Input(f"vl kernel: {place}{spelling} {name}", watching_kernels(make), spelling)
    damage = with_options({"lm_config__attn_implementation": "stranger/kernel"}, "y_decoder/config.json")
    yield Input("vl kernel: y_decoder", watching_kernels(damaged(base, damage, describe)), "attn_implementation")
    wrong: dict[str, Any] = {
        "shared_dim": 10**9, "num_frames": 0, "motion_dim": -1, "token_merge": [1], "temperature": 0,
        "y_pooling": "x", "visual_dim": 10**9, "visual_grid": "x", "predictor_config__num_hidden_layers":
        90_000, "x_encoder_config__image_size": 10**6, "y_encoder_config__vocab_size": 10**9,
        "x_encoder_config__num_labels": 10**8, "x_encoder_config__patch_size": 0,
        "predictor_config__num_attention_heads": 0, "x_encoder_config": 5, "predictor_config__model_type":
        "no-such", "y_encoder_config__hidden_act": "no-such", "max_query_tokens": 0,
        "x_encoder_config__model_type": "llama", "revisions": 5, "predictor_config": [],
    }  # fmt: skip
    for key, value in [*wrong.items(), ("num_frames", 10**9), ("motion_dim", 10**9)]:
        yield Input(f"vl config: {key} {value!r}", damaged(base, with_options({key: value}), classify), "")
    sizes = {"height": 10**6, "width": 10**6}
    for key in ("size", "crop_size"):
        damage = with_options(
            {"image_processor__size": sizes, "image_processor__do_resize": True}, "processor_config.json"
        )
        yield Input(f"vl processor: {key}", damaged(base, damage, classify), "resizes images to")
    memories: dict[str, bytes] = {
        "of fewer texts": b'["a"]', "of no texts": b"[]", "of numbers": b"[1, 2, 3]", "of lists": b"[[], [], []]",
    }  # fmt: skip
    for name, content in memories.items():
        says = "memory" if name in ("of fewer texts", "of no texts") else "memory.json"
        yield Input(f"vl memory: {name}", damaged(base, with_bytes("y_decoder/memory.json", content), describe), says)
    for key, value in {"made_for": "other", "memory_temperature": 0, "prefix_decoder": "yes"}.items():
        damage = with_options({key: value}, "y_decoder/y_decoder.json")
        yield Input(f"vl memory: {key} {value}", damaged(base, damage, describe), "")


def _parts(base: Path, shared: Path) -> Iterator[Input]:
    """Folders that a recipe names as the parts of a new model, and as its start."""
    parts = {name: _part(shared, name) for name in ("x_encoder", "predictor", "y_encoder")}
    clips = shared / "clips.jsonl"
    lines = [json.dumps({"image": image, "target": image}) for image in ("red.png", "blue.png")]
    clips.write_text("\n".join(lines) + "\n")

    def train(name: str) -> Callable[[Path], Command]:
        def command(model: Path) -> Command:
            values = {
                "family": "vl", **{part: str(path) for part, path in parts.items()}, name: str(model),
                "train_data": str(clips), "output_dir": "run", "max_steps": 1, "use_cpu": True, "report_to": "none",
                "shared_dim": 8, "num_frames": 1, "per_device_train_batch_size": 2,
            }  # fmt: skip
            if name == "vl_model":
                for part in (*parts, "shared_dim"):
                    del values[part]
            recipe = model.parent / "recipe.yaml"
            recipe.write_text(json.dumps(values))
            return ["train", str(recipe)]

        return command

    for name in (*parts, "vl_model"):
        whole = base if name == "vl_model" else parts[name]
        for kind, (damage, says) in config_damages().items():
            if (kind, name) in (("tokenizer", "x_encoder"), ("layers", "vl_model")):
                continue  # an x_encoder has no tokenizer; the layers of a VL-JEPA are those of its parts
            yield Input(f"door {name}: {kind}", damaged(whole, damage, train(name)), says)


def _part(shared: Path, name: str) -> Path:
    """A part of a VL-JEPA in a folder, with its tokenizer or image processor."""
    from transformers import AutoConfig, AutoModel

    from llm_jepa.lm import train_tokenizer
    from llm_jepa.vl import plain_frames

    from .bases import LLAMA, ROWS, SMALL

    folder = shared / name
    tokenizer = train_tokenizer(ROWS, 270)
    options: dict[str, Any] = {
        "x_encoder": {"model_type": "vit", **SMALL, "image_size": 16, "patch_size": 8},
        "predictor": {**LLAMA, "vocab_size": len(tokenizer)},
        "y_encoder": {"model_type": "bert", **SMALL, "vocab_size": len(tokenizer)},
    }[name]
    AutoModel.from_config(AutoConfig.for_model(**options)).save_pretrained(folder)
    (plain_frames(16) if name == "x_encoder" else tokenizer).save_pretrained(folder)
    return folder
