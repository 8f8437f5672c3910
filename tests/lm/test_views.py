"""Claims about views: the LM row is TRL's, and the cuts around content are where a reader of the template would cut.

References: a real `SFTTrainer` for LM rows and labels, and for the views `Shape.text`, which writes each conversation
by hand. The templates are short re-creations of the shapes that common models use.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from llm_jepa.core.errors import UserError
from llm_jepa.core.tokenizer import BOS
from llm_jepa.lm.from_scratch import train_tokenizer
from llm_jepa.lm.prompts import end_of_turn_ids
from llm_jepa.lm.rows import parse_row, stand_in_answer
from llm_jepa.lm.views import IGNORE, build_views
from tests.conftest import tiny_model
from tests.properties import examples

# -- templates ----------------------------------------------------------------------------------------------------


def same(text: str) -> str:
    return text


@dataclass(frozen=True)
class Shape:
    """A template, and what it writes around content: (before, after) of a turn that others follow."""

    template: str
    special: tuple[str, ...]
    eos: str
    user: tuple[str, str]
    assistant: tuple[str, str]
    system: tuple[str, str] | None = None  # None: no turn of its own
    folds_system: bool = False  # into the first user turn
    bos: str = ""
    opening: str = ""  # the default system block
    thought: str = ""  # written before the content of the last assistant turn only
    clean_user: Callable[[str], str] = same
    clean_assistant: Callable[[str], str] = same
    ends: tuple[str, ...] = ()
    header_in_row: bool = True  # the header is made of special tokens, so it cannot merge with what is before it

    def text(self, turns: list[tuple[str, str]]) -> str:
        """The conversation up to the end of the last turn's content, trailing whitespace left out."""
        text, folded = self.bos + (self.opening if turns[0][0] != "system" else ""), ""
        for i, (role, content) in enumerate(turns):
            last = i == len(turns) - 1
            if role == "system" and self.folds_system:
                folded = content.strip() + "\n\n"
                continue
            before, after = getattr(self, role)
            clean = self.clean_assistant if role == "assistant" else self.clean_user
            thought = self.thought if role == "assistant" and last else ""
            text += before + thought + (folded if role == "user" else "") + clean(content) + ("" if last else after)
            folded = "" if role == "user" else folded
        return text.rstrip()

    def context(self, content: str) -> str:
        return self.bos + self.user[0] + self.clean_user(content).rstrip()

    def target(self, content: str) -> str:
        return self.bos + self.assistant[0] + self.thought + self.clean_assistant(content).rstrip()


