"""Memory of a training, computed from the config of a model and compared with measured peaks:

    python -m eval.memory --quick          # under 45 s on two cores
    python -m eval.memory --out FILE

Computes the table of docs/scaling.md for models up to 70B with the formula of `llm_jepa.lm.memory`. Then trains small
models on the CPU, and compares the same formula with the peak of process 0.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import os
import tempfile
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import yaml
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, PrinterCallback
from transformers.utils import logging

import llm_jepa
from llm_jepa import LLMJEPAConfig, LLMJEPATrainer, UserError
from llm_jepa.core.files import write_json
from llm_jepa.lm import memory, random_model, train_tokenizer
from llm_jepa.lm.memory import Batch, Counts, Way, activations, predicted
from llm_jepa.synthetic import nl_rx

from ..command import ArgumentParser, check_writable, one_line_errors
from ..provenance import environment

GB = 1e9
SEED = 0
BOUND = 1.15  # of peak / computed, and of its inverse


def _llama(hidden: int, intermediate: int, layers: int, heads: int, kv: int, vocab: int, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocab, "tie_word_embeddings": tied,
    }  # fmt: skip


# The shapes of SmolLM2-135M, Qwen2.5-0.5B, Llama 3.2 1B and 3B, Llama 3.1 8B and 70B. All as Llama: Qwen's biases are
# too few to show.
MODELS = {
    "0.13B": _llama(576, 1536, 30, 9, 3, 49152, True),
    "0.5B": _llama(896, 4864, 24, 14, 2, 151936, True),
    "1B": _llama(2048, 8192, 16, 32, 8, 128256, True),
    "3B": _llama(3072, 8192, 28, 24, 8, 128256, True),
    "8B": _llama(4096, 14336, 32, 32, 8, 128256, False),
    "70B": _llama(8192, 28672, 80, 64, 8, 128256, False),
}
TOKENS, LABELS, RANKS, LORA_RANK = 8192, 2048, 8, 64  # of the table: tokens and labels of a micro-batch


# -- the formula ------------------------------------------------------------------------------------------------------


def counts_of(config: dict[str, Any]) -> Counts:
    """Counts the weights of a model that is built without memory.

    The committed figures are without the second gradient of a tied embedding. It is small in the small models here.
    """
    with torch.device("meta"):
        counts = memory.counts_of(AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)))
    return counts._replace(is_tied=False)


def lora_weights(config: dict[str, Any], rank: int) -> int:
    """Trained by LoRA on every linear map of a Llama's layers: rank x (rows + columns) of seven matrices."""
    h, i = config["hidden_size"], config["intermediate_size"]
    kv = h // config["num_attention_heads"] * config["num_key_value_heads"]
    return int(config["num_hidden_layers"] * rank * (2 * 2 * h + 2 * (h + kv) + 3 * (h + i)))


TRAININGS = ("full", "lora", "lora, bfloat16 base")
SHARINGS = ("one", "ddp", "fsdp2", "zero3")


def table() -> list[dict[str, Any]]:
    """GB per process for every model, training and way to share; AdamW, bf16 autocast, checkpoints."""
    rows = []
    for name, config in MODELS.items():
        counts, batch = counts_of(config), Batch(TOKENS, LABELS)
        way = Way(autocast=True, checkpointing=True)
        for training in TRAININGS:
            trained = counts.total if training == "full" else lora_weights(config, LORA_RANK)
            base = way._replace(frozen_bytes=2 if training == TRAININGS[2] else 4)
            row: dict[str, Any] = {"model": name, "weights": counts.total, "training": training, "trained": trained}
            row["activations"] = activations(counts, batch, base) / GB
            for sharing in SHARINGS:
                shared = base._replace(sharing=sharing, ranks=1 if sharing == "one" else RANKS)
                row[sharing] = predicted(counts, trained, batch, shared) / GB
            rows.append(row)
    return rows


# -- measured ---------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A small model that is trained on this CPU."""

    name: str
    config: dict[str, Any]
    rows: int  # in a batch
    way: Way = Way()
    lora_rank: int | None = None
    jepa_weight: float = 1.0


