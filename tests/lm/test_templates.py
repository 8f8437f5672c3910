"""Odd conversations under every chat template that TRL ships: each is rendered, or is one line that names the row."""

from pathlib import Path

import pytest
import trl

from llm_jepa import UserError
from llm_jepa.lm import encode
from llm_jepa.lm.prompts import end_of_turn_ids
from llm_jepa.lm.views import build_views

TEMPLATES = sorted(path.stem for path in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}


def call(arguments, content=""):
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "content": content, "tool_calls": [{"type": "function", "function": function}]}


RESULT = {"role": "tool", "name": "f", "content": "3"}
CONVERSATIONS = {
    "plain": [USER, ANSWER],
    "system": [SYSTEM, USER, ANSWER],
    "system only": [SYSTEM, ANSWER],
    "no prompt but an answer": [ANSWER, ANSWER],
    "two users": [USER, USER, ANSWER],
    "two answers": [USER, ANSWER, ANSWER],
    "a role that no template knows": [{"role": "referee", "content": "q"}, ANSWER],
    "a turn without a role": [{"content": "q"}, ANSWER],
    "arguments as an object": [USER, call({"x": 1}), RESULT, ANSWER],
    "arguments as a string": [USER, call('{"x": 1}'), RESULT, ANSWER],
    "no arguments": [USER, call(None), RESULT, ANSWER],
    "a call without content": [USER, call({"x": 1}, None), RESULT, ANSWER],
    "a call that is not one": [USER, {**ANSWER, "tool_calls": "f(x)"}, RESULT, ANSWER],
    "content that is a number": [{"role": "user", "content": 7}, ANSWER, USER, ANSWER],
    "content that is None": [{"role": "user", "content": None}, ANSWER, USER, ANSWER],
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_conversation_is_rendered_or_named(name, tokenizer):
    tokenizer.chat_template = (Path(trl.__file__).parent / f"chat_templates/{name}.jinja").read_text(encoding="utf-8")
    rendered = []
    for kind, messages in CONVERSATIONS.items():
        for view in ("prefix", "message"):
            try:
                build_views({"messages": messages}, tokenizer, context_view=view, where="row 7")
                rendered.append(kind)
            except UserError as error:
                assert "row 7" in str(error), (kind, error)
        try:
            assert encode(tokenizer, [messages[:-1]])[0]
        except UserError as error:
            assert "Prompt 0" in str(error), (kind, error)
    # These take content as a list of parts only (pictures).
    assert ("plain" in rendered) != name.startswith(("idefics3", "llava_next", "smolvlm"))
    end_of_turn_ids(tokenizer)


@pytest.mark.parametrize("error", ["TypeError", "KeyError", "ZeroDivisionError", "RecursionError"])
def test_a_template_may_raise_anything(error, tokenizer):
    """jinja compiles a template to Python; what its expressions raise is not a TemplateError."""
    broken = {
        "TypeError": "{{ 'a' + 1 }}",
        "KeyError": "{{ '{x}'.format() }}",
        "ZeroDivisionError": "{{ 1 // 0 }}",
        "RecursionError": "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    }
    tokenizer.chat_template = broken[error]
    with pytest.raises(UserError, match=f"row 7: .*{error}"):
        build_views({"messages": [USER, ANSWER]}, tokenizer, where="row 7")
    with pytest.raises(UserError, match=f"Prompt 0: .*{error}"):
        encode(tokenizer, [[USER]])
    assert end_of_turn_ids(tokenizer) == [tokenizer.eos_token_id]
