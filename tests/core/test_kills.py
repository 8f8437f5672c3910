"""Claim: whatever a kill leaves in output_dir, the same command ends with the run that was not killed.

See `tests.kills` for how a run is killed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from llm_jepa.cli import main
from llm_jepa.core.checkpoint import MANIFEST, fault_of_model
from tests.conftest import LLAMA
from tests.kills import add_torn_files, record
from tests.ranks import start
from tests.vl.test_commands import RECIPE as VL_RECIPE

SHORT = {
    "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "learning_rate": 0.01,
    "use_cpu": True, "report_to": "none", "disable_tqdm": True, "diagnostics_pairs": 8,
}  # fmt: skip
LM = {
    "family": "lm", "model_config": {**LLAMA, "attention_dropout": 0.1}, "tokenizer_vocab_size": 320,
    "per_device_train_batch_size": 4, "activation_checkpointing": False, "eval_strategy": "no", **SHORT,
}  # fmt: skip
VL = {**VL_RECIPE, "pairs_per_clip": 1, **SHORT}
BEST = {"validation_rows": 6, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
CASES = {
    "lm": LM,
    "lm, best": {**LM, **BEST, "save_total_limit": 1},
    "lm, ema": {**LM, "target_encoder": "ema"},
    "lm, lora": {**LM, "use_peft": True, "lora_r": 2, "lora_target_modules": "all-linear"},
    "lm, no checkpoint": {**LM, "save_strategy": "no"},
    "vl": VL,
    "vl, best": {**VL, **BEST, "save_total_limit": 1},
}
RESUME = ["--resume_from_checkpoint", "true"]


class Killed:
    """A finished run, and copies of its folder before every file event."""

    def __init__(self, name: str, folder: Path, rows: list[dict]) -> None:
        self.run, self.whole, self.states = folder / "run", folder / "whole", folder / "states"
        values = {**CASES[name], "output_dir": str(self.run)}
        values["train_data"] = str(_images(folder) if values["family"] == "vl" else _rows(folder, rows))
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(yaml.safe_dump(values))
        self.states.mkdir()
        process = start(_record, ["train", str(self.recipe)], str(self.run), str(self.states))
        process.join()
        assert process.exitcode == 0
        self.run.rename(self.whole)
        add_torn_files(self.states)
        self.names = sorted(path.name for path in self.states.iterdir())

    def can_resume(self, state: str) -> bool:
        return any((self.states / state).glob(f"checkpoint-*/{MANIFEST}"))

    def resume(self, state: str, *words: str) -> int:
        shutil.rmtree(self.run, ignore_errors=True)
        shutil.copytree(self.states / state, self.run, symlinks=True)
        return main(["train", str(self.recipe), *words])

    def check(self, state: str, output: str) -> None:
        """The run in its folder is the one that was not killed."""
        assert fault_of_model(self.run) is None, state
        assert not list(self.run.rglob(".stage-*")), state
        files = {path.relative_to(self.run) for path in self.run.rglob("*") if path.is_file()}
        assert files == {path.relative_to(self.whole) for path in self.whole.rglob("*") if path.is_file()}, state
        assert not [name for name in files if b".stage-" in (self.run / name).read_bytes()], state
        a, b = (load_file(folder / "model.safetensors") for folder in (self.run, self.whole))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), state
        assert _losses(self.run) == _losses(self.whole), state
        for path in sorted(self.whole.glob("**/*.json*")):
            name = path.relative_to(self.whole)
            if name.name not in (MANIFEST, "trainer_state.json"):  # these tell times
                assert (self.run / name).read_bytes() == path.read_bytes(), (state, name)
        is_new = not (self.states / state / "run.json").exists()
        if not is_new and not self.can_resume(state) and "already finished" not in output:
            assert "starting at step 0" in output, state


def _rows(folder: Path, rows: list[dict]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _images(folder: Path) -> Path:
    draw = np.random.default_rng(0)
    lines = []
    for i in range(12):
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "target": f"number {i % 5}"}) + "\n")
    (folder / "clips.jsonl").write_text("".join(lines))
    return folder / "clips.jsonl"


def _losses(folder: Path) -> list[float]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


def _record(words: list[str], run: str, states: str) -> None:
    def train() -> None:
        assert main(words) == 0

    record(train, run, states)


def _phase(state: Path) -> str:
    """Which save was cut: the first, a later one, the final one."""
    sealed = len(list(state.glob(f"checkpoint-*/{MANIFEST}")))
    return ("first", "later", "final")[sealed]


@pytest.mark.parametrize("name", ["lm", "vl"])
def test_a_sample_of_kills(name, rows, tmp_path, capsys):
    killed = Killed(name, tmp_path, rows)
    phases = {
        phase: [s for s in killed.names if _phase(killed.states / s) == phase] for phase in ("first", "later", "final")
    }
    assert all(len(states) > 10 for states in phases.values()), {k: len(v) for k, v in phases.items()}
    for phase, states in phases.items():
        for state in states[len(states) // 3 :: len(states)] if phase != "final" else (states[9], states[-4]):
            capsys.readouterr()
            words = [] if phase == "first" else RESUME
            assert killed.resume(state, *words) == 0, state
            killed.check(state, capsys.readouterr().out)
    assert main(["train", str(killed.recipe), *RESUME]) == 0
    assert "already finished (4 steps)" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_all_kills(name, rows, tmp_path, capsys):
    killed = Killed(name, tmp_path, rows)
    lost = {}
    for state in killed.names[:: 1 if name in ("lm", "vl") else 5]:
        for words in ([], RESUME):
            is_saved = killed.can_resume(state) or (killed.states / state / MANIFEST).exists()
            if is_saved and not words or words and not (killed.states / state / "run.json").exists():
                continue  # refused: without the words if there is a checkpoint, with them if there is no run
            capsys.readouterr()
            try:
                assert killed.resume(state, *words) == 0
                killed.check(state, capsys.readouterr().out)
            except (AssertionError, SystemExit) as error:
                lost[state, *words] = f"{error} {capsys.readouterr()}"[:300]
    print(f"{name}: {len(killed.names)} states, {len(lost)} lost", *lost.items(), sep="\n")
    assert not lost
