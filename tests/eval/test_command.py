"""A mistake of the user ends an eval command with one line and exit code 2."""

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
