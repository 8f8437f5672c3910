"""The arms: ours and plain SFT as their trainers run them, and the published layouts with the same loss."""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from llm_jepa import LLMJEPAConfig, LLMJEPATrainer, jepa_distance
from llm_jepa.core.distributed import shared_coin
from llm_jepa.lm import IGNORE

from .data import Data

PUBLISHED_LENGTH = 512  # finetune.py pads every row to it


class Tokens(NamedTuple):
    real: int
    padded: int  # with padding: everything that the layers compute


class Arm(NamedTuple):
    """Two functions of row numbers: `step` leaves gradients and returns the detached loss, `tokens` counts tokens."""

    step: Callable[[Sequence[int]], Tensor]
    tokens: Callable[[Sequence[int]], Tokens]


def trainer_arm(trainer: SFTTrainer, *, at_step: int = 0) -> Arm:
    """The step of a trainer: its collator, its counting of labels, its loss and its backward."""
    rows = trainer.train_dataset.to_list()

    def step_inputs(numbers: Sequence[int]) -> tuple[dict[str, Tensor], Any]:
        trainer.state.global_step = at_step
        collated = (trainer.data_collator([dict(rows[i]) for i in part]) for part in [numbers])
        batches, labels = trainer.get_batch_samples(collated, 1, trainer.args.device)
        return batches[0], labels

    def step(numbers: Sequence[int]) -> Tensor:
        trainer.current_gradient_accumulation_steps = 1
        batch, labels = step_inputs(numbers)
        loss: Tensor = trainer.training_step(trainer.model, batch, labels)
        return loss.detach()

    def tokens(numbers: Sequence[int]) -> Tokens:
        batch, _ = step_inputs(numbers)
        real = (batch["doc"] >= 0) if "doc" in batch else batch["attention_mask"]
        inside = Tokens(int(real.sum()), batch["input_ids"].numel())
        if "apart_input_ids" not in batch:
            return inside
        apart = Tokens(int(batch["apart_attention_mask"].sum()), batch["apart_input_ids"].numel())
        return Tokens(inside.real + apart.real, inside.padded + apart.padded)

    return Arm(step, tokens)


class Rows(NamedTuple):
    """Another layout of the same views, on the CPU."""

    inputs: dict[str, Tensor]  # arguments of the model
    labels: Tensor  # [R, L]
    context_at: Tensor  # [B] positions in the flattened rows, R * L
    target_at: Tensor  # [B]
    real_tokens: int


def three_rows(rows: Sequence[dict[str, Any]], predictor_ids: list[int], pad: int, length: int | None = None) -> Rows:
    """Lay out [LM] [context, predictor tokens] [target], right-padded to the longest row or to `length`."""
    lm = [row["input_ids"] for row in rows]
    contexts = [row["contexts"][0] + predictor_ids for row in rows]
    targets = [row["targets"][0] for row in rows]
    sequences = [*lm, *contexts, *targets]
    width = length or max(map(len, sequences))
    counts = torch.tensor([len(ids) for ids in sequences])
    last = torch.arange(len(sequences)) * width + counts - 1
    size = len(rows)
    return Rows(
        {
            "input_ids": torch.tensor([ids + [pad] * (width - len(ids)) for ids in sequences]),
            "attention_mask": (torch.arange(width) < counts[:, None]).long(),
        },
        _labels(rows, len(sequences), width),
        last[size : 2 * size],
        last[2 * size :],
        int(counts.sum()),
    )


def two_rows(rows: Sequence[dict[str, Any]], predictor_ids: list[int], pad: int) -> Rows:
    """Lay out [LM] [context, predictor tokens, target] under a 4-D float mask."""
    segments = [[row["input_ids"]] for row in rows]
    segments += [[row["contexts"][0] + predictor_ids, row["targets"][0]] for row in rows]
    lengths = [sum(map(len, parts)) for parts in segments]
    width = max(lengths)
    hidden = torch.finfo(torch.float32).min
    causal = torch.full((width, width), hidden).triu(1)
    mask = torch.full((len(segments), 1, width, width), hidden)  # [R, 1, L, L]
    mask.diagonal(dim1=2, dim2=3).zero_()  # padding sees itself: a row of the mask that sees nothing would give NaN
    ids = torch.full((len(segments), width), pad)  # [R, L]
    positions = torch.zeros_like(ids)
    ends = []
    for r, parts in enumerate(segments):
        start = 0
        for part in parts:
            stop = start + len(part)
            ids[r, start:stop] = torch.tensor(part)
            positions[r, start:stop] = torch.arange(len(part))
            mask[r, 0, start:stop, start:stop] = causal[: len(part), : len(part)]
            ends.append(r * width + stop - 1)
            start = stop
    views = torch.tensor(ends[len(rows) :]).view(-1, 2)  # [B, 2]: the ends of context and target
    return Rows(
        {"input_ids": ids, "position_ids": positions, "attention_mask": mask},
        _labels(rows, len(segments), width),
        views[:, 0],
        views[:, 1],
        sum(lengths),
    )


