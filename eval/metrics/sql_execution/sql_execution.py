"""Share of predicted queries that return the rows of the gold queries, as a metric of Hugging Face `evaluate`.

    metric = evaluate.load("eval/metrics/sql_execution")
    metric.compute(predictions=["SELECT 1"], references=["SELECT 2 - 1"], db_ids=["shop"], databases="spider/database")

Works offline. In an installed package, the folder is llm_jepa_eval/metrics. `evaluate` copies this file before it
imports it. Imports of ours are indented to hide them from the scanner of `evaluate`, which would say
"pip install 'eval'", another package. Keep one module a line in the others: the scanner reads no other form.
"""

import statistics

import datasets
import evaluate  # type: ignore[import-untyped]

try:
    try:  # in the repository
        from eval.graders import sql_execution
        from eval.graders.sql import Databases
    except ImportError:  # installed
        from llm_jepa_eval.graders import sql_execution
        from llm_jepa_eval.graders.sql import Databases
except ModuleNotFoundError as missing:
    raise ImportError(
        "The metric sql_execution is a part of llm_jepa, and Python cannot see it here "
        f"(no module {missing.name}): "
        'pip install "llm-jepa[eval]", or run Python in the root of the repository. '
        "Do not pip install eval, which is another package."
    ) from None

DESCRIPTION = """\
execution: share of predictions that run and return the rows of their reference (in order, if it asks for an order).
failed: share of predictions that do not run. A missing database or a failing reference is an error.
"""


class SqlExecution(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=(
                "predictions, references: queries. db_ids: their databases. databases: the folder that holds "
                "<db_id>/<db_id>.sqlite."
            ),
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Value("string"),
                    "db_ids": datasets.Value("string"),
                }
            ),
        )

    def _compute(self, predictions, references, db_ids, databases):
        with Databases(databases) as connections:
            grades = [
                sql_execution(connections.grade(db_id, gold, text), True).scores
                for db_id, gold, text in zip(db_ids, references, predictions, strict=True)
            ]
        return {name: statistics.fmean([scores[name] for scores in grades]) for name in ("execution", "failed")}
