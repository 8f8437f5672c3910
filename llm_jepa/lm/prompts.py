"""The prompt of a row: rendered for training, and asked of a checkpoint, by the same functions.

A model continues only the prompt that it was trained to continue. A chat template can break that silently: it puts
something in front of an answer (an empty think block, a channel header) or ends its generation prompt with a tag that
no trained row has. So a run checks every row before its first step: are the tokens of the asked prompt the first
tokens of the row? What fits is saved as a `PromptForm` in the model's config, and every question is asked in that form.
"""

from __future__ import annotations

import functools
import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..core.errors import UserError, first_line
from ..core.json_files import parse_json
from ..core.templates import budget
from .rows import Message, ParsedRow, render_kwargs_of, with_kwargs

# A text; messages; or a row {"prompt": either of them, "tools": ..., "chat_template_kwargs": ...} without completion.
Prompt = str | list[Message] | dict[str, Any]
# Letters only, so that no template trims, escapes or splits it.
PROBE = "jepaprobecontent"
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")  # the names that templates know
# The start and the end of what `template_that_asks` puts around a template.
_ASKS = (
    "{%- set asks_for_answer = add_generation_prompt is defined and add_generation_prompt -%}"
    "{%- set add_generation_prompt = false "
)
_IF_ASKED = "{%- if asks_for_answer -%}"


@dataclass(frozen=True)
class PromptForm:
    """How the prompts of a training run look; `llm_jepa["prompt"]` in the config of the trained model.

    Args:
        format: "text" or "messages": what the rows held. None: not trained by this package, or before this was
            recorded.
        ends: "generation_prompt": at the template's generation prompt, where every other tool ends it too.
            "content": at the content of the answer, after everything that the template puts in front of it.
        answer_begins: white space and first word of a usual completion. A tokenizer may join them with the end of the
            prompt ("Label: " + "Good" has the token " Good"), and then the asked prompt must not contain that end.
        space: white space in front of a usual completion, after a prompt that ends in none. None: no such row was
            trained.
        system: the system turn that all training rows share, for a question that comes without a conversation.
        render_kwargs: likewise `tools` and `chat_template_kwargs`.
    """

    format: Literal["text", "messages"] | None = None
    ends: Literal["generation_prompt", "content"] = "generation_prompt"
    answer_begins: str = ""
    space: str | None = None
    system: str | None = None
    render_kwargs: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For a model's config. `render_kwargs` become a text: a config sorts keys, and templates write them out."""
        return {**asdict(self), "render_kwargs": json.dumps(self.render_kwargs, ensure_ascii=False)}


FOREIGN = PromptForm()  # of a model that was not trained here: its generation prompt, tokenized alone
TRAINED = PromptForm(ends="content", answer_begins=PROBE[0])


def form_of(config: PreTrainedConfig) -> PromptForm:
    """The form in which a model's prompts were trained; `FOREIGN` for other models and older checkpoints."""
    record = (getattr(config, "llm_jepa", None) or {}).get("prompt")
    if not isinstance(record, Mapping):
        return FOREIGN
    known = {name.name: record[name.name] for name in fields(PromptForm) if name.name in record}
    if isinstance(kwargs := known.get("render_kwargs"), str):
        known["render_kwargs"] = parse_json(kwargs, "The render_kwargs of its config.json")
    return PromptForm(**known)


def is_asked_as_text(tokenizer: PreTrainedTokenizerBase, form: PromptForm) -> bool:
    """Whether a question is a plain text; else it is a conversation. Without a record, the chat template decides."""
    return tokenizer.chat_template is None if form.format is None else form.format == "text"


def conversation(system: str | None, question: str) -> list[Message]:
    """One user turn, after a system turn if there is one."""
    turns: list[Message] = [{"role": "system", "content": system}] if system else []
    return [*turns, {"role": "user", "content": question}]


def as_prompts(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, form: PromptForm, *, system: str | None = None
) -> list[Prompt]:
    """Plain questions in the format of the training rows: as they are, or as user turns.

    What all training rows shared goes with each: tools, template arguments, and the system turn, unless `system`
    replaces it. A model that was not trained here gets messages if its tokenizer has a chat template.
    """
    if is_asked_as_text(tokenizer, form):
        return list(texts)
    system = form.system if system is None else system
    return [with_kwargs(conversation(system, text), form.render_kwargs) for text in texts]


