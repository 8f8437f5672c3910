"""One dataset row -> the token ids of its LM row and of its views.

The *LM row* is the row that plain SFT trains on, byte for byte as TRL's `SFTTrainer` makes it. The *context view*
predicts (the paper's Text: a user turn), the *target view* is predicted (the paper's Code: the assistant turn). The
paper (LLM-JEPA, arXiv:2509.14252, section 3.1) renders each view alone with the chat template.

The start and end of the content are read off the tokenizer's own template: the row is rendered once more with a probe
in place of the content, and the text around the probe shows where the content was. There is no table of model names,
and nothing is searched in decoded text.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from ..core.errors import UserError
from ..core.files import text_key
from .prompts import (
    PROBE,
    TRAINED,
    PromptForm,
    asked_tokens,
    content_span,
    end_of_turn_ids,
    render,
    tokens_of,
    tokens_up_to,
)
from .rows import MAX_ROW_PAIRS, Message, ParsedRow, parse_row

ContextView = Literal["prefix", "message"]
LabelProtocol = Literal["completion", "paper"]
# Which asked prompt is the start of the LM row (see `prompts.PromptForm.ends`). "same": both, and they are equal.
PromptFits = Literal["same", "both", "content", "generation_prompt", "neither"]
IGNORE = -100
PREDICTOR_TOKEN = "<|predictor_{}|>"


class NoCompletionLeft(UserError):
    """A row without a trained token. `tokens`: its length, if max_length cut it."""

    def __init__(self, message: str, tokens: int | None) -> None:
        super().__init__(message)
        self.tokens = tokens


@dataclass(frozen=True)
class Views:
    """Token ids of one example.

    A view ends with its last content token, so that its embedding is read at its last token (a context's at its last
    predictor token, if there are any).
    """

    input_ids: list[int]  # the LM row
    labels: list[int]  # -100 for tokens that are not trained
    contexts: list[list[int]]  # the context view, then those of the column `views`
    targets: list[list[int]]  # likewise
    context_header: int  # tokens before the content of a context: `predictor_position: first` inserts there
    target_header: int  # tokens before the content of a target
    context_start: int  # content tokens of the last turn of the prompt, in the LM row: [context_start, context_end)
    context_end: int
    target_start: int  # content tokens of the completion, in the LM row: [target_start, target_end)
    target_end: int
    context_key: int  # of the row, equal for equal prompts
    target_key: int  # of the row, equal for equal completions, or for equal values of the column `target_key`
    context_text_keys: list[int]  # of each context, equal for equal texts
    target_text_keys: list[int]
    index: int  # which row of the data set
    truncated: bool  # max_length cut the LM row or a view
    prompt_fits: PromptFits
    remarks: list[str]  # keys of `data.REMARKS`


def build_views(
    row: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_view: ContextView = "prefix",
    label_protocol: LabelProtocol = "completion",
    max_length: int | None = None,
    max_row_pairs: int | None = MAX_ROW_PAIRS,
    form: PromptForm = TRAINED,
    where: str = "the row",
    index: int = 0,
) -> Views:
    """Tokenize one row.

    The optional column `views` holds other wordings, `{"contexts": [...], "targets": [...]}`: contexts in place of the
    last turn of the prompt, targets in place of the completion. They become views without labels. The optional column
    `target_key` is a text that is equal for equal answers, e.g. the language of a regex.

    Args:
        context_view: "prefix": the LM row up to the last content token of the prompt, system prompt and earlier turns
            included (the paper's context does not contain them); costs no token. "message": the last user turn alone,
            as in the paper, but without a default system block that the template may add (the paper's code keeps it).
        label_protocol: "completion": every token after the prompt, end-of-turn included. "paper": every token that is
            not the pad token, as the published script really trains (its collator rebuilds the labels).
        max_length: tokens; cuts the end of the LM row and of each view.
        max_row_pairs: the contexts of a row times its targets.
        form: of the prompts that are asked later; `prompt_fits` says whether they are the start of this row.

    Raises UserError naming `where` if a view or the labels would be empty, or there are too many pairs.
    """
    parsed = parse_row(row, where, max_pairs=max_row_pairs)
    cut = _plain_parts if isinstance(parsed.prompt, str) else _chat_parts
    parts = cut(parsed, tokenizer, where, form, alone=context_view == "message")
    views = [*parts.contexts, *parts.targets]
    longest = max(map(len, [parts.input_ids, *views]))
    limit = max_length or longest
    ids = parts.input_ids[:limit]
    labels = _labels(ids, parts.prompt_length, label_protocol, tokenizer.pad_token_id)
    if len(ids) <= max(parts.prompt_length, parts.context_end) or all(label == IGNORE for label in labels[1:]):
        raise NoCompletionLeft(
            f"{where}: no completion token is left after truncation to max_length={max_length} (the prompt alone has "
            f"{parts.prompt_length} tokens); raise max_length, shorten the prompt or remove the row.",
            longest if longest > limit else None,
        )
    if not all(views):
        raise UserError(f"{where}: a view has no content token; check its text and the tokenizer's chat template.")
    context_keys = [text_key(text.strip()) for text in parts.context_texts]
    target_keys = [text_key(text.strip()) for text in parts.target_texts]
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
        context_key=context_keys[0],
        target_key=target_keys[0] if parsed.target_key is None else _key_of_column(parsed.target_key),
        context_text_keys=context_keys,
        target_text_keys=target_keys,
        index=index,
        truncated=longest > limit,
        prompt_fits=parts.prompt_fits,
        remarks=parts.remarks,
    )


def add_view_columns(row: dict[str, Any], index: int, where: str | None = None, **kwargs: Any) -> dict[str, Any]:
    """`datasets.Dataset.map(..., with_indices=True)` form of `build_views`."""
    return asdict(build_views(row, where=where or f"row {index}", index=index, **kwargs))


# ---------------------------------------------------------------------------------------------------------------------


def _labels(ids: list[int], prompt_length: int, protocol: LabelProtocol, pad_token_id: int | None) -> list[int]:
    """The two label protocols; see `build_views`."""
    if protocol == "paper":
        return [IGNORE if token == pad_token_id else token for token in ids]
    return [IGNORE] * min(prompt_length, len(ids)) + ids[prompt_length:]


def _key_of_column(target_key: str) -> int:
    """The key of a row's column `target_key`, which is never that of a text."""
    return text_key(f"target_key\0{target_key.strip()}")


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
    context_texts: list[str]  # what the keys are made of
    target_texts: list[str]
    prompt_fits: PromptFits
    remarks: list[str]


def _plain_parts(
    parsed: ParsedRow, tokenizer: PreTrainedTokenizerBase, where: str, form: PromptForm, *, alone: bool
) -> _Parts:
    """Two strings without a template: TRL joins them and appends the eos token to the completion."""
    prompt, completion = str(parsed.prompt), str(parsed.completion)
    eos = tokenizer.eos_token or ""
    full = prompt + completion
    if not completion.endswith(eos):
        full += eos
    ids, offsets = tokens_of(tokenizer, full, special=True)
    prompt_ids, _ = tokens_of(tokenizer, prompt, special=True)
    prompt_length = common_length(prompt_ids, ids)

    source = prompt.rstrip()
    goal = completion.rstrip() if not eos else completion.removesuffix(eos).rstrip()
    _refuse_predictor_tokens(" ".join([full, *parsed.contexts, *parsed.targets]), where)
    split = min(tokens_up_to(offsets, len(source)), prompt_length)
    if alone:
        context = _stand_alone(tokenizer, source, ids)
    else:
        has_content = any(stop > start for start, stop in offsets[:split])  # a BOS token alone is not a context
        context = ids[:split] if has_content else []
    bos = int(ids[:1] == [tokenizer.bos_token_id])
    asked = asked_tokens(tokenizer, prompt, form, where)
    return _Parts(
        input_ids=ids,
        prompt_length=prompt_length,
        contexts=[context, *(_stand_alone(tokenizer, text.rstrip(), ids) for text in parsed.contexts)],
        targets=[_stand_alone(tokenizer, text.rstrip(), ids) for text in (goal, *parsed.targets)],
        context_header=bos,
        target_header=bos,
        context_start=bos,
        context_end=split,
        target_start=prompt_length,
        target_end=tokens_up_to(offsets, len(prompt + goal)),
        context_texts=[source, *parsed.contexts],
        target_texts=[goal, *parsed.targets],
        prompt_fits="same" if _starts(ids, asked, prompt_length) else "neither",
        remarks=["joined_space"] if prompt_length < len(prompt_ids) and source != prompt else [],
    )


def _chat_parts(
    parsed: ParsedRow, tokenizer: PreTrainedTokenizerBase, where: str, form: PromptForm, *, alone: bool
) -> _Parts:
    """Two lists of messages, rendered by the chat template."""
    prompt: list[Message] = list(parsed.prompt)  # type: ignore[arg-type]
    completion: list[Message] = list(parsed.completion)  # type: ignore[arg-type]
    if tokenizer.chat_template is None:
        raise UserError(
            f"{where} holds messages but the tokenizer has no chat template; set chat_template_path to a .jinja file "
            "or give 'prompt' and 'completion' as strings."
        )

    def show(messages: list[Message], generation_prompt: bool = False) -> str:
        return render(tokenizer, messages, parsed.render_kwargs, where, generation_prompt=generation_prompt)

    # The LM row, as TRL makes it.
    text = show(prompt + completion)
    _refuse_predictor_tokens(" ".join([text, *parsed.contexts, *parsed.targets]), where)
    generation_ids, _ = tokens_of(tokenizer, show(prompt, generation_prompt=True))
    ids, offsets = tokens_of(tokenizer, text)
    prompt_length = common_length(generation_ids, ids)

    # The characters of the two contents in it.
    context_start, context_end = content_span(show, prompt + completion, len(prompt) - 1, where)
    target_start, target_end = content_span(show, prompt + completion, len(prompt), where)
    source = text[context_start:context_end].rstrip()
    goal = text[target_start:target_end].rstrip()
    # No token of the context may reach into the target, and none of it may be later than its last content character.
    before_target = sum(stop <= target_start for _, stop in offsets)
    split = min(tokens_up_to(offsets, context_start + len(source)), before_target)

    # The target view: what opens the assistant turn (the text between what closes the turn before it and the content),
    # then the content.
    closing = show(prompt)[content_span(show, prompt, len(prompt) - 1, where)[1] :]
    target_header = _opening(tokenizer, text[context_end:], closing, target_start - context_end)
    opened_target = _stand_alone(tokenizer, target_header, ids)
    targets = [_stand_alone(tokenizer, target_header + goal, ids)]
    targets += [_stand_alone(tokenizer, target_header + more.strip(), ids) for more in parsed.targets]

    # The context view: the last user turn alone, or all of the row up to the end of its content. Other wordings take
    # the place of that content.
    if alone:
        header = user_header(tokenizer, prompt[-1].get("role"), where)
        opened_context = _stand_alone(tokenizer, header, ids)
        contexts = [_stand_alone(tokenizer, header + source, ids)]
        contexts += [_stand_alone(tokenizer, header + more.strip(), ids) for more in parsed.contexts]
    else:
        header = text[:context_start]
        opened_context, _ = tokens_of(tokenizer, header)
        contexts = [ids[:split]]
        contexts += [tokens_of(tokenizer, header + more.strip())[0] for more in parsed.contexts]
    before = "" if alone else header  # earlier turns are a part of a prefix view

    asked = asked_tokens(tokenizer, parsed.question, replace(form, ends="content"), where)
    content_fits = _starts(ids, asked, prompt_length)
    target_end = tokens_up_to(offsets, target_start + len(goal))
    remarks = [] if goal.strip() == completion[0]["content"].strip() else ["answer_changed"]
    if text == _without_tools(prompt + completion, parsed, tokenizer, where):
        remarks.append("tools_left_out")
    if not set(end_of_turn_ids(tokenizer)).isdisjoint(ids[prompt_length:target_end]):
        remarks.append("stops_early")
    return _Parts(
        input_ids=ids,
        prompt_length=prompt_length,
        contexts=contexts,
        targets=targets,
        context_header=common_length(opened_context, contexts[0]),
        target_header=common_length(opened_target, targets[0]),
        context_start=sum(stop <= context_start for _, stop in offsets[:split]),
        context_end=split,
        target_start=max(prompt_length, before_target),
        target_end=target_end,
        context_texts=[before + text.strip() for text in (source, *parsed.contexts)],
        target_texts=[goal, *parsed.targets],
        prompt_fits=_fits(content_fits, prompt_length == len(generation_ids), asked == generation_ids),
        remarks=remarks,
    )


def _without_tools(
    messages: list[Message], parsed: ParsedRow, tokenizer: PreTrainedTokenizerBase, where: str
) -> str | None:
    """The conversation rendered without its tools and tool calls; None if it has neither."""
    if not parsed.render_kwargs.get("tools") and not any(message.get("tool_calls") for message in messages):
        return None
    kwargs = {name: value for name, value in parsed.render_kwargs.items() if name != "tools"}
    plain = [{key: value for key, value in message.items() if key != "tool_calls"} for message in messages]
    try:
        return render(tokenizer, plain, kwargs, where)
    except UserError:  # a template that asks for them writes them
        return None


def _starts(ids: list[int], asked: list[int], prompt_length: int) -> bool:
    """Whether a model that reads `asked` is in the middle of the LM row, and only trained tokens follow."""
    return ids[: len(asked)] == asked and len(asked) >= prompt_length


def _fits(content: bool, generation_prompt: bool, are_equal: bool) -> PromptFits:
    if content and generation_prompt:
        return "same" if are_equal else "both"
    if content:
        return "content"
    return "generation_prompt" if generation_prompt else "neither"


def _refuse_predictor_tokens(text: str, where: str) -> None:
    """Predictor tokens are inputs that the collator adds; as a label, their masked logit would be an infinite loss."""
    if PREDICTOR_TOKEN.partition("{")[0] in text:
        raise UserError(f"{where} holds the text of a predictor token, {PREDICTOR_TOKEN.format('...')}; remove it.")


@functools.lru_cache(maxsize=8)
def _header_of(tokenizer: PreTrainedTokenizerBase, template: str) -> str | None:
    """The text that opens a user turn which is not the first one; None if the template cannot render three turns."""
    first, answer, second = PROBE, PROBE[::-1], PROBE.upper()
    turns = [
        {"role": "user", "content": first},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": second},
    ]
    try:
        text, two = render(tokenizer, turns, {}, ""), render(tokenizer, turns[:2], {}, "")
    except UserError:
        return None
    if answer not in two or any(turn["content"] not in text for turn in turns):
        return None
    # Between the answer and the second user turn: what closes a turn, then the header.
    closing = two[two.rindex(answer) + len(answer) :]
    between = text[text.rindex(answer) + len(answer) : text.rindex(second)]
    header = between[_shared(tokenizer, between, closing) :]
    # The first turn has the same header without anything that closes a turn before it.
    opening = text[: text.index(first)]
    suffix = os.path.commonprefix([header[::-1], opening[::-1]])[::-1]
    return suffix or header


def _shared(tokenizer: PreTrainedTokenizerBase, text: str, other: str) -> int:
    """How many leading characters two texts share, cut back to the start of a token of `text` that contains the end."""
    length = len(os.path.commonprefix([text, other]))
    if length < len(other):
        for start, stop in tokens_of(tokenizer, text)[1]:
            if start < length < stop:
                return start
    return length


def _opening(tokenizer: PreTrainedTokenizerBase, text: str, closing: str, content: int) -> str:
    """What opens a turn: the text between what closes the turn before it and the content, which begins at `content`."""
    return text[_shared(tokenizer, text, closing) : content]


def answer_header(tokenizer: PreTrainedTokenizerBase, prompt: list[Message], kwargs: dict[str, Any]) -> str:
    """The text in front of a target view after this prompt. Raises UserError if the template cannot render it."""
    where = "the prompt"

    def show(messages: list[Message]) -> str:
        return render(tokenizer, messages, kwargs, where)

    answered = [*prompt, {"role": "assistant", "content": PROBE[::-1]}]
    closing = show(prompt)[content_span(show, prompt, len(prompt) - 1, where)[1] :]
    end = content_span(show, answered, len(prompt) - 1, where)[1]
    start = content_span(show, answered, len(prompt), where)[0]
    return _opening(tokenizer, show(answered)[end:], closing, start - end)


def user_header(tokenizer: PreTrainedTokenizerBase, role: str | None, where: str) -> str:
    """The text in front of a context view that is a user turn alone. Raises UserError if the template has none."""
    header = _header_of(tokenizer, str(tokenizer.chat_template)) if role == "user" else None
    if header is None:
        raise UserError(
            f"{where}: context_view='message' needs a user turn before the completion (found {role!r}) and a chat "
            "template that can render user, assistant, user; use context_view: prefix."
        )
    return header


def _stand_alone(tokenizer: PreTrainedTokenizerBase, text: str, row_ids: list[int]) -> list[int]:
    """Tokens of a view that is a sequence of its own; it opens with the BOS token if the LM row does."""
    ids, _ = tokens_of(tokenizer, text)
    bos = tokenizer.bos_token_id
    row_has_bos = bos is not None and row_ids[:1] == [bos]
    return [bos, *ids] if ids and row_has_bos and ids[0] != bos else ids


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences have in common at the start."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
