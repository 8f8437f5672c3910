"""Every example of docs/examples runs as it is, with few steps, and says what it promises to show."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "docs" / "examples"
RUNS = {
    # name -> (words, what it prints)
    "own_jsonl": (["--steps", "2"], ("'0 plus one is' -> ", " of 48 find their own")),
    "paraphrase_views": (["--steps", "2"], ("with wordings", "multiply 3 by two")),
    "lora_one_gpu": (["--dry-run"], ("use_peft: true", "# The first row, packed")),
    "vl_own_videos": (["--steps", "2"], ("red_right.mp4", "blue_left.mp4")),
    "compare_two_checkpoints": (["--steps", "2"], ("recall@1", "llm-jepa")),
}


def test_every_example_is_run_here_and_named_in_the_documentation():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == RUNS.keys()
    page = (EXAMPLES / "README.md").read_text()
    assert all(f"({name}.py)" in page for name in RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_an_example_runs(name, tmp_path, monkeypatch, capsys):
    """In an empty folder, without arguments but the number of steps."""
    words, parts = RUNS[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
    try:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    except SystemExit as end:
        assert not end.code, capsys.readouterr().err
    out = capsys.readouterr().out
    assert all(part in out for part in parts), out
    assert (tmp_path / "runs" / "examples").is_dir() and len(list(tmp_path.iterdir())) == 1
