"""Loads data sets, tokenizer and model of a recipe: from files and folders, else from the Hub.

Weights are read from safetensors only, and code that comes with a checkpoint is never run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from ..core.errors import UserError, first_line
from .arguments import DataArguments, LLMJEPAConfig, ModelArguments
from .from_scratch import default_attention, random_model, train_tokenizer
from .prompts import PromptForm, form_of
from .rows import parse_row
from .sources import read_rows

OTHER_FAMILIES = {  # model_type -> what it is, and what to do with it
    "vl_jepa": "a VL-JEPA, not a causal LM: caption a video with llm-jepa watch, or use llm_jepa.vl.VLJEPA in Python "
    "(classify, answer, retrieve, embed).",
}


def load_data(args: DataArguments, *, seed: int) -> tuple[Dataset, Dataset | None]:
    """The training rows and the validation rows. `seed` draws the rows that are held out of the training set."""
    train = read_rows(
        args.train_data, split=args.train_split, config=args.dataset_config, revision=args.dataset_revision
    )
    name = _name(args.train_data)
    if len(train) == 0:
        raise UserError(f"{name} holds no rows.")
    for index, row in enumerate(train):  # before the split, so that errors name the row of the file
        parse_row(row, f"{name}, row {index}")
    if args.validation_data is not None:
        validation = read_rows(args.validation_data, split=args.validation_split, config=args.dataset_config)
        if len(validation) == 0:
            raise UserError(f"{_name(args.validation_data)} holds no rows.")
        return train, validation
    if not args.validation_rows:
        return train, None
    if args.validation_rows >= len(train):
        raise UserError(
            f"validation_rows={args.validation_rows} leaves nothing of the {len(train)} rows of {name}; lower it."
        )
    parts = train.train_test_split(test_size=args.validation_rows, seed=seed)
    return parts["train"], parts["test"]


def load_tokenizer(model: ModelArguments, training: LLMJEPAConfig, train: Dataset) -> PreTrainedTokenizerBase:
    """The recipe's tokenizer. If it names none and trains from scratch, a BPE is trained on the training rows."""
    source = model.tokenizer_name_or_path or model.model_name_or_path
    if source is None:
        tokenizer: PreTrainedTokenizerBase = train_tokenizer(train, model.tokenizer_vocab_size)
    else:
        tokenizer = tokenizer_from(source, revision=None if model.tokenizer_name_or_path else model.model_revision)
    if training.chat_template_path is not None:
        path = Path(training.chat_template_path)
        if not path.is_file():
            raise UserError(f"No chat template at {path}; check chat_template_path.")
        try:
            tokenizer.chat_template = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"The chat template {path} is not UTF-8 text: {error}.") from None
    return tokenizer


def load_model(model: ModelArguments, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> PreTrainedModel:
    """A pretrained or a random causal LM with float32 master weights (unless the recipe says otherwise)."""
    options: dict[str, Any] = {
        "dtype": getattr(torch, model.dtype),
        "attn_implementation": model.attn_implementation,
    }
    if model.model_config is not None:
        return random_model(model.model_config, tokenizer, seed=seed, **options)
    return model_from(str(model.model_name_or_path), revision=model.model_revision, **options)


def tokenizer_from(source: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """A tokenizer from the Hub or a folder; the folder may hold a model or only a tokenizer. Raises UserError."""
    if not (Path(source) / "tokenizer_config.json").is_file():
        _check_folder(source)
    try:
        if (Path(source) / "config.json").is_file():
            _refuse_other_families(source, "main")  # before transformers warns of a model type that it does not know
        return AutoTokenizer.from_pretrained(source, revision=revision or "main", trust_remote_code=False)
    except UserError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"Cannot load a tokenizer from {source!r}{_no_folder(source)}: {first_line(error)}") from None


def check_model(source: str, *, revision: str = "main") -> PreTrainedConfig:
    """The config of a causal LM in a folder or on the Hub. Reads no weights, so a wrong path is found at once.

    Raises UserError for another kind of model, and if there is none.
    """
    _check_folder(source)
    try:
        _refuse_other_families(source, revision)
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except UserError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"Cannot load a model from {source!r}{_no_folder(source)}: {first_line(error)}") from None
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(f"{source!r} is a {config.model_type} model, not a causal LM; choose one that generates.")
    return config


def _refuse_other_families(source: str, revision: str) -> None:
    options, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
    if other := OTHER_FAMILIES.get(options.get("model_type", "")):
        raise UserError(f"{source!r} is {other}")


def model_from(source: str, *, revision: str = "main", **options: Any) -> PreTrainedModel:
    """A causal LM from a folder or the Hub. Raises UserError for another kind of model, or if weights do not fit."""
    config = check_model(source, revision=revision)
    logging.disable_progress_bar()  # hides the bar of every weight file; training has its own
    options["attn_implementation"] = options.get("attn_implementation") or default_attention(config)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise UserError(f"Cannot load a model from {source!r}: {first_line(error)}") from None
    misfits = []
    for kind in ("missing_keys", "mismatched_keys"):
        if report.get(kind):
            misfits.append(f"{kind}: {', '.join(sorted(map(str, report[kind]))[:3])}")
    if misfits:
        raise UserError(
            f"The weights of {source!r} do not fit its config ({'; '.join(misfits)}): the model would be partly random."
        )
    return model


def form_from(source: str, *, revision: str = "main") -> PromptForm:
    """How the prompts of a saved model were trained; reads its config only. Raises UserError like `check_model`."""
    return form_of(check_model(source, revision=revision))


def lora_config(model: ModelArguments) -> LoraConfig | None:
    """The LoRA adapter of a recipe; None without use_peft."""
    if not model.use_peft:
        return None
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=model.lora_r,
        lora_alpha=model.lora_alpha,
        lora_dropout=model.lora_dropout,
        target_modules=model.lora_target_modules,
    )


def _name(data: str | Sequence[str]) -> str:
    return data if isinstance(data, str) else ", ".join(data)


def _no_folder(source: str) -> str:
    """A hint for who mistyped a folder: it was taken for a Hub id."""
    return "" if Path(source).is_dir() else " (a Hub id, because the current folder has no such folder)"


def _check_folder(source: str) -> None:
    """Raises UserError if `source` is a folder without a model, or clearly a path and not a Hub id."""
    path = Path(source)
    # `runs/mistyped` looks like a Hub id; without a network, asking the Hub for it takes a minute of retries.
    starts_here = len(path.parts) > 1 and Path(path.parts[0]).is_dir()
    looks_local = path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1 or starts_here
    if looks_local and not path.is_dir():
        raise UserError(f"No model folder at {source}; check the path (it is relative to the current folder).")
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"{source} holds an adapter, not a whole model: name the folder of the finished run, which holds the "
            "merged model, or load it with the lines in its README.md and merge it."
        )
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"The folder {source} has no config.json, so it is not a saved model.")
