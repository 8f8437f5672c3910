"""The sandbox in which chat templates are rendered: that of transformers, with a budget. Imports only jinja2.

A chat template is a stranger's program. The sandbox of jinja2 keeps it from files and from Python's internals, but not
from loops without end or from gigabytes of text. So each rendering has a budget of steps. A step is one turn of a
loop, one item of a list that is looked at, or about 1,000 characters that are looked at. What an operation would make
is charged before it is made.

The budget is not a proof: jinja2 has many filters, and one that costs more than it is charged is possible. So a
template is tried in a child with limits as well (`core.template_trial`).
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import wraps
from typing import Any

from jinja2 import Environment, Template, nodes, pass_context, pass_eval_context
from jinja2.exceptions import SecurityError, TemplateError, TemplateRuntimeError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.runtime import LoopContext, Macro, markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

STEPS = 2_000_000  # of a rendering: about 2 seconds. A conversation of 1,000,000 tokens takes about 300,000.
READ, MADE = 1000, 62  # characters a step, to look at and to make. All steps together make 0.5 GB of 4-byte characters.
ITEMS, CALLED = 20, 4  # items a step, if nothing in them is looked at, and if something is called for each
MAX_TEMPLATE = 1_000_000  # characters; the longest published template has 60,000
MAX_BITS = 10_000  # of an integer
# Methods of texts and filters whose work and result grow like their text. Others are charged the product of it all.
LINEAR = frozenset(
    """capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric isspace
    istitle isupper lower lstrip partition removeprefix removesuffix rfind rindex rpartition rsplit rstrip split
    splitlines startswith strip swapcase title upper
    abs dictsort e escape float forceescape groupby int join max min replace round sort string tojson trim truncate
    unique urlencode wordcount""".split()  # noqa: SIM905 (one name a line reads worse)
)
# These go through a text as through a list of its characters; others search it, which is much faster.
ITERATING = frozenset(("dictsort", "groupby", "max", "min", "sort", "sum", "unique"))
# Filters that do not look into the items of their list: at none of them, at each, or with a call for each. What is
# called is charged itself, if it is not cheap.
CONSTANT = frozenset("attr count d default first last length random safe".split())  # noqa: SIM905
SHALLOW = frozenset(("items", "list", "reverse"))
CALLING = frozenset(("map", "reject", "rejectattr", "select", "selectattr"))
# Tests that take the same time for each value. All others compare, hash, or make a text of it.
CHEAP_TESTS = frozenset(
    """boolean callable defined divisibleby escaped even false float integer iterable mapping none number odd sameas
    sequence string true undefined""".split()  # noqa: SIM905
)
OF_DICT = frozenset(dir(dict))
VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))
# Formats that pad to 10,000 characters or more, of `%` and of `str.format`
_WIDE_PERCENT = re.compile(r"%[^a-zA-Z%]*(?:\*|\d{5})")
_WIDE_BRACES = re.compile(r"\{[^{}]*(?:\{|\d{5})")


class OverBudget(TemplateRuntimeError):
    """A rendering costs more than its budget."""


class _Namespace(Namespace):
    """A namespace without names that begin with an underscore."""

    def __init__(*arguments: Any, **kwargs: Any) -> None:  # no `self`, so that it can be the name of a value
        self, rest = arguments[0], arguments[1:]
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace of a chat template cannot have the name {name!r}")


class _Budget(threading.local):
    """What is left, of the rendering in this thread."""

    steps = STEPS

    def charge(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise OverBudget(f"the template takes more than {STEPS:,} steps, or makes more than 0.5 GB of text")


_budget = _Budget()


def _read(value: Any) -> int:
    """Charge for looking at a value as a whole; return its size: characters and items."""
    if type(value) is str:  # by far the most common
        _budget.charge(1 + len(value) // READ)
        return len(value)
    # A list may hold one object a million times, so the count is that of a walk and not that of the memory.
    size, steps, rest = 0, 0, [value]
    while rest:
        item = rest.pop()
        size += 1
        steps += 1
        kind = type(item)
        if kind is str:
            size += len(item)
            steps += len(item) // READ
            continue
        if kind is int:
            bits = item.bit_length()
            size += bits // 3
            steps += bits * bits >> 20  # the time to write it out
            continue
        if isinstance(item, (str, bytes)):  # such as Markup
            size += len(item)
            steps += len(item) // READ
        for items in _inside(item, kind):
            if steps + len(rest) + len(items) > _budget.steps:
                _budget.charge(steps + len(rest) + len(items))
            rest.extend(items)
    _budget.charge(steps)
    return size


def _inside(value: Any, kind: type) -> tuple[Any, ...]:
    """The lists and other collections of what a value holds."""
    if kind is dict or isinstance(value, dict):
        return value, value.values()
    if kind is _Namespace:
        return _inside(value._Namespace__attrs, dict)
    return (value,) if isinstance(value, (list, tuple, range, *VIEWS)) else ()


def _make(size: int) -> None:
    """Charge for a text of `size` characters, or a list of half as many items, before it is made."""
    _budget.charge(1 + size // MADE)


def _made(value: Any) -> Any:
    """Charge for a value that an operation has made; it is at most as large as what it was made of."""
    if isinstance(value, (str, bytes, list, tuple, dict)):
        _make(_room(value))
    return value


def _room(value: Any) -> int:
    """What a text or a container takes without its items, in characters of 4 bytes; a pointer takes two."""
    return len(value) if isinstance(value, (str, bytes)) else 2 * len(value)


def _glance(value: Any, items: int = ITEMS) -> None:
    """Charge a step for as many items of a value, into which nothing looks."""
    many = isinstance(value, (str, bytes, list, tuple, dict, range, *VIEWS))
    _budget.charge(1 + (len(value) // items if many else 0))


def _product(values: Iterable[Any]) -> int:
    """The product of the sizes of values and of the numbers among them: what an unknown operation may make."""
    product = 1
    for value in values:
        size = abs(value) if isinstance(value, int) else _read(value)
        product *= 1 + min(size, 1 << 62)
    return product


def _format(text: Any, arguments: Any, wide: re.Pattern[str] = _WIDE_PERCENT) -> None:
    """Charge for `text % arguments` or `text.format(arguments)`. `wide`: what pads too far in such a format."""
    template = text.decode("latin-1") if isinstance(text, bytes) else str(text)
    if wide.search(template.replace("{{", "") if wide is _WIDE_BRACES else template):
        raise OverBudget(f"the template pads a text to 10,000 characters or more: {template[:40]!r}")
    _make(len(template) + (template.count("%") + template.count("{")) * _read(arguments))


def _join(separator: Any, items: Iterable[Any]) -> list[Any]:
    """Charge for joining items; they come back as a list, because they may be a generator."""
    parts = list(items)
    _make(_read(parts) + len(parts) * len(str(separator)))
    return parts


def _replace(text: str, old: Any, new: Any) -> None:
    size = _read(text) + _read(old) + _read(new)
    if isinstance(old, str) and isinstance(new, str):
        _make(len(text) + text.count(old) * max(0, len(new) - len(old)))
    else:  # they become texts
        _make(size)


# -- operators --------------------------------------------------------------------------------------------------------


def _binary(operator: str, left: Any, right: Any) -> None:
    """Charge for `left operator right`."""
    if operator == "+":
        if isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
            _make(_room(left) + _room(right))
    elif operator == "%":
        if isinstance(left, (str, bytes)):
            _format(left, right)
    elif operator == "-":
        if isinstance(left, VIEWS):  # they are sets
            _read(left)
            _read(right)
    elif isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
        if bits > MAX_BITS:
            raise OverBudget(f"the template computes a number of more than {MAX_BITS:,} bits")
    elif operator == "*":
        for sequence, count in ((left, right), (right, left)):
            if isinstance(sequence, (str, bytes, list, tuple)) and isinstance(count, int):
                _make(_room(sequence) * max(count, 0))


# -- calls and filters ------------------------------------------------------------------------------------------------


def _call(function: Any, arguments: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Charge for a call; return the arguments, in which a generator may have become a list."""
    _budget.charge(2 + len(arguments))
    if isinstance(function, (Macro, LoopContext)) or function is safe_range:
        return arguments  # a step for each turn is charged in the body
    owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
    values = (*arguments, *kwargs.values())
    if function is _Namespace or isinstance(function, _Dict) or isinstance(owner, _Dict):
        for value in arguments:  # their keys are hashed; values are held as they are
            _read(value)
            _glance(value)
    elif isinstance(owner, str):
        if name == "join" and arguments:
            return (_join(owner, arguments[0]), *arguments[1:])
        if name == "replace" and len(arguments) > 1:
            _replace(owner, arguments[0], arguments[1])
        elif name in LINEAR:
            _read(owner)
            for value in values:
                _read(value)
        elif name not in ("format", "format_map"):  # these are charged where they are made
            _make(_product((owner, *values)))
    elif isinstance(owner, (int, float, bytes)) or owner is None:
        _make(_product(values if owner is None else (owner, *values)))
    else:  # of a container or a loop: index() and changed() compare
        for value in (owner, *values) if isinstance(owner, (list, tuple, range, *VIEWS)) else values:
            _read(value)
    return arguments


