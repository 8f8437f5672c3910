"""Does an embedding objective use unlabelled paraphrases better than training on their tokens does?

    python -m eval.experiments.paraphrases prepare --data FOLDER   # split the data, train the base model; minutes
    python -m eval.experiments.paraphrases select                  # try the plan's grid on validation
    python -m eval.experiments.paraphrases confirm                 # arms x seeds on test, as the plan has settled
    python -m eval.experiments.paraphrases analyse                 # the plan's analysis of the committed result files

eval/plans/paraphrases.yaml is the plan. In words it holds the question, the arms, the primary metric, the analysis and
the stopping rule; as values it holds every setting that was chosen. It was committed before the first test run. A run
whose result file exists is not repeated, so each step can be stopped and started again.
"""

from pathlib import Path

PLAN = Path(__file__).parents[2] / "plans" / "paraphrases.yaml"
RESULTS = Path(__file__).parents[2] / "results" / "paraphrases"
