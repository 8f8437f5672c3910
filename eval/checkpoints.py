"""Put a measured model into the package:  python -m eval.checkpoints NAME FOLDER

A shipped checkpoint is the very model that a committed result file measured, so a folder with other weights is refused.
The card comes from `python -m eval.report` afterwards.

    shapestream   made by eval.vl.shapestream (seed 0), then eval.vl.shapestream_decoder
    nl-rx         made by the recipe lm/tiny-llama/nl-rx-synth with label_protocol completion (seed 0)
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_jepa import UserError
from llm_jepa.core.files import file_sha256
from llm_jepa.core.json_files import read_json
from llm_jepa.push import CARD, read_folder
from llm_jepa.shipped import CHECKPOINTS

from .command import ArgumentParser, one_line_errors
from .provenance import weights_sha256

RESULTS = Path(__file__).parent / "results"
MEASURED = {
    "nl-rx": RESULTS / "tiny_nl_rx" / "completion-info_nce-seed0.json",
    "shapestream": RESULTS / "vl" / "shapestream-scratch-seed0.json",
}
LARGEST = 6_000_000  # bytes of a checkpoint


def measured_sha256(name: str) -> str:
    """The hash of the weights that the result file measured."""
    result: Any = read_json(MEASURED[name])
    sha256: str = result["model"]["weights_sha256"] if "model" in result else result["weights_sha256"]
    return sha256


def file_hashes(name: str) -> dict[str, str]:
    """File -> SHA-256 of each weight file of a shipped checkpoint. Raises UserError unless it is the measured one."""
    folder = CHECKPOINTS / name
    check_is_measured(name, folder)
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in sorted(folder.rglob("*.safetensors"))}


def check_is_measured(name: str, folder: Path) -> None:
    if weights_sha256(folder) != measured_sha256(name):
        raise UserError(f"{folder} does not hold the weights that {MEASURED[name].name} measured; take that model.")


@one_line_errors("eval.checkpoints")
def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m eval.checkpoints", description=str(__doc__).splitlines()[0])
    parser.add_argument("name", choices=sorted(MEASURED))
    parser.add_argument("folder", type=Path, help="the model")
    options = parser.parse_args(argv)
    check_is_measured(options.name, options.folder)
    out = CHECKPOINTS / options.name
    with tempfile.TemporaryDirectory() as temporary:
        staged = Path(temporary) / options.name
        of_the_run = ("checkpoint-*", "features", "manifest.json", "run.json", "trainer_state.json")
        shutil.copytree(options.folder, staged, ignore=shutil.ignore_patterns(*of_the_run))
        (staged / CARD).write_text("---\nlicense: apache-2.0\n---\n")  # the rendered one comes later
        files = read_folder(staged)
        size = files.num_bytes()
        if size > LARGEST:
            raise UserError(f"{options.folder} has {size:,} bytes; a checkpoint has {LARGEST:,} at most.")
        shutil.rmtree(out, ignore_errors=True)
        for name, path in files.paths.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, out / name)
    print(f"{size:,} bytes in {out}; now run python -m eval.report.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
