"""`llm-jepa train-decoder`: train the y_decoder of a trained VL-JEPA, on text alone."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import GPT2Config, TrainingArguments, set_seed

from ..core.checkpoint import RUN_FILE, newest_complete
from ..core.errors import UserError
from ..core.files import write_json
from ..core.json_files import read_json
from ..core.options import number, seed_number, whole
from ..core.publish import is_cut_move, remove_leftovers
from ..core.row_files import JSON_SUFFIXES, check_regular, json_rows, row_suffix, text_lines
from ..core.signals import Stopped, StopRequest
from ..core.tokenizer import train_bpe
from .data import is_text
from .inference import VLJEPA
from .y_decoder import MemoryProjection, YDecoder, fingerprint, train_prefix_decoder

ABANDONED_S = 24 * 3600  # a run may be saving into this folder, and large models take long
UNFINISHED = "y_decoder.unfinished"  # in the folder of the model, while the training of its decoder is stopped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder of a trained VL-JEPA; the decoder is saved into its y_decoder/")
    parser.add_argument("--texts", required=True, help="one text a line (.txt), or .jsonl rows with 'target' or 'text'")
    parser.add_argument(
        "--memory_only", "--memory-only", action="store_true", help="no LM: a caption is the nearest text"
    )
    parser.add_argument("--no_memory", "--no-memory", action="store_true", help="decode predictions as they are")
    parser.add_argument("--steps", type=whole(1), default=2000)
    parser.add_argument("--batch_size", "--batch-size", type=whole(1), default=64)
    parser.add_argument("--learning_rate", "--learning-rate", type=number(above=True), default=1e-3)
    parser.add_argument("--layers", type=whole(1), default=3)
    parser.add_argument("--hidden_size", "--hidden-size", type=whole(1), default=192)
    parser.add_argument("--vocab_size", "--vocab-size", type=whole(1), default=4096)
    parser.add_argument("--num_prefix", "--num-prefix", type=whole(1), default=4, help="vectors per embedding")
    parser.add_argument("--seed", type=seed_number, default=0)


def run(options: argparse.Namespace) -> int:
    """The command. Raises UserError for options that cannot work."""
    if options.memory_only and options.no_memory:
        raise UserError("--memory_only with --no_memory leaves no y_decoder; remove one of them.")
    if options.hidden_size % (heads := max(1, options.hidden_size // 64)):
        raise UserError(f"--hidden_size {options.hidden_size} does not divide into {heads} heads; use 64, 128, 192 ...")
    if not Path(options.model).is_dir():
        raise UserError(f"No model folder at {options.model}; the decoder is saved into it.")
    folder = Path(options.model) / "y_decoder"
    if folder.exists():
        raise UserError(f"{folder} exists; move it away to train another decoder.")
    # Not that of a final save that was cut short: its run needs it.
    if not is_cut_move(options.model) and (count := remove_leftovers(options.model, min_age_s=ABANDONED_S)):
        print(f"Removed {count} leftover(s) of a killed process from {options.model}.")
    texts = read_texts(options.texts)
    vl_jepa = VLJEPA.from_pretrained(options.model)
    unfinished = Path(options.model) / UNFINISHED
    try:
        decoder = _train(options, vl_jepa, texts, unfinished)
    except Stopped as stopped:
        saved = f"Saved last: {newest}" if (newest := newest_complete(unfinished)) else "Nothing is saved yet"
        raise Stopped(stopped.code, f"{saved}. The same command continues.") from None
    decoder.save_pretrained(folder)
    if not options.memory_only:  # then it is another training, and stays
        shutil.rmtree(unfinished, ignore_errors=True)
    sample = texts[:: max(1, len(texts) // 5)][:5]
    print("Texts, and the decoder's texts for their embeddings:")
    for text, decoded in zip(sample, decoder.decode(vl_jepa.embed_texts(sample)), strict=True):
        print(f"  {text!r} -> {decoded.text!r}")
    print(f"Saved to {folder}")
    return 0


def _train(options: argparse.Namespace, vl_jepa: VLJEPA, texts: list[str], unfinished: Path) -> YDecoder:
    return train_y_decoder(
        vl_jepa,
        texts,
        unfinished=unfinished,
        memory=not options.no_memory,
        prefix_decoder=not options.memory_only,
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        layers=options.layers,
        hidden_size=options.hidden_size,
        vocab_size=options.vocab_size,
        num_prefix=options.num_prefix,
        seed=options.seed,
    )


def train_y_decoder(
    vl_jepa: VLJEPA,
    texts: Sequence[str],
    *,
    memory: bool = True,
    prefix_decoder: bool = True,
    steps: int = 2000,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    layers: int = 3,
    hidden_size: int = 192,
    vocab_size: int = 4096,
    num_prefix: int = 4,
    seed: int = 0,
    unfinished: Path | None = None,
) -> YDecoder:
    """Build a y_decoder for this model: the texts are its memory, and a GPT-2 from random weights writes them.

    Args:
        unfinished: a folder. If the training is asked to stop, it saves a checkpoint there and raises `Stopped`; the
            same call goes on from it.

    Raises UserError if `unfinished` holds the training of another decoder.
    """
    if not texts:
        raise UserError("There are no texts to learn to write; give one or more.")
    embeddings = vl_jepa.embed_texts(texts).cpu()
    projection = MemoryProjection(embeddings, tuple(texts)) if memory else None
    if not prefix_decoder:
        return YDecoder(fingerprint(vl_jepa.model), projection)
    set_seed(seed)
    tokenizer = train_bpe(texts, vocab_size)
    config = GPT2Config(
        n_embd=hidden_size, n_layer=layers, n_head=max(1, hidden_size // 64), n_positions=256,
        vocab_size=len(tokenizer), bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    row = {text: i for i, text in enumerate(texts)}
    with tempfile.TemporaryDirectory() as temporary:
        scratch, resume = unfinished or Path(temporary), None
        if unfinished is not None:
            settings = [steps, batch_size, learning_rate, layers, hidden_size, vocab_size, num_prefix, seed]
            resume = _claim(unfinished, [fingerprint(vl_jepa.model), list(texts), settings])
        args = TrainingArguments(
            output_dir=str(scratch), max_steps=steps, per_device_train_batch_size=batch_size,
            learning_rate=learning_rate, lr_scheduler_type="cosine", warmup_steps=min(100, steps // 10),
            weight_decay=0.01, save_strategy="no", logging_steps=max(1, steps // 20), report_to="none", seed=seed,
            use_cpu=vl_jepa.model.device.type == "cpu",
        )  # fmt: skip
        decoder = train_prefix_decoder(
            lambda some: embeddings[[row[text] for text in some]], texts, tokenizer, config, args,
            num_prefix=num_prefix,
            resume_from_checkpoint=resume,
            stop_request=StopRequest() if unfinished is not None else None,
        )  # fmt: skip
    return YDecoder(fingerprint(vl_jepa.model), projection, decoder, tokenizer)


def _claim(folder: Path, training: Any) -> str | None:
    """Keep what is trained in `folder`. Returns the checkpoint that a stopped training of the same has left there."""
    record = {"sha256": hashlib.sha256(json.dumps(training).encode()).hexdigest()}
    newest = newest_complete(folder)
    if newest is None:  # a killed process may have left the folder
        write_json(folder / RUN_FILE, record)
        return None
    if read_json(folder / RUN_FILE) != record:
        raise UserError(
            f"{folder} holds the unfinished training of another decoder; give its options to finish it, or remove it."
        )
    remove_leftovers(folder)
    print(f"Continuing at {newest}.")
    return str(newest)


def read_texts(path: str | Path) -> list[str]:
    """The distinct texts of a file, in order. Raises UserError for a line without a text, and if there is no text."""
    path = Path(path)
    check_regular(path)
    if not path.is_file():
        raise UserError(f"No texts at {path}; give one text a line, or .jsonl rows with 'target' or 'text'.")
    texts = _texts_of_rows(path) if row_suffix(path) in JSON_SUFFIXES else list(text_lines(path))
    if not texts:
        raise UserError(f"{path} holds no texts.")
    return list(dict.fromkeys(texts))


def _texts_of_rows(path: Path) -> list[str]:
    texts: list[str] = []
    for place, row in json_rows(path):
        values: Any = row.get("target", row.get("text"))
        if isinstance(values, str):
            values = [values]
        if not isinstance(values, list) or not all(is_text(text) for text in values):
            raise UserError(f"{place} has no 'target' or 'text' that is a text.")
        texts += [text.strip() for text in values]
    return texts
