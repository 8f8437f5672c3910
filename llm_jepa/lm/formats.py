"""Rows as people have them -> rows as `rows.parse_row` reads them: Alpaca, ShareGPT, lists of content parts.

A source may also have other names for its columns (the key `columns`); `sources.read_rows` renames them.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Literal

from ..core.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

Row = dict[str, Any]
Message = dict[str, Any]
# text: prompt and completion are strings. messages: one conversation, or prompt and completion as messages.
RowFormat = Literal["text", "messages", "Alpaca", "ShareGPT"]

USED_COLUMNS = ("prompt", "completion", "messages", "tools", "chat_template_kwargs", "views", "target_key")
# Columns of other formats -> the note that says how they are read.
COLUMNS: dict[str, tuple[str, ...]] = {
    "Alpaca": ("instruction", "input", "output", "system"),
    "ShareGPT": ("conversations", "system"),
}
NOTES = {
    "Alpaca": "Alpaca rows: 'instruction' and 'input', with an empty line between them, become the user turn, and "
    "'output' the assistant turn. For plain texts set columns: {prompt: instruction, completion: output}.",
    "ShareGPT": "ShareGPT rows: 'conversations' become messages, human is the user and gpt the assistant. The last gpt "
    "turn is the completion.",
}
ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model"), "assistant"),
    **dict.fromkeys(("tool", "observation"), "tool"),
    "system": "system",
}


def format_of(row: Row) -> RowFormat | None:
    """The format of a row; None if it has none of the columns that hold a prompt."""
    prompt = row.get("prompt")
    if row.get("messages") is not None:
        return "messages"
    if prompt is None or row.get("completion") is None:
        if row.get("conversations") is not None:
            return "ShareGPT"
        if row.get("instruction") is not None and ("output" in row or "input" in row):
            return "Alpaca"
    if prompt is None:
        return None
    return "text" if isinstance(prompt, str) else "messages"


def check_columns(columns: dict[str, str]) -> None:
    """Raises UserError unless `columns` gives columns that rows are read from other names, each its own."""
    unknown = [name for name in columns if name not in USED_COLUMNS]
    if unknown:
        raise UserError(
            f"columns: {str(unknown[0])[:80]!r} is not a column that is read; write {{NAME: YOURS}}, where NAME is one "
            f"of {', '.join(USED_COLUMNS)}."
        )
    theirs = list(columns.values())
    if not all(isinstance(name, str) and name for name in theirs):
        raise UserError("columns: write the name of a column for each, e.g. {prompt: question, completion: answer}.")
    if len(set(theirs)) < len(theirs):
        raise UserError("columns: one column cannot be read under two names; leave one out.")


def standard_row(row: Row, where: str) -> Row:
    """The row with `messages`, or with `prompt` and `completion`; contents are texts. Other columns stay.

    An Alpaca row without an answer has the completion None. Content parts are joined as chat templates join them, with
    nothing between them.

    Raises UserError that names `where` for a conversation that cannot be read, and for parts that are not text.
    """
    kind = format_of(row)
    if kind == "ShareGPT":
        row = {**_without(row, kind), "messages": _messages_of_sharegpt(row, where)}
    elif kind == "Alpaca":
        row = {**_without(row, kind), **_sides_of_alpaca(row, where)}
    turns = {key: row[key] for key in ("messages", "prompt", "completion") if _has_parts(row.get(key))}
    return {**row, **{key: [_with_text(turn, where) for turn in side] for key, side in turns.items()}} if turns else row


def count_formats(dataset: Dataset) -> tuple[Counter[str], int]:
    """How many rows have each format, and how many have a prompt beside a conversation, which is not used."""
    names = dict.fromkeys(("messages", "prompt", "completion", *COLUMNS["ShareGPT"], *COLUMNS["Alpaca"]))
    columns = [name for name in names if name in dataset.column_names]
    if columns == ["messages"]:
        return Counter({"messages": len(dataset)}), 0
    if columns == ["prompt", "completion"] and getattr(dataset.features["prompt"], "dtype", None) == "string":
        return Counter({"text": len(dataset)}), 0  # no need to look at each row
    counts: Counter[str] = Counter()
    both = 0
    for row in dataset.select_columns(columns):
        kind = format_of(row)
        counts[str(kind)] += kind is not None
        both += row.get("prompt") is not None and (kind in COLUMNS or row.get("messages") is not None)
    return counts, both


def notes_on_formats(counts: Counter[str], name: str) -> list[str]:
    """A line for each format that was recognized. name: what the rows are, as in "5 of 9 train rows"."""
    return [f"{counts[kind]} of {counts.total()} {name} are {note}" for kind, note in NOTES.items() if counts[kind]]


def unused_columns(dataset: Dataset, counts: Counter[str]) -> list[str]:
    """The columns that nothing reads in rows of these formats."""
    used = {*USED_COLUMNS, *(column for kind in COLUMNS if counts[kind] for column in COLUMNS[kind])}
    return [column for column in dataset.column_names if column not in used]


def _without(row: Row, kind: str) -> Row:
    return {key: value for key, value in row.items() if key not in (*COLUMNS[kind], "prompt", "completion")}


def _sides_of_alpaca(row: Row, where: str) -> Row:
    texts = {name: row.get(name) for name in COLUMNS["Alpaca"]}
    for name, text in texts.items():
        if text is not None and not isinstance(text, str):
            raise UserError(f"{where}: '{name}' of an Alpaca row must be a text, found {type(text).__name__}.")
    question = "\n\n".join(text for text in (texts["instruction"], texts["input"]) if text and text.strip())
    answer = texts["output"]
    return {
        "prompt": [*_system_turn(texts["system"]), {"role": "user", "content": question}] if question else None,
        "completion": [{"role": "assistant", "content": answer}] if answer and answer.strip() else None,
    }


def _messages_of_sharegpt(row: Row, where: str) -> list[Message]:
    turns, system = row["conversations"], row.get("system")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(f"{where}: 'conversations' must be a list of {{'from', 'value'}} turns.")
    messages = [_message_of_sharegpt(turn, where) for turn in turns]
    if turns[-1].get("weight") == 0:
        raise UserError(f"{where}: its last turn has weight 0, so it is not to be trained; remove the row.")
    if system is not None and not isinstance(system, str):
        raise UserError(f"{where}: 'system' of a ShareGPT row must be a text, found {type(system).__name__}.")
    first = messages[0]
    if _system_turn(system) and first["role"] == "system" and first["content"] != system:
        raise UserError(f"{where} has two system turns, 'system' and one in 'conversations'; remove one.")
    return messages if first["role"] == "system" else [*_system_turn(system), *messages]


def _message_of_sharegpt(turn: Message, where: str) -> Message:
    """A turn of {'from', 'value'}, or one that is a message already."""
    if "from" not in turn:
        return turn
    role = ROLES.get(str(turn["from"]))
    if role is None:
        raise UserError(f"{where}: a turn is from {str(turn['from'])[:40]!r}; known are {', '.join(ROLES)}.")
    return {"role": role, "content": turn.get("value")}


def _system_turn(text: str | None) -> list[Message]:
    return [{"role": "system", "content": text}] if text and text.strip() else []


def _has_parts(side: Any) -> bool:
    return isinstance(side, list) and any(
        isinstance(turn, dict) and isinstance(turn.get("content"), list) for turn in side
    )


def _with_text(turn: Any, where: str) -> Any:
    """A message with its content as one text. A table gives a part the None of keys that other parts have."""
    if not isinstance(turn, dict) or not isinstance(turn.get("content"), list):
        return turn
    texts = []
    for part in turn["content"]:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        has_more = isinstance(part, dict) and any(
            value is not None for key, value in part.items() if key not in ("type", "text")
        )
        if kind != "text" or has_more or not isinstance(part.get("text"), str):
            raise UserError(
                f"{where}: the {turn.get('role')} turn holds a content part that is not a text ({str(kind)[:40]}), and "
                "these models read text alone; remove it, or the row."
            )
        texts.append(part["text"])
    return {**turn, "content": "".join(texts)}
