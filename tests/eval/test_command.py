"""An error ends an eval command with one line and exit code 2."""

import subprocess
import sys
from pathlib import Path

import pytest

from eval.command import one_line_errors
from llm_jepa import UserError

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


def test_a_missing_extra_is_one_line_with_the_install_command(tmp_path):
    """In an interpreter that cannot import scipy, before anything is scored."""
    code = (
        "import sys; sys.modules['scipy'] = None\n"
        "from eval.robustness import main\n"
        f"sys.exit(main(['--models', 'm', '--task', 'nl_rx', '--data', 'd', '--out', {str(tmp_path / 'out')!r}]))"
    )
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert run.returncode == 2 and 'pip install "llm-jepa[eval]"' in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1 and not (tmp_path / "out").exists()
