"""The tasks: where the questions come from, how an answer is graded, what was published and why not to trust it.

A group is one meaning in k wordings with one gold answer; a task with one wording has groups of one. Data is a local
file, a folder, or a Hub id. Rows in the formats of training (`messages`, or prompt and completion: what the authors of
LLM-JEPA ship) are taken as they are; from the raw columns of a Hub data set, the same prompts are built.
"""

from __future__ import annotations

import atexit
import difflib
import functools
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llm_jepa import UserError
from llm_jepa.core.files import file_sha256
from llm_jepa.lm.inference import Prompt
from llm_jepa.lm.loading import FILE_READERS, data_sha256, read_rows
from llm_jepa.lm.views import as_example

from .. import graders
from ..graders import Grade
from ..graders.regexes import RegexError, language
from ..graders.sql import Databases
from . import nl_rx


@dataclass(frozen=True)
class Group:
    """One meaning: its wordings, and the answer that all of them ask for. With `choices` in `extra`, the answer is the
    likeliest of these; else it is generated."""

    id: str
    prompts: tuple[Prompt, ...]
    wordings: tuple[str, ...]  # a name for each prompt
    answer: str
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Data:
    groups: tuple[Group, ...]
    sha256: dict[str, str]  # of each file read; of the rows, for a Hub id
    dropped: int = 0  # left out because they stand in the training data
    unusable: int = 0  # left out because their gold answer cannot be judged against; warned of


@dataclass(frozen=True)
class Task:
    """`load` and `grade` raise UserError for data that cannot be used."""

    name: str
    load: Callable[[str], Data]
    grade: Callable[[Group, str, bool], Grade]
    metric: str  # the primary one
    max_new_tokens: int
    published: str  # figure and source, for orientation
    trap: str  # of the evaluator that made it


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or what there is."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}."


def task_named(name: str) -> Task:
    if name not in TASKS:
        raise UserError(f"There is no task {name!r}{nearest(name, TASKS)}")
    return TASKS[name]


# -- rows -------------------------------------------------------------------------------------------------------------


def _read(source: str, name: str, split: str, config: str | None = None) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """(rows, hashes) of a file, of the test file in a folder, or of a Hub data set."""
    path = Path(source)
    if path.is_dir():
        stems = (f"{name}_{split}", f"{name}_test", split, "test", name)
        found = [path / f"{stem}{suffix}" for stem in stems for suffix in FILE_READERS]
        path = next((candidate for candidate in found if candidate.is_file()), path)
        if path.is_dir():
            raise UserError(
                f"{source} holds no {name} data: looked for {', '.join(dict.fromkeys(stems))} as "
                f"{', '.join(FILE_READERS)}; name the file itself if it has another name."
            )
    elif path.suffix not in FILE_READERS and (path.is_absolute() or source.startswith(".") or source.count("/") != 1):
        raise UserError(f"There is no data at {source}; give a file, a folder, or a Hub id such as owner/name.")
    rows = read_rows(str(path), split=split, config=config)
    return list(rows), {path.name: file_sha256(path)} if path.is_file() else {source: str(data_sha256(rows))}


def _questions(
    source: str,
    name: str,
    *,
    system: str,
    columns: Sequence[str],
    ask: Callable[[dict[str, Any]], tuple[str, str]],
    extra: Callable[[str, str], dict[str, Any]],
    split: str = "test",
    config: str | None = None,
) -> Data:
    """Groups of one. `ask` makes (user turn, answer) of the raw columns, `extra` reads (user turn, answer) and raises
    ValueError for an answer that cannot be one."""
    rows, hashes = _read(source, name, split, config)
    groups = []
    for index, row in enumerate(rows):
        where = f"{next(iter(hashes))}, row {index + 1}"
        example = None
        if row.get("messages") is not None or {"prompt", "completion"} <= set(row):
            example = as_example(row, where)
        elif missing := [column for column in columns if row.get(column) is None]:
            raise UserError(
                f"{where} has the columns {sorted(row)}, {name} needs 'messages' or {', '.join(columns)} "
                f"(missing: {', '.join(missing)})."
            )
        try:
            if example is not None:
                prompt: Prompt = example.prompt
                answer = last_text(example.completion)
            else:
                user, answer = ask(row)
                prompt = [{"role": "system", "content": system}, {"role": "user", "content": user}]
            more = extra(last_text(prompt), answer)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None
        groups.append(Group(str(index), (prompt,), ("0",), answer, more))
    return Data(tuple(groups), hashes)


