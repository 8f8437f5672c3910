"""Give each row other wordings of its question: every wording then predicts the embedding of the answer.

    python docs/examples/paraphrase_views.py
    python docs/examples/paraphrase_views.py rows.jsonl --model Qwen/Qwen3-0.6B --steps 500

A row is {"prompt", "completion", "views": [WORDING, ...]}. The wordings need no labels; only the prompt is trained as
text.
The example trains twice, with the wordings and without, and asks both models in a wording that no row of theirs had.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset

from llm_jepa import LLMJEPAConfig, LLMJEPATrainer, generate
from llm_jepa.lm import model_from, random_model, read_rows, tokenizer_from, train_tokenizer

TINY = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 256}  # fmt: skip

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("rows", nargs="?", help="a .jsonl file")
parser.add_argument("--model", help="a folder or a Hub id; without it, a tiny model from random weights")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--out", type=Path, default=Path("runs/examples/paraphrase_views"))
options = parser.parse_args()

options.out.mkdir(parents=True, exist_ok=True)
if options.rows is None:
    options.rows = str(options.out / "rows.jsonl")
    lines = [
        {
            "prompt": f"what is twice {n}?",
            "completion": str(2 * n),
            "views": [f"double the number {n}", f"multiply {n} by two"],
        }
        for n in range(32)
    ]
    Path(options.rows).write_text("".join(json.dumps(line) + "\n" for line in lines))


def train(name: str, rows: Dataset) -> list[str]:
    """Train one arm and return its answers to the last wording of a few rows."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(rows, 320) if options.model is None else tokenizer_from(options.model)
    model = random_model(TINY, tokenizer, seed=0) if options.model is None else model_from(options.model)
    args = LLMJEPAConfig(
        str(options.out / name), jepa_weight=0.1, max_steps=options.steps, per_device_train_batch_size=8,
        learning_rate=1e-5 if options.model else 4e-3, save_strategy="no", logging_steps=10,
    )  # fmt: skip
    trainer = LLMJEPATrainer(model, args, rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    return [answer.text for answer in generate(trainer.model, tokenizer, asked, max_new_tokens=8)]


everything = read_rows(options.rows)
asked = [row["views"][-1] for row in everything.select(range(4))]
held_out = everything.map(lambda row: {"views": row["views"][:-1]}, load_from_cache_file=False)
with_wordings = train("with_wordings", held_out)
without = train("without", everything.remove_columns("views"))
print(f"\n{'asked':30s}{'with wordings':>20s}{'without':>20s}")
for question, one, other in zip(asked, with_wordings, without, strict=True):
    print(f"{question:30s}{one!r:>20s}{other!r:>20s}")
