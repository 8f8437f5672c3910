"""Claims about recipes: what YAML and the command line may say, and that everything else is one line of UserError."""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import math
import os
import time
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trl import ModelConfig, ScriptArguments

from llm_jepa.core.errors import UserError
from llm_jepa.core.kinds import coerce, words_of
from llm_jepa.core.recipe import (
    BOOKKEEPING,
    EXTENDS,
    MAX_FILES,
    NOT_OFFERED,
    RENAMED,
    recipe_fields,
)
from llm_jepa.core.strict_yaml import MAX_BYTES, MAX_DEPTH, read_yaml
from llm_jepa.families import describe_keys, groups_of, keys_of
from llm_jepa.families import parse_recipe as parse
from llm_jepa.lm.arguments import LLMJEPAConfig

LM, VL = groups_of("lm"), groups_of("vl")
ROOT = Path(__file__).parents[2]
FILES = sorted(ROOT.glob("recipes/**/*.y*ml"))
RECIPES = [path for path in FILES if not path.name.startswith("_")]  # the others are extended, and not run
MINIMAL = {"model_name_or_path": "some/model", "train_data": "rows.jsonl", "output_dir": "runs/x", "use_cpu": "true"}


@pytest.fixture(autouse=True)
def same_environment(monkeypatch: pytest.MonkeyPatch):
    """`TrainingArguments` writes environment variables for FSDP and the like; no test may leave one behind."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture
def file(tmp_path):
    """Writes a file and returns its path."""

    def write(text: str | bytes) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


@pytest.fixture
def files(tmp_path):
    """Writes files by their path below one folder and returns that of the first."""

    def write(**texts: str) -> Path:
        for name, text in texts.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path / next(iter(texts))

    return write


def minimal(text: str = "", **changes: str | None) -> str:
    """A recipe that parses, with lines added, and values replaced or (None) left out."""
    values = {"family": "lm", **MINIMAL, **changes}
    return "".join(f"{key}: {value}\n" for key, value in values.items() if value is not None) + text


def refused(function, *arguments) -> str:
    """The message of the UserError, which is one line."""
    with pytest.raises(UserError) as error:
        function(*arguments)
    message = str(error.value)
    assert message and "\n" not in message
    return message


def test_the_minimal_recipe_parses(file):
    """Or every refusal below would prove nothing."""
    recipe = parse(file(minimal()))
    assert recipe.given == {**MINIMAL, "use_cpu": True}
    assert (recipe.model.model_name_or_path, recipe.data.train_data) == ("some/model", "rows.jsonl")
    assert (recipe.training.output_dir, recipe.training.use_cpu) == ("runs/x", True)
    assert recipe.training.jepa_weight == 0.1 and recipe.data.validation_data is None


# -- YAML -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, value",
    [
        *[(word, word) for word in ("no", "No", "yes", "on", "off", "y", "N")],
        *[(word, True) for word in ("true", "True", "TRUE")],
        *[(word, False) for word in ("false", "False", "FALSE")],
        *[(word, None) for word in ("null", "Null", "NULL", "~", "", " # nothing")],
        *[("7", 7), ("+7", 7), ("-7", -7), ("010", 10), ("-0", 0)],
        *[("1e-5", 1e-5), ("1E5", 1e5), ("4.0e-3", 0.004), (".5", 0.5), ("1.", 1.0), ("-2.5", -2.5), ("+.5e+1", 5.0)],
        *[(".inf", float("inf")), ("-.INF", float("-inf"))],
        *[(word, word) for word in ("12:30:45", "2024-01-31", "1_000", "0b11", "1e", "e5", ".", "1.2.3", "=", "nULL")],
        *[('"5"', "5"), ("'true'", "true"), ('"null"', "null"), ("''", "")],
        *[("[1, no, 1e-5]", [1, "no", 1e-5]), ("{a: {b: [on]}}", {"a": {"b": ["on"]}}), ("[]", []), ("{}", {})],
        ("{<<: {a: 1}}", {"<<": {"a": 1}}),
        ("|\n  5\n", "5\n"),
    ],
)
def test_scalars_are_read_by_the_core_rules_of_yaml_1_2(text, value, file):
    """YAML 1.1 makes False of `no`, 8 of 010, 45045 of 12:30:45, 1000 of 1_000, a date, a merge, and text of 1e-5."""
    found = read_yaml(file(f"key: {text}"))
    assert found == {"key": value} and type(found["key"]) is type(value)


def test_not_a_number_is_a_float(file):
    found = read_yaml(file("a: .nan\nb: .NaN"))
    assert all(type(value) is float and value != value for value in found.values())


LAUGHS = "a: &a [l,l,l,l,l,l,l,l,l]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text, named",
    [
        ("a: 1\nb: 2\na: 1\n", "'a' is given twice (line 3)"),
        ("a: {b: 1, c: 2, b: 3}", "'b' is given twice"),
        ("a: [{b: 1, b: 2}]", "'b' is given twice"),
        ("a: &x 1", "anchors and aliases are not allowed (line 1)"),
        ("a: &x 1\nb: *x", "anchors and aliases"),
        ("a: *x", "anchors and aliases"),
        (LAUGHS, "anchors and aliases"),
        ("a: !!python/object/apply:os.system [exit]", "tags are not allowed (line 1)"),
        ("a: !!python/name:os.system", "tags"),
        ("a: !!str 3", "tags"),
        ("a: 1\nb: ! 3", "tags are not allowed (line 2)"),
        ("!!map {a: 1}", "tags"),
        ("!!set {a, b}", "tags"),
        ("a: " + "[" * 2000 + "]" * 2000, f"deeper than {MAX_DEPTH}"),
        ("a: " + "[" * 90_000, f"deeper than {MAX_DEPTH}"),
        ("a: " + "{b: " * 20_000, f"deeper than {MAX_DEPTH}"),
        ("- " * 40_000, f"deeper than {MAX_DEPTH}"),
        ("1: a", "keys must be words"),
        ("true: a", "keys must be words"),
        ("null: a", "keys must be words"),
        ("1e5: a", "keys must be words"),
        ("a: {2: b}", "keys must be words"),
        ("? [a, b]\n: c", "keys must be words"),
        ("? {a: b}\n: c", "keys must be words"),
        ("- a\n- b", "found list"),
        ("5", "found int"),
        ("", "is empty"),
        ("# a comment", "is empty"),
        ("--- {a: 1}\n--- {b: 2}", "single document"),
        ("a: [1, 2", "expected"),
        ("a: 'b", "quoted scalar"),
        ("a: b: c", "mapping values"),
        ("a:\t1\n\tb: 2", "'\\t'"),
        (b"a: \xff\xfe", "utf-8"),
        (b"a: caf\xe9", "utf-8"),
        (b"a: \x00", "special characters"),
        ("a: '\x07'", "special characters"),
        ("seed: " + "9" * 5000, "digits"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_no_plain_mapping_is_refused(text, named, file):
    """With the line where there is one. `seed` has more digits than Python converts."""
    path = file(text)
    start = time.perf_counter()
    message = refused(read_yaml, path)
    assert time.perf_counter() - start < 2, "the parser can be kept busy"
    assert named in message and str(path) in message and len(message) < 500


def test_a_billion_laughs_are_400_bytes():
    """Nine levels of nine: 9^9 words if the parser followed them."""
    assert len(LAUGHS) < 400 and LAUGHS.count("*") == 72


@pytest.mark.parametrize("opening, closing", [("[", "]"), ("{b: ", "}")])
def test_the_deepest_nesting_is_exactly_the_limit(opening, closing, file):
    """The mapping itself is level 1 and the innermost value one more."""
    levels = MAX_DEPTH - 2
    assert read_yaml(file("a: " + opening * levels + "x" + closing * levels))["a"] not in ("x", None)
    assert "deeper" in refused(read_yaml, file("a: " + opening * (levels + 1) + "x" + closing * (levels + 1)))


def test_the_largest_file_is_exactly_the_limit(file):
    text = "a: 1 #".ljust(MAX_BYTES, "x")
    assert read_yaml(file(text)) == {"a": 1}
    assert str(MAX_BYTES) in refused(read_yaml, file(text + "x"))


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        assert str(path) in refused(read_yaml, path) and str(path) in refused(parse, path)


def test_a_file_may_have_a_byte_order_mark_and_windows_line_ends(file):
    assert read_yaml(file("\ufeffa: 1\r\nb: caf\u00e9\r\n")) == {"a": 1, "b": "caf\u00e9"}


# -- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, right",
    [
        ("learnin_rate", "learning_rate"),
        ("jepa_wieght", "jepa_weight"),
        ("Temperature", "temperature"),
        ("num_predictor_token", "num_predictor_tokens"),
        ("tokenizer_vocabulary_size", "tokenizer_vocab_size"),
        ("per_device_batch_size", "per_device_eval_batch_size"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(wrong, right, file):
    """In the file and on the command line."""
    assert f"{wrong!r}; did you mean {right!r}?" in refused(parse, file(minimal(f"{wrong}: 1\n")))
    message = refused(parse, file(minimal()), [f"--{wrong}", "1"])
    assert wrong in message and f"did you mean {right!r}?" in message


def test_every_unknown_key_is_named_at_once(file):
    message = refused(parse, file(minimal("zzzz: 1\nlearnin_rate: 2\n'1': 3\n")))
    assert all(key in message for key in ("'zzzz'", "'learnin_rate'", "'1'"))


def test_an_unknown_override_is_named_as_it_was_written(file):
    """unknown key '--learnin_rate', not --unknown key 'learnin_rate'."""
    assert "--unknown" not in refused(parse, file(minimal()), ["--learnin_rate", "1"])


TRL_KEYS = sorted(
    field.name for group in (ModelConfig, ScriptArguments) for field in dataclasses.fields(group) if field.init
)


@pytest.mark.parametrize("key", TRL_KEYS)
def test_every_option_of_the_command_line_of_trl_is_a_key_or_says_why_not(key, file):
    """Who comes from TRL types them. "Did you mean logging_nan_inf_filter?" does not help who wrote load_in_4bit."""
    if key in recipe_fields(LM):
        assert key not in NOT_OFFERED and key not in RENAMED
        return
    message = refused(parse, file(minimal()), [f"--{key}", "true"])
    assert message.endswith(NOT_OFFERED.get(key) or f"use {RENAMED[key]}") and f"'--{key}'" in message


@pytest.mark.parametrize("old", sorted(RENAMED))
def test_names_that_people_bring_along_point_to_their_successor(old, file):
    """The successor is a key a recipe knows, except for what became something else than a key; the old one is not."""
    assert old not in recipe_fields(LM)
    message = refused(parse, file(minimal(f"{old}: 1\n")))
    assert f"unknown key {old!r}: use {RENAMED[old]}" in message
    if old not in ("overwrite_output_dir", "logging_dir"):
        assert RENAMED[old].split()[0].rstrip(":,") in recipe_fields(LM)


def test_help_describes_every_key_of_ours():
    text = describe_keys()
    assert all(f"\n  {name} (" in text for group in keys_of("lm") for name in group.__annotations__)


# -- types ----------------------------------------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = "red"


ACCEPTED: list[tuple[Any, Any, Any]] = [
    (3, int, 3),
    (3, float, 3.0),
    (2.5, float, 2.5),
    (3, int | float, 3),
    (3, float | int, 3),
    (3, float | None, 3.0),
    (True, bool, True),
    ("123", str, "123"),
    (None, str | None, None),
    ("no", str | bool, "no"),
    (False, str | bool, False),
    ("a", Literal["a", "b"], "a"),
    (False, Literal[False] | None, False),
    ("red", Colour, "red"),
    ("red", Colour | str, "red"),
    ("red red", str | list[Colour], "red red"),
    ({"a": math.inf}, dict[str, Any], {"a": math.inf}),
    ([1, 2], list[float], [1.0, 2.0]),
    ([], list[str], []),
    (["a"], None | str | list[str], ["a"]),
    ({"a": 1}, dict[str, Any], {"a": 1}),
    ({"a": 1}, dict | str | None, {"a": 1}),
]
REFUSED: list[tuple[Any, Any, str]] = [
    (2.7, int, "expected int, got 2.7 (float)"),
    (2.0, int, "expected int, got 2.0 (float)"),
    (True, int, "expected int, got True (bool)"),
    ("3", int, "expected int, got '3' (str)"),
    (None, int, "expected int, got None (NoneType)"),
    ([1.0], float, "expected float, got [1.0] (list)"),
    (True, float, "expected float, got True (bool)"),
    ("1e-5", float, "expected float, got '1e-5' (str)"),
    ("yes", bool, "expected true or false, got 'yes' (str)"),
    (1, bool, "expected true or false, got 1 (int)"),
    (5, str, "expected str, got 5 (int)"),
    (None, str, "expected str, got None (NoneType)"),
    (5, str | None, "expected str or null, got 5 (int)"),
    ("c", Literal["a", "b"], "expected one of a, b, got 'c' (str)"),
    (0, Literal[False], "expected one of False, got 0 (int)"),
    ("blue", Colour, "expected one of red, got 'blue' (str)"),
    ("reed", Colour | str, "expected one of red, got 'reed' (str); did you mean 'red'?"),
    (5, Colour | str, "expected one of red, got 5 (int)"),
    ("red blue", str | list[Colour], "expected str or list of red, got 'red blue' (str)"),
    (math.nan, float, "expected a finite number, got nan"),
    (-math.inf, float | None, "expected a finite number, got -inf"),
    (math.inf, int | float, "expected a finite number, got inf"),
    (math.nan, int, "expected int, got nan (float)"),
    ({"a": [math.nan]}, dict[str, Any], "it holds nan; write a finite number"),
    (["a", 3], list[str], "expected list, got ['a', 3] (list)"),
    ("ab", list[str], "expected list, got 'ab' (str)"),
    ([], dict[str, Any], "expected dict, got [] (list)"),
    ({}, list[str] | str, "expected list or str, got {} (dict)"),
]


@pytest.mark.parametrize("value, hint, expected", ACCEPTED)
def test_values_of_the_type_are_taken_and_an_int_becomes_a_float(value, hint, expected):
    found = coerce("key", value, hint)
    assert found == expected and type(found) is type(expected)
    if isinstance(found, list):
        assert [type(item) for item in found] == [type(item) for item in expected]


@pytest.mark.parametrize("value, hint, message", REFUSED)
def test_values_of_another_type_are_refused_and_never_converted(value, hint, message):
    assert refused(coerce, "key", value, hint) == f"key: {message}{'' if message.endswith('?') else '.'}"


@pytest.mark.parametrize(
    "line, named",
    [
        ("seed: 2.7", "seed: expected int"),
        ("seed: 1e3", "seed: expected int"),
        ("learning_rate: [1e-5]", "learning_rate: expected float"),
        ("learning_rate: '1e-5'", "learning_rate: expected float"),
        ("learning_rate: true", "learning_rate: expected float"),
        ("use_peft: 'yes'", "use_peft: expected true or false"),
        ("use_peft: yes", "use_peft: expected true or false"),
        ("use_peft: 1", "use_peft: expected true or false"),
        ("model_revision: 123", "model_revision: expected str"),
        ("dtype: float8", "expected one of float32, bfloat16, float16, float64"),
        ("objective: cos", "expected one of info_nce, cosine, l2, mse, smooth_l1"),
        ("lora_target_modules: [q_proj, 3]", "lora_target_modules: expected str or list"),
        ("model_config: llama", "model_config: expected dict or null"),
        ("parallelism_config: {tp_size: 2}", "parallelism_config"),
        ("temperature: null", "temperature: expected float"),
    ],
)
def test_a_recipe_with_a_value_of_another_type_is_refused(line, named, file):
    assert named in refused(parse, file(minimal(line + "\n")))


def test_an_int_becomes_a_float_and_null_empties_an_optional_field(file):
    recipe = parse(file(minimal("learning_rate: 1\njepa_weight: 0\nmax_length: null\neval_steps: ~\n")))
    assert type(recipe.training.learning_rate) is float and recipe.training.learning_rate == 1.0
    assert type(recipe.given["jepa_weight"]) is float and not recipe.training.uses_jepa
    assert recipe.training.max_length is None and recipe.given["max_length"] is None


@pytest.mark.parametrize("name", sorted(recipe_fields(LM)))
def test_every_default_is_a_value_a_recipe_may_give(name):
    """Fails where a library changes a field's type to one that `coerce` does not know."""
    field, hint = recipe_fields(LM)[name]
    if field.default is not dataclasses.MISSING:
        assert coerce(name, field.default, hint) == field.default
    elif field.default_factory is not dataclasses.MISSING:
        assert coerce(name, field.default_factory(), hint) == field.default_factory()
    else:
        assert name == "train_data", "the one required field"


