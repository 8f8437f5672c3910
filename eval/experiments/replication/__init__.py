"""What does the JEPA term change? The published comparison, repeated at the size that two CPU cores allow.

    python -m eval.experiments.replication select  --data FOLDER   # weights and learning rate, on validation
    python -m eval.experiments.replication compare --data FOLDER   # arms x protocols x seeds on test, as planned
    python -m eval.experiments.replication analyse                 # the plan's analysis of the committed result files

eval/plans/replication.yaml is the plan. A run whose result file exists is not repeated. With `--start NAME` the runs
start from a checkpoint (a folder or a Hub id) instead of random weights: the same comparison on a pretrained model, if
you have one and a GPU. Such a comparison needs its own settings, `--plan` (copy ours, set `settled: null`, run
`select`), and its own folder, `--out`.
"""

from pathlib import Path

PLAN = Path(__file__).parents[2] / "plans" / "replication.yaml"
RESULTS = Path(__file__).parents[2] / "results" / "replication"
