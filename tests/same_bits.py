"""Train small runs of every kind and record what they compute, bit by bit.

    python same_bits.py DATA OUT [CASE ...]            train; OUT/bits.json has the figures of each case
    python same_bits.py DATA OUT --resume CASE ...     continue the runs in OUT from their checkpoints

`test_same_bits.py` runs this file over two versions of the package; PYTHONPATH chooses which. So it uses the command
line and the files of a run, and nothing else of the package.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from llm_jepa.cli import main

LM = """
model_config: {model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4,
  num_key_value_heads: 2, max_position_embeddings: 256, attention_dropout: 0.1}
tokenizer_vocab_size: 320
train_data: DATA/rows.jsonl
validation_rows: 12
max_steps: 4
per_device_train_batch_size: 8
gradient_accumulation_steps: 2
learning_rate: 1.0e-2
eval_strategy: steps
eval_steps: 2
save_steps: 2
logging_steps: 1
diagnostics_pairs: 12
use_cpu: true
disable_tqdm: true
activation_checkpointing: false
"""
ROPELESS = "{model_type: bloom, hidden_size: 32, n_layer: 2, n_head: 4}"
EXPERTS = (
    "{model_type: mixtral, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4, "
    "num_key_value_heads: 2, num_local_experts: 4, num_experts_per_tok: 2}"
)
WINDOWS = (
    "{model_type: gemma2, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4, "
    "num_key_value_heads: 2, head_dim: 8, sliding_window: 8}"
)
LM_CASES = {
    "sft": {"jepa_weight": 0},
    "info_nce": {},
    "cosine": {"objective": "cosine", "jepa_weight": 1.0},
    "l2": {"objective": "l2"},
    "mse": {"objective": "mse"},
    "smooth_l1": {"objective": "smooth_l1"},
    "stp, paper": {"objective": "stp", "num_predictor_tokens": 0},
    "stp, code": {"objective": "stp", "num_predictor_tokens": 0, "stp_formula": "code"},
    "vicreg": {"objective": "cosine", "regularizer": "vicreg", "projector_dim": 16},
    "sigreg": {"objective": "cosine", "regularizer": "sigreg", "projector_dim": 16},
    "stop_gradient": {"target_encoder": "stop_gradient"},
    "ema": {"target_encoder": "ema"},
    "ema and projector": {"target_encoder": "ema", "objective": "cosine", "regularizer": "vicreg", "projector_dim": 16},
    "base": {"target_encoder": "base"},
    "mean of layer 1": {"readout": "mean", "readout_layer": 1},
    "message": {"context_view": "message"},
    "reverse": {"direction": "reverse"},
    "predictor first, two": {"predictor_position": "first", "num_predictor_tokens": 2, "context_view": "message"},
    "no predictor token": {"num_predictor_tokens": 0},
    "paper labels": {"label_protocol": "paper"},
    "shared rows": {"share_rows": "true"},
    "shared rows, sft": {"share_rows": "true", "jepa_weight": 0},
    "all negatives of a step": {"negatives": "optimizer_step"},
    "all negatives of a step, stop_gradient": {"negatives": "optimizer_step", "target_encoder": "stop_gradient"},
    "jepa_dropout": {"jepa_dropout": 0.5},
    "jepa_dropout, shared rows": {"jepa_dropout": 0.5, "share_rows": "true"},
    "jepa_dropout, stp": {"jepa_dropout": 0.5, "objective": "stp", "num_predictor_tokens": 0},
    "weight moves": {"jepa_weight_end": 1.0},
    "separate rows": {"model_config": ROPELESS},
    "separate rows, all negatives": {"model_config": ROPELESS, "negatives": "optimizer_step"},
    "experts": {"model_config": EXPERTS},
    "experts, packed": {"model_config": EXPERTS, "router_aux_loss_coef": 0},
    "windows, eager": {"model_config": WINDOWS, "attn_implementation": "eager"},
    "lora": {"use_peft": "true", "lora_r": 4, "lora_alpha": 8},
    "lora, sft": {"use_peft": "true", "lora_r": 4, "lora_alpha": 8, "jepa_weight": 0},
    "grouped by length": {"train_sampling_strategy": "group_by_length"},
    "bf16": {"bf16": "true"},
    "two ranks": {"negatives": "optimizer_step", "RANKS": 2},
    "best model": {"load_best_model_at_end": "true"},
}  # fmt: skip

VL = """
x_encoder: {model_type: vit, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4,
  patch_size: 16}
