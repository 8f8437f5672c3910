"""Hostile rows, media, texts and answers: sizes without a bound, numbers out of range, files that are none."""

from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import io
import json
import lzma
import os
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from llm_jepa import UserError

from .inputs import Command, Input
from .tiny import LM, ROWS, VL, lm_data, trained, vl_data, write_recipe, write_rows

MB = 10**6


def inputs(shared: Path) -> Iterator[Input]:
    """Every hostile input of this module."""
    data, clips = lm_data(shared), vl_data(shared)
    lm, vl = trained(shared / "lm", LM, data), trained(shared / "vl", VL, clips)
    yield from _rows_of_lm(lm)
    yield from _manifests(shared, vl)
    yield from _texts(shared, vl)
    yield from _positions(lm, data)
    yield from _answers()
    yield from _media(shared, vl)


# -- rows of language models ------------------------------------------------------------------------------------------


def _rows_of_lm(lm: Path) -> Iterator[Input]:
    for name, file, content, says in _row_files():
        yield Input(f"train {name}", _train(file, content), says, either=name == "1 MB of views")
        if says is not None and "limit" in says:
            yield Input(f"embed {name}", _embed(lm, file, content), says)
    for name, make, says in (
        ("a device as rows", lambda folder: Path("/dev/zero"), "is a device, a pipe or a socket"),
        ("a pipe as rows", _fifo, "is a device, a pipe or a socket"),
        ("a socket as rows", _socket, "is a device, a pipe or a socket"),
        ("a link to a device as rows", _link_to_device, "is a device, a pipe or a socket"),
    ):
        yield Input(name, partial(_train_on, make), says)
    for value, says in ((2, "the limit is max_rows: 2; raise max_rows"), (8, None)):
        yield Input(f"max_rows: {value}", partial(_train_with, ROWS, max_rows=value), says)
    pairs: list[dict[str, Any]] = [{**ROWS[0], "views": {"contexts": ["a"] * 40, "targets": ["b"] * 40}}, *ROWS]
    yield Input("max_row_pairs raised", lambda folder: _train_with(pairs, folder, "--dry-run", max_row_pairs=2000))


def _train_on(make: Callable[[Path], Path], folder: Path) -> Command:
    return ["train", write_recipe(folder, LM, make(folder))]


def _train_with(rows: list[dict[str, Any]], folder: Path, *words: str, **changes: Any) -> Command:
    return ["train", write_recipe(folder, LM, write_rows(folder / "rows.jsonl", rows), **changes), *words]


