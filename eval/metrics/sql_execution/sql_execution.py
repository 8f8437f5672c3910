"""Do predicted queries return the rows of the gold ones?

    metric = evaluate.load("eval/metrics/sql_execution")
    metric.compute(predictions=["SELECT 1"], references=["SELECT 2 - 1"], db_ids=["shop"], databases="spider/database")

Offline; `evaluate` copies this file before it imports it, so the repository's root must be on the path (run Python
there). One module a line: its scanner of imports reads no other form.
"""

import datasets
import evaluate  # type: ignore[import-untyped]

from eval.graders import sql
from eval.graders.sql import Databases

DESCRIPTION = """\
execution: share of predictions that run and give the rows of their reference (in order, where it asks for one).
failed: share of predictions that do not run. A missing database or a reference that fails is an error.
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
                sql(connections.grade(db_id, gold, text), True).scores
                for db_id, gold, text in zip(db_ids, references, predictions, strict=True)
            ]
        return {name: sum(scores[name] for scores in grades) / len(grades) for name in ("execution", "failed")}
