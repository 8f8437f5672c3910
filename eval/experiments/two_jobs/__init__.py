"""One checkpoint, two jobs: answers and retrieval from one model, at equal training tokens.

    python -m eval.experiments.two_jobs select  --data FOLDER --start MODEL   # the specialist's settings, on validation
    python -m eval.experiments.two_jobs compare --data FOLDER --start MODEL   # arms x seeds on test, as planned
    python -m eval.experiments.two_jobs analyse                               # the plan's analysis of the result files

eval/plans/pretrained-two-jobs.yaml is the plan. FOLDER holds nl_rx/ and spider/, MODEL is what
`python -m eval.pretrained prepare` writes. A run whose result file exists is not repeated. The retrieval specialist is
trained by sentence-transformers (`pip install -e '.[retrieval]'`).
"""

from pathlib import Path

PLAN = Path(__file__).parents[2] / "plans" / "pretrained-two-jobs.yaml"
RESULTS = Path(__file__).parents[2] / "results" / "pretrained" / "two_jobs"