def _labels(rows: Sequence[dict[str, Any]], count: int, width: int) -> Tensor:
    """[count, width]: the labels of the LM rows, which come first. No other row has labels."""
    labels = torch.full((count, width), IGNORE)
    for r, row in enumerate(rows):
        labels[r, : len(row["labels"])] = torch.tensor(row["labels"])
    return labels


def rows_arm(trainer: LLMJEPATrainer, layout: Callable[..., Rows], **options: Any) -> Arm:
    """The loss of `trainer` (LM + cosine) in another layout of its rows: same views, same weights, same terms."""
    views = trainer.train_dataset.to_list()
    model, device = trainer.model, trainer.args.device
    pad, masked = trainer.processing_class.pad_token_id, torch.tensor(trainer.predictor_ids, device=device)

    def laid_out(numbers: Sequence[int]) -> Rows:
        return layout([views[i] for i in numbers], trainer.predictor_ids, pad, **options)

    def step(numbers: Sequence[int]) -> Tensor:
        model.train()
        rows = laid_out(numbers)
        inputs = {key: value.to(device) for key, value in rows.inputs.items()}
        if inputs["attention_mask"].is_floating_point():
            inputs["attention_mask"] = inputs["attention_mask"].to(model.dtype)
        next_token = F.pad(rows.labels[:, 1:], (0, 1), value=IGNORE).to(device)
        has_label = next_token != IGNORE
        with trainer.compute_loss_context_manager():
            output = model(**inputs, logits_to_keep=has_label, output_hidden_states=-1, use_cache=False)
            logits = output.logits.reshape(-1, output.logits.shape[-1])  # [labels, V]
            logits = logits if logits.dtype == torch.float64 else logits.float()
            # Predictor tokens are inputs only, so they are never in the softmax. `ours` does the same.
            logits = logits.index_fill(-1, masked, torch.finfo(logits.dtype).min)
            loss = F.cross_entropy(logits, next_token[has_label])
            hidden = output.hidden_states[-1].flatten(0, 1)  # [R * L, D]
            predicted, target = hidden[rows.context_at.to(device)], hidden[rows.target_at.to(device)]
            loss = loss + trainer.args.jepa_weight * jepa_distance(predicted, target).mean()
        trainer.accelerator.backward(loss)
        return loss.detach()

    def tokens(numbers: Sequence[int]) -> Tokens:
        rows = laid_out(numbers)
        return Tokens(rows.real_tokens, rows.inputs["input_ids"].numel())

    return Arm(step, tokens)


def make_arms(
    model: PreTrainedModel, data: Data, rows: list[dict[str, Any]], folder: Path, options: argparse.Namespace
) -> dict[str, Arm]:
    """Every arm, on the same rows and the same model."""
    dataset = Dataset.from_list(rows)
    common: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": options.device == "cpu",
        "bf16": options.dtype == "bfloat16",
        "activation_checkpointing": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": options.batch_size,
        "max_length": None,
    }

    def trained_by(kind: type[SFTTrainer], args: SFTConfig) -> SFTTrainer:
        model.__dict__.pop("forward", None)  # every SFTTrainer wraps `forward` of the model; keep one wrap only
        return kind(model=model, args=args, train_dataset=dataset, processing_class=copy.deepcopy(data.tokenizer))

    def ours(**changes: Any) -> LLMJEPATrainer:
        jepa = {"jepa_weight": 1.0, "objective": "cosine", "num_predictor_tokens": 1, **changes}
        return trained_by(LLMJEPATrainer, LLMJEPAConfig(**common, diagnostics_pairs=0, **jepa))

    packed = ours()
    seed = packed.args.seed
    dropped_step = next(step for step in itertools.count() if shared_coin(seed, step) < 0.75)
    arms = {
        "sft": trainer_arm(ours(jepa_weight=0.0)),
        "sft_packed": trainer_arm(ours(jepa_weight=0.0, share_rows=True)),
        "sft_trl": trainer_arm(trained_by(SFTTrainer, SFTConfig(**common))),
        "three_rows": rows_arm(packed, three_rows),
        "three_rows_512": rows_arm(packed, three_rows, length=PUBLISHED_LENGTH),
        "two_rows": rows_arm(packed, two_rows),
        "ours": trainer_arm(packed),
        "ours_packed": trainer_arm(ours(share_rows=True)),
        "ours_k0": trainer_arm(ours(num_predictor_tokens=0)),
        "ours_message": trainer_arm(ours(context_view="message")),
        "ours_forward_only": trainer_arm(ours(target_encoder="stop_gradient")),
        "ours_cached": trainer_arm(ours(target_encoder="base")),
        "ours_dropped": trainer_arm(ours(jepa_dropout=0.75), at_step=dropped_step),
    }
    if options.quick:
        del arms["three_rows_512"]
    # `train` puts autocast around `forward` in the same way. The arms share the model, so once is enough.
    packed.accelerator.prepare_model(model, evaluation_mode=True)
    return arms
