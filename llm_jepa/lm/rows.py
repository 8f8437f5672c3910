"""Read one row of TRL's prompt-completion or conversational format, or of one that `formats` knows.

Errors name the row and the field.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..core.errors import UserError
from ..core.json_files import parse_json
from .formats import Message, format_of, standard_row

MAX_ROW_PAIRS = 1024  # InfoNCE compares every pair of a batch with every other: 4 GB for 32 such rows
# Options of `apply_chat_template`. A row that could set them would bring its own template, which is a program.
NOT_FOR_ROWS = {
    "self", "conversation", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize", "padding",
    "truncation", "max_length", "return_tensors", "sanitize_control_tokens", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs",
}  # fmt: skip


class ParsedRow(NamedTuple):
    """Prompt and completion: both strings, or both lists of messages."""

    prompt: str | list[Message]
    completion: str | list[Message]
    render_kwargs: dict[str, Any]  # tools and chat_template_kwargs, for the chat template
    contexts: list[str]  # other wordings of the last turn of the prompt, from the column `views`
    targets: list[str]  # other wordings of the completion
    target_key: str | None  # equal for answers that mean the same, whatever their texts

    @property
    def question(self) -> str | list[Message] | dict[str, Any]:
        """The prompt with its template arguments, as `prompts.encode` takes it."""
        return with_kwargs(self.prompt, self.render_kwargs)


def parse_row(row: dict[str, Any], where: str, *, max_pairs: int | None = None) -> ParsedRow:
    """Read a row. `messages` becomes (everything before, last assistant turn).

    Earlier assistant turns are a part of the prompt and are not trained.

    Args:
        max_pairs: contexts times targets; None for any number.

    Raises UserError that names `where` (e.g. "row 3") and the field.
    """
    kind = format_of(row)
    row = standard_row(row, where)
    prompt, completion = _sides(row, where)
    names = ("instruction", "output") if kind == "Alpaca" else ("prompt", "completion")
    for name, side in zip(names, (prompt, completion), strict=True):
        if side is None or side == "" or side == []:
            raise UserError(f"{where} has no {name}; fill in '{name}' or remove the row.")
    if isinstance(prompt, str) and isinstance(completion, str):
        if not prompt.strip() or not completion.strip():
            raise UserError(f"{where} has a blank prompt or completion; fill it in or remove the row.")
    elif _are_turns(prompt) and _are_turns(completion):
        _check_turns(prompt, completion, where)
    else:
        raise UserError(f"{where}: 'prompt' and 'completion' must both be strings or both be lists of messages.")
    contexts, targets = _other_wordings(row.get("views"), prompt, where)
    _check_pairs(len(contexts) + 1, len(targets) + 1, max_pairs, where)
    return ParsedRow(prompt, completion, render_kwargs_of(row, where), contexts, targets, _target_key(row, where))


def with_kwargs(turns: str | list[Message], render_kwargs: dict[str, Any]) -> str | list[Message] | dict[str, Any]:
    """A prompt that carries `tools` and `chat_template_kwargs`, if a row has any, as `prompts.encode` takes it."""
    if isinstance(turns, str) or not render_kwargs:
        return turns
    return {"prompt": turns, "chat_template_kwargs": render_kwargs}


def render_kwargs_of(row: dict[str, Any], where: str) -> dict[str, Any]:
    """Arguments of the chat template. TRL takes tools as a JSON string too."""
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = parse_json(tools, f"{where}: 'tools' is a string that", list)
    if tools is not None and not _are_turns(tools):
        raise UserError(f"{where}: 'tools' must be a list of JSON objects, one for each tool.")
    kwargs = row.get("chat_template_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise UserError(f"{where}: 'chat_template_kwargs' must be a JSON object, found {type(kwargs).__name__}.")
    if taken := sorted(NOT_FOR_ROWS & kwargs.keys()):
        raise UserError(
            f"{where}: 'chat_template_kwargs' has {', '.join(taken)}, which is not a variable of the template but an "
            "option of the tokenizer; remove it."
        )
    return kwargs if tools is None else {"tools": tools} | kwargs


def stand_in_answer(row: dict[str, Any], eos: str | None, where: str = "the row") -> tuple[bool, dict[str, Any]]:
    """(whether the row has a completion, the row with a stand-in if not), to embed the prompt alone.

    The context view does not see the completion. In a plain text, the stand-in begins with the eos token, so that it
    shares no token with the prompt.
    """
    row = standard_row(row, where)
    messages, completion = row.get("messages"), row.get("completion")
    stand_in = {"role": "assistant", "content": "x"}
    if messages:
        is_answered = not _are_turns(messages) or messages[-1].get("role") == "assistant"
        return is_answered, row if is_answered else {**row, "messages": [*messages, stand_in]}
    prompt = row.get("prompt")
    if not prompt or completion not in (None, "", []):
        return True, row
    return False, {**row, "completion": f"{eos or ' '}x" if isinstance(prompt, str) else [stand_in]}


def _sides(row: dict[str, Any], where: str) -> tuple[Any, Any]:
    """Prompt and completion as the row has them."""
    messages = row.get("messages")
    if messages is None:
        if "prompt" in row and "completion" in row:
            return row["prompt"], row["completion"]
        raise UserError(
            f"{where}: found the columns {sorted(row)}, need 'prompt' and 'completion', or 'messages' (TRL's formats), "
            "or those of Alpaca or ShareGPT. Columns with other names: columns: {prompt: question, completion: answer}."
        )
    if not _are_turns(messages) or not messages:
        raise UserError(f"{where}: 'messages' must be a list of {{'role', 'content'}} turns.")
    if messages[-1].get("role") != "assistant":
        raise UserError(
            f"{where}: 'messages' ends with role {messages[-1].get('role')!r}, so there is no completion to learn; "
            "end it with an assistant turn or remove the row."
        )
    return messages[:-1], messages[-1:]


def _check_turns(prompt: list[Message], completion: list[Message], where: str) -> None:
    if len(completion) != 1 or completion[0].get("role") != "assistant":
        raise UserError(
            f"{where}: the completion must be one assistant turn, got roles "
            f"{[m.get('role') for m in completion]}; put earlier turns into the prompt."
        )
    for message in (prompt[-1], completion[0]):
        content = message.get("content")
        if not isinstance(content, str) or not content.strip():
            raise UserError(
                f"{where}: the {message.get('role')} turn has no text content; fill it in or remove the row."
            )


def _other_wordings(views: Any, prompt: str | list[Message], where: str) -> tuple[list[str], list[str]]:
    """The optional column `views`: {"contexts": [wording, ...], "targets": [wording, ...]}, or the contexts alone.

    A wording is a text, a message, or a conversation that differs from the row's in this last turn alone.
    """
    if views is None:
        return [], []
    if isinstance(views, str):
        if views.lstrip()[:2] in ('["', "[{", '{"'):
            raise UserError(f"{where}: 'views' is a text that holds JSON; write the rows as JSON lines.")
        views = [views]
    if isinstance(views, list):
        views = {"contexts": views}
    if not isinstance(views, dict) or not set(views) <= {"contexts", "targets"}:
        kind = f"the keys {sorted(views)}" if isinstance(views, dict) else type(views).__name__
        raise UserError(
            f"{where}: 'views' must be a list of other wordings of the prompt, or hold {{'contexts': [...], 'targets': "
            f"[...]}}, either of them; found {kind}."
        )
    goal = [{"role": "assistant"}]
    texts: dict[str, list[str]] = {}
    for name, wordings in views.items():
        if wordings is not None and not isinstance(wordings, list):
            raise UserError(f"{where}: 'views' has {name} that are not a list; give other wordings as [text, ...].")
        chat = None if isinstance(prompt, str) else prompt if name == "contexts" else goal
        texts[name] = [_wording(wording, chat, f"{where}: 'views' has {name}") for wording in wordings or ()]
    return texts.get("contexts", []), texts.get("targets", [])


def _wording(wording: Any, turns: list[Message] | None, place: str) -> str:
    """The text of a wording. turns: the conversation whose last turn it stands in for; None in a row of texts."""
    if isinstance(wording, str) and wording.strip():
        return wording
    messages = [wording] if isinstance(wording, dict) else wording
    if not messages or not _are_turns(messages):
        raise UserError(f"{place} that are not texts; give other wordings as strings or messages.")
    if turns is None:
        raise UserError(f"{place} that are messages, but the row holds texts; give them as texts, too.")
    *earlier, last = standard_row({"messages": messages}, place)["messages"]
    if last.get("role") != turns[-1].get("role") or earlier not in ([], turns[:-1]):
        raise UserError(
            f"{place} whose turns are not those of the row; a wording stands in for the last "
            f"{turns[-1].get('role')} turn, and the other turns stay. Give that turn alone."
        )
    content = last.get("content")
    if not isinstance(content, str) or not content.strip():
        raise UserError(f"{place} without a text; fill it in, or leave it out.")
    return content


def _check_pairs(contexts: int, targets: int, max_pairs: int | None, where: str) -> None:
    if max_pairs is not None and contexts * targets > max_pairs:
        raise UserError(
            f"{where}: {contexts} contexts and {targets} targets make {contexts * targets} pairs, and the limit is "
            f"max_row_pairs: {max_pairs}; raise it, or leave out some of the row's 'views'."
        )


def _target_key(row: dict[str, Any], where: str) -> str | None:
    """The optional column `target_key`."""
    key = row.get("target_key")
    if key is None:
        return None
    if not isinstance(key, str) or not key.strip():
        raise UserError(
            f"{where}: 'target_key' is {key!r}, but must be a text, equal for answers that mean the same; write it as "
            "a string, or leave it out."
        )
    return key


def _are_turns(side: Any) -> bool:
    return isinstance(side, list) and all(isinstance(message, dict) for message in side)