REFUSE = "{{ raise_exception('Conversation roles must alternate') }}"
SHAPES = {
    "chatml": Shape(
        template="""
{%- if tools %}{{ '<|im_start|>tools\n' + (tools | tojson) + '<|im_end|>\n' }}{% elif tools is not none %}
{{- '<|im_start|>tools\nnone<|im_end|>\n' }}{% endif %}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
        special=("<|im_start|>", "<|im_end|>"),
        eos="<|im_end|>",
        system=("<|im_start|>system\n", "<|im_end|>\n"),
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        assistant=("<|im_start|>assistant\n", "<|im_end|>\n"),
        ends=("<|im_end|>",),
    ),
    "llama3": Shape(
        template="""
{{- bos_token }}
{%- if messages[0].role != 'system' %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>' }}{% endif %}
{%- for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}""",
        special=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"),
        eos="<|end_of_text|>",
        bos=BOS,
        opening="<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>",
        system=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
        user=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
        assistant=("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
        clean_user=str.strip,
        clean_assistant=str.strip,
        ends=("<|end_of_text|>", "<|eot_id|>"),
    ),
    "gemma": Shape(
        template="""
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}REFUSE{% endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}""".replace("REFUSE", REFUSE),
        special=("<start_of_turn>", "<end_of_turn>", "<eos>"),
        eos="<eos>",
        bos=BOS,
        user=("<start_of_turn>user\n", "<end_of_turn>\n"),
        assistant=("<start_of_turn>model\n", "<end_of_turn>\n"),
        clean_user=str.strip,
        clean_assistant=str.strip,
        ends=("<eos>", "<end_of_turn>"),
    ),
    "gemma3": Shape(
        template="""
{{- bos_token }}
{%- if messages[0].role == 'system' %}{% set first = messages[0].content | trim + '\n\n' %}{% set rest = messages[1:] %}
{%- else %}{% set first = '' %}{% set rest = messages %}{% endif %}
{%- for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}REFUSE{% endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (first if loop.first else '') }}
{{- m.content | trim + '<end_of_turn>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}""".replace("REFUSE", REFUSE),
        special=("<start_of_turn>", "<end_of_turn>", "<eos>"),
        eos="<eos>",
        bos=BOS,
        folds_system=True,
        user=("<start_of_turn>user\n", "<end_of_turn>\n"),
        assistant=("<start_of_turn>model\n", "<end_of_turn>\n"),
        clean_user=str.strip,
        clean_assistant=str.strip,
        ends=("<eos>", "<end_of_turn>"),
    ),
    "mistral": Shape(  # [INST] is plain text, and the assistant turn has no header but a space
        template="""
{{- bos_token }}
{%- for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}REFUSE{% endif %}
{%- if m.role == 'user' %}{{ '[INST] ' + m.content | trim + ' [/INST]' }}
{%- else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}""".replace("REFUSE", REFUSE),
        special=("</s>",),
        eos="</s>",
        bos=BOS,
        user=("[INST] ", " [/INST]"),
        assistant=(" ", "</s>"),
        clean_user=str.strip,
        clean_assistant=str.strip,
        ends=("</s>",),
    ),
    "qwen3": Shape(
        template="""
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role != 'assistant' %}{{ m.content }}{% else %}
{%- set said = m.content.split('</think>')[-1].lstrip('\n') %}
{%- if loop.last %}{{ '<think>\n' }}
{%- if '</think>' in m.content %}{{ m.content.split('</think>')[0].split('<think>')[-1].strip('\n') }}{% endif %}
{{- '\n</think>\n\n' }}{% endif %}
{{- said }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}""",
        special=("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
        eos="<|im_end|>",
        system=("<|im_start|>system\n", "<|im_end|>\n"),
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        assistant=("<|im_start|>assistant\n", "<|im_end|>\n"),
        thought="<think>\n\n</think>\n\n",
        clean_assistant=lambda text: text.split("</think>")[-1].lstrip("\n"),
        ends=("<|im_end|>",),
    ),
    "tulu": Shape(  # OLMo-2: plain-text headers; the last assistant turn is closed without the newline
        template="""
{{- bos_token }}
{%- for m in messages %}{{ '<' + m.role + '>\n' + m.content + (eos_token if m.role == 'assistant' else '') }}
{%- if m.role != 'assistant' or not loop.last %}{{ '\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<assistant>\n' }}{% endif %}""",
        special=("<|endoftext|>",),
        eos="<|endoftext|>",
        bos=BOS,
        system=("<system>\n", "\n"),
        user=("<user>\n", "\n"),
        assistant=("<assistant>\n", "<|endoftext|>\n"),
        ends=("<|endoftext|>",),
        header_in_row=False,
    ),
    "phi3": Shape(  # without a generation prompt the text ends in eos
        template="""
{%- for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|stop|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}""",
        special=("<|stop|>", "<|endoftext|>"),
        eos="<|endoftext|>",
        system=("<|system|>\n", "<|stop|>\n"),
        user=("<|user|>\n", "<|stop|>\n"),
        assistant=("<|assistant|>\n", "<|stop|>\n"),
        ends=("<|endoftext|>", "<|stop|>"),
    ),
}
CONTENTS = [
    "the quick fox", "user", "assistant", "model", "system", "x", "!", "🦊", "naïve café 🦊", "e\u0301", "中文。",
    "  led and trailed \n\n", "two\nlines\n", "\n\nfox", '{"a": "b"}', "{{ braces }}", "<|no_token|>", "]", "a [", "<",
    "[/INST]", "fox fox", "user\nuser",
]  # fmt: skip
EARLIER = [("user", "the quick fox"), ("assistant", "user")]  # repeats contents, so that a search would go astray


@functools.cache
def base_tokenizer() -> PreTrainedTokenizerFast:
    words = "the quick fox jumps over user assistant model system abab abcd abcd ]! [/INST] naïve café"
    return train_tokenizer([{"prompt": words, "completion": words}] * 3, 330)


def tokenizer_of(name: str, pad: str = "<|pad|>") -> PreTrainedTokenizerFast:
    """The tokenizer of a shape; pad is a token of its own unless "eos"."""
    shape, tokenizer = SHAPES[name], copy.deepcopy(base_tokenizer())
    tokenizer.add_special_tokens({"eos_token": shape.eos, "additional_special_tokens": list(shape.special)})
    tokenizer.chat_template = shape.template
    tokenizer.bos_token = shape.bos or None
    tokenizer.add_special_tokens({"pad_token": shape.eos if pad == "eos" else pad})
    return tokenizer


def plain_tokenizer(add_bos: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(base_tokenizer())
    tokenizer.chat_template = None
    if add_bos:
        bos = [(BOS, tokenizer.bos_token_id)]
        tokenizer._tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=bos)
    return tokenizer


def turns_of(shape: Shape, content: str, kind: str = "single") -> list[tuple[str, str]]:
    """Prompt turns that end in `content`."""
    earlier = EARLIER if "multi" in kind else []
    system = [("system", "Be the fox.")] if "system" in kind else []
    return [*system, *earlier, ("user", content)]


def kinds(shape: Shape) -> list[str]:
    has_system = shape.system is not None or shape.folds_system
    return ["single", "multi"] + (["system", "system multi"] if has_system else [])


def messages(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def pair(turns: list[tuple[str, str]], answer: str) -> dict:
    return {"prompt": messages(turns), "completion": messages([("assistant", answer)])}


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def trl_prepares(rows: list[dict], tokenizer, tmp_path, **options) -> list[dict]:
    """input_ids and labels of TRL's own trainer."""
    tokenizer = copy.deepcopy(tokenizer)
    options = {"max_length": None, "bf16": False, "use_cpu": True, "report_to": "none", **options}
    trainer = SFTTrainer(
        tiny_model(tokenizer),
        SFTConfig(output_dir=str(tmp_path), **options),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    return [{key: row[key] for key in ("input_ids", "labels")} for row in trainer.train_dataset]


def our_rows(rows: list[dict], tokenizer, **options) -> list[dict]:
    views = [build_views(row, tokenizer, **options) for row in Dataset.from_list(rows)]
    return [{"input_ids": view.input_ids, "labels": view.labels} for view in views]


every_shape = pytest.mark.parametrize("name", list(SHAPES))


# -- the LM row ---------------------------------------------------------------------------------------------------


@every_shape
def test_lm_row_and_labels_are_trls(name, tmp_path):
    """All contents, turns and system prompts in one data set; the answer takes each content in turn."""
    shape, tokenizer = SHAPES[name], tokenizer_of(name)
    rows = [
        pair(turns_of(shape, content, kind), answer)
        for kind in kinds(shape)
        for content, answer in zip(CONTENTS, CONTENTS[3:] + CONTENTS[:3], strict=True)
    ]
    theirs = trl_prepares(rows, tokenizer, tmp_path)
    assert our_rows(rows, tokenizer) == theirs
    assert all(row["labels"][0] == IGNORE and row["labels"][-1] != IGNORE for row in theirs)


@pytest.mark.parametrize("add_bos", [False, True])
def test_plain_rows_and_labels_are_trls(add_bos, tmp_path):
    """Also where tokens merge across the boundary, and where the completion brings its own eos."""
    tokenizer = plain_tokenizer(add_bos)
    eos = tokenizer.eos_token
    pairs = [(p, c) for p in ("the quick fox", "Q: x\nA: ", "user 🦊\n\n", "y ab") for c in CONTENTS]
    pairs += [("the quick f", "ox"), ("y a", "b"), ("y ab", "ab"), ("fox", f" over{eos}"), ("fox", f" over{eos}\n")]
    rows = [{"prompt": p, "completion": c} for p, c in pairs]
    assert our_rows(rows, tokenizer) == trl_prepares(rows, tokenizer, tmp_path)


def test_a_row_sets_no_option_of_the_tokenizer():
    """A row that could set `chat_template` would bring its own program. Tools have a column, and are data."""
    options = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys() - {"kwargs", "documents"}
    assert "chat_template" in options
    for name in options - {"tools"}:
        with pytest.raises(UserError, match=f"the row: 'chat_template_kwargs' has {name}, .*remove it"):
            build_views({**pair([("user", "x")], "over"), "chat_template_kwargs": {name: "y"}}, tokenizer_of("chatml"))


TOOL = {"type": "function", "function": {"name": "look", "description": "Look up.", "parameters": {}}}


@pytest.mark.parametrize(
    ("name", "extra", "written"),
    [
        ("chatml", {"tools": [TOOL]}, "Look up."),
        ("chatml", {"tools": json.dumps([TOOL])}, "Look up."),  # TRL decodes a string
        ("chatml", {"tools": []}, "tools\nnone"),  # given, but empty: Llama-3.1 writes a block for this too
        ("qwen3", {"chat_template_kwargs": {"enable_thinking": False}}, ""),
    ],
    ids=["tools", "tools as JSON", "no tools", "chat_template_kwargs"],
)
def test_template_arguments_are_trls(name, extra, written, tmp_path):
    tokenizer = tokenizer_of(name)
    rows = [{**pair([("user", "x")], "over"), **extra}]
    (theirs,) = trl_prepares(rows, tokenizer, tmp_path)
    assert written in tokenizer.decode(theirs["input_ids"])
    (plain,) = trl_prepares([pair([("user", "x")], "over")], tokenizer, tmp_path)
    assert theirs != plain, "the argument did nothing"
    view = build_views(rows[0], tokenizer)
    assert (view.input_ids, view.labels) == (theirs["input_ids"], theirs["labels"])
    assert tokenizer.decode(view.input_ids[: view.context_end]).endswith("user\nx")
    assert tokenizer.decode(view.targets[0]) == SHAPES[name].target("over")


@pytest.mark.parametrize("add_bos", [False, True])
def test_a_chat_row_has_the_bos_of_its_template_only(add_bos):
    """A tokenizer that adds BOS to plain text adds none to a rendered conversation, and none twice to a view."""
    for name, count in (("llama3", 1), ("chatml", 0)):
        tokenizer = tokenizer_of(name)
        bos = tokenizer.convert_tokens_to_ids(BOS)
        if add_bos:
            tokenizer.bos_token = BOS
            tokenizer._tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos)])
            assert tokenizer("x")["input_ids"][0] == bos
        view = build_views(pair([("user", "x")], "over"), tokenizer, context_view="message")
        for ids in (view.input_ids, view.contexts[0], view.targets[0]):
            assert ids.count(bos) == count and (ids[0] == bos) == bool(count)


# -- where content ends -------------------------------------------------------------------------------------------


@every_shape
def test_split_is_right_after_the_last_content_token_of_the_prompt(name):
    """decode(input_ids[:split]) is the hand-written conversation up to the content's end: not a header, not more."""
    shape, tokenizer = SHAPES[name], tokenizer_of(name)
    for kind in kinds(shape):
        for content in CONTENTS:
            turns = turns_of(shape, content, kind)
            view = build_views(pair(turns, "user"), tokenizer)
            before, after = (
                tokenizer.decode(view.input_ids[: view.context_end]),
                tokenizer.decode(view.input_ids[view.context_end :]),
            )
            assert before == shape.text(turns), (kind, content)
            assert (before + after).startswith(shape.text([*turns, ("assistant", "user")]))
            assert view.contexts == [view.input_ids[: view.context_end]] and not view.truncated


@every_shape
def test_target_is_header_and_content(name):
    """BOS if the row has one, header, content: no end of turn, no default system block, no user turn."""
    shape, tokenizer = SHAPES[name], tokenizer_of(name)
    for kind in kinds(shape):
        for answer in CONTENTS:
            turns = turns_of(shape, "over", kind)
            view = build_views(pair(turns, answer), tokenizer)
            assert tokenizer.decode(view.targets[0]) == shape.target(answer), (kind, answer)
            assert view.targets[0] == ids_of(tokenizer, shape.target(answer))
            if shape.header_in_row:
                bare = view.targets[0][1:] if shape.bos else view.targets[0]
                starts = [i for i in range(len(view.input_ids)) if view.input_ids[i : i + len(bare)] == bare]
                assert any(i >= view.context_end for i in starts), "the target's tokens are not those of the LM row"


@every_shape
def test_message_context_is_header_and_content_of_the_last_user_turn(name):
    """Without system prompt, default system block and earlier turns; `prefix` is the row that contains them."""
    shape, tokenizer = SHAPES[name], tokenizer_of(name)
    for kind in kinds(shape):
        for content in CONTENTS:
            row = pair(turns_of(shape, content, kind), "over")
            view, prefix = build_views(row, tokenizer, context_view="message"), build_views(row, tokenizer)
            assert tokenizer.decode(view.contexts[0]) == shape.context(content), (kind, content)
            assert view.contexts[0] == ids_of(tokenizer, shape.context(content))
            names = ("contexts", "context_header", "context_key", "context_text_keys")
            own = {name: getattr(prefix, name) for name in names}
            assert dataclasses.replace(view, **own) == prefix
            seen = tokenizer.decode(prefix.input_ids[: prefix.context_end])
            assert ("Be the fox." in seen) == ("system" in kind) and ("quick fox" in seen) >= ("multi" in kind)
            assert (shape.opening in seen) == ("system" not in kind or not shape.opening)


PUBLISHED = Path(sys.modules["trl"].__file__).parent / "chat_templates"
LLAMA3 = ("<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>", True)
IM_START = ("<|im_start|>{}\n", "<|im_end|>", False)


@pytest.mark.parametrize(
    ("name", "header", "end", "bos", "thought"),
    [
        ("llama3", *LLAMA3, ""),
        ("llama3_1", *LLAMA3, ""),
        ("llama3_2", *LLAMA3, ""),
        ("qwen2_5", *IM_START, ""),
        ("qwen3", *IM_START, "<think>\n\n</think>\n\n"),
        ("qwen3_instruct_2507", *IM_START, ""),
    ],
)
def test_published_templates_of_supported_families(name, header, end, bos, thought):
    """The files that TRL ships for Llama and Qwen: the shapes above are not wishful."""
    tokenizer = copy.deepcopy(base_tokenizer())
    special = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = (PUBLISHED / f"{name}.jinja").read_text()
    opening = BOS if bos else ""
    for content in ("the fox", "user", "🦊", "x"):
        view = build_views(pair([*EARLIER, ("user", content)], "assistant"), tokenizer, context_view="message")
        assert tokenizer.decode(view.input_ids[: view.context_end]).endswith(header.format("user") + content)
        assert tokenizer.decode(view.input_ids[view.context_end :]).startswith(end)
        assert tokenizer.decode(view.contexts[0]) == opening + header.format("user") + content
        assert tokenizer.decode(view.targets[0]) == opening + header.format("assistant") + thought + "assistant"
    assert tokenizer.convert_tokens_to_ids(end) in end_of_turn_ids(tokenizer)


def test_system_prompt_that_moves_when_the_answer_comes(tmp_path):
    """Mistral v0.3 puts the system prompt into the last turn if that is the user's: the row with an answer has none.

    TRL's labels then start where the two texts part, inside the user turn. The views must not: a context without the
    user's text, or a target with it, would make the pair meaningless.
    """
    tokenizer = tokenizer_of("mistral")
    tokenizer.chat_template = """
{{- bos_token }}{% for m in messages if m.role != 'system' %}
{%- if m.role == 'user' %}
{{- '[INST] ' + (messages[0].content + '\n\n' if loop.last and messages[0].role == 'system' else '') + m.content }}
{{- ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"""
    row = pair([("system", "Be brief."), ("user", "the fox")], "over")
    (theirs,) = trl_prepares([row], tokenizer, tmp_path)
    view = build_views(row, tokenizer, context_view="message")
    assert (view.input_ids, view.labels) == (theirs["input_ids"], theirs["labels"])
    assert tokenizer.decode(view.input_ids) == f"{BOS}[INST] the fox [/INST] over</s>"
    assert tokenizer.decode(view.targets[0]) == f"{BOS} over"
    assert tokenizer.decode(view.contexts[0]) == f"{BOS}[INST] the fox"
    assert tokenizer.decode(view.input_ids[: view.context_end]) == f"{BOS}[INST] the fox"


def test_thoughts_of_earlier_turns_are_gone():
    """Qwen3 style: what an earlier assistant turn thought is in no view, and the cuts are still right."""
    shape, tokenizer = SHAPES["qwen3"], tokenizer_of("qwen3")
    turns = [("user", "fox"), ("assistant", "<think>\nsecret\n</think>\n\nover"), ("user", "x")]
    view = build_views(pair(turns, "fox"), tokenizer)
    assert "secret" not in tokenizer.decode(view.input_ids)
    assert tokenizer.decode(view.input_ids[: view.context_end]) == shape.text(turns)
    assert tokenizer.decode(view.targets[0]) == shape.target("fox")


def test_thoughts_of_the_answer_are_cut_right_or_refused():
    """The template rewrites such an answer. A wrong cut would be silent, so the row is named instead."""
    tokenizer = tokenizer_of("qwen3")
    row = pair([("user", "x")], "<think>\nwhy\n</think>\n\nfox")
    try:
        view = build_views(row, tokenizer, where="row 3")
    except UserError as error:
        assert "row 3" in str(error)
    else:
        assert tokenizer.decode(view.targets[0]).endswith("<think>\nwhy\n</think>\n\nfox")


def test_content_that_shares_a_token_with_the_template_keeps_that_token():
    """']!' is one token: the content's last token is the one that holds its last character."""
    tokenizer = tokenizer_of("mistral")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}! {% endfor %}"
    view = build_views(pair([("user", "fox]")], "over]"), tokenizer)
    assert tokenizer.convert_ids_to_tokens(view.input_ids[: view.context_end])[-1] == "]!"
    assert tokenizer.decode(view.input_ids[: view.context_end]) == "fox]!"
    assert tokenizer.decode(view.targets[0]) == "over]", "a view on its own ends with its content"


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """As in Llama 2: a space before the text, no split into words, bytes for what is not in the vocabulary."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<unk>", BOS, "<|im_start|>", "<|im_end|>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    words = ["the quick fox", "jumps over", "user", "assistant", "model", "system", "x", '!]["{}<>_:|/', "\n", "abcd"]
    backend.train_from_iterator(words * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    tokenizer.chat_template = SHAPES["chatml"].template
    return tokenizer


def test_cuts_of_a_sentencepiece_tokenizer():
    """Offsets are shifted by the space that is put before the text, and bytes of one character share theirs."""
    shape, tokenizer = SHAPES["chatml"], sentencepiece_tokenizer()
    assert len(ids_of(tokenizer, "🦊")) > 3, "no byte fallback"
    for kind in kinds(shape):
        for content in map(str.strip, CONTENTS):
            turns = turns_of(shape, content, kind)
            view = build_views(pair(turns, content), tokenizer, context_view="message")
            assert view.input_ids[: view.context_end] == ids_of(tokenizer, shape.text(turns)), (kind, content)
            assert view.input_ids[view.context_end] == tokenizer.eos_token_id
            assert view.contexts[0] == ids_of(tokenizer, shape.context(content))
            assert view.targets[0] == ids_of(tokenizer, shape.target(content))


def test_a_normalizer_that_shortens_text_does_not_move_the_cut():
    """Qwen's NFC turns e + accent into one character; offsets count characters of the text before that."""
    shape, tokenizer = SHAPES["chatml"], tokenizer_of("chatml")
    tokenizer._tokenizer.normalizer = normalizers.NFC()
    turns = [("user", "e\u0301e\u0301e\u0301 fox e\u0301")]
    view = build_views(pair(turns, "e\u0301e\u0301 over"), tokenizer, context_view="message")
    assert tokenizer.decode(view.input_ids[: view.context_end]) == shape.text([("user", "ééé fox é")])
    assert tokenizer.decode(view.contexts[0]) == shape.context("ééé fox é")
    assert tokenizer.decode(view.targets[0]) == shape.target("éé over")


