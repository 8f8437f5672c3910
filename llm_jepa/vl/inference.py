"""Use a trained VL-JEPA: classify, retrieve, answer, caption, embed.

Everything but captions is a comparison of embeddings (arXiv:2512.10942v2, section 4: the protocols of its evaluation).
Only `caption` and `decode` call the y_decoder, which is loaded when it is first needed. `VLJEPAPipeline` offers the
same through `transformers.pipeline`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from PIL import Image
from torch import Tensor
from transformers import Pipeline

from ..core.errors import UserError
from ..core.folders import check_folder
from ..core.publish import published
from ..core.untrusted import load_config, load_model, loading
from ..stream.clips import read_clip
from ..stream.opening import is_image
from .configuration import VLJEPAConfig
from .modeling import VLJEPAModel
from .processing import Frames, VLJEPAProcessor, load_processor
from .y_decoder import DecodedText, YDecoder, fingerprint


class Match(NamedTuple):
    """A candidate text with its cosine to the prediction."""

    text: str
    score: float


class Retrieved(NamedTuple):
    """A clip, by its index, with its cosine to the text."""

    clip: int
    score: float


class VLJEPA:
    """A VL-JEPA model with its processor, in evaluation mode.

    A clip is frames [T, H, W, 3] uint8, a list of images, a PIL image, or the path or the content (bytes) of a video or
    an image; `images=True` takes single images.

    Args:
        y_decoder: None takes the one in the model's folder, when text is first needed.
    """

    def __init__(self, model: VLJEPAModel, processor: VLJEPAProcessor, *, y_decoder: YDecoder | None = None) -> None:
        self.model, self.processor = model.eval(), processor
        self._y_decoder = y_decoder
        if y_decoder is not None:
            self._check_made_for(y_decoder)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, revision: str | None = None, device: str | torch.device | None = None
    ) -> VLJEPA:
        """Load a folder or a Hub id. Raises UserError if it does not hold a VL-JEPA."""
        check_folder(str(source))
        local = str(source)
        with loading("a VL-JEPA", str(source)):
            # Take all files from one commit, those of the y_decoder too. Besides, offline transformers does not find
            # the second tokenizer of a Hub id and takes the first one instead.
            if not Path(source).is_dir():
                local = snapshot_download(local, revision=revision, ignore_patterns=["checkpoint-*", "*.bin", "*.pt"])
            config = load_config(local, what="a VL-JEPA")
            if config.model_type != VLJEPAConfig.model_type:
                # as a VL-JEPA it would be loaded as 8 billion random weights
                raise UserError(f"Cannot load a VL-JEPA from {str(source)!r}: it is a {config.model_type}.")
            model = load_model(VLJEPAModel, local, config, what="a VL-JEPA")
            processor = load_processor(local)
        return cls(model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), processor)

    def save_pretrained(self, folder: str | Path) -> None:
        """Save model, processor and y_decoder, if there is one, with a manifest of all files; see `core.publish`."""
        y_decoder = self._y_decoder or self._load_y_decoder()
        with published(folder) as staged:
            self.model.save_pretrained(staged)
            self.processor.save_pretrained(staged)
            if y_decoder is not None:
                y_decoder.save_pretrained(staged / "y_decoder")

    # -- embeddings ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def embed(
        self,
        clips: Sequence[Frames],
        query: str | Sequence[str] | None = None,
        *,
        images: bool = False,
        batch_size: int = 16,
    ) -> Tensor:
        """Predicted embeddings [B, D] of unit norm, of each clip with its query (one for all, or one each).

        None takes the model's `default_query`; "" gives no query, as in the query-free stage of training.
        """
        if isinstance(query, (list, tuple)) and len(query) != len(clips):
            raise UserError(f"{len(query)} queries for {len(clips)} clips; give one for all, or one for each.")
        query = self.model.config.default_query if query is None else query
        queries = [query] * len(clips) if isinstance(query, str) else list(query)
        embeddings = [torch.empty(0, self.model.config.shared_dim, device=self.model.device)]
        for start in range(0, len(clips), batch_size):
            frames = [self._frames(clip, images) for clip in clips[start : start + batch_size]]
            batch = self.processor(images=frames) if images else self.processor(videos=frames)
            batch_queries = queries[start : start + batch_size]
            if any(batch_queries):
                batch |= self.processor(query=batch_queries)
            batch = {key: value.to(self.model.device) for key, value in batch.items()}
            batch["pixel_values_videos"] = batch["pixel_values_videos"].to(self.model.dtype)
            embeddings.append(F.normalize(self.model(**batch).predicted.float(), dim=-1))
        return torch.cat(embeddings)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], *, batch_size: int = 64) -> Tensor:
        """Target embeddings [N, D] of unit norm."""
        if isinstance(texts, str):
            raise UserError(f"Give a list of texts, not one text: {texts[:60]!r}.")
        embeddings = [torch.empty(0, self.model.config.shared_dim, device=self.model.device)]
        for start in range(0, len(texts), batch_size):
            batch = self.processor(target=list(texts[start : start + batch_size])).to(self.model.device)
            embeddings.append(F.normalize(self.model(**batch).target.float(), dim=-1))
        return torch.cat(embeddings)

    # -- tasks --------------------------------------------------------------------------------------------------------

    def classify(
        self, frames: Frames, labels: Sequence[str], *, query: str | None = None, images: bool = False
    ) -> list[Match]:
        """Rank all labels, the nearest to the prediction first.

        This is CLIP's protocol. The paper does not print its templates.
        """
        return self._rank(self.embed([frames], query, images=images)[0], labels, "labels")

    def answer(self, frames: Frames, question: str, candidates: Sequence[str], *, images: bool = False) -> list[Match]:
        """Rank candidate answers, the nearest to the prediction for the question first (discriminative VQA)."""
        if not question.strip():
            raise UserError("The question is empty; classify() needs none.")
        return self._rank(self.embed([frames], question, images=images)[0], candidates, "candidates")

    def retrieve(
        self, texts: Sequence[str], clips: Sequence[Frames], *, query: str | None = None, images: bool = False
    ) -> list[list[Retrieved]]:
        """Text-to-video retrieval: rank all clips for each text, the nearest first.

        Clips go through the predictor with one query, texts through the y_encoder.
        """
        if not len(texts) or not len(clips):
            raise UserError(f"{len(texts)} texts and {len(clips)} clips: retrieval needs at least one of each.")
        similarity = self.embed_texts(texts) @ self.embed(clips, query, images=images).T
        rankings = []
        for row, order in zip(similarity, similarity.argsort(dim=1, descending=True), strict=True):
            rankings.append([Retrieved(clip, float(row[clip])) for clip in order.tolist()])
        return rankings

    def caption(
        self, frames: Frames, query: str | None = None, *, images: bool = False, max_new_tokens: int = 40
    ) -> DecodedText:
        """Write the predicted embedding as text. Raises UserError without a y_decoder."""
        return self.decode(self.embed([frames], query, images=images), max_new_tokens=max_new_tokens)[0]

    def decode(self, embeddings: Tensor, *, max_new_tokens: int = 40) -> list[DecodedText]:
        """Embeddings [B, D] -> texts."""
        return self.y_decoder.decode(embeddings, max_new_tokens=max_new_tokens)

    @property
    def y_decoder(self) -> YDecoder:
        """Loaded at first use. Raises UserError if there is none, or one for another y_encoder."""
        if self._y_decoder is None:
            y_decoder = self._load_y_decoder()
            if y_decoder is None:
                raise UserError(
                    f"{self.model.config._name_or_path or 'This model'} has no y_decoder, so it cannot write text; "
                    "train one with llm-jepa train-decoder, or use classify, answer or retrieve."
                )
            self._check_made_for(y_decoder)
            if y_decoder.decoder is not None:
                y_decoder.decoder.to(self.model.device)
            self._y_decoder = y_decoder
        return self._y_decoder

    def _load_y_decoder(self) -> YDecoder | None:
        source = self.model.config._name_or_path
        return YDecoder.from_pretrained(source) if source else None

    def _check_made_for(self, y_decoder: YDecoder) -> None:
        if y_decoder.made_for != fingerprint(self.model):
            raise UserError(
                "The y_decoder was trained for another y_encoder than this model's, so it would write wrong texts. "
                "Train it again with llm-jepa train-decoder."
            )

    def _rank(self, predicted: Tensor, texts: Sequence[str], option: str) -> list[Match]:
        if isinstance(texts, str) or not len(texts):
            raise UserError(f"No {option} to choose from: give a list of one text or more.")
        cosine = self.embed_texts(texts) @ predicted
        return [Match(texts[i], float(cosine[i])) for i in cosine.argsort(descending=True).tolist()]

    def _frames(self, clip: Any, images: bool) -> Any:
        if not isinstance(clip, (str, Path, bytes, Image.Image)):
            return clip
        single = images or is_image(clip)  # one frame, as in training
        frames = read_clip(clip, 1 if single else self.model.config.num_frames)[0]
        return frames[0] if images else frames


class VLJEPAPipeline(Pipeline):
    """`pipeline("vl-jepa", model=...)`, called with {"video": frames or path, ...}.

    With "labels", or "question" and "candidates", it returns them ranked as [{"text", "score"}, ...]. With neither, it
    returns a caption as one such row.
    """

    _load_processor = True
    _load_tokenizer = _load_image_processor = _load_feature_extractor = False

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        known = {"labels", "question", "candidates", "query", "images"}
        if unknown := sorted(set(kwargs) - known):
            raise UserError(
                f"The vl-jepa pipeline does not know {', '.join(unknown)}; it takes {', '.join(sorted(known))}."
            )
        return {}, kwargs, {}

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        return super().__call__(inputs, **kwargs)

    def preprocess(self, inputs: Any, **parameters: Any) -> dict[str, Any]:
        row = inputs if isinstance(inputs, dict) else {"video": inputs}
        if "video" not in row:
            raise UserError("A vl-jepa input is a clip, or a dict with 'video'.")
        self._sanitize_parameters(**{key: value for key, value in row.items() if key != "video"})
        return {"row": row}

    def _forward(self, model_inputs: dict[str, Any], **parameters: Any) -> list[dict[str, Any]]:
        options = {**parameters, **model_inputs["row"]}
        clip, images = options["video"], bool(options.get("images"))
        if not hasattr(self, "_use"):
            self._use = VLJEPA(self.model, self.processor)
        ranked: Sequence[Any]
        if options.get("question") is not None:
            ranked = self._use.answer(clip, options["question"], options.get("candidates") or [], images=images)
        elif options.get("labels") is not None:
            ranked = self._use.classify(clip, options["labels"], query=options.get("query"), images=images)
        else:
            ranked = [self._use.caption(clip, options.get("query"), images=images)]
        return [{"text": match.text, "score": match.score} for match in ranked]

    def postprocess(self, model_outputs: list[dict[str, Any]], **parameters: Any) -> list[dict[str, Any]]:
        return model_outputs
