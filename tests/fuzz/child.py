"""Run libFuzzer on a target and never return.  python -m tests.fuzz.child TARGET FOLDER [OPTION OF LIBFUZZER ...]"""

import logging
import sys

import atheris  # type: ignore[import-not-found, unused-ignore]

with atheris.instrument_imports(include=["llm_jepa", "eval"]):
    from tests.fuzz.targets import make

from pathlib import Path

if __name__ == "__main__":
    name, folder, *options = sys.argv[1:]
    logging.disable(logging.WARNING)
    atheris.Setup([sys.argv[0], *options], make(name, Path(folder)))
    atheris.Fuzz()