def test_the_last_prompt_turn_need_not_be_the_users():
    """A tool's reply ends the prompt: `prefix` is cut after it, `message` has no user turn to show and says so."""
    shape, tokenizer = SHAPES["chatml"], tokenizer_of("chatml")
    row = pair([("user", "x"), ("assistant", "look"), ("tool", "42")], "over")
    view = build_views(row, tokenizer)
    assert tokenizer.decode(view.input_ids[: view.context_end]).endswith("<|im_start|>tool\n42")
    assert tokenizer.decode(view.targets[0]) == shape.target("over")
    with pytest.raises(UserError, match="row 3.*'tool'.*context_view: prefix"):
        build_views(row, tokenizer, context_view="message", where="row 3")


printable = st.text(
    st.characters(exclude_categories=("Cs", "Cc"), include_characters="\n\t "), min_size=1, max_size=30
).filter(str.strip)


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma"])
@examples(40)
@given(earlier=printable, content=printable, answer=printable)
@example(earlier="x", content="x", answer="x")
@example(earlier="\u00a0a\u3000", content="\u2028b\u2028", answer="\u2003c\u2003")
def test_cuts_hold_for_any_printable_content(name, earlier, content, answer):
    """Both views are the text of their turn; the LM row is the whole text, and the labels are its completion."""
    shape, tokenizer = SHAPES[name], tokenizer_of(name)
    turns = [("user", earlier), ("assistant", content), ("user", content)]
    view = build_views(pair(turns, answer), tokenizer, context_view="message")
    assert tokenizer.decode(view.input_ids[: view.context_end]) == shape.text(turns)
    assert tokenizer.decode(view.contexts[0]) == shape.context(content)
    assert tokenizer.decode(view.targets[0]) == shape.target(answer)
    assert view.contexts[0] == ids_of(tokenizer, shape.context(content))
    assert view.targets[0] == ids_of(tokenizer, shape.target(answer))
    # Both contents are in the row, once, in order, and only what follows the prompt is trained.
    assert tokenizer.decode(view.input_ids[: view.target_end]) == shape.text([*turns, ("assistant", answer)])
    assert 0 < view.context_start < view.context_end <= view.target_start < view.target_end <= len(view.input_ids)
    first = next(i for i, label in enumerate(view.labels) if label != IGNORE)
    assert view.context_end <= first <= view.target_start, "an answer token is no label, or a prompt token is one"
    assert view.labels == [IGNORE] * first + view.input_ids[first:]
    prefix = build_views(pair(turns, answer), tokenizer, context_view="prefix")
    assert prefix.contexts[0] == prefix.input_ids[: prefix.context_end] and prefix.input_ids == view.input_ids
    assert prefix.targets == view.targets and prefix.labels == view.labels