def _charged_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is charged before it runs."""
    hidden = 1 if hasattr(function, "jinja_pass_arg") else 0  # the context, in front of the value

    @wraps(function)
    def charged(*arguments: Any, **kwargs: Any) -> Any:
        values = (*arguments[hidden:], *kwargs.values())
        if name in CONSTANT or name in SHALLOW or name in CALLING:
            if name not in CONSTANT:
                _glance(values[0], CALLED if name in CALLING else ITEMS)
            for value in values[1:]:
                if isinstance(value, str):  # the name of an attribute
                    _read(value)
            _budget.charge(1)
        elif name == "format":
            _format(str(values[0]), values[1:])
        elif name == "replace" and len(values) > 2:
            _replace(str(_seen(values[0])), values[1], values[2])
        elif name == "join":
            text = values[0]
            parts = _join(values[1] if len(values) > 1 else "", () if text is None else text)
            arguments = (*arguments[:hidden], parts, *arguments[hidden + 1 :])
        elif name in ("center", "indent"):
            lines = str(_seen(values[0])).count("\n") + 1
            _make(_read(values[0]) + lines * (_product(values[1:]) - 1))
        elif name in LINEAR:
            for value in values:
                _read(value)
            if name in ITERATING:
                _glance(values[0], 1)
        else:
            _make(_product(values))
        return _made(function(*arguments, **kwargs))

    return charged


def _charged_test(function: Any) -> Callable[..., Any]:
    """A test that looks into its values: two lists may hold each other's parts a million times."""

    @wraps(function)
    def charged(*arguments: Any) -> Any:
        for value in arguments:
            _read(value)
        return function(*arguments)

    return charged


