"""The windows of one stream -> embeddings; what neighbouring windows share is encoded once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..stream.frames import Window
from .inference import VLJEPA

AT_ONCE = 8  # windows of a film that are encoded together; chosen, not tuned


class SlidingEncoder:
    """What `VLJEPA.embed` gives for windows of frames with one query, cheaper.

    An image encoder sees each frame alone, so a frame of the last window keeps its tokens. V-JEPA 2 sees a window as a
    whole, so nothing can be kept.

    at_once: how many windows to give in one call, if there are so many.
    """

    def __init__(self, model: VLJEPA, query: str | None = None) -> None:
        self._model, self._processor = model.model, model.processor
        query = self._model.config.default_query if query is None else query
        self._query = dict(self._processor(query=[query]).to(self._model.device)) if query else {}
        self._by_frame = self._model.config.x_encoder_config.model_type != "vjepa2"
        self._kept: list[tuple[NDArray, Tensor]] = []  # frames of the last window, and their tokens [n, D_x]
        self.at_once = AT_ONCE if self._by_frame else 1

    @torch.no_grad()
    def __call__(self, windows: Sequence[Window]) -> Tensor:
        """[W, D], of unit norm, of windows in their order."""
        features = self.features(windows)  # [W, N, D_x]
        query = {name: values.expand(len(windows), -1) for name, values in self._query.items()}
        return F.normalize(self._model(visual_features=features, **query).predicted.float(), dim=-1)

    @torch.no_grad()
    def features(self, windows: Sequence[Window]) -> Tensor:
        """Visual tokens [W, N, D_x] of windows in their order, as `VLJEPAModel.encode_frames` gives them."""
        if not self._by_frame:
            return self._encode([list(window.images) for window in windows])
        tokens = {id(image): token for image, token in self._kept}
        images = {id(image): image for window in windows for image in window.images}  # they live as long as `windows`
        new = [name for name in images if name not in tokens]
        if new:
            tokens |= zip(new, self._encode([[images[name]] for name in new]), strict=True)
        self._kept = [(image, tokens[id(image)]) for image in windows[-1].images]
        return torch.stack([torch.cat([tokens[id(image)] for image in window.images]) for window in windows])

    def _encode(self, clips: Sequence[Sequence[NDArray]]) -> Tensor:
        """[clips, N, D_x]"""
        pixels = self._processor(videos=clips)["pixel_values_videos"]
        return self._model.encode_frames(pixels.to(self._model.device, self._model.dtype))
