"""The page of one or two language models: answers to one prompt in several wordings, and a map of the embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.errors import UserError, one_line
from ..lm.embedder import Embedder
from ..lm.inference import Generation, generate
from ..lm.loading import load_to_use
from ..lm.prompts import as_prompts, form_of
from .page import block, error_line, events, hue, lines_of, shown

MAX_PROMPTS, LONGEST_PROMPT, MAX_NEW_TOKENS = 32, 2000, 256
SIDE = 300  # of a map


@dataclass
class Model:
    """A language model on the page."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@dataclass
class Reply:
    """What a model makes of the prompts. no_map: why there are no embeddings."""

    name: str
    answers: list[Generation]
    embeddings: Tensor | None  # [P, D]
    no_map: str = ""

    @property
    def texts(self) -> list[str]:
        return [" ".join(answer.text.split()) for answer in self.answers]

    @property
    def groups(self) -> list[int]:
        """[P]: equal answers have the same number."""
        numbers: dict[str, int] = {}
        return [numbers.setdefault(text, len(numbers)) for text in self.texts]


def ask(model: Model, prompts: Sequence[str], *, max_new_tokens: int) -> Reply:
    """Greedy answers and embeddings. Raises UserError for a prompt that the model cannot read."""
    form = form_of(model.model.config)
    asked = as_prompts(prompts, model.tokenizer, form)
    answers = generate(model.model, model.tokenizer, asked, max_new_tokens=max_new_tokens)
    try:
        embeddings = Embedder(model.model, model.tokenizer).encode_prompts(prompts)
    except UserError as error:  # a model without its predictor tokens still answers
        return Reply(model.name, answers, None, one_line(error))
    return Reply(model.name, answers, embeddings)


def compare(models: Sequence[Model], text: str | None, max_new_tokens: float) -> str:
    """HTML of all answers, whether they agree, and the maps; or one line that says what is wrong."""
    try:
        prompts = lines_of(text, "prompts", most=MAX_PROMPTS, longest=LONGEST_PROMPT)
        if not prompts:
            raise UserError("There is no prompt: write one, and below it the same in other words, one a line.")
        count = int(min(max(max_new_tokens, 1), MAX_NEW_TOKENS))
        return render(prompts, [ask(model, prompts, max_new_tokens=count) for model in models])
    except Exception as error:  # a model's own code may raise anything, and the page goes on
        return error_line(error)


