"""One dataset row -> the token ids of its LM row and of its two views.

The *LM row* is what plain SFT trains on, byte for byte what TRL's `SFTTrainer` makes of the same row. The *context
view* is what predicts (the paper's Text: a user turn), the *target view* is what is predicted (the paper's Code: the
assistant turn). LLM-JEPA (arXiv:2509.14252, section 3.1) renders each view alone with the chat template.

Where content starts and ends is read off the tokenizer's own template, by rendering the row once more with a probe in
place of the content and looking at what stays the same around it. There is no table of model names, and nothing is
searched in decoded text.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..core.errors import UserError

ContextView = Literal["prefix", "message"]
LabelProtocol = Literal["completion", "paper"]
IGNORE = -100
# Letters only, so that no template trims, escapes or splits it.
PROBE = "jepaprobecontent"
PREDICTOR_TOKEN = "<|predictor_{}|>"

Message = dict[str, Any]


@dataclass(frozen=True)
class Views:
    """Token ids of one example. Everything after the last content token of a view is already cut off, so that both
    views are read at their last token (the context at its last predictor token, if there are any)."""

    input_ids: list[int]  # the LM row
    labels: list[int]  # -100 where the LM loss does not look
    contexts: list[list[int]]  # the context view, then those of the row's `views` column
    targets: list[list[int]]  # likewise
    context_header: int  # tokens before the content of a context: `predictor_position: first` inserts there
    target_header: int  # tokens before the content of a target
    context_start: int  # content tokens of the last turn of the prompt, in the LM row: [context_start, context_end)
    context_end: int
    target_start: int  # content tokens of the completion, in the LM row: [target_start, target_end)
    target_end: int
    context_key: int  # equal for equal texts: such rows are no negatives of each other
    target_key: int
    index: int  # which row of the data set
    truncated: bool  # max_length cut the LM row or a view


class ParsedRow(NamedTuple):
    """A row in one shape: prompt and completion, both strings or both lists of messages."""

    prompt: str | list[Message]
    completion: str | list[Message]
    render_kwargs: dict[str, Any]  # tools, chat_template_kwargs: passed to the chat template
    contexts: list[str]  # other wordings of the prompt's last turn, from the `views` column
    targets: list[str]  # other wordings of the completion


def parse_row(row: dict[str, Any], where: str) -> ParsedRow:
    """Read a TRL row. `messages` becomes (everything before, last assistant turn); earlier assistant turns are not
    trained. Raises UserError naming `where` (e.g. "row 3") and the field."""
    if row.get("messages") is not None:
        messages = row["messages"]
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            raise UserError(f"{where}: 'messages' must be a list of {{'role', 'content'}} turns.")
        if messages[-1].get("role") != "assistant":
            raise UserError(
                f"{where}: 'messages' ends with role {messages[-1].get('role')!r}, so there is no completion to learn; "
                "end it with an assistant turn or remove the row."
            )
        prompt, completion = messages[:-1], messages[-1:]
    elif "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
    else:
        raise UserError(
            f"{where}: found the columns {sorted(row)}, need 'prompt' and 'completion', or 'messages' "
            "(TRL's prompt-completion and conversational formats)."
        )
    for name, side in (("prompt", prompt), ("completion", completion)):
        if side is None or side == "" or side == []:
            raise UserError(f"{where} has no {name}; fill in '{name}' or remove the row.")
    if not (isinstance(prompt, str) and isinstance(completion, str) or _are_turns(prompt) and _are_turns(completion)):
        raise UserError(f"{where}: 'prompt' and 'completion' must both be strings or both be lists of messages.")
    if isinstance(prompt, list):
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
    elif not prompt.strip() or not completion.strip():
        raise UserError(f"{where} has a blank prompt or completion; fill it in or remove the row.")
    tools = row.get("tools")
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools  # as TRL
    except ValueError as error:
        raise UserError(f"{where}: 'tools' is a string that is not JSON: {error}.") from None
    kwargs = {**({} if tools is None else {"tools": tools}), **(row.get("chat_template_kwargs") or {})}
    return ParsedRow(prompt, completion, kwargs, *_more_views(row.get("views"), where))


def _more_views(views: Any, where: str) -> tuple[list[str], list[str]]:
    """The optional `views` column, {"contexts": [text, ...], "targets": [text, ...]}; either may be missing."""
    if views is None:
        return [], []
    if not isinstance(views, dict) or not set(views) <= {"contexts", "targets"}:
        found = f"the keys {sorted(views)}" if isinstance(views, dict) else type(views).__name__
        raise UserError(
            f"{where}: 'views' must hold {{'contexts': [text, ...], 'targets': [text, ...]}}, either of them; "
            f"found {found}."
        )
    for name, texts in views.items():
        if texts is not None and not (
            isinstance(texts, list) and all(isinstance(text, str) and text.strip() for text in texts)
        ):
            raise UserError(
                f"{where}: 'views' has {name} that are not a list of texts; give other wordings as strings."
            )
    return views.get("contexts") or [], views.get("targets") or []


def _are_turns(side: Any) -> bool:
    return isinstance(side, list) and all(isinstance(message, dict) for message in side)


def build_views(
    row: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_view: ContextView = "prefix",
    label_protocol: LabelProtocol = "completion",
    max_length: int | None = None,
    where: str = "the row",
    index: int = 0,
) -> Views:
    """Tokenize one row.

    The `views` column (optional) holds other wordings, `{"contexts": [...], "targets": [...]}`: further contexts in the
    place of the prompt's last turn, further targets in the place of the completion. They have views, and no labels.

    Args:
        context_view: "prefix": the LM row up to the last content token of the prompt, system prompt and earlier turns
            included (the paper's context does not contain them); costs no token. "message": the last user turn alone,
            as in the paper, but without a default system block that the template may add (the paper's code keeps it).
        label_protocol: "completion": every token after the prompt, end-of-turn included. "paper": every token that is
            not the pad token, as the published script really trains (its collator rebuilds the labels).
        max_length: tokens; cuts the end of the LM row and of each view.

    Raises UserError naming `where` if a view or the labels would be empty.
    """
    example = parse_row(row, where)
    if isinstance(example.prompt, str):
        parts = _plain_parts(example, tokenizer, where, alone=context_view == "message")
    else:
        parts = _chat_parts(example, tokenizer, where, alone=context_view == "message")
    views = [*parts.contexts, *parts.targets]
    longest = max(map(len, [parts.input_ids, *views]))
    limit = max_length or longest
    ids = parts.input_ids[:limit]
    labels = _labels(ids, parts.prompt_length, label_protocol, tokenizer.pad_token_id)
    if len(ids) <= max(parts.prompt_length, parts.context_end) or all(label == IGNORE for label in labels[1:]):
        raise UserError(
            f"{where}: no completion token is left after truncation to max_length={max_length} (the prompt alone has "
            f"{parts.prompt_length} tokens); raise max_length, shorten the prompt or remove the row."
        )
    if not all(views):
        raise UserError(f"{where}: a view has no content token; check its text and the tokenizer's chat template.")
    return Views(
        input_ids=ids,
        labels=labels,
        contexts=[view[:limit] for view in parts.contexts],
        targets=[view[:limit] for view in parts.targets],
        context_header=parts.context_header,
        target_header=parts.target_header,
        context_start=min(parts.context_start, len(ids)),
        context_end=min(parts.context_end, len(ids)),
        target_start=min(parts.target_start, len(ids)),
        target_end=min(parts.target_end, len(ids)),
        context_key=parts.context_key,
        target_key=parts.target_key,
        index=index,
        truncated=longest > limit,
    )


def add_view_columns(row: dict[str, Any], index: int, **kwargs: Any) -> dict[str, Any]:
    """`datasets.Dataset.map(..., with_indices=True)` form of `build_views`."""
    return asdict(build_views(row, where=f"row {index}", index=index, **kwargs))


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that end an assistant turn: the eos token and, if the template closes a turn with another special
    token (Gemma's <end_of_turn>, Llama's <|eot_id|>), that one. Generation stops at any of them."""
    ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": PROBE[::-1]}, {"role": "assistant", "content": PROBE}]
        try:
            text = _render(tokenizer, turns, False, {})
        except (TemplateError, TypeError, ValueError):
            return ids  # a template of another kind of conversation (images): eos is all there is
        tail = tokenizer(text[text.rindex(PROBE) + len(PROBE) :], add_special_tokens=False)["input_ids"]
        if tail and tail[0] in tokenizer.all_special_ids + list(tokenizer.added_tokens_decoder):
            ids.append(tail[0])
    return list(dict.fromkeys(ids))


# ---------------------------------------------------------------------------------------------------------------------


def _labels(ids: list[int], prompt_length: int, protocol: LabelProtocol, pad_token_id: int | None) -> list[int]:
    """The two label protocols; see `build_views`."""
    if protocol == "paper":
        return [IGNORE if token == pad_token_id else token for token in ids]
    return [IGNORE] * min(prompt_length, len(ids)) + ids[prompt_length:]


class _Parts(NamedTuple):
    """Untruncated token ids; `prompt_length` counts LM tokens before the completion, as TRL does."""

    input_ids: list[int]
    prompt_length: int
    contexts: list[list[int]]
    targets: list[list[int]]
    context_header: int
    target_header: int
    context_start: int
    context_end: int
    target_start: int
    target_end: int
    context_key: int
    target_key: int


def _plain_parts(example: ParsedRow, tokenizer: PreTrainedTokenizerBase, where: str, *, alone: bool) -> _Parts:
    """Two strings, no template: TRL joins them and appends the eos token to the completion."""
    prompt, completion = str(example.prompt), str(example.completion)
    eos = tokenizer.eos_token or ""
    full = prompt + completion + ("" if completion.endswith(eos) else eos)
    ids, offsets = _encode(tokenizer, full, special=True)
    prompt_ids, _ = _encode(tokenizer, prompt, special=True)
    prompt_length = common_length(prompt_ids, ids)
    texts = [prompt.rstrip(), *(text.rstrip() for text in example.contexts)]
    content = completion.removesuffix(eos).rstrip() if eos else completion.rstrip()
    goals = [content, *(text.rstrip() for text in example.targets)]
    _refuse_predictor_tokens(" ".join([full, *texts, *goals]), where)
    split = min(_tokens_before(offsets, len(texts[0])), prompt_length)
    has_content = any(stop > start for start, stop in offsets[:split])  # BOS alone is no context
    bos = int(ids[:1] == [tokenizer.bos_token_id])
    return _Parts(
        input_ids=ids,
        prompt_length=prompt_length,
        contexts=[
            _stand_alone(tokenizer, texts[0], ids) if alone else ids[:split] if has_content else [],
            *(_stand_alone(tokenizer, text, ids) for text in texts[1:]),
        ],
        targets=[_stand_alone(tokenizer, text, ids) for text in goals],
        context_header=bos,
        target_header=bos,
        context_start=bos,
        context_end=split,
        target_start=prompt_length,
        target_end=_tokens_before(offsets, len(prompt + content)),
        context_key=_key(texts[0]),
        target_key=_key(content),
    )


def _chat_parts(example: ParsedRow, tokenizer: PreTrainedTokenizerBase, where: str, *, alone: bool) -> _Parts:
    prompt: list[Message] = list(example.prompt)  # type: ignore[arg-type]
    completion: list[Message] = list(example.completion)  # type: ignore[arg-type]
    if tokenizer.chat_template is None:
        raise UserError(
            f"{where} holds messages but the tokenizer has no chat template; set chat_template_path to a .jinja file "
            "or give 'prompt' and 'completion' as strings."
        )

    def render(messages: list[Message], generation_prompt: bool = False) -> str:
        try:
            return _render(tokenizer, messages, generation_prompt, example.render_kwargs)
        except TemplateError as error:
            raise UserError(f"{where}: the chat template refuses this conversation: {error}") from None

    text = render(prompt + completion)
    _refuse_predictor_tokens(" ".join([text, *example.contexts, *example.targets]), where)
    prompt_text = render(prompt, generation_prompt=True)
    ids, offsets = _encode(tokenizer, text)
    prompt_length = common_length(_encode(tokenizer, prompt_text)[0], ids)

    context_start, context_end = _content_span(render, prompt + completion, len(prompt) - 1, where)
    target_start, target_end = _content_span(render, prompt + completion, len(prompt), where)
    # What opens the assistant turn: everything between what closes the prompt's last turn and the content.
    closing = render(prompt)[_content_span(render, prompt, len(prompt) - 1, where)[1] :]
    turn_start = context_end + _shared(tokenizer, text[context_end:], closing)
    target_header = text[turn_start:target_start]
    split = min(
        _tokens_before(offsets, len(text[:context_end].rstrip())), sum(stop <= target_start for _, stop in offsets)
    )
    # A further context stands where the first one does: after all that comes before the prompt's last turn, or alone.
    header = _user_header(tokenizer, prompt[-1].get("role"), where) if alone else text[:context_start]
    opened = _stand_alone(tokenizer, header, ids) if alone else _encode(tokenizer, header)[0]
    first = text[context_start:context_end].rstrip()
    encode = (lambda view: _stand_alone(tokenizer, view, ids)) if alone else (lambda view: _encode(tokenizer, view)[0])
    targets = [text[target_start:target_end].rstrip(), *(more.strip() for more in example.targets)]
    target_views = [_stand_alone(tokenizer, target_header + target, ids) for target in targets]
    context_view = encode(header + first) if alone else ids[:split]
    return _Parts(
        input_ids=ids,
        prompt_length=prompt_length,
        contexts=[context_view, *(encode(header + more.strip()) for more in example.contexts)],
        targets=target_views,
        context_header=common_length(opened, context_view),
        target_header=common_length(_stand_alone(tokenizer, target_header, ids), target_views[0]),
        context_start=sum(stop <= context_start for _, stop in offsets[:split]),
        context_end=split,
        target_start=max(prompt_length, sum(stop <= target_start for _, stop in offsets)),
        target_end=_tokens_before(offsets, len(text[:target_end].rstrip())),
        context_key=_key(first if alone else header + first),  # earlier turns too, where they are part of the view
        target_key=_key(text[target_start:target_end].strip()),
    )


def _refuse_predictor_tokens(text: str, where: str) -> None:
    """Predictor tokens are inputs that we place: in a label their masked logit would be an infinite loss."""
    if PREDICTOR_TOKEN.partition("{")[0] in text:
        raise UserError(f"{where} holds the text of a predictor token, {PREDICTOR_TOKEN.format('...')}; remove it.")


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], generation_prompt: bool, kwargs: dict[str, Any]
) -> str:
    return str(
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt, **kwargs)
    )


