"""Claims about model cards: the facts of a run are in them, and what a stranger named never becomes markup."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import yaml

from llm_jepa.core.card import last_evaluation
from llm_jepa.lm.arguments import LLMJEPAConfig
from llm_jepa.lm.card import write_model_card
from llm_jepa.lm.data import RowCounts

# A run of 4 steps.
LOG = [
    {"step": 0, "eval_recall_at_1": 0.125},
    {"step": 2, "loss": 1.0},
    {"step": 4, "eval_loss": 1.23456, "eval_recall_at_1": 0.5, "eval_runtime": 3.0, "eval_samples_per_second": 2.0},
]


def card(folder, base: str, log, *, saved_step: int = 4, pairs: int = 40, refusal=None, **settings) -> tuple[dict, str]:
    """The metadata and the text of a card of a model that came from `base`."""
    how = {"jepa_weight": 0.1, "objective": "cosine", "num_predictor_tokens": 1, "context_view": "prefix", **settings}
    model = SimpleNamespace(config=SimpleNamespace(_name_or_path=base, model_type="llama", llm_jepa=how))
    args = LLMJEPAConfig(str(folder), use_cpu=True)
    evaluation, counts = last_evaluation(log, saved_step, pairs), {"train": RowCounts(30, 2, 1)}
    _, head, text = write_model_card(folder, model, args, evaluation, counts, refusal).read_text().split("---\n", 2)
    return yaml.safe_load(head), text


def test_metadata_and_figures_are_those_of_the_run(tmp_path):
    head, text = card(tmp_path / "run", "some/model", LOG)
    assert head["base_model"] == "some/model" and head["library_name"] == "transformers"
    assert "# run\n" in text and "Start: `some/model`" in text and "| figure | step 0 | step 4 |" in text
    assert "| loss |  | 1.235 |\n| recall_at_1 | 0.125 | 0.5 |\n" in text
    assert "| learning_rate | 2e-05 |" in text
    assert "| train rows | 30 (2 of them cut to max_length; 1 more left out, longer than max_length) |\n\nLast" in text
    assert "| objective | cosine |" in text and "runtime" not in text and "per_second" not in text


@pytest.mark.parametrize("base", ["", "."])
def test_random_weights_and_a_folder_of_this_machine_are_no_base_model(base, tmp_path):
    head, text = card(tmp_path / "run", base, [])
    assert "base_model" not in head and "Not evaluated" in text


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
