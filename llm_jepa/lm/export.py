"""`llm-jepa export`: a trained model for other people's programs.

--to transformers    the merged model, also for transformers 4, vLLM and other readers of its files
--to adapter         a LoRA adapter that names its base model
--to gguf            one file for llama.cpp; see `gguf_file`

Nothing is overwritten, and OUT appears when it is complete.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KINDS = ("transformers", "adapter", "gguf")
DTYPES = ("float32", "float16", "bfloat16", "q8_0")
# What sentence-transformers needs beside the model.
EMBEDDING_FILES = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")
EMBEDDING_FOLDERS = re.compile(r"\d+_\w+")
STRIPPED = "Its predictor tokens were removed: it generates as before, and cannot embed as the original does."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `llm-jepa export`."""
    parser.add_argument("model", help="folder of a finished run, of a checkpoint or of an adapter")
    parser.add_argument("out", help="folder to make")
    parser.add_argument("--to", choices=KINDS, required=True, help="what to make")
    parser.add_argument(
        "--base",
        help="base model of an adapter (default: what it names): a Hub id, or a folder if it is merged",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="type of the numbers (default: as saved); q8_0 for gguf only")
    parser.add_argument(
        "--strip-predictor", "--strip_predictor", action="store_true",
        help="leave the predictor tokens out; the model then generates, and cannot embed as it was trained to",
    )  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Export a model and say what to do with it."""
    source, out = Path(options.model), Path(options.out)
    check_options(options)
    _check_source(source)
    if os.path.lexists(out):
        raise UserError(f"{out} exists; choose a new folder.")
    if out.absolute().is_relative_to(source.absolute()):
        raise UserError(f"{out} is inside of {source}; choose a folder beside it.")
    if options.to == "adapter":
        from .adapter import export_adapter

        export_adapter(_adapter_of(source), out, base=options.base, strip=options.strip_predictor)
    else:
        _export_model(source, out, options)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"Wrote {out} ({size / 1e6:,.1f} MB). {_next_step(options.to, out)}")


def check_options(options: argparse.Namespace) -> None:
    """Raises UserError for options that do not go together, before anything is loaded."""
    if options.dtype == "q8_0" and options.to != "gguf":
        raise UserError("--dtype q8_0 is a type of GGUF; write --to gguf, or choose float32, float16 or bfloat16.")
    if options.to == "adapter" and options.dtype:
        raise UserError("--dtype does not go with --to adapter, which is written as it was saved; remove it.")
    if options.to == "gguf":
        try:
            import gguf  # noqa: F401
        except ModuleNotFoundError:
            raise UserError('--to gguf needs the package gguf: pip install "llm-jepa[gguf]"') from None


def _next_step(kind: str, out: Path) -> str:
    if kind == "gguf":
        return f"Try it: llama-cli -m {out}/{out.name}.gguf"
    return f"Publish it: llm-jepa push {out} USER/NAME --private"


# -- what is exported -------------------------------------------------------------------------------------------------


def _check_source(source: Path) -> None:
    """Raises UserError if there is no finished model in the folder, or one of another family."""
    from ..core.checkpoint import RUN_FILE, newest_sealed
    from ..core.publish import damage_of

    if not source.is_dir():
        raise UserError(f"No folder {source}; name that of a finished run, of a checkpoint or of an adapter.")
    if reason := damage_of(source):
        raise UserError(f"{source} is not complete: {reason}. Take a whole copy, or let the run save it again.")
    if _is_adapter(source) or (source / "config.json").is_file():
        return
    if (source / RUN_FILE).is_file():
        newest = newest_sealed(source)
        way_on = f", or export its checkpoint {newest}" if newest else ""
        raise UserError(f"The run in {source} is not finished; resume it{way_on}.")
    raise UserError(f"{source} holds neither a model (config.json) nor an adapter (adapter_config.json).")


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def _adapter_of(source: Path) -> Path:
    """The folder of the adapter of a run. Raises UserError for a model that was trained whole."""
    for folder in (source, source / "adapter"):
        if _is_adapter(folder):
            return folder
    raise UserError(
        f"{source} has no adapter: all of its weights were trained, which an adapter cannot hold; write "
        "--to transformers."
    )


def _load(source: Path, base: str | None, dtype: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The whole model of a folder; an adapter is merged into its base."""
    from .loading import model_from, tokenizer_from

    if _is_adapter(source):
        from .adapter import merged_model

        return merged_model(source, base, dtype=dtype)
    if base is not None:
        raise UserError(f"--base goes with an adapter, and {source} holds a whole model; remove it.")
    tokenizer = tokenizer_from(str(source))
    return model_from(str(source), dtype=dtype).eval(), tokenizer


