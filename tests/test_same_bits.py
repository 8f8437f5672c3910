"""Nothing that is computed changes: this version and an earlier one train the same runs to the same bits.

This is a relation between two versions on one machine, so no value is written down. LLM_JEPA_BASE names the earlier
commit.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from llm_jepa.synthetic import nl_rx
from llm_jepa.synthetic.shapestream.__main__ import main as make_shapestream
from tests.same_bits import LM_CASES, VL_CASES, folder_of

ROOT = Path(__file__).parents[1]
BASE = os.environ.get("LLM_JEPA_BASE", "d05be9c")  # the last commit with the old tree
# With a router loss, a mixture of experts had a row for each view. Its rows are packed now, so it rounds otherwise.
OTHER_BITS = {"experts"}
RESUMED = ["info_nce", "ema and projector", "base", "jepa_dropout", "lora", "vl", "vl, cached"]

pytestmark = pytest.mark.slow


def compute(tree: Path, data: Path, out: Path, words: Sequence[str] = ()) -> dict:
    """What the package in `tree` computes, in an interpreter of its own."""
    script = str(Path(__file__).with_name("same_bits.py"))
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    run = subprocess.run(
        [sys.executable, script, str(data), str(out), *words], env=environment, cwd=out.parent, text=True,
        capture_output=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads((out / "bits.json").read_text())


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = nl_rx.generate(96, seed=3, wordings=(0, 1, 2, 3))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_shapestream(["--out", str(folder / "clips"), "--streams", "0", "--clips", "0", "--train", "30"])
    return folder


@pytest.fixture(scope="module")
def before(data, tmp_path_factory) -> tuple[Path, dict]:
    """The runs of the earlier version, and what they computed."""
    tree, out = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("runs") / "before"
    archive = subprocess.run(["git", "archive", BASE], cwd=ROOT, capture_output=True)
    if archive.returncode:
        pytest.skip(f"no commit {BASE} in this checkout")
    subprocess.run(["tar", "-x", "-C", str(tree)], input=archive.stdout, check=True)
    return out, compute(tree, data, out)


def test_every_run_computes_the_same_bits(before, data):
    """Losses, diagnostics and gradient norms of every step, the weights at the end, and the identity of the run."""
    out, expected = before
    computed = compute(ROOT, data, out.with_name("after"))
    assert set(computed) == set(expected) == {*LM_CASES, *VL_CASES}
    assert len({case["weights"] for case in computed.values()}) > 40, "the cases do not differ: this proves little"
    for name, case in expected.items():
        if name not in OTHER_BITS:
            assert computed[name] == case, name


def test_an_unfinished_run_of_before_resumes(before, data):
    """Cut back to its first checkpoint, it ends where the earlier version ended."""
    out, expected = before
    cut = out.with_name("resumed")
    for name in RESUMED:
        folder = folder_of(name, cut)
        folder.mkdir(parents=True)
        shutil.copy(folder_of(name, out) / "run.json", folder)
        shutil.copytree(folder_of(name, out) / "checkpoint-2", folder / "checkpoint-2")
    resumed = compute(ROOT, data, cut, ["--resume", *RESUMED])
    for name in RESUMED:
        assert resumed[name] == expected[name], name