def last_text(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def _one_of(choices: tuple[str, ...]) -> Callable[[str, str], dict[str, Any]]:
    def extra(_: str, answer: str) -> dict[str, Any]:
        if answer not in choices:
            raise ValueError(f"the answer {answer!r} is none of the choices{nearest(answer, choices)}")
        return {"choices": choices}

    return extra


def _grade_choice(group: Group, text: str, _: bool) -> Grade:
    return Grade({"accuracy": float(text == group.answer)}, text)


# -- NL-RX ------------------------------------------------------------------------------------------------------------


def load_nl_rx(source: str) -> Data:
    """Two wordings a group. `extra`: line, and degenerate (the gold regex matches no line, or every line)."""
    items, dropped, files = nl_rx.load(source)
    if not items:
        raise UserError("No item is left to score; every line stands in train.")
    groups = []
    for item in items:
        try:
            gold = language(item.answer)
            degenerate = gold.is_empty or gold.is_everything
        except RegexError as error:
            if error.status == "invalid":
                raise UserError(f"{files[0].name}, line {item.line + 1}: the gold is no regex: {error}") from None
            degenerate = False  # too large an automaton: certainly not one of these two
        prompts = (list(item.original), list(item.paraphrase))
        extra = {"line": item.line, "degenerate": degenerate}
        groups.append(Group(str(item.line), prompts, nl_rx.WORDINGS, item.answer, extra))
    return Data(tuple(groups), {path.name: file_sha256(path) for path in files}, dropped)


def _grade_nl_rx(group: Group, text: str, stopped: bool) -> Grade:
    return graders.regex(group.answer, text, stopped, degenerate=group.extra["degenerate"])


# -- GSM8K ------------------------------------------------------------------------------------------------------------


def load_gsm8k(source: str) -> Data:
    def check(_: str, answer: str) -> dict[str, Any]:
        if graders.marked_number(answer) is None:
            raise ValueError("the gold solution has no number after '####'")
        return {}

    return _questions(
        source,
        "gsm8k",
        system="Answer the math question, show steps.",
        columns=("question", "answer"),
        ask=lambda row: (row["question"], row["answer"]),
        extra=check,
        config="main",
    )


def _grade_gsm8k(group: Group, text: str, stopped: bool) -> Grade:
    return graders.gsm8k(group.answer, text, stopped)


# -- Spider -----------------------------------------------------------------------------------------------------------

_DB_ID = re.compile(r"For db_id:\[(.+?)\]")


def load_spider(source: str) -> Data:
    """A folder with the questions (or the file in it) and Spider's `database` folder. `extra`: db_id, databases.

    Lines whose gold query fails are left out (two of Spider's 8,034 are no valid SQLite: ORDER BY before INTERSECT).
    """
    root = (Path(source).parent if Path(source).is_file() else Path(source)) / "database"
    if not root.is_dir():
        raise UserError(
            f"{root.parent} has no folder `database` with Spider's SQLite files; without them no query can run. "
            "Unpack spider_data.zip (yale-lily.github.io/spider) there."
        )

    def extra(user: str, gold: str) -> dict[str, Any]:
        match = _DB_ID.search(user)
        if match is None:
            raise ValueError("the question names no database (`For db_id:[...]`)")
        if not (root / match[1] / f"{match[1]}.sqlite").is_file():
            there = sorted(path.name for path in root.iterdir())[:1000]
            near = difflib.get_close_matches(match[1], there, n=1)
            raise ValueError(f"no database {match[1]!r} in {root.name}" + (f"; is it {near[0]!r}?" if near else ""))
        result = _databases(str(root)).run(match[1], gold)
        fault = "" if result.status == "ok" else f"on {match[1]}, {result.status}: {result.detail}"
        return {"db_id": match[1], "databases": str(root), "fault": fault}

    data = _questions(
        source,
        "spider",
        system="Convert natural language to SQL.",
        columns=("db_id", "question", "query"),
        ask=lambda row: (f"For db_id:[{row['db_id']}]\n\n{row['question']}", row["query"]),
        extra=extra,
        split="dev",
    )
    faults = [group.extra["fault"] for group in data.groups if group.extra["fault"]]
    if len(faults) == len(data.groups):
        raise UserError(f"No gold query of {source} runs ({faults[0]}); are these the databases of these questions?")
    if faults:
        said = f"{len(faults)} of {len(data.groups)} gold queries fail and are left out; the first {faults[0]}"
        warnings.warn(said, stacklevel=2)
    kept = tuple(group for group in data.groups if not group.extra["fault"])
    return replace(data, groups=kept, unusable=len(faults))


@functools.cache
def _databases(root: str) -> Databases:
    """One child process a folder runs the queries, until we exit."""
    databases = Databases(root)
    atexit.register(databases.close)
    return databases


def _grade_spider(group: Group, text: str, stopped: bool) -> Grade:
    return graders.sql_execution(
        _databases(group.extra["databases"]).grade(group.extra["db_id"], group.answer, text), stopped
    )


# -- NQ-Open ----------------------------------------------------------------------------------------------------------


def load_nq_open(source: str) -> Data:
    """`extra["alternatives"]`: the answers that count."""

    def ask(row: dict[str, Any]) -> tuple[str, str]:
        answer = row["answer"]
        return row["question"], answer if isinstance(answer, str) else "; ".join(answer)

    def extra(_: str, answer: str) -> dict[str, Any]:
        alternatives = answer.split("; ")
        if not any(map(graders.normalized, alternatives)):
            raise ValueError(f"the answer {answer!r} has no word, so nothing could equal it")
        return {"alternatives": alternatives}

    return _questions(
        source,
        "nq_open",
        system="Answer the question below.",
        columns=("question", "answer"),
        ask=ask,
        extra=extra,
        split="validation",
    )


def _grade_nq_open(group: Group, text: str, stopped: bool) -> Grade:
    return graders.open_answer(group.extra["alternatives"], text, stopped)


# -- choices ----------------------------------------------------------------------------------------------------------


def load_hellaswag(source: str) -> Data:
    def ask(row: dict[str, Any]) -> tuple[str, str]:
        label = str(row["label"])
        if label not in ("0", "1", "2", "3") or len(row["endings"]) != 4:
            raise ValueError(f"the label is {label!r} with {len(row['endings'])} endings; take the validation split.")
        endings = "\n".join(f"{letter}) {ending}" for letter, ending in zip("ABCD", row["endings"], strict=True))
        return f"{row['ctx']}\n{endings}", "ABCD"[int(label)]

    return _questions(
        source,
        "hellaswag",
        system="Which one of A), B), C), or D) is the best ending for the context? Answer A, B, C, or D.",
        columns=("ctx", "endings", "label"),
        ask=ask,
        extra=_one_of(("A", "B", "C", "D")),
        split="validation",
    )


def load_rotten_tomatoes(source: str) -> Data:
    return _questions(
        source,
        "rotten_tomatoes",
        system="Determine whether the comment is positive or negative",
        columns=("text", "label"),
        ask=lambda row: (row["text"], _label(row["label"], ("Bad", "Good"))),
        extra=_one_of(("Good", "Bad")),
    )


def load_paws(source: str) -> Data:
    return _questions(
        source,
        "paws",
        system="Do the two sentences mean the same? Answer Yes or No.",
        columns=("sentence1", "sentence2", "label"),
        ask=lambda row: (f"1) {row['sentence1']}\n2) {row['sentence2']}", _label(row["label"], ("No", "Yes"))),
        extra=_one_of(("Yes", "No")),
        config="labeled_final",
    )


def _label(value: Any, names: tuple[str, ...]) -> str:
    """The name of class `value`; a value of another kind stays, to be refused by name."""
    return names[int(value)] if str(value) in map(str, range(len(names))) else str(value)


# -- groups of a user -------------------------------------------------------------------------------------------------

KEYS = ("id", "prompts", "answer", "wordings", "choices", "grader")


def load_groups(source: str, name: str = "groups", read: Callable[[str], str] = lambda text: text) -> Data:
    """Rows {"id", "prompts", "answer"}, optionally "wordings" (names of the prompts), "choices" (the answer is the
    likeliest) or "grader" (of `graders.BY_NAME`; else exact)."""
    rows, hashes = _read(source, name, "test")
    groups: list[Group] = []
    seen: dict[str, int] = {}
    for index, raw in enumerate(rows):
        row = {key: value for key, value in raw.items() if value is not None}  # a key that only other rows have
        where = f"{next(iter(hashes))}, row {index + 1}"
        unknown = [key for key in row if key not in KEYS]
        if unknown:
            raise UserError(f"{where}: unknown key {unknown[0]!r}{nearest(unknown[0], KEYS)}")
        missing = [key for key in KEYS[:3] if row.get(key) in (None, "", [])]
        if missing:
            raise UserError(f"{where} has no {' and no '.join(missing)}; a group is {{'id', 'prompts', 'answer'}}.")
        prompts = row["prompts"]
        if not isinstance(prompts, list) or not all(map(_is_prompt, prompts)):
            raise UserError(f"{where}: 'prompts' must be a list of texts, or of lists of messages, none of them empty.")
        names = tuple(map(str, row.get("wordings", range(len(prompts)))))
        if len(names) != len(prompts) or len(set(names)) < len(names):
            raise UserError(f"{where}: 'wordings' must give each of the {len(prompts)} prompts a name of its own.")
        answer, choices, grader = str(row["answer"]), row.get("choices"), row.get("grader")
        extra: dict[str, Any] = {}
        if choices is not None:
            if grader is not None:
                raise UserError(f"{where} has 'choices' and 'grader'; a choice is right if it is the answer.")
            try:
                extra = _one_of(tuple(map(str, choices)))("", answer)
            except ValueError as error:
                raise UserError(f"{where}: {error}") from None
        elif grader is not None:
            if grader not in graders.BY_NAME:
                raise UserError(f"{where}: there is no grader {grader!r}{nearest(str(grader), graders.BY_NAME)}")
            if grader == "regex":
                _check_regex(answer, where)
            if grader == "number" and graders.number(answer) is None:
                raise UserError(f"{where}: the answer {answer!r} holds no number.")
            extra = {"grader": grader}
        if str(row["id"]) in seen:
            raise UserError(f"{where}: the id {row['id']!r} is that of row {seen[str(row['id'])]}; ids must be unique.")
        seen[str(row["id"])] = index + 1
        try:
            texts = tuple(read(prompt) if isinstance(prompt, str) else prompt for prompt in prompts)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None
        groups.append(Group(str(row["id"]), texts, names, answer, extra))
    return Data(tuple(groups), hashes)


def _is_prompt(prompt: Any) -> bool:
    if isinstance(prompt, str):
        return bool(prompt.strip())
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(m, dict) and m.get("content") for m in prompt)


