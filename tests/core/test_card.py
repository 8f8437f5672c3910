"""Claims about model cards: the facts of a run are in them, and what a stranger named never becomes markup."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import yaml
from transformers import TrainerState, TrainingArguments

from llm_jepa.core.card import CURVE, data_facts, draw_curve, last_evaluation, licence_of, training_facts
from llm_jepa.lm.arguments import LLMJEPAConfig
from llm_jepa.lm.card import Sample, write_model_card
from llm_jepa.lm.data import RowCounts

# A run of 4 steps.
LOG = [
    {"step": 0, "eval_recall_at_1": 0.125},
    {"step": 2, "loss": 1.0},
    {"step": 4, "eval_loss": 1.23456, "eval_recall_at_1": 0.5, "eval_runtime": 3.0, "eval_samples_per_second": 2.0},
]


def card(
    folder, base: str, log, *, saved_step: int = 4, pairs: int = 40, refusal=None, sample=None, **settings
) -> tuple[dict, str]:
    """The metadata and the text of a card of a model that came from `base`."""
    how = {"jepa_weight": 0.1, "objective": "cosine", "num_predictor_tokens": 1, "context_view": "prefix", **settings}
    model = SimpleNamespace(config=SimpleNamespace(_name_or_path=base, model_type="llama", llm_jepa=how))
    args = LLMJEPAConfig(str(folder), use_cpu=True)
    facts = {"training": {"steps": "4"}, "evaluation": last_evaluation(log, saved_step, pairs), "curve": None}
    counts = {"train": RowCounts(30, 2, 1)}
    written = write_model_card(folder, model, args, facts, counts, refusal, sample).read_text()
    _, head, text = written.split("---\n", 2)
    return yaml.safe_load(head), text


def test_metadata_and_figures_are_those_of_the_run(tmp_path):
    head, text = card(tmp_path / "run", "some/model", LOG)
    assert head["base_model"] == "some/model" and head["library_name"] == "transformers"
    assert "# run\n" in text and "Start: `some/model`" in text and "| figure | step 0 | step 4 |" in text
    assert "| loss |  | 1.235 |\n| recall_at_1 | 0.125 | 0.5 |\n" in text
    assert "| learning_rate | 2e-05 |" in text
    assert "| train rows | 30 (2 of them cut to max_length; 1 more left out, longer than max_length) |\n| steps" in text
    assert "| objective | cosine |" in text and "runtime" not in text and "per_second" not in text


@pytest.mark.parametrize("base", ["", "."])
def test_random_weights_and_a_folder_of_this_machine_are_no_base_model(base, tmp_path):
    head, text = card(tmp_path / "run", base, [])
    assert "base_model" not in head and "Not evaluated" in text


def test_the_card_says_what_the_data_was_and_not_where_it_lay(tmp_path):
    rows = tmp_path / "secret" / "rows.jsonl"
    rows.parent.mkdir()
    rows.touch()
    given = {
        "train_data": str(rows),
        "use_peft": True,
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_target_modules": ["q", "v"],
    }
    facts = data_facts(given, {"train_sha256": "0123456789abcdef0", "validation_sha256": "f" * 64})
    assert facts == {
        "train data": "rows.jsonl (sha256 0123456789abcdef)",
        "validation data": f"drawn from the train data (sha256 {'f' * 16})",
        "LoRA": "rank 8, alpha 16, modules q v",
    }
    assert data_facts({**given, "load_in_4bit": True}, {})["LoRA"].endswith(", modules q v, base model in 4 bits")
    assert data_facts({"train_data": "user/name"}, {"train_sha256": None}) == {"train data": "user/name"}


def test_the_time_is_that_of_this_process_and_the_steps_are_those_of_the_saved_weights():
    state = TrainerState(epoch=2.0, global_step=8, log_history=[{"step": 8, "train_runtime": 90, "num_tokens": 12345}])
    args = TrainingArguments(use_cpu=True)
    facts = training_facts(state, args, saved_step=8, began_at=0)
    assert facts["steps"] == "8" and facts["epochs"] == "2" and facts["tokens"] == "12,345"
    assert facts["time"] == "1.5 minutes on 1 x cpu; energy was not measured"
    facts = training_facts(state, args, saved_step=4, began_at=6)
    assert facts["steps"] == "4 (the best of 8)" and "epochs" not in facts
    assert "since it was resumed at step 6" in facts["time"]


def test_the_curve_is_drawn_from_three_logged_losses_on(tmp_path):
    log = [{"step": step, "loss": 1.0 / step, "jepa_loss": 0.5} for step in (1, 2, 3)]
    assert not draw_curve(log[:2], tmp_path / "few" / CURVE) and not (tmp_path / "few").exists()
    assert draw_curve([*log, {"step": 3, "eval_loss": 0.2}], tmp_path / CURVE)
    once = (tmp_path / CURVE).read_bytes()
    assert once.startswith(b"\x89PNG") and draw_curve([*log, {"step": 3, "eval_loss": 0.2}], tmp_path / CURVE)
    assert (tmp_path / CURVE).read_bytes() == once


@pytest.mark.parametrize(
    ("head", "licence"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n", "apache-2.0"),
        ("---\ntags: [a]\n---\nlicense: mit\n", None),
        ("license: mit\n", None),
        ("---\nlicense: [a, b]\n---\n", None),
        ("", None),
    ],
)
def test_the_licence_is_that_of_the_start_model(head, licence, tmp_path):
    (tmp_path / "README.md").write_text(head)
    assert licence_of(str(tmp_path)) == licence


@pytest.mark.parametrize("base", [None, "", "no/such-model", "not a repository: at all"])
def test_a_start_without_a_card_has_no_licence(base):
    assert licence_of(base) is None


def test_a_sample_is_shown_in_one_line_each_and_never_as_markup(tmp_path):
    sample = Sample("first\nline | <b>", "[x](http://y)", "`z`")
    _, text = card(tmp_path / "run", "", LOG, sample=sample)
    assert (
        "| prompt | first line &#124; &lt;b&gt; |" in text
        and "[x](" not in text
        and "| expected | &#96;z&#96; |" in text
    )
    assert "| prompt |" not in card(tmp_path / "run", "", LOG)[1]


def test_names_of_strangers_are_escaped(tmp_path):
    """In the text; in the metadata a name is a YAML string, whatever it holds."""
    head, text = card(tmp_path / "<b>run", "x: [y]\n- <i>z", LOG, readout="<script>")
    assert head["base_model"] == "x: [y]\n- <i>z" and head["tags"] == ["llm-jepa", "jepa", "sft"]
    assert "<b>" not in text and "<i>" not in text and "<script>" not in text
    assert "&lt;b&gt;run" in text and "&lt;script&gt;" in text


def test_figures_of_the_start_are_those_of_step_0_only():
    late = [{"step": 2, "eval_loss": 3.0}, {"step": 4, "eval_loss": 1.0}]
    assert last_evaluation(late, 4, 0).rows == [("loss", "", "1")] and last_evaluation(late, 4, 0).step == 4
    assert last_evaluation([{"step": 0, "eval_loss": 3.0}, late[1]], 4, 0).rows == [("loss", "3", "1")]


def test_figures_of_the_start_model_are_not_those_of_the_trained_one(tmp_path):
    """eval_strategy: no, and a learning rate of 1000: all that was measured is the model before its first step."""
    evaluation = last_evaluation([{"step": 0, "eval_recall_at_1": 0.875}, {"step": 4, "loss": 1e9}], 4, 40)
    assert (evaluation.step, evaluation.rows, evaluation.pairs) == (None, [], 0)
    _, text = card(tmp_path / "run", "", [{"step": 0, "eval_recall_at_1": 0.875}])
    assert (
        "Not evaluated: no figure of the saved weights (step 4)" in text
        and "0.875" not in text
        and "|---|---|---|" not in text
    )


@pytest.mark.parametrize(("saved_step", "is_said"), [(4, False), (5, True)])
def test_weights_that_are_later_than_the_last_evaluation_are_said_to_be(saved_step, is_said, tmp_path):
    _, text = card(tmp_path / "run", "", LOG, saved_step=saved_step)
    assert ("The saved weights are those of step 5, which were not evaluated." in text) == is_said


def test_the_number_of_pairs_is_the_one_that_was_measured(tmp_path):
    """Not the configured 512. Without geometry (one validation row) there is no such sentence."""
    assert "measured on 40 pairs" in card(tmp_path / "run", "", LOG)[1]
    assert "pairs, and depend" not in card(tmp_path / "run", "", [{"step": 4, "eval_loss": 1.0}], pairs=1)[1]


def test_every_validation_set_is_shown():
    """Trainer logs each of several sets by itself."""
    log = [{"step": 4, "eval_a_loss": 1.0}, {"step": 4, "eval_b_loss": 2.0}]
    assert last_evaluation(log, 4, 0).rows == [("a_loss", "", "1"), ("b_loss", "", "2")]