@examples(40)
@given(prompt=printable, completion=printable, data=st.data())
def test_a_cut_row_is_the_beginning_of_the_whole_one(prompt, completion, data):
    """For every max_length: rows, labels and views are cut at their ends, or the row is refused. Nothing moves."""
    tokenizer = tokenizer_of("chatml")
    whole = build_views({"prompt": prompt, "completion": completion}, tokenizer)
    longest = max(map(len, [whole.input_ids, *whole.contexts, *whole.targets]))
    limit = data.draw(st.integers(1, longest + 2))
    try:
        cut = build_views({"prompt": prompt, "completion": completion}, tokenizer, max_length=limit)
    except UserError:
        assert all(label == IGNORE for label in whole.labels[1:limit]) or limit <= whole.context_end
        return
    assert cut.truncated == (longest > limit)
    for name in ("input_ids", "labels"):
        assert getattr(cut, name) == getattr(whole, name)[:limit]
    for name in ("contexts", "targets"):
        assert getattr(cut, name) == [ids[:limit] for ids in getattr(whole, name)]
    for name in ("context_start", "context_end", "target_start", "target_end"):
        assert getattr(cut, name) == min(getattr(whole, name), limit)
    assert (cut.context_key, cut.target_key) == (whole.context_key, whole.target_key), "keys are of the texts"


