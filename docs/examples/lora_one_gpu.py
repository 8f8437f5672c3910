"""LoRA for a model of a few billion weights on one GPU: write the recipe, and look at it before anything is trained.

    python docs/examples/lora_one_gpu.py --dry-run                        # a tiny stand-in, on the CPU
    python docs/examples/lora_one_gpu.py rows.jsonl --model meta-llama/Llama-3.2-3B-Instruct

The weights stay in bfloat16, because the adapter alone is trained; its weights are float32. Not run on a GPU by us.
"""

import argparse
import json
from pathlib import Path

import torch

from llm_jepa.cli import main
from llm_jepa.core.strict_yaml import dump_yaml
from llm_jepa.synthetic import nl_rx

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("rows", nargs="?", help="a .jsonl file")
parser.add_argument("--model", help="a folder or a Hub id; without it, a tiny model from random weights")
parser.add_argument("--dry-run", action="store_true", help="train nothing")
parser.add_argument("--out", type=Path, default=Path("runs/examples/lora"))
options = parser.parse_args()

options.out.mkdir(parents=True, exist_ok=True)
if options.rows is None:
    options.rows = str(options.out / "rows.jsonl")
    Path(options.rows).write_text("".join(json.dumps(row) + "\n" for row in nl_rx.generate(64, seed=0)))

tiny = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 512}  # fmt: skip
has_gpu = torch.cuda.is_available()
recipe = {
    "family": "lm",
    **({"model_config": tiny} if options.model is None else {"model_name_or_path": options.model}),
    "dtype": "bfloat16" if has_gpu else "float32",
    "bf16": has_gpu,
    "use_cpu": not has_gpu,
    "use_peft": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "jepa_weight": 0.1,
    "jepa_dropout": 0.5,  # half of the steps cost as much as plain SFT
    "train_data": options.rows,
    "max_length": 512,
    "too_long": "drop",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 8,
    "gradient_checkpointing": True,
    "learning_rate": 2.0e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "num_train_epochs": 1.0,
    "save_total_limit": 1,
    "output_dir": str(options.out / "model"),
}
path = options.out / "recipe.yaml"
path.write_text("# LoRA on one GPU, written by docs/examples/lora_one_gpu.py\n" + dump_yaml(recipe))
raise SystemExit(main(["train", str(path), *(["--dry-run"] if options.dry_run or not has_gpu else [])]))
