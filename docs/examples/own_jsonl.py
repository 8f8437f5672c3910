"""Fine-tune on your own JSON lines, then ask the model, and find answers by embedding.

    python docs/examples/own_jsonl.py                                     # makes its own rows and a tiny model
    python docs/examples/own_jsonl.py rows.jsonl --model Qwen/Qwen3-0.6B --steps 500 --out runs/mine

A row is {"prompt": TEXT, "completion": TEXT}. More formats: docs/lm.md#rows.
"""

import argparse
import json
from pathlib import Path

from safetensors.torch import load_file

from llm_jepa import LLMJEPAConfig, LLMJEPATrainer, generate
from llm_jepa.cli import main
from llm_jepa.lm import model_from, random_model, read_rows, tokenizer_from, train_tokenizer

TINY = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 256}  # fmt: skip

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("rows", nargs="?", help="a .jsonl file")
parser.add_argument("--model", help="a folder or a Hub id; without it, a tiny model from random weights")
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--out", type=Path, default=Path("runs/examples/own_jsonl"))
options = parser.parse_args()

options.out.mkdir(parents=True, exist_ok=True)
if options.rows is None:
    options.rows = str(options.out / "rows.jsonl")
    lines = [{"prompt": f"{n} plus one is", "completion": f" {n + 1}"} for n in range(48)]
    Path(options.rows).write_text("".join(json.dumps(line) + "\n" for line in lines))

rows = read_rows(options.rows)
tokenizer = train_tokenizer(rows, 320) if options.model is None else tokenizer_from(options.model)
model = random_model(TINY, tokenizer, seed=0) if options.model is None else model_from(options.model)
args = LLMJEPAConfig(
    str(options.out / "model"),
    jepa_weight=0.1,  # 0 is plain SFT
    max_steps=options.steps,
    per_device_train_batch_size=8,
    learning_rate=1e-5 if options.model else 4e-3,
    logging_steps=10,
    save_strategy="no",
)
trainer = LLMJEPATrainer(model, args, rows, processing_class=tokenizer)
trainer.train()
trainer.save_model()

# It is a plain causal LM in the folder, and answers as it was trained.
prompts = [row["prompt"] for row in rows.select(range(4))]
for prompt, answer in zip(prompts, generate(trainer.model, tokenizer, prompts, max_new_tokens=8), strict=True):
    print(f"{prompt!r} -> {answer.text!r}")

# And it embeds: which completion belongs to each prompt?
pairs = options.out / "pairs.safetensors"
pairs.unlink(missing_ok=True)
if code := main(["embed", args.output_dir, "--input", options.rows, "--output", str(pairs)]):
    raise SystemExit(code)
views = load_file(pairs)
context, target = (view / view.norm(dim=-1, keepdim=True) for view in (views["context"], views["target"]))
nearest = (context @ target.T).argmax(dim=-1)
print(f"{int((nearest.cpu() == nearest.new_tensor(range(len(nearest))).cpu()).sum())} of {len(nearest)} find their own")