def _row_files() -> Iterator[tuple[str, str, Callable[[], bytes], str | None]]:
    """(name, file name, its content, what is said)."""
    tail = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
    size, count = "the limit is max_row_bytes: 2097152; raise max_row_bytes", "the limit is max_rows: 2000000"

    def line(**columns: Any) -> bytes:
        return json.dumps({**ROWS[0], **columns}).encode() + b"\n" + tail

    yield "a line of 50 MB", "r.jsonl", lambda: line(prompt="a" * 50 * MB), size
    yield "a line of 50 MB in an unused key", "r.jsonl", lambda: line(other="a" * 50 * MB), size
    yield "a line of 5 MB of words", "r.jsonl", lambda: line(prompt="ab cd " * MB), size
    yield "a row of 50 MB in an array", "r.json", lambda: b"[" + json.dumps({"a": "b" * 50 * MB}).encode() + b"]", size
    yield "50 MB of brackets in an array", "r.json", lambda: b'[{"a": [' + b"[]," * 16 * MB + b"[]]}]", size
    yield "50 MB without an end", "r.json", lambda: b'[{"a": "' + b"b" * 50 * MB, size
    yield "50 MB of brackets", "r.json", lambda: b"[" * 50 * MB, "is nested too deep"
    yield "100,000 brackets in a line", "r.jsonl", lambda: b"{" + b'"a":{' * 100_000, "is nested too deep"
    yield "brackets in a row", "r.jsonl", lambda: b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deep"
    yield "50 MB of blanks", "r.jsonl", lambda: b" " * 50 * MB, "holds no rows"
    yield "50 MB of empty lines", "r.jsonl", lambda: b"\n" * 50 * MB + tail, count
    yield "50 MB of zeros", "r.jsonl", lambda: b"\0" * 50 * MB, size
    yield "100,000 keys", "r.jsonl", lambda: line(**dict.fromkeys(map(str, range(100_000)), 1)), "the limit is 1000"
    yield (
        "other keys in every row", "r.jsonl",
        lambda: b"".join(json.dumps({**ROWS[0], **{f"{i} {j}": 1 for j in range(20)}}).encode() + b"\n"
                         for i in range(2000)),
        "the limit is 1000",
    )  # fmt: skip
    yield (
        "the last of 100,000 keys twice", "r.jsonl",
        lambda: b"{" + b"".join(b'"%d":1,' % i for i in range(100_000)) + b'"99999":2}', "occurs twice",
    )  # fmt: skip
    yield "100,000 columns", "r.csv", lambda: ",".join(map(str, range(100_000))).encode() + b"\n1\n", "limit is 1000"
    yield "a field of 10 MB", "r.csv", lambda: _csv([["a" * 10 * MB, "b"]]), size
    yield "an open quote and 10 MB", "r.csv", lambda: b'prompt,completion\n"' + b"a,\n" * 4 * MB, size
    yield "10 MB of commas", "r.csv", lambda: b"prompt,completion\n" + b"," * 10 * MB, size
    yield "a column name twice", "r.csv", lambda: b"a," * 50_000 + b"\n", "two columns 'a'"
    yield (
        "3,000 x 3,000 views", "r.jsonl",
        lambda: line(views={"contexts": ["a"] * 3000, "targets": ["b"] * 3000}), "9006001 pairs, and the limit",
    )  # fmt: skip
    yield "100,000 targets", "r.jsonl", lambda: line(views={"targets": ["b"] * 100_000}), "100001 pairs, and the limit"
    yield "1 MB of views", "r.jsonl", lambda: line(views={"targets": ["b" * 1000] * 1000}), None
    yield "views of blanks", "r.jsonl", lambda: line(views={"targets": [" "]}), "that are not texts"
    columns: list[Any] = [1, -1.5, [[]], {"a": {}}, "\u0000", [{"a": 1}], True]
    for key in ("views", "messages", "tools", "chat_template_kwargs", "target_key"):
        for value in columns:
            texts = ("target_key", "\u0000"), ("views", "\u0000")
            if (key, value) in (*texts, ("chat_template_kwargs", {"a": {}}), ("tools", [{"a": 1}])):
                continue
            yield f"{key} is {value!r}", "r.jsonl", partial(line, **{key: value}), key
    turns = {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}
    yield "tools of brackets", "r.jsonl", lambda: line(**turns, tools="[" * 100_000), "nested too deep"
    for option in ("chat_template", "tokenize", "return_dict", "conversation", "self"):
        kwargs = {option: "{{ messages[0].content }}"}
        yield f"{option} in a row", "r.jsonl", partial(line, **turns, chat_template_kwargs=kwargs), f"has {option},"
    sides: list[Any] = [1, None, [], {}, [1], [None], [{}], [{"role": "user"}], [{"content": "x"}], True, 1e308, ""]
    for value in sides:
        yield f"prompt is {value!r}", "r.jsonl", partial(line, prompt=value), "r.jsonl, row 0"
        yield f"completion is {value!r}", "r.jsonl", partial(line, completion=value), "r.jsonl, row 0"
    yield "not a number", "r.jsonl", lambda: b'{"prompt": NaN, "completion": "b"}\n', "prompt"
    yield "an integer of 10,000 digits", "r.jsonl", lambda: b'{"prompt": 1' + b"0" * 10_000 + b"}", "is not JSON"
    yield "half a character", "r.jsonl", lambda: b'{"prompt": "\\ud800", "completion": "b"}', "surrogate pair"
    yield "half a character in an array", "r.json", lambda: b'[{"prompt": "\\udc00"}]', "surrogate pair"
    packers: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    for kind, pack in packers.items():
        yield f"a {kind} bomb of one line", f"r.jsonl.{kind}", partial(_packed, pack, b"a" * 10**6, 50), size
        yield (
            f"a {kind} bomb of lines", f"r.jsonl.{kind}",
            partial(_packed, pack, line(prompt="a " * 900_000), 80), "over 200 times its size",
        )  # fmt: skip
        yield (
            f"a {kind} bomb of blanks", f"r.jsonl.{kind}", partial(_packed, pack, b"\n" * MB, 80), count,
        )  # fmt: skip
        yield f"a torn {kind}", f"r.jsonl.{kind}", partial(_torn, pack, tail), "Is the file complete"
        yield f"{kind} in {kind}", f"r.jsonl.{kind}", partial(_packed, pack, pack(tail)), "is not JSON"
    yield "3,000,000 rows in 16 kB", "r.parquet", _parquet_of_many_rows, count
    yield "a row of 3 MB in a parquet", "r.parquet", lambda: _parquet({"prompt": ["a", "b" * 3 * MB]}), size
    yield "10 GB in a parquet of 1 MB", "r.parquet", _parquet_of_large_rows, "over 200 times its size"
    yield "100,000,000 rows in an arrow", "r.arrow", _arrow_of_nothing, "the limit"
    yield "a text as parquet", "r.parquet", lambda: tail, "Cannot read"
    yield "a torn parquet", "r.parquet", lambda: _parquet_of_many_rows()[:-100], "Cannot read"
    yield "a text as arrow", "r.arrow", lambda: tail, "Cannot read"


