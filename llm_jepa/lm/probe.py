"""Which layout does this very model compute exactly? Asked of the model, not of a list of names.

Attention that takes any mask and any positions gets packed rows. Recurrent, convolutional and ALiBi layers would be
wrong without a word: some raise, some mix neighbours in a row, some count places for positions. Both kinds of silence
show in the hidden states of a few short rows, so nothing is trained before they have been compared.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from ..core.errors import UserError
from .batching import JEPACollator, Layout, evaluating, model_inputs

logger = logging.get_logger(__name__)

# Spans that layers count in places of the row (gpt_neo's window is a buffer) or pick from all of it (doge, the sparse
# attention of deepseek_v32). They are read when the model is made, longer than any row worth trying, and so unseen.
UNTRIED_SPAN = re.compile(r"window_(size|len)|index_topk")


def choose_layout(model: PreTrainedModel, num_predictor_tokens: int) -> Layout:
    """The cheapest layout that this very model computes exactly. Two short forward passes and six of one sequence.

    Perturbation: tokens that must be invisible change, and no other state may move by a bit (leaks). Equality: every
    state is that of the same sequence alone (positions, windows). Windows are made 8 tokens wide meanwhile.

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


def _first_exact(model: PreTrainedModel, num_predictor_tokens: int, layouts: Sequence[Layout]) -> Layout:
    reasons: list[str] = []
    for layout in layouts:
        reason = why_inexact(model, layout, num_predictor_tokens)
        if reason is None:
            if reasons:
                logger.warning(
                    f"{type(model).__name__} cannot read packed rows, so every view gets a row of its own: exact, but "
                    f"more tokens. (Probe: {reasons[0]})"
                )
            return layout
        reasons.append(f"{layout} rows: {reason}")
    raise UserError(
        f"{type(model).__name__} computes no layout of the views exactly ({'; '.join(reasons)}); train plain SFT with "
        "jepa_weight: 0, or choose another model."
    )


@torch.no_grad()
def why_inexact(model: PreTrainedModel, layout: Layout, num_predictor_tokens: int = 2) -> str | None:
    """None if the states of `layout` are those of separate sequences; otherwise what is wrong, in a few words."""
    config = model.config.get_text_config()
    spans = [key for key, value in config.to_dict().items() if value and UNTRIED_SPAN.search(key)]
    if layout == "packed" and spans:
        return f"its {spans[0]} goes by the row"
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> list[int]:
        return torch.randint(min(10, config.vocab_size // 2), config.vocab_size, (n,), generator=generator).tolist()

    def states(**inputs: Any) -> Tensor:
        output = model(**{"use_cache": False, **inputs}, logits_to_keep=1, output_hidden_states=-1)
        return output.hidden_states[-1].float()

    def moved(a: Tensor, b: Tensor) -> float:
        # NaN is infinitely far: max(0.0, nan) would be 0.0.
        return float(((a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=1e-9)).nan_to_num(nan=torch.inf).max())

    rows: list[dict[str, Any]] = []
    for prompt, completion, target in ((17, 9, 12), (13, 7, 14)):
        lm = draw(prompt + completion)
        views = {"contexts": [lm[: prompt - 2]], "targets": [[lm[0], *draw(target)]]}  # all begin with one BOS token
        rows.append({"input_ids": lm, "labels": lm, "headers": [1, 1], "target_key": 0, **views})
    collator = JEPACollator(0, draw(num_predictor_tokens), layout=layout, row_cost=10**9)  # both examples in one row
    examples = [collator.example(row) for row in rows]
    cpu_batch, place = collator._lay_out(examples, collator._lines(examples))
    batch = {key: value.to(model.device) for key, value in cpu_batch.items()}
    ids, shape = batch["input_ids"], batch["input_ids"].shape
    # What may change -> what must then stay: other views and completions, and the whole other example.
    secrets: list[tuple[list[int], list[int]]] = []
    places = {key: range(at, at + len(examples[key[0]].segments[key[1]].ids)) for key, at in place.items()}
    everything = {i for span in places.values() for i in span}
    for (e, s), span in places.items():
        hidden = span[len(rows[e]["contexts"][0]) :] if s == 0 else span
        own = {i for key, other in places.items() if key == (e, s) for i in other} if s == 0 else set(span)
        secrets.append(
            (list(hidden), sorted(everything - set(hidden) - (own - set(span[: hidden.start - span.start]))))
        )
    secrets.append(
        ([i for (e, _), span in places.items() if e == 0 for i in span],
         [i for (e, _), span in places.items() if e == 1 for i in span])
    )  # fmt: skip
    with evaluating(model), _narrow_windows(config), _full_float32():
        try:
            packed = states(**model_inputs(batch, model)).flatten(0, 1)
            leak = 0.0
            for changed, kept in secrets:
                swapped = ids.flatten().clone()
                swapped[changed] = (swapped[changed] * 7 + 3) % config.vocab_size
                after = states(**model_inputs({**batch, "input_ids": swapped.view(shape)}, model)).flatten(0, 1)
                leak = max(leak, moved(after[kept], packed[kept]))
            error = 0.0
            for (e, s), span in places.items():
                segment = examples[e].segments[s]
                sequence = rows[e]["input_ids"][: segment.start] + segment.ids
                alone = states(input_ids=torch.tensor([sequence], device=model.device))[0]
                error = max(error, moved(packed[list(span)], alone[segment.start :]))
        except Exception as reason:  # whatever a model raises that cannot take these inputs
            return f"{type(reason).__name__}: {(str(reason).splitlines() or [''])[0][:80]}"
    tolerance = max(1e-4, torch.finfo(model.dtype).eps ** 0.5)
    # Experts' matrix products are grouped over all tokens: another token changes their last bits.
    if not leak <= (tolerance / 10 if any("expert" in key for key in config.to_dict()) else 0.0):
        return f"states depend on tokens they must not see (by {leak:.1e})"
    if not error <= tolerance:
        return f"states differ from those of the sequences alone (by {error:.1e})"
    return None


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    """No TF32 (`tf32: true`) for the time of a probe: it rounds by more than the wrong layouts are off."""
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
    """Windows and chunks of 8 tokens for the time of a probe: real ones are longer than any row worth trying."""
    found = {
        key: getattr(config, key) for key in ("sliding_window", "attention_chunk_size") if getattr(config, key, None)
    }
    try:
        for key in found:
            setattr(config, key, 8)
        yield
    finally:
        for key, value in found.items():
            setattr(config, key, value)