def _seen(value: Any) -> Any:
    """Charge for a value that is compared, and return it."""
    _read(value)
    return value


def _written(value: Any) -> Any:
    """Charge for a value that is written out, and return it. A text is charged with the whole output."""
    if type(value) is not str:
        _read(value)
    return value


@pass_eval_context
def _joined(context: EvalContext, parts: tuple[Any, ...]) -> Any:
    _make(_read(parts))
    return markup_join(parts) if context.autoescape else str_join(parts)


@pass_context
def _step(_: Any, value: Any) -> Any:
    """Charge one step. With a context, the compiler does not take it for a constant."""
    _budget.charge(1)
    return value


class _Charging(NodeTransformer):
    """Puts a step into each body that can run again, and charges for operations that the sandbox cannot intercept."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        if node.test is not None:  # it runs without the body
            node.test = nodes.And(nodes.Filter(nodes.Const(True), "(step)", [], [], None, None), node.test)
        return _with_step(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return _with_step(self.generic_visit(node))

    visit_CallBlock = visit_Block = visit_Macro

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.Tuple(node.nodes, "load"), "(joined)")

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "(made)") if isinstance(node.arg, nodes.Slice) else node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        operands = [node.expr, *(operand.expr for operand in node.ops)]
        is_search = any(operand.op in ("in", "notin") for operand in node.ops)
        if not is_search and any(isinstance(operand, nodes.Const) for operand in operands):
            return node  # a comparison ends at the first difference from the constant
        node.expr = _unless_constant(node.expr)
        for operand in node.ops:
            operand.expr = _unless_constant(operand.expr)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        node.key = _unless_constant(node.key)  # the hash of a tuple walks through it
        return node


def _with_step(node: Any) -> Any:
    node.body.insert(0, nodes.ExprStmt(nodes.Filter(nodes.Const(None), "(step)", [], [], None, None)))
    return node


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _unless_constant(node: nodes.Expr) -> nodes.Expr:
    if isinstance(node, nodes.Const):
        return node
    if isinstance(node, (nodes.List, nodes.Tuple)) and all(isinstance(item, nodes.Const) for item in node.items):
        return node
    return _filtered(node, "(seen)")


# -- the environment --------------------------------------------------------------------------------------------------


class _Generation(Extension):
    """`{% generation %}` marks the turns of an assistant; here its body is written as it is."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

    def _write(self, caller: Macro) -> str:
        return str(caller())