def _packed(pack: Callable[[bytes], bytes], content: bytes, times: int = 1) -> bytes:
    return pack(content) * times


def _torn(pack: Callable[[bytes], bytes], content: bytes) -> bytes:
    return pack(content * 50)[:-20]


def _csv(rows: list[list[str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows([["prompt", "completion"], *rows])
    return text.getvalue().encode()


def _parquet(columns: dict[str, Any]) -> bytes:
    import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
    import pyarrow.parquet as pq  # type: ignore[import-untyped, unused-ignore]

    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def _parquet_of_many_rows() -> bytes:
    import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]

    def same(text: str) -> Any:
        return pa.DictionaryArray.from_arrays(pa.repeat(pa.scalar(0, pa.int32()), 3 * MB), [text]).cast(pa.string())

    return _parquet({"prompt": same("a"), "completion": same("b")})


def _parquet_of_large_rows() -> bytes:
    import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]

    indices = pa.repeat(pa.scalar(0, pa.int32()), 10_000)
    return _parquet({"prompt": pa.DictionaryArray.from_arrays(indices, ["a" * MB])})


def _arrow_of_nothing() -> bytes:
    import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]

    sink = pa.BufferOutputStream()
    table = pa.table({"prompt": pa.nulls(10**8)})
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _train(file: str, content: Callable[[], bytes]) -> Callable[[Path], Command]:
    def make(folder: Path) -> Command:
        (folder / file).write_bytes(content())
        return ["train", write_recipe(folder, LM, folder / file)]

    return make


def _embed(model: Path, file: str, content: Callable[[], bytes]) -> Callable[[Path], Command]:
    def make(folder: Path) -> Command:
        (folder / file).write_bytes(content())
        return ["embed", str(model), "--input", str(folder / file), "--output", str(folder / "work" / "o.safetensors")]

    return make


def _fifo(folder: Path) -> Path:
    os.mkfifo(folder / "rows.jsonl")
    return folder / "rows.jsonl"


def _socket(folder: Path) -> Path:
    os.chdir(folder)  # the path of a socket is short
    socket.socket(socket.AF_UNIX).bind("rows.jsonl")
    return folder / "rows.jsonl"


def _link_to_device(folder: Path) -> Path:
    (folder / "rows.jsonl").symlink_to("/dev/zero")
    return folder / "rows.jsonl"


# -- manifests and texts of VL-JEPA -----------------------------------------------------------------------------------


