"""The pages of the planned experiments: unlabelled paraphrases, and the published comparison."""

from __future__ import annotations

import functools

from llm_jepa.core.strict_yaml import load_yaml

from ..experiments import paraphrases, replication
from ..experiments.paraphrases import analysis as paraphrase_analysis
from ..experiments.replication import analysis as replication_analysis
from . import render, short_commits


@functools.cache  # the hierarchical bootstrap takes seconds
def paraphrase_tables() -> str:
    """Markdown: the plan's analysis of the confirmatory runs, and the uses of the embeddings."""
    plan = load_yaml(paraphrases.PLAN.read_text())
    runs = paraphrase_analysis.confirmed(plan)
    figures = paraphrase_analysis.analyse(plan)
    return render(
        "paraphrases",
        table=paraphrase_analysis.table(figures),
        space_table=paraphrase_analysis.space_table([run for run in runs.values() if run["space"]]),
        figures=figures,
        plan=plan,
        equivalence=figures["primary"]["equivalence"],
        sensitivity=figures["sensitivity"],
        commits=short_commits(runs.values()),
    )


@functools.cache
def replication_tables() -> str:
    """Markdown: the plan's analysis of the seeds that every arm has."""
    plan = load_yaml(replication.PLAN.read_text())
    figures = replication_analysis.analyse(plan, replication.RESULTS)
    return render(
        "replication",
        table=replication_analysis.table(figures),
        seeds=replication_analysis.seeds_of(figures, plan),
    )
