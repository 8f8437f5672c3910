"""The command `python -m eval.experiments.paraphrases`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llm_jepa import UserError
from llm_jepa.core.files import write_json
from llm_jepa.core.strict_yaml import load_yaml

from ...command import ArgumentParser, one_line_errors, require, whole
from . import PLAN, RESULTS
from . import __doc__ as about
from .analysis import analyse, confirmed, draw, space_table, table
from .data import FILES, prepare
from .runs import confirm, select


@one_line_errors("eval.experiments.paraphrases")
def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(
        prog="python -m eval.experiments.paraphrases",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("step", choices=["prepare", "select", "confirm", "analyse"])
    parser.add_argument("--data", type=Path, help="NL-RX folder (prepare)")
    parser.add_argument("--work", type=Path, default=Path("runs/paraphrases"), help="folder of base model and views")
    parser.add_argument("--jobs", type=whole(1, 1024), default=2, help="number of parallel runs, one core each")
    options = parser.parse_args(argv)
    plan = load_yaml(PLAN.read_text())
    if options.step == "prepare":
        if options.data is None:
            raise UserError("prepare needs --data FOLDER with " + ", ".join(FILES) + ".")
        prepare(options.data, options.work, plan)
    elif options.step == "select":
        select(options.work, plan, options.jobs)
    elif options.step == "confirm":
        confirm(options.work, plan, options.jobs)
    else:
        require("scipy", "matplotlib")
        figures, runs = analyse(plan), confirmed(plan)
        write_json(RESULTS / "summary.json", figures)
        draw(runs, RESULTS / "turk.png")
        print(table(figures) + "\n\n" + space_table([run for run in runs.values() if run["space"]]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
