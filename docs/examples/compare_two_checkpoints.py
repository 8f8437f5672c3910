"""Compare two checkpoints on rows that neither has seen: answers, and whether a question finds its own answer.

    python docs/examples/compare_two_checkpoints.py                       # trains two tiny ones: plain SFT and LLM-JEPA
    python docs/examples/compare_two_checkpoints.py runs/a runs/b --rows held_out.jsonl

For intervals, tests, and several wordings of a question take `python -m eval.robustness` (docs/evaluation.md).
"""

import argparse
import json
from pathlib import Path

import torch

from llm_jepa import LLMJEPAConfig, LLMJEPATrainer, generate
from llm_jepa.lm import (
    JEPACollator,
    add_view_columns,
    embed_pairs,
    model_from,
    predictor_token_ids,
    random_model,
    read_rows,
    tokenizer_from,
    train_tokenizer,
)  # fmt: skip
from llm_jepa.synthetic import nl_rx

TINY = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 256}  # fmt: skip

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("models", nargs="*", help="two model folders or Hub ids")
parser.add_argument("--rows", help="a .jsonl file of held-out rows")
parser.add_argument("--steps", type=int, default=20, help="of the tiny ones")
parser.add_argument("--out", type=Path, default=Path("runs/examples/compare"))
options = parser.parse_args()
if len(options.models) not in (0, 2) or bool(options.models) != bool(options.rows):
    parser.error("name two models and --rows, or nothing")


def train(name: str, weight: float, rows) -> str:
    """A tiny model with the JEPA term at `weight`."""
    tokenizer = train_tokenizer(rows, 400)
    args = LLMJEPAConfig(
        str(options.out / name), jepa_weight=weight, max_steps=options.steps, per_device_train_batch_size=16,
        learning_rate=4e-3, save_strategy="no", logging_steps=10, seed=0,
    )  # fmt: skip
    trainer = LLMJEPATrainer(random_model(TINY, tokenizer, seed=0), args, rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    return args.output_dir


if not options.models:
    options.out.mkdir(parents=True, exist_ok=True)
    for name, seed in (("train", 0), ("held_out", 1)):
        lines = nl_rx.generate(96 if name == "train" else 24, seed=seed)
        (options.out / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options.rows = str(options.out / "held_out.jsonl")
    seen = read_rows(str(options.out / "train.jsonl"))
    options.models = [train("sft", 0.0, seen), train("llm-jepa", 0.1, seen)]

rows = list(read_rows(options.rows))
print(f"\n{'model':40s}{'exact':>10s}{'recall@1':>10s}   of {len(rows)} rows")
for name in options.models:
    model, tokenizer = model_from(name).eval(), tokenizer_from(name)
    questions = [row["messages"][:-1] if row.get("messages") else row["prompt"] for row in rows]
    golds = [row["messages"][-1]["content"] if row.get("messages") else row["completion"] for row in rows]
    answers = generate(model, tokenizer, questions, max_new_tokens=48)
    exact = sum(answer.text.strip() == str(gold).strip() for answer, gold in zip(answers, golds, strict=True))

    how = {"num_predictor_tokens": 0, "context_view": "prefix", "readout_layer": -1}
    how |= {key: value for key, value in (getattr(model.config, "llm_jepa", None) or {}).items() if key in how}
    views = [
        add_view_columns(row, index, tokenizer=tokenizer, context_view=how["context_view"])
        for index, row in enumerate(rows)
    ]
    collator = JEPACollator(tokenizer.pad_token_id, predictor_token_ids(tokenizer, how["num_predictor_tokens"]))
    context, target, _ = embed_pairs(model, model, [collator(views)], layer=how["readout_layer"])
    context, target = (torch.nn.functional.normalize(view, dim=-1) for view in (context, target))
    found = (context @ target.T).argmax(dim=-1) == torch.arange(len(rows), device=context.device)
    print(f"{name:40s}{exact / len(rows):>10.3f}{found.float().mean().item():>10.3f}")