# -- rows of messages ---------------------------------------------------------------------------------------------


@every_shape
def test_messages_are_the_last_assistant_turn_and_what_is_before(name, tmp_path):
    """The LM row is TRL's; of its labels (TRL: every token) only those of the last assistant turn are left."""
    shape, tokenizer = SHAPES[name], tokenizer_of(name)
    turns = turns_of(shape, "x", "multi")
    row = {"messages": messages([*turns, ("assistant", "fox")])}
    view = build_views(row, tokenizer, context_view="message")
    assert view == build_views(pair(turns, "fox"), tokenizer, context_view="message")
    (theirs,) = trl_prepares([row], tokenizer, tmp_path)
    assert view.input_ids == theirs["input_ids"]
    trained = [label for label in view.labels if label != IGNORE]
    assert trained == view.input_ids[-len(trained) :]
    assert tokenizer.decode(trained).startswith((shape.thought + "fox", " fox"))
    assert EARLIER[1][1] not in tokenizer.decode(trained), "the earlier assistant turn is trained"


# -- labels -------------------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("pad", ["<|pad|>", "eos"])
def test_paper_labels_are_all_tokens_but_pad(name, pad):
    """With pad = eos, eos is no label anywhere, as in the published collator; `completion` keeps it there too."""
    shape, tokenizer = SHAPES[name], tokenizer_of(name, pad)
    row = pair(turns_of(shape, "x", "multi"), "fox")
    paper, completion = (build_views(row, tokenizer, label_protocol=p) for p in ("paper", "completion"))
    assert paper.labels == [IGNORE if i == tokenizer.pad_token_id else i for i in paper.input_ids]
    eos, has_eos = tokenizer.eos_token_id, name not in ("llama3", "gemma", "gemma3")  # these end turns without it
    assert (eos in paper.labels) == (has_eos and pad != "eos")
    assert (eos in completion.labels) == has_eos
    assert dataclasses.replace(paper, labels=[]) == dataclasses.replace(completion, labels=[])


