"""Save, export and merge an adapter (LoRA): its own weights and the trained token rows.

Its folder also holds the tokenizer, a card with the lines that load it, and a record of what training noted in the
config of the model, which the base model does not have.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..core.card import versions_of, write_card
from ..core.errors import UserError, first_line
from ..core.files import STAGE, write_json
from ..core.json_files import read_json
from ..core.portable import save_tokenizer
from ..core.publish import published
from ..core.safetensors_files import load_tensors
from ..core.tokenizer import forget_local_keys
from .loading import RECORD, model_from, tokenizer_from
from .predictor_tokens import known_predictor_ids
from .token_rows import grow, vocabulary_size

logger = logging.get_logger(__name__)

TEMPLATE = Path(__file__).with_name("adapter_card.md.jinja")
PACKAGES = ("torch", "transformers", "peft")
CONFIG, WEIGHTS, RECORD_FILE = "adapter_config.json", "adapter_model.safetensors", "llm_jepa.json"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Weights of the base that earlier versions saved with every adapter.
FROZEN = re.compile(r"(embed_tokens|lm_head|wte|embed_in|embed_out)(\.base_layer)?\.weight$")


def is_in_4bit(model: PreTrainedModel) -> bool:
    """Whether the linear layers of a model are held in 4 bits (`load_in_4bit`)."""
    return bool(getattr(model, "is_loaded_in_4bit", False))


def save_adapter(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    state_dict: dict[str, Tensor] | None = None,
    is_main_process: bool = True,
) -> None:
    """Save the adapter, the tokenizer and the card into `folder`.

    state_dict: the gathered weights of a sharded model; None reads them from the model.

    The frozen embedding is not saved. By default PEFT sees that the vocabulary has grown and saves it whole, twice if
    the head is tied to it; the new rows are trained, so they are saved as token rows anyway.
    """
    options: dict[str, Any] = {} if state_dict is None else {"state_dict": state_dict}
    model.save_pretrained(str(folder), save_embedding_layers=False, is_main_process=is_main_process, **options)
    if not is_main_process:
        return
    # The tokenizer belongs to the adapter: the base model's has no predictor tokens.
    tokenizer.save_pretrained(folder)
    forget_local_keys(folder)
    _settle_config(Path(folder))
    _write_card(model, Path(folder))


def _settle_config(folder: Path) -> None:
    """Give equal runs equal configs, and remove the path of a base model that is a folder of this machine.

    PEFT writes the names of a set in an order that differs from process to process. Of the path not even the last name
    stays: on another machine transformers would take it for a Hub id, and load the model of a stranger.
    """
    config = read_json(folder / CONFIG)
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    if Path(config["base_model_name_or_path"] or ".").exists():
        config["base_model_name_or_path"] = None
    write_json(folder / CONFIG, config)


def _write_card(model: PeftModel, folder: Path) -> None:
    """Replace PEFT's card, which is empty but for the path of the base model."""
    base_model = model.get_base_model()
    source = base_model.config._name_or_path
    is_local = Path(source).exists()
    record = getattr(base_model.config, "llm_jepa", None)
    suppressed = None if base_model.generation_config is None else base_model.generation_config.suppress_tokens
    num_rows = base_model.get_input_embeddings().weight.shape[0]
    write_json(folder / RECORD_FILE, {"num_rows": num_rows, "suppress_tokens": suppressed, "llm_jepa": record})
    write_adapter_card(
        folder,
        source="/".join([part for part in folder.absolute().parts if not part.startswith(STAGE)][-2:]),
        base=Path(source).name if is_local else source,
        is_local=is_local,
        revision=None if is_local else getattr(base_model.config, "_commit_hash", None),
        num_rows=num_rows,
        suppressed=suppressed,
    )


def write_adapter_card(
    folder: Path,
    *,
    source: str,
    base: str,
    is_local: bool,
    revision: str | None,
    num_rows: int | None,
    suppressed: list[int] | None,
) -> None:
    """Write README.md with the lines that load an adapter.

    Args:
        source: the name of the adapter in these lines.
        base: of the base model, "" for random weights. `is_local`: it was a folder of this machine.
        num_rows: of the embedding that the adapter needs; None if every base has them.
    """
    metadata = ModelCardData(
        base_model=None if is_local else base,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["llm-jepa", "jepa", "lora"],
    )
    write_card(
        folder,
        TEMPLATE,
        metadata,
        source=source,
        base=base,
        is_local=is_local,
        revision=revision,
        num_rows=num_rows,
        suppressed=suppressed,
        versions=versions_of(PACKAGES),
    )


# -- read one back ----------------------------------------------------------------------------------------------------


def _read_record(folder: Path) -> dict[str, Any]:
    """What training noted beside an adapter; {} for one of an earlier version. Raises UserError."""
    path = folder / RECORD_FILE
    if not path.is_file():
        return {}
    shape = {"num_rows": int, "suppress_tokens": (list, type(None)), "llm_jepa": (dict, type(None))}
    record: dict[str, Any] = read_json(path, shape)
    if record["llm_jepa"] is not None:
        read_json(path, {"llm_jepa": RECORD})
    return record


def _read_config(folder: Path) -> dict[str, Any]:
    """The config of a LoRA adapter. Raises UserError for another kind, which PEFT may load with code of its own."""
    config: dict[str, Any] = read_json(folder / CONFIG, {"peft_type": str})
    if config["peft_type"] != "LORA":
        raise UserError(f"{folder} holds an adapter of type {config['peft_type'][:40]!r}; only LoRA is exported.")
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder} has no {WEIGHTS}. Adapters are read from safetensors only; pickles could run code.")
    return config


