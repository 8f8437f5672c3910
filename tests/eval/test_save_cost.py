"""Claims about the benchmark of saving: both arms save the same, and ours is complete."""

from __future__ import annotations

import json
import random

import pytest

from eval.cost import save_cost
from llm_jepa.core.checkpoint import checkpoints, fault
from llm_jepa.core.publish import MANIFEST


@pytest.mark.parametrize("case", ["lora", "vl"])
def test_both_arms_save_the_same_and_keep_one_checkpoint(case, tmp_path):
    """Ours has a manifest besides, and no training_args.bin, which is a pickle. The weights have equal sizes."""
    result = save_cost.measure(case, tmp_path, 1, random.Random(0))
    (ours,), (stock,) = checkpoints(tmp_path / "ours"), checkpoints(tmp_path / "stock")
    assert fault(ours) is None
    names, others = ({path.name for path in folder.rglob("*") if path.is_file()} for folder in (ours, stock))
    assert names - others <= {MANIFEST, "README.md", "llm_jepa.json"} and "optimizer.pt" in names
    for name in ("optimizer.pt", "adapter_model.safetensors" if case == "lora" else "model.safetensors"):
        assert 0.99 < (ours / name).stat().st_size / (stock / name).stat().st_size < 1.01
    seconds = result["seconds"]
    for arm in ("ours", "stock"):
        assert seconds[arm]["with_work"][0] > seconds[arm]["wait"][0] > 0
    assert result["ratios"]["wait"]["median"] == seconds["ours"]["wait"][0] / seconds["stock"]["wait"][0]


def test_the_command_writes_its_figures(tmp_path, monkeypatch, capsys):
    seconds = {"wait": [1.0, 3.0], "with_work": [2.0, 4.0], "complete": [1.5, 3.0]}
    twice = {figure: [2 * value for value in values] for figure, values in seconds.items()}
    arms = {"work": [1.0, 1.0], "ours": twice, "stock": seconds}
    ratios = {figure: save_cost.ratio(arms, figure) for figure in seconds}
    monkeypatch.setattr(
        save_cost,
        "measure",
        lambda name, *_: {"case": name, "model": "m", "bytes": {"ours": 5e8}, "seconds": arms, "ratios": ratios},
    )
    assert save_cost.main(["--case", "lm_large", "--out", str(tmp_path / "r.json")]) == 0
    assert json.loads((tmp_path / "r.json").read_text())["summary"] == dict.fromkeys(
        ("lm_large_wait", "lm_large_with_work", "lm_large_complete"), 2.0
    )
    assert "2.000 <= 1.15  MISSED" in capsys.readouterr().out
    assert save_cost.main(["--repetitions", "0"]) == 2
