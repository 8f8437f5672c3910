"""Save an adapter (LoRA): its own weights, the trained token rows, and a card with the lines that load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..core.card import versions_of, write_card
from ..core.files import STAGE, write_json
from ..core.json_files import read_json
from ..core.tokenizer import forget_local_keys

TEMPLATE = Path(__file__).with_name("adapter_card.md.jinja")
PACKAGES = ("torch", "transformers", "peft")
CONFIG = "adapter_config.json"


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
    metadata = ModelCardData(
        base_model=None if is_local else source,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["llm-jepa", "jepa", "lora"],
    )
    generation = base_model.generation_config
    write_card(
        folder,
        TEMPLATE,
        metadata,
        source="/".join([part for part in folder.absolute().parts if not part.startswith(STAGE)][-2:]),
        base=Path(source).name if is_local else source,
        is_local=is_local,
        revision=None if is_local else getattr(base_model.config, "_commit_hash", None),
        num_rows=base_model.get_input_embeddings().weight.shape[0],
        suppressed=None if generation is None else generation.suppress_tokens,
        versions=versions_of(PACKAGES),
    )