# -- whole models -----------------------------------------------------------------------------------------------------


def _export_model(source: Path, out: Path, options: argparse.Namespace) -> None:
    import torch

    from ..core.portable import save_model, save_tokenizer
    from ..core.publish import published
    from .gguf_file import write_gguf
    from .predictor_tokens import known_predictor_ids
    from .sentence_transformer import write_files

    is_gguf = options.to == "gguf"
    dtype = "auto" if options.dtype in (None, "q8_0") else getattr(torch, options.dtype)
    model, tokenizer = _load(source, options.base, dtype)
    predictors = known_predictor_ids(tokenizer)
    if is_gguf and predictors and not options.strip_predictor:
        raise UserError(
            "GGUF cannot say that a token must not be generated, and this model has predictor tokens, which are inputs "
            "only; add --strip-predictor."
        )
    stripped = strip_predictor_tokens(model, tokenizer) if options.strip_predictor else []
    with published(out) as stage:
        folder = stage
        if is_gguf:
            folder = stage / ".model"
            folder.mkdir()
        save_model(model, folder)
        save_tokenizer(tokenizer, folder, without=stripped)
        if is_gguf:
            write_gguf(model, folder, stage / f"{out.name}.gguf", kind=options.dtype, name=out.name)
            shutil.rmtree(folder)
            return
        _copy_card(source, folder, out.name, stripped=bool(stripped))
        if hasattr(model.config, "llm_jepa"):
            write_files(folder, tokenizer, model.config)
        else:
            _copy_embedding_files(source, folder)


def strip_predictor_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Remove the rows of the predictor tokens from the model, in place, and return the names of the tokens.

    `save_tokenizer` removes them from the tokenizer. Raises UserError if the model has none, or if a token has a higher
    id: it would get another row.
    """
    from .predictor_tokens import known_predictor_ids
    from .token_rows import vocabulary_size

    ids = set(known_predictor_ids(tokenizer))
    if not ids:
        raise UserError("This model has no predictor tokens to strip; remove --strip-predictor.")
    others = set(tokenizer.get_vocab().values()) - ids
    size = max(others) + 1
    if size > min(ids):
        last = tokenizer.convert_ids_to_tokens(max(others))
        raise UserError(
            f"The predictor tokens cannot be stripped: {last!r} has a higher id than they have, and would lose its "
            "row. Export the model with them."
        )
    assert size < vocabulary_size(tokenizer)
    model.resize_token_embeddings(size, mean_resizing=False)
    generation = model.generation_config
    if generation is not None and generation.suppress_tokens is not None:
        generation.suppress_tokens = [token for token in generation.suppress_tokens if token not in ids] or None
    record = getattr(model.config, "llm_jepa", None) or {}
    model.config.llm_jepa = {"prompt": record["prompt"]} if "prompt" in record else {}
    model.config.llm_jepa["is_stripped"] = True
    return sorted(tokenizer.convert_ids_to_tokens(sorted(ids)))


def _copy_card(source: Path, folder: Path, name: str, *, stripped: bool) -> None:
    """The card of the run under the new name; a checkpoint has none, so it gets one that says so."""
    from ..core.card import CURVE
    from ..core.files import write_whole
    from ..core.json_files import read_text

    card = source / "README.md"
    if card.is_file() and not _is_adapter(source):
        text = read_text(card).replace(f'"{source.name}"', f'"{name}"').replace(f"# {source.name}\n", f"# {name}\n")
        if (source / CURVE).is_file():
            shutil.copyfile(source / CURVE, folder / CURVE)
    else:
        text = PLAIN_CARD.format(name=name)
    if stripped:
        text = f"{text.rstrip()}\n\n{STRIPPED}\n"
    write_whole(folder / "README.md", text)


PLAIN_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- llm-jepa
- jepa
---
# {name}

A causal LM, exported from a checkpoint of [LLM-JEPA](https://arxiv.org/abs/2509.14252) training. It is plain
`transformers`:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

Nothing was measured of this copy.
"""


def _copy_embedding_files(source: Path, folder: Path) -> None:
    for name in EMBEDDING_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    for path in sorted(source.iterdir()):
        if EMBEDDING_FOLDERS.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            (folder / path.name).mkdir()
            for file in sorted(path.iterdir()):
                if file.suffix in (".json", ".safetensors") and not file.is_symlink():
                    shutil.copyfile(file, folder / path.name / file.name)
