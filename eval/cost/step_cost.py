"""What a training step costs, in steps of plain SFT:  python -m eval.step_cost [--quick] [--nl-rx DIR] [--out FILE]

Every arm makes one step (forward and backward of one micro-batch, no optimizer) of the same examples with the same
model, in one process: a new batch each repetition, the arms in random order. Only ratios within a repetition count;
the median and [min, max] of them are reported. Collation and masks are inside the clock, tokenization is not. Time is
the process's CPU time, with the wall beside it, or the wall on a GPU.

    sft               plain SFT: `LLMJEPATrainer` with jepa_weight 0, logits at label positions only
    sft_packed        the same with share_rows
    sft_trl           TRL's own `SFTTrainer`, as it ships (its fused head, its entropy and accuracy)
    three_rows        rows of their own for LM row, context and target: what the published code does by default
    three_rows_512    likewise, padded to 512 tokens as there
    two_rows          LM row, and context and target in a second one under an additive mask: its --additive_mask
    ours              packed rows, one predictor token, context_view prefix
    ours_packed       the same with share_rows
    ours_k0           no predictor token
    ours_message      context_view message
    ours_forward_only target_encoder stop_gradient: targets in a pass without gradient
    ours_cached       target_encoder base: targets were embedded once, before
    ours_dropped      a step that jepa_dropout drops; dropout50 and 75 mix it with `ours` in exact proportion

The other layouts compute the very loss of `ours` (LM + cosine of the same embeddings, logits at label positions only,
where the published code scores every position): they differ in layout alone. tests/test_step_cost.py compares losses
and gradients. (Their context is the prefix. Message views would cost them the same: the LM row is the longest.)
Activation checkpointing, TRL's default, is off everywhere.

Memory is the peak above the resting model (parameters and gradients), counted by the allocator and so exact on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import itertools
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast, set_seed
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from llm_jepa import LLMJEPAConfig, LLMJEPATrainer, UserError, jepa_distance
from llm_jepa.core.distributed import shared_coin
from llm_jepa.core.files import write_json
from llm_jepa.lm.from_scratch import train_tokenizer
from llm_jepa.lm.loading import data_sha256, read_rows
from llm_jepa.lm.rows import parse_row
from llm_jepa.lm.views import IGNORE
from llm_jepa.synthetic import nl_rx

from ..provenance import environment

# Llama-3's: a header of four tokens a turn, bos, and the system turn only where the row has one.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
TOKENIZER_SIZE = 8000  # at most: a few thousand generated rows have fewer pairs to merge
SHAPES: dict[str, dict[str, int]] = {
    # Nearly all of the work in the layers, as in a model of 1B parameters and more.
    "body": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "vocab_size": 8192},
    # Llama-3's vocabulary on a small body.
    "vocabulary": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "vocab_size": 128256},
}
NUM_HEADS = 8
DATA_SETS = ("nl_rx", "longer")
GENERATED_ROWS = 2000
REQUESTS_PER_TURN = 8  # of the generated `longer` rows: answers of about 100 tokens
PUBLISHED_LENGTH = 512  # finetune.py pads every row to it
PADDED_REPETITIONS = 3  # of three_rows_512, which costs more than all other arms together
UNBOUNDED = ("sft_trl", "three_rows_512", "ours_k0")  # shown beside the rest; --quick runs them once
OFTEN = ("sft", "ours", "ours_forward_only", "ours_cached", "ours_dropped")  # --quick runs the others 3 times


class Bound(NamedTuple):
    """A median of per-repetition ratios, and what it may be: a number, or so many times the ratio of padded tokens."""

    numerator: str
    denominator: str
    limit: float
    times_tokens: bool = False


BOUNDS = {
    "ours_over_sft": Bound("ours", "sft", 1.06, times_tokens=True),
    "ours_over_three_rows": Bound("ours", "three_rows", 0.50),
    "ours_over_two_rows": Bound("ours", "two_rows", 0.78),
    "ours_packed_over_packed_sft": Bound("ours_packed", "sft_packed", 1.06, times_tokens=True),
    "ours_message_over_three_rows": Bound("ours_message", "three_rows", 0.68),
    "ours_forward_only_over_sft": Bound("ours_forward_only", "sft", 1.20),
    "ours_cached_over_sft": Bound("ours_cached", "sft", 1.08),
    "ours_dropout75_over_sft": Bound("ours_dropout75", "sft", 1.14),
}
MEMORY_BOUND = Bound("ours", "sft", 1.1, times_tokens=True)

# -- data and model ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    name: str
    source: str  # a file name, or what generated the rows
    sha256: str | None
    rows: list[dict[str, Any]]  # prompt and completion turns: so TRL trains the completion alone, as we do
    tokenizer: PreTrainedTokenizerFast


def load_data(name: str, folder: Path | None, *, seed: int) -> Data:
    """One of DATA_SETS: the file in `folder`, or generated rows without one. Raises UserError."""
    if folder is not None:
        path = folder / ("synth_train.jsonl" if name == "nl_rx" else "spider_train.jsonl")
        raw, source = read_rows(str(path)), path.name
    else:
        generated = nl_rx.generate(GENERATED_ROWS, seed=seed)
        raw = Dataset.from_list(generated if name == "nl_rx" else _several_in_one_turn(generated))
        source = f"llm_jepa.synthetic.nl_rx version {nl_rx.VERSION}, seed {seed}"
    rows = []
    for number, row in enumerate(raw):
        example = parse_row(row, f"{source}, row {number}")
        rows.append({"prompt": example.prompt, "completion": example.completion})
    return Data(name, source, data_sha256(raw), rows, _tokenizer(rows))


def _several_in_one_turn(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Numbered requests in one user turn, and the numbered answers in one assistant turn."""
    found = []
    for start in range(0, len(rows) - REQUESTS_PER_TURN + 1, REQUESTS_PER_TURN // 4):  # every request in four rows
        turns = [row["messages"] for row in rows[start : start + REQUESTS_PER_TURN]]
        contents = ["\n".join(f"{n}. {turn[at]['content']}" for n, turn in enumerate(turns, 1)) for at in (1, 2)]
        sides = zip(("user", "assistant"), contents, strict=True)
        found.append({"messages": [turns[0][0], *({"role": role, "content": text} for role, text in sides)]})
    return found


def _tokenizer(rows: list[dict[str, Any]]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the rows. Roles and the blank line of a header are one token each, as in Llama-3's."""
    roles = [{"prompt": "system\nuser", "completion": "assistant"}] * len(rows)
    tokenizer = train_tokenizer([*rows, *roles], TOKENIZER_SIZE)
    tokenizer.add_tokens(["\n\n"])
    tokenizer.add_tokens(["<|start_header_id|>", "<|end_header_id|>"], special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def random_llama(shape: Mapping[str, int], tokenizer: PreTrainedTokenizerFast, *, seed: int) -> PreTrainedModel:
    """Random float32 weights. The vocabulary has rows to spare, so that predictor tokens do not enlarge it."""
    set_seed(seed)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(
        **{"num_attention_heads": NUM_HEADS, "num_key_value_heads": NUM_HEADS, **shape, **ids},
        tie_word_embeddings=False,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    return model


# -- arms -------------------------------------------------------------------------------------------------------------


class Tokens(NamedTuple):
    real: int
    padded: int  # all that the layers compute, padding included


class Arm(NamedTuple):
    """Both take row numbers: `step` leaves gradients and returns the detached loss, `tokens` counts its tokens."""

    step: Callable[[Sequence[int]], Tensor]
    tokens: Callable[[Sequence[int]], Tokens]


def trainer_arm(trainer: SFTTrainer, *, at_step: int = 0) -> Arm:
    """A trainer's own step: its collator, its counting of labels, its loss, its backward."""
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
        found = Tokens(int(real.sum()), batch["input_ids"].numel())
        if "apart_input_ids" in batch:
            apart = Tokens(int(batch["apart_attention_mask"].sum()), batch["apart_input_ids"].numel())
            found = Tokens(found.real + apart.real, found.padded + apart.padded)
        return found

    return Arm(step, tokens)


class Rows(NamedTuple):
    """Another layout of the same views, on the CPU."""

    inputs: dict[str, Tensor]  # what the model takes
    labels: Tensor  # [R, L]
    context_at: Tensor  # [B], flat places in R * L
    target_at: Tensor
    real_tokens: int


def three_rows(rows: Sequence[dict[str, Any]], predictor_ids: list[int], pad: int, length: int | None = None) -> Rows:
    """[LM] [context, predictor tokens] [target], each right-padded to the longest, or to `length`."""
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
    """[LM] [context, predictor tokens, target] under a 4-D float mask; padding sees itself, as nothing would be NaN."""
    segments = [[row["input_ids"]] for row in rows]
    segments += [[row["contexts"][0] + predictor_ids, row["targets"][0]] for row in rows]
    width = max(sum(map(len, parts)) for parts in segments)
    hidden = torch.finfo(torch.float32).min
    causal = torch.full((width, width), hidden).triu(1)
    mask = torch.full((len(segments), 1, width, width), hidden)
    mask.diagonal(dim1=2, dim2=3).zero_()
    ids, positions, ends = [], [], []
    for r, parts in enumerate(segments):
        start = 0
        for part in parts:
            stop = start + len(part)
            mask[r, 0, start:stop, start:stop] = causal[: len(part), : len(part)]
            ends.append(r * width + stop - 1)
            start = stop
        ids.append([token for part in parts for token in part] + [pad] * (width - start))
        positions.append([i for part in parts for i in range(len(part))] + [0] * (width - start))
    views = torch.tensor(ends[len(rows) :]).view(-1, 2)
    return Rows(
        {"input_ids": torch.tensor(ids), "position_ids": torch.tensor(positions), "attention_mask": mask},
        _labels(rows, len(segments), width),
        views[:, 0],
        views[:, 1],
        sum(len(part) for parts in segments for part in parts),
    )


def _labels(rows: Sequence[dict[str, Any]], count: int, width: int) -> Tensor:
    """Those of the LM rows, which come first; no other row has any."""
    labels = torch.full((count, width), IGNORE)
    for r, row in enumerate(rows):
        labels[r, : len(row["labels"])] = torch.tensor(row["labels"])
    return labels


def rows_arm(trainer: LLMJEPATrainer, layout: Callable[..., Rows], **options: Any) -> Arm:
    """The loss of `trainer` (LM + cosine) over another layout of its rows: same views, same weights, same terms."""
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
            logits = output.logits.reshape(-1, output.logits.shape[-1])
            logits = logits if logits.dtype == torch.float64 else logits.float()
            logits = logits.index_fill(
                -1, masked, torch.finfo(logits.dtype).min
            )  # as ours: predictor tokens are inputs
            loss = F.cross_entropy(logits, next_token[has_label])
            hidden = output.hidden_states[-1].flatten(0, 1)
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
    """Every arm over the same rows and the same model."""
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
        model.__dict__.pop("forward", None)  # TRL wraps `forward` at every start; one wrap is enough
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
    return arms


# -- measuring --------------------------------------------------------------------------------------------------------


class Clock(NamedTuple):
    cpu_s: float
    wall_s: float


def timed(arm: Arm, numbers: Sequence[int], model: PreTrainedModel) -> Clock:
    """One step from gradients of None, as a Trainer starts it."""
    model.zero_grad(set_to_none=True)
    _synchronize(model)
    cpu, wall = time.process_time(), time.perf_counter()
    arm.step(numbers)
    _synchronize(model)
    return Clock(time.process_time() - cpu, time.perf_counter() - wall)


def _synchronize(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def peak_memory(arm: Arm, numbers: Sequence[int], model: PreTrainedModel) -> int:
    """Bytes at the step's peak above those of the resting model, its gradients resident."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        resting = torch.cuda.memory_allocated()
        arm.step(numbers)
        return torch.cuda.max_memory_allocated() - resting
    with _quiet_stderr(), torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:  # fmt: skip
        arm.step(numbers)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())  # stable: in the order the allocator reported them
    return max(itertools.accumulate(event.nbytes() for event in events))


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """The profiler's C++ side writes two lines there at every start, at any log level."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def measure_cell(data: Data, shape: str, options: argparse.Namespace) -> dict[str, Any]:
    """All arms of one data set and one model: every figure of every repetition, and the summary of them."""
    needed = options.repetitions * options.batch_size
    if needed > len(data.rows):
        raise UserError(
            f"{options.repetitions} repetitions of {options.batch_size} rows need {needed} rows, and {data.source} has "
            f"{len(data.rows)}; lower --repetitions or --batch-size."
        )
    draw = random.Random(options.seed)
    rows = draw.sample(data.rows, needed)
    batches = [range(start, start + options.batch_size) for start in range(0, needed, options.batch_size)]
    model = random_llama(SHAPES[shape], data.tokenizer, seed=options.seed)
    with tempfile.TemporaryDirectory(prefix="step_cost_") as folder:
        arms = make_arms(model, data, rows, Path(folder), options)
    found: dict[str, dict[str, list[Any]]] = {
        name: {"cpu_s": [], "wall_s": [], "real_tokens": [], "padded_tokens": [], "peak_memory": []} for name in arms
    }
    for name, arm in arms.items():
        for tokens in (arm.tokens(batch) for batch in batches):
            found[name]["real_tokens"].append(tokens.real)
            found[name]["padded_tokens"].append(tokens.padded)
    most = {name: options.repetitions for name in arms}
    if options.quick:
        most |= {name: min(3, options.repetitions) for name in arms if name not in OFTEN}
        most |= dict.fromkeys(UNBOUNDED, 1)
    else:
        most["three_rows_512"] = PADDED_REPETITIONS
    weighed = [
        (name, batch)
        for batch in batches[: options.memory_batches]
        for name in arms
        if not options.quick or name in (MEMORY_BOUND.numerator, MEMORY_BOUND.denominator)
    ]
    clocked = [
        (name, batch)
        for repetition, batch in enumerate(batches)
        for name in draw.sample(list(arms), len(arms))
        if repetition < most[name]
    ]
    with tqdm(total=len(weighed) + len(clocked), desc=f"{data.name}, {shape}", mininterval=1) as progress:
        arms["sft"].step(batches[0])  # workspaces and threads are there before anything is weighed or clocked
        for name, batch in weighed:
            found[name]["peak_memory"].append(peak_memory(arms[name], batch, model))
            progress.update()
        gc.collect()
        for name, batch in clocked:
            clock = timed(arms[name], batch, model)
            found[name]["cpu_s"].append(clock.cpu_s)
            found[name]["wall_s"].append(clock.wall_s)
            progress.update()
    return {
        "data": data.name,
        "source": data.source,
        "rows_sha256": data.sha256,
        "tokenizer_size": len(data.tokenizer),
        "model": shape,
        "shape": SHAPES[shape],
        "parameters": model.num_parameters(),
        "arms": add_dropout(found),
    }


def add_dropout(arms: dict[str, dict[str, list[Any]]]) -> dict[str, dict[str, list[Any]]]:
    """The mean step of a run that drops half, or three quarters, of its steps: no coin's luck is in it."""
    kept, dropped = arms["ours"], arms["ours_dropped"]
    for percent in (50, 75):
        share = percent / 100
        mixed = {
            key: [(1 - share) * a + share * b for a, b in zip(kept[key], dropped[key], strict=True)]
            for key in kept
            if key != "peak_memory"
        }
        arms[f"ours_dropout{percent}"] = {**mixed, "peak_memory": kept["peak_memory"]}
    return arms


# -- reporting --------------------------------------------------------------------------------------------------------


class Spread(NamedTuple):
    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:5.2f} [{self.low:.2f}, {self.high:.2f}]"


def paired(arms: dict[str, dict[str, list[Any]]], name: str, other: str, key: str) -> Spread:
    """The ratios within repetitions, as far as both arms ran."""
    ratios = [a / b for a, b in zip(arms[name][key], arms[other][key], strict=False)]
    return Spread(statistics.median(ratios), min(ratios), max(ratios))


def token_ratio(arms: dict[str, dict[str, list[Any]]], name: str, other: str) -> float:
    """Of padded tokens, over all batches: what the layers compute."""
    return sum(arms[name]["padded_tokens"]) / sum(arms[other]["padded_tokens"])


def summary(cell: dict[str, Any], clock: str) -> dict[str, float]:
    """The bounded figures and the token ratios that they are measured by."""
    arms = cell["arms"]
    figures = {name: paired(arms, b.numerator, b.denominator, clock).median for name, b in BOUNDS.items()}
    return {
        **figures,
        "token_ratio": token_ratio(arms, "ours", "sft"),
        "token_ratio_packed": token_ratio(arms, "ours_packed", "sft_packed"),
        "ours_memory_over_sft": sum(arms["ours"]["peak_memory"]) / sum(arms["sft"]["peak_memory"]),
    }


def limit_of(name: str, figures: Mapping[str, float]) -> float | None:
    """What the figure may be at most; None for the token ratios."""
    bound = {**BOUNDS, "ours_memory_over_sft": MEMORY_BOUND}.get(name)
    if bound is None:
        return None
    tokens = figures["token_ratio_packed" if "packed" in bound.numerator else "token_ratio"]
    return bound.limit * tokens if bound.times_tokens else bound.limit


def table(cell: dict[str, Any], clock: str, batch_size: int) -> str:
    other = "wall_s" if clock == "cpu_s" else "cpu_s"
    lines = [
        f"{cell['data']} ({cell['source']}), {cell['model']} model, {cell['parameters'] / 1e6:.0f} M parameters; "
        "times, padded tokens and peak memory over those of sft",
        f"{'arm':18s}{clock[:-2] + ' time':>20s}{other[:-2]:>8s}{'tokens/example':>16s}{'padded':>8s}{'ratio':>7s}"
        f"{'peak MiB':>10s}{'ratio':>7s}",
    ]
    arms = cell["arms"]
    for name, arm in arms.items():
        examples = batch_size * len(arm["real_tokens"])
        memory, base = arm["peak_memory"], arms["sft"]["peak_memory"]
        lines.append(
            f"{name:18s}{paired(arms, name, 'sft', clock)!s:>20s}{paired(arms, name, 'sft', other).median:8.2f}"
            f"{sum(arm['real_tokens']) / examples:16.1f}{sum(arm['padded_tokens']) / examples:8.1f}"
            f"{token_ratio(arms, name, 'sft'):7.2f}"
            + (f"{statistics.mean(memory) / 2**20:10.1f}{sum(memory) / sum(base):7.2f}" if memory else "")
        )
    step = statistics.median(arms["sft"][clock])
    lines.append(f"a step of sft: {step:.3f} s ({clock[:-2]}), {len(arms['sft'][clock])} repetitions of {batch_size}")
    return "\n".join(lines)


def bounds_table(figures: Mapping[str, float], missed: str = "MISSED") -> str:
    lines = []
    for name, figure in figures.items():
        limit = limit_of(name, figures)
        verdict = "" if limit is None else f"  <= {limit:5.3f}  {'ok' if figure <= limit else missed}"
        lines.append(f"{name:30s}{figure:7.3f}{verdict}")
    return "\n".join(lines)


def plot(cells: list[dict[str, Any]], clock: str, path: Path) -> None:
    """Horizontal bars: median time over SFT's, with the span of the repetitions."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(cells), figsize=(1.5 + 4.5 * len(cells), 4.5), squeeze=False, sharey=True)
    for panel, cell in zip(panels[0], cells, strict=True):
        # 512-token rows would squeeze all other bars into a line; the table has them.
        names = [name for name in cell["arms"] if name not in ("three_rows_512", "ours_dropped")]
        spreads = [paired(cell["arms"], name, "sft", clock) for name in names]
        medians = [spread.median for spread in spreads]
        span = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
        colors = ["#2b6cb0" if name.startswith("ours") else "#718096" for name in names]
        panel.barh(names, medians, xerr=span, color=colors, error_kw={"elinewidth": 0.8, "capsize": 2})
        for row, median in enumerate(medians):
            panel.text(0.05, row, f"{median:.2f}", color="white", fontsize=9, verticalalignment="center")
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set_title(f"{cell['data']}, {cell['model']} model", fontsize=10)
        panel.set_xlabel(f"{clock[:-2]} time of a step / plain SFT")
        panel.invert_yaxis()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# -- command line -----------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    about, _, arms = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m eval.step_cost",
        description=about,
        epilog=arms,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="under a minute: nl_rx, body model, 5 repetitions")
    parser.add_argument("--nl-rx", type=Path, metavar="DIR", help="folder of synth_train.jsonl (default: generated)")
    parser.add_argument("--spider", type=Path, metavar="DIR", help="folder of spider_train.jsonl (default: generated)")
    parser.add_argument("--data", nargs="+", choices=DATA_SETS, help="default: both; with --quick nl_rx")
    parser.add_argument("--model", nargs="+", choices=list(SHAPES), help="default: both; with --quick body")
    parser.add_argument("--repetitions", type=int, help="batches per arm (default: 15; with --quick 5)")
    parser.add_argument(
        "--memory-batches", type=int, help="batches whose peak is counted (default: 5; --quick: 1, of ours and sft)"
    )
    parser.add_argument("--batch-size", type=int, default=4, help="examples of a micro-batch")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="bfloat16: autocast")
    parser.add_argument("--seed", type=int, default=0, help="weights, rows and order of the arms")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="every figure of every repetition")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="bars of the ratios")
    options = parser.parse_args(argv)
    quick = options.quick
    options.data = options.data or list(DATA_SETS[: 1 if quick else 2])
    options.model = options.model or list(SHAPES)[: 1 if quick else 2]
    options.repetitions = options.repetitions if options.repetitions is not None else 5 if quick else 15
    options.memory_batches = options.memory_batches if options.memory_batches is not None else 1 if quick else 5
    return options


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All cells. Raises UserError."""
    for name in ("repetitions", "memory_batches", "batch_size", "threads"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)} must be 1 or more.")
    if options.memory_batches > options.repetitions:
        raise UserError(f"--memory-batches {options.memory_batches} is more than the {options.repetitions} batches.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, and no GPU is visible; use --device cpu.")
    for name in ("nl_rx", "spider"):
        folder = getattr(options, name)
        if folder is not None and not folder.is_dir():
            raise UserError(f"--{name.replace('_', '-')}: no folder at {folder}.")
    for path in filter(None, (options.out, options.plot)):
        if path.is_dir():
            raise UserError(f"{path} is a folder; name a file in it.")
    disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    folders = {"nl_rx": options.nl_rx, "longer": options.spider}
    clock = "cpu_s" if options.device == "cpu" else "wall_s"
    cells = []
    for name in options.data:
        data = load_data(name, folders[name], seed=options.seed)
        for shape in options.model:
            cell = measure_cell(data, shape, options)
            cell["summary"] = summary(cell, clock)
            cells.append(cell)
            print(f"{table(cell, clock, options.batch_size)}\n", flush=True)
    bounded = next((cell for cell in cells if (cell["data"], cell["model"]) == ("nl_rx", "body")), cells[0])
    settings = ("quick", "repetitions", "memory_batches", "batch_size", "threads", "device", "dtype", "seed")
    return {
        "environment": environment(),
        "config": {name: getattr(options, name) for name in settings},
        "machine": torch.cuda.get_device_name() if options.device == "cuda" else platform.machine(),
        "clock": clock,
        "bounds": {name: bound._asdict() for name, bound in {**BOUNDS, "ours_memory_over_sft": MEMORY_BOUND}.items()},
        "cells": cells,
        "summary_of": {key: bounded[key] for key in ("data", "source", "model")},
        "summary": bounded["summary"],
    }


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    try:
        result = run(options)
        of = result["summary_of"]
        print(", ".join(of.values()) + ":")
        few = options.repetitions < 10
        if few:
            print("Few repetitions: on a busy machine a figure may be a tenth off. A verdict takes 15 (the default).")
        print(bounds_table(result["summary"], missed="above, but see the line before" if few else "MISSED"))
        if options.nl_rx is None or (of["data"], of["model"]) != ("nl_rx", "body"):
            print("The bounds are meant for real NL-RX rows (--nl-rx DIR) and the body model; these are others.")
        if options.out is not None:
            write_json(options.out, result)
        if options.plot is not None:
            plot(result["cells"], result["clock"], options.plot)
    except UserError as error:
        print(f"eval.step_cost: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
