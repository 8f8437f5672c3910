"""What a checkpoint that survives kills costs, in saves of `transformers.Trainer`:

    python -m eval.save_cost --quick          # under 45 s on two cores
    python -m eval.save_cost --out FILE

Both trainers save the same model, tokenizer and AdamW state in one process, in turn, and keep one checkpoint. Ours
also hashes every file and flushes it to disk, and removes the older checkpoint only after that. A thread does this
while training goes on. All times are wall-clock times, because a save waits for the disk.

    wait        how long training stands still. This is what BOUND is about.
    with_work   from the start of a save until the checkpoint is there and the work of the next steps is done, too. The
                work is matrix products on one thread that take longer than a checkpoint is hashed and flushed.
    complete    from the start of a save until the checkpoint is there, if training stands still all the time: what
                the last save of a run takes.

Each figure is the median of the ratios of neighbouring saves, with their smallest and largest.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, IJepaConfig, LlamaConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.utils import logging

from llm_jepa import LLMJEPAConfig, LLMJEPATrainer, UserError
from llm_jepa.core.files import write_json
from llm_jepa.core.trainer import SafeTrainer
from llm_jepa.lm import random_model, train_tokenizer
from llm_jepa.synthetic import nl_rx
from llm_jepa.vl import VLJEPAModel, VLJEPAProcessor, VLJEPATrainer, VLJEPATrainingArguments
from llm_jepa.vl.data import Clip, ClipDataset, Pair
from llm_jepa.vl.loading import plain_frames

from ..command import ArgumentParser, check_writable, one_line_errors, whole
from ..provenance import environment

BOUND = 1.15  # of `wait`, for lm_large
REPETITIONS = 15
QUICK_REPETITIONS = {"lm_large": 2, "lm_small": 3, "lora": 3, "vl": 3}
WORK_OVER_COMPLETE = 1.5  # how much longer the work takes than the checkpoint
COMMON: dict[str, Any] = {
    "save_total_limit": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True, "optim": "adamw_torch",
    "eval_strategy": "no",
}  # fmt: skip
LORA: dict[str, Any] = {"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@dataclass(frozen=True)
class Arms:
    """Two trainers of equal models, with the state of an optimizer."""

    ours: SafeTrainer
    stock: Trainer
    description: str


def lm(folder: Path, *, layers: int, hidden_size: int, lora: bool = False) -> Arms:
    rows = nl_rx.generate(64, seed=0)
    tokenizer = train_tokenizer(rows, 512)
    config = {
        "model_type": "llama", "hidden_size": hidden_size, "intermediate_size": 4 * hidden_size,
        "num_hidden_layers": layers, "num_attention_heads": hidden_size // 64,
    }  # fmt: skip

    def model() -> PreTrainedModel:
        return random_model(config, tokenizer, seed=0)

    ours = LLMJEPATrainer(
        model=model(),
        args=LLMJEPAConfig(str(folder / "ours"), max_length=None, **COMMON),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(**LORA) if lora else None,
    )
    other: Any = get_peft_model(model(), LoraConfig(**LORA)) if lora else model()
    stock = Trainer(other, TrainingArguments(str(folder / "stock"), **COMMON), processing_class=tokenizer)
    kind = "adapter of rank 8" if lora else "all weights"
    return Arms(ours, stock, f"Llama {layers} x {hidden_size}, {kind}")


def vl(folder: Path) -> Arms:
    rows = nl_rx.generate(64, seed=0)
    tokenizer = train_tokenizer(rows, 512)
    size = len(tokenizer)

    def model() -> VLJEPAModel:
        torch.manual_seed(0)
        return VLJEPAModel.from_parts(
            IJepaConfig(image_size=64, hidden_size=192, num_hidden_layers=4, num_attention_heads=3,
                        intermediate_size=768),
            LlamaConfig(hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512,
                        vocab_size=size),
            BertConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256,
                       vocab_size=size),
            num_frames=2, shared_dim=128,
        )  # fmt: skip

    video = np.zeros((2, 64, 64, 3), dtype=np.uint8)
    clips = ClipDataset([Clip(video, (Pair(None, f"text {i}"),)) for i in range(8)], num_frames=2)
    args = VLJEPATrainingArguments(str(folder / "ours"), objective="cosine", **COMMON)
    first, other = model(), model()
    processor = VLJEPAProcessor.from_parts(
        first.config, tokenizer=tokenizer, target_tokenizer=tokenizer, image_processor=plain_frames(64)
    )
    ours = VLJEPATrainer(first, args, train_dataset=clips, processor=processor)
    for name, weight in ours.model.named_parameters():
        other.get_parameter(name).requires_grad_(weight.requires_grad)
    stock = Trainer(other, TrainingArguments(str(folder / "stock"), **COMMON), processing_class=processor)
    return Arms(ours, stock, "I-JEPA 4 x 192 (frozen), predictor 2 x 256, y_encoder 2 x 128")


CASES: dict[str, Callable[[Path], Arms]] = {
    "lm_large": lambda folder: lm(folder, layers=8, hidden_size=640),
    "lm_small": lambda folder: lm(folder, layers=4, hidden_size=256),
    "lora": lambda folder: lm(folder, layers=4, hidden_size=256, lora=True),
    "vl": vl,
}


def fill_optimizer(trainer: Trainer) -> None:
    """Give AdamW its two moments, without a step of training."""
    trainer.create_optimizer_and_scheduler(num_training_steps=1000)
    for weight in trainer.model.parameters():
        if weight.requires_grad:
            weight.grad = torch.zeros_like(weight)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    # Zeros would be sparse files on some disks, and never the bytes of a real run.
    for state in trainer.optimizer.state.values():
        state["exp_avg"].normal_(generator=torch.Generator().manual_seed(0))
        state["exp_avg_sq"].uniform_(generator=torch.Generator().manual_seed(1))


def save(trainer: Trainer) -> None:
    trainer.state.global_step += 1
    trainer._save_checkpoint(trainer.model, None)


def finish(trainer: Trainer) -> None:
    """Wait until the checkpoint is complete. A stock checkpoint is when it is saved."""
    if isinstance(trainer, SafeTrainer):
        trainer.finish_saving()


def work(seconds: float) -> Callable[[], None]:
    """A call that multiplies matrices, always as many, for about so long."""
    matrix = torch.randn(384, 384)

    def multiply(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            matrix @ matrix
        return time.perf_counter() - start

    multiply(20)
    count = max(1, round(seconds / min(multiply(50) / 50 for _ in range(3))))

    def call() -> None:
        multiply(count)

    return call


def timed(*calls: Callable[[], None]) -> list[float]:
    """Seconds from the start to the end of each call. What earlier saves left in memory is written to disk before."""
    os.sync()
    start, ends = time.perf_counter(), []
    for call in calls:
        call()
        ends.append(time.perf_counter() - start)
    return ends


def bytes_saved(trainer: Trainer) -> int:
    (folder,) = Path(trainer.args.output_dir).glob("checkpoint-*")
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(name: str, folder: Path, repetitions: int, draw: random.Random) -> dict[str, Any]:
    """Save in turn and return the seconds of every save."""
    arms = CASES[name](folder)
    trainers = {"ours": arms.ours, "stock": arms.stock}
    for trainer in trainers.values():
        fill_optimizer(trainer)
        save(trainer)  # warms up
        finish(trainer)
    complete_s = timed(partial(save, arms.ours), partial(finish, arms.ours))[-1]
    steps = work(max(0.1, WORK_OVER_COMPLETE * complete_s))
    seconds: dict[str, Any] = {"work": [], **{arm: {"wait": [], "with_work": [], "complete": []} for arm in trainers}}
    for _ in range(repetitions):
        seconds["work"].append(timed(steps)[0])
        for arm in draw.sample(list(trainers), 2):
            saved, done = timed(partial(save, trainers[arm]), steps, partial(finish, trainers[arm]))[::2]
            seconds[arm]["wait"].append(saved)
            seconds[arm]["with_work"].append(done)
        for arm in draw.sample(list(trainers), 2):
            seconds[arm]["complete"].append(timed(partial(save, trainers[arm]), partial(finish, trainers[arm]))[-1])
    return {
        "case": name,
        "model": arms.description,
        "bytes": {arm: bytes_saved(trainer) for arm, trainer in trainers.items()},
        "seconds": seconds,
        "ratios": {figure: ratio(seconds, figure) for figure in ("wait", "with_work", "complete")},
    }


def ratio(seconds: dict[str, Any], figure: str) -> dict[str, float]:
    """Ours over stock, repetition by repetition."""
    ratios = [a / b for a, b in zip(seconds["ours"][figure], seconds["stock"][figure], strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def table(result: dict[str, Any]) -> str:
    """Plain text: a line for each figure."""
    size, seconds = result["bytes"]["ours"] / 1e6, result["seconds"]
    lines = [f"{result['case']}: {result['model']}; {size:.1f} MB, {len(seconds['work'])} saves of each"]
    for figure, figures in result["ratios"].items():
        ours, stock = (statistics.median(seconds[arm][figure]) for arm in ("ours", "stock"))
        lines.append(
            f"  {figure:10s} {figures['median']:5.2f} x [{figures['min']:.2f}, {figures['max']:.2f}]   "
            f"ours {ours:.3f} s, stock {stock:.3f} s"
        )
    return "\n".join(lines)


@one_line_errors("eval.save_cost")
def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(
        prog="python -m eval.save_cost",
        description=str(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--quick", action="store_true", help="under 45 s: 2 or 3 saves of each")
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES), help="default: all")
    parser.add_argument("--repetitions", type=whole(1), help=f"saves of each (default: {REPETITIONS})")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: that of temporary files)")
    parser.add_argument("--threads", type=whole(1, 1024), default=1, help="torch threads")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="file for every figure of every repetition")
    options = parser.parse_args(argv)
    if options.folder is not None and not options.folder.is_dir():
        raise UserError(f"--folder: no folder at {options.folder}.")
    check_writable(options.out)
    disable_progress_bar()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    draw, results = random.Random(0), []
    for name in options.case:
        repetitions = options.repetitions or (QUICK_REPETITIONS[name] if options.quick else REPETITIONS)
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            results.append(measure(name, Path(folder), repetitions, draw))
        print(table(results[-1]), flush=True)
    summary = {
        f"{result['case']}_{figure}": figures["median"]
        for result in results
        for figure, figures in result["ratios"].items()
    }
    if "lm_large_wait" in summary:
        verdict = "ok" if summary["lm_large_wait"] <= BOUND else "MISSED"
        print(f"lm_large, wait: {summary['lm_large_wait']:.3f} <= {BOUND}  {verdict}")
    if options.out:
        write_json(
            options.out,
            {
                "environment": environment(),
                "config": {"quick": options.quick, "threads": options.threads, "cores": os.cpu_count()},
                "bound": {"figure": "lm_large_wait", "limit": BOUND},
                "cases": results,
                "summary": summary,
            },
        )
    return 0
