"""The training data of a streamed run: each row of the stream becomes its views when its step comes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..core.errors import UserError
from ..core.streaming import EndlessRows, Prepared
from .arguments import LLMJEPAConfig
from .data import TOKENS, StreamedRows, view_options, views_or_length
from .limits import check_views
from .prompts import PromptForm


@dataclass(frozen=True)
class RowViews:
    """Row of a stream -> its views, as `data.view_columns` makes them of the rows of a data set.

    Raises UserError for a row that cannot be trained as `args` says. The message names its file and line.
    """

    tokenizer: PreTrainedTokenizerBase
    form: PromptForm
    args: LLMJEPAConfig
    config: PreTrainedConfig  # of the model
    num_predictor_tokens: int

    def __call__(self, place: str, index: int, row: dict[str, Any]) -> Prepared:
        options = view_options(self.args)
        views = views_or_length(row, index, where=place, tokenizer=self.tokenizer, form=self.form, **options)
        hopeless: int = views.pop(TOKENS)
        if hopeless or views["truncated"]:
            if self.args.too_long == "drop":
                return Prepared(None)
            self._check_length(place, hopeless)
        advice = "set max_length: {room}, or remove it"
        check_views(self.config, [views], f"rows ({place})", self.num_predictor_tokens, advice)
        return Prepared(views, bool(views["truncated"]))

    def _check_length(self, place: str, hopeless: int) -> None:
        limit = self.args.max_length
        if self.args.too_long == "refuse":
            raise UserError(
                f"{place}: the row is longer than max_length={limit} tokens; raise max_length, or set too_long: drop "
                "(leave it out) or truncate (cut its end)."
            )
        if hopeless:
            raise UserError(
                f"{place}: the prompt fills max_length={limit}, so no completion token is left; raise max_length (the "
                f"row has {hopeless} tokens), shorten it, or set too_long: drop."
            )


def endless_rows(rows: StreamedRows, prepare: RowViews) -> EndlessRows:
    """The training data of a run. Its order depends on data_seed, or else on seed."""
    args = prepare.args
    seed = args.seed if args.data_seed is None else args.data_seed
    return EndlessRows(rows.stream, prepare, shuffle_buffer=rows.stream.shuffle_buffer, seed=seed)
