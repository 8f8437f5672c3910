"""The page of a VL-JEPA: watch a film, and ask about it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import gradio as gr

from ..core.errors import UserError
from ..stream.clips import read_clip
from ..stream.decoder import Caption
from ..stream.frames import Frame, Limits, held, windows
from ..stream.opening import open_frames
from ..vl.inference import VLJEPA, Match
from ..vl.watch import Watcher, WatchSettings
from ..vl.watch_page import Timeline, clock
from ..vl.y_decoder import MemoryProjection, YDecoder, fingerprint
from .page import block, error_line, events, hue, lines_of, shown

LIMITS = Limits(max_frames=50_000, max_seconds=600.0, max_decode_s=10.0)  # of a film on the page
MAX_TEXTS, LONGEST_TEXT = 100, 300
EVERY_S = 0.25  # between two pictures of the page
WIDTH, HEIGHT = 640, 150  # of the curve


class Watching:
    """A film that is being watched, one window after the other; what the page shows of it."""

    def __init__(self, model: VLJEPA, settings: WatchSettings) -> None:
        self.captions: list[Caption] = []  # the last one may be provisional
        self.timeline = Timeline()
        self.seconds = 0.0
        self.is_over = False
        self._settings = settings
        self._watcher = Watcher(model, settings, on_caption=self._hear, timeline=self.timeline)

    @property
    def num_windows(self) -> int:
        return self._watcher.num_windows

    @property
    def num_decodes(self) -> int:
        return self._watcher.num_decodes

    @property
    def num_saved(self) -> int:
        """Decodes avoided, compared with one for every window."""
        return self.num_windows - self.num_decodes

    def run(self, path: str) -> Iterator[None]:
        """Watch the film; yields after each window. Raises UserError, and `ModelError` of the watcher."""
        settings = self._settings
        with open_frames(Path(path), fps=settings.fps, live=False, limits=LIMITS) as frames:
            stream = windows(
                held(self._timed(frames), fps=settings.fps),
                num_frames=settings.num_frames, stride_s=settings.stride_s, fps=settings.fps,
            )  # fmt: skip
            for window in stream:
                self._watcher.step(window)
                yield
        if not self.num_windows:
            raise UserError("No frames: the film ended before it began.")
        self._watcher.finish()
        self.is_over = True

    def _timed(self, frames: Iterator[Frame]) -> Iterator[Frame]:
        for frame in frames:
            self.seconds = frame.time_s
            yield frame

    def _hear(self, caption: Caption) -> None:
        if self.captions and not self.captions[-1].final:
            self.captions.pop()
        self.captions.append(caption)


def watching(
    model: VLJEPA, path: str | None, query: str | None, labels: str | None, sensitivity: float
) -> Iterator[str]:
    """HTML of a film as it is watched, several times a second. Errors come as one line below what was seen before."""
    film: Watching | None = None
    try:
        if path is None:
            raise UserError("There is no film yet: upload one, record one, or choose an example.")
        yield block('<p class="soft">Opening the film …</p>')
        texts = lines_of(labels, "labels", most=MAX_TEXTS, longest=LONGEST_TEXT)
        asked = lines_of(query, "questions", most=1, longest=LONGEST_TEXT)
        settings = WatchSettings.resolve(
            model, query=asked[0] if asked else None, sensitivity=sensitivity, provisional=True
        )
        film = Watching(_with_labels(model, texts), settings)
        shown_at = 0.0
        for _ in film.run(path):
            if time.monotonic() - shown_at > EVERY_S:
                yield render(film)
                shown_at = time.monotonic()
        yield render(film)
    except Exception as error:  # a model's own code may raise anything, and the page goes on
        seen = render(film) if film is not None and film.num_windows else ""
        yield seen + error_line(error, path)


def answer(
    model: VLJEPA, path: str | None, question: str | None, candidates: str | None, start_s: float | None,
    end_s: float | None,
) -> str:  # fmt: skip
    """HTML of the candidates by their cosine to what the model predicts for the film and the question.

    start_s, end_s: of the part of the film; an empty field of the page is 0, which is its start and its end.
    """
    try:
        if path is None:
            raise UserError("There is no film yet: upload one, record one, or choose an example.")
        texts = lines_of(candidates, "candidates", most=MAX_TEXTS, longest=LONGEST_TEXT)
        if not texts:
            raise UserError("Give one candidate answer a line: the model compares them, it does not make them up.")
        asked = lines_of(question, "questions", most=1, longest=LONGEST_TEXT)
        num_frames = model.model.config.num_frames
        frames, _ = read_clip(Path(path), num_frames, start_s=start_s or None, end_s=end_s or None, limits=LIMITS)
        ranked = model.answer(frames, asked[0], texts) if asked else model.classify(frames, texts)
        return render_answers(ranked)
    except Exception as error:
        return error_line(error, path)


def _with_labels(model: VLJEPA, texts: Sequence[str]) -> VLJEPA:
    """The model, captioning with the nearest of these texts if there are any. Raises UserError without y_decoder."""
    if not texts:
        try:
            _ = model.y_decoder
        except UserError:
            raise UserError(
                "This model has no y_decoder, so it writes no captions: give labels to choose from."
            ) from None
        return model
    memory = MemoryProjection(model.embed_texts(texts).cpu(), tuple(texts))
    return VLJEPA(model.model, model.processor, y_decoder=YDecoder(fingerprint(model.model), memory))


# -- what the page shows ----------------------------------------------------------------------------------------------


def render(film: Watching) -> str:
    """HTML: how many decodes were saved, the curve with its cuts, and the captions."""
    facts = [
        (f"{film.num_saved}", "decodes saved"),
        (f"{film.num_decodes} of {film.num_windows}", "windows decoded"),
        (clock(film.seconds), "of film" if film.is_over else "of film so far"),
    ]
    head = "".join(f"<span><b>{value}</b><small>{meaning}</small></span>" for value, meaning in facts)
    return block(f'<div class="facts">{head}</div>{_curve(film)}<ol class="captions">{_captions(film.captions)}</ol>')


def render_answers(ranked: Sequence[Match]) -> str:
    """HTML: a bar for each candidate, the nearest first."""
    rows = []
    for index, match in enumerate(ranked):
        width = 100 * min(max(match.score, 0.0), 1.0)
        rows.append(
            f"<span{' class=first' if index == 0 else ''}>{shown(match.text)}</span>"
            f'<i style="width:{width:.1f}%"></i><span>{match.score:.2f}</span>'
        )
    note = "Cosines to what the model predicts, not probabilities. The best of wrong candidates is still wrong."
    return block(f'<div class="bars">{"".join(rows)}</div><p class="soft">{note}</p>')


def _curve(film: Watching) -> str:
    """SVG of the distances between neighbouring windows, with a dashed line at each cut."""
    points = film.timeline.distances
    end_s = max(film.seconds, 1.0)
    top = film.timeline.largest_distance or 1.0
    places = [(WIDTH * t / end_s, HEIGHT - 6 - (HEIGHT - 14) * distance / top) for t, distance in points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    area = f"{places[0][0]:.1f},{HEIGHT - 6} {line} {places[-1][0]:.1f},{HEIGHT - 6}" if places else ""
    cuts = "".join(
        f'<line class="cut" x1="{WIDTH * c.start_s / end_s:.1f}" x2="{WIDTH * c.start_s / end_s:.1f}" y1="0" '
        f'y2="{HEIGHT - 6}" stroke="currentColor" stroke-opacity="0.5" stroke-dasharray="3 3"/>'
        for c in film.captions[1:]
        if c.final or c is film.captions[-1]
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="curve of change">'
        f'<line x1="0" x2="{WIDTH}" y1="{HEIGHT - 6}" y2="{HEIGHT - 6}" stroke="currentColor" stroke-opacity="0.25"/>'
        f'<polygon points="{area}" fill="#7a7ae6" fill-opacity="0.18"/>'
        f'<polyline points="{line}" fill="none" stroke="#7a7ae6" stroke-width="2" stroke-linejoin="round"/>{cuts}</svg>'
        '<p class="soft">Change between neighbouring windows; dashed: where a scene began.</p>'
    )


def _captions(captions: Sequence[Caption]) -> str:
    numbers: dict[str, int] = {}
    rows = []
    for caption in captions:
        number = numbers.setdefault(caption.text, len(numbers))
        span = f"{clock(caption.start_s)}–{clock(caption.end_s)}"
        score = "" if caption.score is None else f"{caption.score:.2f}"
        text = shown(caption.text) if caption.final else f"<em>{shown(caption.text)} …</em>"
        rows.append(f'<li style="{hue(number)}"><span>{span}</span><span>{text}</span><span>{score}</span></li>')
    return "".join(rows)


def build(source: str, *, examples: Sequence[str] = ()) -> gr.Blocks:
    """The page. Raises UserError if the folder or Hub id does not hold a VL-JEPA, or an example cannot be opened."""
    for example in examples:
        open_frames(Path(example), limits=LIMITS).close()
    return build_page(VLJEPA.from_pretrained(source), Path(source).name, examples=examples)


def build_page(model: VLJEPA, name: str, *, examples: Sequence[str] = ()) -> gr.Blocks:
    """The page of a loaded model."""
    config = model.model.config
    with gr.Blocks(title=f"{name} · llm-jepa", analytics_enabled=False) as page:
        gr.HTML(
            block(
                f"<h1>{shown(name)}</h1><p class='soft'>Every window of the film is embedded. Text is decoded once or "
                "twice a scene: when the scene changes.</p>"
            )
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                film = gr.Video(
                    label="Film", sources=["upload", "webcam"], elem_id="film",
                    webcam_options=gr.WebcamOptions(mirror=False),
                )  # fmt: skip
                if examples:
                    gr.Examples([[example] for example in examples], film, label="Examples", api_visibility="private")
                with gr.Accordion("Settings", open=False):
                    query = gr.Textbox(label="Question asked of every window", placeholder=config.default_query)
                    labels = gr.Textbox(
                        label="Captions to choose from, one a line", lines=3, placeholder="empty: the model's y_decoder"
                    )
                    sensitivity = gr.Slider(0.25, 4.0, 1.0, step=0.25, label="Sensitivity of the cuts")
                with gr.Row():
                    start = gr.Button("Watch", variant="primary", elem_id="watch")
                    stop = gr.Button("Stop", elem_id="stop")
            with gr.Column(scale=3, min_width=320):
                story = gr.HTML(
                    block('<p class="soft">The curve, the cuts, and the captions appear here.</p>'), elem_id="story"
                )
        gr.HTML(block("<h2>Ask</h2>"))
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                question = gr.Textbox(
                    label="Question", placeholder="empty: only compare with the texts below", elem_id="question"
                )
                candidates = gr.Textbox(label="Candidate answers, one a line", lines=3, elem_id="candidates")
                with gr.Row():
                    start_s = gr.Number(label="from second", value=0, minimum=0)
                    end_s = gr.Number(label="to second (0: the end)", value=0, minimum=0)
                ask = gr.Button("Ask", elem_id="ask")
            with gr.Column(scale=3, min_width=320):
                reply = gr.HTML(
                    block('<p class="soft">The model compares the film with your texts; it does not make up an answer. '
                    "A long film is sampled thinly: say which part you mean.</p>"), elem_id="reply",
                )  # fmt: skip

        def on_watch(path: str | None, query: str, labels: str, sensitivity: float) -> Iterator[str]:
            yield from watching(model, path, query, labels, sensitivity)

        def on_ask(path: str | None, question: str, candidates: str, start_s: float, end_s: float) -> str:
            return answer(model, path, question, candidates, start_s, end_s)

        run = start.click(on_watch, [film, query, labels, sensitivity], story, **events())
        stop.click(None, cancels=[run], api_visibility="private")
        ask.click(on_ask, [film, question, candidates, start_s, end_s], reply, **events())
    return page
