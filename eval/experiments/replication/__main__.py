"""The command `python -m eval.experiments.replication`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ruamel.yaml import YAMLError

from llm_jepa import UserError
from llm_jepa.core.files import file_sha256, write_json
from llm_jepa.core.strict_yaml import load_yaml

from ...command import ArgumentParser, one_line_errors, require, whole
from ...tasks import nl_rx
from ..small_runs import chosen_runs
from . import PLAN, RESULTS, analysis, planned_analysis, planned_tables
from . import __doc__ as about
from .runs import TRAIN, Setup, compare, select, setup_of

PARTS = ("protocol", "arm", "seed")  # one of each is a run
OPTIONAL = {item.name: None for item in fields(Setup)} | dict.fromkeys(
    ("selection_protocol", "selection_metric", "data_sha256", "primary", "margin", "contrasts")
)


def _read_plan(path: Path) -> dict[str, Any]:
    try:
        plan: dict[str, Any] = load_yaml(path.read_text())
    except (OSError, YAMLError) as error:
        raise UserError(f"{path} cannot be read as a plan: {error}") from None
    wanted = load_yaml(PLAN.read_text()).keys()
    if not isinstance(plan, dict) or not wanted <= plan.keys() <= wanted | OPTIONAL.keys():
        raise UserError(
            f"{path} is not a plan: its keys must be {', '.join(wanted)}; these may follow: {', '.join(OPTIONAL)}."
        )
    return plan


def _check_data(plan: dict[str, Any], folder: Path) -> None:
    """Raises UserError for other files than those of the plan, before anything starts."""
    files = nl_rx.load(folder)[2]
    for path in files:
        known = plan.get("data_sha256", {}).get(path.name)
        if known is not None and known != file_sha256(path):
            raise UserError(
                f"{path} is not the file of the plan (SHA-256 {file_sha256(path)}, not {known}); give that one, or "
                "write a plan for this one."
            )


def _analyse(plan: dict[str, Any], out: Path) -> str:
    """Write the analysis that the plan asks for to out/summary.json, and return its tables."""
    if planned_analysis.names_its_primary(plan):
        require("scipy", "matplotlib")
        figures = planned_analysis.analyse(plan, out)
        write_json(out / "summary.json", figures)
        planned_tables.draw(figures, plan, out)
        tables = planned_tables.tables(figures, plan)
        return "\n\n".join([*tables.values(), f"Over {planned_tables.seeds_of(figures)}."])
    require("scipy")
    wordings = analysis.WORDINGS
    if unasked := set(wordings) - set(setup_of(plan).wordings):
        raise UserError(
            f"Without `primary`, analyse compares {' and '.join(wordings)}; the plan does not ask {', '.join(unasked)}."
        )
    figures = analysis.analyse(plan, out)
    write_json(out / "summary.json", figures)
    return f"{analysis.table(figures)}\n\nOver {analysis.seeds_of(figures, plan)}."


@one_line_errors("eval.experiments.replication")
def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(
        prog="python -m eval.experiments.replication",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("step", choices=["select", "compare", "analyse"])
    parser.add_argument("--data", type=Path, help="NL-RX folder: {synth,turk}_{train,test}.jsonl (select, compare)")
    parser.add_argument(
        "--start", default="", help="checkpoint to start from (default: random weights, 0.7M parameters)"
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the result files (default: the committed ones; needed with --start)"
    )
    parser.add_argument("--plan", type=Path, help=f"default: eval/plans/{PLAN.name}; needed with --start")
    parser.add_argument(
        "--jobs", type=whole(1, 1024), default=2, help="number of parallel runs, one core each; 1 on one GPU"
    )
    for name in PARTS:
        parser.add_argument(f"--{name}", help=f"compare: only the runs of this {name} of the plan")
    options = parser.parse_args(argv)
    if options.start and (options.out is None or options.plan is None):
        raise UserError(
            "--start needs --plan FILE, with settings chosen for that model, and --out FOLDER: its runs are not "
            "those of the committed comparison."
        )
    plan, out = _read_plan(options.plan or PLAN), options.out or RESULTS
    if options.step == "analyse":
        print(_analyse(plan, out))
        return 0
    if options.data is None:
        raise UserError(f"{options.step} needs --data FOLDER with {TRAIN} and the test files.")
    _check_data(plan, options.data)
    if options.step == "select":
        select(options.data, plan, options.start, out, options.jobs)
        return 0
    protocols = chosen_runs(plan["protocols"], {name: getattr(options, name) for name in PARTS})
    compare(options.data, {**plan, "protocols": protocols}, options.start, out, options.jobs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
