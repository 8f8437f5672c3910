"""Claims about `llm-jepa watch`: what is shown and written, and what is refused."""

from __future__ import annotations

import io
import json
import re
import signal
from pathlib import Path

import pytest
from PIL import Image

from llm_jepa.cli import main
from llm_jepa.core.errors import UserError
from llm_jepa.stream.decoder import Caption
from llm_jepa.stream.frames import source_name
from llm_jepa.stream.opening import open_frames
from llm_jepa.vl import watch_command
from llm_jepa.vl.watch import watch
from llm_jepa.vl.watch_page import clock
from llm_jepa.vl.y_decoder import YDecoder
from tests.stream.movies import film_with_sound
from tests.vl.watch.rooms import FPS, TEXTS, calls, command, events, srt, video, windows_embedded

av = pytest.importorskip("av")


@pytest.mark.parametrize("provisional", [False, True])
def test_screen_events_subtitles_and_summary_agree_with_the_calls(
    folder, film, tmp_path, monkeypatch, capsys, provisional
):
    embedded, decoded = windows_embedded(monkeypatch), calls(monkeypatch, YDecoder, "decode")
    out = [tmp_path / f"o.{kind}" for kind in ("jsonl", "srt", "html")]
    words = ["--labels", "a red room, a green room", "--jsonl", out[0], "--srt", out[1], "--report", out[2]]
    assert command(folder, film, *words, *(["--provisional"] if provisional else [])) == 0
    header, found, summary = events(out[0])
    assert header["fps"] == 2 and header["num_frames"] == 4 and header["source"] == str(film)
    final = [event for event in found if event["final"]]
    assert summary["num_windows"] == sum(map(len, embedded)) == 45 and summary["num_decodes"] == len(decoded)
    assert len(final) == 4 <= len(decoded) <= len(found) == (8 if provisional else 4)
    assert set(found[0]) == {"start_s", "end_s", "emitted_s", "text", "score", "final", "query"}
    assert {event["text"] for event in found} <= {"a red room", "a green room"}
    assert found[0]["query"] == "What happens in the video?"
    assert [(round(1000 * e["start_s"]), round(1000 * e["end_s"]), e["text"]) for e in final] == srt(out[1])
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines == [
        f"{'' if e['final'] else '~'}{clock(e['start_s'])}-{clock(e['end_s'])}  {e['text']}   ({e['score']:.2f})"
        for e in found
    ]
    assert re.fullmatch(rf"decoded {len(decoded)} of 45 windows, 23\.5 s of video, \d+\.\d windows/s", last)
    assert f"decoded {len(decoded)} of 45 windows" in out[2].read_text()


def test_the_report_names_run_and_film_without_a_path_of_this_machine(folder, film, tmp_path, monkeypatch):
    """Film and report are in two folders beside each other; the link leads from one to the other."""
    report = tmp_path / "out" / "r.html"
    report.parent.mkdir()
    command(folder, film, "--labels", "a red room,a green room", "--report", report, "--sensitivity", "2")
    text = report.read_text()
    assert f"<title>{film.name}</title>" in text
    link = re.search(r'<video [^>]*src="([^"]+)"', text)[1]
    assert (report.parent / link).resolve() == film.resolve() and link.startswith("../")
    assert str(tmp_path) not in text and str(folder) not in text and str(film.parent) not in text
    assert "<bdi>tiny</bdi>" in text and "<bdi>a red room</bdi><bdi>a green room</bdi>" in text
    assert "sensitivity 2, calibrated" in text and "4 frames in 2 s, one every 0.5 s" in text
    assert re.search(r"<bdi>\d{4}-\d\d-\d\d \d\d:\d\d [+-]\d{4}</bdi>", text)
    assert "cosine between what was seen and the nearest known text" in text


@pytest.mark.parametrize(
    ("source", "line"),
    [("lavfi:testsrc=rate=4:duration=3:size=64x64", "it was not a file"), ("picture.png", "one picture")],
)
def test_a_report_of_what_is_not_a_film_says_so(folder, source, line, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "picture.png")
    given = tmp_path / source if source == "picture.png" else source
    command(folder, given, "--labels", "a,b", "--report", tmp_path / "r.html")
    assert "<video" not in (tmp_path / "r.html").read_text() and line in (tmp_path / "r.html").read_text()


def test_an_event_is_on_disk_when_it_is_said(folder, film, tmp_path, monkeypatch):
    path, seen = tmp_path / "o.jsonl", []
    windows_embedded(monkeypatch, lambda index: seen.append(path.read_text()))
    command(folder, film, "--labels", "a,b", "--jsonl", path)
    assert "header" in seen[0] and all(text.endswith("\n") for text in seen)
    assert seen[-1].count("\n") == 3 and "summary" not in seen[-1], "the header and the two scenes known to be over"
    assert all(path.read_text().startswith(text) for text in seen)


