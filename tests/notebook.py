"""Run docs/first_steps.ipynb and store its outputs: `python -m tests.notebook`, a minute.

The outputs are part of the documentation: the site shows them and runs nothing.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
PATH = ROOT / "docs" / "first_steps.ipynb"


def read(path: Path = PATH) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def run(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Execute every cell in `folder`, with this package and this Python, and without network or GPU. In place."""
    names = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute(env={**os.environ, **names})


def clean(notebook: nbformat.NotebookNode) -> None:
    """Keep texts, code, and what the code prints and draws; leave out notes of libraries (stderr). In place."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]


def main() -> None:
    argparse.ArgumentParser(prog="python -m tests.notebook", description=__doc__).parse_args()
    notebook = read()
    run(notebook, PATH.parent)
    clean(notebook)
    nbformat.write(notebook, PATH)


if __name__ == "__main__":
    main()