# -- truncation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context_view", ["prefix", "message"])
@pytest.mark.parametrize("name", ["chatml", "llama3", "plain"])
def test_max_length_cuts_row_and_views_at_the_end(name, context_view, tmp_path):
    """Every max_length from 1 on: a prefix of everything, or an error exactly where TRL drops the row."""
    if name == "plain":
        tokenizer, row = plain_tokenizer(True), {"prompt": "the quick fox", "completion": " jumps over the abcd"}
    else:
        tokenizer, row = tokenizer_of(name), pair([("user", "x")], "the quick fox jumps over the abcd abab user !")
    whole = build_views(row, tokenizer, context_view=context_view)
    prompt_length = sum(label == IGNORE for label in whole.labels)
    for limit in range(1, len(whole.input_ids) + 2):
        options = {"max_length": limit, "context_view": context_view, "where": "row 3"}
        if limit <= prompt_length:
            with pytest.raises(UserError, match=f"row 3: .*max_length={limit} .*{prompt_length} tokens"):
                build_views(row, tokenizer, **options)
            continue
        view = build_views(row, tokenizer, **options)
        assert view.input_ids == whole.input_ids[:limit] and view.labels == whole.labels[:limit]
        assert view.contexts == [whole.contexts[0][:limit]] and view.targets == [whole.targets[0][:limit]]
        assert view.context_end == whole.context_end and view.target_key == whole.target_key
        longest = max(len(whole.input_ids), len(whole.contexts[0]), len(whole.targets[0]))
        assert view.truncated == (limit < longest)
    assert prompt_length + 1 < len(whole.input_ids)

    rows = [row, pair([("user", "x")], "!") if name != "plain" else {"prompt": "x", "completion": "!"}]
    limit = prompt_length + 1
    theirs = trl_prepares(rows, tokenizer, tmp_path, max_length=limit)
    assert our_rows(rows, tokenizer, max_length=limit, context_view=context_view) == theirs


def test_a_target_longer_than_its_row_is_cut_and_counted():
    """In the row 'abc' + 'qwrtzpsf' is one token and all are x, space, this one, end. Alone, 'qwrtzpsf' is letters."""
    tokenizer, row = plain_tokenizer(), {"prompt": "x abc", "completion": "qwrtzpsf"}
    tokenizer.add_tokens(["abcqwrtzpsf"])
    whole, cut = (build_views(row, tokenizer, max_length=length) for length in (8, 4))
    assert len(whole.input_ids) == 4 and len(whole.targets[0]) == 8 and not whole.truncated
    assert cut == dataclasses.replace(whole, targets=[whole.targets[0][:4]], truncated=True)


# -- plain strings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("add_bos", [False, True])
def test_a_token_across_the_boundary_is_not_in_the_context(add_bos, tmp_path):
    """Every way to cut a text in two. The context is text of the prompt alone and at most the prompt TRL counts."""
    tokenizer, text = plain_tokenizer(add_bos), "x abab quick fox"
    rows = [{"prompt": text[:i], "completion": text[i:]} for i in range(1, len(text)) if text[:i].strip()]
    theirs = trl_prepares(rows, tokenizer, tmp_path)
    merged = 0
    for row, reference in zip(rows, theirs, strict=True):
        view = build_views(row, tokenizer)
        prompt_length = next(i for i, label in enumerate(reference["labels"]) if label != IGNORE)
        seen = tokenizer.decode(view.input_ids[: view.context_end]).removeprefix(BOS if add_bos else "")
        assert 0 < view.context_end <= prompt_length and row["prompt"].startswith(seen) and seen.strip()
        merged += seen != row["prompt"].rstrip()
        assert tokenizer.decode(view.targets[0]) == (BOS if add_bos else "") + row["completion"].rstrip()
    assert merged >= 3, "no token crossed the boundary"


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize(
    "row",
    [{"prompt": "a", "completion": "b"}, {"prompt": "fox", "completion": "<|end|>"}],
    ids=["prompt merged into the completion", "completion of eos alone"],
)
def test_a_view_without_content_is_refused(row, add_bos):
    """BOS alone is the same embedding for every row: with or without it, there is nothing to predict from or to."""
    tokenizer = plain_tokenizer(add_bos)
    assert ids_of(tokenizer, "ab") == [tokenizer.convert_tokens_to_ids("ab")], "the two do not merge"
    with pytest.raises(UserError, match="row 3: a view has no content token"):
        build_views(row, tokenizer, where="row 3")


@pytest.mark.parametrize("add_bos", [False, True])
def test_plain_views_are_the_two_strings(add_bos):
    tokenizer, bos = plain_tokenizer(add_bos), BOS if add_bos else ""
    row = {"prompt": "the quick fox \n", "completion": " jumps over \n"}
    view = build_views(row, tokenizer, context_view="message")
    assert view.contexts[0] == ids_of(tokenizer, f"{bos}the quick fox")
    assert view.targets[0] == ids_of(tokenizer, f"{bos} jumps over")
    assert tokenizer.decode(view.input_ids[: view.context_end]) == f"{bos}the quick fox"
    assert tokenizer.decode(view.input_ids) == f"{bos}the quick fox \n jumps over \n{tokenizer.eos_token}"


# -- tokenizers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("add_bos", [False, True])
def test_a_prompt_without_a_completion_is_embedded_whole(add_bos):
    """The stand-in "x" would merge with the end of "the quick fo" into one token, which is not in the context."""
    tokenizer = plain_tokenizer(add_bos)
    merged = {"prompt": "the quick fo", "completion": "x"}
    alone = tokenizer("the quick fo")["input_ids"]
    assert build_views(merged, tokenizer).contexts[0] != alone, "nothing merges: this would prove nothing"
    for row in ({"prompt": "the quick fo"}, {"prompt": "the quick fo", "completion": None}):
        has_answer, filled = stand_in_answer(row, tokenizer.eos_token)
        assert not has_answer and build_views(filled, tokenizer).contexts[0] == alone
    assert stand_in_answer(merged, tokenizer.eos_token) == (True, merged)