def merged_model(folder: Path, base: str | None, *, dtype: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model of an adapter with the adapter merged into it, as a run saves it at its end, and the tokenizer.

    base: a folder or a Hub id; None takes what the adapter names. Raises UserError if it names none.
    """
    config, record = _read_config(folder), _read_record(folder)
    base = base or config.get("base_model_name_or_path")
    if not base:
        raise UserError(f"{folder} does not say its base model, which was a folder; name it with --base.")
    tensors = load_tensors(folder / WEIGHTS)
    tokenizer = tokenizer_from(str(folder))
    model = model_from(base, dtype=dtype)
    size = max(vocabulary_size(tokenizer), record.get("num_rows", 0))
    grow(model, size)
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.generation_config is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        own = model.generation_config.suppress_tokens or []
        suppressed = sorted({*own, *known_predictor_ids(tokenizer), *(record.get("suppress_tokens") or [])})
        model.generation_config.suppress_tokens = suppressed or None
    if record.get("llm_jepa"):
        model.config.llm_jepa = record["llm_jepa"]
    else:
        logger.warning(
            f"{folder} was saved by an earlier version, which noted nothing of the training beside an adapter: "
            "`llm-jepa embed` and `generate` will read the model like one that was not trained here."
        )
    try:
        adapted = PeftModel.from_pretrained(model, str(folder))
    except (RuntimeError, ValueError, IndexError, KeyError) as error:
        raise UserError(f"The adapter of {folder} does not fit the base model {base}: {first_line(error)}") from None
    _check_places(adapted, tensors, folder, base)
    return adapted.merge_and_unload().eval(), tokenizer


def _check_places(model: PeftModel, tensors: dict[str, Tensor], folder: Path, base: str) -> None:
    """PEFT warns of adapter weights that the model lacks, and goes on without them."""
    held = {name.replace(".default", "") for name in model.state_dict()}
    lost = sorted(name for name in tensors if name not in held and not FROZEN.search(name) and ".lora_" in name)
    if lost:
        raise UserError(f"The adapter of {folder} does not fit the base model {base}: it has no place for {lost[0]}.")


# -- export -----------------------------------------------------------------------------------------------------------


def export_adapter(folder: Path, out: Path, *, base: str | None, strip: bool) -> None:
    """Write an adapter that names its base model, without the frozen embedding that earlier versions saved with it.

    Args:
        base: a Hub id; None keeps the one that the adapter names.
        strip: leave the rows of the predictor tokens out. Then it fits the base as it is, if no other row is trained.

    Raises UserError if no base is named, since nobody else could load the adapter.
    """
    config, record = _read_config(folder), _read_record(folder)
    base = base or config.get("base_model_name_or_path")
    if not base:
        raise UserError(
            f"{folder} does not say its base model, which was a folder of your machine; name the same model on the Hub "
            "with --base ORG/NAME."
        )
    if not HUB_ID.fullmatch(base) or Path(base).exists():
        raise UserError(f"--base {base} is not a Hub id (ORG/NAME): nobody else could load the adapter.")
    tokenizer = tokenizer_from(str(folder))
    tensors = load_tensors(folder / WEIGHTS)
    rows = config.get("trainable_token_indices") or {}
    rows = rows if isinstance(rows, dict) else {"embed_tokens": rows}
    stripped = set(known_predictor_ids(tokenizer)) if strip else set()
    if strip and not stripped:
        raise UserError("This adapter has no predictor tokens to strip; remove --strip-predictor.")
    kept = {name: tensor.contiguous() for name, tensor in tensors.items() if not _is_frozen(name, config)}
    if stripped:
        kept, rows = _without_rows(kept, rows, stripped)
    config |= {"base_model_name_or_path": base, "trainable_token_indices": rows or None, "inference_mode": True}
    suppressed = [token for token in record.get("suppress_tokens") or [] if token not in stripped] or None
    num_rows = record.get("num_rows", vocabulary_size(tokenizer)) if any(rows.values()) or not stripped else None
    with published(out) as stage:
        save_file(kept, stage / WEIGHTS, metadata={"format": "pt"})
        # Older versions of PEFT warn of keys that they do not know; null is the default of all of those.
        write_json(stage / CONFIG, {key: value for key, value in config.items() if value is not None})
        save_tokenizer(tokenizer, stage, without=tokenizer.convert_ids_to_tokens(sorted(stripped)))
        if record and not stripped:
            write_json(stage / RECORD_FILE, record)
        write_adapter_card(
            stage,
            source=out.name,
            base=base,
            is_local=False,
            revision=config.get("revision"),
            num_rows=num_rows,
            suppressed=suppressed,
        )


def _is_frozen(name: str, config: dict[str, Any]) -> bool:
    """Whether a tensor is a table of the base that was not trained."""
    trained = config.get("modules_to_save") or []
    return FROZEN.search(name) is not None and not any(f".{module}." in f".{name}" for module in trained)


def _without_rows(
    tensors: dict[str, Tensor], rows: dict[str, list[int]], ids: set[int]
) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """The tensors and the trained rows without those of `ids`."""
    tensors, left = dict(tensors), {}
    for module, own in rows.items():
        places = [index for index, token in enumerate(own) if token not in ids]
        for name in [name for name in tensors if f".{module}." in name and "trainable_tokens" in name]:
            if places:
                tensors[name] = tensors[name][places].contiguous()
            else:
                del tensors[name]
        if places:
            left[module] = [own[index] for index in places]
    return tensors, left