def _content_span(
    render: Callable[[list[Message]], str], messages: list[Message], at: int, where: str
) -> tuple[int, int]:
    """Character range of the content of messages[at] in render(messages)."""
    text = render(messages)
    probed = render([{**m, "content": PROBE} if i == at else m for i, m in enumerate(messages)])
    before, found, after = probed.rpartition(PROBE)
    fits = found and text.startswith(before) and text.endswith(after) and len(before) + len(after) < len(text)
    if not fits:
        raise UserError(
            f"{where}: cannot find the {messages[at].get('role')} turn in the rendered conversation, because the chat "
            "template changes the text around it; use a template that renders each turn in its place."
        )
    return len(before), len(text) - len(after)


@functools.lru_cache(maxsize=8)
def _header_of(tokenizer: PreTrainedTokenizerBase, template: str) -> str | None:
    """What the template writes before a user turn that is not the first one, or None if it cannot hold three turns."""
    names = [PROBE, PROBE[::-1], PROBE.upper()]
    roles = ["user", "assistant", "user"]
    turns = [{"role": r, "content": n} for r, n in zip(roles, names, strict=True)]
    try:
        text, two = _render(tokenizer, turns, False, {}), _render(tokenizer, turns[:2], False, {})
    except (TemplateError, TypeError, ValueError):
        return None
    if names[1] not in two or names[1] not in text or names[2] not in text:
        return None
    closing = two[two.rindex(names[1]) + len(names[1]) :]
    between = text[text.rindex(names[1]) + len(names[1]) : text.rindex(names[2])]
    header = between[_shared(tokenizer, between, closing) :]
    first = text[: text.index(names[0])]  # the first turn's header, without what closes a turn before it
    suffix = os.path.commonprefix([header[::-1], first[::-1]])[::-1]
    return suffix or header


