"""Judging and bookkeeping that the experiments share."""

from __future__ import annotations

import json

import pytest

from eval.experiments import small_runs
from llm_jepa import UserError
from llm_jepa.lm.inference import Generation

ASK = [{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}], [{"role": "user", "content": "c"}]


def test_answers_are_judged_by_language_wording_by_wording(monkeypatch):
    """synth: right in another spelling, right but running on, wrong. turk: right, wrong like synth's third, wrong."""
    answers = {"synth": ["b|a", "x.*", "z"], "turk": ["a|b", "y", "z|z"]}
    given = iter(answers.values())

    def generate(model, tokenizer, prompts, **_):
        assert list(prompts) == list(ASK)
        return [Generation(text, text != "y", 1) for text in next(given)]

    monkeypatch.setattr(small_runs, "generate", generate)
    found = small_runs.judge(None, None, {"synth": ASK, "turk": ASK}, ["a|b", "x", "q"])  # type: ignore[arg-type]
    assert found.correct == {"synth": "100", "turk": "100"}
    assert found.metrics["synth"]["equivalent"] == pytest.approx(1 / 3) and found.metrics["synth"]["exact"] == 0
    assert found.metrics["synth"]["startswith"] == pytest.approx(1 / 3) and found.metrics["turk"]["exact"] == 1 / 3
    assert found.metrics["turk"]["stop_rate"] == pytest.approx(2 / 3)
    # Of one wording there is nothing to be consistent with.
    given = iter(answers.values())
    assert "both" not in small_runs.judge(None, None, {"synth": ASK}, ["a|b", "x", "q"]).metrics  # type: ignore[arg-type]
    # The same language to both: the first, and the third, which is wrong both times.
    assert found.metrics["both"] == {"consistent": pytest.approx(2 / 3), "consistent_and_correct": pytest.approx(1 / 3)}


def test_a_result_of_other_settings_is_not_taken_for_this_one(tmp_path):
    path = tmp_path / "cell.json"
    path.write_text(json.dumps({"arm": "sft", "steps": 10}))
    small_runs.refuse_other_settings(path, {"arm": "sft", "steps": 10})
    with pytest.raises(UserError, match="steps 10 instead of 20"):
        small_runs.refuse_other_settings(path, {"arm": "sft", "steps": 20})
