"""The page of the planned experiments on a pretrained model."""

from __future__ import annotations

import functools
from pathlib import Path

from llm_jepa.core.json_files import read_json
from llm_jepa.core.strict_yaml import load_yaml

from ..experiments import two_jobs
from ..experiments.replication import planned_analysis, planned_tables
from ..experiments.two_jobs import analysis as two_jobs_analysis
from . import RESULTS, render, short_commits

PLANS = Path(__file__).parents[1] / "plans"
FOLDER = RESULTS / "pretrained"


@functools.cache  # the hierarchical bootstrap takes seconds
def published() -> str:
    """Markdown: what the published settings change, and whether it is stopping."""
    return question(PLANS / "pretrained-published.yaml", FOLDER / "published")


@functools.cache
def completion() -> str:
    """Markdown: what the term changes under labels on the answer alone."""
    return question(PLANS / "pretrained-completion.yaml", FOLDER / "completion")


@functools.cache
def both_jobs() -> str:
    """Markdown: answers and retrieval from one checkpoint, against two specialists."""
    return of_two_jobs(two_jobs.PLAN, two_jobs.RESULTS)


def of_two_jobs(plan_file: Path, folder: Path) -> str:
    """Markdown: the analysis of the plan of two jobs, or a line that its runs are under way.

    Raises UserError for result files that do not belong together.
    """
    plan = load_yaml(plan_file.read_text())
    figures = two_jobs_analysis.analyse(plan, folder) if two_jobs_analysis.has_whole_seeds(plan, folder) else {}
    if "nl_rx" not in figures:
        return _under_way(plan_file)
    runs = [read_json(path, is_finite=False) for path in sorted((folder / "compare").glob("*.json"))]
    return render(
        "two_jobs",
        arms={name: two_jobs_analysis.arms_table(name, of_job) for name, of_job in figures.items()},
        tests=two_jobs_analysis.tests_table(figures),
        figures=figures,
        margins=plan["margins"],
        passing=[arm for arm, test in figures["nl_rx"]["tests"]["arms"].items() if test["passes"]],
        plan_name=plan_file.name,
        picture="../../eval/results/pretrained/two_jobs/frontier.png" if (folder / "frontier.png").is_file() else None,
        commits=short_commits(runs),
        environment=runs[0]["environment"],
        weights=runs[0]["start_sha256"],
    )


def _under_way(plan_file: Path) -> str:
    plan = f"`eval/plans/{plan_file.name}`"
    return f"**The runs are under way.** Figures come with the second whole seed; the plan is {plan}."


def question(plan_file: Path, folder: Path) -> str:
    """Markdown: the analysis of a plan, or a line that its runs are under way if there are not two whole seeds yet.

    Raises UserError for result files that are not the plan's.
    """
    plan = load_yaml(plan_file.read_text())
    if min(map(len, planned_analysis.whole_seeds(plan, folder).values())) < 2:
        return _under_way(plan_file)
    figures = planned_analysis.analyse(plan, folder)
    by_protocol = planned_analysis.load(plan, folder)
    runs = [run for by_arm in by_protocol.values() for of_arm in by_arm.values() for run in of_arm]
    names = [name for name in (planned_tables.STOPS, planned_tables.DIFFERENCES) if (folder / name).is_file()]
    return render(
        "pretrained",
        tables=planned_tables.tables(figures, plan),
        seeds=planned_tables.seeds_of(figures),
        lines=", ".join(sorted({str(of["lines"]) for of in figures.values()})),
        plan=plan,
        plan_name=plan_file.name,
        folder=folder.name,
        asks_stopping=set(plan["primary"]) >= planned_analysis.STOPPING,
        titles=planned_tables.TITLES,
        pictures=[f"../../eval/results/pretrained/{folder.name}/{name}" for name in names],
        commits=short_commits(runs),
        environment=runs[0]["environment"],
        weights=runs[0].get("start_sha256", ""),
    )