# -- rendering --------------------------------------------------------------------------------------------------------


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    kwargs: dict[str, Any],
    where: str,
    *,
    generation_prompt: bool = False,
) -> str:
    """The conversation as the chat template writes it. Raises UserError if the template refuses it."""
    try:
        with budget():
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation_prompt, **kwargs
            )
    except Exception as error:  # a template is a program: it may raise anything
        raise UserError(
            f"{where}: the chat template cannot render this conversation ({type(error).__name__}: "
            f"{first_line(error)}); change the conversation, or use another template."
        ) from None
    return str(text)


def tokens_of(
    tokenizer: PreTrainedTokenizerBase, text: str, special: bool = False
) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids, and the range of characters of each. Raises UserError for a tokenizer without offsets."""
    if not tokenizer.is_fast:
        raise UserError(
            f"{type(tokenizer).__name__} gives no character offsets, which tell where a prompt or a view ends; use the "
            "fast (Rust) version of this tokenizer."
        )
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    return encoded["input_ids"], encoded["offset_mapping"]


def content_span(show: Callable[[list[Message]], str], messages: list[Message], at: int, where: str) -> tuple[int, int]:
    """The range of characters that the content of messages[at] has in show(messages)."""
    text = show(messages)
    probed = show([*messages[:at], {**messages[at], "content": PROBE}, *messages[at + 1 :]])
    before, probe, after = probed.rpartition(PROBE)
    # Only the content may differ between the two renderings, and it may not be empty.
    same_around = text.startswith(before) and text.endswith(after)
    if not probe or not same_around or len(before) + len(after) >= len(text):
        raise UserError(
            f"{where}: cannot find the {messages[at].get('role')} turn in the rendered conversation, because the chat "
            "template changes the text around it; use a template that renders each turn in its place."
        )
    return len(before), len(text) - len(after)


# -- asking -----------------------------------------------------------------------------------------------------------


def encode(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], form: PromptForm = TRAINED
) -> list[list[int]]:
    """Token ids of each prompt, up to the place where the answer begins.

    Args:
        prompts: texts, messages (rendered with the chat template), or rows without a completion, whose `tools` and
            `chat_template_kwargs` go to the template.
        form: how the model was trained, `form_of(model.config)`. The default is the start of the row that training
            with these messages makes.

    Raises UserError for an empty prompt, for messages without a chat template, and if the template refuses them.
    """
    return [asked_tokens(tokenizer, prompt, form, f"Prompt {index}") for index, prompt in enumerate(prompts)]


def asked_tokens(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, form: PromptForm, where: str) -> list[int]:
    """Token ids of one prompt; see `encode`."""
    text, is_plain = asked_text(tokenizer, prompt, form, where)
    # What follows a generation prompt may be a reasoning, so it is tokenized alone, as other tools do.
    follows = form.answer_begins if is_plain or form.ends == "content" else ""
    if follows:
        ids = tokens_before(tokenizer, text, follows, special=is_plain)
    else:
        ids = list(tokenizer(text, add_special_tokens=is_plain)["input_ids"])
    if not ids:
        raise UserError(f"{where} is empty.")
    return ids


def asked_text(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, form: PromptForm, where: str) -> tuple[str, bool]:
    """The text of a prompt, and whether it is plain: not rendered by a chat template."""
    turns, kwargs = split_prompt(prompt, where)
    if not turns:
        raise UserError(f"{where} is empty.")
    if isinstance(turns, str):
        return turns, True
    if tokenizer.chat_template is None:
        raise UserError(f"{where} holds messages, but the tokenizer has no chat template; give it as a string.")
    if form.ends == "content":
        return up_to_content(tokenizer, turns, kwargs, where), False
    return render(tokenizer, turns, kwargs, where, generation_prompt=True), False


def split_prompt(prompt: Prompt, where: str) -> tuple[str | list[Message], dict[str, Any]]:
    """A prompt's text or messages, and the arguments of the chat template that come with it."""
    if isinstance(prompt, dict):
        return prompt["prompt"], render_kwargs_of(prompt, where)
    return prompt, {}


