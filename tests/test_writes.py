"""Claims about every file that the package and the evaluation write: it is whole or not there, no link is followed.

One test reads the code: a call that writes is inside a stage, or is in the list below with its reason. The others plant
a link in the place of each output.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from eval import robustness
from eval.run_files import RunFiles
from llm_jepa import cli
from llm_jepa.core.files import append, write_json, write_json_lines, write_whole
from llm_jepa.lm.from_scratch import random_model, train_tokenizer
from llm_jepa.stream.decoder import Caption
from llm_jepa.synthetic import nl_rx
from llm_jepa.synthetic.shapestream.__main__ import main as shapestream
from llm_jepa.vl.features import cache_features
from llm_jepa.vl.inference import VLJEPA
from llm_jepa.vl.watch import WatchSettings
from llm_jepa.vl.watch_command import _Outputs
from llm_jepa.vl.watch_page import Timeline, write_report
from llm_jepa.vl.y_decoder import MemoryProjection, YDecoder, fingerprint
from tests.conftest import LLAMA
from tests.eval.test_robustness import scored
from tests.vl.runs import parts

ROOT = Path(__file__).parents[1]
# Methods and functions that write to the path that they are given.
WRITERS = {
    "write_text", "write_bytes", "save", "savefig", "save_file", "save_pretrained", "save_to_disk", "save_model",
    "save_to_json", "to_csv", "to_parquet", "touch", "tofile", "imwrite", "copyfile", "copytree", "copy2",
}  # fmt: skip
STAGES = {"written_whole", "published", "stage", "TemporaryDirectory"}
# (file, function) -> why it may write outside a stage.
ALLOWED = {
    ("llm_jepa/cli.py", "_exit_code_of"): "the null device",
    ("llm_jepa/core/checkpoint.py", "hold"): "opens run.json to lock it, and writes nothing",
    ("llm_jepa/core/errors.py", "announced"): "into the launcher's private temporary folder",
    ("llm_jepa/core/errors.py", "report"): "into the launcher's private temporary folder",
    ("llm_jepa/core/files.py", "append"): "appends to a file, not through links; whoever reads it cuts a torn line off",
    ("llm_jepa/core/printing.py", "safe_output"): "the null device",
    ("llm_jepa/core/portable.py", "save_model"): "called with a stage",
    ("llm_jepa/core/portable.py", "save_tokenizer"): "called with a stage",
    ("llm_jepa/core/saving.py", "_name_best_checkpoint"): "called with a stage",
    ("llm_jepa/core/trainer.py", "save_more"): "called with a stage",
    ("llm_jepa/lm/adapter.py", "save_adapter"): "called with a stage, or by a user for a folder of theirs",
    ("llm_jepa/lm/export.py", "_copy_embedding_files"): "called with a stage",
    ("llm_jepa/vl/decoder_stage.py", "run"): "YDecoder.save_pretrained stages",
    ("llm_jepa/vl/watch_command.py", "__enter__"): "each event is written at once; mode x follows no link",
    ("llm_jepa/vl/watch_page/__init__.py", "_jpeg"): "into memory",
    ("llm_jepa/core/card.py", "draw_curve"): "called with a stage",
    ("llm_jepa/lm/export.py", "_copy_card"): "called with a stage",
    ("llm_jepa/vl/y_decoder.py", "_write"): "called with a stage",
    ("eval/cost/memory.py", "training_step"): "the kernel's switch for the peak of a process",
    ("eval/cost/save_cost.py", "measure"): "the saves that are measured, in a temporary folder",
    ("eval/cost/step_cost/measuring.py", "_quiet_stderr"): "the null device",
    ("eval/experiments/two_jobs/runs.py", "_train_and_judge"): "in a temporary folder",
    ("eval/pretrained.py", "_copy_known_size"): "in a temporary folder",
    ("eval/pretrained.py", "convert"): "called with a stage",
    ("eval/vl/coco_photos.py", "make_decoder"): "YDecoder.save_pretrained stages",
    ("eval/vl/shapestream.py", "main"): "VLJEPA.save_pretrained stages",
}


class Writes(ast.NodeVisitor):
    """The calls of a file that write, with their function, unless they are inside a stage."""

    def __init__(self) -> None:
        self.functions: list[str] = [""]
        self.in_stage = 0
        self.found: list[tuple[str, int, str]] = []

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.functions.append(node.name)
        self.generic_visit(node)
        self.functions.pop()

    def visit_With(self, node: ast.With) -> None:
        calls = [call for item in node.items for call in ast.walk(item) if isinstance(call, ast.Call)]
        is_stage = any(_name(call) in STAGES for call in calls)
        self.in_stage += is_stage
        self.generic_visit(node)
        self.in_stage -= is_stage

    def visit_Call(self, node: ast.Call) -> None:
        name = _name(node)
        if not self.in_stage and (name in WRITERS or (name in ("open", "fdopen") and _opens_to_write(node))):
            self.found.append((self.functions[-1], node.lineno, name))
        self.generic_visit(node)


def _name(call: ast.Call) -> str:
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _opens_to_write(call: ast.Call) -> bool:
    """The mode is the second argument of `open`, and the first of `Path.open`. os.open has flags instead."""
    words = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
    words += [keyword.value.value for keyword in call.keywords if keyword.arg == "mode"]  # type: ignore[attr-defined]
    flags = {node.attr for node in ast.walk(call) if isinstance(node, ast.Attribute)}
    is_mode = any(isinstance(word, str) and len(word) <= 3 and set(word) & set("wax+") for word in words)
    return is_mode or bool(flags & {"O_WRONLY", "O_RDWR", "O_CREAT"})


def test_every_write_is_in_a_stage_or_in_the_list():
    unknown, used = [], set()
    for folder in ("llm_jepa", "eval", "recipes"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            visitor = Writes()
            visitor.visit(ast.parse(path.read_text()))
            file = path.relative_to(ROOT).as_posix()
            if file.startswith("eval/faults/"):
                continue  # faults are made in temporary folders
            for function, line, name in visitor.found:
                if (file, function) in ALLOWED:
                    used.add((file, function))
                else:
                    unknown.append(f"{file}:{line} {function} calls {name}")
    assert not unknown, "\n".join(unknown)
    assert set(ALLOWED) == used, f"no longer needed: {set(ALLOWED) - used}"


# -- links ------------------------------------------------------------------------------------------------------------


def lm(folder: Path) -> str:
    rows = nl_rx.generate(8, seed=0)
    tokenizer = train_tokenizer(rows, 320)
    random_model(LLAMA, tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def vl_jepa() -> VLJEPA:
    model, processor = parts()
    memory = MemoryProjection(torch.eye(2, 8), ("a", "b"))
    return VLJEPA(model, processor, y_decoder=YDecoder(fingerprint(model), memory))


def generate(out: Path, model: str) -> None:
    words = ["--prompt", "a line", "--max_new_tokens", "2", "--output", str(out / "texts.jsonl")]
    assert cli.main(["generate", model, *words]) == 0


def embed(out: Path, model: str) -> None:
    rows = Path(model, "rows.jsonl")
    rows.write_text(json.dumps({"prompt": "a", "completion": "b"}))
    words = ["--input", str(rows), "--output", str(out / "vectors.safetensors")]
    assert cli.main(["embed", model, *words]) == 0


def watch(out: Path, _: str) -> None:
    settings = WatchSettings(
        query="", num_frames=2, fps=2.0, stride_s=0.5, threshold=None, sensitivity=1.0, min_duration_s=1.0,
        provisional=False, max_seconds=None,
    )  # fmt: skip
    with _Outputs(None, str(out / "film.srt"), settings) as outputs:
        outputs.caption(Caption(0.0, 1.0, 1.0, "a", None, True))
    captions = [Caption(0.0, 1.0, 1.0, "a", None, True)]
    write_report(
        out / "film.html", source="s", query="", captions=captions, timeline=Timeline(), num_windows=1, num_decodes=1,
        seconds=1.0,
    )  # fmt: skip


def scored_run(out: Path, _: str) -> None:
    files = RunFiles(out / "run.json")
    files.resume({"task": "t"})
    files.append([{"group": "a", "wording": "b"}])
    files.finish({"task": "t"}, [{"group": "a", "wording": "b"}])
    (out / "run.samples.jsonl.partial").write_text("")  # so that a link is planted there, too


def robustness_outputs(out: Path, model: str) -> None:
    source = Path(model, f"scored{len(list(Path(model).glob('scored*')))}")
    analysis = robustness.analyse({"m": [robustness.read_scored(scored(source))]}, baseline="m", metric="exact")
    robustness._write(out, analysis)


def robustness_card(out: Path, model: str) -> None:
    run = robustness.read_scored(scored(Path(model, f"card{len(list(Path(model).glob('card*')))}")))
    robustness.write_card(out, run, dataset="nl_rx", metric="exact")


def plain_files(out: Path, _: str) -> None:
    write_json(out / "a.json", {})
    write_json_lines(out / "b.jsonl", [{}])
    write_whole(out / "c.txt", "c")


def features(out: Path, _: str) -> None:
    class Clips:
        def __len__(self):
            return 3

        def frames(self, index):
            return np.zeros((2, 16, 16, 3), dtype=np.uint8)

        def identity(self):
            yield b""

    _, processor = parts()
    cache_features(lambda pixels: torch.ones(len(pixels), 2, 4), Clips(), processor, out, encoder_hash="x")


WRITES: dict[str, Callable[[Path, str], object]] = {
    "files": plain_files,
    "generate": generate,
    "embed": embed,
    "watch": watch,
    "eval.run": scored_run,
    "eval.robustness": robustness_outputs,
    "a card": robustness_card,
    "nl_rx": lambda out, _: nl_rx.write(out, train=2, validation=2, test=2),
    "shapestream": lambda out, _: shapestream(
        ["--out", str(out), "--clips", "1", "--streams", "0", "--train", "1", "--test", "1"]
    ),
    "features": features,
    "a VL-JEPA": lambda out, _: vl_jepa().save_pretrained(out),
    "a y_decoder": lambda out, _: vl_jepa().y_decoder.save_pretrained(out / "y_decoder"),
}
NEW_ONLY = {"generate", "embed"}  # they refuse a file that exists, so a link can only lead nowhere


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("leads", ["nowhere", "to a file"])
def test_links_in_the_place_of_outputs_are_replaced(name, leads, tmp_path):
    """Written once to see which files there are. Then a link is in the place of each."""
    if leads == "to a file" and name in NEW_ONLY:
        pytest.skip("refused")
    first, second, elsewhere = tmp_path / "first", tmp_path / "second", tmp_path / "elsewhere"
    for folder in (first, second, elsewhere):
        folder.mkdir()
    model = lm(tmp_path / "model") if name in NEW_ONLY else str(tmp_path)
    WRITES[name](first, model)
    outputs = [path.relative_to(first) for path in first.rglob("*") if path.is_file()]
    if leads == "to a file":
        outputs = [path for path in outputs if path.suffix != ".partial"]  # read as a run that was cut short
    assert outputs, "nothing is written: this would prove nothing"
    assert not list(first.rglob(".stage-*"))
    targets = {}
    for number, output in enumerate(outputs):
        (second / output).parent.mkdir(parents=True, exist_ok=True)
        target = elsewhere / f"{number}{output.suffix}"
        if leads == "to a file":
            target.write_text(text := "---\n{}\n---\nprecious\n" if output.suffix == ".md" else "precious")
            targets[target] = text
        (second / output).symlink_to(target)
    WRITES[name](second, model)
    assert {path: path.read_text() for path in elsewhere.iterdir()} == targets
    for output in outputs:
        if output.suffix != ".partial":  # removed at the end
            assert (second / output).is_file() and not (second / output).is_symlink(), output
    assert not list(second.rglob(".stage-*"))


def test_lines_are_not_appended_through_a_link(tmp_path):
    (tmp_path / "file").write_text("a\n")
    append(tmp_path / "file", "b\n")
    assert (tmp_path / "file").read_text() == "a\nb\n"
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with pytest.raises(OSError):
        append(tmp_path / "link", "c\n")
    assert (tmp_path / "file").read_text() == "a\nb\n"


def test_the_events_of_watch_do_not_go_through_a_link(tmp_path):
    (tmp_path / "events.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError), _Outputs(str(tmp_path / "events.jsonl"), None, None):  # type: ignore[arg-type]
        pass
    assert not (tmp_path / "elsewhere").exists()
