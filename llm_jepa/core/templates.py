"""Chat templates of strangers: tried in a child when they are loaded, and rendered in a sandbox with a budget."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from jinja2 import Template
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from . import sandbox
from .errors import UserError
from .limited import Refused, run_limited
from .template_trial import try_template
from .tokenizer import CHAT_TEMPLATE

_compile_of_transformers = chat_template_utils._compile_jinja_template
_has_budget: ContextVar[bool] = ContextVar("has_budget", default=False)


def check_templates(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Try each chat template of a tokenizer with sample conversations, in a child with limits.

    Raises UserError for a template that does not compile or that takes too much time or memory. One that only refuses
    some conversations is accepted; it is an error when such a conversation is rendered.
    """
    templates = tokenizer.chat_template
    named = templates if isinstance(templates, dict) else {"": templates}
    for name, template in named.items():
        if template is None or template == CHAT_TEMPLATE:
            continue
        reason = _fault(str(template), tuple(_texts(tokenizer).items()))
        if reason is not None:
            called = f"chat template {name!r}" if name else "chat template"
            raise UserError(
                f"The {called} of {source} cannot be used: {reason}. Use another template: put it into the folder, or "
                "name it as chat_template_path in a recipe."
            )


def use_template(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Give a tokenizer the chat template of a file, and try it. Raises UserError like `check_templates`."""
    if not Path(path).is_file():
        raise UserError(f"No chat template at {path}; check chat_template_path.")
    try:
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"The chat template {path} is not UTF-8 text: {error}.") from None
    check_templates(tokenizer, path)


# A run asks for the same template several times (tokenizer, saved model). Between processes nothing is kept: a folder
# of remembered templates would have to be trusted, and a trial takes 0.2 seconds.
@functools.lru_cache(maxsize=64)
def _fault(template: str, texts: tuple[tuple[str, str], ...]) -> str | None:
    try:
        run_limited(try_template, template, dict(texts))
    except Refused as refused:
        return str(refused)
    return None


def _texts(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The special tokens, as a template sees them."""
    return {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}


@contextmanager
def budget() -> Iterator[None]:
    """Render chat templates inside this block with the budget of `core.sandbox`."""
    token = _has_budget.set(True)
    try:
        yield
    finally:
        _has_budget.reset(token)


_compile_with_budget = functools.lru_cache(maxsize=64)(sandbox.compile_template)


def _compile(template: str) -> Template | Any:
    return _compile_with_budget(template) if _has_budget.get() else _compile_of_transformers(template)


# transformers has no argument for another sandbox. Outside of `budget()` nothing changes.
chat_template_utils._compile_jinja_template = _compile
