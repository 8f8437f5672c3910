"""What the pages of `llm-jepa demo` share: their look, how they are served, and how they show texts of strangers."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gradio import Blocks
from gradio.themes import Base
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..core.errors import UserError, one_line
from ..core.printing import shown as visible

MAX_UPLOAD = "200mb"
MODEL_LOCK = "model"  # one computation at a time, on all pages and by all visitors
# Gradio's frontend is all here, so the browser may refuse everything from elsewhere. `unsafe-eval`: its templates.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self' blob: ws: wss:; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'"
)
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Open Sans", "sans-serif"]
CSS = """
.gradio-container { max-width: 76rem !important; margin: 0 auto; }
#film video { max-height: 17rem; }
.jepa { --jepa-line: var(--border-color-primary);
  --jepa-soft: color-mix(in srgb, var(--body-text-color) 62%, transparent);
  line-height: 1.45; }
.jepa h1 { margin: 0; font-size: 1.6rem; letter-spacing: -0.015em; overflow-wrap: anywhere; }
.jepa h2 { margin: 0 0 0.6rem; font-size: 0.8rem; font-weight: 600; letter-spacing: 0.06em; text-transform: uppercase;
  color: var(--jepa-soft); }
.jepa p { margin: 0.2rem 0; }
.jepa .soft, .jepa small, .jepa text { color: var(--jepa-soft); fill: var(--jepa-soft); font-size: 0.85rem; }
.jepa .error { padding: 0.5rem 0.8rem; border-left: 4px solid #d6455d; border-radius: 4px;
  background: color-mix(in srgb, #d6455d 12%, transparent); overflow-wrap: anywhere; }
.jepa svg { display: block; width: 100%; height: auto; overflow: visible; }
.jepa .facts { display: flex; flex-wrap: wrap; gap: 0.4rem 2.2rem; margin: 0.2rem 0 1rem; }
.jepa .facts b { display: block; font-size: 1.5rem; font-weight: 650; letter-spacing: -0.02em;
  font-variant-numeric: tabular-nums; }
.jepa .captions { list-style: none; margin: 0.8rem 0 0; padding: 0; max-height: 24rem; overflow-y: auto; }
.jepa .captions li { display: grid; grid-template-columns: 8.6rem minmax(0, 1fr) 3.2rem; gap: 0.8rem;
  padding: 0.34rem 0.7rem; margin: 0 0 3px; border-left: 5px solid hsl(var(--h) 60% 58%); border-radius: 4px; }
.jepa .captions li > :not(:nth-child(2)) { color: var(--jepa-soft); font-variant-numeric: tabular-nums; }
.jepa .captions li > :last-child { text-align: right; }
.jepa .captions li > * , .jepa td { overflow-wrap: anywhere; }
.jepa .bars { display: grid; grid-template-columns: minmax(6rem, auto) minmax(0, 1fr) 3.2rem; gap: 0.5rem 0.8rem;
  align-items: center; }
.jepa .bars i { display: block; height: 12px; border-radius: 3px; background: #7a7ae6; opacity: 0.45; }
.jepa .bars .first { font-weight: 650; } .jepa .bars .first + i { opacity: 1; }
.jepa .bars > :nth-child(3n) { text-align: right; font-variant-numeric: tabular-nums; color: var(--jepa-soft); }
.jepa table { border-collapse: collapse; width: 100%; } .jepa table, .jepa tr { border: 0; }
.jepa th { text-align: left; font-weight: 600; } .jepa th, .jepa td { padding: 0.45rem 0.8rem 0.45rem 0;
  vertical-align: top; border: 0; border-bottom: 1px solid var(--jepa-line); background: none; }
.jepa td:first-child { color: var(--jepa-soft); }
.jepa .answer { display: inline-block; padding: 0.05rem 0.5rem; border-left: 5px solid hsl(var(--h) 60% 58%);
  border-radius: 4px; font-family: ui-monospace, monospace; font-size: 0.9rem; white-space: pre-wrap; }
.jepa .maps { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1.6rem;
  margin-top: 1.4rem; }
.jepa .maps svg { border: 1px solid var(--jepa-line); border-radius: 10px; }
"""


@contextmanager
def serving(page: Blocks, *, host: str, port: int) -> Iterator[str]:
    """Serve the page in the background during the block; yields its address. Raises UserError if the port is taken."""
    page.queue(max_size=16)
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            show_error=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            footer_links=[],
            enable_monitoring=False,
            max_file_size=MAX_UPLOAD,
            app_kwargs={"middleware": [Middleware(OwnFilesOnly)]},
            theme=Base(font=FONTS, font_mono=["ui-monospace", "monospace"]),
            css=CSS,
        )
    except OSError as error:
        raise UserError(f"{host}:{port} cannot be used ({one_line(error, 120)}); choose another --port.") from None
    try:
        yield address
    finally:
        page.close(verbose=False)


class OwnFilesOnly:
    """Middleware: each answer forbids the browser to load anything from another address."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                message["headers"] = [*message.get("headers", []), *headers]
            await send(message)

        await self._app(scope, receive, send_with_policy)


def shown(text: str) -> str:
    """A text of a stranger as HTML that says it. Also what Gradio's templates would obey is written as a number."""
    escaped = html.escape(visible(text))
    return re.sub("[${}@`]", lambda mark: f"&#{ord(mark[0])};", escaped)


def block(content: str) -> str:
    """HTML in the look of the page."""
    return f'<div class="jepa">{content}</div>'


def error_line(error: BaseException, path: str | None = None) -> str:
    """An error as one line of the page. path: a file of ours whose folder is nobody's business."""
    message = one_line(error, 400)
    if path is not None:
        message = message.replace(f"{Path(path).parent}/", "")
    if not isinstance(error, (UserError, OSError)):
        message = f"{type(error).__name__}: {message}"
    return block(f'<p class="error" role="alert">{shown(message)}</p>')


def lines_of(text: str | None, name: str, *, most: int, longest: int) -> list[str]:
    """The lines of a text box, each once, without empty ones. Raises UserError for too many or too long ones."""
    lines = list(dict.fromkeys(line.strip() for line in (text or "").splitlines() if line.strip()))
    if len(lines) > most:
        raise UserError(f"{len(lines)} {name}; give at most {most}.")
    if any(len(line) > longest for line in lines):
        raise UserError(f"One of the {name} has more than {longest} characters; shorten it.")
    return lines


def hue(number: int) -> str:
    """The colour of group `number`, as a style. The golden angle keeps neighbours apart."""
    return f"--h:{(250 + 137.508 * number) % 360:.0f}"


def events() -> dict[str, Any]:
    """Options of every event that computes."""
    return {
        "concurrency_limit": 1,
        "concurrency_id": MODEL_LOCK,
        "show_progress": "minimal",
        "api_visibility": "private",
    }