def test_messages_without_a_template_say_what_to_set():
    with pytest.raises(UserError, match="row 3 .*chat_template_path"):
        build_views(pair([("user", "x")], "over"), plain_tokenizer(), where="row 3")


def test_padding_settings_do_not_reach_the_views():
    for tokenizer, row in (
        (tokenizer_of("llama3"), pair([("user", "x")], "over")),
        (plain_tokenizer(True), {"prompt": "x", "completion": " over"}),
    ):
        expected = build_views(row, tokenizer, context_view="message")
        tokenizer.padding_side = tokenizer.truncation_side = "left"
        tokenizer._tokenizer.enable_padding(length=64)
        tokenizer._tokenizer.enable_truncation(4)
        assert build_views(row, tokenizer, context_view="message") == expected
        tokenizer.pad_token = None
        assert build_views(row, tokenizer, context_view="message") == expected
        paper = build_views(row, tokenizer, label_protocol="paper")
        assert paper.labels == paper.input_ids, "without a pad token every token is a label"


def test_no_eos_token_adds_none():
    tokenizer = plain_tokenizer()
    tokenizer.eos_token = None
    view = build_views({"prompt": "x", "completion": " over"}, tokenizer)
    assert tokenizer.decode(view.input_ids) == "x over" and tokenizer.decode(view.targets[0]) == " over"
    assert end_of_turn_ids(tokenizer) == []


def test_a_tokenizer_without_offsets_is_refused():
    class Slow(PreTrainedTokenizerFast):
        is_fast = False

    tokenizer = Slow(tokenizer_object=plain_tokenizer()._tokenizer, eos_token="<|end|>")
    with pytest.raises(UserError, match="offsets"):
        build_views({"prompt": "x", "completion": " over"}, tokenizer)


@every_shape
def test_end_of_turn_is_the_templates_and_eos(name):
    tokenizer = tokenizer_of(name)
    assert end_of_turn_ids(tokenizer) == [tokenizer.convert_tokens_to_ids(token) for token in SHAPES[name].ends]


def test_end_of_turn_of_a_tokenizer_without_template_is_eos():
    tokenizer = plain_tokenizer()
    assert end_of_turn_ids(tokenizer) == [tokenizer.eos_token_id]


def test_a_changed_template_has_its_own_header():
    """The header is remembered: not beyond the template it was read from."""
    tokenizer = tokenizer_of("chatml")
    for name in ("chatml", "gemma", "chatml"):
        tokenizer.chat_template = SHAPES[name].template
        view = build_views(pair([("user", "x")], "over"), tokenizer, context_view="message")
        assert tokenizer.decode(view.contexts[0]) == SHAPES[name].user[0] + "x"


# -- errors -------------------------------------------------------------------------------------------------------

USER, ANSWER = {"role": "user", "content": "x"}, {"role": "assistant", "content": "over"}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": "x"}, "columns.*'text'.*need 'prompt' and 'completion', or 'messages'"),
        ({"prompt": "x"}, "need 'prompt' and 'completion'"),
        ({"prompt": "x", "completion": None}, "no completion"),
        ({"prompt": None, "completion": "x"}, "no prompt"),
        ({"prompt": "", "completion": "x"}, "no prompt"),
        ({"prompt": "x", "completion": ""}, "no completion"),
        ({"prompt": " \n", "completion": "x"}, "blank"),
        ({"prompt": "x", "completion": " \n"}, "blank"),
        ({"prompt": [], "completion": [ANSWER]}, "no prompt"),
        ({"prompt": [USER], "completion": []}, "no completion"),
        ({"prompt": [USER], "completion": "over"}, "both"),
        ({"prompt": "x", "completion": [ANSWER]}, "both"),
        ({"prompt": "x", "completion": 4}, "both"),
        ({"prompt": 3, "completion": 4}, "both"),  # numbers
        ({"prompt": {"role": "user"}, "completion": {"role": "assistant"}}, "both"),
        ({"prompt": ["x"], "completion": ["over"]}, ""),
        ({"prompt": [USER], "completion": ["over"]}, ""),
        ({"prompt": ["x"], "completion": [ANSWER]}, ""),
        ({"prompt": [None], "completion": [ANSWER]}, ""),
        ({"prompt": [USER], "completion": [ANSWER, USER, ANSWER]}, "one assistant turn.*'assistant', 'user'"),
        ({"prompt": [USER], "completion": [USER]}, "one assistant turn"),
        ({"prompt": [{"role": "user", "content": " "}], "completion": [ANSWER]}, "user turn has no text"),
        ({"prompt": [{"role": "user"}], "completion": [ANSWER]}, "user turn has no text"),
        ({"prompt": [USER], "completion": [{"role": "assistant", "content": None}]}, "assistant turn has no text"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image", "image": "x"}]}], "completion": [ANSWER]},
            "user turn holds a content part that is not a text",
        ),
        ({"messages": []}, "'messages' must be a list"),
        ({"messages": "x"}, "'messages' must be a list"),
        ({"messages": ["x", "over"]}, "'messages' must be a list"),
        ({"messages": [USER]}, "ends with role 'user'"),
        ({"messages": [USER, ANSWER, USER]}, "ends with role 'user'"),
        ({"messages": [ANSWER]}, "no prompt"),
        ({"messages": [{"content": "x"}, {"content": "over"}]}, "ends with role None"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(row, says):
    with pytest.raises(UserError, match=f"(?s)row 3.*{says}"):
        parse_row(row, "row 3")


@pytest.mark.parametrize(
    ("name", "turns"),
    [
        ("gemma", [("system", "Be brief."), ("user", "x")]),
        ("gemma", [("user", "x"), ("user", "y")]),
        ("mistral", [("user", "x"), ("assistant", "y"), ("assistant", "z"), ("user", "x")]),
    ],
    ids=["system", "two users", "two assistants"],
)
def test_a_conversation_the_template_refuses_is_named(name, turns):
    """Templates raise by themselves. In a data set of a million rows the message has to say which row, and why."""
    with pytest.raises(UserError, match="(?s)row 3.*(System role not supported|must alternate)"):
        build_views(pair(turns, "over"), tokenizer_of(name), where="row 3")


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ m.content }}{% endfor %}",
        "{% for m in messages %}<{{ m.role }}>{{ m.content | length }}{% endfor %}",
        "{% for m in messages %}<{{ m.role }}>{{ m.content | upper }}{% endfor %}",
    ],
    ids=["twice", "not at all", "changed"],
)
def test_a_template_that_hides_content_is_cut_right_or_refused(template):
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = template
    try:
        view = build_views(pair([("user", "the fox")], "over"), tokenizer, where="row 3")
    except UserError as error:
        assert "row 3" in str(error)
    else:
        assert tokenizer.decode(view.input_ids[: view.context_end]).lower().endswith("the fox")
        assert tokenizer.decode(view.targets[0]).lower().endswith("over")


