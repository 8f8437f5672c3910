"""VL-JEPA: vision-language models that predict text embeddings and decode only when the scene changes.

    from llm_jepa.vl import VLJEPA
    model = VLJEPA.from_pretrained("runs/my-vl-jepa")

Names are imported when first used; VLJEPAModel registers itself with the Auto classes of transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..stream.decoder import SelectiveDecoder
    from ..stream.opening import open_frames
    from ..stream.segments import WardSegmenter, segment_offline
    from .arguments import VLJEPATrainingArguments
    from .configuration import VLJEPAConfig
    from .data import Clip, ClipDataset, Pair
    from .inference import VLJEPA
    from .modeling import VLJEPAModel
    from .processing import VLJEPAProcessor
    from .trainer import VLJEPATrainer

_HOMES = {
    "Clip": ".data",
    "ClipDataset": ".data",
    "Pair": ".data",
    "SelectiveDecoder": "..stream.decoder",
    "VLJEPA": ".inference",
    "VLJEPAConfig": ".configuration",
    "VLJEPAModel": ".modeling",
    "VLJEPAProcessor": ".processing",
    "VLJEPATrainer": ".trainer",
    "VLJEPATrainingArguments": ".arguments",
    "WardSegmenter": "..stream.segments",
    "open_frames": "..stream.opening",
    "segment_offline": "..stream.segments",
}
__all__ = [
    "Clip",
    "ClipDataset",
    "Pair",
    "SelectiveDecoder",
    "VLJEPA",
    "VLJEPAConfig",
    "VLJEPAModel",
    "VLJEPAProcessor",
    "VLJEPATrainer",
    "VLJEPATrainingArguments",
    "WardSegmenter",
    "open_frames",
    "segment_offline",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
