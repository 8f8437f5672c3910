"""The real command line with `--launch`, in processes of its own. A rank can be made to run some code first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def environment(folder: Path, code: str = "") -> dict[str, str]:
    """An environment in which every rank runs `code` before anything else; the launcher does not."""
    if code:  # Python imports this module when it starts
        lines = "".join(f"    {line}\n" for line in code.splitlines())
        (folder / "sitecustomize.py").write_text(f"import os\nif 'RANK' in os.environ:\n{lines}")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


def launch(folder: Path, words: list[str], code: str = "", *, timeout_s: float = 300) -> subprocess.CompletedProcess:
    """`llm-jepa` with these words."""
    return subprocess.run(
        [sys.executable, "-m", "llm_jepa.cli", *words],
        capture_output=True, text=True, timeout=timeout_s, env=environment(folder, code),
    )  # fmt: skip