predictor: {model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4,
  num_key_value_heads: 2}
y_encoder: {model_type: bert, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4}
shared_dim: 16
tokenizer_vocab_size: 320
frame_size: 64
num_frames: 4
train_data: DATA/clips/train.jsonl
validation_rows: 6
max_steps: 4
per_device_train_batch_size: 8
gradient_accumulation_steps: 2
learning_rate: 1.0e-3
eval_strategy: steps
eval_steps: 2
save_steps: 2
logging_steps: 1
diagnostics_pairs: 12
use_cpu: true
disable_tqdm: true
"""
RESNET = "{model_type: resnet, embedding_size: 8, hidden_sizes: [8, 16], depths: [1, 1], layer_type: basic}"
VJEPA2 = (
    "{model_type: vjepa2, hidden_size: 16, patch_size: 16, mlp_ratio: 2, num_hidden_layers: 1, num_attention_heads: 2, "
    "pred_hidden_size: 16, pred_num_hidden_layers: 1, pred_num_attention_heads: 2, tubelet_size: 2, frames_per_clip: 4}"
)
VL_CASES = {
    "vl": {},
    "vl, cached": {"feature_cache": "OUT/cache"},
    "vl, cosine and vicreg": {"objective": "cosine", "regularizer": "vicreg"},
    "vl, sigreg": {"regularizer": "sigreg"},
    "vl, frozen y_encoder": {"y_encoder_lr_factor": 0, "project_targets": "true"},
    "vl, slow y_encoder": {"y_encoder_lr_factor": 0.05},
    "vl, learnt temperature": {"learn_temperature": "true"},
    "vl, resnet learns, motion": {
        "x_encoder": RESNET, "token_merge": "[4, 1, 1]", "motion_dim": 8, "grid_positions": "true",
        "x_encoder_trainable_layers": -1, "pairs_per_clip": 3,
    },
    "vl, tubelets": {"x_encoder": VJEPA2},
    "vl, pooled frames": {"pool_frames": "true"},
    "vl, x_encoder learns": {"x_encoder_trainable_layers": 1},
    "vl, two ranks": {"RANKS": 2},
}  # fmt: skip


def run(name: str, data: Path, out: Path, *, resume: bool = False) -> dict[str, object]:
    """One run through the command line."""
    recipe, options = (LM, LM_CASES[name]) if name in LM_CASES else (VL, VL_CASES[name])
    folder = folder_of(name, out)
    path = out / f"{folder.name}.yaml"
    path.write_text(recipe.replace("DATA", str(data)))
    words = ["train", str(path), "--output_dir", str(folder)]
    for key, value in options.items():
        if key != "RANKS":
            words += [f"--{key}", str(value).replace("OUT", str(out))]
    if resume:
        words += ["--resume_from_checkpoint", "true"]
    if "RANKS" in options:  # processes of their own
        command = [sys.executable, "-m", "llm_jepa.cli", *words, "--launch", "cpu"]
        subprocess.run([*command, "--num_processes", str(options["RANKS"])], check=True, capture_output=True)
    else:
        with contextlib.redirect_stdout(io.StringIO()):
            code = main(words)
        assert code == 0, f"{name}: exit code {code}"
    return measure(folder)


def folder_of(name: str, out: Path) -> Path:
    return out / name.replace(",", "").replace(" ", "-")


def measure(folder: Path) -> dict[str, object]:
    """Every logged figure (times aside) as hex float, the sha256 of the weights, and the identity of the run."""
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    left_out = ("runtime", "per_second", "total_flos", "train_loss")  # a resumed run averages its own steps only
    figures = []
    for entry in log:
        kept = {key: value for key, value in sorted(entry.items()) if not any(word in key for word in left_out)}
        figures.append({key: float(value).hex() for key, value in kept.items()})
    digest = hashlib.sha256()
    for key, value in sorted(load_file(folder / "model.safetensors").items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    identity = json.loads((folder / "run.json").read_text())
    return {"log": figures, "weights": digest.hexdigest(), "run": identity}


if __name__ == "__main__":
    torch.set_num_threads(1)
    data, out, *names = sys.argv[1:]
    resume = "--resume" in names
    names = [name for name in names if name != "--resume"] or [*LM_CASES, *VL_CASES]
    Path(out).mkdir(exist_ok=True)
    bits = {name: run(name, Path(data), Path(out), resume=resume) for name in names}
    Path(out, "bits.json").write_text(json.dumps(bits, indent=1))
