"""From a predicted embedding back to text: the y_decoder of VL-JEPA, called only when text is asked for.

The paper says that it is light, takes no part in the main training and turns an embedding into text; not what it is
(arXiv:2512.10942v2, section 3.1). Here, two steps, each of which may be left out:

    MemoryProjection   pulls an embedding onto those of known texts: contrastive training leaves predictions near their
                       targets in angle, and still off the manifold of texts
    PrefixDecoder      a small causal LM that reads the embedding as a few prefix vectors (as ClipCap, arXiv:2111.09734)

Without a PrefixDecoder, the text is the nearest one of the memory. Both live in a folder `y_decoder/` beside the model,
and are read when the first text is asked for.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_outputs import CausalLMOutput

from ..core.errors import UserError
from ..core.files import write_json

logger = logging.getLogger(__name__)
IGNORE = -100
INFO_FILE, MEMORY_FILE, TEXTS_FILE = "y_decoder.json", "memory.safetensors", "memory.json"


class DecodedText(NamedTuple):
    text: str
    score: float  # PrefixDecoder: the geometric mean probability of its tokens, the end included; memory alone: the
    # cosine of the nearest text


@dataclass(frozen=True)
class MemoryProjection:
    """Known texts as a softmax-weighted dictionary: z -> normalised sum over i of softmax_i(z . m_i / temperature) m_i.

    embeddings: [M, D] of unit norm.  texts: the M texts.  temperature: small = the nearest text, large = their mean;
    0.05 was the best of what was tried on photos (captions decoded from unseen folds).
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
        weights = (F.normalize(embeddings, dim=-1) @ memory.T / self.temperature).softmax(dim=-1)
        return F.normalize(weights @ memory, dim=-1)

    def nearest(self, embeddings: Tensor) -> list[DecodedText]:
        cosine, index = (F.normalize(embeddings, dim=-1) @ self.embeddings.to(embeddings).T).max(dim=-1)
        return [DecodedText(self.texts[i], c) for i, c in zip(index.tolist(), cosine.tolist(), strict=True)]