def up_to_content(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], kwargs: dict[str, Any], where: str
) -> str:
    """The rendered conversation with an answer, up to the content of the answer."""
    answered = [*messages, {"role": "assistant", "content": PROBE}]
    before, probe, _ = render(tokenizer, answered, kwargs, where).rpartition(PROBE)
    if not probe:
        raise UserError(f"{where}: the chat template leaves the content of an assistant turn out; use another one.")
    return before


def tokens_before(
    tokenizer: PreTrainedTokenizerBase, text: str, continuation: str, *, special: bool = False
) -> list[int]:
    """The tokens of `text` in `text + continuation`: those that do not reach into the continuation."""
    ids, offsets = tokens_of(tokenizer, text + continuation, special)
    return ids[: whole_tokens(offsets, len(text))]


def whole_tokens(offsets: Sequence[tuple[int, int]], end: int) -> int:
    """How many tokens from the start do not reach beyond character `end`."""
    return next((i for i, (_, stop) in enumerate(offsets) if stop > end), len(offsets))


class AnswerRow(NamedTuple):
    """The tokens of a prompt with an answer, as training would show them; the answer is [start, len(ids))."""

    ids: list[int]
    start: int


def answer_row(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, answer: str, form: PromptForm, where: str
) -> AnswerRow:
    """Prompt and answer as one row, cut after the last token of the answer's content.

    What a template puts in front of the content belongs to the prompt. After a text, the answer begins with the white
    space of the trained completions; if none is known, with one space unless the prompt ends in white space.

    Raises UserError like `encode`, and for a model that was trained to reason before it answers.
    """
    turns, kwargs = split_prompt(prompt, where)
    if isinstance(turns, str):
        space = _space_before(answer, turns, form)
        text = turns + space + answer
        start, stop = len(turns), len(text)
        ids, offsets = tokens_of(tokenizer, text, special=True)
    else:
        if tokenizer.chat_template is None:
            raise UserError(f"{where} holds messages, but the tokenizer has no chat template; give it as a string.")

        def show(messages: list[Message]) -> str:
            return render(tokenizer, messages, kwargs, where)

        answered = [*turns, {"role": "assistant", "content": answer}]
        text = show(answered)
        start, stop = content_span(show, answered, len(turns), where)
        if form.format is not None and form.ends == "generation_prompt":
            asked, _ = asked_text(tokenizer, prompt, form, where)
            if text[:start] != asked:
                raise UserError(
                    f"{where}: the model was trained to write a reasoning between the prompt and the answer, so the "
                    "likelihood of an answer is not known before it is written; leave 'choices' out, and grade what "
                    "the model generates."
                )
        ids, offsets = tokens_of(tokenizer, text)
    first = whole_tokens(offsets, start)
    if first == 0:
        raise UserError(f"{where}: the tokenizer joins the prompt and {answer!r} into one token; give a longer prompt.")
    return AnswerRow(ids[: tokens_up_to(offsets, stop)], first)


def _space_before(answer: str, prompt: str, form: PromptForm) -> str:
    if answer[:1].isspace():
        return ""
    if not prompt[-1:].isspace():
        return " " if form.space is None else form.space
    space = _leading_space(form.answer_begins)
    return "" if space == form.space else space  # the prompt ends in the space that training had in the completions


def _leading_space(text: str) -> str:
    return text[: len(text) - len(text.lstrip())]


def tokens_up_to(offsets: Sequence[tuple[int, int]], end: int) -> int:
    """Number of leading tokens up to and including the one that holds character end - 1."""
    return max((i + 1 for i, (start, stop) in enumerate(offsets) if start < end and stop > start), default=0)


def other_format(prompts: Sequence[Prompt], form: PromptForm) -> str | None:
    """A note on prompts in another format than the model was trained on; None if there are none."""
    if form.format is None:
        return None
    plain = sum(isinstance(split_prompt(prompt, "a prompt")[0], str) for prompt in prompts)
    count, found, trained = plain, "plain strings", "messages"
    if form.format == "text":
        count, found, trained = len(prompts) - plain, "messages", "plain prompts"
    if not count:
        return None
    return f"{count} of {len(prompts)} prompts are {found}, but the model was trained on {trained}."


# -- the end of an answer, and what stands before it ------------------------------------------------------------------


