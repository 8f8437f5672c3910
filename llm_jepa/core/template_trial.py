"""The trial of a chat template: sample conversations of the kinds that rows and prompts have. It runs in a child."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .sandbox import OverBudget, compile_template

_USER = {"role": "user", "content": "What is the capital of France? Answer in one word, please."}
_SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
_ANSWER = {"role": "assistant", "content": "Paris", "reasoning_content": "France is a country.", "thinking": "France."}
_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": "call00001",
            "type": "function",
            "function": {"name": "weather", "arguments": {"city": "Paris", "days": 2}},
        }
    ],
}
_RESULT = {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": '{"temperature": 21}'}
_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Name of the city."},
                "days": {"type": "integer", "enum": [1, 2, 3]},
            },
            "required": ["city"],
        },
    },
}
_PARTS = {"role": "user", "content": [{"type": "text", "text": "What is in the picture?"}, {"type": "image"}]}
SAMPLES: tuple[tuple[list[Mapping[str, Any]], list[Mapping[str, Any]] | None, bool], ...] = (  # turns, tools, is asked
    ([_USER], None, True),
    ([_SYSTEM, _USER, {"role": "assistant", "content": "Paris"}], None, False),
    ([_SYSTEM, *[_USER, _ANSWER] * 4, _USER], None, True),
    ([_SYSTEM, _USER, _CALL, _RESULT, _ANSWER], [_TOOL], False),
    ([_PARTS, {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}], None, True),
)


def try_template(text: str, variables: Mapping[str, Any]) -> None:
    """Compile a template and render the sample conversations with it.

    Raises an error for a template that does not compile, and if a rendering is over its budget. A template may refuse
    a conversation (no system turn, only pictures), so any other error of a rendering is not one here.
    """
    template = compile_template(text)
    for messages, tools, is_asked in SAMPLES:
        try:
            template.render(messages=messages, tools=tools, documents=None, add_generation_prompt=is_asked, **variables)
        except (OverBudget, MemoryError, RecursionError):
            raise
        except Exception:
            continue