FAMILY_FIELDS = {family: recipe_fields(groups_of(family)) for family in ("lm", "vl")}
CHOICES = [(family, key) for family, fields in FAMILY_FIELDS.items() for key in fields if words_of(fields[key][1])]


def test_the_keys_with_choices_are_found():
    """Every key for which transformers makes an enum of a text among them."""
    enums = {
        "lr_scheduler_type",
        "optim",
        "logging_strategy",
        "eval_strategy",
        "save_strategy",
        "hub_strategy",
        "debug",
    }
    for family in ("lm", "vl"):
        assert enums < {key for name, key in CHOICES if name == family}


@pytest.mark.parametrize("family, key", CHOICES)
def test_a_word_that_is_not_one_of_the_choices_names_the_key(family, key):
    hint = FAMILY_FIELDS[family][key][1]
    message = refused(coerce, key, "zzz", hint)
    assert message.startswith(f"{key}: expected ") and "got 'zzz' (str)" in message and len(message) <= 300
    word = words_of(hint)[0]
    message = refused(coerce, key, f"{word}z", hint)
    assert message.startswith(f"{key}: ") and "did you mean '" in message and len(message) <= 300
    assert coerce(key, word, hint) == word


def test_a_learning_rate_schedule_that_does_not_exist(file):
    message = refused(parse, file(minimal()), ["--lr_scheduler_type", "cosin"])
    assert message.startswith("lr_scheduler_type: expected one of") and message.endswith("did you mean 'cosine'?")


