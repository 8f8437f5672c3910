"""Rows of views -> one batch of packed rows, exact against separate passes over each view in loss and gradient.

    [ LM row ][ predictor tokens ][ target view ][ pad ]                     context_view="prefix"
    [ LM row ][ context view, predictor tokens ][ target view ][ pad ]       context_view="message"

Each view is a sequence of its own. If it begins like the LM row of its example (all of a `prefix` context does, others
share the BOS token), that beginning is not repeated: the rest of the view continues from there. So the predictor tokens
of a `prefix` context come after the LM row, but they see the prompt only, at the positions after the prompt. If they
were *inside* the LM row, the label shift would train the first completion token from a predictor token.

Three int tensors [R, L] say who sees whom, so that no L x L tensor leaves the collator:

    doc      the segment of a token; a token sees its segment, causally. doc % KINDS is the kind; -1 is padding.
    parent   a second segment that it sees (the LM row of its example), or NO_PARENT
    visible  how many of the first positions of the parent it sees

Padding sees padding, because a row of -inf scores is NaN in eager attention. A row may hold several examples.

Packed rows are exact for attention with rotary or absolute positions, windowed and chunked layers included, because
`attention` counts windows by position. Recurrent, convolutional and ALiBi layers would mix the segments without an
error. `probe.choose_layout` therefore tries the model; if packed rows are not exact, each segment gets its own row
("separate"). Flash attention takes no mask of this kind; its segments share no prefix and lie in one row ("flat").
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..core.errors import UserError
from ..core.pairs import PairKeys
from .views import IGNORE, common_length

PAD, NO_PARENT = -1, -2
LM_ROW, CONTEXT, TARGET = 0, 1, 2
KINDS = 3
FILL = {"labels": IGNORE, "doc": PAD, "position_ids": 0, "parent": NO_PARENT, "visible": 0}  # what padding holds
Layout = Literal["packed", "separate", "flat"]
Place = tuple[int, int]  # (example, segment), or (segment, token)


class Segment(NamedTuple):
    kind: int
    ids: list[int]
    start: int = 0  # its first position, and how many of the first tokens of the LM row it sees
    labels: list[int] | None = None


class PackedExample(NamedTuple):
    """An LM row and its views. An embedding is the mean state over a list of (segment, token) places."""

    segments: list[Segment]
    contexts: list[list[Place]]
    targets: list[list[Place]]
    apart: list[list[int]]  # token ids of target views that get rows outside of the packed ones


class Rows(NamedTuple):
    """Segments laid out as token tensors."""

    tensors: dict[str, Tensor]  # [R, L] each
    start: dict[Place, int]  # (example, segment) -> flat index of its first token


@dataclass(frozen=True)
class JEPACollator:
    """Rows of `views.add_view_columns` -> a batch of tensors.

    Every batch has `input_ids`, `labels`, `doc` [R, L]; `position_ids` [R, L] if the layout is packed or flat;
    `parent`, `visible` [R, L] if it is packed; and `lm_at` [B], where each LM row starts in the flattened [R * L]
    tokens. With views there are P pairs (every context of an example with every target of it):

        context_at, target_at               [P] flat places, or [P, W] places to average over, filled up with -1
        target_key, context_key             [P] of the rows, equal for equal completions and for equal prompts
        target_text_key, context_text_key   [P] of the views, equal for equal texts
        example_of_pair                     [P]

    Args:
        pad_token_id, pad_to_multiple_of: padding, on the right.
        predictor_ids: predictor tokens of every context.
        with_views: False gives plain SFT rows.
        layout: see the head of this module; from `probe.choose_layout`.
        row_cost: 0 keeps one example a row. Otherwise several examples share a row if that is cheaper, at
            row_cost + L per token of a row of length L (6 * hidden_size: a transformer layer's own ratio).
        readout: "last": the embedding is the state of the last token of a view; "mean": the mean over all of them.
        predictor_position: "last" after the context, "first" before its content (the paper's ablation, table 3).
        direction: "reverse": the completion predicts the prompt (the paper's Code -> Text, table 3).
        target_placement: "inside" the rows. "apart": `apart_input_ids`, `apart_attention_mask` [T, L'], which
            `target_at` then indexes, for a pass without gradient. "cached": `target_embedding` [P, D], rows of
            `target_table` that the column `target_table_rows` names.
        with_tubes: also `content` [B, 4] (start and end of the prompt's and of the completion's content) and `index`
            [B], for `tubes`.
    """

    pad_token_id: int
    predictor_ids: Sequence[int] = ()
    with_views: bool = True
    layout: Layout = "packed"
    pad_to_multiple_of: int = 1
    row_cost: int = 0
    readout: str = "last"
    predictor_position: str = "last"
    direction: str = "forward"
    target_placement: Literal["inside", "apart", "cached"] = "inside"
    target_table: Tensor | None = None
    with_tubes: bool = False

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        examples = [self.example(row) for row in rows]
        tensors, start = self.lay_out(examples)
        batch = {**tensors, "lm_at": torch.tensor([start[number, 0] for number in range(len(rows))])}
        if self.with_tubes:
            batch["content"] = torch.tensor([[row[column] for column in CONTENT_COLUMNS] for row in rows])  # [B, 4]
            batch["index"] = torch.tensor([row["index"] for row in rows])  # [B]
        return batch | self._pairs(rows, examples, start) if self.with_views else batch

    # -- one example ---------------------------------------------------------------------------------------------------

    def example(self, row: dict[str, Any]) -> PackedExample:
        """The segments of one example, and the places of its embeddings."""
        # The first token of the LM row is never a label: in a shared row it would be predicted from the example before.
        segments = [Segment(LM_ROW, row["input_ids"], labels=[IGNORE, *row["labels"][1:]])]
        if not self.with_views:
            return PackedExample(segments, [], [], [])
        sources, goals, header = row["contexts"], row["targets"], row["context_header"]
        if self.direction == "reverse":
            sources, goals, header = goals, sources, row["target_header"]
        contexts = []
        for ids in sources:
            ids = with_predictors(ids, self.predictor_ids, self.predictor_position, header)
            contexts.append(self._add(segments, CONTEXT, ids))
        targets = [self._add(segments, TARGET, ids) for ids in goals] if self.target_placement == "inside" else []
        return PackedExample(segments, contexts, targets, goals if self.target_placement == "apart" else [])

    def _add(self, segments: list[Segment], kind: int, ids: list[int]) -> list[Place]:
        """Append the part of a view that the LM row does not hold already; return the places to read."""
        shared = common_length(ids, segments[0].ids)
        # Only packed rows can continue from the LM row, unless the view is a part of it and needs no more tokens.
        if self.layout != "packed" and shared < len(ids):
            shared = 0
        places = [(0, token) for token in range(shared)]
        if shared < len(ids):
            places += [(len(segments), token) for token in range(len(ids) - shared)]
            segments.append(Segment(kind, ids[shared:], start=shared))
        return places if self.readout == "mean" else places[-1:]

    # -- rows ----------------------------------------------------------------------------------------------------------

    def lay_out(self, examples: list[PackedExample]) -> Rows:
        """Segments of all examples -> right-padded rows."""
        lines = self._lines(examples)
        longest = max(sum(len(examples[e].segments[s].ids) for e, s in line) for line in lines)
        length = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        if self.layout == "flat":
            length = longest  # flash attention would take padding for one more sequence
        columns: dict[str, list[list[int]]] = {key: [] for key in ("input_ids", *FILL)}
        start: dict[Place, int] = {}
        for r, line in enumerate(lines):
            row = _RowBuilder()
            for e, s in line:
                start[e, s] = r * length + len(row.cells["doc"])
                row.append(examples[e].segments[s])
            for key, cells in row.cells.items():
                columns[key].append(cells + [FILL.get(key, self.pad_token_id)] * (length - len(cells)))
        unused = {"packed": (), "separate": ("position_ids", "parent", "visible"), "flat": ("parent", "visible")}
        for key in unused[self.layout]:
            del columns[key]
        return Rows({key: torch.tensor(column) for key, column in columns.items()}, start)

    def _lines(self, examples: list[PackedExample]) -> list[list[Place]]:
        """The (example, segment) places of each row, in order."""
        by_example: list[list[Place]] = []
        lengths = []
        for number, e in enumerate(examples):
            by_example.append([(number, s) for s in range(len(e.segments))])
            lengths.append(sum(len(segment.ids) for segment in e.segments))
        everything = list(itertools.chain(*by_example))
        if self.layout == "flat":
            return [everything]
        if self.layout == "separate":
            return [[place] for place in sorted(everything, key=lambda place: place[1] > 0)]  # LM rows first
        if not self.row_cost:
            return by_example
        rows = []
        for members in share_rows(lengths, self.row_cost):
            rows.append([place for i in members for place in by_example[i]])
        return rows

    # -- pairs ---------------------------------------------------------------------------------------------------------

    def _pairs(
        self, rows: list[dict[str, Any]], examples: list[PackedExample], start: dict[Place, int]
    ) -> dict[str, Tensor]:
        """Every context of an example with every target of it."""
        contexts: list[list[int]] = []
        targets: list[list[int]] = []  # places in the rows, or numbers of rows apart, or of rows of the table
        apart: list[list[int]] = []
        keys: list[list[int]] = []  # four of each pair, see KEYS
        owners: list[int] = []
        for number, (row, e) in enumerate(zip(rows, examples, strict=True)):
            first = {s: start[number, s] for s in range(len(e.segments))}
            sources = [_flat(places, first) for places in e.contexts]
            if self.target_placement == "inside":
                goals = [_flat(places, first) for places in e.targets]
            elif self.target_placement == "apart":
                goals = [[len(apart) + i] for i in range(len(e.apart))]
                apart += e.apart
            else:
                goals = [[i] for i in _table_rows(row)]
            for source in sources:
                contexts += [source] * len(goals)
                targets += goals
            keys += self._keys(row)
            owners += [number] * (len(sources) * len(goals))
        batch = {
            "context_at": as_places(contexts),
            **dict(zip(KEYS, torch.tensor(keys).unbind(dim=1), strict=True)),
            "example_of_pair": torch.tensor(owners),
        }
        target = as_places(targets)
        if self.target_placement == "inside":
            return {**batch, "target_at": target}
        if self.target_placement == "apart":
            alone = rows_apart(apart, self.pad_token_id, self.readout)
            return {**batch, **alone, "target_at": alone["target_at"][target]}
        assert self.target_table is not None
        return {**batch, "target_embedding": self.target_table[target]}

    def _keys(self, row: dict[str, Any]) -> list[list[int]]:
        """The KEYS of every context of a row with every target of it."""
        context, target = "context", "target"
        if self.direction == "reverse":
            context, target = target, context
        of_row = [row[f"{target}_key"], row[f"{context}_key"]]
        texts = itertools.product(row[f"{context}_text_keys"], row[f"{target}_text_keys"])
        return [[*of_row, target_text, context_text] for context_text, target_text in texts]


def with_predictors(ids: list[int], predictors: Sequence[int], position: str, header: int) -> list[int]:
    """A view with its predictor tokens: "last", or "first" in front of its content, after `header` tokens."""
    at = len(ids) if position == "last" else header
    return [*ids[:at], *predictors, *ids[at:]]


def keys_of(batch: dict[str, Tensor]) -> PairKeys:
    """The keys of a batch's pairs: two targets (contexts) are equal if their rows' or their own texts are."""
    target, context, target_text, context_text = (batch[name] for name in KEYS)  # [P] each
    return PairKeys((target, target_text), (context, context_text))


def _flat(places: list[Place], first: dict[int, int]) -> list[int]:
    """(segment, token) places -> flat places in [R * L]; `first` is where each segment starts."""
    return [first[s] + token for s, token in places]


KEYS = ("target_key", "context_key", "target_text_key", "context_text_key")
CONTENT_COLUMNS = ("context_start", "context_end", "target_start", "target_end")


@dataclass
class _RowBuilder:
    """Lists of one row, one entry a token, that grow by a segment at a time."""

    cells: dict[str, list[int]] = field(default_factory=lambda: {key: [] for key in ("input_ids", *FILL)})
    counts: list[int] = field(default_factory=lambda: [0] * KINDS)  # segments of each kind so far
    lm_doc: int = NO_PARENT  # doc of the LM row that the next views belong to

    def append(self, segment: Segment) -> None:
        n = len(segment.ids)
        # Numbered within its kind, so that doc % KINDS is the kind and no two segments of a row have the same doc.
        doc = self.counts[segment.kind] * KINDS + segment.kind
        self.counts[segment.kind] += 1
        if segment.kind == LM_ROW:
            self.lm_doc = doc
        self.cells["input_ids"] += segment.ids
        self.cells["labels"] += segment.labels or [IGNORE] * n
        self.cells["doc"] += [doc] * n
        self.cells["position_ids"] += range(segment.start, segment.start + n)
        self.cells["parent"] += [self.lm_doc if segment.start else NO_PARENT] * n
        self.cells["visible"] += [segment.start] * n


def _table_rows(row: dict[str, Any]) -> list[int]:
    if "target_table_rows" not in row:
        raise UserError(
            "target_encoder: base has targets only for the data sets that it started with; pass this one as "
            "eval_dataset at the start, or use target_encoder: self."
        )
    rows: list[int] = row["target_table_rows"]
    return rows


def rows_apart(sequences: Sequence[Sequence[int]], pad_token_id: int, readout: str) -> dict[str, Tensor]:
    """N sequences, one a row: `apart_input_ids`, `apart_attention_mask` [N, L], `target_at` [N] or [N, W]."""
    width = max(map(len, sequences))
    ids, mask, places = [], [], []
    for r, sequence in enumerate(sequences):
        padding = width - len(sequence)
        first = 0 if readout == "mean" else len(sequence) - 1
        ids.append([*sequence, *[pad_token_id] * padding])
        mask.append([1] * len(sequence) + [0] * padding)
        places.append([r * width + i for i in range(first, len(sequence))])
    return {
        "apart_input_ids": torch.tensor(ids),
        "apart_attention_mask": torch.tensor(mask),
        "target_at": as_places(places),
    }


def as_places(places: list[list[int]]) -> Tensor:
    """Lists of flat places -> [P] if each has one place, else [P, W], filled up with -1."""
    width = max(map(len, places))
    at = torch.tensor([one + [-1] * (width - len(one)) for one in places])  # [P, W]
    return at[:, 0] if width == 1 else at


def share_rows(lengths: Sequence[int], row_cost: int) -> list[list[int]]:
    """Assign examples to rows: first fit, longest first, at the row length of least cost, sum of L * (row_cost + L)."""
    total, longest = sum(lengths), max(lengths)
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    best: tuple[float, list[list[int]]] = (float("inf"), [])
    # Each number of rows suggests a capacity; the fit may need more rows than that, and its cost says so.
    for capacity in {max(longest, -(-total // count)) for count in range(1, len(lengths) + 1)}:
        rows: list[list[int]] = []
        room: list[int] = []
        for i in order:
            r = next((r for r, free in enumerate(room) if free >= lengths[i]), len(rows))
            if r == len(rows):
                rows.append([])
                room.append(capacity)
            rows[r].append(i)
            room[r] -= lengths[i]
        length = capacity - min(room)  # of the fullest row: all rows of a batch are padded to it
        best = min(best, (len(rows) * length * (row_cost + length), rows))
    return best[1]


def lm_rows_only(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch without its views, on its device: the LM rows as they were shared, and no longer than needed.

    The collator has laid out the views before the coin of `jepa_dropout` falls, because it runs ahead of the training.
    """
    doc = batch["doc"]
    keep = (doc >= 0) & (doc % KINDS == LM_ROW)  # [R, L]
    count = keep.sum(dim=1)  # [R]
    length, rows = int(count.max()), count > 0
    # A stable sort moves the kept tokens to the left, past the tokens that were dropped between them.
    order = torch.sort((~keep).to(torch.uint8), dim=1, stable=True).indices[rows, :length]
    padding = torch.arange(length, device=doc.device) >= count[rows, None]
    fill = {"input_ids": 0, **FILL}
    kept = {
        key: batch[key][rows].gather(1, order).masked_fill(padding, value)
        for key, value in fill.items()
        if key in batch
    }
    row, column = batch["lm_at"] // doc.shape[1], batch["lm_at"] % doc.shape[1]  # [B] each
    kept["lm_at"] = (rows.cumsum(0)[row] - 1) * length + keep.cumsum(1)[row, column] - 1
    return kept
