"""Share of predicted regexes that match the same lines as the gold ones, as a metric of Hugging Face `evaluate`.

    metric = evaluate.load("eval/metrics/regex_equivalence")
    metric.compute(predictions=["[ab].*"], references=["(a|b).*"])

Works offline. In an installed package, the folder is llm_jepa_eval/metrics. `evaluate` copies this file before it
imports it. Imports of ours are indented to hide them from the scanner of `evaluate`, which would say
"pip install 'eval'", another package. Keep one module a line in the others: the scanner reads no other form.
"""

import statistics

import datasets
import evaluate  # type: ignore[import-untyped]

try:
    try:  # in the repository
        from eval.graders import check_gold, regex
    except ImportError:  # installed
        from llm_jepa_eval.graders import check_gold, regex
except ModuleNotFoundError as missing:
    raise ImportError(
        "The metric regex_equivalence is a part of llm_jepa, and Python cannot see it here "
        f"(no module {missing.name}): "
        'pip install "llm-jepa[eval]", or run Python in the root of the repository. '
        "Do not pip install eval, which is another package."
    ) from None

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
