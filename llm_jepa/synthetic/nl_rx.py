"""Generate NL-RX-like pairs: a sentence about lines of text, and the regex that it asks for.

The form is that of NL-RX (Locascio et al., 2016): a small grammar draws a regex, a template writes it as stilted
English ("synth"), and paraphrases say the same in other words ("turk"). No row of that dataset is used.

    line   := clause | clause and clause | clause or clause
    clause := starts with part | ends with part | contains part | words with part | only part   (or its denial)
    part   := unit | unit before atom | atom before unit
    unit   := group | group, n or more times | group, zero or more times | group at least once
    group  := atom | not atom | atom and atom | atom or atom
    atom   := a character class such as [0-9] | a literal such as dog

Every level holds only levels below it, so it is always clear to what "or" or "3 times" applies. Every operator below
is one regex and six wordings of it:

    0        the stilted original
    1 to 3   paraphrases to train on
    4 and 5  paraphrases to test on: all their words occur in 0 to 3, but in other combinations

As in NL-RX, a regex must match the whole line, and `&` (both) and `~` (not) are not part of Python's `re`. To add an
operator, write it next to the operators of its level, add it to the tuple from which the drawing functions choose, and
raise `VERSION`.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import ArgumentParser
from ..core.files import write_json_lines
from ..core.options import seed_number, whole

# Part of every seed: a change of the grammar is a change of the data, and needs another number.
VERSION = 1
NUM_WORDINGS = 6
TRAIN_WORDINGS = (0, 1, 2, 3)
HELD_OUT_WORDINGS = (4, 5)
SYSTEM_PROMPT = "Convert natural language to regular expression."
# The tenths of the regexes (by a hash of the regex) that belong to each split.
SPLITS = {"train": range(0, 8), "validation": range(8, 9), "test": range(9, 10)}
MIN_REGEX_CHARS, MAX_REGEX_CHARS = 5, 45
MIN_WORDS, MAX_WORDS = 5, 25
# About a minute of drawing. After that an error is raised, because more rows may never come.
MAX_DRAWS = 2_000_000


@dataclass(frozen=True)
class Atom:
    """A leaf of the tree: a regex, and its noun phrase in each of the six wordings."""

    regex: str
    nouns: tuple[str, ...]


@dataclass(frozen=True)
class Operator:
    """A regex template and one phrase template per wording; `{0}` and `{1}` stand for the operands."""

    regex: str
    wordings: tuple[str, ...]

    def __call__(self, *operands: Node) -> Tree:
        """The tree that applies this operator to `operands`: `LINE(STARTS(VOWEL))`."""
        return Tree(self, operands)


@dataclass(frozen=True)
class Tree:
    """An operator and its operands, in the order of the regex."""

    operator: Operator
    operands: tuple[Node, ...]


Node = Atom | Tree


def operator(regex: str, *wordings: str) -> Operator:
    """An operator from its regex and its wordings 0 to 5."""
    return Operator(regex, wordings)


def clause(regex: str, *wordings: tuple[str, str]) -> tuple[Operator, Operator]:
    """The operator that states `regex` of a line and its denial, from six (stated, denied) wordings."""
    stated, denied = zip(*wordings, strict=True)
    return Operator(regex, stated), Operator(f"~({regex})", denied)


def _literal(text: str) -> Atom:
    plain, bare, other = f"the string '{text}'", f"'{text}'", f"the text '{text}'"
    return Atom(text, (plain, plain, bare, other, bare, plain))


NUMBER = Atom("[0-9]", ("a number", "a digit", "a number", "a number", "a digit", "a number"))
LOWER = Atom("[a-z]", ("a lower-case letter", "a lower-case letter", "a small letter") * 2)
UPPER = Atom("[A-Z]", ("a capital letter", "an upper-case letter", "a capital letter") * 2)
LETTER = Atom("[A-Za-z]", ("a letter",) * NUM_WORDINGS)
VOWEL = Atom("[AEIOUaeiou]", ("a vowel",) * NUM_WORDINGS)
CHARACTER = Atom(".", ("a character",) * NUM_WORDINGS)
DOG, TRUCK, RING, LAKE, TREE, STAR = map(_literal, ("dog", "truck", "ring", "lake", "tree", "star"))
ATOMS = (NUMBER, LOWER, UPPER, LETTER, VOWEL, CHARACTER, DOG, TRUCK, RING, LAKE, TREE, STAR)

# --- group: atoms ---------------------------------------------------------------------------------------------------
NOT = operator(
    "~({0})",
    "not {0}",
    "anything but {0}",
    "something other than {0}",
    "anything except {0}",
    "something except {0}",
    "anything other than {0}",
)
BOTH = operator(
    "({0})&({1})",
    "{0} and {1}",
    "both {0} and {1}",
    "{0} together with {1}",
    "{0} as well as {1}",
    "both {0} as well as {1}",
    "{0} and {1} together",
)
EITHER = operator(
    "({0})|({1})",
    "{0} or {1}",
    "either {0} or {1}",
    "{0} or else {1}",
    "one of {0} or {1}",
    "either {0} or else {1}",
    "one of either {0} or {1}",
)

# --- unit: how often a group comes ----------------------------------------------------------------------------------
ZERO_OR_MORE = operator(
    "({0})*",
    "{0}, zero or more times",
    "zero or more of {0}",
    "{0} repeated zero times or more",
    "{0} at least zero times",
    "zero times or more of {0}",
    "{0} repeated zero or more times",
)
ONCE_OR_MORE = operator(
    "({0})+",
    "{0} at least once",
    "at least one of {0}",
    "{0} repeated once or more",
    "{0} at least one time",
    "one or more of {0}",
    "{0} repeated at least once",
)


def at_least(count: int, count_word: str) -> Operator:
    """The operator "`count` or more times": `({0}){3,}` for 3."""
    return operator(
        f"({{0}}){{{{{count},}}}}",  # doubled braces: str.format, which fills in {0}, makes single ones of them
        f"{{0}}, {count} or more times",
        f"at least {count} of {{0}}",
        f"{{0}} repeated {count_word} times or more",
        f"{{0}} at least {count_word} times",
        f"{count_word} or more of {{0}}",
        f"{{0}} repeated at least {count} times",
    )


COUNT_WORDS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven"}
REPEATS = (ZERO_OR_MORE, ONCE_OR_MORE, *(at_least(count, word) for count, word in COUNT_WORDS.items()))

# --- part: one unit before another; wordings 2 and 5 name the later one first -------------------------------------
BEFORE = operator(
    "({0}).*({1})",
    "{0} before {1}",
    "{0} followed by {1}",
    "{1} after {0}",
    "{0} and then {1}",
    "{0} then followed by {1}",
    "{1} that comes after {0}",
)

# --- clause: a statement about a line, and its denial ---------------------------------------------------------------
STARTS, NOT_STARTS = clause(
    "({0})(.*)",
    ("starting with {0}", "not starting with {0}"),
    ("start with {0}", "do not start with {0}"),
    ("{0} comes first", "{0} does not come first"),
    ("begins with {0}", "does not begin with {0}"),
    ("begin with {0}", "do not begin with {0}"),
    ("has {0} first", "does not have {0} first"),
)
ENDS, NOT_ENDS = clause(
    "(.*)({0})",
    ("ending with {0}", "not ending with {0}"),
    ("end with {0}", "do not end with {0}"),
    ("{0} comes last", "{0} does not come last"),
    ("finishes with {0}", "does not finish with {0}"),
    ("finish with {0}", "do not finish with {0}"),
    ("has {0} last", "does not have {0} last"),
)
CONTAINS, NOT_CONTAINS = clause(
    ".*({0}).*",
    ("containing {0}", "not containing {0}"),
    ("contain {0}", "do not contain {0}"),
    ("{0} is present", "{0} is not present"),
    ("has {0} somewhere", "does not have {0} anywhere"),
    ("have {0} somewhere", "do not have {0} anywhere"),
    ("has {0} in it", "does not have {0} in it"),
)
WORDS, NOT_WORDS = clause(
    r"\b({0})\b",
    ("with words with {0}", "without words with {0}"),
    ("use words with {0}", "do not use words with {0}"),
    ("{0} is inside a word", "{0} is not inside a word"),
    ("has a word with {0}", "does not have a word with {0}"),
    ("have words with {0}", "do not have words with {0}"),
    ("has {0} inside a word", "does not have {0} inside a word"),
)
ONLY, NOT_ONLY = clause(
    "({0})",
    ("with only {0}", "not with only {0}"),
    ("are only {0}", "are not only {0}"),
    ("there is only {0}", "there is not only {0}"),
    ("has only {0}", "does not have only {0}"),
    ("have only {0}", "do not have only {0}"),
    ("is only {0}", "is not only {0}"),
)
CLAUSES = ((STARTS, NOT_STARTS), (ENDS, NOT_ENDS), (CONTAINS, NOT_CONTAINS), (WORDS, NOT_WORDS), (ONLY, NOT_ONLY))

# --- line: one clause, or two of them joined ------------------------------------------------------------------------
ALL_OF = operator(
    "({0})&({1})",
    "{0} and {1}",
    "{0} and also {1}",
    "{0} while {1}",
    "{0} and it {1}",
    "both {0} and {1}",
    "{0} and it also {1}",
)
ANY_OF = operator(
    "({0})|({1})",
    "{0} or {1}",
    "either {0} or {1}",
    "{0} or else {1}",
    "{0} or it {1}",
    "either {0} or else {1}",
    "{0} or else it {1}",
)
LINE = operator(
    "{0}",
    "lines {0}",
    "lines that {0}",
    "find every line in which {0}",
    "match a line if it {0}",
    "find lines that {0}",
    "if a line {0}, match it",
)


def to_regex(node: Node) -> str:
    """The regex of `node`, as a string in the NL-RX dialect.

    The regex of "lines starting with a vowel" accepts the whole line 'apple' and rejects 'dog':

    >>> to_regex(LINE(STARTS(VOWEL)))
    '([AEIOUaeiou])(.*)'
    """
    if isinstance(node, Atom):
        return node.regex
    return node.operator.regex.format(*(to_regex(operand) for operand in node.operands))


def phrase(node: Node, wording: int) -> str:
    """The English of `node` in one of the six wordings (0 to `NUM_WORDINGS` - 1); a whole sentence for a `LINE`.

    >>> phrase(LINE(STARTS(VOWEL)), 1)
    'lines that start with a vowel'

    Raises:
        ValueError: `wording` is out of range.
    """
    _check_wording(wording)
    if isinstance(node, Atom):
        return node.nouns[wording]
    return node.operator.wordings[wording].format(*(phrase(operand, wording) for operand in node.operands))


def generate(
    num_rows: int, *, seed: int = 0, split: str = "train", wordings: Sequence[int] = (0,)
) -> list[dict[str, list[dict[str, str]]]]:
    """`num_rows` chat rows (system, user, assistant) that ask for distinct regexes.

    Row i asks for a regex that depends on `seed`, `split` and i alone. So other wordings ask for the same regexes, and
    more rows begin with the same rows. The wording is drawn evenly from `wordings`. A regex belongs to one split for
    every seed: 80 % of them to 'train', 10 % each to 'validation' and 'test'.

    Raises:
        ValueError: `num_rows` is not positive or is more than the grammar yields, `split` is unknown, or `wordings`
            is empty or names one out of range.
    """
    if num_rows <= 0:
        raise ValueError(f"num_rows={num_rows}: a dataset needs rows; ask for 1 or more")
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not a split of this grammar; use one of {', '.join(SPLITS)}")
    if not wordings:
        raise ValueError(f"wordings={wordings!r}: a row needs a wording; name some of 0 to {NUM_WORDINGS - 1}")
    for wording in wordings:
        _check_wording(wording)
    # The wordings have a separate generator: drawn from that of the trees, they would change the regexes.
    choose = random.Random(f"nl_rx wordings, version {VERSION}, seed {seed}, {split}")
    return [_row(line, choose.choice(wordings)) for line in _distinct_lines(num_rows, seed, split)]


def write(
    out_dir: str | os.PathLike[str], *, train: int = 6000, validation: int = 512, test: int = 500, seed: int = 0
) -> dict[str, Path]:
    """Write the four JSON Lines files of a quickstart to `out_dir`; return their paths by name.

    'train' and 'validation' mix wordings 0 to 3; 'original_test' is wording 0 and 'paraphrase_test' mixes 4 and 5, and
    line i of both asks for the same regex. `train`, `validation` and `test` count rows. The same arguments give
    the same bytes, and a file is complete as soon as it exists.

    Raises:
        ValueError: as `generate`; nothing is written then.
        OSError: `out_dir` cannot be made or written to.
    """
    files = {
        "train": generate(train, seed=seed, split="train", wordings=TRAIN_WORDINGS),
        "validation": generate(validation, seed=seed, split="validation", wordings=TRAIN_WORDINGS),
        "original_test": generate(test, seed=seed, split="test", wordings=(0,)),
        "paraphrase_test": generate(test, seed=seed, split="test", wordings=HELD_OUT_WORDINGS),
    }
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return {name: _write_rows(folder / f"{name}.jsonl", rows) for name, rows in files.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """The command: write the files, print each with its number of rows. Exit code 2 for a value that cannot work."""
    parser = ArgumentParser(
        prog="python -m llm_jepa.synthetic.nl_rx", description="Write NL-RX-like training and test files."
    )
    parser.add_argument("out_dir", metavar="OUT_DIR", help="folder to write to; made if missing")
    parser.add_argument("--train", type=whole(1), default=6000, metavar="N", help="rows (default: %(default)s)")
    parser.add_argument("--validation", type=whole(1), default=512, metavar="N", help="rows (default: %(default)s)")
    parser.add_argument(
        "--test", type=whole(1), default=500, metavar="N", help="rows of either test file (default: 500)"
    )
    parser.add_argument("--seed", type=seed_number, default=0, metavar="S", help="(default: %(default)s)")
    try:
        options = parser.parse_args(argv)
        sizes = {"train": options.train, "validation": options.validation, "test": options.test}
        paths = write(options.out_dir, **sizes, seed=options.seed)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    for path, num_rows in zip(paths.values(), (*sizes.values(), options.test), strict=True):
        print(f"{path}: {num_rows} rows")
    return 0


def _check_wording(wording: int) -> None:
    if not 0 <= wording < NUM_WORDINGS:
        raise ValueError(f"wording {wording} does not exist; use 0 to {NUM_WORDINGS - 1}")


def _draw_group(rng: random.Random) -> Node:
    kind = rng.random()
    if kind < 0.6:
        return rng.choice(ATOMS)
    if kind < 0.7:
        return NOT(rng.choice(ATOMS))
    return rng.choice((BOTH, EITHER))(*rng.sample(ATOMS, 2))


def _draw_unit(rng: random.Random) -> Node:
    group = _draw_group(rng)
    return rng.choice(REPEATS)(group) if rng.random() < 0.35 else group


def _draw_part(rng: random.Random) -> Node:
    kind = rng.random()
    if kind < 0.5:
        return _draw_unit(rng)
    # One side stays an atom: two units would make a sentence too long to read.
    unit, atom = _draw_unit(rng), rng.choice(ATOMS)
    if kind < 0.75:
        return BEFORE(unit, atom)
    return BEFORE(atom, unit)


def _draw_line(rng: random.Random) -> Tree:
    clauses = [pair[rng.random() < 0.2] for pair in rng.sample(CLAUSES, 2)]
    if rng.random() < 0.6:
        return LINE(clauses[0](_draw_part(rng)))
    # Joined clauses hold atoms, because sentences would become too long otherwise; sometimes one of them holds a unit.
    parts = [rng.choice(ATOMS), _draw_unit(rng) if rng.random() < 0.3 else rng.choice(ATOMS)]
    rng.shuffle(parts)
    return LINE(rng.choice((ALL_OF, ANY_OF))(clauses[0](parts[0]), clauses[1](parts[1])))


def _split_of(regex: str) -> str:
    # Not hash(), which differs between processes.
    tenth = int.from_bytes(hashlib.sha256(regex.encode()).digest()[:8], "big") % 10
    return next(split for split, tenths in SPLITS.items() if tenth in tenths)


def _has_readable_size(line: Tree, regex: str) -> bool:
    if not MIN_REGEX_CHARS <= len(regex) <= MAX_REGEX_CHARS:
        return False
    # Check all wordings, not only the one that is used: the choice of regexes must not depend on their wording.
    words = [len(phrase(line, wording).split()) for wording in range(NUM_WORDINGS)]
    return min(words) >= MIN_WORDS and max(words) <= MAX_WORDS


def _distinct_lines(num_rows: int, seed: int, split: str) -> list[Tree]:
    rng = random.Random(f"nl_rx trees, version {VERSION}, seed {seed}, {split}")
    lines: dict[str, Tree] = {}
    draws = 0
    while len(lines) < num_rows:
        if max(draws, num_rows) > MAX_DRAWS:
            raise ValueError(
                f"num_rows={num_rows}: {MAX_DRAWS} draws from the grammar do not yield that many distinct regexes for "
                f"split {split!r}; ask for fewer rows"
            )
        draws += 1
        line = _draw_line(rng)
        regex = to_regex(line)
        if regex not in lines and _split_of(regex) == split and _has_readable_size(line, regex):
            lines[regex] = line
    return list(lines.values())


def _row(line: Tree, wording: int) -> dict[str, list[dict[str, str]]]:
    return {
        "messages": [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": phrase(line, wording)},
            {"role": "assistant", "content": to_regex(line)},
        ]
    }


def _write_rows(path: Path, rows: list[dict[str, list[dict[str, str]]]]) -> Path:
    write_json_lines(path, rows)
    return path


if __name__ == "__main__":
    raise SystemExit(main())
