"""Embeddings of prompts and completions, as a model was trained to compute them, for search and for analysis."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..core.diagnostics import evaluating
from ..core.errors import UserError
from .batching import rows_apart, with_predictors
from .formats import format_of
from .limits import check_sequences
from .loading import load_to_use
from .predictor_tokens import predictor_token_ids
from .prompts import Prompt, conversation, form_of, is_asked_as_text, other_format, split_prompt
from .reading import embed_targets, without_router_loss
from .rows import Message, stand_in_answer, with_kwargs
from .views import ContextView, build_views


class Reading(NamedTuple):
    """How a model's views are read; a part of `llm_jepa` in its config. The defaults are those of any other model."""

    num_predictor_tokens: int = 0
    context_view: ContextView = "prefix"
    readout: str = "last"
    readout_layer: int = -1
    predictor_position: str = "last"
    direction: str = "forward"


def reading_of(config: PreTrainedConfig) -> Reading:
    """How a model's views were read in training."""
    record = getattr(config, "llm_jepa", None) or {}
    return Reading(**{name: record[name] for name in Reading._fields if name in record})


class RowSides(NamedTuple):
    """The sequences of a row. lacks: the side that it does not have, whose sequence is that of a stand-in."""

    prompts: list[list[int]]  # other wordings included
    completions: list[list[int]]
    lacks: str | None  # "prompt" or "completion"
    question: Prompt


