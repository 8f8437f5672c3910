"""Loads data sets, tokenizer and model of a recipe: from files and folders, else from the Hub.

Weights are read from safetensors only, and code that comes with a checkpoint is never run.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from ..core import untrusted
from ..core.errors import UserError
from ..core.folders import check_folder
from ..core.json_files import shape_fault
from ..core.patterns import matching
from ..core.random_weights import config_of
from ..core.sources import RowStream, read_rows, stream_rows
from ..core.templates import use_template
from .arguments import LLMJEPAConfig
from .from_scratch import default_attention, random_model, train_tokenizer
from .keys import MAX_PREDICTOR_TOKENS, DataArguments, ModelArguments
from .prompts import PromptForm, form_of
from .rows import parse_row

TOKENIZER_ROWS = 100_000  # of a stream, on which a tokenizer is trained
OTHER_FAMILIES = {  # model_type -> what it is, and what to do with it
    "vl_jepa": "a VL-JEPA, not a causal LM: caption a video with llm-jepa watch, or use llm_jepa.vl.VLJEPA in Python "
    "(classify, answer, retrieve, embed).",
}
# The shape of what training notes in a config. `form_of` and `llm-jepa embed` read it.
RECORD = {
    "num_predictor_tokens?": int, "is_stripped?": bool, "readout_layer?": int, "context_view?": {"prefix", "message"},
    "readout?": {"last", "mean"}, "predictor_position?": {"last", "first"}, "direction?": {"forward", "reverse"},
    "prompt?": {
        "format?": {"text", "messages", None}, "ends?": {"generation_prompt", "content"}, "answer_begins?": str,
        "space?": (str, NoneType), "system?": (str, NoneType), "render_kwargs?": (str, dict),
    },
}  # fmt: skip


def load_data(args: DataArguments, *, seed: int) -> tuple[Dataset | RowStream, Dataset | None]:
    """The training rows and the validation rows. `seed` draws the rows that are held out of the training set."""
    options: dict[str, Any] = {
        "split": args.train_split,
        "config": args.dataset_config,
        "revision": args.dataset_revision,
        "limits": args.limits,
        "columns": args.columns,
    }
    if args.streaming:
        return stream_rows(args.train_data, **options, shuffle_buffer=args.shuffle_buffer), _validation_rows(args)
    train = read_rows(args.train_data, **options)
    name = _name(args.train_data)
    if len(train) == 0:
        raise UserError(f"{name} holds no rows.")
    _check_rows(train, name)  # before the split, so that errors name the row of the file
    if args.validation_data is not None or not args.validation_rows:
        return train, _validation_rows(args)
    if args.validation_rows >= len(train):
        raise UserError(
            f"validation_rows={args.validation_rows} leaves nothing of the {len(train)} rows of {name}; lower it."
        )
    parts = train.train_test_split(test_size=args.validation_rows, seed=seed)
    return parts["train"], parts["test"]


def _validation_rows(args: DataArguments) -> Dataset | None:
    """The rows of validation_data; None without it."""
    if args.validation_data is not None:
        validation = read_rows(
            args.validation_data,
            split=args.validation_split,
            config=args.dataset_config,
            limits=args.limits,
            columns=args.columns,
        )
        if len(validation) == 0:
            raise UserError(f"{_name(args.validation_data)} holds no rows.")
        return validation
    return None


def _check_rows(rows: Dataset, name: str) -> None:
    """Raises UserError for the first row that cannot be read; it says how many more there are."""
    faults = []
    for index, row in enumerate(rows):
        try:
            parse_row(row, f"{name}, row {index}")
        except UserError as error:
            faults.append(str(error))
    if faults:
        more = f" ({len(faults)} of {len(rows)} rows cannot be read; this is the first.)" if len(faults) > 1 else ""
        raise UserError(faults[0] + more)


def load_tokenizer(
    model: ModelArguments, training: LLMJEPAConfig, train: Dataset | RowStream
) -> PreTrainedTokenizerBase:
    """The recipe's tokenizer. If it names none and trains from scratch, a BPE is trained on the training rows.

    Of a stream, on its first rows.
    """
    source, template = model.tokenizer_name_or_path or model.model_name_or_path, training.chat_template_path
    if source is not None:
        revision = None if model.tokenizer_name_or_path else model.model_revision
        return tokenizer_from(source, revision=revision, chat_template_path=template)
    rows = train.first(TOKENIZER_ROWS) if isinstance(train, RowStream) else train
    tokenizer: PreTrainedTokenizerBase = train_tokenizer(rows, model.tokenizer_vocab_size)
    if template is not None:
        use_template(tokenizer, template)
    return tokenizer


def config_of_model(model: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The config of the model that `load_model` loads; reads no weights. Raises UserError like `load_model`."""
    if model.model_config is not None:
        return config_of(model.model_config, what="model_config", vocab_size=len(tokenizer))
    return check_model(str(model.model_name_or_path), revision=model.model_revision)