@strict
class PrefixDecoderConfig(PreTrainedConfig):
    """lm_config: the causal LM. embedding_dim: D. num_prefix: vectors it reads. noise: standard deviation per embedding
    of the Gaussian added in training (on unit embeddings, spread over D), so that predictions, which are never exactly
    an embedding of a text, decode too."""

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
        # A composite config wipes the attention of its parts, and a GPT-2 without one is not causal, in silence.
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
        prefix = self.prefix_of(embeddings)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        words = self.lm.get_input_embeddings()(input_ids)
        seen = torch.cat([mask.new_ones(prefix.shape[:2]), mask], dim=1)
        logits = self.lm(inputs_embeds=torch.cat([prefix, words], dim=1), attention_mask=seen, use_cache=False).logits
        logits = logits[:, self.config.num_prefix - 1 : -1]  # the last prefix vector predicts the first token
        loss = F.cross_entropy(logits.flatten(0, 1).float(), input_ids.masked_fill(mask == 0, IGNORE).flatten())
        return CausalLMOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def decode(self, embeddings: Tensor, tokenizer: Any, *, max_new_tokens: int = 40) -> list[DecodedText]:
        """Greedy text for each row of [B, D]."""
        prefix = self.eval().prefix_of(embeddings)
        found = self.lm.generate(
            inputs_embeds=prefix,
            attention_mask=torch.ones(prefix.shape[:2], dtype=torch.long, device=prefix.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            return_dict_in_generate=True,
            output_logits=True,
        )
        chosen = torch.stack(found.logits, dim=1).float().log_softmax(-1).gather(-1, found.sequences[..., None])[..., 0]
        ended = (found.sequences == tokenizer.eos_token_id).long().cumsum(1)
        written = ended - (found.sequences == tokenizer.eos_token_id).long() == 0  # up to the first end, included
        probability = ((chosen * written).sum(1) / written.sum(1)).exp()
        texts = tokenizer.batch_decode(found.sequences, skip_special_tokens=True)
        return [DecodedText(text.strip(), p) for text, p in zip(texts, probability.tolist(), strict=True)]


@dataclass
class YDecoder:
    """A memory, a prefix decoder, or both: project onto the memory, then write.

    made_for: `fingerprint` of the y_encoder whose space it reads.
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
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
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
        """The y_decoder/ of a model folder or Hub id, or None if it has none."""
        from transformers.utils import cached_file

        def path(name: str) -> str | None:
            return cached_file(
                str(source), name, subfolder="y_decoder", revision=revision,
                _raise_exceptions_for_missing_entries=False,
            )  # fmt: skip

        if (info_path := path(INFO_FILE)) is None:
            return None
        info = json.loads(Path(info_path).read_text(encoding="utf-8"))
        memory = decoder = tokenizer = None
        if "memory_temperature" in info:
            texts = json.loads(Path(str(path(TEXTS_FILE))).read_text(encoding="utf-8"))
            memory = MemoryProjection(
                load_file(str(path(MEMORY_FILE)))["embeddings"], tuple(texts), info["memory_temperature"]
            )
        if info["prefix_decoder"]:
            where: dict[str, Any] = {
                "subfolder": "y_decoder",
                "revision": revision or "main",
                "trust_remote_code": False,
            }
            decoder, report = PrefixDecoder.from_pretrained(
                str(source), use_safetensors=True, output_loading_info=True, **where
            )
            if wrong := [*report["missing_keys"], *report["mismatched_keys"]]:
                raise UserError(f"The y_decoder of {source} lacks weights ({str(wrong[0])}, ...): partly random.")
            tokenizer = AutoTokenizer.from_pretrained(str(source), **where)
        return cls(info["made_for"], memory, decoder, tokenizer)


def fingerprint(model: Any) -> str:
    """SHA-256 of what places a text in the shared space: weights of the y_encoder and its projection, and the pooling.

    Of the weights rounded to bfloat16: a model cast to it is still the same."""
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
) -> PrefixDecoder:
    """The stage of its own, on text alone: learn to write each text from its embedding.

    Args:
        embed: texts -> unit embeddings [N, D], the y_encoder's; computed once, the encoder is not trained.
        texts: what to learn to write; texts beyond max_tokens are left out, with a warning that counts them.
        tokenizer: of the LM, with an eos_token.
        lm: a causal LM, or a config for random weights. A small one: 2 to 10M weights for captions.

    Raises UserError for a tokenizer without end and for no text left.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("The y_decoder's tokenizer has no eos_token, so a text would have no end; set one.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if isinstance(lm, PreTrainedConfig):
        lm = AutoModelForCausalLM.from_config(lm)

    def rows(given: Sequence[str]) -> list[dict[str, Any]]:
        ids = [
            [*found, tokenizer.eos_token_id] for found in tokenizer(list(given), add_special_tokens=False)["input_ids"]
        ]
        kept = [i for i, tokens in enumerate(ids) if 1 < len(tokens) <= max_tokens]
        if len(kept) < len(ids):
            logger.warning(
                "%d of %d texts are empty or beyond %d tokens: left out.", len(ids) - len(kept), len(ids), max_tokens
            )
        if not kept:
            raise UserError(f"None of {len(ids)} texts has 1 to {max_tokens} tokens; raise max_tokens.")
        embeddings = embed([given[i] for i in kept]).cpu()
        return [{"embeddings": embeddings[row], "input_ids": ids[i]} for row, i in enumerate(kept)]

    def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        length = max(len(row["input_ids"]) for row in batch)
        ids = torch.full((len(batch), length), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(batch):
            ids[i, : len(row["input_ids"])], mask[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"]), 1
        return {
            "embeddings": torch.stack([row["embeddings"] for row in batch]),
            "input_ids": ids,
            "attention_mask": mask,
        }

    train = rows(texts)
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
    trainer = Trainer(
        model=decoder,
        args=args,
        train_dataset=train,
        eval_dataset=rows(eval_texts) if eval_texts else None,
        data_collator=collate,
    )
    trainer.label_names = ["input_ids"]  # or an evaluation reports no loss
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return trainer.accelerator.unwrap_model(trainer.model).eval()


AutoConfig.register(PrefixDecoderConfig.model_type, PrefixDecoderConfig)
