"""A mistake of the user ends an eval command with one line and exit code 2."""

import subprocess
import sys
from pathlib import Path

import pytest

from eval.command import one_line_errors
from llm_jepa import UserError


@one_line_errors("eval.example")
def main(error: Exception | None) -> int:
    if error is not None:
        raise error
    return 0


@pytest.mark.parametrize("error", [UserError("No folder.\n  Name one."), OSError("No folder. Name one.")])
def test_one_line_and_exit_code_2(error, capsys):
    assert main(error) == 2
    assert capsys.readouterr().err == "eval.example: error: No folder. Name one.\n"


def test_success_and_bugs_pass_through(capsys):
    assert main(None) == 0
    with pytest.raises(KeyError):
        main(KeyError("a bug"))


def test_traceback_on_request(monkeypatch):
    monkeypatch.setenv("LLM_JEPA_TRACEBACK", "1")
    with pytest.raises(UserError):
        main(UserError("x"))


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
