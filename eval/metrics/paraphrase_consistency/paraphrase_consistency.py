"""Do the wordings of a question get the same answer, and the right one?

    metric = evaluate.load("eval/metrics/paraphrase_consistency")
    metric.compute(predictions=["4", "four"], references=["4", "4"], groups=["q1", "q1"], grader="exact")

Offline; `evaluate` copies this file before it imports it, so the repository's root must be on the path (run Python
there). One module a line: its scanner of imports reads no other form.
"""

import collections

import datasets
import evaluate  # type: ignore[import-untyped]

from eval.figures.groups import DEFINITIONS, figures, read_answers
from eval.graders import BY_NAME
from eval.tasks import nearest
from llm_jepa import UserError

DESCRIPTION = "Per group of wordings, averaged over groups:\n" + "\n".join(
    f"{name}: {what}." for name, what in DEFINITIONS.items()
)


class ParaphraseConsistency(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=(
                "predictions, references: answers, one for each wording. groups: the question each belongs to; its "
                f"first wording is the original. grader: {', '.join(BY_NAME)} (what is right, what is the same)."
            ),
            features=datasets.Features(
                {name: datasets.Value("string") for name in ("predictions", "references", "groups")}
            ),
        )

    def _compute(self, predictions, references, groups, grader="exact"):
        if grader not in BY_NAME:
            raise UserError(f"There is no grader {grader!r}{nearest(grader, BY_NAME)}")
        seen: collections.Counter[str] = collections.Counter()
        rows = []
        for group, gold, text in zip(groups, references, predictions, strict=True):
            right, key = BY_NAME[grader](gold, text)
            scores = {"correct": float(right)}
            rows.append({"group": group, "wording": str(seen[group]), "scores": scores, "answer_key": key})
            seen[group] += 1
        found = figures(read_answers(rows, "correct"))
        return {name: found["metrics", name] for name in DEFINITIONS}