@pytest.mark.parametrize(
    "line", ["learning_rate: .nan", "jepa_weight: .inf", "temperature: .inf", "max_grad_norm: -.inf"]
)
def test_a_number_that_is_not_finite_is_refused(line, file):
    """Nothing trains with one, JSON has none, and nan != nan would keep a run from being resumed."""
    assert line.split(":")[0] in refused(parse, file(minimal(line + "\n")))


# -- the command line -----------------------------------------------------------------------------------------------


def test_overrides_win_over_the_file(file):
    text = minimal("learning_rate: 1e-5\nseed: 3\n")
    recipe = parse(file(text), ["--learning_rate", "2e-4", "--output_dir", "elsewhere"])
    assert (recipe.training.learning_rate, recipe.training.seed) == (2e-4, 3)
    assert recipe.given["output_dir"] == recipe.training.output_dir == "elsewhere"


@pytest.mark.parametrize(
    "arguments, name, value",
    [
        (["--learning_rate", "1e-5"], "learning_rate", 1e-5),
        (["--learning-rate", "1e-5"], "learning_rate", 1e-5),
        (["--learning_rate=1e-5"], "learning_rate", 1e-5),
        (["--learning-rate=1"], "learning_rate", 1.0),
        (["--max_steps", "-1"], "max_steps", -1),
        (["--seed", "010"], "seed", 10),
        (["--use_peft", "true"], "use_peft", True),
        (["--max_length", "null"], "max_length", None),
        (["--validation_data", "null"], "validation_data", None),
        (["--model_revision", "123"], "model_revision", "123"),
        (["--model_revision", "1e5"], "model_revision", "1e5"),
        (["--model_revision", "true"], "model_revision", "true"),
        (["--model-revision="], "model_revision", ""),
        (["--run_name", "a: [b"], "run_name", "a: [b"),
        (["--run_name=a=b"], "run_name", "a=b"),
        (["--run_name=--a"], "run_name", "--a"),
        (["--run-name", "with-hyphens"], "run_name", "with-hyphens"),
        (["--resume_from_checkpoint", "true"], "resume_from_checkpoint", "true"),
        (["--objective", "l2"], "objective", "l2"),
        (["--eval_strategy", "no"], "eval_strategy", "no"),
        (["--use_peft=true", "--lora_target_modules", "q_proj"], "lora_target_modules", "q_proj"),
        (["--use_peft=true", "--lora_target_modules", "[q_proj, k_proj]"], "lora_target_modules", ["q_proj", "k_proj"]),
        (["--lr_scheduler_kwargs", "{a: 1e-6, b: {c: no}}"], "lr_scheduler_kwargs", {"a": 1e-6, "b": {"c": "no"}}),
        (["--report_to", "[tensorboard]"], "report_to", ["tensorboard"]),
    ],
)  # fmt: skip
def test_an_override_is_a_yaml_value_and_a_text_field_is_taken_to_the_letter(arguments, name, value, file):
    found = parse(file(minimal()), arguments).given[name]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--seed"], "--seed has no value"),
        (["--seed", "--learning_rate", "1"], "--seed has no value"),
        (["--seed", "1", "--seed", "1"], "--seed is given twice"),
        (["--output-dir", "a", "--output_dir=b"], "--output_dir is given twice"),
        (["seed", "1"], "Unexpected argument 'seed'"),
        (["-seed", "1"], "Unexpected argument '-seed'"),
        (["--seed", "1", "2"], "Unexpected argument '2'"),
        (["--learning_r", "1e-5"], "did you mean 'learning_rate'?"),
        (["--see", "1"], "did you mean 'seed'?"),
        (["--lora", "8"], "unknown key"),
        (["--warmup-ratio", "0.1"], "warmup_steps"),
        (["--", "1"], "unknown key"),
        (["--=1"], "unknown key"),
        (["--seed="], "seed: expected int, got None"),
        (["--seed", "'1'"], "seed: expected int, got '1'"),
        (["--seed", "2.7"], "seed: expected int, got 2.7"),
        (["--use_peft", "yes"], "use_peft: expected true or false, got 'yes'"),
        (["--learning_rate", "[1]"], "learning_rate: expected float, got [1]"),
        (["--learning_rate", "fast"], "learning_rate: expected float, got 'fast'"),
        (["--objective", "cos"], "objective: expected one of"),
        (["--seed", "[1"], "--seed: cannot read '[1'"),
        (["--model_config", "{a: &x 1, b: *x}"], "cannot read"),
        (["--model_config", "!!python/name:os.system"], "cannot read"),
        (["--lr_scheduler_kwargs", "{a: 1, a: 2}"], "cannot read"),
        (["--seed", "9" * 5000], "seed"),
        (["--learning_rate", "9" * 400], "learning_rate"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_an_override_that_cannot_be_right_is_refused(arguments, named, file):
    """Abbreviations among them. The last two: more digits than Python reads, and more than a float holds."""
    assert named in refused(parse, file(minimal()), arguments)


def test_report_to_none_is_nothing_to_report_to(file):
    """The word, as transformers documents it. As [None] it stops the trainer: 'None is not supported'."""
    assert parse(file(minimal("report_to: none\n"))).training.report_to == []
    assert parse(file(minimal()), ["--report_to", "none"]).training.report_to == []
    assert parse(file(minimal("report_to: null\n"))).training.report_to == []


# -- across fields --------------------------------------------------------------------------------------------------

LLAMA = "{model_type: llama, hidden_size: 32}"


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"model_config": LLAMA}, "exactly one of model_name_or_path"),
        ({"model_name_or_path": None}, "exactly one of model_name_or_path"),
        ({"model_name_or_path": "null"}, "exactly one of model_name_or_path"),
        ({"model_name_or_path": None, "model_config": "{hidden_size: 32}"}, "model_type"),
        ({"validation_data": "v.jsonl", "validation_rows": "5"}, "validation_data or validation_rows"),
        ({"validation_rows": "-1"}, "validation_rows=-1"),
        ({"train_data": None}, "train_data"),
        ({"train_data": "null"}, "train_data"),
        ({"output_dir": None}, "output_dir"),
        ({"output_dir": "null"}, "output_dir"),
        ({"jepa_weight": "-0.1"}, "jepa_weight=-0.1"),
        ({"jepa_weight": ".nan"}, "jepa_weight"),
        ({"temperature": "0"}, "temperature=0.0"),
        ({"num_predictor_tokens": "11"}, "num_predictor_tokens=11"),
        ({"num_predictor_tokens": "-1"}, "num_predictor_tokens=-1"),
        ({"diagnostics_pairs": "-1"}, "diagnostics_pairs=-1"),
        ({"max_length": "0"}, "max_length=0"),
        ({"packing": "true"}, "packing=True"),
        ({"chat_template_path": "a.txt"}, "chat_template_path"),
        ({"trust_remote_code": "true"}, "trust_remote_code"),
        ({"model_init_kwargs": "{trust_remote_code: true}"}, "model_init_kwargs"),
        ({"model_init_kwargs": "{use_safetensors: false}"}, "model_init_kwargs"),
        # transformers' and TRL's own checks
        ({"load_best_model_at_end": "true"}, "load_best_model_at_end"),
        ({"eval_strategy": "sometimes"}, "eval_strategy: expected one of no, steps, epoch, got 'sometimes'"),
        ({"lr_scheduler_type": "flat"}, "lr_scheduler_type: expected one of linear, cosine"),
        ({"optim": "adagram"}, "got 'adagram' (str); did you mean 'adagrad'?"),
        ({"warmup_steps": "-1"}, "warmup_steps"),
        ({"logging_steps": "0"}, "logging_steps"),
        ({"logging_steps": "2.5"}, "logging_steps"),
        ({"fp16": "true", "bf16": "true"}, "fp16"),
        ({"accelerator_config": "missing.json"}, "missing.json"),
        ({"accelerator_config": "{no_such_key: 1}"}, "no_such_key"),
        ({"lr_scheduler_kwargs": "'{broken'"}, ""),
        ({"logging_steps": ".inf"}, ""),
        ({"save_steps": ".inf"}, ""),
        ({"learning_rate": "9" * 400}, ""),
    ],
    ids=lambda value: ",".join(value)[:40] if isinstance(value, dict) else None,
)
def test_values_that_cannot_go_together_are_refused(changes, named, file):
    """Ours and, as UserError and in one line, those of the libraries."""
    assert named in refused(parse, file(minimal(**changes)))