def _manifests(shared: Path, vl: Path) -> Iterator[Input]:
    image = str(shared / "0.png")
    row = {"image": image, "target": "a"}
    tail = b"".join(
        json.dumps({"image": str(shared / f"{i}.png"), "target": f"t {i}"}).encode() + b"\n" for i in range(8)
    )
    size = "the limit is max_row_bytes: 2097152"

    def line(**changes: Any) -> bytes:
        return json.dumps({**row, **changes}).encode() + b"\n" + tail

    contents: list[tuple[str, Callable[[], bytes], str | None]] = [
        ("a line of 50 MB", lambda: line(target="a" * 50 * MB), size),
        ("100,000 keys", lambda: line(**dict.fromkeys(map(str, range(100_000)), 1)), "and 99995 more"),
        ("100,000 targets", lambda: line(target=[f"t {i}" for i in range(100_000)]), None),
        ("a path of 1 MB", lambda: line(image="a" * MB), "there is no such file"),
        ("a path with a zero", lambda: line(image="a\0b"), "clips.jsonl, line 1"),
        ("a path of a device", lambda: line(image="/dev/zero"), "there is no such file"),
        ("a path of a folder", lambda: line(image="/"), "there is no such file"),
        ("a path of half a character", lambda: b'{"image": "\\ud800", "target": "a"}', "surrogate pair"),
        ("brackets", lambda: b"[" * 100_000, "nested too deep"),
    ]
    texts: list[Any] = [1, [], {}, [1], [""], " ", "\ud800", [None], True]
    for key in ("target", "query"):
        for value in texts:
            if not (key == "query" and value is None):
                contents.append((f"{key} is {value!r}", partial(line, **{key: value}), "clips.jsonl, line 1"))
    for number in ("NaN", "-1", "1e999", "1" + "0" * 400, '"1"', "true", "[]", "-Infinity"):
        for key in ("start_s", "end_s"):
            head = f'{{"image": {json.dumps(image)}, "target": "a", "{key}": {number}}}\n'.encode()
            contents.append((f"{key} is {number[:20]}", partial(_joined, head, tail), "clips.jsonl, line 1"))
    for name, content, says in contents:

        def make(folder: Path, content: Callable[[], bytes] = content) -> Command:
            (folder / "clips.jsonl").write_bytes(content())
            return ["train", write_recipe(folder, VL, folder / "clips.jsonl")]

        yield Input(f"manifest: {name}", make, says)
    for name, path in (("a device", "/dev/zero"), ("a folder", "/"), ("nothing", "/nowhere/x")):
        yield Input(
            f"manifest is {name}", partial(_train_vl, path),
            "is a device" if name == "a device" else "No manifest",
        )  # fmt: skip
    yield Input("manifest is a pipe", lambda folder: ["train", write_recipe(folder, VL, _fifo(folder))], "is a device")


def _joined(*parts: bytes) -> bytes:
    return b"".join(parts)


def _train_vl(data: str, folder: Path) -> Command:
    return ["train", write_recipe(folder, VL, data)]


def _with_file(words: list[str], make: Callable[[Path], Path | str], folder: Path) -> Command:
    return [*words, str(make(folder))]


def _texts(shared: Path, vl: Path) -> Iterator[Input]:
    """Files of texts: --memory of `watch` and --texts of `train-decoder`."""
    image = str(shared / "0.png")
    contents: list[tuple[str, Callable[[Path], Path | str], str]] = [
        ("a device", lambda folder: "/dev/zero", "is a device, a pipe or a socket"),
        ("a pipe", _fifo, "is a device, a pipe or a socket"),
        ("a folder", lambda folder: folder, ""),
        ("50 MB in a line", lambda folder: _file(folder, b"a" * 50 * MB), "the limit is max_row_bytes"),
        ("3,000,000 lines", lambda folder: _file(folder, b"a\n" * 3 * MB), "the limit is max_rows"),
        ("zeros", lambda folder: _file(folder, b"\0" * 50 * MB), "the limit is max_row_bytes"),
        ("no text", lambda folder: _file(folder, b"\n" * 1000), "text"),
        ("no UTF-8", lambda folder: _file(folder, b"a\n\xff\n"), "line 2 is not UTF-8"),
    ]
    for name, make, says in contents:
        yield Input(f"--memory {name}", partial(_with_file, ["watch", str(vl), image, "--memory"], make), says)
        yield Input(f"--texts {name}", partial(_with_file, ["train-decoder", str(vl), "--texts"], make), says)


