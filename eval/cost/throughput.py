"""How much faster is the batched decoding of eval.run than one prompt at a time?

    python -m eval.cost.throughput [--quick] [--data DIR] [--model FOLDER]

A Llama of 0.7M parameters is trained for a few seconds, so that its answers end. Then two ways of decoding take turns:

- all NL-RX requests as in eval.run (`llm_jepa.generate`, batches of 64; slow rows are postponed, as in a run);
- every eighth request as in the published evaluator (`model.generate`, one prompt after the other). Each turn takes
  other ones.

With --data it also decides all distinct gold regexes there. The time is the processor time of one thread (on CUDA the
wall-clock time), so a busy machine matters less.

With --model, that model answers 500 requests in batches of 256, in float32 and in bfloat16. Sums in another order may
give another token, so both count equal texts.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_jepa import generate
from llm_jepa.core.files import file_sha256, write_json
from llm_jepa.lm import (
    Prompt,
    build_views,
    model_from,
    random_model,
    read_rows,
    tokenizer_from,
    train_tokenizer,
)
from llm_jepa.synthetic import nl_rx as generator

from ..command import ArgumentParser, check_writable, one_line_errors
from ..experiments.small_runs import SHARED
from ..graders.regexes import RegexError, language
from ..provenance import environment, weights_sha256
from ..tasks import nl_rx

BATCH_SIZE, MAX_NEW_TOKENS = 64, 64
EVERY = 8  # every eighth prompt is also decoded alone
# With --model: a batch is as large as in docs/evaluation.md, and the longest NL-RX regex has 35 tokens.
LARGE_BATCH, SHORT_ANSWER = 256, 48
DTYPES = ("float32", "bfloat16")
BOUND = 8.0  # the speed-up that we promise; printed next to the figure


def trained_model(rows: Sequence[dict[str, Any]], steps: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Train plain SFT on `rows`. The model is not good, but it ends its answers."""
    tokenizer = train_tokenizer(rows, SHARED["tokenizer_vocab_size"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = random_model(SHARED["model_config"], tokenizer, seed=0).to(device).train()
    views = [build_views(row, tokenizer) for row in rows]
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95))
    for step in range(steps):
        batch = [views[(16 * step + i) % len(views)] for i in range(16)]
        ids = _padded([view.input_ids for view in batch], 0)
        labels = _padded([view.labels for view in batch], -100)
        model(input_ids=ids.to(model.device), labels=labels.to(model.device)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer


def _padded(rows: Sequence[list[int]], value: int) -> torch.Tensor:
    """[R, L], right-padded."""
    length = max(map(len, rows))
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


def one_by_one(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], max_new_tokens: int
) -> list[str]:
    """Decode like the published evaluator (galilai-group/llm-jepa, evaluate.py): one prompt at a time."""
    texts = []
    for prompt in prompts:
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False).to(model.device)
        with torch.no_grad():
            output = model.generate(
                **inputs,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                do_sample=False,
                max_new_tokens=max_new_tokens,
            )
        texts.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return texts


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    repetitions: int,
    batch_size: int = BATCH_SIZE,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> tuple[dict[str, Any], list[str]]:
    """(seconds per answer of both ways and how many texts are equal, the batched texts)."""
    clock = time.process_time if model.device.type == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {"batched": [], "single": []}
    compared = equal = 0
    for repetition in range(repetitions + 1):
        alone = range(max(repetition - 1, 0) % EVERY, len(prompts), EVERY)
        some = prompts if repetition else prompts[:EVERY]  # the first repetition is a warm-up
        start = clock()
        batched = generate(model, tokenizer, some, max_new_tokens=max_new_tokens, batch_size=batch_size)
        middle = clock()
        single = one_by_one(model, tokenizer, [some[i] for i in alone if i < len(some)], max_new_tokens)
        end = clock()
        if repetition:
            seconds["batched"].append((middle - start) / len(prompts))
            seconds["single"].append((end - middle) / len(alone))
            compared += len(alone)
            equal += sum(batched[i].text == text for i, text in zip(alone, single, strict=True))
    ratios = [single_s / batched_s for batched_s, single_s in zip(seconds["batched"], seconds["single"], strict=True)]
    figures = {
        "prompts": len(prompts),
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "seconds_an_answer": seconds,
        "ratios": ratios,
        "compared_texts": compared,
        "equal_texts": equal,
        "stop_rate": statistics.mean(answer.stopped for answer in batched),
        "tokens_an_answer": statistics.mean(answer.num_tokens for answer in batched),
        "parameters": model.num_parameters(),
        "device": str(model.device),
    }
    return figures, [answer.text for answer in batched]