@pytest.mark.parametrize(
    "changes",
    [
        {"model_name_or_path": None, "model_config": LLAMA},
        {"model_name_or_path": "null", "model_config": LLAMA},
        {"validation_data": "v.jsonl"},
        {"validation_data": "v.jsonl", "validation_rows": "0"},
        {"validation_rows": "5"},
        {"load_best_model_at_end": "true", "eval_strategy": "epoch", "save_strategy": "epoch"},
        {"num_predictor_tokens": "10", "jepa_weight": "0", "diagnostics_pairs": "0", "max_length": "1"},
    ],
    ids=lambda value: ",".join(value)[:40],
)
def test_the_neighbours_of_what_is_refused_are_accepted(changes, file):
    assert parse(file(minimal(**changes))).given.items() >= {"train_data": "rows.jsonl"}.items()


# -- one recipe from another ----------------------------------------------------------------------------------------


def test_a_recipe_that_extends_another_is_the_one_written_out_in_full(files):
    """Three files in three folders, every key of theirs in another place; only what it computes counts."""
    path = files(
        **{
            "model/task/run.yaml": "extends: ../_model.yaml\noutput_dir: runs/x\nseed: 3\n",
            "model/_model.yaml": "extends: ../_all.yaml\nmodel_name_or_path: some/model\nlearning_rate: 1\n",
            "_all.yaml": "train_data: rows.jsonl\nuse_cpu: true\nseed: 7\nlr_scheduler_kwargs: {a: 1, b: 2}\n",
            "full.yaml": minimal("lr_scheduler_kwargs: {a: 1, b: 2}\nlearning_rate: 1\nseed: 3\n"),
        }
    )
    ours, full = parse(path), parse(path.parent.parent.parent / "full.yaml")
    assert ours.given == full.given and "extends" not in ours.given
    assert json.dumps(ours.identity()) == json.dumps(full.identity())
    assert (ours.model, ours.data, ours.training) == (full.model, full.data, full.training)