SMALL, WIDE = _llama(384, 1024, 12, 6, 6, 0, True), _llama(768, 2048, 12, 12, 12, 0, True)
KEPT, CHECKPOINTS = Way(), Way(checkpointing=True)
CASES = (
    Case("22M, all kept", SMALL, 8),
    Case("22M, FSDP2, 2 processes, checkpoints", SMALL, 8, Way("fsdp2", 2, checkpointing=True)),
    Case("22M, checkpoints", SMALL, 8, CHECKPOINTS),
    Case("22M, plain SFT", SMALL, 8, jepa_weight=0.0),
    Case("22M, LoRA, checkpoints", SMALL, 8, CHECKPOINTS, lora_rank=8),
    Case("22M, bf16 autocast, checkpoints", SMALL, 8, Way(autocast=True, checkpointing=True)),
    Case("22M, LoRA, bf16 base, checkpoints", SMALL, 8, Way("one", 1, True, True, frozen_bytes=2), lora_rank=8),
    Case("22M, DDP, 2 processes, checkpoints", SMALL, 8, Way("ddp", 2, checkpointing=True)),
    Case("22M, FSDP2, 2 processes, bf16 autocast", SMALL, 8, Way("fsdp2", 2, autocast=True, checkpointing=True)),
    Case("22M, FSDP2, 2 processes, accumulation", SMALL, 8, Way("fsdp2", 2, checkpointing=True, accumulates=True)),
    Case("90M, checkpoints", WIDE, 4, CHECKPOINTS),
    Case("90M, all kept, 16 rows", WIDE, 16),
    Case("90M, accumulation, checkpoints", WIDE, 4, Way(accumulates=True, checkpointing=True)),
    Case("90M, FSDP2, 2 processes, checkpoints", WIDE, 4, Way("fsdp2", 2, checkpointing=True)),
)
QUICK = 2  # of them
VOCAB = 700  # of the tokenizer; the model gets as many rows


def measure(case: Case) -> dict[str, Any]:
    """Peak of process 0 against the formula. The processes are forked, after the imports."""
    with tempfile.TemporaryDirectory() as folder:
        fork = multiprocessing.get_context("fork")
        receiver, sender = fork.Pipe(duplex=False)
        ranks = [fork.Process(target=_rank, args=(case, rank, folder, sender)) for rank in range(case.way.ranks)]
        for rank in ranks:
            rank.start()
        sender.close()
        for rank in ranks:
            rank.join()
        if any(rank.exitcode for rank in ranks):
            raise UserError(f"{case.name}: a process ended with exit code {max(str(r.exitcode) for r in ranks)}.")
        result: dict[str, Any] = receiver.recv()
    return result


def _rank(case: Case, rank: int, folder: str, sender: Connection) -> None:
    """One process of a case. It trains a tiny model first, which brings in the code that a first run loads."""
    # M_MMAP_THRESHOLD: tensors that are freed go back to the system.
    ctypes.CDLL(None).mallopt(-3, 1 << 16)
    if case.way.ranks > 1:
        _join(case.way, rank, folder)
    _train(case._replace(config=_llama(32, 48, 2, 2, 2, 0, True)), folder)
    result = _train(case, folder)
    if rank == 0:
        sender.send(result)
    if case.way.ranks > 1:
        dist.barrier()
    os._exit(0)  # a wrapped model would wait for the threads of its process group


def _join(way: Way, rank: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(way.ranks), ACCELERATE_USE_CPU="true")
    os.environ.update(OMP_NUM_THREADS="1")  # or Accelerate sets more
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # Accelerate asks for them, and uses the group below
    if way.sharing == "fsdp2":
        config = yaml.safe_load((Path(llm_jepa.__file__).parent / "accelerate_configs" / "fsdp2.yaml").read_text())
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        os.environ.update({key.upper(): str(value) for key, value in config["fsdp_config"].items()})
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=way.ranks)