def _check_regex(answer: str, where: str) -> None:
    try:
        language(answer)
    except RegexError as error:
        if error.status == "invalid":
            raise UserError(f"{where}: the answer is no regex: {error}") from None


def _grade_group(group: Group, text: str, stopped: bool) -> Grade:
    right, key = graders.BY_NAME[group.extra.get("grader", "exact")](group.answer, text)
    return Grade({"correct": float(right), **graders.written(group.answer, text, stopped)}, key)


def load_pararel(source: str) -> Data:
    """`load_groups` on cloze texts; a final [MASK] or [Y] (ParaRel's object slot) marks where the answer goes."""

    def up_to_the_slot(text: str) -> str:
        before, slot, after = re.split(r"(\[MASK\]|\[Y\]|$)", text, maxsplit=1)
        if after.strip(" .?!"):
            raise ValueError(
                f"{slot} is not at the end of {text!r}: a left-to-right model cannot look behind it; reword the prompt."
            )
        return before.rstrip()

    return load_groups(source, "pararel", up_to_the_slot)


def _grade_pararel(group: Group, text: str, stopped: bool) -> Grade:
    right, key = graders.starts_with(group.answer, text)
    return Grade({"correct": float(right), **graders.written(group.answer, text, stopped)}, key)


# ---------------------------------------------------------------------------------------------------------------------

