"""A model folder without a tokenizer or a chat template: one line at every door, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval import step_cost
from eval.cost import throughput
from eval.experiments import replication
from eval.experiments.replication import __main__ as replication_command
from eval.experiments.replication import runs
from eval.run import main as run_main
from llm_jepa import cli
from llm_jepa.synthetic import nl_rx
from tests.conftest import tiny_model

DOORS = {
    "llm-jepa train": (
        cli.main,
        "train {recipe} --train_data {data}/synth_train.jsonl --model_name_or_path {model} --output_dir {out}",
    ),
    "eval.run": (run_main, "--model {model} --task nl_rx --data {data} --out {out}"),
    "replication": (
        replication_command.main,
        "compare --plan {plan} --data {data} --start {model} --out {out} --jobs 1",
    ),
    "step_cost": (step_cost.main, "--model {model} --data nl_rx --repetitions 1 --memory-batches 1 --out {out}"),
    "throughput": (throughput.main, "--quick --model {model} --data {data} --out {out}"),
}
LACKS = {"tokenizer": "holds no tokenizer that can be read", "template": "no chat template"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("nl_rx")
    for name, wording in (("synth", 0), ("turk", 4)):
        for part, number in (("train", 40), ("test", 10)):
            rows = nl_rx.generate(number, split=part, wordings=(wording,))
            (folder / f"{name}_{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("lacks", LACKS)
@pytest.mark.parametrize("door", DOORS)
def test_a_model_folder_that_is_not_whole(door, lacks, data, tokenizer, tmp_path, monkeypatch, capsys):
    model, out = tmp_path / "model", tmp_path / "out"
    tiny_model(tokenizer).save_pretrained(model)
    tokenizer.save_pretrained(model)
    for name in {"tokenizer": ("tokenizer.json", "chat_template.jinja"), "template": ("chat_template.jinja",)}[lacks]:
        (model / name).unlink()
    recipe, plan = tmp_path / "recipe.yaml", tmp_path / "plan.yaml"
    recipe.write_text("family: lm\nuse_cpu: true\ndisable_tqdm: true\nreport_to: none\nmax_steps: 1\n")
    plan.write_text(replication.PLAN.read_text().replace("validation: 512", "validation: 12"))
    monkeypatch.setattr(runs, "side_by_side", lambda run, cells, jobs, *shared: (run(cell, *shared) for cell in cells))
    main, words = DOORS[door]
    capsys.readouterr()
    places = {"recipe": recipe, "data": data, "model": model, "out": out, "plan": plan}
    assert main(words.format(**places).split()) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and LACKS[lacks] in lines[0], lines
    assert not out.exists()