class _Template(Template):
    def new_context(self, *arguments: Any, **kwargs: Any) -> Any:
        _budget.steps = STEPS  # a rendering begins
        return super().new_context(*arguments, **kwargs)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "-", "*", "%", "**"])
    template_class = _Template

    def _generate(self, source: nodes.Template, *arguments: Any, **kwargs: Any) -> str:
        _budget.steps = STEPS  # constants are computed now
        tree = _Charging().visit(source)
        tree.set_environment(self)
        return super()._generate(tree, *arguments, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and type(left) is str and type(right) is str:  # by far the most common
            _budget.charge(1 + (len(left) + len(right)) // MADE)
        else:
            _binary(operator, left, right)
        return self.binop_table[operator](left, right)

    def call(self, context: Any, function: Any, /, *arguments: Any, **kwargs: Any) -> Any:
        arguments = _call(function, arguments, kwargs)
        return _made(super().call(context, function, *arguments, **kwargs))

    def getattr(self, obj: Any, attribute: str) -> Any:
        # `message.role`: jinja2 finds the key after an exception. This pays for the budget.
        if type(obj) is dict and attribute in obj and attribute not in OF_DICT:
            return obj[attribute]
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, tuple) or (isinstance(argument, str) and len(argument) > READ):
            _read(argument)
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        function = super().wrap_str_format(value)
        if function is None:
            return None

        @wraps(function)
        def charged(*arguments: Any, **kwargs: Any) -> str:
            _format(value.__self__, (arguments, kwargs), _WIDE_BRACES)
            return function(*arguments, **kwargs)

        return charged

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        texts, size, room = [], 0, _budget.steps * MADE
        for part in parts:
            size += len(part)
            if size > room:
                break
            texts.append(part)
        _make(size)
        return "".join(texts)


class _Dict:
    """`dict`, with its constructors only."""

    def __call__(self, *arguments: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*arguments, **kwargs)

    def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
        return dict.fromkeys(*arguments)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    options: dict[str, Any] = dict(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    if indent is None and separators is None:
        return json.dumps(value, **options)
    # An indent or a separator is written once an item; their lengths are the template's.
    if isinstance(indent, int):
        _make(min(max(indent, 0), 1 << 62))
    return _Environment.concat(json.JSONEncoder(**options).iterencode(value))


def environment() -> Environment:
    """A new environment: the filters, globals and tags that transformers gives to chat templates."""
    created = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=_written
    )
    created.filters["tojson"] = _tojson
    created.filters = {name: _charged_filter(name, function) for name, function in created.filters.items()}
    created.filters |= {"(step)": _step, "(joined)": _joined, "(made)": _made, "(seen)": _seen}
    created.tests = {name: test if name in CHEAP_TESTS else _charged_test(test) for name, test in created.tests.items()}
    created.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return created


def compile_template(text: str) -> Template:
    """The template of a text. Raises the errors of jinja2, and OverBudget for more than MAX_TEMPLATE characters."""
    if len(text) > MAX_TEMPLATE:
        raise OverBudget(f"the template has {len(text):,} characters; {MAX_TEMPLATE:,} are possible")
    return environment().from_string(text)
