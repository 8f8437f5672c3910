"""Claim: packed rows under FSDP2 have the gradient of one process, with parameters that really are sharded.

Through transformers' own `DistributedConfig`, on gloo. Accelerate's FSDP, which `--launch fsdp2` uses, silently becomes
DDP without GPUs: a test of it here would pass and show nothing.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.distributed import DistributedConfig

from llm_jepa.core.losses import jepa_distance
from llm_jepa.lm.attention import model_inputs
from llm_jepa.lm.batching import JEPACollator
from llm_jepa.lm.from_scratch import random_model, train_tokenizer
from llm_jepa.lm.predictor_tokens import add_predictor_tokens, predictor_token_ids
from llm_jepa.lm.reading import read_pairs
from llm_jepa.lm.trainer import LLMJEPATrainer
from llm_jepa.lm.views import IGNORE, add_view_columns
from llm_jepa.synthetic import nl_rx
from tests.conftest import EXACT, LAYER_NORM, LOGGED, assert_same_weights, config
from tests.ranks import on_ranks

WORLD = 2
PARTS = [slice(0, 5), slice(5, 8)]  # rows of each rank
# Predictor tokens, tied embeddings. The tokenizer has 320 tokens: one more, and no shard is as large as the other.
MODELS = {"untied": (1, False), "tied": (2, True), "tied, uneven": (1, True)}


def rows() -> list[dict]:
    return nl_rx.generate(48, seed=3, wordings=(0, 1, 2, 3))


def load(folder: str, name: str, dtype: torch.dtype, *, sharded: bool) -> tuple[PreTrainedModel, object, int]:
    tokens, _ = MODELS[name]
    path = f"{folder}/{name}"
    # Predictor tokens are in the checkpoint already: a sharded embedding does not grow.
    sharding = {"distributed_config": DistributedConfig(fsdp_size=WORLD)} if sharded else {}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa", **sharding)
    return model, AutoTokenizer.from_pretrained(path), tokens


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def three_steps(folder: str, name: str, rank: int | None) -> dict:
    """Gradients of the first step, and the losses of three steps of SGD, written as the trainer writes them."""
    model, tokenizer, tokens = load(folder, name, torch.float64, sharded=rank is not None)
    views = [add_view_columns(row, i, tokenizer=tokenizer) for i, row in enumerate(rows()[: PARTS[-1].stop])]
    collate = JEPACollator(tokenizer.pad_token_id, predictor_token_ids(tokenizer, tokens))
    labels = sum(label != IGNORE for row in views for label in row["labels"][1:])
    batch = collate(views if rank is None else views[PARTS[rank]])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = {"sharded": [isinstance(p, DTensor) for p in model.parameters()], "losses": []}
    for _ in range(3):
        next_token = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)
        output = model(
            **model_inputs(batch, model, "segments"), logits_to_keep=next_token != IGNORE, output_hidden_states=-1
        )
        logits = output.logits.reshape(-1, output.logits.shape[-1])
        lm_sum = F.cross_entropy(logits, next_token[next_token != IGNORE], reduction="sum")
        pair_sum = jepa_distance(*read_pairs(output.hidden_states[-1], batch)).sum()
        loss = lm_sum / labels + 2 * pair_sum / len(views)
        (loss * (1 if rank is None else WORLD)).backward()  # FSDP2 averages gradients, as DDP does
        found.setdefault("gradients", {n: whole(p.grad) for n, p in model.named_parameters()})
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach()
        if rank is not None:
            dist.all_reduce(total)
        found["losses"].append(float(total))
    return found


def train(folder: str, name: str, options: dict, rank: int | None) -> dict:
    """The trainer itself, on a model that is sharded already."""
    options = dict(options)
    model, tokenizer, tokens = load(folder, options.pop("model", name), torch.float64, sharded=rank is not None)
    ranks = 1 if rank is None else WORLD
    options = {"max_steps": 2, "num_predictor_tokens": tokens, "diagnostics_pairs": 8, "jepa_weight": 2.0, **options}
    options["per_device_train_batch_size"] = 8 // ranks // options.get("gradient_accumulation_steps", 1)
    options["per_device_eval_batch_size"] = 8 // ranks  # the negatives of InfoNCE
    args = config(f"{folder}/{name} of {ranks}", **options)
    trainer = LLMJEPATrainer(model, args, Dataset.from_list(rows()), Dataset.from_list(rows()[:16]), tokenizer)
    trainer.evaluate()  # leaves the final norm and the head gathered: the optimizer must not take these
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    logged = [
        {key: entry[key] for key in ("loss", "jepa_loss", "grad_norm", "eval_loss") if key in entry}
        for entry in trainer.state.log_history
    ]
    return {
        "sharded": [isinstance(p, DTensor) for p in trainer.model.parameters()],
        "weights": {n: whole(p) for n, p in trainer.model.named_parameters()},
        "log": [entry for entry in logged if entry],
    }


TRAINED = {
    "untied": {"objective": "info_nce"},
    "tied": {"objective": "cosine", "gradient_accumulation_steps": 2},
    # The final norm and the head stay gathered after a pass without backward: a swap of their shards alone is unseen.
    "ema": {
        "model": "untied", "objective": "cosine", "target_encoder": "ema", "ema_decay": 0.5, "max_steps": 4,
        "eval_strategy": "steps", "eval_steps": 1,
    },
}  # fmt: skip


def one_rank(rank: int, folder: str) -> dict[str, dict]:
    steps = {name: three_steps(folder, name, rank) for name in MODELS}
    return {"steps": steps, "trained": {name: train(folder, name, options, rank) for name, options in TRAINED.items()}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """Checkpoints of the models."""
    folder = tmp_path_factory.mktemp("models")
    for name, (tokens, tied) in MODELS.items():
        tokenizer = train_tokenizer(rows(), 320)
        model = random_model({**LAYER_NORM, "tie_word_embeddings": tied}, tokenizer, seed=0, dtype=torch.float64)
        add_predictor_tokens(model, tokenizer, tokens)
        assert (model.get_input_embeddings().weight.shape[0] % WORLD != 0) == (tokens == 1)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return str(folder)


@pytest.fixture(scope="module")
def ranks(folder) -> list[dict]:
    return on_ranks(WORLD, one_rank, folder)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_sharded_parameters_are_those_of_one_process(folder, ranks, name):
    one = three_steps(folder, name, None)
    assert not any(one["sharded"])
    for found in (rank["steps"] for rank in ranks):
        assert found[name]["sharded"] and all(found[name]["sharded"]), "FSDP2 fell back to whole parameters"
        assert_same_weights(found[name]["gradients"], one["gradients"])
        for key, gradient in one["gradients"].items():
            assert gradient.abs().max() > 1e-6, f"{key} does not learn: equal gradients would prove nothing"


STALE_HEAD = pytest.mark.xfail(
    strict=True,
    reason="transformers 5.23 gives a tied head a shard of its own; if the vocabulary does not divide by the ranks, "
    "PyTorch pads it into a copy that no step updates",
)


@pytest.mark.parametrize("name", ["untied", "tied", pytest.param("tied, uneven", marks=STALE_HEAD)])
def test_so_are_the_losses_after_steps(folder, ranks, name):
    losses = three_steps(folder, name, None)["losses"]
    assert losses[0] - losses[-1] > 0.1
    for found in (rank["steps"] for rank in ranks):
        assert found[name]["losses"] == pytest.approx(losses, rel=EXACT)


@pytest.mark.parametrize("name", TRAINED)
def test_the_trainer_trains_a_sharded_model_as_one_process_would(folder, ranks, name):
    """Its probe of the model, its diagnostics, InfoNCE over ranks, accumulation, evaluation and saving included."""
    one = train(folder, name, TRAINED[name], None)
    start = load(folder, TRAINED[name].get("model", name), torch.float64, sharded=False)[0].state_dict()
    for found in (rank["trained"] for rank in ranks):
        assert all(found[name]["sharded"])
        assert_same_weights(found[name]["weights"], one["weights"])
        for key, weight in one["weights"].items():
            assert not weight.equal(start[key]), f"{key} was not trained"
        assert len(found[name]["log"]) == len(one["log"]) > 2
        for ours, theirs in zip(one["log"], found[name]["log"], strict=True):
            assert theirs == pytest.approx(ours, rel=LOGGED)
    saved = load_file(Path(folder) / f"{name} of {WORLD}" / "model.safetensors")
    for key, weight in ranks[0]["trained"][name]["weights"].items():
        assert saved[key].equal(weight)
