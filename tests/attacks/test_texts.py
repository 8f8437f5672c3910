"""Claim: no template, regular expression or name of a stranger runs without a limit, or reaches the terminal raw."""

from __future__ import annotations

import pytest

from eval.faults import texts
from tests.attacks.inputs import faults_of

COUNTS = {"template": 90, "pattern": 15, "model_type": 10, "recipe key": 10, "prompt": 9, "folder": 10}


@pytest.mark.parametrize("family", COUNTS)
def test_hostile_texts(family, tmp_path):
    assert faults_of(texts.inputs, tmp_path, at_least=COUNTS[family], names=family) == []


@pytest.mark.slow  # each starts a child that computes until its limit
def test_hostile_templates_when_they_are_loaded(tmp_path):
    assert faults_of(texts.inputs, tmp_path, at_least=60, names="loaded") == []
