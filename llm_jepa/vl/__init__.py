"""VL-JEPA: vision-language models that predict text embeddings and decode only when the scene changes.

    from llm_jepa.vl import VLJEPA
    model = VLJEPA.from_pretrained("runs/my-vl-jepa")

Names are imported at first use. `import llm_jepa` is enough for `AutoModel`, `AutoConfig`, `AutoProcessor` and
`pipeline("vl-jepa")` of transformers to know a VL-JEPA. It loads neither torch nor transformers by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import names_from
from .auto import register

if TYPE_CHECKING:
    from ..stream.decoder import SelectiveDecoder
    from ..stream.opening import open_frames
    from ..stream.segments import Segment, WardSegmenter, segment_offline, segment_uniform
    from .arguments import VLJEPATrainingArguments
    from .configuration import VLJEPAConfig
    from .data import Clip, ClipDataset, Pair
    from .decoder_stage import train_y_decoder
    from .inference import VLJEPA
    from .loading import plain_frames
    from .modeling import VLJEPAModel
    from .processing import VLJEPAProcessor
    from .trainer import VLJEPATrainer
    from .y_decoder import MemoryProjection, PrefixDecoder, PrefixDecoderConfig, YDecoder

_HOMES = {
    "Clip": ".data",
    "ClipDataset": ".data",
    "MemoryProjection": ".y_decoder",
    "Pair": ".data",
    "PrefixDecoder": ".y_decoder",
    "PrefixDecoderConfig": ".y_decoder",
    "Segment": "..stream.segments",
    "SelectiveDecoder": "..stream.decoder",
    "VLJEPA": ".inference",
    "VLJEPAConfig": ".configuration",
    "VLJEPAModel": ".modeling",
    "VLJEPAProcessor": ".processing",
    "VLJEPATrainer": ".trainer",
    "VLJEPATrainingArguments": ".arguments",
    "WardSegmenter": "..stream.segments",
    "YDecoder": ".y_decoder",
    "open_frames": "..stream.opening",
    "plain_frames": ".loading",
    "segment_offline": "..stream.segments",
    "segment_uniform": "..stream.segments",
    "train_y_decoder": ".decoder_stage",
}
__all__ = [
    "Clip",
    "ClipDataset",
    "MemoryProjection",
    "Pair",
    "PrefixDecoder",
    "PrefixDecoderConfig",
    "Segment",
    "SelectiveDecoder",
    "VLJEPA",
    "VLJEPAConfig",
    "VLJEPAModel",
    "VLJEPAProcessor",
    "VLJEPATrainer",
    "VLJEPATrainingArguments",
    "WardSegmenter",
    "YDecoder",
    "open_frames",
    "plain_frames",
    "segment_offline",
    "segment_uniform",
    "train_y_decoder",
]
__getattr__ = names_from(__name__, _HOMES)
register()