LLM_JEPA = "LLM-JEPA (arXiv:2509.14252"
TASKS = {
    task.name: task
    for task in (
        Task(
            "nl_rx",
            load_nl_rx,
            _grade_nl_rx,
            metric="equivalent",
            max_new_tokens=64,
            published=f"{LLM_JEPA}, tables 12 and 13), Llama-3.2-1B, exact match on all 2,000 lines: "
            "synth 57.29 +- 5.32 (SFT), 71.46 +- 1.34; turk 22.49 +- 1.91 (SFT), 30.94 +- 1.13",
            trap="39 synth test pairs stand in train; exact match calls equal languages different and mixes what is "
            "written with where it stops",
        ),
        Task(
            "gsm8k",
            load_gsm8k,
            _grade_gsm8k,
            metric="number",
            max_new_tokens=512,
            published=f"{LLM_JEPA}, table 13), Llama-3.2-1B: 32.36 +- 0.58 (SFT), 36.36 +- 0.20",
            trap="cuts at 128 new tokens (22 % of the gold solutions have more than 384 characters), then compares "
            "strings: 1,000 and 1000 differ",
        ),
        Task(
            "spider",
            load_spider,
            _grade_spider,
            metric="execution",
            max_new_tokens=128,
            published=f"{LLM_JEPA}, table 13), Llama-3.2-1B, its own random split: 47.52 +- 2.44 (SFT), 50.55 +- 2.08",
            trap="compares the sqlite3 program's output and ignores its errors: a query that fails equals an empty "
            "result, and without the databases everything is right; row order always counts; queries may write; "
            "72 % of its test queries stand in train",
        ),
        Task(
            "nq_open",
            load_nq_open,
            _grade_nq_open,
            metric="equal",
            max_new_tokens=64,
            published=f"{LLM_JEPA}, table 13), Llama-3.2-1B: 20.12 +- 0.41 (SFT), 21.59 +- 0.40",
            trap="right if a piece of the answer stands in the gold string (the paper says the reverse): an empty "
            "answer is right, and so is one letter",
        ),
        Task(
            "hellaswag",
            load_hellaswag,
            _grade_choice,
            metric="accuracy",
            max_new_tokens=1,
            published=f"{LLM_JEPA}, table 13), Llama-3.2-1B: 69.40 +- 0.99 (SFT), 70.51 +- 1.20; the same models in "
            "arXiv:2602.22617, fig. 7: 27.93 and 35.22",
            trap="cuts the prompt to 128 tokens from the right by default: the endings, and often the assistant's "
            "header, are gone",
        ),
        Task(
            "rotten_tomatoes",
            load_rotten_tomatoes,
            _grade_choice,
            metric="accuracy",
            max_new_tokens=1,
            published=f"{LLM_JEPA}, table 9), pretrained on paraphrases, then tuned: 56.57 +- 1.66, 57.76 +- 1.33",
            trap="startswith on generated text: `Good` and `Goodness` are right, and chance is not 50 %, as the model "
            "may say anything",
        ),
        Task(
            "paws",
            load_paws,
            _grade_choice,
            metric="accuracy",
            max_new_tokens=1,
            published="none with LLM-JEPA; PAWS (arXiv:1904.01130): 85 % with PAWS in the training data, below 40 % "
            "without",
            trap="classes are unequal: compare with the share of the larger one, not with 50 %",
        ),
        Task(
            "pararel",
            load_pararel,
            _grade_pararel,
            metric="correct",
            max_new_tokens=12,
            published="none for causal LMs; ParaRel (arXiv:2102.01017) measures masked LMs",
            trap="consistency alone rewards a constant answer: read it beside accuracy; candidates restricted to "
            "single tokens make both look better",
        ),
        Task(
            "groups",
            load_groups,
            _grade_group,
            metric="correct",
            max_new_tokens=64,
            published="none: your data",
            trap="wordings that were written by the model under test, or that stand in its training data",
        ),
    )
}