class TurnEnd(NamedTuple):
    """Where generation stops."""

    ids: list[int]  # at any of these tokens
    text: str | None = None  # or at this text, if the template closes a turn with something that is not one token
    is_missing: bool = False  # the chat template closes an assistant turn with nothing


@functools.lru_cache(maxsize=8)
def _turn_end(tokenizer: PreTrainedTokenizerBase, template: str | None, eos: int | None, vocabulary: int) -> TurnEnd:
    ids = [] if eos is None else [eos]
    turns = [{"role": "user", "content": PROBE[::-1]}, {"role": "assistant", "content": PROBE}]
    try:
        text = render(tokenizer, turns, {}, "") if template is not None else ""
    except UserError:  # a template of another kind of conversation (images): eos is all there is
        return TurnEnd(ids)
    _, probe, closing = text.rpartition(PROBE)
    if template is not None and not probe:
        return TurnEnd(ids)  # likewise: it renders no content that is a text
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    for token in tokenizer(closing, add_special_tokens=False)["input_ids"]:
        if token in special:
            return TurnEnd(list(dict.fromkeys([*ids, token])))
        if tokenizer.decode([token]).strip():  # text, although a special token may follow
            return TurnEnd(ids, closing.strip())
    return TurnEnd(ids, is_missing=template is not None)