def load_model(
    model: ModelArguments, tokenizer: PreTrainedTokenizerBase, *, seed: int, bf16: bool = False
) -> PreTrainedModel:
    """A pretrained or a random causal LM with float32 master weights (unless the recipe says otherwise).

    bf16: whether the run computes in bfloat16. Layers in 4 bits choose their own type, whatever autocast says.
    """
    options: dict[str, Any] = {
        "dtype": getattr(torch, model.dtype),
        "attn_implementation": model.attn_implementation,
    }
    if model.model_config is not None:
        return random_model(model.model_config, tokenizer, seed=seed, **options)
    if model.load_in_4bit:
        # (QLoRA, arXiv:2305.14314, section 3: NF4 and double quantization)
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if bf16 else options["dtype"],
        )
    loaded = model_from(str(model.model_name_or_path), revision=model.model_revision, **options)
    for module in loaded.modules():
        # On a CPU with AVX512-BF16, bitsandbytes 0.50 repacks the weights at the first evaluation. From then on its
        # product has no gradient, also in training, and all layers but the last learn nothing from it.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return loaded


def tokenizer_from(
    source: str, revision: str | None = None, *, chat_template_path: str | None = None
) -> PreTrainedTokenizerBase:
    """A tokenizer from the Hub or a folder; the folder may hold a model or only a tokenizer.

    Args:
        chat_template_path: a file whose template takes the place of those in the folder.

    Raises UserError if it cannot be loaded, and for a chat template that cannot be used.
    """
    if not (Path(source) / "tokenizer_config.json").is_file():
        check_folder(source)
    if (Path(source) / "config.json").is_file():
        _refuse_other_families(source, "main")  # before transformers warns of a model type that it does not know
    return untrusted.load_tokenizer(source, revision=revision, chat_template_path=chat_template_path)


def check_model(source: str, *, revision: str = "main") -> PreTrainedConfig:
    """The config of a causal LM in a folder or on the Hub. Reads no weights, so a wrong path is found at once.

    Raises UserError for another kind of model, and if there is none.
    """
    check_folder(source)
    _refuse_other_families(source, revision)
    config = untrusted.load_config(source, revision=revision)
    if fault := _fault_of_record(getattr(config, "llm_jepa", None), config):
        raise UserError(f"The config.json of {source!r} cannot be used: {fault}; take a whole copy of the folder.")
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(f"{source!r} is a {config.model_type} model, not a causal LM; choose one that generates.")
    return config


def _fault_of_record(record: Any, config: PreTrainedConfig) -> str | None:
    """Why what training noted in a config cannot be used; None if it can, or if nothing was noted."""
    if record is None:
        return None
    if fault := shape_fault(record, RECORD, "its record 'llm_jepa'"):
        return fault
    tokens, layer = record.get("num_predictor_tokens", 0), record.get("readout_layer", -1)
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if not 0 <= tokens <= MAX_PREDICTOR_TOKENS:
        return f"its num_predictor_tokens is {tokens}, and 0 to {MAX_PREDICTOR_TOKENS} are possible"
    if layers is not None and not -layers - 1 <= layer <= layers:
        return f"its readout_layer is {layer}, and the model has {layers} layers"
    return None


def _refuse_other_families(source: str, revision: str) -> None:
    options = untrusted.read_options(source, revision=revision)
    if other := OTHER_FAMILIES.get(options.get("model_type", "")):
        raise UserError(f"{source!r} is {other}")


def model_from(source: str, *, revision: str = "main", **options: Any) -> PreTrainedModel:
    """A causal LM from a folder or the Hub. Raises UserError for another kind of model, or if weights do not fit."""
    config = check_model(source, revision=revision)
    logging.disable_progress_bar()  # hides the bar of every weight file; training has its own
    options["attn_implementation"] = options.get("attn_implementation") or default_attention(config)
    return untrusted.load_model(AutoModelForCausalLM, source, config, revision=revision, **options)


def load_to_use(
    source: str,
    *,
    revision: str = "main",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model in evaluation mode and its tokenizer: by default on the GPU in bfloat16, else on the CPU in float32."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer = tokenizer_from(source, revision=None if revision == "main" else revision)
    default = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = model_from(source, revision=revision, dtype=dtype or default)
    return model.to(device).eval(), tokenizer


def form_from(source: str, *, revision: str = "main") -> PromptForm:
    """How the prompts of a saved model were trained; reads its config only. Raises UserError like `check_model`."""
    return form_of(check_model(source, revision=revision))


def lora_config(model: ModelArguments, base: PreTrainedModel) -> LoraConfig | None:
    """The LoRA adapter of a recipe for the model `base`; None without use_peft.

    Raises UserError for `lora_target_modules` that match no module.
    """
    if not model.use_peft:
        return None
    targets = model.lora_target_modules
    if isinstance(targets, str) and targets.lower() != "all-linear":
        targets = _modules_of(targets, base)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=model.lora_r,
        lora_alpha=model.lora_alpha,
        lora_dropout=model.lora_dropout,
        target_modules=targets,
    )


def _modules_of(pattern: str, base: PreTrainedModel) -> list[str] | str:
    """The modules that PEFT would find with a regular expression, in a form that needs no engine, or a harmless one."""
    names = [name for name, _ in base.named_modules() if name]
    matches = matching(pattern, names, "lora_target_modules")
    if not matches:
        raise UserError(
            f"lora_target_modules={pattern[:80]!r} matches no module; it is a regular expression for a whole name "
            f"such as {names[-1]}. Write all-linear, or a list of last names: [q_proj, v_proj]."
        )
    # PEFT takes a name in a list for the end of a name, too.
    ends = tuple(f".{name}" for name in matches)
    if any(name.endswith(ends) for name in set(names) - set(matches)):
        return "|".join(map(re.escape, matches))
    return matches


def _name(data: str | Sequence[str]) -> str:
    return data if isinstance(data, str) else ", ".join(data)
