"""The README.md of a trained checkpoint: how it was trained and what was measured. The text is in `card.md.jinja`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCardData
from transformers import PreTrainedModel

from ..core.card import Evaluation, settings_of, versions_of, write_card
from .arguments import LLMJEPAConfig
from .data import RowCounts

TEMPLATE = Path(__file__).with_name("card.md.jinja")
ALWAYS_SHOWN = ("jepa_weight", "objective", "num_predictor_tokens", "context_view", "label_protocol")
PACKAGES = ("torch", "transformers", "trl", "peft", "datasets")


def write_model_card(
    output_dir: str | Path,
    model: PreTrainedModel,
    args: LLMJEPAConfig,
    evaluation: Evaluation,
    row_counts: Mapping[str, RowCounts],
    refusal: str | None,
) -> Path:
    """Write README.md from the run's own configuration and its last evaluation.

    refusal: why sentence-transformers cannot embed with the model (`sentence_transformer.plan`); None if it can.
    """
    base = model.config._name_or_path
    is_local = Path(base).exists()  # a folder of this machine is not on the Hub, and its path is nobody's business
    defaults = {name: field.default for name, field in LLMJEPAConfig.__dataclass_fields__.items()}
    own = {k: v for k, v in model.config.llm_jepa.items() if k in ALWAYS_SHOWN or v != defaults.get(k, v)}
    metadata = ModelCardData(
        base_model=None if is_local else base,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["llm-jepa", "jepa", "sft"],
    )
    return write_card(
        output_dir,
        TEMPLATE,
        metadata,
        base=Path(base).name if is_local else base,
        model_type=model.config.model_type,
        uses_jepa=args.uses_jepa,
        settings=settings_of(args, own),
        row_counts=row_counts,
        evaluation=evaluation,
        refusal=refusal,
        versions=versions_of(PACKAGES),
    )
