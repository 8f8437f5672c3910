"""Share of predicted regexes that match the same lines as the gold ones, as a metric of Hugging Face `evaluate`.

    metric = evaluate.load("eval/metrics/regex_equivalence")
    metric.compute(predictions=["[ab].*"], references=["(a|b).*"])

Works offline. `evaluate` copies this file before it imports it, so run Python in the repository's root. Keep one module
a line in the imports: the scanner of `evaluate` reads no other form.
"""

import statistics

import datasets
import evaluate  # type: ignore[import-untyped]

from eval.graders import check_gold, regex

DESCRIPTION = """\
equivalent: share of predictions that match the same lines as their reference (exact decision, NL-RX's dialect).
exact: share that are the same string. undecided: share whose automata are too large to decide; counted as wrong.
"""


class RegexEquivalence(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description="predictions, references: regexes, one for each question.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references):
        for gold in references:
            check_gold("regex", gold)
        grades = [regex(gold, text, True).scores for gold, text in zip(references, predictions, strict=True)]
        names = ("equivalent", "exact", "undecided")
        return {name: statistics.fmean([scores[name] for scores in grades]) for name in names}