def test_the_nearest_file_wins_and_the_command_line_before_all(files):
    """seed in three files, learning_rate in two, max_steps in the last one. A mapping is replaced as a whole."""
    path = files(
        **{
            "a.yaml": "extends: b.yaml\nseed: 1\n",
            "b.yaml": "extends: c.yaml\nseed: 2\nlearning_rate: 2\nlr_scheduler_kwargs: {b: 2}\n",
            "c.yaml": minimal("seed: 3\nlearning_rate: 3\nmax_steps: 3\nlr_scheduler_kwargs: {c: 3}\n"),
        }
    )
    expected = {"seed": 1, "learning_rate": 2.0, "max_steps": 3, "lr_scheduler_kwargs": {"b": 2}}
    assert parse(path).given == {**MINIMAL, "use_cpu": True, **expected}
    assert parse(path, ["--seed", "9", "--max_steps", "8"]).given.items() >= {"seed": 9, "max_steps": 8}.items()


def test_null_overrides_the_parent_with_null(files):
    """From a checkpoint to random weights; and an optional key back to nothing."""
    text = f"extends: b.yaml\nmodel_name_or_path: null\nmodel_config: {LLAMA}\nmax_length:\n"
    recipe = parse(files(**{"a.yaml": text, "b.yaml": minimal("max_length: 64\n")}))
    assert recipe.model.model_name_or_path is None and recipe.training.max_length is None
    assert recipe.given["model_name_or_path"] is recipe.given["max_length"] is None
    assert "temperature: expected float" in refused(
        parse, files(**{"a.yaml": "extends: b.yaml\ntemperature: null\n", "b.yaml": minimal("temperature: 1\n")})
    )


