"""Whether a folder of a model is there. Asked before a library is imported, and again before the model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from .errors import UserError


def check_folder(source: str) -> None:
    """Raises UserError if `source` is a folder without a model, or clearly a path and not a Hub id."""
    check_path(source)
    path = Path(source)
    if (path / "adapter_config.json").is_file():
        refuse_adapter(source)
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"The folder {source} has no config.json, so it is not a saved model.")


def check_path(source: str) -> None:
    """Raises UserError if `source` is clearly a path, and no folder is there."""
    path = Path(source)
    # `runs/mistyped` looks like a Hub id; without a network, asking the Hub for it takes a minute of retries.
    starts_here = len(path.parts) > 1 and Path(path.parts[0]).is_dir()
    looks_local = path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1 or starts_here
    if looks_local and not path.is_dir():
        raise UserError(f"No model folder at {source}; check the path (it is relative to the current folder).")


def refuse_adapter(source: str) -> NoReturn:
    """transformers would load the model that an adapter names, from any place."""
    raise UserError(
        f"{source} holds an adapter, not a whole model: name the folder of the finished run, which holds the merged "
        "model, or merge it into its base (llm-jepa export ADAPTER OUT --to transformers --base BASE)."
    )
