"""Hostile texts: chat templates, regular expressions and names. `inputs(shared)` yields them with what must happen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .inputs import Command, Input

_GROW = "{%% set ns = namespace(x=%s) %%}{%% for i in range(64) %%}%s{%% endfor %%}%s"
_TWINS = (
    "{%% set ns = namespace(x=[1], y=[1]) %%}{%% for i in range(64) %%}{%% set ns.x = [ns.x, ns.x] %%}"
    "{%% set ns.y = [ns.y, ns.y] %%}{%% endfor %%}%s"
)


def _grow(start: str, step: str, end: str = "") -> str:
    return _GROW % (start, "{% set ns.x = " + step + " %}", end)


# Each takes years or terabytes, or more than a C stack holds. Lists that hold one list twice look small.
BOMBS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}"
    "{% endfor %}{% endfor %}",
    "loops over a content": "{% for a in messages[0].content %}{% for b in messages[0].content %}"
    "{% for c in messages[0].content %}{% for d in messages[0].content %}{% for e in messages[0].content %}"
    "{% for f in messages[0].content %}{% endfor %}{% endfor %}{% endfor %}{% endfor %}{% endfor %}{% endfor %}",
    "a loop whose test is false": "{% for i in range(99999) %}{% for x in range(99999) if false %}{% endfor %}"
    "{% endfor %}",
    "a text times a number": "{{ 'a' * 2000000000 }}",
    "a number times a text": "{% set x = 2000000000 * 'a' %}",
    "a wide %s": "{{ '%2000000000s' % 'a' }}",
    "a wide %*d": "{{ '%*d' % (2000000000, 1) }}",
    "filter format": "{{ '%2000000000s'|format('a') }}",
    "method format": "{{ '{:2000000000}'.format(1) }}",
    "nested format": "{{ '{:{}}'.format(1, 2000000000) }}",
    "method format_map": "{{ '{x:2000000000}'.format_map({'x': 1}) }}",
    "attr format": "{{ ('{:2000000000}'|attr('format'))(1) }}",
    "bytes": "{{ ('%2000000000s'.encode()) % 'a'.encode() }}",
    "filter center": "{{ 'a'|center(2000000000) }}",
    "map center": "{{ ['a']|map('center', 2000000000)|list }}",
    "method center": "{{ 'a'.center(2000000000) }}",
    "method ljust": "{{ 'a'.ljust(2000000000) }}",
    "method zfill": "{{ 'a'.zfill(2000000000) }}",
    "method expandtabs": "{{ '\t'.expandtabs(2000000000) }}",
    "method translate": "{{ ('a' * 10000).translate({97: 'b' * 1000000}) }}",
    "method to_bytes": "{{ (1).to_bytes(2000000000) }}",
    "filter indent": "{{ 'a\nb'|indent(2000000000) }}",
    "indent with a text": "{{ ('a\n' * 1000)|indent('b' * 1000000) }}",
    "filter wordwrap": "{{ ('a ' * 100000)|wordwrap(1, wrapstring='b' * 100000) }}",
    "filter batch": "{{ [1]|batch(1000000000, 'a')|list }}",
    "filter slice": "{{ [1]|slice(1000000000)|list }}",
    "filter tojson": "{{ [1, [2]]|tojson(indent=2000000000) }}",
    "lipsum": "{{ lipsum(n=1000000000) }}",
    "a power": "{{ 10 ** (10 ** 9) }}",
    "squares": _grow("10", "ns.x * ns.x"),
    "doubling by ~": _grow("'a'", "ns.x ~ ns.x"),
    "doubling by +": _grow("'a'", "ns.x + ns.x"),
    "doubling a list": _grow("[1]", "ns.x + ns.x"),
    "filter join": _grow("'ab'", "ns.x|join(ns.x)"),
    "method join": _grow("'ab'", "ns.x.join([ns.x, ns.x])"),
    "filter replace": _grow("'ab'", "ns.x|replace('a', ns.x)"),
    "method replace": _grow("'ab'", "ns.x.replace('a', ns.x)"),
    "a block as a value": "{% set s = 'a' * 50000000 %}{% set x %}{% for i in range(99999) %}{{ s }}{% endfor %}"
    "{% endset %}",
    "output": "{% set s = 'a' * 50000000 %}{% for i in range(99999) %}{{ s }}{% endfor %}",
    "slices": _GROW % ("[]", "{% set s = 'a' * 50000000 %}{% set ns.x = [ns.x, s[1:]] %}", ""),
    "searches": "{% set s = 'a' * 50000000 %}{% for i in range(99999) %}{% if 'b' in s %}{% endif %}{% endfor %}",
    "a list of lists, written": _grow("[1]", "[ns.x, ns.x]", "{{ ns.x }}"),
    "a list of lists, tojson": _grow("[1]", "[ns.x, ns.x]", "{{ ns.x|tojson }}"),
    "a list of lists, upper": _grow("[1]", "[ns.x, ns.x]", "{{ ns.x|upper|length }}"),
    "a list of lists, ~": _grow("[1]", "[ns.x, ns.x]", "{{ ('a' ~ ns.x)|length }}"),
    "a list of lists, %s": _grow("[1]", "[ns.x, ns.x]", "{{ ('%s' % ns.x)|length }}"),
    "a list of lists, format": _grow("[1]", "[ns.x, ns.x]", "{{ '{}'.format(ns.x)|length }}"),
    "a namespace of lists": _grow("[1]", "[ns.x, ns.x]", "{{ ns }}"),
    "a hash": _grow("(1,)", "(ns.x, ns.x)", "{{ {ns.x: 1}|length }}"),
    "a hash of get": _grow("(1,)", "(ns.x, ns.x)", "{{ {}.get(ns.x) }}"),
    "a hash of an item": _grow("(1,)", "(ns.x, ns.x)", "{{ {}[ns.x] }}"),
    "a hash of unique": _grow("(1,)", "(ns.x, ns.x)", "{{ [ns.x]|unique|list }}"),
    "twins, ==": _TWINS % "{{ ns.x == ns.y }}",
    "twins, in": _TWINS % "{{ ns.x in [ns.y] }}",
    "twins, eq": _TWINS % "{{ ns.x is eq ns.y }}",
    "twins, sort": _TWINS % "{{ [ns.x, ns.y]|sort }}",
    "twins, index": _TWINS % "{{ [ns.x].index(ns.y) }}",
    "twins, changed": _TWINS % "{% for z in [ns.x, ns.y] %}{{ loop.changed(z) }}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a recursive macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a recursive block": "{% block a %}{{ self.a() }}{% endblock %}",
    "a recursive loop": "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "a namespace in itself": "{% set ns = namespace() %}{% set ns.a = ns %}{% for i in range(9) %}{{ ns }}{% endfor %}",
}  # fmt: skip
# These do not compile.
BROKEN = {
    "an open block": "{% for m in messages %}",
    "an open variable": "{{ messages",
    "an unknown tag": "{% exec 'x' %}",
    "an unknown filter": "{{ messages|system }}",
    "an include": "{% include '/etc/passwd' %}{% if %}",
    "parentheses": "{{ " + "(" * 100000 + "1" + ")" * 100000 + " }}",
    "signs": "{{ " + "-" * 100000 + "1 }}",
    "blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "2 MB": "a" * 2_000_000,
}
# The sandbox hides these, and whoever renders them is refused.
ESCAPES = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__['os'].system('touch ../canary') }}",
    "init": "{{ namespace.__init__.__globals__ }}",
    "attr": "{{ (''|attr('__class__')).mro() }}",
    "format": "{{ '{0.__class__.__mro__}'.format(raise_exception) }}",
    "cycler": "{{ cycler.__init__.__globals__.os.popen('touch ../canary').read() }}",
    "import": "{% import 'os' as os %}{{ os.system('touch ../canary') }}",
    "append": "{{ messages.append(1) }}{{ 1 / 0 }}",
    "an exception": "{{ raise_exception('\x1b[2J no system role') }}",
    "an exception in lines": "{{ raise_exception('no\nllm-jepa: error: forged') }}",
    "a type": "{{ 'a' + 1 }}",
    "an unknown name": "{{ nothing.at.all }}",
}
PATTERNS = {  # of `lora_target_modules` -> words of the line
    "(.*)*(.*)*(.*)*(.*)*x": "takes more than 2 seconds",
    "((.+)+)+(.+)+!": "takes more than 2 seconds",
    "(.|.)*(.|.)*!": "takes more than 2 seconds",
    "(((": "unterminated",
    "[": "unterminated",
    "*": "nothing to repeat",
    "(?P<a": "missing >",
    "(?z)": "unknown",
    "(?<=.*)x": "look-behind",
    "a{99999999999}": "the repetition number is too large",
    "\\": "bad escape",
    "(" * 5000: "without end",
    "q_proj": "matches no module",
    "q_proj\x1b": "matches no module",
}
NAMES = {
    "clear": "\x1b[2J", "title": "\x1b]0;x\x07", "C1": "\x9b2J", "override": "\u202exyz", "isolate": "\u2066xyz",
    "return": "x\ry", "line": "x\nllm-jepa: error: forged", "separator": "x\u2028y", "nul": "x\\u0000y",
    "surrogate": "\ud800",
}  # fmt: skip


def inputs(shared: Path) -> Iterator[Input]:
    """All hostile texts. `shared` gets the model that they are tried with."""
    model = _model(shared / "model")
    for name, bomb in BOMBS.items():
        yield Input(f"loaded: {name}", _asked(model, bomb), "chat template of")
        yield Input(f"template at one content: {name}", _rendered(bomb), "the chat template cannot render")
    for name, text in BROKEN.items():
        yield Input(f"template: {name}", _asked(model, text), "cannot be used")
    for name, text in ESCAPES.items():
        yield Input(f"template: {name}", _asked(model, text), "the chat template cannot render")
    bomb = BOMBS["nested loops"]
    for door, words in _doors().items():
        yield Input(f"template: {door}", _at_door(model, bomb, words), "chat template")
    for pattern, says in PATTERNS.items():
        yield Input(f"pattern: {pattern[:20]!a}", _trained(model, {"lora_target_modules": pattern}), says)
    yield Input("pattern: of an adapter", _with_adapter(model), "holds an adapter")
    for name, text in NAMES.items():
        says = "half of a surrogate pair" if name == "surrogate" else "Cannot load"
        yield Input(f"model_type: {name}", _config(model, {"model_type": text}), says)
        yield Input(f"recipe key: {name}", _trained(model, {text: 1}), "")
        if name != "surrogate":
            yield Input(f"prompt: {name}", _prompt(model, text))
        yield Input(f"folder: {name}", _folder(text), "")


def _model(folder: Path) -> Path:
    import llm_jepa.lm.commands
    import llm_jepa.lm.inference
    import llm_jepa.lm.loading
    import llm_jepa.lm.trainer  # noqa: F401  (here, and not in the fork of each input)
    from llm_jepa.core.tokenizer import train_bpe
    from llm_jepa.lm.from_scratch import random_model

    tokenizer = train_bpe(["a question and an answer"] * 20, 280)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"max_position_embeddings": 4096}
    random_model({"model_type": "llama", **sizes}, tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _copy(model: Path, folder: Path) -> Path:
    return Path(shutil.copytree(model, folder / "model"))


def _with_template(model: Path, template: str, folder: Path) -> Path:
    copy = _copy(model, folder)
    (copy / "chat_template.jinja").write_text(template)
    return copy


def _asked(model: Path, template: str) -> Callable[[Path], Command]:
    def make(folder: Path) -> Command:
        copy = _with_template(model, template, folder)
        return ["generate", str(copy), "--prompt", "BOOM", "--max_new_tokens", "1"]

    return make


def _rendered(bomb: str) -> Callable[[Path], Command]:
    """The bomb goes off at one content only, so no trial finds it; the budget of the rendering must."""

    def make(folder: Path) -> Command:
        from llm_jepa.core.tokenizer import train_bpe
        from llm_jepa.lm.prompts import render

        tokenizer = train_bpe(["a"], 280)
        tokenizer.chat_template = "{% if 'BOOM' in messages[0].content %}" + bomb + "{% endif %}"
        return lambda: render(tokenizer, [{"role": "user", "content": "BOOM " * 200}], {}, "row 0")

    return make


def _recipe(folder: Path, values: dict[str, Any]) -> Path:
    rows = folder / "rows.jsonl"
    with rows.open("w") as file:
        for number in range(8):
            turns = [
                {"role": "user", "content": f"question {number}"},
                {"role": "assistant", "content": f"answer {number}"},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    (folder / "recipe.yaml").write_text(
        json.dumps({
            "family": "lm", "train_data": str(rows), "output_dir": "run", "max_steps": 1, "use_cpu": True,
            "report_to": "none", "per_device_train_batch_size": 2, "eval_strategy": "no", **values,
        })
    )  # fmt: skip
    return folder / "recipe.yaml"


def _doors() -> dict[str, Callable[[Path, Path], Command]]:
    """Every command that loads a template: door(model, folder) -> its command."""

    def train(model: Path, folder: Path) -> Command:
        return ["train", str(_recipe(folder, {"model_name_or_path": str(model)}))]

    def dry_run(model: Path, folder: Path) -> Command:
        return ["train", str(_recipe(folder, {"model_name_or_path": str(model)})), "--dry-run"]

    def embed(model: Path, folder: Path) -> Command:
        _recipe(folder, {})
        return ["embed", str(model), "--input", str(folder / "rows.jsonl"), "--output", "e.safetensors"]

    def path(model: Path, folder: Path) -> Command:
        template = folder / "bomb.jinja"
        (model / "chat_template.jinja").rename(template)
        values = {"model_name_or_path": str(model), "chat_template_path": str(template)}
        return ["train", str(_recipe(folder, values))]

    def in_config(model: Path, folder: Path) -> Command:
        template = model / "chat_template.jinja"
        _edit(model / "tokenizer_config.json", {"chat_template": template.read_text()})
        template.unlink()
        return ["generate", str(model), "--prompt", "x"]

    def several(model: Path, folder: Path) -> Command:
        (model / "additional_chat_templates").mkdir()
        bomb = model / "chat_template.jinja"
        (model / "additional_chat_templates" / "tool_use.jinja").write_text(bomb.read_text())
        bomb.write_text("{{ messages[0].content }}")
        return ["generate", str(model), "--prompt", "x"]

    def run(model: Path, folder: Path) -> Command:
        from ..run import main

        questions = folder / "questions.jsonl"
        questions.write_text(json.dumps({"id": "1", "prompts": ["q"], "answer": "a"}) + "\n")
        words = ["--model", str(model), "--task", "groups", "--data", str(questions), "--out", "out"]
        return lambda: main(words)

    return {
        "train": train, "a dry run": dry_run, "embed": embed, "chat_template_path": path,
        "tokenizer_config.json": in_config, "an additional template": several, "eval.run": run,
    }  # fmt: skip


def _at_door(model: Path, template: str, door: Callable[[Path, Path], Command]) -> Callable[[Path], Command]:
    return lambda folder: door(_with_template(model, template, folder), folder)


def _trained(model: Path, values: dict[str, Any]) -> Callable[[Path], Command]:
    def make(folder: Path) -> Command:
        return ["train", str(_recipe(folder, {"model_name_or_path": str(model), "use_peft": True, **values}))]

    return make


def _with_adapter(model: Path) -> Callable[[Path], Command]:
    def make(folder: Path) -> Command:
        copy = _copy(model, folder)
        adapter = {"peft_type": "LORA", "base_model_name_or_path": "x", "target_modules": "(.*)*(.*)*(.*)*(.*)*x"}
        (copy / "adapter_config.json").write_text(json.dumps(adapter))
        return ["generate", str(copy), "--prompt", "x"]

    return make


def _config(model: Path, values: dict[str, Any]) -> Callable[[Path], Command]:
    def make(folder: Path) -> Command:
        copy = _copy(model, folder)
        _edit(copy / "config.json", values)
        return ["generate", str(copy), "--prompt", "x"]

    return make


def _prompt(model: Path, text: str) -> Callable[[Path], Command]:
    return lambda folder: ["generate", str(model), "--prompt", f"x {text}", "--max_new_tokens", "1"]


def _folder(text: str) -> Callable[[Path], Command]:
    return lambda folder: ["generate", f"./{text}", "--prompt", "x"]


def _edit(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