def test_a_parent_is_found_from_the_recipe_and_not_from_the_current_folder(files, tmp_path, monkeypatch):
    text = "extends: base.yaml\n"
    path = files(**{"a/x.yaml": text, "a/base.yaml": minimal("seed: 1\n"), "b/base.yaml": minimal("seed: 2\n")})
    monkeypatch.chdir(tmp_path / "b")
    assert parse(path).given["seed"] == parse("../a/x.yaml").given["seed"] == 1


def test_read_yaml_reads_one_file(files):
    path = files(**{"a.yaml": "extends: b.yaml\nseed: 1\n", "b.yaml": minimal()})
    assert read_yaml(path) == {"extends": "b.yaml", "seed": 1}


@pytest.mark.parametrize("guilty", ["a.yaml", "b.yaml", "c.yaml"])
def test_an_unknown_key_names_the_file_it_stands_in(guilty, files, tmp_path):
    """And no other; also when a child overrides it, for it says nothing there either."""
    texts = {"a.yaml": "extends: b.yaml\n", "b.yaml": "extends: c.yaml\n", "c.yaml": minimal()}
    texts[guilty] += "learnin_rate: 1\n"
    message = refused(parse, files(**texts))
    assert message.startswith(f"{tmp_path / guilty}: unknown key 'learnin_rate'; did you mean 'learning_rate'?")
    assert not any(str(tmp_path / name) in message for name in texts if name != guilty)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_circle_is_refused(length, files, tmp_path):
    """Of one file, of two, of three: the last one names the first again."""
    names = [f"{n}.yaml" for n in range(length)]
    texts = {name: minimal(f"extends: {after}\n") for name, after in zip(names, names[1:] + names[:1], strict=True)}
    message = refused(parse, files(**texts))
    assert message.startswith(f"{tmp_path / names[-1]} extends {tmp_path / names[0]}, ")
    assert "a circle has no values" in message