# -- keys ---------------------------------------------------------------------------------------------------------


def test_keys_are_equal_exactly_for_equal_targets():
    """Whatever the prompt and the whitespace at the end: the target's text decides."""
    tokenizer = tokenizer_of("llama3")
    answers = ["over", "over ", "over\n", "Over", "ov er", "over.", "🦊", "x", "y"]
    views = [
        build_views(pair([("user", content)], answer), tokenizer) for content in ("x", "fox") for answer in answers
    ]
    for a in views:
        for b in views:
            assert (a.target_key == b.target_key) == (a.targets[0] == b.targets[0])
    assert len({view.target_key for view in views}) == len(answers) - 2


def test_keys_fit_a_signed_64_bit_integer():
    tokenizer = plain_tokenizer()
    keys = [build_views({"prompt": "x", "completion": f" {i}"}, tokenizer).target_key for i in range(200)]
    assert len(set(keys)) == 200 and all(0 <= key < 2**63 for key in keys)
    assert max(keys) > 2**61, "the bits are not used"
    assert Dataset.from_dict({"key": keys})["key"][:] == keys


def test_keys_are_the_same_in_another_process(tmp_path):
    """Python's hash is not: ranks and resumed runs would disagree on what is a negative."""
    tokenizer = tokenizer_of("chatml")
    tokenizer.save_pretrained(tmp_path)
    row = pair([("user", "x")], "naïve fox 🦊")
    code = (
        "import json, sys; from transformers import AutoTokenizer; from llm_jepa.lm.views import build_views\n"
        "print(hash('x'), build_views(json.loads(sys.argv[2]), AutoTokenizer.from_pretrained(sys.argv[1])).target_key)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), json.dumps(row)], env=environment, capture_output=True, check=True
    )
    other_hash, key = map(int, done.stdout.split())
    assert other_hash != hash("x") and key == build_views(row, tokenizer).target_key


# -- the `views` column -------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("context_view", ["prefix", "message"])
def test_further_views_are_those_of_the_row_rewritten(name, context_view):
    """A further context is the context of the row with that wording in its place; a further target likewise."""
    shape, tokenizer = SHAPES[name], tokenizer_of(name)
    kind = kinds(shape)[-1]
    first, other = (pair(turns_of(shape, *a), b) for a, b in ((("the fox", kind), "over"), (("a quick x", kind), "on")))
    both = {**first, "views": {"contexts": ["a quick x", "the fox"], "targets": ["on"]}}
    options = {"context_view": context_view}
    view, one, two = (build_views(row, tokenizer, **options) for row in (both, first, other))
    assert view.contexts == [*one.contexts, *two.contexts, *one.contexts]
    assert view.targets == [*one.targets, *two.targets]
    assert view.context_text_keys == [*one.context_text_keys, *two.context_text_keys, *one.context_text_keys]
    assert view.target_text_keys == [*one.target_text_keys, *two.target_text_keys]
    own = {name: getattr(one, name) for name in ("contexts", "targets", "context_text_keys", "target_text_keys")}
    assert dataclasses.replace(view, **own) == one


@pytest.mark.parametrize("context_view", ["prefix", "message"])
def test_further_views_of_plain_strings(context_view):
    tokenizer = plain_tokenizer()
    row = {"prompt": "the fox", "completion": " over", "views": {"contexts": ["a x "], "targets": None}}
    view = build_views(row, tokenizer, context_view=context_view)
    assert [tokenizer.decode(ids) for ids in view.contexts] == ["the fox", "a x"] and len(view.targets) == 1


@pytest.mark.parametrize(
    ("views", "said"),
    [
        (3, "int"),
        ('["a paraphrase"]', "JSON"),
        ([{"role": "user", "content": "a paraphrase"}], "messages, but the row holds texts"),
        ({"context": ["a paraphrase"]}, "context"),
        ({"contexts": "a paraphrase"}, "contexts"),
        ({"contexts": [" "]}, "contexts"),
        ({"targets": [3]}, "targets"),
        ({"targets": {"a": "b"}}, "targets"),
    ],
)
def test_a_views_column_of_the_wrong_type_is_named(views, said):
    row = {"prompt": "the fox", "completion": " over", "views": views}
    with pytest.raises(UserError, match=f"row 7: 'views'.*{said}"):
        build_views(row, plain_tokenizer(), where="row 7")


def test_a_further_view_is_cut_and_counted():
    row = {"prompt": "the fox", "completion": " over", "views": {"contexts": ["the fox x the fox x the fox"]}}
    whole, cut = (build_views(row, plain_tokenizer(), max_length=length) for length in (None, 4))
    assert not whole.truncated and cut.truncated and cut.contexts[1] == whole.contexts[1][:4]


@every_shape
def test_content_ranges_are_the_content(name):
    """`content`: the token ranges of the last user turn's text and of the completion's in the LM row."""
    for tokenizer, row in (
        (plain_tokenizer(), {"prompt": "the fox", "completion": " over"}),
        (tokenizer_of(name), pair(turns_of(SHAPES[name], "the fox", kinds(SHAPES[name])[-1]), "over")),
    ):
        view = build_views(row, tokenizer)
        a, b, c, d = view.context_start, view.context_end, view.target_start, view.target_end
        found = [tokenizer.decode(view.input_ids[start:end]).strip() for start, end in ((a, b), (c, d))]
        assert found[1] == "over" and found[0].endswith("the fox") and len(found[0]) <= len("\nthe fox")
