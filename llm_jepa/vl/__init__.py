"""VL-JEPA: vision-language models that predict text embeddings and decode only when the scene changes.

    from llm_jepa.vl import VLJEPA
    model = VLJEPA.from_pretrained("runs/my-vl-jepa")

Names are imported at first use. `import llm_jepa.vl` is enough for `AutoModel`, `AutoConfig`, `AutoProcessor` and
`pipeline("vl-jepa")` of transformers to know a VL-JEPA. It loads neither torch nor transformers by itself.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from .._lazy import import_after, names_from

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
# Each of these modules of ours registers a class at its end.
_FOLLOWERS = {
    "transformers.models.auto.configuration_auto": f"{__name__}.configuration",
    "transformers.models.auto.modeling_auto": f"{__name__}.modeling",
}
if find_spec("PIL") is not None:  # without the extra `vl`, transformers must still be importable
    _FOLLOWERS |= {
        "transformers.models.auto.processing_auto": f"{__name__}.processing",
        "transformers.pipelines": f"{__name__}.inference",
    }
import_after(_FOLLOWERS)
