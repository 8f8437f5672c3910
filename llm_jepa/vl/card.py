"""The README.md of a trained VL-JEPA: its parts, how it was trained, what was measured. Text: `card.md.jinja`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from ..core.card import licence_of, settings_of, versions_of, write_card
from .arguments import VLJEPATrainingArguments
from .keys import VLJEPAKeys
from .modeling import VLJEPAModel
from .parts import NAMES

TEMPLATE = Path(__file__).with_name("card.md.jinja")
ALWAYS_SHOWN = ("objective", "y_encoder_lr_factor", "x_encoder_trainable_layers")
PACKAGES = ("torch", "transformers", "accelerate")


def write_vl_model_card(
    output_dir: str | Path, model: VLJEPAModel, args: VLJEPATrainingArguments, facts: Mapping[str, Any]
) -> Path:
    """Write README.md from the run's own configuration. facts: of the run, from `JEPATrainer.card_facts`."""
    bases = [source["name"] for source in model.config.revisions.values() if not _is_folder(source["name"])]
    defaults = {name: field.default for name, field in VLJEPATrainingArguments.__dataclass_fields__.items()}
    own = {
        name: getattr(args, name)
        for name in [*VLJEPAKeys.__annotations__, *VLJEPATrainingArguments.__annotations__]
        if name in ALWAYS_SHOWN or getattr(args, name) != defaults[name]
    }
    own.pop("feature_cache", None)  # a path of one machine
    licences = sorted({licence for base in bases if (licence := licence_of(base))})
    metadata = ModelCardData(
        base_model=bases or None,
        license=licences[0] if len(licences) == 1 else None,
        library_name="llm-jepa",  # the package that it needs
        pipeline_tag="video-text-to-text",
        tags=["vl-jepa", "jepa", "llm-jepa", "video"],
    )
    return write_card(
        output_dir,
        TEMPLATE,
        metadata,
        parts=[_part(model, name) for name in NAMES],
        settings=settings_of(args, own),
        **facts,
        licence=" and ".join(licences),
        unit="clips",
        versions=versions_of(PACKAGES),
    )


def _part(model: VLJEPAModel, name: str) -> dict[str, Any]:
    """Where a part came from and how large it is. Of a local folder only the last name is shown."""
    revision = model.config.revisions.get(name)
    source = "random weights"
    if revision is not None:
        source = Path(revision["name"]).name if _is_folder(revision["name"]) else revision["name"]
        if revision.get("revision"):
            source += f" @ {revision['revision'][:12]}"
    return {
        "name": name,
        "model_type": getattr(model.config, f"{name}_config").model_type,
        "source": source,
        "weights": sum(weight.numel() for weight in getattr(model, name).parameters()),
    }


def _is_folder(name: str) -> bool:
    """Whether a part came from a folder, of this machine or of the one that trained an earlier stage."""
    return Path(name).exists() or Path(name).is_absolute()