def test_a_circle_is_one_of_files_and_not_of_names(files, tmp_path):
    """x/../y/../x/a.yaml is x/a.yaml, and so may be a link: found at once, and not when the chain gets too long."""
    path = files(**{"x/a.yaml": minimal("extends: ../y/b.yaml\n"), "y/b.yaml": minimal("extends: ../x/a.yaml\n")})
    assert "a circle has no values" in refused(parse, path)
    path = files(**{"a.yaml": minimal("extends: link.yaml\n")})
    (tmp_path / "link.yaml").symlink_to(path)
    assert "a circle has no values" in refused(parse, path)


def test_two_children_may_share_a_parent_but_a_chain_has_an_end(files, tmp_path):
    """MAX_FILES are read; one more is refused, and names the file that is too many."""
    texts = {f"{n}.yaml": f"extends: {n + 1}.yaml\n" for n in range(MAX_FILES - 1)}
    path = files(**texts, **{f"{MAX_FILES - 1}.yaml": minimal("seed: 5\n")})
    assert parse(path).given["seed"] == 5
    files(**{f"{MAX_FILES - 1}.yaml": f"extends: {MAX_FILES}.yaml\n", f"{MAX_FILES}.yaml": minimal()})
    message = refused(parse, path)
    assert str(tmp_path / f"{MAX_FILES - 1}.yaml") in message and str(tmp_path / f"{MAX_FILES}.yaml") in message
    assert parse(tmp_path / "1.yaml").given == parse(tmp_path / f"{MAX_FILES}.yaml").given


@pytest.mark.parametrize("name", ["none.yaml", "folder.yaml", "../none.yaml", "no/such/none.yml", "x" * 300 + ".yaml"])
def test_a_parent_that_is_no_file_is_refused_with_both_names(name, files, tmp_path):
    path = files(**{"a.yaml": f"extends: {name}\n"})
    (tmp_path / "folder.yaml").mkdir()
    message = refused(parse, path)
    assert message.startswith(f"{path} extends {tmp_path / name}, which is not a file")


@pytest.mark.parametrize(
    "name",
    [
        "/{root}/b.yaml", "./b.yaml", "sub/../b.yaml", "sub/./b.yaml", "sub//b.yaml", "..", "../", "sub", "b",
        "b.yaml/", "~/b.yaml", "$HOME/b.yaml", "C:/b.yaml", "C:b.yaml", "file:///b.yaml", "https://a.b/c.yaml",
        "sub\\\\b.yaml", "b.json", "b.yaml.txt", ".yaml", "*.yaml", "", "b.yaml\\n", "b\\n.yaml", "b\\0.yaml",
    ],
)  # fmt: skip
def test_a_parent_is_a_plain_name_relative_to_the_recipe(name, files, tmp_path):
    """Every name below would lead to a file, or look as if it did; the files are there."""
    text = 'extends: "' + name.replace("{root}", str(tmp_path).lstrip("/")) + '"\n'
    path = files(**{"a.yaml": text, "b.yaml": minimal(), "sub/b.yaml": minimal(), "b.json": minimal(), "b": minimal()})
    message = refused(parse, path)
    assert message.startswith(f"{path} extends ") and "write one .yaml file relative to it" in message
    assert len(message) < len(str(path)) + 300


@pytest.mark.parametrize("value", ["null", "5", "true", "[b.yaml]", "{b.yaml: 1}", "", "[]"])
def test_a_parent_is_one_name(value, files):
    path = files(**{"a.yaml": f"extends: {value}\n", "b.yaml": minimal()})
    assert "write one .yaml file" in refused(parse, path)


def test_a_broken_parent_is_named(files, tmp_path):
    path = files(**{"a.yaml": "extends: b.yaml\n", "b.yaml": "- no mapping\n"})
    assert refused(parse, path).startswith(f"{tmp_path / 'b.yaml'} must hold")


@pytest.mark.parametrize("arguments", [["--extends", "b.yaml"], ["--extends=b.yaml"], ["--extends", "null"]])
def test_extends_is_no_key_and_no_override(arguments, files):
    """It says where keys come from. A field of that name would be shadowed by it."""
    assert EXTENDS not in recipe_fields(LM) and EXTENDS not in BOOKKEEPING
    path = files(**{"a.yaml": minimal(), "b.yaml": minimal()})
    assert "--extends: only a recipe file can extend another" in refused(parse, path, arguments)
    assert "`extends: FILE`" in describe_keys()


# -- the recipes we ship --------------------------------------------------------------------------------------------


@functools.cache
def resolved(path: Path) -> dict[str, Any]:
    """On a machine without a GPU, hence use_cpu."""
    return parse(path, ["--use_cpu", "true"]).given


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_recipe_parses(path):
    own = {"shared_dim"} if path.stem in ("image", "shapestream") else {"vl_model"}
    assert resolved(path).keys() >= {"train_data", "output_dir", "seed"} | (
        own if path.parent.name == "vl" else {"jepa_weight"}
    )


@pytest.mark.parametrize("path", [path for path in FILES if path not in RECIPES], ids=lambda path: str(path))
def test_a_file_with_an_underscore_is_a_parent_and_cannot_be_run(path):
    """It misses what a run needs, and somebody extends it."""
    said = refused(parse, path, ["--use_cpu", "true"])
    assert "sets no" in said
    parents = [(file.parent / read_yaml(file)[EXTENDS]).resolve() for file in FILES if EXTENDS in read_yaml(file)]
    assert path.resolve() in parents


