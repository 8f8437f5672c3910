"""Claim: the properties hold for many examples, too: for each subject more than 5,000, drawn anew at every run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SUBJECTS = {  # files, and how many times as many examples as in the default suite
    "views": (("tests/lm/test_views.py",), 40),
    "batching": (("tests/lm/test_batching_properties.py", "tests/lm/test_batching.py"), 12),
    "segmenters": (("tests/stream/test_segments.py",), 12),
    "graders of numbers and words": (("tests/eval/test_numbers.py", "tests/eval/test_graders.py"), 12),
    "graders of regexes and SQL": (("tests/eval/test_regexes.py", "tests/eval/test_sql.py"), 3),
}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_properties_hold_for_five_thousand_examples(subject):
    files, times = SUBJECTS[subject]
    words = ["-q", "-m", "hypothesis and not slow", "-p", "no:cacheprovider", "--hypothesis-show-statistics"]
    process = subprocess.run(
        [sys.executable, "-m", "pytest", *words, *files], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "LLM_JEPA_TEST_TIMES": str(times)},
    )  # fmt: skip
    assert process.returncode == 0, process.stdout[-5000:]
    passing = sum(map(int, re.findall(r"(\d+) passing(?: examples)?, 0 failing", process.stdout)))
    print(f"{subject}: {passing} examples")
    assert passing >= 5000
