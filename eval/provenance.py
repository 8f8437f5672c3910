"""The origin of a number: versions, commit, hashes of weights."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llm_jepa.core.files import file_sha256

CODE = ("llm_jepa", "eval", "recipes")
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers")


def environment(*packages: str) -> dict[str, Any]:
    """Versions and commit, as every result file records them; of `packages` too."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in (*PACKAGES, *packages)},
        "commit": _git("rev-parse", "HEAD"),
        # A result file that is being written does not change the code, wherever it is written.
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", *CODE, ":!eval/results")),
    }


def weights_sha256(folder: Path) -> str | None:
    """One hash over all weight files of a saved model, or None for a Hub id."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return None
    return hashlib.sha256("".join(file_sha256(path) for path in files).encode()).hexdigest()


def _git(*arguments: str) -> str | None:
    here = Path(__file__).resolve().parent.parent
    result = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else None