def _file(folder: Path, content: bytes) -> Path:
    (folder / "texts.txt").write_bytes(content)
    return folder / "texts.txt"


# -- positions and answers --------------------------------------------------------------------------------------------


def _positions(lm: Path, data: Path) -> Iterator[Input]:
    """The model has 128 positions."""
    long, rows = "word " * 400, [*ROWS, {"prompt": "word " * 400, "completion": " a"}]
    yield Input("more new tokens than positions", lambda folder: ["generate", str(lm), "--prompt", "name"])
    yield Input(
        "10^9 new tokens", lambda folder: ["generate", str(lm), "--prompt", "name", "--max_new_tokens", str(10**9)]
    )
    yield Input(
        "a prompt beyond the positions", lambda folder: ["generate", str(lm), "--prompt", long], "128 positions"
    )
    yield Input(
        "rows beyond the positions", _embed(lm, "r.jsonl", partial(_joined, json.dumps(rows[-1]).encode())),
        "128 positions",
    )  # fmt: skip
    yield Input("training rows beyond the positions", partial(_train_with, rows, max_length=None), "128 positions")
    yield Input("a prompt of 3 MB", lambda folder: _generate_from(lm, folder, "a b " * MB), "max_row_bytes")


def _generate_from(lm: Path, folder: Path, prompt: str) -> Command:
    return ["generate", str(lm), "--input", str(write_rows(folder / "r.jsonl", [{"prompt": prompt}]))]


def _answers() -> Iterator[Input]:
    """Answers of a model, which may be anything: every grader decides them."""
    from ..graders import BY_NAME

    texts = {
        "200,000 combining marks": "e" + "\u0301\u0323" * 100_000, "200,000 digits": "1" * 200_000,
        "quotes": "\"'" * 50_000, "brackets": "(" * 100_000, "marks": "." * 100_000, "fractions": "\\frac{" * 50_000,
        "a sum": "1+" * 50_000, "superscripts": "\u2075" * 100_000, "digits of Arabic": "\u0663" * 100_000,
        "powers": "2^" * 50_000, "a large exponent": "1e999999999", "braces": "{" * 100_000 + "}" * 100_000,
        "blanks": " " * 200_000 + "x", "zeros": "0." * 50_000, "alternatives": "; " * 100_000,
        "repetitions": "(a{64}){64}" * 40, "nested stars": "(" * 500 + "a" + ")*" * 500, "controls": "\x1b[31m\0",
        "half a character": "\ud800",
    }  # fmt: skip
    for grader, grade in BY_NAME.items():
        for name, text in texts.items():
            yield Input(f"{grader}: {name}", partial(_grade, grade, text))
    yield Input("20,000 answers in a group", lambda folder: lambda: _group_of(20_000), "20000 different wordings")
    yield Input("2,000 answers in a group", lambda folder: lambda: _group_of(2000))
    for name, text in {
        "1 MB of metadata": "---\n" + "".join(f"k{i}: [1, 2]\n" for i in range(80_000)) + "---\n",
        "metadata of aliases": "---\na: &a [1,1]\nb: [*a,*a,*a,*a,*a,*a]\n---\n",
        "metadata of brackets": "---\na: " + "[" * 5000 + "\n---\n",
        "metadata of a tag": "---\na: !!python/object/apply:os.system ['touch canary']\n---\n",
        "metadata of another shape": "---\n- 1\n- 2\n---\n",
        "model-index of another shape": "---\nmodel-index: [1]\n---\n",
    }.items():
        yield Input(f"a card with {name}", partial(_card, text), "cannot be read")


def _grade(grade: Callable[[str, str], Any], text: str, folder: Path) -> Command:
    def run() -> None:
        grade("42", text)
        with contextlib.suppress(UserError):  # a gold of a user may be refused
            grade(text, text)

    return run