def pca(embeddings: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[P, D] -> places [P, 2] on the first two principal axes, and the share [2] of the variance on each.

    An axis points to where its largest loading is positive, so that the map does not flip from one run to the next.
    """
    centred = embeddings - embeddings.mean(axis=0)
    _, lengths, axes = np.linalg.svd(centred, full_matrices=False)
    axes = axes[:2]
    signs = np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)])
    places = np.zeros((len(embeddings), 2))
    places[:, : len(axes)] = centred @ (axes * signs[:, None]).T
    total = float((lengths**2).sum())
    shares = np.zeros(2)
    if total > 0:
        shares[: len(axes)] = lengths[:2] ** 2 / total
    return places, shares


# -- what the page shows ----------------------------------------------------------------------------------------------


def render(prompts: Sequence[str], replies: Sequence[Reply]) -> str:
    """HTML: who agrees, a table of prompts by models, and a map for each model."""
    head = "".join(f"<th>{shown(reply.name)}</th>" for reply in replies)
    rows = []
    for index, prompt in enumerate(prompts):
        cells = "".join(f"<td>{_answer(reply, index)}</td>" for reply in replies)
        rows.append(f"<tr><td>{index + 1}</td><td>{shown(prompt)}</td>{cells}</tr>")
    table = f"<table><tr><th></th><th>prompt</th>{head}</tr>{''.join(rows)}</table>"
    maps = "".join(f"<div>{_map(reply)}</div>" for reply in replies)
    return block(f'<div class="facts">{_agreement(replies)}</div>{table}<div class="maps">{maps}</div>')


def _agreement(replies: Sequence[Reply]) -> str:
    """Facts: how many different answers each model gives; how often two models say the same."""
    facts = []
    for reply in replies:
        number, total, name = len(set(reply.texts)), len(reply.texts), shown(reply.name)
        meaning = f"different answers of {name} to {total} prompts"
        if number == 1:
            meaning = f"answer of {name} to all prompts: they agree"
        facts.append((str(number), meaning))
    if len(replies) == 2:
        same = sum(a == b for a, b in zip(replies[0].texts, replies[1].texts, strict=True))
        facts.append((f"{same} of {len(replies[0].texts)}", "prompts get the same answer from both"))
    return "".join(f"<span><b>{value}</b><small>{meaning}</small></span>" for value, meaning in facts)


def _answer(reply: Reply, index: int) -> str:
    answer = reply.answers[index]
    cut = "" if answer.stopped else ' <small title="it did not stop by itself">cut</small>'
    return f'<span class="answer" style="{hue(reply.groups[index])}">{shown(answer.text) or "(nothing)"}</span>{cut}'


def _map(reply: Reply) -> str:
    """SVG of the prompts in the plane of their first two principal axes; equal answers have one colour."""
    title = f"<h2>{shown(reply.name)}</h2>"
    if reply.embeddings is None:
        return f'{title}<p class="soft">No map: {shown(reply.no_map)}</p>'
    if len(reply.embeddings) < 2:
        return f'{title}<p class="soft">A map needs two prompts or more.</p>'
    places, (first, second) = pca(reply.embeddings.double().numpy())
    extent = float(np.abs(places).max()) or 1.0
    dots = []
    for index, (x, y) in enumerate(places):
        cx, cy = SIDE / 2 + (SIDE / 2 - 28) * x / extent, SIDE / 2 - (SIDE / 2 - 28) * y / extent
        dots.append(
            f'<circle class="dot" cx="{cx:.1f}" cy="{cy:.1f}" r="6" style="{hue(reply.groups[index])};'
            f'fill:hsl(var(--h) 60% 58%)"/><text x="{cx + 9:.1f}" y="{cy + 4:.1f}" font-size="12">{index + 1}</text>'
        )
    axes = f'<path d="M0 {SIDE / 2}H{SIDE}M{SIDE / 2} 0V{SIDE}" stroke="currentColor" stroke-opacity="0.15"/>'
    picture = f'<svg viewBox="0 0 {SIDE} {SIDE}" role="img" aria-label="map of the prompts">{axes}{"".join(dots)}</svg>'
    note = (
        f"Embeddings of the prompts, first two principal axes: {100 * first:.0f} % and {100 * second:.0f} % of their "
        f"variance. Mean cosine of two prompts: {_mean_cosine(reply.embeddings):.2f}. Each map has its own scale."
    )
    return f'{title}{picture}<p class="soft">{note}</p>'


def _mean_cosine(embeddings: Tensor) -> float:
    """Over all pairs of different rows of [P, D], P >= 2."""
    unit = F.normalize(embeddings.double(), dim=-1)
    count = len(unit)
    return float(((unit @ unit.T).sum() - count) / (count * (count - 1)))


def build(sources: Sequence[str]) -> gr.Blocks:
    """The page. Raises UserError if one of the sources is not a causal language model."""
    names = [Path(source).name for source in sources]
    if len(set(names)) < len(names):
        names = [f"{letter}: {name}" for letter, name in zip("AB", names, strict=True)]
    return build_page([Model(name, *load_to_use(source)) for name, source in zip(names, sources, strict=True)])


def build_page(models: Sequence[Model]) -> gr.Blocks:
    """The page of loaded models."""
    name = " and ".join(model.name for model in models)
    with gr.Blocks(title=f"{name} · llm-jepa", analytics_enabled=False) as page:
        gr.HTML(
            block(
                f"<h1>{shown(name)}</h1><p class='soft'>One request in several wordings: do the answers agree, and how "
                "near are the embeddings?</p>"
            )
        )
        prompts = gr.Textbox(
            label="A prompt, and the same in other words, one a line", lines=4, elem_id="prompts",
            placeholder="lines with a vowel\nlines that contain a vowel",
        )  # fmt: skip
        with gr.Row():
            length = gr.Slider(1, MAX_NEW_TOKENS, 64, step=1, label="Longest answer, in tokens")
            start = gr.Button("Compare", variant="primary", elem_id="compare")
        result = gr.HTML(block('<p class="soft">The answers and the maps appear here.</p>'), elem_id="result")

        def on_compare(text: str, max_new_tokens: float) -> str:
            return compare(models, text, max_new_tokens)

        start.click(on_compare, [prompts, length], result, **events())
    return page