class Sides:
    """Prompts and completions, of a row or alone -> the token sequences whose states are read.

    Predictor tokens are included: of prompts with `direction: forward`, of completions with `reverse`. Raises UserError
    if they are missing.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
        if (getattr(config, "llm_jepa", None) or {}).get("is_stripped"):
            raise UserError("This model was exported with --strip-predictor, so it cannot embed; take the original.")
        self.tokenizer = tokenizer
        self.form = form_of(config)
        self.reading = reading_of(config)
        self._predictor_ids = predictor_token_ids(tokenizer, self.reading.num_predictor_tokens)

    def prompt(self, prompt: Prompt, where: str) -> list[int]:
        """The sequence of a prompt alone; see `Embedder.encode_prompts`."""
        row = {"text": prompt} if isinstance(prompt, str) else _row_of(prompt)
        return self.of_row(row, where).prompts[0]

    def completion(self, completion: str | list[Message], where: str) -> list[int]:
        """The sequence of a completion alone; see `Embedder.encode_completions`."""
        return self.of_row({"completion": completion}, where).completions[0]

    def of_row(self, row: Mapping[str, Any], where: str) -> RowSides:
        """The sequences of both sides. Raises UserError, naming `where`, for a row without any."""
        lacks, whole = self._whole(dict(row), where)
        views = build_views(whole, self.tokenizer, context_view=self.reading.context_view, where=where)
        contexts, targets = views.contexts, views.targets
        if self.reading.direction == "forward":
            contexts = [self._predicting(ids, views.context_header) for ids in contexts]
        else:
            targets = [self._predicting(ids, views.target_header) for ids in targets]
        return RowSides(contexts, targets, lacks, whole.get("messages") or whole["prompt"])

    def _predicting(self, ids: list[int], header: int) -> list[int]:
        return with_predictors(ids, self._predictor_ids, self.reading.predictor_position, header)

    def _whole(self, row: dict[str, Any], where: str) -> tuple[str | None, dict[str, Any]]:
        """(the side that the row lacks, the row with a stand-in for it)."""
        has_prompt = format_of(row) is not None
        is_text = is_asked_as_text(self.tokenizer, self.form)
        system, kwargs = self.form.system, self.form.render_kwargs
        if not has_prompt and isinstance(row.get("text"), str):
            if is_text:
                row = {**row, "prompt": row["text"]}
            else:
                row = {"chat_template_kwargs": kwargs, **row, "prompt": conversation(system, row["text"])}
        elif not has_prompt and row.get("completion"):
            completion = row["completion"]
            if isinstance(completion, str) and is_text:
                # The stand-in ends with a token that none of the completion joins.
                return "prompt", {**row, "prompt": f"x{self.tokenizer.eos_token or ' '}"}
            turns = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
            stand_in = {"chat_template_kwargs": kwargs, **row, "prompt": conversation(system, "x")}
            return "prompt", {**stand_in, "completion": turns}
        has_answer, row = stand_in_answer(row, self.tokenizer.eos_token, where)
        return (None if has_answer else "completion"), row


def _row_of(prompt: Prompt) -> dict[str, Any]:
    """Messages, or a row without completion, as a row."""
    turns, kwargs = split_prompt(prompt, "a prompt")
    row = with_kwargs(turns, kwargs)
    return row if isinstance(row, dict) else {"prompt": row}


class EmbeddedRows(NamedTuple):
    """Of `Embedder.encode_rows`. views: "context" and "target", [P, D] each, or the one that every row has."""

    views: dict[str, Tensor]
    without_completion: int
    without_prompt: int
    note: str | None  # on rows in another format than the model was trained on


class Embedder:
    """Embeds prompts and completions with one model.

        embedder = Embedder.from_pretrained("runs/mine")
        prompts = embedder.encode_prompts(["lines with a vowel"])  # [N, D] float32, on the CPU
        completions = embedder.encode_completions([".*[aeiou].*"])
        scores = torch.nn.functional.cosine_similarity(prompts, completions)

    The vectors are those of training and of `llm-jepa embed`: the same chat template, system turn, predictor tokens,
    layer and read-out. They are not normalized. Each text is a sequence of its own, so no vector depends on the other
    texts of its batch.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises UserError for a tokenizer that is not that of the model."""
        self.model, self.sides = model, Sides(tokenizer, model.config)

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        *,
        revision: str = "main",
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Embedder:
        """A model from a folder or the Hub.

        Args:
            device: by default the GPU if there is one.
            dtype: by default bfloat16 on a GPU, and float32 elsewhere.

        Raises UserError if it cannot be loaded.
        """
        return cls(*load_to_use(source, revision=revision, device=device, dtype=dtype))

    def encode_prompts(self, prompts: Sequence[Prompt], *, batch_size: int = 32, progress: bool = False) -> Tensor:
        """[N, D] float32 on the CPU, in the order given.

        Args:
            prompts: texts, messages, or rows `{"prompt": ..., "tools": ..., "chat_template_kwargs": ...}`. A text is
                asked in the format of the training rows: of a model that was trained on messages it becomes a user
                turn, with the system turn that all training rows shared.

        Raises UserError for an empty prompt, and for one that the model cannot read.
        """
        sequences = [self.sides.prompt(prompt, f"prompt {i}") for i, prompt in enumerate(_several(prompts))]
        return self._encode(sequences, "prompts", batch_size, progress)

    def encode_completions(
        self, completions: Sequence[str | list[Message]], *, batch_size: int = 32, progress: bool = False
    ) -> Tensor:
        """[N, D] float32 on the CPU, in the order given.

        Args:
            completions: texts as the training rows hold them, or `[{"role": "assistant", "content": ...}]`. If the rows
                were plain texts, the white space that begins a completion belongs to it.

        Raises UserError for an empty completion, and for one that the model cannot read.
        """
        texts = enumerate(_several(completions))
        sequences = [self.sides.completion(text, f"completion {i}") for i, text in texts]
        return self._encode(sequences, "completions", batch_size, progress)

    def encode_rows(
        self, rows: Sequence[Mapping[str, Any]], *, batch_size: int = 32, progress: bool = False
    ) -> EmbeddedRows:
        """Both views of each row, in the forms that training takes: every context of a row with every target of it.

        A row may have only a prompt, only a `text` (a prompt in the format of the training rows) or only a completion.
        Then only the views that all rows have are embedded.

        Raises UserError that names a row which has neither, or which the model cannot read.
        """
        parts = [self.sides.of_row(row, f"row {index}") for index, row in enumerate(rows)]
        without_completion = sum(part.lacks == "completion" for part in parts)
        without_prompt = sum(part.lacks == "prompt" for part in parts)
        if without_completion and without_prompt:
            raise UserError(
                f"{without_completion} rows have no completion and {without_prompt} have no prompt, so no view is in "
                "all of them; embed them as two files."
            )
        is_forward = self.sides.reading.direction == "forward"
        contexts, targets = [], []
        for part in parts:
            predicting, predicted = part.prompts, part.completions
            if not is_forward:
                predicting, predicted = predicted, predicting
            for context, target in itertools.product(predicting, predicted):
                contexts.append(context)
                targets.append(target)
        views = {}
        if not (without_prompt if is_forward else without_completion):
            views["context"] = self._encode(contexts, "rows", batch_size, progress)
        if not (without_completion if is_forward else without_prompt):
            views["target"] = self._encode(targets, "rows", batch_size, progress)
        note = other_format([part.question for part in parts if part.lacks != "prompt"], self.sides.form)
        return EmbeddedRows(views, without_completion, without_prompt, note)

    def _encode(self, sequences: Sequence[list[int]], name: str, batch_size: int, progress: bool) -> Tensor:
        """[N, D] of token sequences; equal ones are read once."""
        check_sequences(self.model.config, sequences, name, "shorten them, or leave them out")
        # Longest first, so that a batch that does not fit into memory comes at the start.
        order = sorted(set(map(tuple, sequences)), key=lambda sequence: (-len(sequence), sequence))
        pad = self.sides.tokenizer.pad_token_id or 0  # no state sees it
        layer, readout = self.sides.reading.readout_layer, self.sides.reading.readout
        vectors: dict[tuple[int, ...], Tensor] = {}
        with (
            evaluating(self.model),
            without_router_loss(self.model),
            tqdm(total=len(order), desc="Embedding", disable=not progress, unit="text") as bar,
        ):
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                rows = {key: value.to(self.model.device) for key, value in rows_apart(batch, pad, readout).items()}
                states = embed_targets(self.model, rows, layer=layer).float().cpu()  # [B, D]
                vectors.update(zip(batch, states, strict=True))
                bar.update(len(batch))
        return torch.stack([vectors[tuple(sequence)] for sequence in sequences])


def _several(texts: Sequence[Any]) -> Sequence[Any]:
    if isinstance(texts, str):
        raise UserError(f"Give a list of texts: [{texts[:40]!r}], not one string.")
    if not len(texts):
        raise UserError("There is no text to embed; give a list of at least one.")
    return texts
