"""Expression to automaton: a shortest difference of two languages, and the minimal automaton of one."""

from __future__ import annotations

from collections.abc import Sequence

from .alphabet import bits
from .expressions import Expressions, RegexError, State

MAX_STATES = 10_000  # the largest automaton of a gold has 161
# (accepts, [(code point, the state that it and the code points after it lead to)]) for each state
Automaton = list[tuple[bool, list[tuple[int, int]]]]


def shortest_difference(build: Expressions, gold: int, answer: int) -> str | None:
    """A shortest line that only one of the two languages has; None if they are equal.

    Searches pairs of states breadth first and skips a pair if the equalities assumed so far imply it. The line is still
    a shortest one: if a skipped pair differs by some rest of a line, so does a pair in the chain that implies it, and
    the search met every pair of that chain at no greater depth.
    """
    examples = [build.alphabet.example(minterm) for minterm in build.minterms()]
    letters = [build.alphabet.letter(example) for example in examples]
    above: dict[State, State] = {}

    def representative(state: State) -> State:
        while (parent := above.get(state, state)) != state:
            above[state] = state = above.get(parent, parent)
        return state

    pairs: list[tuple[State, State]] = [((gold, False), (answer, False))]
    came_from = [(-1, "")]  # index of the pair before, and the character read there
    for index, (left, right) in enumerate(pairs):  # the list grows during the loop
        build.spend(1)
        left_class, right_class = representative(left), representative(right)
        if left_class == right_class:
            continue
        if build.accepts(left) != build.accepts(right):
            return _line_to(index, came_from)
        above[left_class] = right_class
        if len(above) > MAX_STATES:
            raise RegexError("limit", f"more than {MAX_STATES:,} states")
        for letter, example in zip(letters, examples, strict=True):
            pairs.append((build.step(left, letter), build.step(right, letter)))
            came_from.append((index, example))
    return None


def _line_to(index: int, came_from: Sequence[tuple[int, str]]) -> str:
    line = ""
    while index:
        index, character = came_from[index]
        line = character + line
    return line


def minimal_automaton(build: Expressions, expression: int) -> Automaton:
    """The minimal automaton of a language, the same for every regex of it.

    States are numbered breadth first, from the lowest code point on.
    """
    minterms = build.minterms()
    targets, accepting = _automaton(build, expression, minterms)
    class_of = _classes(build, targets, accepting)
    member = dict(zip(class_of, range(len(class_of)), strict=True))
    starts = build.alphabet.starts
    runs = []  # (first code point, minterm) of each run of letters that belong to the same minterm
    for column, mask in enumerate(minterms):
        runs += [(starts[letter], column) for letter in bits(mask & ~(mask << 1))]
    runs.sort()
    order = [class_of[0]]
    numbers = {order[0]: 0}
    table = []
    for number in order:  # the list grows during the loop
        state = member[number]
        row: list[tuple[int, int]] = []
        for start, column in runs:
            target = class_of[targets[state][column]]
            if target not in numbers:
                numbers[target] = len(order)
                order.append(target)
            if not row or row[-1][1] != numbers[target]:
                row.append((start, numbers[target]))
        table.append((accepting[state], row))
    return table


def _automaton(build: Expressions, expression: int, minterms: Sequence[int]) -> tuple[list[list[int]], list[bool]]:
    """(target of each state by minterm, whether each state accepts). It starts in state 0."""
    letters = [next(bits(minterm)) for minterm in minterms]
    states: list[State] = [(expression, False)]
    numbers = {states[0]: 0}
    targets = []
    for state in states:  # the list grows during the loop
        row = []
        for letter in letters:
            target = build.step(state, letter)
            number = numbers.setdefault(target, len(states))
            if number == len(states):
                states.append(target)
            row.append(number)
        build.spend(len(row))
        targets.append(row)
        if len(states) > MAX_STATES:
            raise RegexError("limit", f"more than {MAX_STATES:,} states")
    return targets, [build.accepts(state) for state in states]


def _classes(build: Expressions, targets: list[list[int]], accepting: list[bool]) -> list[int]:
    """A number for each state, equal for two states iff they accept the same rests of a line (Hopcroft 1971)."""
    sources: list[list[list[int]]] = []  # by minterm and target
    for _ in targets[0]:
        sources.append([[] for _ in targets])
    for state, row in enumerate(targets):
        for column, target in enumerate(row):
            sources[column][target].append(state)
    class_of = [int(accepts) for accepts in accepting]
    members: list[set[int]] = [set(), set()]
    for state, number in enumerate(class_of):
        members[number].add(state)
    waiting = [0, 1]
    while waiting:
        splitter = tuple(members[waiting.pop()])
        for into in sources:
            build.spend(1 + len(splitter))
            hits: dict[int, set[int]] = {}
            for target in splitter:
                for state in into[target]:
                    hits.setdefault(class_of[state], set()).add(state)
            for number, hit in hits.items():
                if len(hit) == len(members[number]):
                    continue
                members[number] -= hit
                if len(hit) > len(members[number]):
                    members[number], hit = hit, members[number]
                # The smaller part becomes a splitter. The larger one needs no turn unless it was waiting already.
                waiting.append(len(members))
                for state in hit:
                    class_of[state] = len(members)
                members.append(hit)
    return class_of