def _train(case: Case, folder: str) -> dict[str, Any]:
    """Peak bytes of the second of two training steps, above those of the process before it has a model."""
    rows, way = nl_rx.generate(64, seed=SEED, wordings=(0, 1, 2, 3)), case.way
    tokenizer = train_tokenizer(rows, VOCAB)
    args = LLMJEPAConfig(
        output_dir=folder, max_steps=2, per_device_train_batch_size=case.rows, use_cpu=True, report_to=[],
        gradient_checkpointing=way.checkpointing, jepa_weight=case.jepa_weight, save_strategy="no", bf16=way.autocast,
        gradient_accumulation_steps=2 if way.accumulates else 1, disable_tqdm=True, logging_strategy="no", seed=SEED,
    )  # fmt: skip
    gc.collect()
    before = _memory("VmRSS")
    config = {key: value for key, value in case.config.items() if key != "vocab_size"}  # that of the tokenizer
    model = random_model(config, tokenizer, seed=SEED).to(torch.float32 if way.frozen_bytes == 4 else torch.bfloat16)
    vocab = model.get_input_embeddings().weight.shape[0]
    lora = case.lora_rank and LoraConfig(task_type="CAUSAL_LM", r=case.lora_rank, target_modules="all-linear")
    trainer = LLMJEPATrainer(model, args, Dataset.from_list(rows), processing_class=tokenizer, peft_config=lora or None)
    trainer.remove_callback(PrinterCallback)
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    batches: list[Batch] = []
    step = trainer.training_step

    def training_step(model: Any, inputs: dict[str, Any], *rest: Any, **kwargs: Any) -> Any:
        if not batches:
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        batches.append(Batch(inputs["input_ids"].numel(), int((inputs["labels"] != -100).sum())))
        return step(model, inputs, *rest, **kwargs)

    trainer.training_step = training_step
    trainer.train()
    peak = _memory("VmHWM") - before
    counts = counts_of({**case.config, "vocab_size": vocab})
    largest = max(batches)
    return {"case": case.name, "vocab": vocab, "weights": counts.total, "trained": trained, **largest._asdict(),
            "measured": peak / GB, "computed": predicted(counts, trained, largest, way) / GB}  # fmt: skip


def _memory(field: str) -> float:
    """Bytes of this process, from Linux: VmRSS now, VmHWM at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024.0 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def ratio(row: dict[str, Any]) -> float:
    """Of a measured row: peak over computed."""
    return float(row["measured"] / row["computed"])


def summary_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The worst ratio, in either direction, and how many cases are within BOUND."""
    worst = max(rows, key=lambda row: max(ratio(row), 1 / ratio(row)))
    within = [row["case"] for row in rows if 1 / BOUND <= ratio(row) <= BOUND]
    return {"cases": len(rows), "within_bound": len(within), "bound": BOUND, "worst": worst["case"],
            "worst_ratio": ratio(worst)}  # fmt: skip


def verdict(summary: dict[str, Any]) -> str:
    return "ok" if summary["within_bound"] == summary["cases"] else "MISSED"


@one_line_errors("eval.memory")
def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(
        prog="python -m eval.memory",
        description=str(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--quick", action="store_true", help=f"under 45 s: the first {QUICK} of {len(CASES)} trainings")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="file for the table and the measured peaks")
    options = parser.parse_args(argv)
    check_writable(options.out)
    if not Path("/proc/self/clear_refs").exists():
        raise UserError("eval.memory reads peaks from /proc, which only Linux has.")
    disable_progress_bar()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    rows = table()
    print("GB per process       trained                 " + "".join(f"{sharing:>9s}" for sharing in SHARINGS))
    for row in rows:
        figures = "".join(f"{row[sharing]:9.1f}" for sharing in SHARINGS)
        print(f"{row['model']:20s} {row['training']:24s}{figures}")
    measured = []
    for case in CASES[:QUICK] if options.quick else CASES:
        measured.append(measure(case))
        row = measured[-1]
        print(
            f"{row['case']:40s} computed {row['computed']:.3f} GB, measured {row['measured']:.3f} GB, {ratio(row):.2f}",
            flush=True,
        )
    summary = summary_of(measured)
    print(
        f"worst: {summary['worst_ratio']:.2f} ({summary['worst']}); within 1/{BOUND} to {BOUND}: "
        f"{summary['within_bound']} of {summary['cases']}  {verdict(summary)}"
    )
    if options.out is not None:
        write_json(options.out, {
            "environment": environment(),
            "config": {"quick": options.quick, "threads": 1, "cores": os.cpu_count(), "seeds": [SEED]},
            "setting": {"tokens": TOKENS, "labels": LABELS, "ranks": RANKS, "lora_rank": LORA_RANK},
            "table": rows,
            "measured": measured,
            "summary": summary,
        })  # fmt: skip
    return 0
