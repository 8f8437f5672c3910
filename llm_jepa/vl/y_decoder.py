"""The y_decoder of VL-JEPA: write a predicted embedding as text. It runs only when text is needed.

The paper says that it is light, takes no part in the main training and turns an embedding into text; it does not
describe it (arXiv:2512.10942v2, section 3.1). Here it has two steps, each of which may be left out:

    MemoryProjection   moves an embedding onto those of known texts. After contrastive training, predictions are near
                       their targets in angle, but still off the manifold of texts
    PrefixDecoder      a small causal LM that reads the embedding as a few prefix vectors (as ClipCap, arXiv:2111.09734)

Without a PrefixDecoder, the text is the nearest one of the memory. Both are saved in the folder `y_decoder/` of the
model, and loaded at the first text.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    TrainingArguments,
)
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_outputs import CausalLMOutput

from ..core.checkpoint import is_last
from ..core.decoding import generate_as_asked, suppressed_ids
from ..core.errors import UserError
from ..core.files import write_json
from ..core.json_files import read_json
from ..core.publish import damage_of, published
from ..core.safetensors_files import find_file, load_tensors
from ..core.signals import StopRequest
from ..core.stopping import StoppableTrainer
from ..core.untrusted import load_config, load_model, load_tokenizer, loading

logger = logging.getLogger(__name__)
IGNORE = -100
INFO_FILE, MEMORY_FILE, TEXTS_FILE = "y_decoder.json", "memory.safetensors", "memory.json"
INFO = {"made_for": str, "prefix_decoder": bool, "memory_temperature?": float}  # the shape of INFO_FILE


class DecodedText(NamedTuple):
    """A text with its score: the geometric mean probability of its tokens, the end included (PrefixDecoder), or the
    cosine of the nearest text (memory alone)."""

    text: str
    score: float


@dataclass(frozen=True)
class MemoryProjection:
    """Known texts as a softmax-weighted dictionary: z -> normalised sum over i of softmax_i(z . m_i / temperature) m_i.

    Args:
        embeddings: [M, D] of unit norm.
        texts: the M texts.
        temperature: small gives the nearest text, large the mean of all. 0.05 was the best value tried on photos
            (captions decoded from unseen folds).
    """

    embeddings: Tensor
    texts: tuple[str, ...]
    temperature: float = 0.05

    def __post_init__(self) -> None:
        if self.embeddings.dim() != 2 or len(self.embeddings) != len(self.texts) or not self.texts:
            raise ValueError(
                f"A memory of {len(self.texts)} texts and embeddings {tuple(self.embeddings.shape)}: one row per text."
            )
        if not self.temperature > 0:
            raise ValueError(f"The temperature of the memory, {self.temperature}, must be > 0.")

    def project(self, embeddings: Tensor) -> Tensor:
        """[B, D] -> [B, D] of unit norm, in the convex cone of the memory."""
        memory = self.embeddings.to(embeddings)
        weights = (F.normalize(embeddings, dim=-1) @ memory.T / self.temperature).softmax(dim=-1)  # [B, M]
        return F.normalize(weights @ memory, dim=-1)

    def nearest(self, embeddings: Tensor) -> list[DecodedText]:
        """The nearest text to each row of [B, D]."""
        cosine, index = (F.normalize(embeddings, dim=-1) @ self.embeddings.to(embeddings).T).max(dim=-1)
        return [DecodedText(self.texts[i], c) for i, c in zip(index.tolist(), cosine.tolist(), strict=True)]


@strict
class PrefixDecoderConfig(PreTrainedConfig):
    """Configuration of `PrefixDecoder`.

    Args:
        lm_config: of the causal LM.
        embedding_dim: D.
        num_prefix: number of vectors that the LM reads instead of tokens.
        noise: standard deviation per embedding of Gaussian noise added in training (on unit embeddings, spread over D).
            A prediction is never exactly the embedding of a text; the noise makes the decoder tolerate that.
    """

    model_type = "vl_jepa_prefix_decoder"
    sub_configs_defaults = {"lm_config": SubConfigSpec(config_class=AutoConfig, model_type="gpt2")}

    lm_config: Any = None
    embedding_dim: int = 1536
    num_prefix: int = 4
    noise: float = 0.3


class PrefixDecoder(PreTrainedModel):
    """p(text | embedding): [B, D] -> num_prefix vectors -> a causal LM.

    forward(embeddings [B, D], input_ids [B, L], attention_mask [B, L]) -> loss (nats per token, the closing
    end-of-text included, which `input_ids` must hold) and logits [B, L, V], those at place i predict token i.
    """

    config: PrefixDecoderConfig
    config_class = PrefixDecoderConfig
    base_model_prefix = ""
    main_input_name = "embeddings"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: PrefixDecoderConfig, lm: PreTrainedModel | None = None) -> None:
        # A composite config overwrites the attention of its parts, and a GPT-2 without one is silently not causal.
        attention = lm.config._attn_implementation if lm is not None else None
        super().__init__(config)
        self.lm = lm or AutoModelForCausalLM.from_config(config.lm_config)
        config.lm_config = self.lm.config
        config.lm_config._attn_implementation = (
            attention or config.lm_config._attn_implementation or config._attn_implementation
        )
        self.prefix = nn.Linear(config.embedding_dim, config.num_prefix * config.lm_config.hidden_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.lm.get_input_embeddings()

    def prefix_of(self, embeddings: Tensor) -> Tensor:
        """[B, D] -> [B, num_prefix, hidden]."""
        unit = F.normalize(embeddings.to(self.prefix.weight), dim=-1)
        if self.training and self.config.noise:
            unit = unit + torch.randn_like(unit) * self.config.noise / unit.shape[-1] ** 0.5
        return self.prefix(unit).unflatten(-1, (self.config.num_prefix, -1))

    def forward(
        self,
        embeddings: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutput:
        prefix = self.prefix_of(embeddings)  # [B, P, hidden]
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        words = self.lm.get_input_embeddings()(input_ids)  # [B, L, hidden]
        inputs = torch.cat([prefix, words], dim=1)  # [B, P + L, hidden]
        inputs_mask = torch.cat([mask.new_ones(prefix.shape[:2]), mask], dim=1)
        logits = self.lm(inputs_embeds=inputs, attention_mask=inputs_mask, use_cache=False).logits
        logits = logits[
            :, self.config.num_prefix - 1 : -1
        ]  # [B, L, V]: the last prefix vector predicts the first token
        loss = F.cross_entropy(logits.flatten(0, 1).float(), input_ids.masked_fill(mask == 0, IGNORE).flatten())
        return CausalLMOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def decode(self, embeddings: Tensor, tokenizer: Any, *, max_new_tokens: int = 40) -> list[DecodedText]:
        """Write a text for each row of [B, D], greedily."""
        prefix = self.eval().prefix_of(embeddings)
        decoding = GenerationConfig(
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            suppress_tokens=suppressed_ids(self.lm) or None,
            return_dict_in_generate=True,
            output_logits=True,
        )
        mask = torch.ones(prefix.shape[:2], dtype=torch.long, device=prefix.device)
        generated = generate_as_asked(self.lm, decoding, inputs_embeds=prefix, attention_mask=mask)
        tokens = generated.sequences  # [B, L]
        log_probability = torch.stack(generated.logits, dim=1).float().log_softmax(-1)  # [B, L, V]
        log_probability = log_probability.gather(-1, tokens[..., None])[..., 0]  # [B, L]
        is_end = (tokens == tokenizer.eos_token_id).long()
        is_written = is_end.cumsum(1) - is_end == 0  # [B, L]: up to the first end, which is included
        score = ((log_probability * is_written).sum(1) / is_written.sum(1)).exp()  # [B]
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [DecodedText(text.strip(), value) for text, value in zip(texts, score.tolist(), strict=True)]


@dataclass
class YDecoder:
    """A memory, a prefix decoder, or both: project onto the memory, then write.

    Args:
        made_for: `fingerprint` of the model whose embeddings it reads.
    """

    made_for: str
    memory: MemoryProjection | None = None
    decoder: PrefixDecoder | None = None
    tokenizer: Any = None
    num_calls: int = 0  # embeddings decoded so far

    def __post_init__(self) -> None:
        if self.memory is None and self.decoder is None:
            raise UserError("A y_decoder needs a memory of texts, a prefix decoder, or both.")
        if (self.decoder is None) != (self.tokenizer is None):
            raise UserError("A prefix decoder and its tokenizer come together.")

    def decode(self, embeddings: Tensor, *, max_new_tokens: int = 40) -> list[DecodedText]:
        """[B, D] -> B texts."""
        self.num_calls += len(embeddings)
        if self.decoder is None:
            return self.memory.nearest(embeddings)  # type: ignore[union-attr]
        if self.memory is not None:
            embeddings = self.memory.project(embeddings)
        return self.decoder.decode(embeddings.to(self.decoder.device), self.tokenizer, max_new_tokens=max_new_tokens)

    def save_pretrained(self, folder: str | Path) -> None:
        """Save memory, decoder and tokenizer, with a manifest of all files; see `core.publish`."""
        with published(folder) as staged:
            self._write(staged)

    def _write(self, folder: Path) -> None:
        info: dict[str, Any] = {"made_for": self.made_for, "prefix_decoder": self.decoder is not None}
        if self.decoder is not None:
            self.decoder.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        if self.memory is not None:
            info["memory_temperature"] = self.memory.temperature
            save_file({"embeddings": self.memory.embeddings.contiguous().cpu()}, folder / MEMORY_FILE)
            (folder / TEXTS_FILE).write_text(json.dumps(self.memory.texts, ensure_ascii=False), encoding="utf-8")
        write_json(folder / INFO_FILE, info)

    @classmethod
    def from_pretrained(cls, source: str | Path, *, revision: str | None = None) -> YDecoder | None:
        """Load the y_decoder/ of a folder or Hub id; None if there is none.

        Raises UserError if weights are missing, or if a file in the folder is not what was saved.
        """
        source = str(source)
        place: dict[str, Any] = {"revision": revision, "subfolder": "y_decoder"}
        if reason := damage_of(Path(source) / "y_decoder"):
            raise UserError(f"The y_decoder of {source} is damaged: {reason}. Save or train it again.")
        memory = decoder = tokenizer = None
        with loading("the y_decoder", source):
            path = find_file(source, INFO_FILE, **place)
            if path is None:
                return None
            info = read_json(path, INFO)
            if "memory_temperature" in info:
                memory = _load_memory(source, place, info["memory_temperature"])
            if info["prefix_decoder"]:
                config = load_config(source, what="the y_decoder", **place)
                if not isinstance(config, PrefixDecoderConfig):
                    raise UserError(f"The y_decoder of {source} is a {config.model_type}, not a prefix decoder.")
                decoder = load_model(PrefixDecoder, source, config, what="the y_decoder", **place)
                tokenizer = load_tokenizer(source, **place)
        return cls(info["made_for"], memory, decoder, tokenizer)


def _load_memory(source: str, place: dict[str, Any], temperature: float) -> MemoryProjection:
    """The memory in a folder or on the Hub. Raises UserError if its embeddings are not those of its texts."""
    paths = [find_file(source, name, **place) for name in (TEXTS_FILE, MEMORY_FILE)]
    if paths[0] is None or paths[1] is None:
        raise UserError(f"The y_decoder of {source} lacks {TEXTS_FILE} or {MEMORY_FILE}; take a whole copy.")
    texts = read_json(paths[0], [str], largest=10**9)
    embeddings = load_tensors(paths[1]).get("embeddings")
    if embeddings is None or embeddings.dim() != 2 or len(embeddings) != len(texts) or temperature <= 0:
        raise UserError(f"The memory of {source} does not hold one embedding for each of its {len(texts)} texts.")
    return MemoryProjection(embeddings, tuple(texts), temperature)


def fingerprint(model: Any) -> str:
    """SHA-256 of everything that maps a text to the shared space: y_encoder, its pooling and its projection.

    The weights are rounded to bfloat16 first, so that a model cast to bfloat16 keeps its fingerprint.
    """
    digest = hashlib.sha256(model.config.y_pooling.encode())
    for part in (model.y_encoder, model.target_projection):
        for name, value in sorted(part.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().bfloat16().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def train_prefix_decoder(
    embed: Callable[[Sequence[str]], Tensor],
    texts: Sequence[str],
    tokenizer: Any,
    lm: PreTrainedModel | PreTrainedConfig,
    args: TrainingArguments,
    *,
    num_prefix: int = 4,
    noise: float = 0.3,
    max_tokens: int = 64,
    eval_texts: Sequence[str] | None = None,
    resume_from_checkpoint: str | bool | None = None,
    stop_request: StopRequest | None = None,
) -> PrefixDecoder:
    """Train a prefix decoder on text alone: it learns to write each text from its embedding.

    Args:
        embed: texts -> unit embeddings [N, D] of the y_encoder. Computed once; the encoder is not trained.
        texts: to learn to write; texts beyond max_tokens are left out, with a warning that counts them.
        tokenizer: of the LM, with an eos_token.
        lm: a causal LM, or a config for random weights. A small one is enough: 2 to 10M weights for captions.
        stop_request: listens to signals. At one, a checkpoint is saved in `args.output_dir` and `Stopped` is raised.

    Raises UserError for a tokenizer without an eos_token, and if no text is left.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("The y_decoder's tokenizer has no eos_token, so a text would have no end; set one.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if isinstance(lm, PreTrainedConfig):
        lm = AutoModelForCausalLM.from_config(lm)
    train = _rows(texts, embed, tokenizer, max_tokens)
    config = PrefixDecoderConfig(
        lm_config=lm.config,
        embedding_dim=train[0]["embeddings"].shape[-1],
        num_prefix=num_prefix,
        noise=noise,
        attn_implementation={"lm_config": lm.config._attn_implementation},
    )
    decoder = PrefixDecoder(config, lm)
    # The LM reads the prefix in place of token embeddings: start at their scale.
    nn.init.normal_(decoder.prefix.weight, std=lm.get_input_embeddings().weight.std().item())
    trainer = StoppableTrainer(
        model=decoder,
        args=args,
        train_dataset=train,
        eval_dataset=_rows(eval_texts, embed, tokenizer, max_tokens) if eval_texts else None,
        data_collator=functools.partial(_collate, pad_token_id=tokenizer.pad_token_id),
    )
    trainer.label_names = ["input_ids"]  # without labels an evaluation reports no loss
    trainer.stop_request = stop_request or StopRequest()
    with trainer.stop_request.listening() if stop_request else nullcontext():
        if isinstance(resume_from_checkpoint, str) and is_last(resume_from_checkpoint, {}):
            trainer._load_from_checkpoint(resume_from_checkpoint)  # `train` would take one more step
        else:
            trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return trainer.accelerator.unwrap_model(trainer.model).eval()


def _rows(
    texts: Sequence[str], embed: Callable[[Sequence[str]], Tensor], tokenizer: Any, max_tokens: int
) -> list[dict[str, Any]]:
    """embeddings [D] and input_ids, with the end, of the texts that are not too long. Raises UserError for none."""
    lists = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    rows = []
    for text, tokens in zip(texts, lists, strict=True):
        if 1 <= len(tokens) < max_tokens:  # with its end, max_tokens at most
            rows.append((text, [*tokens, tokenizer.eos_token_id]))
    if len(rows) < len(texts):
        logger.warning(
            "%d of %d texts are empty or beyond %d tokens: left out.", len(texts) - len(rows), len(texts), max_tokens
        )
    if not rows:
        raise UserError(f"None of {len(texts)} texts has 1 to {max_tokens} tokens; raise max_tokens.")
    embeddings = embed([text for text, _ in rows]).cpu()  # [N, D]
    return [{"embeddings": z, "input_ids": ids} for z, (_, ids) in zip(embeddings, rows, strict=True)]


def _collate(rows: list[dict[str, Any]], *, pad_token_id: int) -> dict[str, Tensor]:
    """embeddings [B, D], input_ids and attention_mask [B, L], padded on the right."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.full((len(rows), longest), pad_token_id)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[index, :length] = torch.tensor(row["input_ids"])
        mask[index, :length] = 1
    return {"embeddings": torch.stack([row["embeddings"] for row in rows]), "input_ids": ids, "attention_mask": mask}


AutoConfig.register(PrefixDecoderConfig.model_type, PrefixDecoderConfig)