def _group_of(count: int) -> None:
    from ..figures.groups import figures, read_answers

    rows = [
        {"group": group, "wording": str(i), "scores": {"exact": float(i % 2)}, "answer_key": str(i % 7)}
        for group in "ab"
        for i in range(count)
    ]
    figures(read_answers(rows, "exact"))


def _card(text: str, folder: Path) -> Command:
    from ..figures.robustness_card import read_card

    (folder / "README.md").write_text(text)
    return lambda: read_card(folder)


# -- media ------------------------------------------------------------------------------------------------------------


def _media(shared: Path, vl: Path) -> Iterator[Input]:
    for name, file, content in _media_files():

        def watch(folder: Path, file: str = file, content: Callable[[], bytes] = content) -> Command:
            (folder / file).write_bytes(content())
            return ["watch", str(vl), str(folder / file), "--labels", "a,b"]

        def train(folder: Path, file: str = file, content: Callable[[], bytes] = content) -> Command:
            (folder / file).write_bytes(content())
            rows = [{"video": file, "target": f"t {i}", "start_s": i, "end_s": i + 1} for i in range(8)]
            return ["train", write_recipe(folder, VL, write_rows(folder / "clips.jsonl", rows))]

        yield Input(f"watch {name}", watch, "", either=True)
        yield Input(f"train on {name}", train, "")
    for name, source in (
        ("a device", "/dev/zero"), ("a folder", "/tmp"), ("nothing", "/nowhere.mp4"), ("an empty name", ""),
        ("a name with a newline", "a\nb.mp4"), ("a concat", "concat:/etc/passwd|/etc/group"),
        ("a camera that is none", "webcam:99"), ("a camera without a number", "webcam:x"),
        ("a camera of a negative number", "webcam:-1"), ("a pattern that is none", "lavfi:nothing"),
        ("a pattern that reads a file", "lavfi:movie=/etc/passwd"), ("a subtitle", "subfile:/etc/passwd"),
        ("half a character", "\udcff.mp4"), ("a name of 10 kB", "a" * 10_000),
    ):  # fmt: skip
        yield Input(f"watch {name}", partial(_watch, vl, source), "")


def _watch(vl: Path, source: str, folder: Path) -> Command:
    return ["watch", str(vl), source, "--labels", "a,b"]


def _media_files() -> Iterator[tuple[str, str, Callable[[], bytes]]]:
    yield "no bytes", "a.mp4", lambda: b""
    yield "zeros", "a.mp4", lambda: b"\0" * MB
    yield "text", "a.mp4", lambda: b"text\n" * 1000
    yield "a torn film", "a.mp4", lambda: _film(16)[:300]
    yield "a film without frames", "a.mp4", lambda: _film(0)
    yield "frames of 1e300 a second", "a.y4m", lambda: b"YUV4MPEG2 W16 H16 F999999999999999999:1\nFRAME\n" + b"\0" * 384
    yield "0 frames a second", "a.y4m", lambda: b"YUV4MPEG2 W16 H16 F0:0\nFRAME\n" + b"\0" * 384
    yield "a width of 0", "a.y4m", lambda: b"YUV4MPEG2 W0 H0 F25:1\nFRAME\n"
    yield "a width of 10^6", "a.y4m", lambda: b"YUV4MPEG2 W1000000 H1000000 F25:1\nFRAME\n"
    yield "a playlist", "a.m3u8", lambda: b"#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
    yield "a playlist named mp4", "a.mp4", lambda: b"#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1/x.ts\n#EXT-X-ENDLIST\n"
    yield "a list of files", "a.ffconcat", lambda: b"ffconcat version 1.0\nfile /etc/passwd\n"
    yield "a huge picture", "a.png", _huge_png
    yield "a torn picture", "a.png", lambda: _huge_png()[:40]
    yield "a script", "a.svg", lambda: b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"


def _film(frames: int) -> bytes:
    import av
    import numpy as np

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 16
        for i in range(frames):
            picture = np.full((16, 16, 3), 9 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def _huge_png() -> bytes:
    """100,000 x 100,000 pixels of one bit in a kilobyte."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 100_000, 100_000, 1, 0, 0, 0, 0)
    data = zlib.compress(b"\0" * 100_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
