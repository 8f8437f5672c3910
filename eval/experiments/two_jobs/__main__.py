"""The command `python -m eval.experiments.two_jobs`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_jepa import UserError
from llm_jepa.core.files import file_sha256, write_json
from llm_jepa.core.strict_yaml import load_yaml

from ...command import ArgumentParser, one_line_errors, require, whole
from ..small_runs import chosen_runs
from . import PLAN, RESULTS
from . import __doc__ as about
from .analysis import analyse, draw, table
from .runs import compare, select

PARTS = ("job", "arm", "seed")  # one of each is a run


def _check_data(plan: dict[str, Any], folder: Path) -> None:
    """Raises UserError for other files than those of the plan, before anything starts."""
    for name, known in plan["data_sha256"].items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{folder} lacks {name}; the plan needs {', '.join(plan['data_sha256'])}.")
        if file_sha256(path) != known:
            raise UserError(f"{path} is not the file of the plan (SHA-256 {file_sha256(path)}, not {known}).")


@one_line_errors("eval.experiments.two_jobs", if_stopped="Finished runs are kept; the same command goes on")
def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(
        prog="python -m eval.experiments.two_jobs",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("step", choices=["select", "compare", "analyse"])
    parser.add_argument("--data", type=Path, help="folder with nl_rx/ and spider/ (select, compare)")
    parser.add_argument("--start", help="folder of the model to start from (select, compare)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--jobs", type=whole(1, 1024), default=2, help="number of parallel runs, one core each")
    for name in PARTS:
        parser.add_argument(f"--{name}", help=f"compare: only the runs of this {name} of the plan")
    options = parser.parse_args(argv)
    plan = load_yaml(PLAN.read_text())
    if options.step == "analyse":
        require("scipy", "matplotlib")
        figures = analyse(plan, options.out)
        write_json(options.out / "summary.json", figures)
        draw(figures, options.out / "frontier.png")
        print(table(figures))
        return 0
    if options.data is None or options.start is None:
        raise UserError(f"{options.step} needs --data FOLDER and --start MODEL.")
    if not Path(options.start).is_dir():
        raise UserError(f"{options.start} is not a folder; make one with `python -m eval.pretrained prepare`.")
    require("sentence_transformers", "sqlglot")
    _check_data(plan, options.data)
    if options.step == "select":
        select(options.data, plan, options.start, options.out, options.jobs)
        return 0
    chosen = chosen_runs(plan["jobs"], {name: getattr(options, name) for name in PARTS})
    compare(options.data, {**plan, "jobs": chosen}, options.start, options.out, options.jobs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
