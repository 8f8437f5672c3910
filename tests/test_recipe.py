"""Claims about recipes: what YAML and the command line may say, and that everything else is one line of UserError."""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import time
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jepa.config import LLMJEPAConfig
from llm_jepa.errors import UserError
from llm_jepa.recipe import (
    BOOKKEEPING,
    GROUPS,
    MAX_BYTES,
    MAX_DEPTH,
    RENAMED,
    coerce,
    describe_keys,
    parse,
    read_yaml,
    recipe_fields,
)

ROOT = Path(__file__).parent.parent
RECIPES = sorted(ROOT.glob("recipes/**/*.y*ml"))
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


def minimal(text: str = "", **changes: str | None) -> str:
    """A recipe that parses, with lines added, and values replaced or (None) left out."""
    values = {**MINIMAL, **changes}
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
        ("", "found NoneType"),
        ("# a comment", "found NoneType"),
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


@pytest.mark.parametrize("old", sorted(RENAMED))
def test_names_that_people_bring_along_point_to_their_successor(old, file):
    """The successor is a key a recipe knows, except for what became something else than a key; the old one is not."""
    assert old not in recipe_fields()
    message = refused(parse, file(minimal(f"{old}: 1\n")))
    assert f"unknown key {old!r}: use {RENAMED[old]}" in message
    if old not in ("overwrite_output_dir", "logging_dir"):
        assert RENAMED[old].split()[0].rstrip(":,") in recipe_fields()


def test_help_describes_every_key_of_ours():
    text = describe_keys()
    assert all(f"\n  {name} (" in text for group in GROUPS for name in group.__annotations__)


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
    ("yes", bool, "expected bool, got 'yes' (str)"),
    (1, bool, "expected bool, got 1 (int)"),
    (5, str, "expected str, got 5 (int)"),
    (None, str, "expected str, got None (NoneType)"),
    (5, str | None, "expected str or null, got 5 (int)"),
    ("c", Literal["a", "b"], "expected one of a, b, got 'c' (str)"),
    (0, Literal[False], "expected one of False, got 0 (int)"),
    ("blue", Colour, "expected one of red, got 'blue' (str)"),
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
    assert refused(coerce, "key", value, hint) == f"key: {message}."


@pytest.mark.parametrize(
    "line, named",
    [
        ("seed: 2.7", "seed: expected int"),
        ("seed: 1e3", "seed: expected int"),
        ("learning_rate: [1e-5]", "learning_rate: expected float"),
        ("learning_rate: '1e-5'", "learning_rate: expected float"),
        ("learning_rate: true", "learning_rate: expected float"),
        ("use_peft: 'yes'", "use_peft: expected bool"),
        ("use_peft: yes", "use_peft: expected bool"),
        ("use_peft: 1", "use_peft: expected bool"),
        ("model_revision: 123", "model_revision: expected str"),
        ("dtype: float8", "expected one of float32, bfloat16, float16"),
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


@pytest.mark.parametrize("name", sorted(recipe_fields()))
def test_every_default_is_a_value_a_recipe_may_give(name):
    """Fails where a library changes a field's type to one that `coerce` does not know."""
    field, hint = recipe_fields()[name]
    if field.default is not dataclasses.MISSING:
        assert coerce(name, field.default, hint) == field.default
    elif field.default_factory is not dataclasses.MISSING:
        assert coerce(name, field.default_factory(), hint) == field.default_factory()
    else:
        assert name == "train_data", "the one required field"


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
        (["--lora_target_modules", "q_proj"], "lora_target_modules", "q_proj"),
        (["--lora_target_modules", "[q_proj, v_proj]"], "lora_target_modules", ["q_proj", "v_proj"]),
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
        (["--use_peft", "yes"], "use_peft: expected bool, got 'yes'"),
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
        ({"eval_strategy": "sometimes"}, "sometimes is not a valid IntervalStrategy"),
        ({"lr_scheduler_type": "flat"}, "flat is not a valid SchedulerType"),
        ({"optim": "adagram"}, "adagram is not a valid OptimizerNames"),
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


# -- the recipes we ship --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_recipe_parses(path):
    """On a machine without a GPU, hence use_cpu."""
    recipe = parse(path, ["--use_cpu", "true"])
    assert recipe.given.keys() >= {"train_data", "output_dir", "jepa_weight", "seed"}


@pytest.mark.parametrize(
    "path", [path for path in RECIPES if path.stem.endswith("-baseline")], ids=lambda path: path.stem
)
def test_a_recipe_and_its_baseline_differ_in_the_weight_and_the_folder_alone(path):
    """Of a comparison of two arms nothing else may change; every key is compared, set or default."""
    twin = path.with_name(path.name.replace("-baseline", ""))
    assert twin in RECIPES
    ours, plain = read_yaml(twin), read_yaml(path)
    differing = {key for key in {*ours, *plain} if ours.get(key, "unset") != plain.get(key, "unset")}
    assert differing == {"jepa_weight", "output_dir"}
    assert plain["jepa_weight"] == 0 and ours["jepa_weight"] > 0


def test_there_are_recipes_and_no_two_share_a_folder():
    assert len(RECIPES) >= 3 and any(path.stem.endswith("-baseline") for path in RECIPES)
    folders = [read_yaml(path)["output_dir"] for path in RECIPES]
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
    assert recipe_fields().keys() >= BOOKKEEPING
    own = {name for group in GROUPS for name in group.__annotations__}
    assert own & BOOKKEEPING == {"train_data", "validation_data"}, "these two are compared by their hash"
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


@given(st.sampled_from(sorted(recipe_fields())), SCALARS, st.booleans())
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_any_value_of_any_field_is_taken_or_a_user_error(tmp_path_factory, name, text, in_file):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(minimal(**{name: text} if in_file else {}))
    recipe = parses_or_refuses(parse, path, [] if in_file else [f"--{name}={text}"])
    if recipe is not None:
        json.dumps(recipe.identity())
        assert isinstance(recipe.training, LLMJEPAConfig)
