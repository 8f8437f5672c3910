"""Claims about README, docs and CONTRIBUTING: snippets run, commands parse, links resolve, the minimal page is true."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llm_jepa.lm.trainer import LLMJEPATrainer
from llm_jepa.lm.views import PREDICTOR_TOKEN, build_views
from llm_jepa.vl import Clip, ClipDataset, Pair, VLJEPAModel, VLJEPAProcessor, VLJEPATrainer, VLJEPATrainingArguments
from llm_jepa.vl.loading import plain_frames
from tests.conftest import config

ROOT = Path(__file__).parent.parent
MINIMAL = ROOT / "docs" / "minimal.md"
SGD = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": 1}


def python_blocks(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


# -- docs/minimal.md ----------------------------------------------------------------------------------------------


@functools.cache
def minimal(number: int) -> dict:
    """The names of a program of docs/minimal.md after it has run."""
    names: dict = {"__name__": "minimal"}
    exec(compile(python_blocks(MINIMAL)[number], f"{MINIMAL}, block {number}", "exec"), names)
    return names


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def assert_same_step(start: dict, ours: dict, gradients: dict, rates: dict[str, float] | None = None) -> None:
    """SGD at rate 1 moves each weight by minus its gradient, so the weights after a step tell every gradient."""
    assert len(gradients) > 10 and sum(g.abs().sum() for g in gradients.values()) > 0.1, "no gradient: nothing is shown"
    for name, before in start.items():
        rate = (rates or {}).get(name, 1.0)
        expected = before - rate * gradients[name] if name in gradients else before
        torch.testing.assert_close(ours[name], expected, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def letter_tokenizer(letters: list[str]) -> PreTrainedTokenizerFast:
    """One token a letter, with the ids of docs/minimal.md."""
    special = ["<pad>", "<s>", "</s>", PREDICTOR_TOKEN.format(1)]
    vocabulary = {token: i for i, token in enumerate([*special, *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", extra_special_tokens=special[3:]
    )


def test_the_minimal_llm_jepa_learns(capsys):
    """At the end of its loop the LM loss is below 1 nat (ln 27 = 3.3 at the start), and recall@1 near 1."""
    page = minimal(0)
    with torch.no_grad():
        _, lm_loss, _, recall = page["loss_of"](page["model"], [page["views"](*row) for row in page["ROWS"]], 0.1)
    assert lm_loss < 1 and recall > 0.8


def test_the_minimal_llm_jepa_is_ours(tmp_path, monkeypatch):
    """Same rows, same weights: the same sequences, loss and gradients as LLMJEPATrainer, in float64."""
    # transformers' own RMSNorm rounds to float32 inside, which would hide errors below 1e-6 of a gradient.
    monkeypatch.setattr(
        LlamaRMSNorm, "forward", lambda self, x: F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)
    )
    page = minimal(0)
    model = page["LlamaForCausalLM"](page["model"].config).double()
    tokenizer = letter_tokenizer(page["LETTERS"])
    rows = [page["ROWS"][n] for n in (3, 14, 15, 92, 65, 35)]
    batch = [page["views"](*row) for row in rows]
    columns = [{"prompt": prompt, "completion": completion} for prompt, completion in rows]
    for row, sequences in zip(columns, batch, strict=True):
        views = build_views(row, tokenizer)
        assert views.input_ids == sequences["lm"] and views.labels == sequences["labels"]
        assert [*views.contexts[0], page["PREDICTOR"]] == sequences["context"]
        assert views.targets[0] == sequences["target"]

    loss, lm_loss, jepa_loss, _ = page["loss_of"](model, batch, jepa_weight=0.7)
    loss.backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    start = weights_of(model)

    args = config(
        tmp_path, jepa_weight=0.7, per_device_train_batch_size=len(rows), logging_steps=1, save_strategy="no", **SGD
    )
    trainer = LLMJEPATrainer(model, args, Dataset.from_list(columns), None, tokenizer)
    trainer.train()
    (log,) = [entry for entry in trainer.state.log_history if "lm_loss" in entry]
    assert log["lm_loss"] == pytest.approx(lm_loss, rel=1e-6)  # summed in float32
    assert log["jepa_loss"] == pytest.approx(jepa_loss, rel=1e-6)
    assert_same_step(start, weights_of(trainer.model), gradients)


def word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=words[0])


def test_the_minimal_vl_jepa_learns():
    """On clips it has not seen it picks the right one of 19 texts in more than 4 of 10 cases; chance is 1 in 19."""
    page = minimal(1)
    held_out = list(range(200, 256))
    queries, texts = page["questions"](held_out)
    candidates = sorted(set(texts))
    with torch.no_grad():
        predicted = page["model"].predict(page["FEATURES"][held_out], queries)
        scores = F.normalize(predicted) @ F.normalize(page["model"].embed(candidates)).T
    right = [candidates[i] == text for i, text in zip(scores.argmax(dim=1).tolist(), texts, strict=True)]
    assert sum(right) / len(right) > 0.4


def test_the_minimal_vl_jepa_is_ours(tmp_path):
    """Same features, texts and weights: the loss and gradients of VLJEPATrainer, in float64; two learning rates."""
    page = minimal(1)
    torch.manual_seed(5)
    model = page["VLJEPA"]().double()
    clips = [page["draw_clip"]() for _ in range(6)]
    pixels = torch.stack([clip for clip, _, _ in clips]).double()
    seen = model.see(pixels)
    queries = (list(page["QUERIES"]) * 2)[: len(clips)]
    texts = [page["QUERIES"][query].format(*clip[1:]) for query, clip in zip(queries, clips, strict=True)]
    texts[3] = texts[0]  # equal texts are positives of each other
    loss = page["loss_of"](model, seen, queries, texts)
    loss.backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}

    ours = VLJEPAModel.from_parts(
        model.x_encoder, model.predictor, model.y_encoder, shared_dim=64, num_frames=4, frame_size=16, dtype=torch.float64
    )
    ours.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(ours.encode_frames(pixels), seen, rtol=1e-12, atol=1e-12)
    start = weights_of(ours)
    words = word_tokenizer(page["VOCABULARY"])
    processor = VLJEPAProcessor.from_parts(
        ours.config, image_processor=plain_frames(16), tokenizer=words, target_tokenizer=words
    )
    pairs = [Clip(None, (Pair(query, text),)) for query, text in zip(queries, texts, strict=True)]
    args = VLJEPATrainingArguments(
        str(tmp_path), per_device_train_batch_size=len(pairs), y_encoder_lr_factor=0.05, logging_steps=1, use_cpu=True,
        save_strategy="no", disable_tqdm=True, **SGD,
    )  # fmt: skip
    trainer = VLJEPATrainer(ours, args, ClipDataset(pairs, num_frames=4, features=seen), processor=processor)
    trainer.train()
    (log,) = [entry for entry in trainer.state.log_history if "temperature" in entry]
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-6)  # summed in float32
    rates = {name: 0.05 for name in start if name.startswith("y_encoder.")}
    assert_same_step(start, weights_of(trainer.model), gradients, rates)
