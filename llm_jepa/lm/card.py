"""The README.md of a trained checkpoint: how it was trained and what was measured. The text is in `card.md.jinja`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from huggingface_hub import ModelCardData
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.card import licence_of, settings_of, versions_of, write_card
from ..core.diagnostics import evaluating
from ..core.streaming import Position
from .arguments import LLMJEPAConfig
from .data import RowCounts

TEMPLATE = Path(__file__).with_name("card.md.jinja")
ALWAYS_SHOWN = ("jepa_weight", "objective", "num_predictor_tokens", "context_view", "label_protocol")
PACKAGES = ("torch", "transformers", "trl", "peft", "datasets")
SAMPLE_TOKENS = 64  # of an answer in the card
SAMPLE_CHARACTERS = 600  # of a text in the card


class Sample(NamedTuple):
    """A row of the validation data, and what the model answers. Each at most `SAMPLE_CHARACTERS` long."""

    prompt: str
    answer: str
    expected: str


@torch.no_grad()
def sample_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Any) -> Sample | None:
    """The greedy answer to the first row of one or several data sets with the columns of `views.Views`."""
    if isinstance(rows, dict):
        rows = next(iter(rows.values()))
    if not isinstance(rows, Dataset) or not len(rows):
        return None
    row = rows[0]
    start, end = row["target_start"], row["target_end"]
    prompt, expected = row["input_ids"][:start], row["input_ids"][start:end]
    ids = torch.tensor([prompt], device=model.device)
    with evaluating(model):
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=SAMPLE_TOKENS, do_sample=False,
            use_cache=True,
        )  # fmt: skip
    answer = output[0, len(prompt) :].tolist()
    texts = (tokenizer.decode(tokens, skip_special_tokens=True) for tokens in (prompt, answer, expected))
    return Sample(*(text if len(text) <= SAMPLE_CHARACTERS else f"{text[:SAMPLE_CHARACTERS]} ..." for text in texts))


def write_model_card(
    output_dir: str | Path,
    model: PreTrainedModel,
    args: LLMJEPAConfig,
    facts: Mapping[str, Any],
    row_counts: Mapping[str, RowCounts | Position],
    refusal: str | None,
    sample: Sample | None = None,
    is_adapter: bool = False,
) -> Path:
    """Write README.md from the run's own configuration and its last evaluation.

    facts: of the run, from `JEPATrainer.card_facts`.
    is_adapter: the run saved an adapter alone, because its base model was held in 4 bits.
    refusal: why sentence-transformers cannot embed with the model (`sentence_transformer.plan`); None if it can.
    """
    base = model.config._name_or_path
    is_local = Path(base).exists()  # a folder of this machine is not on the Hub, and its path is nobody's business
    defaults = {name: field.default for name, field in LLMJEPAConfig.__dataclass_fields__.items()}
    own = {k: v for k, v in model.config.llm_jepa.items() if k in ALWAYS_SHOWN or v != defaults.get(k, v)}
    licence = licence_of(base)
    rows = {f"{name} rows": str(counts) for name, counts in row_counts.items()}
    metadata = ModelCardData(
        base_model=None if is_local else base,
        license=licence,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["llm-jepa", "jepa", "sft", *(["lora"] if is_adapter else [])],
    )
    return write_card(
        output_dir,
        TEMPLATE,
        metadata,
        base=Path(base).name if is_local else base,
        is_local=is_local,
        model_type=model.config.model_type,
        uses_jepa=args.uses_jepa,
        settings=settings_of(args, own),
        **{**facts, "training": {**rows, **facts["training"]}},
        licence=licence,
        unit="split",
        refusal=refusal,
        is_adapter=is_adapter,
        sample=None if sample is None else sample._asdict(),
        versions=versions_of(PACKAGES),
    )
