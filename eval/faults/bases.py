"""Small saved models, and ways to damage them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoConfig, set_seed

from .inputs import Command, canary

Damage = Callable[[Path, Path], None]  # (model folder, folder of the input): change the model

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
SMALL: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip
ROWS = [{"prompt": f"{i} plus one", "completion": f"{i + 1}"} for i in range(12)]
TEXTS = ("a red square", "it moves left", "blue")


def rows_file(folder: Path) -> Path:
    """Rows to train on or to embed."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def lm_folder(folder: Path, **options: Any) -> Path:
    """A causal LM with its tokenizer. Options of its config."""
    from llm_jepa.lm import random_model, train_tokenizer

    tokenizer = train_tokenizer(ROWS, 270)
    random_model({**LLAMA, **options}, tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def vl_folder(folder: Path) -> Path:
    """A VL-JEPA with a y_decoder that is a memory of texts and a prefix decoder."""
    from llm_jepa.lm import random_model, train_tokenizer
    from llm_jepa.vl import (
        VLJEPA,
        MemoryProjection,
        PrefixDecoder,
        PrefixDecoderConfig,
        VLJEPAModel,
        VLJEPAProcessor,
        YDecoder,
        plain_frames,
    )
    from llm_jepa.vl.y_decoder import fingerprint

    set_seed(0)
    tokenizer, targets = train_tokenizer(ROWS, 270), train_tokenizer(ROWS, 268)
    parts = {
        "x_encoder": {"model_type": "vit", **SMALL, "image_size": 16, "patch_size": 8},
        "predictor": {**LLAMA, "num_hidden_layers": 1, "vocab_size": len(tokenizer)},
        "y_encoder": {"model_type": "bert", **SMALL, "vocab_size": len(targets)},
    }
    configs = {name: AutoConfig.for_model(**options) for name, options in parts.items()}
    model = VLJEPAModel.from_parts(**configs, shared_dim=8, num_frames=2, frame_size=16)
    pieces = {"image_processor": plain_frames(16), "tokenizer": tokenizer, "target_tokenizer": targets}
    used = VLJEPA(model, VLJEPAProcessor.from_parts(model.config, **pieces))
    used.save_pretrained(folder)
    lm = random_model(LLAMA, tokenizer, seed=0)
    decoder = PrefixDecoder(PrefixDecoderConfig(lm_config=lm.config, embedding_dim=8, num_prefix=2), lm)
    memory = MemoryProjection(used.embed_texts(TEXTS), TEXTS)
    YDecoder(fingerprint(used.model), memory, decoder, tokenizer).save_pretrained(folder / "y_decoder")
    (folder / "y_decoder" / "manifest.json").unlink(missing_ok=True)  # a stranger would seal what he changed
    return folder


def generate(model: Path) -> Command:
    """The command that reads every file of a model."""
    return ["generate", str(model), "--prompt", "1 plus one", "--max_new_tokens", "2"]


def damaged(base: Path, damage: Damage, command: Callable[[Path], Command] = generate) -> Callable[[Path], Command]:
    """An input: a copy of a model, changed."""

    def make(folder: Path) -> Command:
        model = folder / "model"
        shutil.copytree(base, model)
        damage(model, folder)
        return command(model)

    return make


def with_options(options: dict[str, Any], file: str = "config.json") -> Damage:
    """Set keys of a JSON file; a key of a sub-config is written outer__inner."""

    def damage(model: Path, folder: Path) -> None:
        path = model / file
        values = json.loads(path.read_text())
        for key, value in options.items():
            *outer, last = key.split("__") if "__" in key.strip("_") else [key]
            place = values
            for name in outer:
                place = place[name]
            place[last] = value
        path.write_text(json.dumps(values))

    return damage


def with_bytes(file: str, content: bytes) -> Damage:
    """Replace a file."""

    def damage(model: Path, folder: Path) -> None:
        (model / file).parent.mkdir(exist_ok=True)
        (model / file).write_bytes(content)

    return damage


def hostile_pickle(folder: Path) -> bytes:
    """A pickle that creates the canary when it is loaded. Protocol 0 is text: os.system with one argument."""
    return f"cos\nsystem\n(S'touch {canary(folder)}'\ntR.".encode()