def test_the_template_is_complete_by_itself():
    assert EXTENDS not in read_yaml(ROOT / "recipes" / "lm" / "template.yaml")


@pytest.mark.parametrize(
    "path", [path for path in RECIPES if path.stem.endswith("-baseline")], ids=lambda path: str(path.relative_to(ROOT))
)
def test_a_recipe_and_its_baseline_differ_in_the_weight_and_the_folder_alone(path):
    """Of a comparison of two arms nothing else may change; every key is compared, set or default."""
    twin = path.with_name(path.name.replace("-baseline", ""))
    assert twin in RECIPES
    ours, plain = resolved(twin), resolved(path)
    differing = {key for key in {*ours, *plain} if ours.get(key, "unset") != plain.get(key, "unset")}
    assert differing == {"jepa_weight", "output_dir"}
    assert plain["jepa_weight"] == 0 and ours["jepa_weight"] > 0


def test_there_are_recipes_and_no_two_share_a_folder():
    assert len(RECIPES) >= 30 and sum(path.stem.endswith("-baseline") for path in RECIPES) >= 12
    folders = [resolved(path)["output_dir"] for path in RECIPES]
    assert len(set(folders)) == len(folders)


# -- identity -------------------------------------------------------------------------------------------------------


def test_identity_is_what_a_run_computes_and_plain_json(file):
    """Bookkeeping is left out, the rest is sorted and survives JSON unchanged."""
    text = minimal("seed: 3\nrun_name: a\nlogging_steps: 7\nsave_total_limit: 2\nlr_scheduler_kwargs: {min_lr: 1e-6}\n")
    identity = parse(file(text)).identity()
    assert identity == {
        "lr_scheduler_kwargs": {"min_lr": 1e-6},
        "model_name_or_path": "some/model",
        "seed": 3,
        "use_cpu": True,
    }
    assert list(identity) == sorted(identity)
    assert json.loads(json.dumps(identity, allow_nan=False)) == identity


def test_identity_does_not_depend_on_where_or_in_which_order_a_value_is_given(file):
    in_file = parse(file(minimal("seed: 3\nlearning_rate: 1\n"))).identity()
    on_the_line = parse(file(minimal("learning_rate: 5\n")), ["--seed=3", "--learning-rate", "1.0"]).identity()
    assert in_file == on_the_line and json.dumps(in_file) == json.dumps(on_the_line)
    assert in_file != parse(file(minimal("seed: 4\nlearning_rate: 1\n"))).identity()


def test_bookkeeping_names_fields_and_none_that_our_loss_reads(file):
    """A misspelt name would silently make a run impossible to resume with another logging interval."""
    assert recipe_fields(LM).keys() | recipe_fields(VL).keys() >= BOOKKEEPING
    assert recipe_fields(LM).keys() >= BOOKKEEPING - {"feature_cache"}
    own = {name for group in keys_of("lm") for name in group.__annotations__}
    by_hash = {"train_data", "validation_data", "columns"}  # of the rows, under our names
    limits = {"max_rows", "max_row_bytes", "max_row_pairs"}  # they refuse rows and change none
    assert own & BOOKKEEPING == {*by_hash, *limits, "stop_after"}
    assert not {"seed", "learning_rate", "per_device_train_batch_size", "max_steps", "optim"} & BOOKKEEPING


def test_the_configuration_does_not_share_what_identity_shows(file):
    """The libraries fill in dictionaries they are given; the record of what was asked for must not change with it."""
    recipe = parse(file(minimal("accelerator_config: {split_batches: true}\nlr_scheduler_kwargs: {a: 1}\n")))
    assert recipe.given["accelerator_config"] == {"split_batches": True}
    assert not isinstance(recipe.training.accelerator_config, dict), "nothing was filled in: the test shows nothing"


# -- anything at all ------------------------------------------------------------------------------------------------

SCALARS = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=12),
    st.text("[]{}:,-?&*!|>'\"%@`# ~\n0123456789.e+ax", max_size=12),
    st.integers(-(2**70), 2**70).map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.sampled_from(["true", "no", "null", "none", "", "[]", "{}", "[a]", "{a: 1}", "1e400", "-1", "0", "0.5"]),
)


def parses_or_refuses(function, *arguments):
    try:
        return function(*arguments)
    except UserError as error:
        assert "\n" not in str(error)
        return None


@given(st.one_of(SCALARS, st.binary(max_size=40), st.lists(SCALARS, max_size=6).map("\n".join)))
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_any_file_is_a_mapping_or_a_user_error(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    found = parses_or_refuses(read_yaml, path)
    assert found is None or (isinstance(found, dict) and all(isinstance(key, str) for key in found))


@given(st.one_of(SCALARS, st.text("./ab", max_size=8).map(lambda text: f"{text}.yaml")))
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_any_parent_is_found_or_a_user_error(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(minimal(f"extends: {text}\n"))
    (path.parent / "b.yaml").write_text("seed: 3\n")
    recipe = parses_or_refuses(parse, path)
    assert recipe is None or recipe.given["seed"] == 3


@given(st.sampled_from(sorted(recipe_fields(LM))), SCALARS, st.booleans())
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_any_value_of_any_field_is_taken_or_a_user_error(tmp_path_factory, name, text, in_file):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(minimal(**{name: text} if in_file else {}))
    recipe = parses_or_refuses(parse, path, [] if in_file else [f"--{name}={text}"])
    if recipe is not None:
        json.dumps(recipe.identity())
        assert isinstance(recipe.training, LLMJEPAConfig)
