"""Which layout of rows does this model compute exactly? A short probe of the model itself; there is no list of names.

Attention that takes any mask and any positions computes packed rows exactly. Recurrent, convolutional and ALiBi layers
do not: some of them raise, others silently mix neighbouring sequences or use row offsets as positions. Comparing the
hidden states of a few short rows exposes both, before anything is trained.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from ..core.diagnostics import evaluating
from ..core.errors import UserError, first_line, show_traceback
from .attention import Attention, attention_of_views, model_inputs
from .batching import JEPACollator, Layout, PackedExample, Place
from .reading import without_router_loss

logger = logging.get_logger(__name__)

# Windows that count tokens of the row (gpt_neo keeps its window in a buffer) or pick tokens from all of it (doge, the
# sparse attention of deepseek_v32). They are set when the model is made and are longer than the rows of the probe, so
# the probe cannot see them.
UNTRIED_SPAN = re.compile(r"window_(size|len)|index_topk")


def choose_layout(model: PreTrainedModel, num_predictor_tokens: int) -> Layout:
    """The cheapest layout that this model computes exactly, found by a few short forward passes.

    Perturbation: change tokens that others must not see; no state of the others may move by a bit. Equality: every
    state must be that of the same sequence alone (positions, windows). Windows are 8 tokens wide during the probe.

    Raises UserError if the model computes none of them, or if its attention cannot take the mask predictor tokens need.
    """
    backend = model.config._attn_implementation
    if backend == "flex_attention":
        raise UserError("attn_implementation: flex_attention is not verified here; set attn_implementation: sdpa.")
    if "flash" in str(backend):
        if num_predictor_tokens:
            raise UserError(
                f"attn_implementation: {backend} cannot take the mask of predictor tokens, which see a part of another "
                "segment; set attn_implementation: sdpa, or num_predictor_tokens: 0."
            )
        return _first_exact(model, 0, ("flat", "separate"))
    return _first_exact(model, num_predictor_tokens, ("packed", "separate"))


def agree_on_layout(
    model: PreTrainedModel, num_predictor_tokens: int, world_size: int, *, probes: bool
) -> tuple[Layout, str]:
    """`choose_layout` on the ranks with `probes`; all ranks get the answer of rank 0. (layout, error or "")."""
    decision: list[Any] = ["packed", ""]
    if probes:
        try:
            decision[0] = choose_layout(model, num_predictor_tokens)
        except UserError as reason:
            decision[1] = str(reason)
    if world_size > 1:
        broadcast_object_list(decision)
    layout, error = decision
    return layout, error


def _first_exact(model: PreTrainedModel, num_predictor_tokens: int, layouts: Sequence[Layout]) -> Layout:
    reasons: list[str] = []
    for layout in layouts:
        reason = why_inexact(model, layout, num_predictor_tokens)
        if reason is None:
            if reasons:
                logger.warning(
                    f"{type(model).__name__} does not compute packed rows exactly, so every view gets its own row: "
                    f"exact, but more tokens. (Probe: {reasons[0]})"
                )
            return layout
        reasons.append(f"{layout} rows: {reason}")
    raise UserError(
        f"{type(model).__name__} computes no layout of the views exactly ({'; '.join(reasons)}); train plain SFT with "
        "jepa_weight: 0, or choose another model."
    )


@torch.no_grad()
def why_inexact(model: PreTrainedModel, layout: Layout, num_predictor_tokens: int = 2) -> str | None:
    """None if the states of `layout` are those of separate sequences; otherwise the difference, in a few words."""
    config = model.config.get_text_config()
    spans = [key for key, value in config.to_dict().items() if value and UNTRIED_SPAN.search(key)]
    if layout == "packed" and spans:
        return f"its {spans[0]} counts tokens of the row"
    sample = _Sample.draw(config.vocab_size, layout, num_predictor_tokens, model.device)
    with evaluating(model), without_router_loss(model), _narrow_windows(config), _full_float32():
        try:
            states = sample.states(model, sample.batch["input_ids"])  # [R * L, D]
            leak = _leak(model, sample, states, config.vocab_size)
            error = _error(model, sample, states)
        except Exception as reason:  # whatever a model raises that cannot take these inputs
            show_traceback(reason)
            return f"{type(reason).__name__}: {first_line(reason)[:80]}"
    tolerance = max(1e-4, torch.finfo(model.dtype).eps ** 0.5)
    # The matrix products of experts are grouped over all tokens, so another token changes their last bits.
    allowed_leak = tolerance / 10 if any("expert" in key for key in config.to_dict()) else 0.0
    # Written with `not`, so that NaN fails.
    if not leak <= allowed_leak:
        return f"states depend on tokens they must not see (by {leak:.1e})"
    if not error <= tolerance:
        return f"states differ from those of the sequences alone (by {error:.1e})"
    return None


@dataclass(frozen=True)
class _Sample:
    """Two random examples, laid out together: the smallest batch in which every kind of mixing can happen."""

    rows: list[dict[str, Any]]
    examples: list[PackedExample]
    batch: dict[str, Tensor]  # [R, L] each, on the device of the model
    spans: dict[Place, range]  # (example, segment) -> its flat places
    attention: Attention

    @classmethod
    def draw(cls, vocab_size: int, layout: Layout, num_predictor_tokens: int, device: torch.device) -> _Sample:
        generator = torch.Generator().manual_seed(0)

        def tokens(n: int) -> list[int]:
            return torch.randint(min(10, vocab_size // 2), vocab_size, (n,), generator=generator).tolist()

        rows = []
        for prompt, completion, target in ((17, 9, 12), (13, 7, 14)):
            lm = tokens(prompt + completion)
            views = {"contexts": [lm[: prompt - 2]], "targets": [[lm[0], *tokens(target)]]}  # all begin with one BOS
            rows.append({"input_ids": lm, "labels": lm, "context_header": 1, "target_header": 1, **views})
        # The row cost is so high that both examples share one row.
        collator = JEPACollator(0, tokens(num_predictor_tokens), layout=layout, row_cost=10**9)
        examples = [collator.example(row) for row in rows]
        tensors, start = collator.lay_out(examples)
        spans = {(e, s): range(at, at + len(examples[e].segments[s].ids)) for (e, s), at in start.items()}
        attention = attention_of_views(layout)
        return cls(rows, examples, {key: value.to(device) for key, value in tensors.items()}, spans, attention)

    def states(self, model: PreTrainedModel, input_ids: Tensor) -> Tensor:
        """Token ids [R, L] in this layout -> last states [R * L, D], float32."""
        inputs = model_inputs({**self.batch, "input_ids": input_ids}, model, self.attention)
        return _last_states(model, **inputs).flatten(0, 1)

    def secrets(self) -> Iterator[tuple[list[int], list[int]]]:
        """(places that change, places that must not notice): other views and completions, and the other example."""
        everything = {i for span in self.spans.values() for i in span}
        for (e, s), span in self.spans.items():
            # Nobody else sees a view. Of an LM row, the views of its example see the prompt and not the completion.
            hidden = span if s > 0 else span[len(self.rows[e]["contexts"][0]) :]
            yield list(hidden), sorted(everything - set(hidden))
        first = [i for (e, _), span in self.spans.items() if e == 0 for i in span]
        second = [i for (e, _), span in self.spans.items() if e == 1 for i in span]
        yield first, second


def _last_states(model: PreTrainedModel, **inputs: Any) -> Tensor:
    output = model(**{"use_cache": False, **inputs}, logits_to_keep=1, output_hidden_states=-1)
    return output.hidden_states[-1].float()


def _leak(model: PreTrainedModel, sample: _Sample, states: Tensor, vocab_size: int) -> float:
    """Change tokens that are hidden from others, and return how far the states of the others move."""
    ids, leak = sample.batch["input_ids"], 0.0
    for changed, others in sample.secrets():
        swapped = ids.flatten().clone()
        swapped[changed] = (swapped[changed] * 7 + 3) % vocab_size
        after = sample.states(model, swapped.view(ids.shape))
        leak = max(leak, _distance(after[others], states[others]))
    return leak


def _error(model: PreTrainedModel, sample: _Sample, states: Tensor) -> float:
    """How far the states are from those of each sequence in a pass of its own."""
    error = 0.0
    for (e, s), span in sample.spans.items():
        segment = sample.examples[e].segments[s]
        sequence = sample.rows[e]["input_ids"][: segment.start] + segment.ids
        alone = _last_states(model, input_ids=torch.tensor([sequence], device=model.device))[0]  # [n, D]
        error = max(error, _distance(states[list(span)], alone[segment.start :]))
    return error


def _distance(a: Tensor, b: Tensor) -> float:
    """The largest relative distance of states [n, D]. NaN counts as infinitely far: max(0.0, nan) would be 0.0."""
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=1e-9)).nan_to_num(nan=torch.inf).max())


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    """Switch off TF32 (`tf32: true`) during the probe: it rounds by more than a wrong layout changes."""
    name, exact = ("fp32_precision", "ieee") if torch.__version__ >= (2, 9) else ("allow_tf32", False)  # type: ignore[operator]
    backend = torch.backends.cuda.matmul
    before = getattr(backend, name)
    setattr(backend, name, exact)
    try:
        yield
    finally:
        setattr(backend, name, before)


@contextlib.contextmanager
def _narrow_windows(config: Any) -> Iterator[None]:
    """Make windows and chunks 8 tokens wide during the probe: real ones are longer than its rows."""
    widths = {}
    for key in ("sliding_window", "attention_chunk_size"):
        if getattr(config, key, None):
            widths[key] = getattr(config, key)
    try:
        for key in widths:
            setattr(config, key, 8)
        yield
    finally:
        for key, value in widths.items():
            setattr(config, key, value)