def test_the_nearest_of_the_given_texts_is_said(folder, film, model, tmp_path, capsys):
    """--labels and --memory with the same texts, blanks and repetitions aside, say the same; as `nearest` would."""
    (tmp_path / "texts.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(["", *TEXTS, TEXTS[0], "  "]).encode())
    command(folder, film, "--labels", " ,".join([*TEXTS, ""]))
    labels = capsys.readouterr().out.splitlines()[:-1]
    command(folder, film, "--memory", tmp_path / "texts.txt")
    assert labels == capsys.readouterr().out.splitlines()[:-1]
    with open_frames(film, fps=FPS) as frames:
        expected = watch(model, frames).captions
    assert [line.split("  ")[1] for line in labels] == [caption.text for caption in expected]


def test_a_model_with_a_y_decoder_needs_no_texts_and_one_without_says_what_to_give(
    model, folder, film, tmp_path, capsys
):
    model.save_pretrained(tmp_path / "with")
    try:
        assert command(tmp_path / "with", film, "--max-seconds", 5) == 0
    finally:
        model.model.config._name_or_path = ""
    assert capsys.readouterr().out.splitlines()[-1].startswith("decoded 1 of 7 windows, 4.5 s of video")
    with pytest.raises(UserError, match="no y_decoder.*--labels or --memory"):
        command(folder, film)


@pytest.mark.parametrize("kind", ["jsonl", "srt", "report"])
def test_existing_files_are_refused_before_anything_is_loaded(film, tmp_path, kind):
    (tmp_path / "there").write_text("mine")
    with pytest.raises(UserError, match=f"--{kind} .*exists"):
        command("no-such-model", "no-such-source", f"--{kind}", tmp_path / "there")
    assert (tmp_path / "there").read_text() == "mine"
    with pytest.raises(UserError, match="No folder"):
        command("no-such-model", film, f"--{kind}", tmp_path / "nowhere" / "o")
    with pytest.raises(UserError, match="different files"):
        other = "srt" if kind != "srt" else "report"
        command("no-such-model", film, f"--{kind}", tmp_path / "o", f"--{other}", tmp_path / "o")


@pytest.mark.parametrize("source", ["missing.mp4", "text.mp4", "concat:a|b", "ftp://x/y", "lavfi:movie=x", ""])
def test_a_bad_source_is_one_line_and_leaves_no_files(folder, tmp_path, source):
    (tmp_path / "text.mp4").write_text("this is no video")
    given = tmp_path / source if source.endswith(".mp4") else source
    with pytest.raises(UserError) as raised:
        command(folder, given, "--labels", "a,b", "--jsonl", tmp_path / "o.jsonl", "--srt", tmp_path / "o.srt")
    assert "\n" not in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.mp4"]


def test_a_bad_file_is_told_before_the_model_is_loaded(tmp_path):
    with pytest.raises(UserError, match="missing.mp4"):
        command("no-such-model", tmp_path / "missing.mp4")


def test_subtitles_have_the_times_of_a_player(folder, tmp_path):
    """The sound begins at 0 and the picture at 3 s."""
    (tmp_path / "film.mp4").write_bytes(film_with_sound("mp4", 3.0))
    command(folder, tmp_path / "film.mp4", "--labels", "a,b", "--srt", tmp_path / "o.srt")
    ((start, end, _),) = srt(tmp_path / "o.srt")
    assert start == 3000 and 3500 <= end <= 4000


def test_a_machine_without_a_camera_is_told_so(folder, monkeypatch):
    monkeypatch.setattr("sys.platform", "linux")
    with pytest.raises(UserError, match=r"webcam:977: cannot be opened \(No such.*camera of this machine: plug it in"):
        command(folder, "webcam:977", "--labels", "a,b")


def test_a_run_that_says_nothing_leaves_no_files(folder, film, tmp_path):
    """A query beyond the model's limit is refused at the first window; the names are free for the next try."""
    files = ["--jsonl", tmp_path / "o.jsonl", "--srt", tmp_path / "o.srt", "--report", tmp_path / "o.html"]
    with pytest.raises(UserError, match="limit"):
        command(folder, film, "--labels", "a,b", "--query", "why " * 600, *files)
    assert not list(tmp_path.iterdir())


def test_a_file_that_breaks_off_is_captioned_so_far_and_then_an_error(folder, tmp_path, capsys):
    """Raw H.264 of 64 x 64, then of 128 x 128, which no `FrameSource` delivers."""
    parts = [video(tmp_path / f"{size}.h264", 12, size=size, rate=25).read_bytes() for size in (64, 128)]
    (tmp_path / "a.h264").write_bytes(b"".join(parts))
    with pytest.raises(UserError, match="128x128 after 64x64"):
        command(
            folder, tmp_path / "a.h264", "--labels", "a,b", "--srt", tmp_path / "o.srt", "--jsonl", tmp_path / "o.jsonl"
        )
    assert len(srt(tmp_path / "o.srt")) == 2
    assert "128x128" in events(tmp_path / "o.jsonl")[2]["error"]
    assert "decoded 2 of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--labels", " , "], "--labels has no text"),
        (["--memory", "latin.txt"], "--memory latin.txt cannot be read"),
        (["--memory", "missing.txt"], "--memory missing.txt cannot be read"),
    ],
)
def test_texts_that_are_none_are_refused(words, message, film, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("latin.txt").write_bytes("Käse".encode("latin-1"))
    with pytest.raises(UserError, match=message):
        command("no-such-model", film, *words)


@pytest.mark.parametrize(
    "words",
    [["--fps", "0"], ["--stride", "nan"], ["--threshold", "-1"], ["--min-duration", "inf"], ["--max-seconds", "x"],
     ["--threshold", "1", "--sensitivity", "2"], ["--labels", "a", "--memory", "b"]],
)  # fmt: skip
def test_arguments_that_cannot_work_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        command("model", "source", *words)
    assert "error: argument" in capsys.readouterr().err


class Terminal(io.StringIO):
    encoding = "ascii"

    def isatty(self):
        return True


def test_a_terminal_overwrites_what_is_provisional_and_obeys_no_caption(monkeypatch):
    """The final line starts where the provisional one did; escapes are gone, and so is what ASCII cannot show."""
    monkeypatch.setenv("COLUMNS", "30")
    terminal = Terminal()
    printer = watch_command._Printer(terminal)
    printer.caption(Caption(0, 2.25, 3, "x" * 99, None, False))
    printer.caption(Caption(0, 5, 6, "red\x1b]0;own\x07\n\u202eé", 0.5, True))
    first, second = terminal.getvalue().split("\r\x1b[K")[1:]
    assert first == "~00:00.0-00:02.2  " + "x" * 11 and len(first) == 29
    assert second == "00:00.0-00:05.0  red ]0;own ?   (0.50)\n"


def test_damage_in_a_video_costs_frames_there_and_no_more(folder, tmp_path, capsys):
    """Every frame is a key frame; five of them, at 10 s, are overwritten."""
    path = video(tmp_path / "damaged.mp4", 24, g="1", bf="0")
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    for at, size in packets[40:45]:
        data[at : at + size] = b"\xff" * size
    path.write_bytes(data)
    with pytest.warns(UserWarning, match="5 corrupt"):
        assert command(folder, path, "--labels", "a,b", "--jsonl", tmp_path / "o.jsonl") == 0
    _, found, summary = events(tmp_path / "o.jsonl")
    assert [e["start_s"] for e in found[1:]] == pytest.approx([7, 14, 21], abs=1.1)
    assert summary["lost"] == {"corrupt": 5} and ", 5 corrupt" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_after_a_signal_the_files_are_whole_and_the_exit_code_is_0(number, folder, film, tmp_path, monkeypatch, capsys):
    windows_embedded(monkeypatch, lambda index: signal.raise_signal(number) if index == 30 else None)
    out = [tmp_path / f"o.{kind}" for kind in ("jsonl", "srt", "html")]
    words = ["--labels", "a,b", "--jsonl", out[0], "--srt", out[1], "--report", out[2]]
    assert command(folder, film, *words) == 0
    assert out[0].read_text().endswith("\n")
    _, found, summary = events(out[0])
    assert summary["interrupted"] is True and summary["num_windows"] == 32  # of the batches of 8
    assert [(s, e) for s, e, _ in srt(out[1])] == [
        (round(1000 * e["start_s"]), round(1000 * e["end_s"])) for e in found
    ]
    assert "decoded 3 of 32 windows" in capsys.readouterr().out and len(found) == 3
    assert "decoded 3 of 32 windows" in out[2].read_text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_second_signal_is_obeyed_at_once_and_the_captions_are_kept(
    number, code, folder, film, tmp_path, monkeypatch, capsys
):

    def before(index):
        if index == 32:  # the first of a batch
            signal.raise_signal(number)
            signal.raise_signal(number)

    windows_embedded(monkeypatch, before)
    words = ["--labels", "a,b", "--jsonl", tmp_path / "o.jsonl", "--srt", tmp_path / "o.srt"]
    assert main(["watch", str(folder), str(film), *map(str, words)]) == code
    assert capsys.readouterr().err.splitlines()[-1] in ("llm-jepa: interrupted", "llm-jepa: stopped by SIGTERM")
    assert len(srt(tmp_path / "o.srt")) == 2
    lines = (tmp_path / "o.jsonl").read_text().splitlines()
    assert [bool(json.loads(line).get("final")) for line in lines] == [False, True, True]


def test_a_login_in_a_url_is_not_written():
    assert source_name("rtsp://me:p@ss@cam:554/a@b") == "rtsp://***@cam:554/a@b"
    assert source_name("https://host/x@y.mp4") == "https://host/x@y.mp4"
    assert source_name("a@b.mp4") == "a@b.mp4"