def _shared(tokenizer: PreTrainedTokenizerBase, text: str, other: str) -> int:
    """Number of leading characters in common, cut back to the start of a token of `text` where the two part."""
    length = len(os.path.commonprefix([text, other]))
    if length < len(other):
        length = next((i for i, j in _encode(tokenizer, text)[1] if i < length < j), length)
    return length


def _user_header(tokenizer: PreTrainedTokenizerBase, role: str | None, where: str) -> str:
    header = _header_of(tokenizer, str(tokenizer.chat_template)) if role == "user" else None
    if header is None:
        raise UserError(
            f"{where}: context_view='message' needs a user turn before the completion (found {role!r}) and a chat "
            "template that can render user, assistant, user; use context_view: prefix."
        )
    return header


def _encode(
    tokenizer: PreTrainedTokenizerBase, text: str, special: bool = False
) -> tuple[list[int], list[tuple[int, int]]]:
    if not tokenizer.is_fast:
        raise UserError(
            f"{type(tokenizer).__name__} gives no character offsets, which the views are cut by; "
            "use the fast (Rust) version of this tokenizer."
        )
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    return encoded["input_ids"], encoded["offset_mapping"]


def _stand_alone(tokenizer: PreTrainedTokenizerBase, text: str, row_ids: list[int]) -> list[int]:
    """Tokens of a view on its own, opened with the BOS token if the LM row is."""
    ids, _ = _encode(tokenizer, text)
    bos = tokenizer.bos_token_id
    return [bos, *ids] if ids and bos is not None and row_ids[:1] == [bos] and ids[:1] != [bos] else ids


def _tokens_before(offsets: list[tuple[int, int]], end: int) -> int:
    """Number of leading tokens up to and including the one that holds character end - 1."""
    return max((i + 1 for i, (start, stop) in enumerate(offsets) if start < end and stop > start), default=0)


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences have in common at the start."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def _key(text: str) -> int:
    """A stable 63-bit key of a text: Python's own hash differs between processes."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1
