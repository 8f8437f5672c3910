"""Views -> rows -> one forward pass, exact against separate passes over each view in loss and gradient.

    [ LM row ][ predictor tokens ][ target view ][ pad ]                     context_view="prefix"
    [ LM row ][ context view, predictor tokens ][ target view ][ pad ]       context_view="message"

A view is a sequence of its own. What it has in common with the start of its example's LM row (all of a `prefix` context
or just a BOS token) is not repeated: the rest continues from there. So the predictor tokens of a `prefix` context lie
after the LM row, but see the prompt and no completion, at the positions after the prompt. Putting them *inside* the
row would let the model's label shift train the first completion token from a predictor token.

Three int tensors [R, L] say who sees whom; no L x L tensor leaves the collator:

    doc      which segment a token belongs to; it sees that segment, causally. doc % KINDS is its kind; -1 is padding.
    parent   a second segment it sees (its example's LM row), or NO_PARENT
    visible  how many of the parent's first positions it sees

Padding sees padding, because a row of -inf scores is NaN in eager attention. A row may hold several examples.

This is exact for attention with rotary or absolute positions, windowed and chunked layers included (by *position*; by
place in the row they would be wrong). Recurrent, convolutional and ALiBi layers would be wrong without a word, so
`probe.choose_layout` tries the model itself: what it does not compute exactly goes into rows of their own ("separate").
Flash attention takes no such mask; there, segments without shared prefixes lie in one row ("flat").
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..core.errors import UserError
from .views import IGNORE

PAD, NO_PARENT = -1, -2
LM_ROW, CONTEXT, TARGET = 0, 1, 2
KINDS = 3
Layout = Literal["packed", "separate", "flat"]


class Segment(NamedTuple):
    kind: int
    ids: list[int]
    start: int = 0  # its first position, and how many of the LM row's first tokens it sees
    labels: list[int] | None = None


class Example(NamedTuple):
    """An LM row and its views. A read is the (segment, token) places whose mean state is the embedding."""

    segments: list[Segment]
    contexts: list[list[tuple[int, int]]]
    targets: list[list[tuple[int, int]]]
    apart: list[list[int]]  # target views that stay out of the segments


@dataclass(frozen=True)
class JEPACollator:
    """Rows of `views.add_view_columns` -> a batch of plain tensors.

    Every batch: `input_ids`, `labels`, `doc` [R, L]; what the layout needs: `position_ids`, `parent`, `visible`
    (packed), `attention_mask` (separate), `position_ids` (flat, R = 1); and `lm_at` [B], the place of each LM row in
    the flattened [R * L] tokens. Without views that is all. With views, for P pairs (every context of an example with
    every target of it): `context_at`, `target_at`, flat places too, [P] or, for a mean, [P, W] filled up with -1;
    `target_key` [P], equal for equal targets; `example_of_pair` [P].

    Args:
        pad_token_id, pad_to_multiple_of: padding, on the right.
        predictor_ids: predictor tokens of every context.
        with_views: False gives plain SFT rows.
        layout: see the head of this module; from `probe.choose_layout`.
        row_cost: 0 keeps one example a row. Otherwise several examples share a row where that is cheaper, at
            row_cost + L per token of a row of length L (6 * hidden_size: a transformer layer's own ratio).
        readout: "last": the embedding is the state of the view's last token; "mean": of all its tokens.
        predictor_position: "last" after the context, "first" before its content (the paper's ablation, table 3).
        direction: "reverse": the completion predicts the prompt (the paper's Code -> Text, table 3).
        targets: "inside" the rows; "apart": `apart_input_ids`, `apart_attention_mask` [T, L'], which `target_at`
            then indexes, for a pass without gradient; "cached": `target_embedding` [P, D], rows of `target_table` that
            the `target_rows` column names.
        with_tubes: also `content` [B, 4] and `index` [B], for `semantic_tube`.
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
    targets: Literal["inside", "apart", "cached"] = "inside"
    target_table: Tensor | None = None
    with_tubes: bool = False

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        examples = [self.example(row) for row in rows]
        lines = self._lines(examples)
        batch, place = self._lay_out(examples, lines)
        batch["lm_at"] = torch.tensor([place[number, 0] for number in range(len(rows))])
        if self.with_tubes:
            batch |= {key: torch.tensor([row[key] for row in rows]) for key in ("content", "index")}
        if not self.with_views:
            return batch
        contexts: list[list[int]] = []
        targets: list[list[int]] = []  # places in the rows, rows apart, or rows of the table
        apart: list[list[int]] = []
        keys, owners = [], []
        for number, (row, e) in enumerate(zip(rows, examples, strict=True)):
            reads = [[place[number, s] + token for s, token in read] for read in e.contexts]
            goals = [[place[number, s] + token for s, token in read] for read in e.targets]
            goals += [[len(apart) + i] for i in range(len(e.apart))]
            apart += e.apart
            if self.targets == "cached":
                goals = [[i] for i in _cached_rows(row)]
            for read in reads:  # every context with every target
                contexts += [read] * len(goals)
                targets += goals
            keys += [row["context_key" if self.direction == "reverse" else "target_key"]] * (len(reads) * len(goals))
            owners += [number] * (len(reads) * len(goals))
        batch["context_at"], target = _reads(contexts), _reads(targets)
        batch["target_key"], batch["example_of_pair"] = torch.tensor(keys), torch.tensor(owners)
        if self.targets == "cached":
            assert self.target_table is not None
            return {**batch, "target_embedding": self.target_table[target]}
        if self.targets == "apart":
            alone = rows_apart(apart, self.pad_token_id, self.readout)
            return {**batch, **alone, "target_at": alone["target_at"][target]}
        return {**batch, "target_at": target}

    def example(self, row: dict[str, Any]) -> Example:
        """The segments of one example, and where its embeddings are read."""
        lm = row["input_ids"]
        # Never predicted: nothing stands before it in its own row, and another example may in this one.
        segments = [Segment(LM_ROW, lm, labels=[IGNORE, *row["labels"][1:]])]
        if not self.with_views:
            return Example(segments, [], [], [])
        sources, goals, header = row["contexts"], row["targets"], row["headers"][0]
        if self.direction == "reverse":
            sources, goals, header = goals, sources, row["headers"][1]
        contexts = []
        for ids in sources:
            at = len(ids) if self.predictor_position == "last" else header
            contexts.append(self._add(segments, CONTEXT, [*ids[:at], *self.predictor_ids, *ids[at:]]))
        if self.targets == "inside":
            return Example(segments, contexts, [self._add(segments, TARGET, ids) for ids in goals], [])
        return Example(segments, contexts, [], goals if self.targets == "apart" else [])

    def _add(self, segments: list[Segment], kind: int, ids: list[int]) -> list[tuple[int, int]]:
        """Append what the LM row does not hold already; returns the places to read."""
        lm = segments[0].ids
        shared = next((i for i, (a, b) in enumerate(zip(ids, lm, strict=False)) if a != b), min(len(ids), len(lm)))
        if self.layout != "packed" and shared < len(ids):
            shared = 0
        places = [(0, token) for token in range(shared)]
        if shared < len(ids):
            places += [(len(segments), token) for token in range(len(ids) - shared)]
            segments.append(Segment(kind, ids[shared:], start=shared))
        return places if self.readout == "mean" else places[-1:]

    def _lines(self, examples: list[Example]) -> list[list[tuple[int, int]]]:
        """Which (example, segment) lie in which row, in order."""
        all_of = [[(number, s) for s in range(len(e.segments))] for number, e in enumerate(examples)]
        if self.layout == "flat":
            return [list(itertools.chain(*all_of))]
        if self.layout == "separate":
            return [[place] for place in sorted(itertools.chain(*all_of), key=lambda place: place[1] > 0)]
        if not self.row_cost:
            return all_of
        lengths = [sum(len(segment.ids) for segment in e.segments) for e in examples]
        return [list(itertools.chain(*(all_of[i] for i in line))) for line in share_rows(lengths, self.row_cost)]

    def _lay_out(
        self, examples: list[Example], lines: list[list[tuple[int, int]]]
    ) -> tuple[dict[str, Tensor], dict[tuple[int, int], int]]:
        """The token tensors, and the flat index of each segment's first token."""
        lengths = [sum(len(examples[e].segments[s].ids) for e, s in line) for line in lines]
        length = -(-max(lengths) // self.pad_to_multiple_of) * self.pad_to_multiple_of
        if self.layout == "flat":
            length = max(lengths)  # padding would be a sequence of its own
        fill = {"input_ids": self.pad_token_id, "labels": IGNORE, "doc": PAD, "position_ids": 0}
        fill |= {"parent": NO_PARENT, "visible": 0}
        columns: dict[str, list[list[int]]] = {key: [] for key in fill}
        place: dict[tuple[int, int], int] = {}
        for r, line in enumerate(lines):
            cells: dict[str, list[int]] = {key: [] for key in fill}
            counts = [0] * KINDS
            lm_doc = NO_PARENT
            for e, s in line:
                segment = examples[e].segments[s]
                n = len(segment.ids)
                doc = counts[segment.kind] * KINDS + segment.kind
                counts[segment.kind] += 1
                lm_doc = doc if segment.kind == LM_ROW else lm_doc
                place[e, s] = r * length + len(cells["doc"])
                cells["input_ids"] += segment.ids
                cells["labels"] += segment.labels or [IGNORE] * n
                cells["doc"] += [doc] * n
                cells["position_ids"] += range(segment.start, segment.start + n)
                cells["parent"] += [lm_doc if segment.start else NO_PARENT] * n
                cells["visible"] += [segment.start] * n
            for key, value in fill.items():
                columns[key].append(cells[key] + [value] * (length - len(cells[key])))
        batch = {key: torch.tensor(column) for key, column in columns.items()}
        one_each = all(len(line) == 1 for line in lines)
        if self.layout == "separate" or self.layout == "packed" and one_each and not self.with_views:
            batch["attention_mask"] = (batch["doc"] != PAD).long()
            del batch["position_ids"], batch["parent"], batch["visible"]
        elif self.layout == "flat":
            del batch["parent"], batch["visible"]
        return batch, place


def _cached_rows(row: dict[str, Any]) -> list[int]:
    if "target_rows" not in row:
        raise UserError(
            "target_encoder: base has targets for the data sets it started with alone; pass this one as eval_dataset "
            "at the start, or use target_encoder: self."
        )
    rows: list[int] = row["target_rows"]
    return rows


def rows_apart(sequences: Sequence[Sequence[int]], pad_token_id: int, readout: str) -> dict[str, Tensor]:
    """N sequences in rows of their own: `apart_input_ids`, `apart_attention_mask` [N, L], `target_at` [N] or [N, W]."""
    width = max(map(len, sequences))
    first = [0 if readout == "mean" else len(ids) - 1 for ids in sequences]
    return {
        "apart_input_ids": torch.tensor([[*ids, *[pad_token_id] * (width - len(ids))] for ids in sequences]),
        "apart_attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in sequences]),
        "target_at": _reads([[r * width + i for i in range(first[r], len(ids))] for r, ids in enumerate(sequences)]),
    }


def _reads(places: list[list[int]]) -> Tensor:
    width = max(map(len, places))
    at = torch.tensor([read + [-1] * (width - len(read)) for read in places])
    return at[:, 0] if width == 1 else at


def share_rows(lengths: Sequence[int], row_cost: int) -> list[list[int]]:
    """Examples -> rows: first fit, longest first, at the row length of least cost, sum of L * (row_cost + L)."""
    total, longest = sum(lengths), max(lengths)
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    best: tuple[float, list[list[int]]] = (float("inf"), [])
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
        length = capacity - min(room)
        best = min(best, (len(rows) * length * (row_cost + length), rows))
    return best[1]


def lm_rows_only(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch with its views taken out, on its device: the rows of `with_views=False`, as they were shared with views,
    and padded no further than needed."""
    doc = batch["doc"]
    keep = (doc >= 0) & (doc % KINDS == LM_ROW)
    keys = [key for key in ("input_ids", "labels", "doc", "position_ids", "parent", "visible") if key in batch]
    count = keep.sum(dim=1)
    length, rows = int(count.max()), count > 0
    # Kept tokens move left past what was dropped between them.
    order = torch.sort((~keep).to(torch.uint8), dim=1, stable=True).indices[rows, :length]
    padding = torch.arange(length, device=doc.device) >= count[rows, None]
    fill = {"labels": IGNORE, "doc": PAD, "position_ids": 0, "parent": NO_PARENT, "visible": 0, "input_ids": 0}
    plain: dict[str, Tensor] = {key: batch[key][rows].gather(1, order).masked_fill(padding, fill[key]) for key in keys}
    if "attention_mask" in batch or "parent" in batch and not bool((plain["doc"] > LM_ROW).any()):
        plain["attention_mask"] = (~padding).long()
        for key in ("position_ids", "parent", "visible"):
            plain.pop(key, None)
    return plain


# -- what the model takes ---------------------------------------------------------------------------------------------


def who_sees_whom(doc: Tensor, parent: Tensor, visible: Tensor, position_ids: Tensor) -> Tensor:
    """[R, L] each -> bool [R, L (query), L (key)], True where the query may look."""
    order = torch.arange(doc.shape[1], device=doc.device)
    own = (doc[:, :, None] == doc[:, None, :]) & (order[:, None] >= order[None, :])
    inherited = (parent[:, :, None] == doc[:, None, :]) & (position_ids[:, None, :] < visible[:, :, None])
    return own | inherited


def attention_mask(batch: dict[str, Tensor], model: PreTrainedModel) -> Tensor | dict[str, Tensor]:
    """[R, 1, L, L], or one for each of the model's layer types; windows and chunks count positions, not places.

    sdpa takes a bool mask. Eager attention *adds* the mask to its scores, so a bool one would be a silent error there.
    """
    config = model.config.get_text_config()
    position = batch["position_ids"]
    sees = who_sees_whom(batch["doc"], batch["parent"], batch["visible"], position)
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    layers = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"]
    masks = {}
    for kind in sorted(set(layers)):
        mask = sees
        if kind == "sliding_attention" and window:
            mask = sees & (position[:, :, None] - position[:, None, :] < window)
        elif kind == "chunked_attention" and chunk:
            mask = sees & (position[:, :, None] // chunk == position[:, None, :] // chunk)
        mask = mask[:, None]
        if model.config._attn_implementation == "eager":
            blank = torch.zeros(mask.shape, dtype=model.dtype, device=mask.device)
            mask = blank.masked_fill_(~mask, torch.finfo(model.dtype).min)
        masks[kind] = mask
    return masks if len(masks) > 1 else next(iter(masks.values()))


def model_inputs(batch: dict[str, Tensor], model: PreTrainedModel) -> dict[str, Any]:
    """What the model's forward takes for a collated batch. The mask is built once, on the batch's device."""
    inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "use_cache": False}
    if "parent" in batch:
        return {**inputs, "position_ids": batch["position_ids"], "attention_mask": attention_mask(batch, model)}
    if "attention_mask" in batch:
        return {**inputs, "attention_mask": batch["attention_mask"]}
    return {**inputs, "position_ids": batch["position_ids"]}  # flat: transformers starts a sequence at every restart


def read(hidden: Tensor, at: Tensor) -> Tensor:
    """States [R, L, D] at flat places [P], or averaged over [P, W] (-1: nothing) -> [P, D]."""
    flat = hidden.flatten(0, 1)
    if at.dim() == 1:
        return flat[at]
    there = (at >= 0)[..., None]
    return (flat[at.clamp(min=0)] * there).sum(dim=1) / there.sum(dim=1)


def read_pairs(hidden: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """States [R, L, D] of one layer -> `predicted`, `target`, both [P, D]."""
    return read(hidden, batch["context_at"]), read(hidden, batch["target_at"])


@torch.no_grad()
def embed_targets(model: torch.nn.Module, batch: dict[str, Tensor], *, layer: int = -1) -> Tensor:
    """`target` [P, D] of a batch whose targets lie apart, in a forward pass of their own, without gradient."""
    output = model(
        input_ids=batch["apart_input_ids"],
        attention_mask=batch["apart_attention_mask"],
        use_cache=False,
        logits_to_keep=no_logits(batch["apart_input_ids"].device),
        output_hidden_states=layer,
    )
    return read(output.hidden_states[layer], batch["target_at"])


def no_logits(device: torch.device) -> Tensor:
    """A `logits_to_keep` that spares the LM head: even one logit a row reads all of it."""
    return torch.empty(0, dtype=torch.long, device=device)


@torch.no_grad()
def embed_pairs(
    model: torch.nn.Module, base: PreTrainedModel, batches: Iterable[dict[str, Tensor]], *, layer: int = -1
) -> tuple[Tensor, Tensor, Tensor]:
    """`predicted`, `target` [N, D] float32 and `target_key` [N] of batches, in evaluation mode.

    `model` is called; `base` is the same model without its DDP or PEFT wrapper. The training mode is put back.
    """
    parts: list[tuple[Tensor, ...]] = []
    with evaluating(model):
        for cpu_batch in batches:
            batch = {key: value.to(base.device) for key, value in cpu_batch.items()}
            keep = no_logits(base.device)
            output = model(**model_inputs(batch, base), logits_to_keep=keep, output_hidden_states=layer)
            predicted, target = read_pairs(output.hidden_states[layer], batch)
            parts.append((predicted.float(), target.float(), batch["target_key"]))
    predicted, target, key = (torch.cat(column) for column in zip(*parts, strict=True))
    return predicted, target, key


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside; the mode before it afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextlib.contextmanager
def router_logits_of(model: PreTrainedModel, enabled: bool) -> Iterator[list[Tensor]]:
    """Collects the router logits of the forward passes inside, one [tokens, experts] per layer, if `enabled`.

    Asked for in the usual way, the model would also compute the loss, and take a packed row's mask for padding.
    """
    found: list[Tensor] = []
    if not enabled:
        yield found
        return

    def ask(module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "output_router_logits": True}

    def keep(module: Any, args: Any, output: Any) -> None:
        found[:] = output.router_logits

    decoder = model.get_decoder()
    hooks = [decoder.register_forward_pre_hook(ask, with_kwargs=True), decoder.register_forward_hook(keep)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def router_loss(model: PreTrainedModel, router_logits: Sequence[Tensor], batch: dict[str, Tensor]) -> Tensor:
    """The load-balancing loss of a mixture of experts over the tokens of the LM rows alone, as plain SFT has it."""
    balance = sys.modules[type(model).__module__].load_balancing_loss_func  # the family's own
    config = model.config.get_text_config()
    lm_tokens = ((batch["doc"] >= 0) & (batch["doc"] % KINDS == LM_ROW)).long()
    experts = getattr(config, "num_experts", None) or config.num_local_experts
    loss: Tensor = balance(tuple(router_logits), experts, config.num_experts_per_tok, lm_tokens)
    return loss
