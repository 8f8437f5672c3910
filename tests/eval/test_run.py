"""Claims about scoring: what is counted and what is left out."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from eval import graders, provenance, run
from eval.pages import nl_rx as nl_rx_page
from eval.tasks import nl_rx
from llm_jepa import UserError
from llm_jepa.cli import main as cli
from llm_jepa.synthetic import nl_rx as generator
from tests.conftest import LLAMA

SHARED = Path(__file__).parents[3] / "shared" / "data" / "nl_rx"


def turn(text, answer):
    roles = ("system", "user", "assistant")
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, ("s", text, answer), strict=True)]}


def write_folder(folder, **files):
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(turn(*row)) + "\n" for row in rows))


def test_a_line_leaves_both_wordings_if_its_regex_or_either_text_is_known(tmp_path):
    """Five lines: one clean, one with a known regex, one with a known synth text, one with a known turk text, one whose
    turk text is known from the *synth* training file. Only the first stays."""
    write_folder(
        tmp_path,
        synth_test=[("s0", "r0"), ("s1", "r1"), ("s2", "r2"), ("s3", "r3"), ("s4", "r4")],
        turk_test=[("t0", "r0"), ("t1", "r1"), ("t2", "r2"), ("t3", "r3"), ("t4", "r4")],
        synth_train=[("other", "r1"), ("s2", "x"), ("t4", "y")],
        turk_train=[("t3", "z")],
    )
    items, dropped, files = nl_rx.load(tmp_path)
    assert [(item.line, item.answer) for item in items] == [(0, "r0")] and dropped == 4
    assert items[0].original[-1]["content"] == "s0" and items[0].paraphrase[-1]["content"] == "t0"
    assert len(files) == 4


def test_metrics_of_answers_worked_by_hand():
    """Gold `ab`: exact; trailing text (startswith, contains); leading text (contains only); wrong and cut."""
    texts = [("ab", True), ("ab.*", True), (".*ab", True), ("ba", False)]
    figures = run._means([{"scores": graders.written("ab", text, stopped)} for text, stopped in texts])
    assert figures == {"exact": 0.25, "startswith": 0.5, "contains": 0.75, "stop_rate": 0.75}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds neither"),
        ({"synth_test": [("a", "r")]}, "lacks turk_test.jsonl, synth_train.jsonl, turk_train.jsonl"),
        (
            {"synth_test": [("a", "r")], "turk_test": [], "synth_train": [], "turk_train": []},
            "must ask for the same regex",
        ),
        (
            {"synth_test": [("a", "r")], "turk_test": [("b", "q")], "synth_train": [], "turk_train": []},
            "Line 1 of synth_test.jsonl and turk_test.jsonl ask for different regexes",
        ),
    ],
)
def test_folders_that_cannot_be_scored(files, message, tmp_path):
    write_folder(tmp_path, **files)
    with pytest.raises(UserError, match=message):
        nl_rx.load(tmp_path)


def test_real_nl_rx_keeps_1771_of_2000_lines():
    if not (SHARED / "synth_test.jsonl").is_file():
        pytest.skip(f"the real NL-RX is not at {SHARED}")
    items, dropped, _ = nl_rx.load(SHARED)
    assert (len(items), dropped) == (1771, 229)


def test_run_scores_a_trained_model_and_records_where_the_numbers_come_from(tmp_path, capsys):
    """The overfitted model answers its training requests; the JSON repeats recipe, data hashes and diagnostics."""
    data = tmp_path / "data"
    generator.write(data, train=8, validation=4, test=4)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "family": "lm",
                "model_config": LLAMA,
                "tokenizer_vocab_size": 320,
                "use_cpu": True,
                "activation_checkpointing": False,
                "train_data": str(data / "train.jsonl"),
                "validation_data": str(data / "validation.jsonl"),
                "output_dir": str(tmp_path / "model"),
                "max_steps": 150,
                "learning_rate": 0.01,
                "seed": 7,
                "per_device_train_batch_size": 8,
                "eval_strategy": "steps",
                "eval_steps": 150,
                "report_to": "none",
                "disable_tqdm": True,
                "save_strategy": "no",
                "logging_steps": 50,
            }
        )  # fmt: skip
    )
    assert cli(["train", str(recipe)]) == 0
    # Score on the training requests themselves, so that a right answer is possible for so small a model.
    (data / "original_test.jsonl").write_text((data / "train.jsonl").read_text())
    (data / "paraphrase_test.jsonl").write_text((data / "train.jsonl").read_text())
    for name in ("train", "validation"):
        (data / f"{name}.jsonl").write_text(json.dumps(turn("nothing", "alike")) + "\n")
    out, samples = tmp_path / "result.json", tmp_path / "samples.jsonl"
    argv = ["--model", str(tmp_path / "model"), "--data", str(data), "--out", str(out), "--samples", str(samples)]
    assert run.main(argv) == 0
    assert "exact" in capsys.readouterr().out
    result = json.loads(out.read_text())
    assert result["metrics"]["original"]["exact"] > 0.7 and result["metrics"]["original"]["stop_rate"] > 0.7
    assert result["items"] == 8 and result["model"]["run"]["seed"] == 7
    assert result["model"]["validation"]["step"] == 150 and result["model"]["space_at_start"]["step"] == 0
    assert set(result["data_sha256"]) == {
        "original_test.jsonl", "paraphrase_test.jsonl", "train.jsonl", "validation.jsonl",
    }  # fmt: skip
    assert {"commit", "torch", "trl", "transformers"} <= set(result["environment"])
    assert str(tmp_path) not in out.read_text(), "a result file names a path of this machine"
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [(line["group"], line["wording"]) for line in lines] == [
        (str(i), wording) for i in range(8) for wording in ("original", "paraphrase")
    ]
    exact = sum(line["text"] == line["gold"] for line in lines if line["wording"] == "original") / 8
    assert exact == result["metrics"]["original"]["exact"] and "equivalent" in result["metrics"]["original"]
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "completion-sft-seed7.json").write_text(out.read_text())
    assert f"| completion | plain SFT | {100 * exact:.1f} |" in nl_rx_page.table(nl_rx_page.load(tmp_path / "results"))


def test_run_refuses_a_missing_model(tmp_path, capsys):
    write_folder(tmp_path, synth_test=[("a", "r")], turk_test=[("b", "r")], synth_train=[], turk_train=[])
    argv = ["--model", str(tmp_path / "none"), "--data", str(tmp_path), "--out", str(tmp_path / "o.json")]
    assert run.main(argv) == 2
    assert "No model folder" in capsys.readouterr().err


def test_what_lies_outside_the_code_does_not_make_it_another(tmp_path):
    """Or a result file in the tree would make the run that wrote it somebody else's."""
    (tmp_path / "eval").mkdir()
    shutil.copy(provenance.__file__, tmp_path / "eval" / "provenance.py")

    def git(*words):
        subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *words], cwd=tmp_path, check=True)

    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "code")
    spec = importlib.util.spec_from_file_location("copied_provenance", tmp_path / "eval" / "provenance.py")
    assert spec is not None and spec.loader is not None
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    for written in ("result.json", "eval/results/result.json"):
        (tmp_path / written).parent.mkdir(exist_ok=True)
        (tmp_path / written).write_text("{}")
        assert copied.environment()["uncommitted_changes"] is False
    with (tmp_path / "eval" / "provenance.py").open("a") as file:
        file.write("# changed\n")
    assert copied.environment()["uncommitted_changes"] is True
