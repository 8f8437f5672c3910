"""An error ends an eval command with one line and exit code 2."""

import os
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import eval
from eval.command import one_line_errors
from llm_jepa import UserError
from llm_jepa.core.errors import EXTRAS

ERRORS = {
    "user": UserError("No folder.\n  Name one."),
    "disk": OSError("No folder. Name one."),
    "bug": KeyError("a key"),
    "silent": ZeroDivisionError(),
}


@one_line_errors("eval.example")
def main(argv: list[str] | None = None) -> int:
    for word in argv:
        raise ERRORS[word]
    return 0


@pytest.mark.parametrize("error", ["user", "disk"])
def test_one_line_and_exit_code_2(error, capsys):
    assert main([error]) == 2
    assert capsys.readouterr().err == "eval.example: error: No folder. Name one.\n"


def test_success_passes_through():
    assert main([]) == 0


@pytest.mark.parametrize(("error", "line"), [("bug", "KeyError: 'a key'"), ("silent", "ZeroDivisionError:")])
def test_an_error_that_we_did_not_foresee_is_one_line_with_its_type(error, line, capsys):
    assert main([error]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"eval.example: error: {line}") and said.count("\n") == 1
    assert "run again with --traceback" in said


@pytest.mark.parametrize("words", [["--traceback", "bug"], ["bug", "--traceback"]])
def test_traceback_on_request(words, capsys):
    assert main(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback") and any("test_command.py" in line for line in lines)
    assert lines[-1].startswith("eval.example: error: KeyError: 'a key'")


EVAL = Path(eval.__file__).parent
WITHOUT_EXTRA = """
import contextlib, importlib, io, pkgutil, sys
for name in ("matplotlib", "scipy", "evaluate"):
    sys.modules[name] = None
import eval
for module in pkgutil.walk_packages(eval.__path__, "eval."):
    if not module.name.startswith(("eval.metrics.", "eval.lm_eval")):  # evaluate and the harness load these themselves
        importlib.import_module(module.name)
commands = [
    ("robustness", ["--models", "m", "--task", "nl_rx", "--data", "d", "--out", "out"]),
    ("report", ["--check"]),
    ("quickstart", ["--out", "out"]),
    ("experiments.replication.__main__", ["analyse"]),
    ("experiments.paraphrases.__main__", ["analyse"]),
    ("cost.step_cost.command", ["--quick", "--plot", "out.png"]),
    ("vl.selective_decoding", ["--model", "m", "--plot", "out.png"]),
]
for name, words in commands:
    print(importlib.import_module("eval." + name).main(words))
"""


def test_a_missing_extra_is_one_line_with_the_install_command(tmp_path):
    """Every module can be imported without the extra; a command that needs it says so before it computes anything."""
    env = {**os.environ, "PYTHONPATH": str(EVAL.parent)}
    run = subprocess.run([sys.executable, "-c", WITHOUT_EXTRA], capture_output=True, text=True, cwd=tmp_path, env=env)
    said = run.stderr.splitlines()
    assert run.returncode == 0 and run.stdout.split() == ["2"] * 7, run.stderr[-2000:]
    assert len(said) == 7 and all('pip install "llm-jepa[eval]"' in line for line in said)
    assert not list(tmp_path.iterdir())


def test_the_extra_of_each_package_has_it():
    """The table names the extra in which pyproject.toml has the package."""
    extras = tomllib.loads((EVAL.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {"PIL": "pillow"}  # its name on PyPI
    for package, extra in EXTRAS.items():
        assert any(line.startswith(names.get(package, package)) for line in extras[extra]), package
    named = [line for extra in set(EXTRAS.values()) for line in extras[extra] if not line.startswith("llm-jepa[")]
    assert len(named) == len(EXTRAS)


@pytest.mark.parametrize("option", ["--out", "--plot"])
@pytest.mark.parametrize("command", ["cost.step_cost.command", "vl.selective_decoding"])
def test_a_file_that_cannot_be_written_is_found_before_the_work(command, option, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "below"):
        words = ["--model", str(tmp_path)] if command.startswith("vl") else ["--quick"]
        assert import_module(f"eval.{command}").main([*words, option, str(path)]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and ("is a folder" in said or "cannot be written" in said)
