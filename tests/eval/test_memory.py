"""Claims about the table of memory: its counts are those of the models, and its formula agrees with measured peaks."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from eval.cost import memory
from eval.cost.memory import CASES, GB, counts_of, lora_weights
from eval.pages.memory import MEMORY, memory_tables
from llm_jepa.lm.memory import Batch, Way, activations, gradients, held, predicted

SMALL = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 500, "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES = {"qwen2": {}, "mistral": {}, "gemma2": {"head_dim": 16}, "qwen3": {"head_dim": 16}}


def test_counts_by_hand():
    """A layer: q, o of 64 x 64, k, v of 32 x 64, three of 96 x 64, two norms. Untied: two matrices of 500 x 64."""
    layer = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64 + 2 * 64
    counts = counts_of(SMALL)
    assert (counts.layer, counts.embeddings) == (layer, 2 * 500 * 64)
    assert counts.total == 3 * layer + 2 * 500 * 64 + 64
    tied = counts_of({**SMALL, "tie_word_embeddings": True})
    assert (counts.total - tied.total, tied.embeddings) == (500 * 64, 500 * 64)


@pytest.mark.parametrize("family", FAMILIES)
def test_terms_of_families(family):
    """The state of AdamW after a step, gradients and weights of a real model have the bytes of the formula."""
    config = {**SMALL, "model_type": family, **FAMILIES[family]}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    counts, terms = counts_of(config), held(counts_of(config), counts_of(config).total, Way())
    assert counts.total == sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values() if value.dim() > 0]
    assert terms["optimizer"] == sum(value.nbytes for value in moments)
    assert terms["weights"] == sum(p.nbytes for p in model.parameters())
    assert gradients(counts.total, Way()) == sum(p.grad.nbytes for p in model.parameters())
    assert terms["buckets"] == terms["copies"] == terms["gathered"] == 0


def test_published_sizes():
    """As the models are called; the 0.5B and 3B of their makers count 0.49 and 3.2."""
    totals = {name: counts_of(config).total / 1e9 for name, config in memory.MODELS.items()}
    assert totals == pytest.approx(
        {"0.13B": 0.1345, "0.5B": 0.494, "1B": 1.236, "3B": 3.213, "8B": 8.030, "70B": 70.55}, 1e-3
    )


def test_lora_weights():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SMALL))
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"))
    assert lora_weights(SMALL, 8) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_the_values_that_a_layer_keeps():
    """What autograd saves for one more layer: 11 h + 4 i values a token, and small ones."""
    kept, config = [], {**SMALL, "num_key_value_heads": 4, "intermediate_size": 256}
    for layers in (2, 3):
        full = AutoConfig.for_model(**{**config, "num_hidden_layers": layers})
        model = AutoModelForCausalLM.from_config(full, attn_implementation="sdpa")
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        saved = {}

        def keep(tensor, weights=weights, saved=saved):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage  # held, so that no address is used again
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(torch.zeros(2, 128, dtype=torch.long), use_cache=False)
        kept.append(sum(storage.nbytes() for storage in saved.values()))
    one, two = (activations(counts_of(config)._replace(layers=n), Batch(256, 0), Way()) for n in (1, 2))
    assert kept[1] - kept[0] == pytest.approx(two - one, rel=0.1)


def test_ways_by_hand():
    """1,000 weights, of which a layer has 100 and the embeddings 400; no tokens."""
    counts = counts_of(SMALL)._replace(total=1000, layer=100, embeddings=400)

    def peak(trained, **way):
        return predicted(counts, trained, Batch(0, 0), Way(**way))

    assert peak(1000) == 16_000  # weights 4, moments 8, gradients 4
    assert peak(1000, autocast=True) == 18_000
    assert peak(1000, sharing="ddp", ranks=2) == 20_000
    gathered = 2 * (200 + 400) + 2 * (100 + 400)
    assert peak(1000, sharing="fsdp2", ranks=4, autocast=True) == 4_000 + gathered
    assert peak(1000, sharing="fsdp2", ranks=4, autocast=True, accumulates=True) == 3_000 + 2_000 + gathered
    assert peak(1000, sharing="zero3", ranks=4, autocast=True) == 18_000 / 4 + gathered
    assert peak(10, autocast=True, frozen_bytes=2) == 2 * 990 + (4 + 8 + 2 + 4) * 10


def test_the_committed_figures():
    """The table and every computed peak are what the formula gives now, and a verdict follows from the figures."""
    result = json.loads(MEMORY.read_text())
    for committed, computed in zip(result["table"], memory.table(), strict=True):
        assert committed == pytest.approx(computed)
    for row, case in zip(result["measured"], CASES, strict=True):
        counts = counts_of({**case.config, "vocab_size": row["vocab"]})
        computed = predicted(counts, row["trained"], Batch(row["tokens"], row["labels"]), case.way)
        assert row["case"] == case.name and row["computed"] == pytest.approx(computed / GB)
        assert row["measured"] > 0.05
    assert result["summary"] == memory.summary_of(result["measured"])
    assert not result["config"]["quick"]


def test_a_missed_bound_is_printed():
    rows = [{"case": "good", "measured": 1.1, "computed": 1.0}, {"case": "low", "measured": 0.5, "computed": 1.0}]
    summary = memory.summary_of(rows)
    assert (summary["worst"], summary["worst_ratio"], summary["within_bound"]) == ("low", 0.5, 1)
    assert memory.verdict(summary) == "MISSED" and memory.verdict(memory.summary_of(rows[:1])) == "ok"
    page, result = memory_tables(), json.loads(MEMORY.read_text())
    missed = result["summary"]["cases"] - result["summary"]["within_bound"]
    assert page.count("| MISSED |") == missed and (missed == 0) == (f"{len(CASES)}, ok." in page)


def test_the_page_is_linked():
    root = MEMORY.parents[3]
    assert "](docs/scaling.md)" in (root / "README.md").read_text()
    for page in ("lm.md", "recipes.md", "limits.md"):
        assert "](scaling.md" in (root / "docs" / page).read_text()
