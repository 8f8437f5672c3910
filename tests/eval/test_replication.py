"""The replication grid: what each arm trains on, and its analysis worked by hand."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import yaml

from eval.experiments import replication, small_runs
from eval.experiments.replication import analysis, runs
from eval.experiments.replication.__main__ import main
from eval.experiments.replication.runs import ARMS, Cell, Setup, run_cell, setup_of
from eval.figures.inference import detectable_difference
from eval.tasks import nl_rx as nl_rx_data
from llm_jepa import UserError
from llm_jepa.synthetic import nl_rx

SMALL = Setup(validation=12)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """An NL-RX folder of generated rows: training and test requests in two wordings."""
    folder = tmp_path_factory.mktemp("nl_rx")
    for name, wording in (("synth", 0), ("turk", 4)):
        for part, split, number in (("train", "train", 80), ("test", "test", 10)):
            rows = nl_rx.generate(number, split=split, wordings=(wording,))
            (folder / f"{name}_{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_validation_is_held_out_by_regex(data):
    train, validation = runs._data(data, SMALL)
    regexes = [{row["messages"][-1]["content"] for row in part} for part in (train, validation)]
    assert len(validation) >= 12 and len(train) + len(validation) == 80
    assert not regexes[0] & regexes[1]


@pytest.mark.parametrize("arm", ["sft", "sft_flops", "vicreg", "stp_code", "mismatched"])
def test_a_cell_trains_its_arm_and_is_not_repeated(arm, data, tmp_path):
    weight = 0.0 if arm.startswith("sft") else 0.1
    cell = Cell("completion", arm, 0, 1e-3, weight, "test", 12, "", tmp_path / f"completion-{arm}-seed0.json")
    run_cell(cell, data, SMALL)
    result = json.loads(cell.out.read_text())
    assert result["lines"] == len(result["correct"]["turk"]) > 3
    assert result["cost"]["steps"] == (12 if arm != "sft_flops" else pytest.approx(16, abs=2))
    assert any("jepa_loss" in entry for entry in result["cost"]["log"]) == (weight > 0)
    before = cell.out.stat().st_mtime_ns
    run_cell(cell, data, SMALL)
    assert cell.out.stat().st_mtime_ns == before


def test_mismatched_changes_the_targets_alone(data, tmp_path):
    """With a weight so small that Adam's first step is the LM gradient's, the LM loss is that of sft."""
    logs = {}
    for arm, weight in (("sft", 0.0), ("mismatched", 1e-9), ("info_nce", 1e-9)):
        cell = Cell("completion", arm, 0, 1e-3, weight, "validation", 10, "", tmp_path / f"{arm}.json")
        run_cell(cell, data, SMALL)
        logs[arm] = json.loads(cell.out.read_text())["cost"]["log"]
    for one, other in zip(logs["sft"], logs["mismatched"], strict=True):
        assert one["lm_loss"] == pytest.approx(other["lm_loss"], rel=1e-3)
    assert [e["jepa_loss"] for e in logs["mismatched"]] != [e["jepa_loss"] for e in logs["info_nce"]]


def test_a_plan_has_its_own_rows_settings_and_arms(data, tmp_path):
    """Equal tokens: steps of plain SFT for the message views of `message`. Its result says what it was trained with."""
    arms = {"sft": {}, "message": {"objective": "cosine", "context_view": "message"}}
    arms |= {"wrong": {**arms["message"], "wrong_targets": True}, "equal": {"equal_tokens_of": "message"}}
    plan = {"validation": 12, "rows": 40, "lines": 3, "wordings": ["synth"], "arms": arms, "training": {"bf16": True}}
    setup = setup_of(plan)
    assert len(runs._data(data, setup)[0]) == 40 and runs._data(data, setup)[1] == runs._data(data, SMALL)[1]
    results = {}
    for arm in arms:
        weight = 1.0 if arm in ("message", "wrong") else 0.0
        cell = Cell("paper", arm, 0, 1e-3, weight, "test", 6, "", tmp_path / f"{arm}.json")
        run_cell(cell, data, setup)
        results[arm] = json.loads(cell.out.read_text())
        with pytest.raises(UserError, match="holds another run .*setup"):
            run_cell(cell, data, SMALL)
    assert results["equal"]["cost"]["steps"] > 6 == results["sft"]["cost"]["steps"]
    assert results["equal"]["cost"]["tokens"] == pytest.approx(results["message"]["cost"]["tokens"], rel=0.1)
    assert results["message"]["setup"]["options"] == arms["message"] and results["sft"]["setup"]["rows"] == 40
    assert results["sft"]["bits"]["synth"].keys() >= {"exact", "startswith", "contains", "equivalent", "stop_rate"}
    assert [len(result["correct"]["synth"]) for result in results.values()] == [3] * 4
    logs = [[entry["jepa_loss"] for entry in results[arm]["cost"]["log"]] for arm in ("message", "wrong")]
    assert logs[0] != logs[1]


def in_this_process(run, cells, jobs, *shared):
    return [run(cell, *shared) for cell in cells]


def test_selection_takes_the_best_and_comparison_uses_it(data, tmp_path, monkeypatch, capsys):
    """startswith on validation: learning rate 0.2 beats 0.1, weight 0.3 beats 0.5."""

    def run_cell(cell, *_):
        assert cell.part == "validation" and cell.protocol == "completion"
        value = cell.learning_rate + (1 if cell.weight == 0.3 else 0)
        cell.out.parent.mkdir(parents=True, exist_ok=True)
        cell.out.write_text(json.dumps({"metrics": {"synth": {"startswith": value}}}))
        return ""

    monkeypatch.setattr(runs, "side_by_side", in_this_process)
    monkeypatch.setattr(runs, "run_cell", run_cell)
    arms = ("cosine", "info_nce", "vicreg", "sigreg", "stp_paper", "stp_code")
    plan = {"steps": 9, "selection_seeds": [100], "validation": 12, "learning_rates": [0.1, 0.2]}
    plan |= {"weights": {arm: [0.3, 0.5] for arm in arms}}
    runs.select(data, plan, "", tmp_path, 1)
    settled = yaml.safe_load(capsys.readouterr().out.split("settled:")[1])
    assert settled == {"learning_rate": 0.2, "weights": dict.fromkeys(arms, 0.3)}

    cells = []
    monkeypatch.setattr(runs, "run_cell", lambda cell, *_: cells.append(cell) or "")
    protocols = {
        "completion": {"arms": list(ARMS), "seeds": [0, 1]},
        "paper": {"arms": ["sft", "cosine"], "seeds": [0]},
    }
    runs.compare(data, plan | {"settled": settled, "protocols": protocols}, "", tmp_path, 1)
    assert [(c.protocol, c.seed) for c in cells] == [("completion", 0)] * 9 + [("paper", 0)] * 2 + [
        ("completion", 1)
    ] * 9
    weights = {cell.arm: cell.weight for cell in cells}
    assert weights == {arm: 0.0 if arm.startswith("sft") else 0.3 for arm in ARMS}
    assert {cell.part for cell in cells} == {"test"} and {cell.learning_rate for cell in cells} == {0.2}


def test_a_protocol_can_have_its_own_rows(data, tmp_path, monkeypatch):
    """Three training sets under the same labels, and each run is told its own."""
    asked = []
    monkeypatch.setattr(runs, "side_by_side", in_this_process)
    monkeypatch.setattr(runs, "run_cell", lambda cell, data, setup: asked.append((cell, setup)) or "")
    sets = {
        "synth": {"labels": "completion"},
        "turk": {"labels": "completion", "train": "turk_train.jsonl", "rows": 30},
        "paper": {"steps": 4},
    }
    protocols = {name: {**own, "arms": ["sft"], "seeds": [0]} for name, own in sets.items()}
    settled = {"learning_rate": 0.2, "weights": {}}
    plan = {"steps": 9, "rows": 50, "validation": 12, "weights": {}, "settled": settled, "protocols": protocols}
    runs.compare(data, plan, "", tmp_path, 1)
    told = [(cell.out.stem, cell.protocol, cell.steps, setup.train, setup.rows) for cell, setup in asked]
    assert told == [
        ("synth-sft-seed0", "completion", 9, "synth_train.jsonl", 50),
        ("turk-sft-seed0", "completion", 9, "turk_train.jsonl", 30),
        ("paper-sft-seed0", "paper", 4, "synth_train.jsonl", 50),
    ]
    assert {setup.validation for _, setup in asked} == {12}


def test_a_cell_is_judged_on_its_part_with_its_labels(data, tmp_path, monkeypatch):
    asked, labels = [], []

    def judge(model, tokenizer, prompts, golds, max_new_tokens):
        asked.append((prompts, golds))
        return small_runs.Judged({"synth": dict.fromkeys(("startswith", "exact", "equivalent", "stop_rate"), 0)}, {})

    class Trainer:
        def __init__(self, model, args, rows, processing_class):
            labels.append((args, sum(label != -100 for row in rows["labels"] for label in row)))

    monkeypatch.setattr(small_runs, "judge", judge)
    monkeypatch.setattr(small_runs, "train", lambda trainer: {"tokens": 0})
    monkeypatch.setattr(runs, "LLMJEPATrainer", Trainer)
    for protocol, arm, part in (("completion", "vicreg", "validation"), ("paper", "stp_code", "test")):
        cell = Cell(protocol, arm, 0, 1e-3, 0.1, part, 10, "", tmp_path / f"{protocol}.json")
        run_cell(cell, data, SMALL)
    (prompts, golds), (both, answers) = asked
    validation = runs._data(data, SMALL)[1]
    assert golds == [row["messages"][-1]["content"] for row in validation] and set(prompts) == {"synth"}
    items = nl_rx_data.load(data)[0]
    assert answers == [item.answer for item in items]
    assert both["turk"] == [list(item.paraphrase) for item in items] != both["synth"]
    (vicreg, few), (stp, many) = labels
    assert (vicreg.regularizer, stp.objective, stp.stp_formula) == ("vicreg", "stp", "code")
    assert many > 1.5 * few, "paper labels are those of every token"


def write_runs(folder: Path, plan: dict) -> None:
    """startswith of seed s: sft 0.50, sft_flops 0.50 + s/100, cosine 0.56 - s/100."""
    (folder / "compare").mkdir(parents=True)
    for protocol, of in plan["protocols"].items():
        for arm in of["arms"]:
            for seed in of["seeds"]:
                value = {"sft": 0.5, "sft_flops": 0.5 + seed / 100, "cosine": 0.56 - seed / 100}[arm]
                metrics = dict.fromkeys(("startswith", "exact", "contains", "stop_rate", "equivalent"), value)
                right = "1" * round(100 * value)
                run = {"metrics": {"synth": metrics, "turk": metrics}, "lines": 100, "cost": {"tokens": 7},
                       "correct": {w: right.ljust(100, "0") for w in ("synth", "turk")}, "data_sha256": {}, "steps": 9,
                       "learning_rate": 0.1, "start": "", "part": "test", "weight": 0.3}  # fmt: skip
                (folder / "compare" / f"{protocol}-{arm}-seed{seed}.json").write_text(json.dumps(run))


PLAN = {"protocols": {"completion": {"arms": ["sft", "sft_flops", "cosine"], "seeds": [0, 1]}}}


def test_analysis_worked_by_hand(tmp_path):
    write_runs(tmp_path, PLAN)
    found = analysis.analyse(PLAN, tmp_path)["completion"]
    assert found["arms"]["cosine"]["synth startswith"] == [pytest.approx(0.555), pytest.approx(0.00707, abs=1e-5)]
    cosine = found["minus_sft"]["cosine - sft"]["synth"]
    assert cosine["startswith_by_seed"] == pytest.approx([6.0, 5.0])
    assert cosine["equivalent"]["estimate"] == pytest.approx(5.5)
    # one degree of freedom: mean 5.5, standard error 0.5, t = 11, p = 2 / pi * atan(1 / 11); Holm doubles it
    assert cosine["p"] == pytest.approx(0.05772, abs=1e-4) and cosine["p_holm"] == pytest.approx(0.11543, abs=1e-4)
    assert found["minus_sft"]["sft_flops - sft"]["synth"]["startswith_by_seed"] == pytest.approx([0.0, 1.0])
    assert found["controls"]["cosine - sft_flops"]["turk"]["startswith_by_seed"] == pytest.approx([6.0, 4.0])
    assert cosine["detectable"] == pytest.approx(detectable_difference(0.5**0.5, 2, num_tests=2))
    rows = analysis.table({"paper": found}).splitlines()
    assert any(row.startswith("| paper | cosine | 0.3 | 55.5 ± 0.7") and "60.59" in row for row in rows)
    assert any(row.startswith("| paper | cosine - sft | +5.5 (") for row in rows)


def test_analysis_refuses_half_a_comparison_and_mixed_settings(tmp_path):
    write_runs(tmp_path, PLAN)
    path = tmp_path / "compare" / "completion-cosine-seed1.json"
    run = json.loads(path.read_text())
    path.write_text(json.dumps(run | {"steps": 10}))
    with pytest.raises(UserError, match="2 settings or data sets"):
        analysis.analyse(PLAN, tmp_path)
    path.unlink()
    with pytest.raises(UserError, match="1 whole seed"):
        analysis.analyse(PLAN, tmp_path)


def test_the_plan_names_arms_that_exist_and_keeps_selection_apart():
    plan = yaml.safe_load(replication.PLAN.read_text())
    assert set(plan["weights"]) == set(ARMS) - {"sft", "sft_flops", "mismatched"}
    for of in plan["protocols"].values():
        assert of["arms"][0] == "sft" and set(of["arms"]) <= set(ARMS)
        assert not set(of["seeds"]) & set(plan["selection_seeds"])


def test_command_line_says_what_is_missing(tmp_path, capsys):
    assert main(["compare"]) == 2
    assert main(["compare", "--start", "x"]) == 2
    assert main(["compare", "--start", "x", "--out", str(tmp_path)]) == 2
    assert main(["select", "--data", str(tmp_path)]) == 2
    (tmp_path / "p.yaml").write_text("steps: 3")
    assert main(["analyse", "--plan", str(tmp_path / "p.yaml")]) == 2
    assert main(["analyse", "--plan", str(tmp_path / "q.yaml")]) == 2
    said = capsys.readouterr().err.splitlines()
    wanted = ["--data FOLDER", "--out FOLDER", "--plan FILE", "NL-RX folder", "keys must be steps", "cannot be read"]
    assert len(said) == len(wanted) and all(word in line for word, line in zip(wanted, said, strict=True)), said


def test_other_data_than_the_plans_are_refused_before_anything_starts(data, tmp_path, capsys):
    plan = tmp_path / "plan.yaml"
    plan.write_text(replication.PLAN.read_text() + f"\nrows: 40\ndata_sha256: {{synth_train.jsonl: {'ab' * 32}}}\n")
    words = ["compare", "--data", str(data), "--plan", str(plan), "--out", str(tmp_path / "out"), "--start", "x"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "synth_train.jsonl is not the file of the plan (SHA-256 " in said and len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    plan.write_text(replication.PLAN.read_text() + "\nwordings: [synth]\n")
    assert main(["analyse", "--plan", str(plan), "--out", str(tmp_path)]) == 2
    assert "the plan does not ask turk" in capsys.readouterr().err


@pytest.mark.parametrize(
    "settled",
    [
        "null",
        "3",
        "{learning_rate: 0.1}",
        "{learning_rate: 0.1, weights: {cosine: 0.1}}",
        "{learning_rate: many, weights: {cosine: 0.1, stp_code: 0.1}}",
        "{learning_rate: 0.1, weights: {cosine: 0.1, stp_code: 0.0}}",
        "{learning_rate: 0.1, weights: {cosine: 0.1, stp_code: 0.1, sft: 0.1}}",
    ],
)
def test_settings_that_are_not_whole_start_nothing(settled, data, tmp_path, monkeypatch, capsys):
    """An arm without a weight would be plain SFT with another name."""
    monkeypatch.setattr(runs, "run_cell", lambda *_: pytest.fail("a run started"))
    monkeypatch.setattr(runs, "side_by_side", in_this_process)
    path = tmp_path / "plan.yaml"
    plan = yaml.safe_load(replication.PLAN.read_text())
    plan |= {"weights": {"cosine": [0.1], "stp_code": [0.1]}, "settled": yaml.safe_load(settled)}
    path.write_text(yaml.safe_dump(plan))
    assert main(["compare", "--data", str(data), "--plan", str(path), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "`settled`" in said and len(said.splitlines()) == 1 and "Error" not in said
    assert not (tmp_path / "out").exists()
    path.write_text(yaml.safe_dump({key: value for key, value in plan.items() if key != "settled"}))
    assert main(["compare", "--data", str(data), "--plan", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "keys must be" in capsys.readouterr().err


def test_the_committed_runs_are_those_of_the_plan_in_another_process():
    """`compare` gives every run a process of its own. There, the plan is a copy."""
    plan = yaml.safe_load(replication.PLAN.read_text())
    setup = pickle.loads(pickle.dumps(setup_of(plan)))
    for arm, weight in (("sft", 0.0), ("mismatched", plan["settled"]["weights"]["info_nce"])):
        path = runs.result_file("completion", arm, 0)
        rate = plan["settled"]["learning_rate"]
        cell = Cell("completion", arm, 0, rate, weight, "test", plan["steps"], "", path)
        assert arm in run_cell(cell, Path("nowhere"), setup), "it would be trained again, or refused"
