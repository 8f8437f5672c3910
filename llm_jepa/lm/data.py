"""TRL rows -> the columns of `views.Views`, the collators of a run, and checks of whole data sets before training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from datasets import Dataset, Features, IterableDataset, List, Value
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from ..core.checks import check_batches
from ..core.errors import UserError
from ..core.sources import RowStream
from .arguments import LLMJEPAConfig, check_targets, pairs_compared
from .batching import JEPACollator
from .formats import USED_COLUMNS, count_formats, notes_on_formats, unused_columns
from .limits import check_views
from .prompts import TRAINED, PromptForm, fitted, starting_form, template_that_asks, turn_end
from .rows import parse_row
from .views import NoCompletionLeft, Views, add_view_columns

logger = logging.get_logger(__name__)
WINDOW = 1000  # rows; what is checked on all rows of a data set is checked on the first rows of a stream
VIEW_COLUMNS = [field.name for field in fields(Views)]
TOKENS = "tokens_without_completion"  # while views are built: the length of a row that max_length leaves no completion
_TYPES = {
    "list[int]": List(Value("int64")),
    "list[list[int]]": List(List(Value("int64"))),
    "int": Value("int64"),
    "bool": Value("bool"),
    "list[str]": List(Value("string")),
    "PromptFits": Value("string"),
}
# Written out, because the first rows may all be empty.
FEATURES = Features({field.name: _TYPES[str(field.type)] for field in fields(Views)} | {TOKENS: Value("int64")})
# What `Views.remarks` says of a row, after "N of M rows: ".
REMARKS = {
    "joined_space": "the prompt ends in white space that is a part of the completion's first token. The LM row trains "
    "that token, but the target view begins without the space. Move the space from the end of the prompts to the "
    "start of the completions.",
    "answer_changed": "the chat template leaves out a part of the answer (a reasoning, for example), so that part is "
    "not trained. Move it into the field that the template renders, or change the template.",
    "tools_left_out": "the chat template writes nothing of the row's tools or tool calls, so they are not trained; use "
    "a template that renders them.",
    "stops_early": "a token at which generation stops is a trained token before the end of the answer (eos inside a "
    "turn, for example), so answers will be cut there. Choose another eos token, or another template.",
}


def check_dataset(name: str, dataset: Any) -> None:
    """Raises UserError unless `dataset` is a non-empty map-style `datasets.Dataset` (or a dict of them).

    Training data may also be a `datasets.IterableDataset`.
    """
    for part in dataset.values() if isinstance(dataset, dict) else [dataset]:
        if (part is None and name == "eval") or (isinstance(part, IterableDataset) and name == "train"):
            continue
        if not isinstance(part, Dataset):
            stream = " (only training data are streamed)" if name == "eval" else ""
            raise UserError(f"The {name} data is a {type(part).__name__}; pass a datasets.Dataset{stream}.")
        if len(part) == 0:
            raise UserError(f"The {name} data set is empty; point it at a file with rows.")


def view_options(args: LLMJEPAConfig) -> dict[str, Any]:
    """The options of `views.build_views` in a configuration."""
    return {
        "context_view": args.context_view,
        "label_protocol": args.label_protocol,
        "max_length": args.max_length,
        "max_row_pairs": args.max_row_pairs,
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
    """Warn of rows in recognized formats, of rows in another form than the rest, and of columns that nothing reads."""
    counts, both = count_formats(dataset)
    for note in notes_on_formats(counts, f"{name} rows"):
        logger.warning(note)
    plain, chats = counts["text"], counts.total() - counts["text"]
    if plain and chats:
        logger.warning(
            f"{chats} of {len(dataset)} {name} rows are conversations, rendered with the chat template, and {plain} "
            "are plain texts, trained as they are. If that is not meant, write all of them in one form."
        )
    ignored = unused_columns(dataset, counts)
    wordings = [column for column in ignored if column.startswith("paraphrase")]
    if both:
        ignored.append(f"prompt and completion of {both} rows that have messages")
    if ignored:
        logger.warning(
            f"The {name} rows have columns that are not used: {', '.join(ignored)}. Used are "
            f"{', '.join(USED_COLUMNS)}; other wordings belong in views (columns: {{views: {[*wordings, 'NAME'][0]}}})."
        )


@dataclass(frozen=True)
class RowCounts:
    """What `max_length` did to the rows of a data set."""

    rows: int  # that are used
    cut: int  # of these, the ones that lost their end
    left_out: int  # not among these

    def __str__(self) -> str:
        notes = [f"{self.cut} of them cut to max_length"] if self.cut else []
        notes += [f"{self.left_out} more left out, longer than max_length"] if self.left_out else []
        return f"{self.rows} ({'; '.join(notes)})" if notes else str(self.rows)


def view_columns(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: LLMJEPAConfig, form: PromptForm, name: str
) -> tuple[Dataset, RowCounts]:
    """The columns of `views.Views`, without the rows that `too_long: drop` leaves out. Warns of every row it changes.

    Raises UserError for a row without views, and for rows that are longer than `too_long` allows: all of them in one
    message.
    """
    warn_of_rows(dataset, name)
    views = dataset.map(
        views_or_length,
        with_indices=True,
        fn_kwargs={"tokenizer": tokenizer, "form": form, **view_options(args)},
        num_proc=args.dataset_num_proc,
        load_from_cache_file=False,  # its key does not see a change in views.py or in a template's renderer
        remove_columns=dataset.column_names,
        features=FEATURES,
        desc=f"Building views of the {name} rows",
    )
    tokens = list(views[TOKENS])  # read once: a column is read from the table at every index
    hopeless = [index for index, count in enumerate(tokens) if count]
    cut = [index for index, is_cut in enumerate(views["truncated"]) if is_cut and not tokens[index]]
    too_long = sorted([*hopeless, *cut]) if args.too_long != "truncate" else hopeless
    if too_long and args.too_long != "drop":
        raise UserError(_too_long_message(dataset, views, too_long, args, name))
    if too_long:
        cut = []
        left = sorted(set(range(len(views))) - set(too_long))
        logger.warning(
            f"too_long: drop leaves out {len(too_long)} of {len(views)} {name} rows, which are longer than "
            f"max_length={args.max_length} tokens ({_numbers(too_long)})."
        )
        if not left:
            raise UserError(f"too_long: drop leaves no {name} row; raise max_length={args.max_length}.")
        views = views.select(left)
    if cut:
        logger.warning(f"{len(cut)} of {len(views)} {name} rows were cut to max_length={args.max_length} tokens.")
    for remark, count in Counter(remark for row in views["remarks"] for remark in row).items():
        logger.warning(f"{count} of {len(views)} {name} rows: {REMARKS[remark]}")
    return views.remove_columns(TOKENS), RowCounts(len(views), len(cut), len(too_long))


def views_or_length(row: dict[str, Any], index: int, **options: Any) -> dict[str, Any]:
    """The views of a row. Of a row whose prompt fills max_length: empty views, and its length."""
    try:
        return {**add_view_columns(row, index, **options), TOKENS: 0}
    except NoCompletionLeft as error:
        if error.tokens is None:
            raise
        empty: dict[str, Any] = {name: [] if isinstance(feature, List) else 0 for name, feature in FEATURES.items()}
        return {**empty, "prompt_fits": "neither", "index": index, "truncated": True, TOKENS: error.tokens}


def _too_long_message(dataset: Dataset, views: Dataset, too_long: list[int], args: LLMJEPAConfig, name: str) -> str:
    """How many rows are too long, which ones, and what to do."""
    prompt = parse_row(dataset[too_long[0]], f"row {too_long[0]}").prompt
    text = prompt if isinstance(prompt, str) else str(prompt[-1].get("content"))
    which = f"{_numbers(too_long)}; the first one: {' '.join(text.split())[:60]!r}"
    count = f"{len(too_long)} of {len(views)} {name} rows"
    if args.too_long == "refuse":
        return (
            f"{count} are longer than max_length={args.max_length} tokens ({which}); raise max_length, or set "
            "too_long: drop (leave them out) or truncate (cut their ends)."
        )
    longest = max(views[TOKENS])
    return (
        f"{count} have a prompt that fills max_length={args.max_length}, so no completion token is left ({which}); "
        f"raise max_length (the longest of these rows has {longest} tokens), shorten them, or set too_long: drop."
    )


def _numbers(rows: list[int]) -> str:
    """`row 7`, or `rows 1, 2, 3, 4, 5, ...`, counted from 0."""
    more = ", ..." if len(rows) > 5 else ""
    return f"row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows[:5]))}{more}"


@dataclass(frozen=True)
class Preparation:
    """What is known of the rows of a run besides their views.

    form, template: of `settle_form`.
    streamed: the training rows, if they are a stream. The counts of `train` are then those of its first rows.
    """

    counts: dict[str, RowCounts]
    form: PromptForm
    template: str | None
    streamed: StreamedRows | None = None


@dataclass(frozen=True)
class StreamedRows:
    """A stream of training rows, and what its first rows say of it.

    raw, views: the first rows; views are without those that are left out.
    counts: of the first rows.
    form: `prompts.starting_form` of the first rows.
    """

    stream: RowStream
    raw: Dataset
    views: Dataset
    counts: RowCounts
    form: PromptForm


def prepare_rows(
    train: Dataset | RowStream, validation: Dataset | None, tokenizer: PreTrainedTokenizerBase, args: LLMJEPAConfig
) -> tuple[Dataset, Dataset | None, Preparation]:
    """The views of both data sets, before a model is loaded. Sets the pad token of the tokenizer.

    Of a stream, the views of its first rows.

    Raises UserError for rows and batches that cannot be trained as `args` says.
    """
    set_pad_token(tokenizer, args)
    counts: dict[str, RowCounts] = {}
    with args.main_process_first(desc="building views"):
        if isinstance(train, RowStream):
            streamed: StreamedRows | None = (first := first_views(train, tokenizer, args))
            raw, views, counts["train"], form = first.raw, first.views, first.counts, first.form
        else:
            streamed, raw, form = None, train, form_of_rows(train, tokenizer)
            views, counts["train"] = view_columns(raw, tokenizer, args, form, "train")
        if validation is not None:
            validation, counts["eval"] = view_columns(validation, tokenizer, args, form, "eval")
    form, template = settle_form(form, raw, views, tokenizer)
    evaluated = len(validation) if validation is not None and args.eval_strategy != "no" else 0
    compares = args.uses_views and (args.objective == "info_nce" or args.regularizer is not None)
    rows = len(views) if streamed is None else None
    check_batches(args, rows, evaluated, compares_rows=compares, step=pairs_compared(args))
    check_targets(args, views)
    return views, validation, Preparation(counts, form, template, streamed)


def first_views(stream: RowStream, tokenizer: PreTrainedTokenizerBase, args: LLMJEPAConfig) -> StreamedRows:
    """The first rows of a stream as views, enough of them for two batches at least; says how many.

    Raises UserError if there are none, and like `view_columns`.
    """
    raw = stream.first(max(WINDOW, 2 * pairs_compared(args)))
    logger.warning(
        f"Streaming {stream.name}: the form of the prompts, different targets, unused columns, and notes on rows are "
        f"those of its first {len(raw)} rows. Later rows are checked when their step comes."
    )
    form = form_of_rows(raw, tokenizer)
    views, counts = view_columns(raw, tokenizer, args, form, "train")
    return StreamedRows(stream, raw, views, counts, form)


def form_of_rows(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> PromptForm:
    """What the prompts of the rows share; `TRAINED` if the rows are views already."""
    if set(VIEW_COLUMNS) <= set(rows.column_names):
        return TRAINED
    return starting_form((parse_row(row, f"row {index}") for index, row in enumerate(rows)), tokenizer)


def fit_to_model(
    dataset: Dataset, args: LLMJEPAConfig, model_config: PreTrainedConfig, collator: JEPACollator, name: str
) -> Dataset:
    """View columns, and with `group_by_length` the length of each packed row.

    Raises UserError for a row that is longer than the model has positions.
    """
    check_views(
        model_config, dataset, f"{name} rows", len(collator.predictor_ids), "set max_length: {room}, or remove them"
    )
    if args.train_sampling_strategy == "group_by_length" and args.length_column_name not in dataset.column_names:
        collator = training_collator(collator, args)
        lengths = [sum(len(segment.ids) for segment in collator.example(row).segments) for row in dataset]
        dataset = dataset.add_column(args.length_column_name, lengths)
    return dataset


def set_pad_token(tokenizer: PreTrainedTokenizerBase, args: LLMJEPAConfig) -> None:
    """The recipe's pad token, the tokenizer's, or else eos as in the published code. Raises UserError if it is new."""
    pad_token = args.pad_token or tokenizer.pad_token or tokenizer.eos_token
    if pad_token not in tokenizer.get_vocab():
        raise UserError(f"The pad token {pad_token!r} is not in the tokenizer's vocabulary; set pad_token to one.")
    tokenizer.pad_token = pad_token


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
    prompts = [parse_row(raw[index], f"row {index}").question for index in range(min(len(raw), 100))]
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
