"""`llm-jepa demo`: a page in the browser for a model. The kind of the model decides which one.

    demo/vl.py    a film, its curve of change, captions as they come, and a question with candidate answers
    demo/lm.py    one prompt in several wordings: the answers of one or two models, and a map of the embeddings
    demo/page.py  what both pages share

The page is served to this machine alone, unless --host says otherwise. It loads nothing from elsewhere.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from ..core.errors import UserError
from ..core.options import whole

if TYPE_CHECKING:  # it imports pandas, and `llm-jepa demo --help` should not
    from gradio import Blocks

DESCRIPTION = """\
Try a model in the browser. A VL-JEPA captions films and compares them with your texts. A language model answers one
prompt in several wordings; a second model is shown beside it.

  llm-jepa demo runs/vl/shapestream --example data/shapestream/stream_0.mp4
  llm-jepa demo runs/quickstart/sft runs/quickstart/llm-jepa

Ctrl-C ends it; films that were uploaded are removed then.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `llm-jepa demo`."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", metavar="MODEL", help="model folder or Hub id, of any family")
    parser.add_argument("second", metavar="MODEL2", nargs="?", help="a second language model, to compare")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)"
    )
    parser.add_argument("--port", type=whole(1, 65535), default=7860, help="(default: 7860)")
    parser.add_argument(
        "--example", action="append", default=[], metavar="FILE", help="a film to choose on the page (repeatable)"
    )


def run(options: argparse.Namespace) -> None:
    """Load the model and serve its page until Ctrl-C. Raises UserError before anything is served."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "0"  # read when it is imported
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    import gradio  # noqa: F401 (a missing extra is told before a model is loaded)

    from .page import serving

    with tempfile.TemporaryDirectory(prefix="llm-jepa-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # uploads; read when a page is built
        with serving(build(options), host=options.host, port=options.port) as address:
            print(f"Open {address} in a browser. Ctrl-C ends it.", flush=True)
            with suppress(KeyboardInterrupt):
                threading.Event().wait()


def build(options: argparse.Namespace) -> Blocks:
    """The page for the models. Raises UserError for models that do not go together."""
    from ..core.folders import check_folder
    from ..core.untrusted import read_options

    sources = [options.model, *([options.second] if options.second else [])]
    kinds = []
    for source in sources:
        check_folder(source)
        kinds.append(read_options(source).get("model_type"))
    if "vl_jepa" in kinds:
        if len(sources) > 1:
            raise UserError("Two models are compared only if both are language models; give one VL-JEPA alone.")
        from . import vl

        return vl.build(options.model, examples=options.example)
    if options.example:
        raise UserError("--example is a film for a VL-JEPA; a language model takes texts on its page.")
    from . import lm

    return lm.build(sources)
