r"""Claims about regexes of NL-RX: what they denote, when two are equal, and that no text can hang or crash the grader.

Three oracles: automata-lib composed operation by operation (no `\b`), Python's `re` (no `&`, no `~`), and `ends` below:
the textbook meaning of every operator, `\b` under `~` included, on one line at a time."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from automata.fa.dfa import DFA
from automata.fa.nfa import NFA
from hypothesis import given
from hypothesis import strategies as st

from eval.graders import same_language
from eval.graders.regexes import Language, RegexError, Verdict, equivalent, language, matches
from llm_jepa import UserError
from tests.properties import examples

ATTACKS = [
    json.loads(line) for line in (Path(__file__).parents[1] / "attacks" / "regexes.jsonl").read_text().splitlines()
]
SHARED = Path(__file__).parents[3] / "shared" / "data" / "nl_rx"
# Of the random expressions: `z` and `!` are never named and stand for all other word characters and all the rest.
LETTERS = "ab-z!"


# --- random expressions ---------------------------------------------------------------------------------------------
def expressions(leaves, boolean=True):
    bounds = st.sampled_from([(0, None), (1, None), (0, 1), (2, None), (2, 2), (1, 3), (0, 2)])

    def extend(inner):
        larger = st.tuples(st.sampled_from(["cat", "or"]), inner, inner) | st.tuples(st.just("repeat"), inner, bounds)
        return (
            larger | st.tuples(st.just("and"), inner, inner) | st.tuples(st.just("not"), inner) if boolean else larger
        )

    return st.recursive(leaves, extend, max_leaves=5)


LEAVES = [("set", s) for s in ("a", "b", "-", "ab", "a-", "bz!", "-z!", LETTERS)] + [("empty",)]
without_looking = expressions(st.sampled_from(LEAVES))
looking = expressions(st.sampled_from([*LEAVES, ("boundary", True), ("boundary", False)]))
known_to_re = expressions(st.sampled_from([*LEAVES, ("boundary", True)]), boolean=False)
lines = st.text(LETTERS, max_size=5)
SPELLINGS = {"-z!": "[^ab]", "bz!": "[^a\\-]", LETTERS: "."}
UNION, INTERSECTION, CONCATENATION, REPETITION, COMPLEMENT = range(5)


def spelled(node, loosest=UNION):
    """In the dialect, with no more parentheses than the stated precedence needs."""
    kind, *parts = node
    if kind == "set":
        return SPELLINGS.get(parts[0], parts[0] if len(parts[0]) == 1 else f"[{parts[0]}]")
    if kind == "empty":
        return "()"
    if kind == "boundary":
        return "\\b" if parts[0] else "\\B"
    if kind == "not":
        level, text = COMPLEMENT, "~" + spelled(parts[0], COMPLEMENT)
    elif kind == "repeat":
        least, most = parts[1]
        suffix = {(0, None): "*", (1, None): "+", (0, 1): "?", (2, 2): "{2}", (0, 2): "{,2}"}.get(parts[1])
        level = REPETITION
        text = spelled(parts[0], REPETITION) + (suffix or f"{{{least},{'' if most is None else most}}}")
    else:
        level, sign = {"or": (UNION, "|"), "and": (INTERSECTION, "&"), "cat": (CONCATENATION, "")}[kind]
        text = spelled(parts[0], level) + sign + spelled(parts[1], level)
    return f"({text})" if level < loosest else text


def ends(node, line, start):
    """Where a match of `node` that begins at `start` can end: the definition of each operator, written down."""
    kind, *parts = node
    if kind == "set":
        return {start + 1} if line[start : start + 1] and line[start] in parts[0] else set()
    if kind == "empty":
        return {start}
    if kind == "boundary":
        before, after = start > 0 and line[start - 1] in "abz", start < len(line) and line[start] in "abz"
        return {start} if (before != after) == parts[0] else set()
    if kind == "not":
        return set(range(start, len(line) + 1)) - ends(parts[0], line, start)
    if kind == "or":
        return ends(parts[0], line, start) | ends(parts[1], line, start)
    if kind == "and":
        return ends(parts[0], line, start) & ends(parts[1], line, start)
    if kind == "cat":
        return {end for middle in ends(parts[0], line, start) for end in ends(parts[1], line, middle)}
    least, most = parts[1]
    reached, final = {start}, set()
    for count in range((most if most is not None else least + len(line)) + 1):
        final |= reached if count >= least else set()
        reached = {end for middle in reached for end in ends(parts[0], line, middle)}
    return final


def denotes(node, line):
    return len(line) in ends(node, line, 0)


def python_re(node):
    kind, *parts = node
    if kind == "set":
        return f"[{re.escape(parts[0])}]"
    if kind in ("empty", "boundary"):
        return "" if kind == "empty" else "\\b"
    if kind == "repeat":
        least, most = parts[1]
        return f"(?:{python_re(parts[0])}){{{least},{'' if most is None else most}}}"
    return f"(?:{python_re(parts[0])}{'|' if kind == 'or' else ''}{python_re(parts[1])})"


def automaton(node):
    """automata-lib has no `~`, and our `.` and `[^..]` mean LETTERS: composed from its operations."""
    kind, *parts = node
    if kind in ("set", "empty"):
        words = {""} if kind == "empty" else set(parts[0])
        return DFA.from_finite_language(set(LETTERS), words, as_partial=False)
    if kind == "not":
        return automaton(parts[0]).complement()
    if kind == "or":
        return automaton(parts[0]).union(automaton(parts[1]))
    if kind == "and":
        return automaton(parts[0]).intersection(automaton(parts[1]))
    one = NFA.from_dfa(automaton(parts[0]))
    if kind == "cat":
        result = one.concatenate(NFA.from_dfa(automaton(parts[1])))
    else:
        least, most = parts[1]
        empty = NFA.from_dfa(automaton(("empty",)))
        result = one.kleene_star() if most is None else empty
        for _ in range(0 if most is None else most - least):
            result = empty.union(one.concatenate(result))
        for _ in range(least):
            result = one.concatenate(result)
    return DFA.from_nfa(result, minify=True).to_complete()


# --- what a regex denotes -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("regex", "accepted", "rejected"),
    [
        ("dog", ["dog"], ["", "do", "dogs", "adog"]),
        ("a|bc", ["a", "bc"], ["", "b", "ac"]),
        ("a|b&c", ["a"], ["b", "c", ""]),  # & before |
        ("ab&.b|c", ["ab", "c"], ["b", "cb"]),
        ("~ab", ["b", "bb", "aab"], ["ab", "a"]),  # ~ before concatenation: (~a)b
        ("~a*", ["", "b", "aa", "ab"], ["a"]),  # ~ before *: (~a)*
        ("~(a*)", ["b", "ab"], ["", "a", "aa"]),
        ("~~a", ["a"], ["", "b", "aa"]),
        (".*[0-9].*&~(.*dog.*)", ["1", "do1g"], ["", "dog1", "1dog", "do"]),
        ("a{2}", ["aa"], ["a", "aaa"]),
        ("a{2,}", ["aa", "aaaaa"], ["", "a"]),
        ("a{1,3}", ["a", "aa", "aaa"], ["", "aaaa"]),
        ("a{,2}", ["", "a", "aa"], ["aaa"]),
        ("(ab?){2}c", ["aac", "abac", "ababc"], ["abc", "abbac"]),
        ("a|", ["a", ""], ["aa"]),
        ("a+?", ["", "aa"], ["b"]),  # stacked, not lazy
        (".", ["x", "\n", "\0", "\u00e9", "\U0010ffff", "\ud800"], ["", "xx"]),
        ("[a-cx]", ["a", "b", "c", "x"], ["d", "-", ""]),
        ("[^a-c]", ["d", "\n", "\u00e9"], ["a", "c", "", "dd"]),
        ("[]^]", ["]", "^"], ["a"]),
        ("[a^-]", ["a", "^", "-"], ["b"]),
        (r"\d\w\s", ["0_ ", "9Z\t"], ["\u0663a ", "0\u00e9 ", "0a\u00a0"]),
        (r"\D\W\S", ["a-b", "\u0663\u00e9\u00a0"], ["0-b", "aab", "a- "]),
        (r"[\d\-x]+", ["0-x"], ["\\", "d"]),
        (r"\*\(\]\~\&\\", ["*(]~&\\"], [""]),
        ("[\u0430-\u044f\u20ac]", ["\u0430", "\u0434", "\u044f", "\u20ac"], ["\u0450", "\u042f", "\u20ad", "a"]),
        ("^a$ @#\"<1-2>'", ["^a$ @#\"<1-2>'"], ["a"]),
        (r"\bdog\b", ["dog"], ["bdogb", "", "dog "]),
        (r".*\bdog\b.*", ["dog", "a dog!", "dog-dogs"], ["dogs", "hotdog", "_dog", "dog1"]),
        (r".*\bdog\b.*&~(.* .*)", ["dog", "a-dog"], ["a dog", "adog"]),
        (r"a\bb", [], ["ab", "a b"]),
        (r"a\Bb", ["ab"], ["a b"]),
        (r"~(\b).", ["-", "aa"], ["", "a"]),  # before "-" is no boundary; of "aa", ~(\b) matches the first letter
        (r"\B", [""], ["a"]),
        (r"\b", [], ["", "a"]),
        (r"(\ba|-)*", ["a", "-a-a", "--"], ["aa", "-aa"]),
    ],
)
def test_matches_whole_lines(regex, accepted, rejected):
    assert [line for line in accepted if not matches(regex, line)] == []
    assert [line for line in rejected if matches(regex, line)] == []


def test_a_boundary_is_no_letter():
    """dk.brics drops the backslash: there the gold of "words with dog" accepts only 'bdogb'. Here only 'dog'."""
    assert equivalent(r"\bdog\b", "dog") == Verdict("equal") and equivalent(r"\bdog\b", "bdogb").status == "different"


@examples(400)
@given(looking, lines)
def test_a_line_matches_by_the_definition_of_the_operators(node, line):
    assert matches(spelled(node), line) == denotes(node, line)


@examples(300)
@given(known_to_re, lines)
def test_a_line_matches_as_in_re_without_complement_and_intersection(node, line):
    assert matches(spelled(node), line) == bool(re.fullmatch(python_re(node), line, re.ASCII | re.DOTALL))


# --- when two are equal ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("gold", "answer", "line", "winner"),
    [
        ("[ab]", "a|b", None, None),
        (".*dog.*&.*cat.*", "(.*dog.*cat.*)|(.*cat.*dog.*)", None, None),
        (".*(.*)(([AEIOUaeiou])*).*", ".*", None, None),
        (r"\d{2,}", "[0-9][0-9]+", None, None),
        (r"\ba\b", "a", None, None),
        (r".*\b.*", r".*\w.*", None, None),  # a line has a boundary iff it has a word character
        ("a", "b", "a", "gold"),
        ("a", "a|b", "b", "answer"),
        ("a*", "a+", "", "gold"),
        (".*", "~(dog)", "dog", "gold"),
        (".{7}", ".{7,}", "a" * 8, "answer"),
        (r"\w*", "[a-z0-9A-Z]*", "_", "gold"),
        ("[^a]", "[^a\u00e9]", "\u00e9", "gold"),
    ],
)
def test_equality_and_the_shortest_line_that_denies_it(gold, answer, line, winner):
    if line is None:
        assert equivalent(gold, answer) == Verdict("equal")
    else:
        assert equivalent(gold, answer) == Verdict("different", line, f"only the {winner} matches {ascii(line)}")


@examples(200)
@given(without_looking, without_looking)
def test_equality_emptiness_and_length_of_the_counterexample_as_in_automata_lib(one, other):
    ours, theirs = equivalent(spelled(one), spelled(other)), automaton(one).symmetric_difference(automaton(other))
    assert (ours.status == "equal") == theirs.isempty()
    if ours.status == "different":
        assert len(ours.counterexample) == theirs.minimum_word_length()
    ours, minimal = language(spelled(one)), automaton(one).minify()
    assert (ours.num_states, ours.is_empty) == (len(minimal.states), minimal.isempty())
    assert ours.is_everything == minimal.complement().isempty()


@examples(200)
@given(looking, looking)
def test_a_counterexample_is_in_one_language_only_and_no_shorter_line_is(one, other):
    """By the definition of the operators, over all lines of LETTERS that are shorter, up to three letters."""
    verdict = equivalent(spelled(one), spelled(other))
    length = 4
    if verdict.status == "different":
        length = len(verdict.counterexample)
        line = "".join(c if c in "ab-" else "z" if c.isalnum() else "!" for c in verdict.counterexample)
        assert denotes(one, line) != denotes(other, line)
    for line in itertools.chain.from_iterable(itertools.product(LETTERS, repeat=n) for n in range(min(length, 4))):
        assert denotes(one, "".join(line)) == denotes(other, "".join(line))


@examples(300)
@given(looking, looking)
def test_keys_are_equal_iff_the_languages_are(one, other):
    keys = language(spelled(one)).key, language(spelled(other)).key
    assert (equivalent(spelled(one), spelled(other)).status == "equal") == (keys[0] == keys[1])


@examples(100)
@given(looking, looking, st.sampled_from(["", " ", "\n"]))
def test_the_grader_is_reflexive_and_symmetric_and_its_keys_tell_answers_apart(one, other, space):
    gold, answer = spelled(one), spelled(other)
    if not gold.strip() or not answer.strip():
        return
    assert same_language(gold, gold + space)[0] and same_language(answer, space + answer)[0]
    there, back = same_language(gold, answer + space), same_language(answer, gold + space)
    assert there[0] == back[0]
    assert there[0] == (there[1] == same_language(gold, gold)[1]) == (back[1] == same_language(answer, answer)[1])


@examples(100)
@given(looking, looking, looking)
def test_laws_of_languages(one, other, third):
    r, s, t = (f"({spelled(node)})" for node in (one, other, third))
    for left, right in [
        (f"~({r}|{s})", f"~{r}&~{s}"),
        (f"~({r}&{s})", f"~{r}|~{s}"),
        (f"~~{r}", r),
        (f"{r}|{r}", r),
        (f"{r}&{r}", r),
        (f"{r}{s}|{r}{t}", f"{r}({s}|{t})"),
        (f"{s}{r}|{t}{r}", f"({s}|{t}){r}"),
        (f"{r}&({s}|{t})", f"{r}&{s}|{r}&{t}"),
        (f"({r}|{s})*", f"({r}*{s}*)*"),
        (f"{r}*", f"{r}{{,2}}|{r}{{3,}}"),
        (f"{r}{{2,3}}", f"{r}{r}{r}?"),
        (f"{r}|~{r}", ".*"),
        (f"{r}&~{r}", "a&b"),
    ]:
        assert equivalent(left, right) == Verdict("equal"), (left, right)
        assert language(left).key == language(right).key


# --- keys -----------------------------------------------------------------------------------------------------------
def test_keys_worked_by_hand():
    """`.*` is one state that accepts; `b|c` goes from its first state 0 to state 2 at the code points 98
    and 99, else to the dead state 1, which is numbered first as code point 0 leads there."""
    everything = [(True, [(0, 0)])]
    b_or_c = [(False, [(0, 1), (98, 2), (100, 1)]), (False, [(0, 1)]), (True, [(0, 1)])]
    for regex, automaton, empty in (
        (".*", everything, False),
        ("b|c", b_or_c, False),
        ("a&b", [(False, [(0, 0)])], True),
    ):
        key = hashlib.sha256(repr(automaton).encode()).hexdigest()
        assert language(regex) == Language(key, len(automaton), empty, regex == ".*")


def test_keys_do_not_depend_on_the_process():
    regexes = [r"\b(dog|[aeiou])\b.*&~(.*[0-9].*)", "[\u0430-\u044f]*|.*[^a-z].*", "(a|b)*a(a|b){5}"]
    code = f"from eval.graders.regexes import language; print([language(r).key for r in {ascii(regexes)}])"
    for seed in ("1", "2"):
        output = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        assert output.strip() == str([language(regex).key for regex in regexes])


def test_keys_do_not_depend_on_how_the_alphabet_was_cut():
    """Naming \u00e9 or the range around it cuts the other code points; equal languages must not show it."""
    assert language("[^\u00e9]|\u00e9").key == language(".").key
    assert language("[\u00e0-\u00ff]").key == language("[\u00e0-\u00e8]|\u00e9|[\u00ea-\u00ff]").key


# --- safety ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack["name"].replace(" ", "-"))
def test_attack_ends_as_stated(attack):
    """`times` repeats the regex; without `other` it is compared with itself."""
    regex = attack["regex"] * attack.get("times", 1)
    verdict = equivalent(regex, attack.get("other", regex), limit_s=60)  # the counted bounds are met long before
    assert verdict.status == attack["expected"], verdict
    assert (verdict.counterexample is not None) == (verdict.status == "different")
    assert verdict.detail.isascii() and verdict.detail.isprintable() and len(verdict.detail) < 1000
    outcomes = set()
    for decide in (lambda r: language(r, limit_s=60), lambda r: matches(r, "a" * 1000, limit_s=60)):
        try:
            decide(regex)
            outcomes.add("decided")
        except RegexError as error:
            outcomes.add(error.status)
    assert ("invalid" in outcomes) == (verdict.status == "invalid" and verdict.detail.startswith("gold: "))


def test_attacks_are_many_and_differ():
    assert len(ATTACKS) >= 45 and len({attack["name"] for attack in ATTACKS}) == len(ATTACKS)
    assert {attack["expected"] for attack in ATTACKS} == {"equal", "different", "invalid", "limit"}


@examples(400)
@given(*[st.text(st.sampled_from("()[]{}|&~*+?.\\^-,bdw01a\u00e9\ud800\0") | st.characters(), max_size=25)] * 2)
def test_any_text_ends_in_a_verdict(gold, answer):
    verdict = equivalent(gold, answer)
    if verdict.status == "different":
        assert matches(gold, verdict.counterexample) != matches(answer, verdict.counterexample)


def test_no_verdict_says_whose_fault_and_where():
    assert equivalent("a", "a)b") == Verdict("invalid", None, "answer: ')' without '(' at character 2 of 'a)b'")
    assert equivalent("a{2,1}", "a").detail.startswith("gold: repetition with its bounds reversed at character ")
    assert equivalent("(a|b)*a(a|b){60}", "(a|b)*b(a|b){60}").detail == "more than 10,000 states"
    with pytest.raises(UserError, match="'\\(' without '\\)' at character 2 of '\\(a'"):
        language("(a")
    with pytest.raises(RegexError, match="501 characters") as error:
        matches("a" * 501, "a")
    assert error.value.status == "limit"


def test_bounds_of_a_regex_are_inclusive():
    assert language("a" * 500).num_states == 502 and language("a{200}").num_states == 202
    assert equivalent("a" * 500, "a" * 501).status == equivalent("a{201}", "a").status == "limit"


def test_the_deadline_is_cpu_seconds():
    assert equivalent(".*a.{9}b", ".*a.{9}c", limit_s=0.0) == Verdict("limit", None, "not decided in 0.0 s")
    with pytest.raises(RegexError, match="not decided in 0.0 s"):
        language(".*a.{9}b", limit_s=0.0)


# --- the data -------------------------------------------------------------------------------------------------------
def test_golds_of_nl_rx_are_981_languages():
    """1,985 spellings; 310 match no line and 85 every line, so 20 % of the golds ask for nothing."""
    if not (SHARED / "synth_test.jsonl").is_file():
        pytest.skip(f"the real NL-RX is not at {SHARED}")
    rows = (SHARED / "synth_test.jsonl").read_text().splitlines()
    golds = sorted({json.loads(row)["messages"][-1]["content"] for row in rows})
    languages = [language(gold) for gold in golds]
    assert (len(golds), len({one.key for one in languages})) == (1985, 981)
    assert sum(one.is_empty for one in languages) == 310 and sum(one.is_everything for one in languages) == 85
    assert max(one.num_states for one in languages) == 161
    for (gold, mine), (neighbour, its) in itertools.pairwise(zip(golds, languages, strict=True)):
        assert (equivalent(gold, neighbour).status == "equal") == (mine.key == its.key)


def test_generated_golds_are_of_the_dialect():
    from llm_jepa.synthetic import nl_rx

    golds = [row["messages"][-1]["content"] for row in nl_rx.generate(200, seed=1)]
    assert all(language(gold).num_states >= 1 for gold in golds)
