"""Every option of every command and every recipe key, with values that it cannot have.

The options are read from the parsers, and the keys from the dataclasses, so a new one is tried without being named
here. It must be refused in one line, or accepted: nothing may be a traceback, or never end.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

from llm_jepa.core.recipe import recipe_fields
from llm_jepa.families import FAMILIES, commands_of, groups_of

from .inputs import Command, Input
from .tiny import LM, VL, lm_data, trained, vl_data, write_recipe, write_rows

VALUES = {
    "0": "0", "-1": "-1", "nan": ".nan", "inf": ".inf", "-inf": "-.inf", "1e300": "1e300", "1e-300": "1e-300",
    "10^30": "1" + "0" * 30, "nothing": "", "a word": "a b", "a list": "[1, -1]", "a mapping": "{a: 1}",
    "half a character": "\udcff", "true": "true",
}  # fmt: skip
# Keys that say where something is, or that reach a service: a folder named 0 is a folder.
PLACES = {"output_dir", "train_data", "validation_data", "resume_from_checkpoint", "feature_cache", "run_name"}
COMMANDS = (
    "eval.run", "eval.robustness", "eval.report", "eval.quickstart", "eval.pretrained", "eval.cost.step_cost.command",
    "eval.cost.throughput", "eval.cost.vl_cost", "eval.experiments.tiny_nl_rx", "eval.experiments.replication.__main__",
    "eval.experiments.two_jobs.__main__", "eval.retrieval",
    "eval.experiments.paraphrases.__main__", "eval.vl.shapestream", "eval.vl.selective_decoding", "eval.vl.real_clips",
    "eval.vl.coco_photos", "eval.faults.command", "eval.faults.soak", "eval.cost.save_cost",
    "llm_jepa.synthetic.nl_rx", "llm_jepa.synthetic.shapestream.__main__",
)  # fmt: skip


def inputs(shared: Path) -> Iterator[Input]:
    """All of them: thousands."""
    yield from keys(shared)
    yield from options(shared)


def keys(shared: Path) -> Iterator[Input]:
    """Every recipe key with every value."""
    for family, recipe, data in (("lm", LM, lm_data(shared)), ("vl", VL, vl_data(shared))):
        for key in recipe_fields(groups_of(family)):
            if key in PLACES:
                continue
            for name, text in VALUES.items():
                yield Input(f"{family} {key}: {name}", partial(_train, recipe, data, f"--{key}={text}"), either=True)


def options(shared: Path) -> Iterator[Input]:
    """Every option of every command with every value."""
    lm, vl = trained(shared / "lm", LM, lm_data(shared)), trained(shared / "vl", VL, vl_data(shared))
    rows = str(shared / "rows.jsonl")
    working = {
        "generate": [str(lm), "--prompt", "name"],
        "embed": [str(lm), "--input", rows, "--output", "o.safetensors"],
        "export": [str(lm), "exported", "--to", "transformers"],
        "push": [str(lm), "user/name", "--private"],
        "watch": [str(vl), str(shared / "0.png"), "--labels", "a,b"],
        "train-decoder": [str(vl), "--texts", str(write_rows(shared / "texts.jsonl", [{"text": "a"}, {"text": "b"}]))],
    }
    for family in FAMILIES:
        for verb, (add_arguments, _) in commands_of(family).VERBS.items():
            parser = argparse.ArgumentParser()
            add_arguments(parser)
            for option, text in _hostile(parser):
                words = [verb, *_without(option, working[verb]), f"{option}={text}"]
                yield Input(f"{verb} {option}: {_name(text)}", partial(_as_they_are, words), either=True)
    for option in ("--num_processes", "--launch"):
        for name, text in VALUES.items():
            yield Input(
                f"train {option}: {name}",
                partial(_train, LM, rows, f"{option}={text}", "--dry-run"),
                either=True,
            )
    for command in COMMANDS:
        for option, text in _hostile(_parser_of(command)):
            if text not in ("0", "true", "[1, -1]"):  # a number that works would start hours of work
                yield Input(
                    f"{command} {option}: {_name(text)}",
                    partial(_parse, command, f"{option}={text}"),
                    either=True,
                )


def _train(recipe: Mapping[str, Any], data: Path | str, *rest: Any) -> Command:
    *words, folder = rest
    return ["train", write_recipe(folder, recipe, data), *words]


def _as_they_are(words: list[str], folder: Path) -> Command:
    return words


def _hostile(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    """(option, value) of every option that takes a value."""
    for action in parser._actions:
        if action.option_strings and action.nargs != 0:
            for text in VALUES.values():
                yield action.option_strings[-1], text


def _name(text: str) -> str:
    return next(name for name, value in VALUES.items() if value == text)


def _without(option: str, words: list[str]) -> list[str]:
    """The words without this option and its value."""
    if option not in words:
        return words
    at = words.index(option)
    return words[:at] + words[at + 2 :]


class _Parsed(BaseException):
    """Ends a command once its parser has seen all options."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def _parser_of(command: str) -> argparse.ArgumentParser:
    """The parser that a command makes."""

    def stop(parser: argparse.ArgumentParser, *_: Any) -> None:
        raise _Parsed(parser)

    with patch.object(argparse.ArgumentParser, "parse_args", stop):
        try:
            import_module(command).main([])
        except _Parsed as end:
            return end.parser
    raise RuntimeError(f"{command} parses nothing")


def _parse(command: str, word: str, folder: Path) -> Command:
    """Runs the parser of a command alone, because an evaluation may take hours. It must refuse all but texts."""
    parser = _parser_of(command)
    for action in parser._actions:
        action.required = False

    def parse() -> None:
        options = vars(parser.parse_known_args([word])[0])
        for value in options.values():
            if isinstance(value, float) and not abs(value) <= 1e9 or isinstance(value, int) and abs(value) >= 2**63:
                raise AssertionError(f"{word} is accepted as {value}")

    return parse
