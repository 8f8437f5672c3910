"""Do the wordings of a question get the same answer, and the right one? A metric of Hugging Face `evaluate`.

    metric = evaluate.load("eval/metrics/paraphrase_consistency")
    metric.compute(predictions=["4", "four"], references=["4", "4"], groups=["q1", "q1"], grader="exact")

Works offline. In an installed package, the folder is llm_jepa_eval/metrics. `evaluate` copies this file before it
imports it. Imports of ours are indented to hide them from the scanner of `evaluate`, which would say
"pip install 'eval'", another package. Keep one module a line in the others: the scanner reads no other form.
"""

import collections

import datasets
import evaluate  # type: ignore[import-untyped]

try:
    try:  # in the repository
        from eval.figures.groups import DEFINITIONS, figures, read_answers
        from eval.graders import BY_NAME, check_gold
        from eval.tasks import nearest
    except ImportError:  # installed
        from llm_jepa_eval.figures.groups import DEFINITIONS, figures, read_answers
        from llm_jepa_eval.graders import BY_NAME, check_gold
        from llm_jepa_eval.tasks import nearest
    from llm_jepa import UserError
except ModuleNotFoundError as missing:
    raise ImportError(
        "The metric paraphrase_consistency is a part of llm_jepa, and Python cannot see it here "
        f"(no module {missing.name}): "
        'pip install "llm-jepa[eval]", or run Python in the root of the repository. '
        "Do not pip install eval, which is another package."
    ) from None

DESCRIPTION = "Per group of wordings, averaged over groups:\n" + "\n".join(
    f"{name}: {definition}." for name, definition in DEFINITIONS.items()
)


class ParaphraseConsistency(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=(
                "predictions, references: answers, one for each wording. groups: the question each belongs to; its "
                "first wording is the original. grader: decides which answers are right and which are the same, one of "
                f"{', '.join(BY_NAME)}."
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
            check_gold(grader, gold)
            right, key = BY_NAME[grader](gold, text)
            scores = {"correct": float(right)}
            rows.append({"group": group, "wording": str(seen[group]), "scores": scores, "answer_key": key})
            seen[group] += 1
        estimates = figures(read_answers(rows, "correct"))
        return {name: estimates["metrics", name] for name in DEFINITIONS}
