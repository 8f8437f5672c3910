"""Claim: chat templates are rendered as transformers renders them, and none costs more than its budget.

`core.sandbox` copies the environment of transformers. If these tests fail after an update of transformers, bring
`sandbox.environment` up to date.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import trl
from jinja2.exceptions import SecurityError, UndefinedError
from markupsafe import Markup
from transformers.utils import chat_template_utils

from llm_jepa.core import sandbox, templates
from llm_jepa.core.errors import UserError
from llm_jepa.core.sandbox import OverBudget, compile_template
from llm_jepa.core.template_trial import SAMPLES, try_template
from llm_jepa.core.templates import check_templates
from llm_jepa.lm.prompts import render

PUBLISHED = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
transformers_compile = templates._compile_of_transformers

# What published templates do, and what is charged: each operator, filter, test and call must still give its value.
EXPRESSIONS = [
    "'a' * 3", "3 * 'a'", "[1] * 2", "'a' + 'b'", "[1] + [2]", "2 ** 10", "7 % 4", "'%s-%d' % ('a', 1)", "'%%'",
    "'{}-{x}'.format(1, x=2)", "'{{\"a\": {}}}'.format(1)",
    "'{\"a\": {\"b\": \"%s\"}}' % 1", "'{x}'.format_map({'x': 1})",
    "1 ~ 'a' ~ none ~ [1]", "'abc'[1:]", "[1, 2, 3][::-1]",
    "messages[0]['content'][:4]", "messages[0].content", "messages[0].nothing", "{}.items()|list", "'b' in 'abc'",
    "1 not in [2]", "1 < 2 <= 2", "[1] == [1]", "(1, 2)", "{'a': [1]}", "{(1, 2): 3}[(1, 2)]", "'a,b'.split(',')",
    "'a'.join(['x', 'y'])", "['x', 'y']|join('-')", "messages|map(attribute='role')|join(',')",
    "'aXa'.replace('X', '')",
    "'aXa'|replace('X', 'yy')", "' a '.strip()", "' a '|trim", "'abc'|upper", "'x\ny'|indent(2)", "'ab'|center(6)",
    "'ab'.center(6)", "'a b c'|wordwrap(2)", "[1, 2, 3]|batch(2, 0)|list", "[1, 2, 3]|slice(2)|list",
    "'%s' |format(1)",
    "[3, 1, 2]|sort", "[1, 1, 2]|unique|list", "messages|selectattr('role', 'equalto', 'user')|list|length",
    "messages|rejectattr('role', '==', 'user')|list|length", "[1, 2]|select('>', 1)|list", "messages|groupby('role')",
    "{'b': 1, 'a': 2}|dictsort", "{'b': 1, 'a': [2]}|tojson", "{'b': 1, 'a': '<é>'}|tojson(sort_keys=true)",
    "{'a': [1, {}]}|tojson(indent=2)", "{'a': [1]}|tojson(separators=(',', ':'))", "'é'|tojson(ensure_ascii=true)",
    "none|default('d', true)", "undefined_name", "undefined_name is defined", "'<a>'|e", "'<a>'|safe", "1.5|round",
    "'1'|int + 1", "[1, 2]|sum", "[1, 2]|max", "[[1, 2], [3]]|map('first')|list", "'a'|attr('upper')", "'a'.__class__",
    "''|attr('__class__')", "dict(a=1)", "dict.fromkeys(['a'], 1)", "namespace(a=1).a", "namespace(_a=1)",
    "range(3)|list", "range(100001)", "cycler(1, 2).next()", "joiner('-')()", "lipsum(n=0)", "1 / 0", "'a' + 1",
    "raise_exception('no')", "strftime_now('%%')", "[1].append(2)", "'a'.encode()", "loop", "self",
    "'\t'.expandtabs(4)",
    "'a' is string", "messages is iterable", "messages is mapping", "1 is divisibleby(1)", "'ß'.casefold()",
    "1 if true",
    "'a'.zfill(3)", "'a'.translate({97: 'b'})", "(1).bit_length()", "'abc'|list", "'abc'|reverse", "[1, 2]|last",
    "1 is eq 1", "2 is in [1, 2]", "2 is gt 1", "{'a': {'b': 1}}.a.b", "{'items': 1}.items", "{'items': 1}['items']",
]  # fmt: skip
STATEMENTS = [
    "{% for m in messages if m.role == 'user' %}{{ loop.index }}{{ loop.last }}{{ m.role }}{% else %}none{% endfor %}",
    "{% for a in [1, 2, 3] %}{% if a == 2 %}{% continue %}{% endif %}{{ a }}{% endfor %}",
    "{% for a in [1, 2, 3] %}{% if a == 2 %}{% break %}{% endif %}{{ a }}{% endfor %}",
    "{% for a in [[1, [2]], 3] recursive %}{% if a is sequence %}{{ loop(a) }}{% else %}{{ a }}{% endif %}{% endfor %}",
    "{% for a in [1, 1, 2] %}{{ loop.changed(a) }}{{ loop.previtem }}{{ loop.cycle('x', 'y') }}{% endfor %}",
    "{% macro f(a, b='c') %}{{ a }}{{ b }}{{ varargs }}{{ kwargs }}{{ caller() if caller }}{% endmacro %}"
    "{{ f(1) }}{{ f(1, 2, 3, d=4) }}{% call f(5) %}inside{% endcall %}",
    "{% set ns = namespace(x='') %}{% for a in 'abc' %}{% set ns.x = ns.x + a %}{% endfor %}{{ ns.x }}",
    "{% set x %}block {{ 1 + 1 }}{% endset %}{{ x }}{{ x|length }}",
    "{% filter upper %}text{% endfilter %}{% with a = 1 %}{{ a }}{% endwith %}{% raw %}{{ a }}{% endraw %}",
    "  {%- if true -%}  trimmed  {%- endif %}\n{% if true %}\n  line\n{% endif %}\n{# comment #}\nend\n",
    "a {% generation %}{{ messages[0].content }}{% endgeneration %} b",
    "{% block a %}x{% endblock %}{{ self.a() }}", "{% set a, b = 1, 2 %}{{ a }}{{ b }}", "{% include 'x' %}",
    "{% import 'x' as x %}", "{% extends 'x' %}", "{% autoescape true %}{{ '<' ~ '>' }}{% endautoescape %}",
    "{% do messages.append(1) %}", "{% trans %}x{% endtrans %}", "{% debug %}", "{{ 1", "{% if %}", "{% endfor %}",
]  # fmt: skip


def result(compile: Any, text: str, messages: Any, tools: Any, is_asked: bool) -> str:
    """The text of a template, or its error."""
    try:
        rendered = compile(text).render(
            messages=messages, tools=tools, documents=None, add_generation_prompt=is_asked, **TOKENS
        )
        return re.sub("0x[0-9a-f]+", "0x", rendered)  # where an object is
    except SecurityError:
        return "SecurityError"  # ours says it in other words
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def same(text: str) -> list[str]:
    """What both environments make of a template."""
    results = []
    for sample in SAMPLES:
        expected, found = result(transformers_compile, text, *sample), result(compile_template, text, *sample)
        # Objects of ours have names of ours.
        assert found.replace("_Dict", "TemplateDict").replace("_Namespace", "TemplateNamespace") == expected, text
        results.append(expected)
    return results


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_templates_are_rendered_as_by_transformers(path):
    results = same(path.read_text(encoding="utf-8"))
    assert any("France" in found or "picture" in found for found in results), "it refuses every sample"


@pytest.mark.parametrize("name", ["expressions", "statements"])
def test_every_kind_of_expression_is_computed_as_by_transformers(name):
    texts = STATEMENTS if name == "statements" else ["{{ " + expression + " }}" for expression in EXPRESSIONS]
    assert all(same(text) for text in texts)


def test_the_environment_offers_what_that_of_transformers_offers():
    theirs, ours = transformers_compile("").environment, sandbox.environment()
    hidden = {name for name in ours.filters if name.startswith("(")}  # a template cannot write this name
    assert set(ours.filters) - hidden == set(theirs.filters)
    assert set(ours.tests) == set(theirs.tests) and set(ours.globals) == set(theirs.globals)
    tags = [set().union(*(each.tags for each in one.extensions.values())) for one in (ours, theirs)]
    assert tags[0] == tags[1] == {"generation", "break", "continue"}
    for name in (
        "trim_blocks", "lstrip_blocks", "keep_trailing_newline", "newline_sequence", "undefined", "loader",
        "autoescape",
        "block_start_string", "variable_start_string", "comment_start_string", "line_statement_prefix", "policies",
        "is_async", "optimized", "unop_table", "binop_table",
    ):  # fmt: skip
        assert getattr(ours, name) == getattr(theirs, name), name
    assert type(ours).__mro__[1] is type(theirs), "the sandbox of transformers is another one"
    for name in ("dict", "namespace"):
        public = [{key for key in dir(one.globals[name]) if not key.startswith("_")} for one in (ours, theirs)]
        assert public[0] == public[1], name


def test_transformers_renders_with_the_budget_inside_of_it_only(tokenizer):
    """`render` reaches transformers through a private name, which may go in an update."""
    tokenizer.chat_template = "{% for a in range(3000) %}{% for b in range(1000) %}{% endfor %}{% endfor %}end"
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(UserError, match="row 0: .*OverBudget: the template takes more than 2,000,000 steps"):
        render(tokenizer, messages, {}, "row 0")
    assert chat_template_utils._compile_jinja_template is templates._compile
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "end", "a program of ours without the budget"


def test_each_rendering_has_the_whole_budget():
    template = compile_template("{% for a in range(1500) %}{% for b in range(1000) %}{% endfor %}{% endfor %}end")
    assert [template.render() for _ in range(2)] == ["end", "end"]


@pytest.mark.parametrize("letter", ["a", "é", "中", "\U0001f469"])
def test_texts_of_any_letters_stay_below_half_a_gigabyte(letter):
    """Python takes up to 4 bytes a character: 31 million of 4 bytes are fine, 4 times as many are too many."""
    assert compile_template("{{ (a * 31000000)|length }}").render(a=letter) == "31000000"
    with pytest.raises(OverBudget):
        compile_template("{{ (a * 125000000)|length }}").render(a=letter)


# Each took seconds for 20,000 steps, a hundredth of the budget; most of them more than 6.
HIDDEN_COSTS = {
    "markup": ["v|max", "v|int", "v|select('none')|list", "v in v", "v.strip(v)", "v is lower", "v|float"],
    "bytes": ["v|max", "v|sum", "v|unique|list", "v|map('abs')|sum", "cycler(*v)", "v|wordcount", "dict.fromkeys(v)"],
    "wide": ["{}[v]", "v|groupby(1000)", "v|sort", "v|map(attribute='x')|list"],
    "dict": ["v is upper", "v.values()|max", "v.values()|sum", "v.items() == v.copy().items()", "v.keys() - v.keys()"],
    "list": ["v is lower", "v|select('none')|list", "cycler(*v)"],
    "range": ["v.count('a')", "v|groupby('real')"],
    "tuple": ["v is filter", "v is test"],
    "int": ["v is lower", "v|wordcount"],
}


@pytest.mark.parametrize("kind", HIDDEN_COSTS)
def test_large_values_of_each_kind_are_charged_for(kind, monkeypatch):
    """A loop around what is slow ends at the budget. The clock is only there for a budget that does not."""
    values: dict[str, Any] = {
        "markup": Markup("ab " * 300_000), "bytes": b"ab " * 300_000, "wide": "\U0001f469b " * 300_000,
        "dict": dict.fromkeys(range(100_000), 1), "list": list(range(100_000)), "range": range(99_999),
        "tuple": tuple(range(100_000)), "int": 1 << 9_000,
    }  # fmt: skip
    monkeypatch.setattr(sandbox, "STEPS", 20_000)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.signal(signal.SIGVTALRM, signal.SIG_DFL)
            for expression in HIDDEN_COSTS[kind]:
                signal.setitimer(signal.ITIMER_VIRTUAL, 4)
                os.write(2, f"{expression}\n".encode())
                loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% if " + expression + " %}{% endif %}"
                with pytest.raises((OverBudget, UndefinedError)):
                    compile_template(loop + "{% endfor %}{% endfor %}").render(v=values[kind])
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "see the last expression on stderr"


def test_renderings_in_two_threads_have_a_budget_each():
    """And none waits for the other: a process that is forked meanwhile would wait for ever."""
    both, texts = threading.Barrier(2, timeout=20), []
    template = compile_template("{% for a in range(1200) %}{% for b in range(1000) %}{% endfor %}{% endfor %}end")

    def work():
        with templates.budget():
            both.wait()
            texts.append(template.render())

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == ["end", "end"]


@pytest.mark.parametrize(("name", "turns"), [("qwen3", 1000), ("llama3_1", 1000), ("gemma4_v5", 200)])
def test_a_long_conversation_is_rendered(name, turns):
    """1,000 turns of 4,000 characters, about a million tokens. Gemma's template looks back from every turn."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": f"{i} " + "word " * 800} for i in range(turns)]
    text = next(path for path in PUBLISHED if path.stem == name).read_text(encoding="utf-8")
    expected, found = (result(one, text, messages, None, False) for one in (transformers_compile, compile_template))
    assert len(found) > 4_000 * turns and found == expected


def test_templates_of_a_tokenizer_are_tried(tokenizer):
    """Each of several; what refuses some conversations is fine; the answer is remembered in the process."""
    tokenizer.chat_template = {"default": "{{ raise_exception('no tools') if tools }}fine", "tool_use": "{% for %}"}
    with pytest.raises(UserError, match="chat template 'tool_use' of folder cannot be used: TemplateSyntaxError"):
        check_templates(tokenizer, "folder")
    tokenizer.chat_template = tokenizer.chat_template["default"]
    check_templates(tokenizer, "folder")
    known = templates._fault.cache_info().hits
    check_templates(tokenizer, "folder")
    assert templates._fault.cache_info().hits == known + 1


def test_a_trial_finds_a_bomb_that_only_some_conversations_light():
    for condition in ("tools", "messages|length > 7", "messages[0].role == 'system'", "not add_generation_prompt"):
        with pytest.raises(OverBudget):
            try_template("{% if " + condition + " %}{% for a in range(99999) %}{% for b in range(99999) %}"
                         "{% endfor %}{% endfor %}{% endif %}", TOKENS)  # fmt: skip
