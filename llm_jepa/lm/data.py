"""TRL rows -> the columns of `views.Views`, the collators of a run, and checks of whole data sets before training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from datasets import Dataset, Value
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from ..core.errors import UserError
from .arguments import LLMJEPAConfig
from .batching import JEPACollator
from .limits import check_views
from .prompts import PromptForm, fitted, template_that_asks, turn_end
from .rows import USED_COLUMNS, parse_row
from .views import Views, add_view_columns

logger = logging.get_logger(__name__)
VIEW_COLUMNS = [field.name for field in fields(Views)]
# What `Views.remarks` says of a row, after "N of M rows: ".
REMARKS = {
    "joined_space": "the prompt ends in white space that is a part of the completion's first token. The LM row trains "
    "that token, but the target view begins without the space. Move the space from the end of the prompts to the "
    "start of the completions.",
    "answer_changed": "the chat template leaves out a part of the answer (a reasoning, for example), so that part is "
    "not trained. Move it into the field that the template renders, or change the template.",
}


def check_dataset(name: str, dataset: Any) -> None:
    """Raises UserError unless `dataset` is a non-empty map-style `datasets.Dataset` (or a dict of them)."""
    for part in dataset.values() if isinstance(dataset, dict) else [dataset]:
        if part is None and name == "eval":
            continue
        if not isinstance(part, Dataset):
            raise UserError(f"The {name} data is a {type(part).__name__}; pass a datasets.Dataset (no streaming).")
        if len(part) == 0:
            raise UserError(f"The {name} data set is empty; point it at a file with rows.")


def view_options(args: LLMJEPAConfig) -> dict[str, Any]:
    """The options of `views.build_views` in a configuration."""
    return {
        "context_view": args.context_view,
        "label_protocol": args.label_protocol,
        "max_length": args.max_length,
    }


def bank_collator(args: LLMJEPAConfig, pad_token_id: int, predictor_ids: Sequence[int]) -> JEPACollator:
    """The collator of the diagnostics: every pair has both sides in its row, whatever the objective is."""
    return JEPACollator(
        pad_token_id,
        predictor_ids,
        pad_to_multiple_of=args.pad_to_multiple_of if isinstance(args.pad_to_multiple_of, int) else 1,
        readout=args.readout,
        predictor_position=args.predictor_position,
        direction=args.direction,
    )


def training_collator(pairs: JEPACollator, args: LLMJEPAConfig, hidden_size: int = 0) -> JEPACollator:
    """The collator of the training: the views or tubes that the objective compares."""
    return replace(
        pairs,
        with_views=args.uses_views,
        with_tubes=args.uses_jepa and args.objective == "stp",
        row_cost=6 * hidden_size if args.share_rows else 0,
        target_placement=args.target_placement,
    )


def make_bank(dataset: Any, collator: JEPACollator, args: LLMJEPAConfig) -> list[dict[str, Tensor]]:
    """Batches of the first `diagnostics_pairs` rows of the (first) validation set; [] if there is nothing to measure.

    The model itself embeds them, whatever the target encoder. A baseline has no predictor tokens, so its context is
    read at the last content token.
    """
    if isinstance(dataset, dict):
        dataset = next(iter(dataset.values()))
    wanted = args.diagnostics_pairs
    if dataset is None or wanted == 0:
        return []
    if len(dataset) < 2:
        logger.warning("The validation set has one row: no diagnostics of the embedding space.")
        return []
    if len(dataset) < wanted:
        logger.warning(
            f"The diagnostics use {len(dataset)} validation pairs, not diagnostics_pairs={wanted}: recall and "
            "rank depend on the number of pairs, so compare them only with runs on as many."
        )
    rows = dataset.select(range(min(wanted, len(dataset)))).to_list()
    size = args.per_device_eval_batch_size
    return [collator(rows[i : i + size]) for i in range(0, len(rows), size)]


def warn_of_rows(dataset: Dataset, name: str) -> None:
    """Warn if a chat template renders only some of the rows, and about columns that nothing reads."""
    plain, both = _count_formats(dataset)
    chats = len(dataset) - plain
    if plain and chats:
        logger.warning(
            f"{chats} of {len(dataset)} {name} rows are conversations, rendered with the chat template, and {plain} "
            "are plain texts, trained as they are. If that is not meant, write all of them in one form."
        )
    ignored = [column for column in dataset.column_names if column not in USED_COLUMNS]
    if both:
        ignored.append(f"prompt and completion of {both} rows that have messages")
    if ignored:
        logger.warning(
            f"The {name} rows have columns that are not used: {', '.join(ignored)}. Used are "
            f"{', '.join(USED_COLUMNS)}; other wordings belong into views."
        )


def _count_formats(dataset: Dataset) -> tuple[int, int]:
    """The number of rows that are plain texts, and of rows that have both messages and a prompt."""
    columns = [column for column in ("messages", "prompt") if column in dataset.column_names]
    if columns == ["messages"]:
        return 0, 0
    if columns == ["prompt"] and dataset.features["prompt"] == Value("string"):  # no need to look at each row
        return len(dataset), 0
    plain = both = 0
    for row in dataset.select_columns(columns):
        has_messages, prompt = row.get("messages") is not None, row.get("prompt")
        plain += not has_messages and isinstance(prompt, str)
        both += has_messages and prompt is not None
    return plain, both


def view_columns(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    args: LLMJEPAConfig,
    model_config: PreTrainedConfig,
    collator: JEPACollator,
    form: PromptForm,
    name: str,
) -> Dataset:
    """The columns of `views.Views`, and with `group_by_length` the length of each packed row.

    Raises UserError for a row without views, and for one longer than the model has positions.
    """
    warn_of_rows(dataset, name)
    dataset = dataset.map(
        add_view_columns,
        with_indices=True,
        fn_kwargs={"tokenizer": tokenizer, "form": form, **view_options(args)},
        num_proc=args.dataset_num_proc,
        load_from_cache_file=False,  # its key does not see a change in views.py or in a template's renderer
        remove_columns=dataset.column_names,
        desc=f"Building views of the {name} rows",
    )
    truncated = sum(dataset["truncated"])
    if truncated:
        logger.warning(f"{truncated} of {len(dataset)} {name} rows were cut to max_length={args.max_length} tokens.")
    for remark, count in Counter(remark for row in dataset["remarks"] for remark in row).items():
        logger.warning(f"{count} of {len(dataset)} {name} rows: {REMARKS[remark]}")
    check_views(
        model_config, dataset, f"{name} rows", len(collator.predictor_ids), "set max_length: {room}, or remove them"
    )
    if args.train_sampling_strategy == "group_by_length":
        collator = training_collator(collator, args)
        lengths = [sum(len(segment.ids) for segment in collator.example(row).segments) for row in dataset]
        dataset = dataset.add_column(args.length_column_name, lengths)
    return dataset


def settle_form(
    form: PromptForm, raw: Dataset, dataset: Dataset, tokenizer: PreTrainedTokenizerBase
) -> tuple[PromptForm, str | None]:
    """The form in which prompts are asked, and the chat template that is saved with the model (None: as it is).

    Args:
        form: `prompts.starting_form` of the rows.
        raw, dataset: the training rows, and the same rows as views.

    Raises UserError if the model could not learn where an answer ends. Warns if other tools, which see the template
    only, ask something that was not trained.
    """
    if form.format == "messages" and turn_end(tokenizer).is_missing:
        raise UserError(
            "The chat template writes nothing after an answer, so the model would not learn to stop; set "
            "chat_template_path to a template that closes the assistant turn."
        )
    form, misses = fitted(form, dataset["prompt_fits"])
    if misses:
        logger.warning(
            f"{misses} of {len(dataset)} train rows do not begin with the prompt that will be asked, token for token: "
            "the end of the prompt depends on the answer (on its first word, or on a reasoning). The model was not "
            "trained to continue what it will be asked there."
        )
    if form.format == "text" or form.ends == "generation_prompt":
        return form, None
    prompts = []
    for index in range(min(len(raw), 100)):
        row = parse_row(raw[index], f"row {index}")
        prompts.append({"prompt": row.prompt, "chat_template_kwargs": row.render_kwargs})
    template = template_that_asks(tokenizer, prompts)
    if template is None:
        logger.warning(
            "The chat template's generation prompt is not what these rows train, and no fixed text can take its place. "
            "llm-jepa asks what was trained; other tools, which use the template, do not."
        )
    else:
        logger.warning(
            "The chat template's generation prompt is not where these answers begin. The saved template asks with the "
            "text that it puts in front of an answer in training."
        )
    return form, template
