"""Hostile configs, code and tokenizers in a model folder, and every command that reads one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .bases import Damage, damaged, hostile_pickle, rows_file, with_bytes, with_options
from .inputs import Command, Input, canary

SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "head_dim",
)  # fmt: skip
WRONG: tuple[Any, ...] = (0, -1, 3, 10**5, 10**9, 10**30, 1.5, "x", {}, float("nan"))
KERNELS = (
    "kernels-community/flash-attn2", "kernels-community/flash-attn2@main", "stranger/kernel", "stranger/kernel@v1:run",
    "paged|stranger/kernel", "sdpa|stranger/kernel", "stranger", "./kernel", "/var/kernel", "MiniMaxAI/msa",
)  # fmt: skip
TRUST = "trust_remote_code"
SPELLINGS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation")


def config_inputs(base: Path, shared: Path) -> Iterator[Input]:
    yield from _sizes(base)
    yield from _records(base, shared)
    yield from _attention(base)
    yield from _code(base)
    yield from _tokenizers(base)
    yield from _doors(base, shared)


def _sizes(base: Path) -> Iterator[Input]:
    for key in SIZES:
        for value in WRONG:
            yield Input(f"config: {key} is {value!r}"[:60], damaged(base, with_options({key: value})), "")
    more: dict[str, Any] = {
        "num_labels": 10**7, "n_layer": 10**9, "max_position_embeddings": -1, "hidden_act": "no-such", "rms_norm_eps":
        "x", "rope_parameters": {"rope_type": "no-such"}, "model_type": "no-such", "torch_dtype": "load", "dtype":
        "save", "layer_types": ["no-such"], "id2label": {"a": "b"}, "to_dict": 1, "__class__": "x", "sub_configs": 1,
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}, "architectures": 5,
        "pad_token_id": 10**9, "vocab_size": 100, "num_hidden_layers": 1, "hidden_size": 32,
    }  # fmt: skip
    for key, value in more.items():
        yield Input(f"config: {key}: {value!r}"[:60], damaged(base, with_options({key: value})), "")


def _records(base: Path, shared: Path) -> Iterator[Input]:
    """What training notes in a config, and `embed` reads."""
    command = _commands(rows_file(shared))["embed"]
    prompts: dict[str, Any] = {
        "a text": "x", "render_kwargs of brackets": {"render_kwargs": "[" * 100_000}, "a format": {"format": 5},
        "render_kwargs of a list": {"render_kwargs": "[]"}, "an unknown key": {"no-such": 1},
    }  # fmt: skip
    records: dict[str, tuple[Any, str | None]] = {
        "a list": ([], "llm_jepa"),
        "a text": ("x", "llm_jepa"),
        "empty": ({}, None),
        "no number of tokens": ({"num_predictor_tokens": "x"}, "num_predictor_tokens"),
        "many tokens": ({"num_predictor_tokens": 10**9}, "num_predictor_tokens"),
        "-1 tokens": ({"num_predictor_tokens": -1}, "num_predictor_tokens"),
        "an unknown view": ({"context_view": "no-such"}, "context_view"),
        "an unknown readout": ({"readout": "no-such"}, "readout"),
        "a far layer": ({"readout_layer": 10**9}, "readout_layer"),
        "a layer before the first": ({"readout_layer": -99}, "readout_layer"),
        "an unknown direction": ({"direction": "no-such"}, "direction"),
    }
    for name, value in prompts.items():
        records[f"prompt is {name}"] = ({"prompt": value}, None if "unknown" in name else "")
    for name, (record, says) in records.items():
        yield Input(f"record: {name}", damaged(base, with_options({"llm_jepa": record}), command), says)


def _attention(base: Path) -> Iterator[Input]:
    for spelling in SPELLINGS:
        for name in KERNELS:
            damage = with_options({spelling: name})
            yield Input(f"kernel: {spelling} {name}", watching_kernels(damaged(base, damage)), spelling)
    nested: dict[str, Any] = {
        "a dict": {"attn_implementation": {"": "stranger/kernel"}},
        "a list": {"attn_implementation": ["stranger/kernel"]},
        "a sub-config": {"text_config": {"_attn_implementation": "stranger/kernel"}},
        "a list of configs": {"parts": [{"attn_implementation": "stranger/kernel"}]},
        "a layer": {"per_layer_config": {"0": {"attn_implementation": "stranger/kernel"}}},
    }
    for name, options in nested.items():
        yield Input(f"kernel: {name}", watching_kernels(damaged(base, with_options(options))), "attn_implementation")
    for key in (
        "use_kernels",
        "kernel_config",
        "fusion_config",
        "distributed_config",
        "gguf_file",
        "trust_remote_code",
    ):
        yield Input(f"kernel: {key}", watching_kernels(damaged(base, with_options({key: {"a": "b"}}))), key)


def watching_kernels(make: Callable[[Path], Command]) -> Callable[[Path], Command]:
    """As if the package `kernels` were installed. Its loader creates the canary."""

    def watched(folder: Path) -> Command:
        from transformers import modeling_utils
        from transformers.integrations import hub_kernels

        def load(*_: Any, **__: Any) -> None:
            canary(folder).touch()
            raise RuntimeError("native code was downloaded")

        for module in (modeling_utils, hub_kernels):
            setattr(module, "is_kernels_available", lambda *_, **__: True)  # noqa: B010
        setattr(hub_kernels, "get_kernel", load)  # noqa: B010
        return make(folder)

    return watched


def _code(base: Path) -> Iterator[Input]:
    """Python files in the folder, and keys that name them."""

    def with_module(file: str, **options: Any) -> Damage:
        def damage(model: Path, folder: Path) -> None:
            for name in ("modeling_x.py", "configuration_x.py", "tokenization_x.py", "custom_generate/generate.py"):
                (model / name).parent.mkdir(exist_ok=True)
                (model / name).write_text(
                    f"open({str(canary(folder))!r}, 'w')\nclass X: ...\ndef generate(*_, **__): ...\n"
                )
            with_options(options, file)(model, folder)

        return damage

    autos = {
        "AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X", "AutoModel": "modeling_x.X",
        "AutoTokenizer": ["tokenization_x.X", "tokenization_x.X"],
    }  # fmt: skip
    code: dict[str, tuple[str, dict[str, Any], str | None]] = {
        "auto_map of a known model": ("config.json", {"auto_map": autos}, None),
        "auto_map of an unknown model": ("config.json", {"auto_map": autos, "model_type": "x"}, "model"),
        "auto_map of another repository": (
            "config.json", {"auto_map": {"AutoConfig": "a/b--c.X"}, "model_type": "x"}, "model",
        ),
        "auto_map of no config": ("config.json", {"auto_map": 5}, ""),
        "auto_map of a tokenizer": ("tokenizer_config.json", {"auto_map": autos}, None),
        "trust in config": ("config.json", {TRUST: True, "auto_map": autos}, TRUST),
        "custom_generate": ("generation_config.json", {"custom_generate": "custom_generate"}, None),
        "trust in generation": ("generation_config.json", {TRUST: True, "penalty_alpha": 0.5}, None),
        "configuration_files": ("config.json", {"configuration_files": ["config.4.0.json"]}, "configuration_files"),
        "transformers_weights": ("config.json", {"transformers_weights": "../x.safetensors"}, "transformers_weights"),
        "transformers_weights .bin": (
            "config.json", {"transformers_weights": "adapter_model.bin"}, "transformers_weights",
        ),
    }  # fmt: skip
    for name, (file, options, says) in code.items():
        yield Input(f"code: {name}", damaged(base, with_module(file, **options)), says)
    for method in ("bitsandbytes", "gptq", "awq", "mxfp4", "fp8", "quark", "../x", "no-such", {"a": 1}):
        options = {"quantization_config": {"quant_method": method, "modules": ["os.system"]}}
        yield Input(f"code: quantized {method}", damaged(base, with_options(options)), "quantized")

    def adapter(model: Path, folder: Path) -> None:
        config = {
            "peft_type": "LORA",
            "base_model_name_or_path": "/etc",
            "auto_mapping": {"base_model_class": "os.system"},
        }
        (model / "adapter_config.json").write_text(json.dumps({**config, "r": 10**9, "target_modules": "(a+)+$"}))
        (model / "adapter_model.bin").write_bytes(hostile_pickle(folder))

    def only_adapter(model: Path, folder: Path) -> None:
        adapter(model, folder)
        (model / "config.json").unlink()

    yield Input("code: an adapter beside the model", damaged(base, adapter), "holds an adapter")
    yield Input("code: an adapter alone", damaged(base, only_adapter), "holds an adapter")


def _tokenizers(base: Path) -> Iterator[Input]:
    file = "tokenizer_config.json"
    for kind in ("os.system", "AutoModel", "AutoModelForCausalLM", "pipeline", "x/y", "", "AutoConfig"):
        yield Input(f"tokenizer: of class {kind!r}", damaged(base, with_options({"tokenizer_class": kind}, file)), "")
    for key in ("tokenizer_file", "vocab_file", "merges_file"):
        for value in ("/etc/passwd", "../x.json", 5.5):
            yield Input(f"tokenizer: {key} {value}", damaged(base, with_options({key: value}, file)), key)
    broken: dict[str, Any] = {
        "tokenizer_class": 5, "chat_template": 5, "added_tokens_decoder": 5, "additional_special_tokens": 5,
        "model_max_length": "x", "eos_token": 5, "bos_token": {"a": 1}, "extra_special_tokens": "x",
    }  # fmt: skip
    for key, value in broken.items():
        yield Input(f"tokenizer: {key} is {value!r}", damaged(base, with_options({key: value}, file)), "")

    def cut(share: float) -> Damage:
        def damage(model: Path, folder: Path) -> None:
            path = model / "tokenizer.json"
            path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

        return damage

    for share in (0.1, 0.5, 0.9, 0.999):
        yield Input(f"tokenizer: torn at {share}", damaged(base, cut(share)), "tokenizer.json")
    models: dict[str, Any] = {
        "no model": {"model": None}, "unknown model": {"model": {"type": "X"}},
        "ids of 2^40": {"model": {"type": "BPE", "vocab": {"a": 2**40}, "merges": []}},
        "merges of nothing": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["x y"]}},
        "an unknown normalizer": {"normalizer": {"type": "X"}},
        "an endless pattern": {"normalizer": {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}},
    }  # fmt: skip
    for name, options in models.items():
        yield Input(f"tokenizer: {name}", damaged(base, with_options(options, "tokenizer.json")), "tokenizer")


# -- every command ----------------------------------------------------------------------------------------------------


def _doors(base: Path, shared: Path) -> Iterator[Input]:
    """One of each kind, at each command and function that takes a causal LM."""
    rows = rows_file(shared)
    for name, (damage, says) in config_damages().items():
        for door, command in _commands(rows).items():
            yield Input(f"door {door}: {name}", watching_kernels(damaged(base, damage, command)), says)


def config_damages() -> dict[str, tuple[Damage, str]]:
    """One of each kind, and what is said."""
    return {
        "brackets": (with_bytes("config.json", b"[" * 100_000), "config.json"),
        "kernel": (with_options({"attn_implementation": "stranger/kernel"}), "attn_implementation"),
        "layers": (with_options({"num_hidden_layers": 90_000}), "larger model than its weights"),
        "text as weights": (with_bytes("model.safetensors", b"text " * 99), "model.safetensors"),
        "tokenizer": (with_bytes("tokenizer.json", b"{"), "tokenizer.json"),
    }


def _commands(rows: Path) -> dict[str, Callable[[Path], Command]]:
    def train(model: Path) -> Command:
        recipe = model.parent / "recipe.yaml"
        values = {
            "family": "lm", "model_name_or_path": str(model), "train_data": str(rows), "output_dir": "run",
            "max_steps": 1, "use_cpu": True, "report_to": "none", "diagnostics_pairs": 0, "save_strategy": "no",
        }  # fmt: skip
        recipe.write_text(json.dumps(values))
        return ["train", str(recipe)]

    def evaluate(model: Path) -> Command:
        from ..run import main

        return lambda: main(["--model", str(model), "--task", "groups", "--data", str(groups), "--out", "result.json"])

    def function(model: Path) -> Command:
        from llm_jepa.lm import model_from, tokenizer_from

        return lambda: (tokenizer_from(str(model)), model_from(str(model)), None)[2]

    def trainer(model: Path) -> Command:
        from llm_jepa.lm import LLMJEPAConfig, LLMJEPATrainer

        return lambda: LLMJEPATrainer(str(model), LLMJEPAConfig(output_dir="run", use_cpu=True), [])

    def robustness(model: Path) -> Command:
        from ..robustness import main

        os.environ["MPLCONFIGDIR"] = str(model.parent / "work")
        return lambda: main(["--models", str(model), "--task", "groups", "--data", str(groups), "--out", "results"])

    groups = rows.with_name("groups.jsonl")
    lines = [
        json.dumps({"id": i, "prompts": [f"{i} plus one", f"one more than {i}"], "answer": str(i + 1)}) for i in (1, 2)
    ]
    groups.write_text("\n".join(lines) + "\n")
    return {
        "robustness": robustness,
        "train": train,
        "embed": lambda model: ["embed", str(model), "--input", str(rows), "--output", "out.safetensors"],
        "eval.run": evaluate,
        "functions": function,
        "trainer": trainer,
    }