def measure_pretrained(folder: str, prompts: Sequence[Prompt], *, repetitions: int) -> dict[str, Any]:
    """`measure` of a model folder or Hub id in both dtypes. `equal_to_float32` counts the batched texts."""
    tokenizer = tokenizer_from(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result: dict[str, Any] = {}
    texts: dict[str, list[str]] = {}
    for dtype in DTYPES:
        model = model_from(folder, dtype=getattr(torch, dtype)).to(device).eval()
        result[dtype], texts[dtype] = measure(
            model, tokenizer, prompts, repetitions=repetitions, batch_size=LARGE_BATCH, max_new_tokens=SHORT_ANSWER
        )
        pairs = zip(texts[dtype], texts[DTYPES[0]], strict=True)
        result[dtype]["equal_to_float32"] = sum(one == other for one, other in pairs)
    return result


def regex_seconds(files: Sequence[Path]) -> tuple[float, int, int]:
    """(processor seconds to decide the language of every distinct gold, number of golds, number of undecided ones).

    A gold is undecided if it reaches a limit of the regex automata.
    """
    golds: set[str] = set()
    for path in files:
        golds |= {row["messages"][-1]["content"] for row in read_rows(str(path))}
    start, undecided = time.process_time(), 0
    for gold in sorted(golds):
        try:
            language(gold)
        except RegexError:
            undecided += 1
    return time.process_time() - start, len(golds), undecided


@one_line_errors("eval.cost.throughput")
def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(
        prog="python -m eval.cost.throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="fewer prompts and training steps")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--data", type=Path, help="NL-RX folder (default: generated rows)")
    parser.add_argument("--model", metavar="FOLDER", help="a chat model that answers instead: a folder or a Hub id")
    options = parser.parse_args(argv)
    check_writable(options.out)
    torch.set_num_threads(1)
    result: dict[str, Any] = {"quick": options.quick, "bound": BOUND, "data": None}
    if options.model is None:
        _measure_tiny(options, result)
    else:
        _measure_folder(options, result)
    result["environment"] = environment()
    if options.out:
        write_json(options.out, result)
    return 0


def _measure_tiny(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Train the small model, measure it, and print the figures."""
    steps, num_prompts, repetitions = (250, 512, 3) if options.quick else (1000, 2048, 5)
    if options.data is None:
        rows: Sequence[dict[str, Any]] = generator.generate(1000, seed=0)
        test = generator.generate(num_prompts, seed=0, split="test", wordings=(0, 4))
        prompts: list[Any] = [row["messages"][:-1] for row in test]
    else:
        items, _, files = nl_rx.load(options.data)
        result["data"] = {path.name: file_sha256(path) for path in files}
        result["regex_seconds"], result["regexes"], result["undecided"] = regex_seconds(files)
        rows = list(read_rows(str(files[2])))[:1000]
        prompts = [list(getattr(item, wording)) for item in items for wording in nl_rx.WORDINGS][:num_prompts]
    model, tokenizer = trained_model(rows, steps)
    figures, _ = measure(model, tokenizer, prompts, repetitions=repetitions)
    result |= {"training_steps": steps, **figures, "model_config": SHARED["model_config"]}
    result["summary"] = {"batched_over_single": statistics.median(result["ratios"])}
    if "regex_seconds" in result:
        result["summary"]["regex_seconds"] = result["regex_seconds"]
        print(f"{result['regexes']} gold regexes decided in {result['regex_seconds']:.2f} s; {result['undecided']} not")
    print(_line(figures))


def _measure_folder(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Measure the model of --model, and print its figures."""
    num_prompts, repetitions = (64, 1) if options.quick else (500, 4)
    if options.data is None:
        test = generator.generate(num_prompts, seed=0, split="test", wordings=(0,))
        prompts: list[Any] = [row["messages"][:-1] for row in test]
    else:
        items, _, files = nl_rx.load(options.data)
        result["data"] = {path.name: file_sha256(path) for path in files}
        chosen = random.Random("test lines").sample(items, min(num_prompts, len(items)))
        prompts = [list(item.original) for item in chosen]
    figures = measure_pretrained(options.model, prompts, repetitions=repetitions)
    result |= {"model": Path(options.model).name, "weights_sha256": weights_sha256(Path(options.model)), **figures}
    result["summary"] = {dtype: statistics.median(figures[dtype]["ratios"]) for dtype in DTYPES}
    for dtype in DTYPES:
        equal = f"{figures[dtype]['equal_to_float32']} of {len(prompts)} batched texts are those of float32."
        print(f"{dtype}: {_line(figures[dtype])} {equal}")


def _line(figures: dict[str, Any]) -> str:
    speedup, ratios = statistics.median(figures["ratios"]), ", ".join(f"{ratio:.1f}" for ratio in figures["ratios"])
    return (
        f"{speedup:.1f} times (bound: {BOUND:g}; {ratios}) as many answers a second in batches of "
        f"{figures['batch_size']} as one by one; {figures['equal_texts']} of {figures['compared_texts']} texts equal; "
        f"{figures['tokens_an_answer']:.1f} tokens an answer, {100 * figures['stop_rate']:.0f} % stop by themselves."
    )


if __name__ == "__main__":
    sys.exit(main())
