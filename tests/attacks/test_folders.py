"""Claim: no model folder runs code, is written outside of, hangs or ends in a traceback; fine ones load."""

from __future__ import annotations

import pytest

from eval.faults.folders import inputs
from tests.attacks.inputs import faults_of


def test_hostile_model_folders(tmp_path):
    faults = faults_of(inputs, tmp_path, at_least=280, every=2)
    assert not faults, "\n".join(faults)


@pytest.mark.slow
def test_all_hostile_model_folders(tmp_path):
    faults = faults_of(inputs, tmp_path, at_least=550)
    assert not faults, "\n".join(faults)
