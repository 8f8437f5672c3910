"""The command writes samples; the package is light to import."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from llm_jepa.synthetic import shapestream
from llm_jepa.synthetic.shapestream import slots, stream
from llm_jepa.synthetic.shapestream.__main__ import main


def test_the_command_line_writes_samples(tmp_path, capsys, monkeypatch):
    pytest.importorskip("av")
    monkeypatch.setattr(shapestream.stream, "__kwdefaults__", {**shapestream.stream.__kwdefaults__, "seconds": 20})
    assert main(["--out", str(tmp_path / "new"), "--clips", "3", "--streams", "1"]) == 0
    written = {path.name for path in (tmp_path / "new").iterdir()}
    assert written == {"clips.png", "events.json", "stream_0.mp4"}
    events = json.loads((tmp_path / "new" / "events.json").read_text())["stream_0.mp4"]
    assert [event["kind"] for event in events] == [event.kind for event in stream(0, seconds=20).events]
    assert all(slots(event["caption"])[0] == event["kind"] for event in events)
    assert "3 clips" in capsys.readouterr().out


def test_the_command_line_answers_a_bad_folder_in_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stopped:
        main(["--out", str(tmp_path / "file"), "--clips", "1"])
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_the_module_needs_neither_torch_nor_pillow_to_be_imported():
    code = "import sys, llm_jepa.synthetic.shapestream as s; s.slots('x'); "
    code += "print(*({'torch', 'PIL', 'av'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


def test_importing_the_package_does_not_load_it():
    code = "import sys, llm_jepa; print('llm_jepa.synthetic.shapestream' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
