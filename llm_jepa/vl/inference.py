"""`VLJEPA`: a model and its processor in use: classify, retrieve, answer, caption, embed.

All of them compare embeddings (arXiv:2512.10942v2, section 4: the protocols of its evaluation); only `caption` calls
the y_decoder, which is not even loaded before. `VLJEPAPipeline` is the same behind `transformers.pipeline`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from ..core.errors import UserError, first_line
from ..stream.clips import read_clip
from ..stream.opening import IMAGE_SUFFIXES
from .configuration import VLJEPAConfig
from .modeling import VLJEPAModel
from .processing import Frames, VLJEPAProcessor
from .y_decoder import DecodedText, YDecoder, fingerprint


class Match(NamedTuple):
    text: str
    score: float  # cosine


class Retrieved(NamedTuple):
    clip: int  # index among the given clips
    score: float  # cosine


class VLJEPA:
    """Args: model and processor of a VL-JEPA; y_decoder: given, or looked for beside the model when text is asked for.

    A clip is frames [T, H, W, 3] uint8, a list of images, or the path of a video; `images=True` takes single images.
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
        """From a folder or a Hub id. Raises UserError if there is no VL-JEPA there."""
        options: dict[str, Any] = {"trust_remote_code": False}
        if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
            raise UserError(f"The folder {source} has no config.json, so it is no saved model.")
        try:
            # All of one commit, the y_decoder too. And offline, transformers misses the second tokenizer of a Hub id
            # and takes the first in its place.
            local = str(source)
            if not Path(source).is_dir():
                local = snapshot_download(local, revision=revision, ignore_patterns=["checkpoint-*", "*.bin", "*.pt"])
            if (kind := AutoConfig.from_pretrained(local, **options).model_type) != VLJEPAConfig.model_type:
                raise UserError(f"it is a {kind}.")  # loaded as one, it would be 8 billion random weights
            model, report = VLJEPAModel.from_pretrained(
                local, use_safetensors=True, output_loading_info=True, **options
            )
            processor = VLJEPAProcessor.from_pretrained(local, **options)
        except (OSError, ValueError, KeyError, RuntimeError, TypeError, StrictDataclassError) as error:
            raise UserError(f"Cannot load a VL-JEPA from {str(source)!r}: {first_line(error)}") from None
        if wrong := [*report["missing_keys"], *report["mismatched_keys"]]:
            raise UserError(f"The weights of {source} do not fit its config ({str(wrong[0])}, ...): partly random.")
        return cls(model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), processor)

    def save_pretrained(self, folder: str | Path) -> None:
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        y_decoder = self._y_decoder or self._found_y_decoder()
        if y_decoder is not None:
            y_decoder.save_pretrained(Path(folder) / "y_decoder")

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
        """Predicted embeddings [B, D] of unit norm: of each clip under the query (one for all, or one each).

        Without a query: `default_query` of the model. The query-free stage of training asks nothing; "" does so here.
        """
        if isinstance(query, (list, tuple)) and len(query) != len(clips):
            raise UserError(f"{len(query)} queries for {len(clips)} clips; give one for all, or one for each.")
        query = self.model.config.default_query if query is None else query
        queries = [query] * len(clips) if isinstance(query, str) else list(query)
        found = []
        for start in range(0, len(clips), batch_size):
            chosen = [self._frames(clip, images) for clip in clips[start : start + batch_size]]
            batch = self.processor(**{"images" if images else "videos": chosen})
            asked = queries[start : start + batch_size]
            if any(asked):
                batch |= self.processor(query=asked)
            batch = {key: value.to(self.model.device) for key, value in batch.items()}
            batch["pixel_values_videos"] = batch["pixel_values_videos"].to(self.model.dtype)
            found.append(F.normalize(self.model(**batch).predicted.float(), dim=-1))
        return torch.cat(found) if found else torch.empty(0, self.model.config.shared_dim)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], *, batch_size: int = 64) -> Tensor:
        """Target embeddings [N, D] of unit norm."""
        if isinstance(texts, str):
            raise UserError(f"Give a list of texts, not one text: {texts[:60]!r}.")
        found = []
        for start in range(0, len(texts), batch_size):
            batch = self.processor(target=list(texts[start : start + batch_size])).to(self.model.device)
            found.append(F.normalize(self.model(**batch).target.float(), dim=-1))
        return torch.cat(found) if found else torch.empty(0, self.model.config.shared_dim)

    # -- what it is for -----------------------------------------------------------------------------------------------

    def classify(
        self, frames: Frames, labels: Sequence[str], *, query: str | None = None, images: bool = False
    ) -> list[Match]:
        """All labels, the nearest to the prediction first (CLIP's protocol; the paper does not print its templates)."""
        return self._rank(self.embed([frames], query, images=images)[0], labels, "labels")

    def answer(self, frames: Frames, question: str, candidates: Sequence[str], *, images: bool = False) -> list[Match]:
        """Discriminative question answering: all candidates, the nearest to what the question predicts first."""
        if not question.strip():
            raise UserError("The question is empty; classify() asks nothing.")
        return self._rank(self.embed([frames], question, images=images)[0], candidates, "candidates")

    def retrieve(
        self, texts: Sequence[str], clips: Sequence[Frames], *, query: str | None = None, images: bool = False
    ) -> list[list[Retrieved]]:
        """Text-to-video retrieval: for each text all clips, the nearest first. Clips go through the predictor with one
        query, texts through the y_encoder."""
        if not len(texts) or not len(clips):
            raise UserError(f"{len(texts)} texts and {len(clips)} clips: retrieval needs at least one of each.")
        similarity = self.embed_texts(texts) @ self.embed(clips, query, images=images).T
        order = similarity.argsort(dim=1, descending=True)
        return [
            [Retrieved(i, float(row[i])) for i in ranked.tolist()]
            for row, ranked in zip(similarity, order, strict=True)
        ]

    def caption(
        self, frames: Frames, query: str | None = None, *, images: bool = False, max_new_tokens: int = 40
    ) -> DecodedText:
        """The predicted embedding as text: the one call that decodes. Raises UserError without a y_decoder."""
        return self.decode(self.embed([frames], query, images=images), max_new_tokens=max_new_tokens)[0]

    def decode(self, embeddings: Tensor, *, max_new_tokens: int = 40) -> list[DecodedText]:
        """Embeddings [B, D] -> texts."""
        return self.y_decoder.decode(embeddings, max_new_tokens=max_new_tokens)

    @property
    def y_decoder(self) -> YDecoder:
        """Loaded when first asked for. Raises UserError if there is none, or one for another y_encoder."""
        if self._y_decoder is None:
            found = self._found_y_decoder()
            if found is None:
                raise UserError(
                    f"{self.model.config._name_or_path or 'This model'} has no y_decoder, so it cannot write text; "
                    "train one with llm-jepa train-decoder, or use classify, answer or retrieve."
                )
            self._check_made_for(found)
            if found.decoder is not None:
                found.decoder.to(self.model.device)
            self._y_decoder = found
        return self._y_decoder

    def _found_y_decoder(self) -> YDecoder | None:
        source = self.model.config._name_or_path
        return YDecoder.from_pretrained(source) if source else None

    def _check_made_for(self, y_decoder: YDecoder) -> None:
        if y_decoder.made_for != fingerprint(self.model):
            raise UserError(
                "The y_decoder was trained for another y_encoder than this model's: it would write other texts than "
                "those that are meant. Train it again with llm-jepa train-decoder."
            )

    def _rank(self, predicted: Tensor, texts: Sequence[str], what: str) -> list[Match]:
        if isinstance(texts, str) or not len(texts):
            raise UserError(f"No {what} to choose from: give a list of one text or more.")
        cosine = self.embed_texts(texts) @ predicted
        return [Match(texts[i], float(cosine[i])) for i in cosine.argsort(descending=True).tolist()]

    def _frames(self, clip: Any, images: bool) -> Any:
        if not isinstance(clip, (str, Path)):
            return clip
        single = images or Path(clip).suffix.lower() in IMAGE_SUFFIXES  # one frame, as in training
        frames = read_clip(str(clip), 1 if single else self.model.config.num_frames)[0]
        return frames[0] if images else frames


class VLJEPAPipeline(Pipeline):
    """`pipeline("vl-jepa", model=...)`: {"video": frames or path, "labels" | "question" and "candidates" | nothing}.

    Gives the ranked labels or candidates as [{"text", "score"}, ...], or with neither a caption as one such row.
    """

    _load_processor = True
    _load_tokenizer = _load_image_processor = _load_feature_extractor = False

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        known = {"labels", "question", "candidates", "query", "images"}
        if unknown := sorted(set(kwargs) - known):
            raise UserError(f"The vl-jepa pipeline knows no {', '.join(unknown)}; it takes {', '.join(sorted(known))}.")
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
        return [{"text": found.text, "score": found.score} for found in ranked]

    def postprocess(self, model_outputs: list[dict[str, Any]], **parameters: Any) -> list[dict[str, Any]]:
        return model_outputs


PIPELINE_REGISTRY.register_pipeline(
    "vl-jepa", pipeline_class=VLJEPAPipeline, pt_model=(VLJEPAModel,), type="multimodal"
)
