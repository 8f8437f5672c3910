"""The files of a scored run: its result, its samples, and the part of them that a run cut short leaves behind."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_jepa import UserError
from llm_jepa.core.files import append, write_json, write_json_lines, written_whole
from llm_jepa.core.json_files import read_json, read_json_lines

from .command import check_writable

Row = dict[str, Any]


class RunFiles:
    """FILE.json with the result and, next to it, one line a question.

    While a run is not finished, its samples are in `<samples>.partial`; the first line of that file is the run.
    Raises UserError if a file could not be written. The check writes nothing.
    """

    def __init__(self, out: Path, samples: Path | None = None):
        self.out = out
        self.samples = samples or out.with_suffix(".samples.jsonl")
        self.partial = self.samples.with_name(self.samples.name + ".partial")
        check_writable(self.out, self.samples)

    def finished(self, run: Row) -> tuple[Row, list[Row]] | None:
        """(result, samples) if the run was finished before. Raises UserError if `out` holds another run."""
        if not self.out.exists():
            return None
        try:
            result = read_json(self.out, is_finite=False)
            rows = read_json_lines(self.samples)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.out} exists, but it is not a run with its samples ({error}); remove it or choose another name."
            ) from None
        change = _difference(run, result)
        if change:
            raise UserError(f"{self.out} holds another run ({change}); remove it or choose another --out.")
        print(f"{self.out} holds this run already; remove it to run again.")
        return result, rows

    def resume(self, run: Row) -> dict[tuple[str, str], Row]:
        """The samples of a run that was cut short, by (group, wording); starts the file if there are none.

        Cuts off a last line that was being written when the run ended. Raises UserError if the file belongs to another
        run.
        """
        if not self.partial.exists():
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            write_json_lines(self.partial, [run])
            return {}
        whole = [line for line in self.partial.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        try:
            before, *rows = [json.loads(line) for line in whole]
        except ValueError:
            raise UserError(f"{self.partial} is not a run that was cut short; remove it.") from None
        change = _difference(run, before)
        if change:
            raise UserError(
                f"{self.partial} belongs to another run ({change}); remove it to start afresh, or use another --out."
            )
        with written_whole(self.partial) as temporary:
            temporary.write_bytes(b"".join(whole))
        return {(row["group"], row["wording"]): row for row in rows}

    def append(self, rows: Sequence[Row]) -> None:
        append(self.partial, "".join(json.dumps(row) + "\n" for row in rows))

    def finish(self, result: Row, samples: Sequence[Row]) -> None:
        """Write the samples, then the result: a result file is complete or does not exist."""
        write_json_lines(self.samples, samples)
        write_json(self.out, result)
        self.partial.unlink(missing_ok=True)


def _difference(run: Row, other: Row) -> str | None:
    """The first setting in which another run differs, in words, or None."""
    for key, value in json.loads(json.dumps(run)).items():
        before = other.get(key)
        if before == value:
            continue
        if isinstance(value, dict) and isinstance(before, dict):
            inner = next(k for k in {**value, **before} if value.get(k) != before.get(k))
            return f"{key}.{inner} is {before.get(inner)!r:.80}, now {value.get(inner)!r:.80}"
        return f"{key} is {before!r:.80}, now {value!r:.80}"
    return None