def turn_end(tokenizer: PreTrainedTokenizerBase) -> TurnEnd:
    """Where generation stops: at eos, and at what the template closes an assistant turn with.

    That is another special token (Gemma's `<end_of_turn>`, Llama's `<|eot_id|>`), or a text if the tokenizer has no
    such token.
    """
    template = None if tokenizer.chat_template is None else str(tokenizer.chat_template)  # it may be a dict of several
    return _turn_end(tokenizer, template, tokenizer.eos_token_id, len(tokenizer))


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that end an assistant turn; generation stops at any of them. See `turn_end`."""
    return turn_end(tokenizer).ids


@functools.lru_cache(maxsize=8)
def _openings(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[str, str]:
    """(text between the generation prompt and a content, text between a reasoning and a content); "" if not known."""
    question: list[Message] = [{"role": "user", "content": PROBE[::-1]}]
    try:
        asked = render(tokenizer, question, {}, "", generation_prompt=True)
        before = up_to_content(tokenizer, question, {}, "")
        lead = before.removeprefix(asked) if before.startswith(asked) else ""
        reasoned: Message = {"role": "assistant", "content": PROBE} | dict.fromkeys(REASONING_KEYS, PROBE.upper())
        text = render(tokenizer, [*question, reasoned], {}, "")
    except UserError:
        return "", ""
    between = text.rpartition(PROBE)[0].rpartition(PROBE.upper())
    return lead.strip(), between[2].strip() if between[1] else ""


def without_opening(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> list[int]:
    """The generated tokens of an answer without those that the template writes in front of its content.

    They are generated after a plain generation prompt: an empty think block, a channel header, or a reasoning and
    what closes it.
    """
    if tokenizer.chat_template is None:
        return tokens
    lead, close = _openings(tokenizer, str(tokenizer.chat_template))
    text = tokenizer.decode(tokens)
    if lead and text.lstrip().startswith(lead):
        end = text.index(lead) + len(lead)
    elif close and close in text:
        end = text.rindex(close) + len(close)
    else:
        return tokens
    count = bisect_left(range(len(tokens)), end, key=lambda i: len(tokenizer.decode(tokens[:i])))
    return tokens[count:]


# -- the form of a training run ---------------------------------------------------------------------------------------


def starting_form(rows: Iterable[ParsedRow], tokenizer: PreTrainedTokenizerBase) -> PromptForm:
    """What the rows of a run have in common, before the template is looked at."""
    formats: Counter[Literal["text", "messages"]] = Counter()
    # (white space in front of the completion, tokens that it joins with white space at the end of the prompt or None)
    boundaries: Counter[tuple[str, int | None]] = Counter()
    begins: dict[Any, str] = {}  # the first beginning at each boundary, or of messages
    systems: set[str | None] = set()
    kwargs: list[dict[str, Any]] = []
    measured = 0
    for row in rows:
        beginning = _beginning(row.completion)
        if isinstance(row.prompt, str):
            formats["text"] += 1
            joined = None
            if row.prompt[-1].isspace() and measured < 1000:
                joined = _joined_tokens(tokenizer, row.prompt, str(row.completion))
                measured += 1
            if joined is not None or not row.prompt[-1].isspace():
                boundaries[_leading_space(beginning), joined] += 1
                begins.setdefault((_leading_space(beginning), joined), beginning)
        else:
            formats["messages"] += 1
            begins.setdefault("messages", beginning)
        if len(systems) < 2:
            systems.add(_system_turn(row.prompt))
        if not kwargs or len(kwargs) < 2 and row.render_kwargs != kwargs[0]:
            kwargs.append(row.render_kwargs)
    chosen = formats.most_common(1)[0][0]
    # Of prompts that end in white space, the most common kind of boundary decides; the others do not depend on it.
    open_ends = [boundary for boundary, _ in boundaries.most_common() if boundary[1] is None]
    usual = [boundary for boundary, _ in boundaries.most_common() if boundary[1] is not None] or open_ends
    return PromptForm(
        format=chosen,
        ends="content",
        answer_begins=begins[usual[0] if chosen == "text" else "messages"],
        space=open_ends[0][0] if open_ends else None,
        system=systems.pop() if len(systems) == 1 else None,
        render_kwargs=kwargs[0] if len(kwargs) == 1 else {},
    )


def _joined_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> int:
    """How many tokens at the end of the prompt change when the completion follows."""
    alone = tokens_of(tokenizer, prompt, special=True)[0]
    return len(alone) - len(tokens_before(tokenizer, prompt, completion, special=True))


def _beginning(completion: str | list[Message]) -> str:
    """White space and first word of a completion; templates trim contents, so of messages the word alone."""
    text = completion if isinstance(completion, str) else str(completion[0]["content"]).lstrip()
    return _leading_space(text) + text.split(maxsplit=1)[0][:20]


def _system_turn(prompt: str | list[Message]) -> str | None:
    """The text of a first system turn."""
    if isinstance(prompt, str) or prompt[0].get("role") != "system":
        return None
    content = prompt[0].get("content")
    return content if isinstance(content, str) else None


def fitted(form: PromptForm, fits: Sequence[str]) -> tuple[PromptForm, int]:
    """The form whose prompts start the most rows, and how many rows they do not start.

    fits: `Views.prompt_fits` of each row. The generation prompt is preferred if both are equal, because other tools
    ask it as well; else the content, because nothing but the answer is generated then.
    """
    counts = Counter(fits)
    misses = {
        "generation_prompt": counts["content"] + counts["neither"],
        "content": counts["generation_prompt"] + counts["neither"],
    }
    only_equal = not misses["generation_prompt"] and not counts["both"]
    if only_equal or misses["generation_prompt"] < misses["content"]:
        return replace(form, ends="generation_prompt"), misses["generation_prompt"]
    return form, misses["content"]


def template_that_asks(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> str | None:
    """The chat template with a generation prompt that ends at the content of the answer, as `ends: content` asks.

    It is saved with the model, so that tools which know only the template ask what was trained. None if the text in
    front of the content is not the same after every prompt, and for a tokenizer with several templates.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str):
        return None
    if template.startswith(_ASKS):  # of an earlier training
        template = template.removeprefix(_ASKS).removeprefix("-%}").removeprefix("%}\n").rpartition(_IF_ASKED)[0]
    headers = set()
    for index, prompt in enumerate(prompts):
        turns, kwargs = split_prompt(prompt, f"row {index}")
        if isinstance(turns, str):
            return None
        conversation = render(tokenizer, turns, kwargs, f"row {index}")
        asked = up_to_content(tokenizer, turns, kwargs, f"row {index}")
        headers.add(asked.removeprefix(conversation) if asked.startswith(conversation) else None)
    (header, *others) = headers
    if header is None or others:
        return None
    for character, escaped in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
        header = header.replace(character, escaped)
    # White space at the start of a template is written; of what follows a block, transformers drops one line break.
    ends = "%}\n" if template[:1].isspace() else "-%}"
    return f'{_ASKS}{ends}{template}{_IF_ASKED}{{{{- "{header}" -}}}}{{%- endif -%}}'
