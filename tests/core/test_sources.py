"""Rows are read as they are written: values, types, absent keys, and the order of keys, whatever the container."""

from __future__ import annotations

import bz2
import copy
import gzip
import json
import lzma
import math
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, Features, List, Value, load_dataset
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from trl import SFTConfig, SFTTrainer

from llm_jepa import UserError
from llm_jepa.core.sources import data_sha256, read_rows
from llm_jepa.lm.rows import parse_row
from llm_jepa.lm.views import build_views
from tests.conftest import tiny_model
from tests.lm.test_views import PUBLISHED, base_tokenizer

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats(allow_nan=False),
    texts,
    st.just("5"),
    st.just(""),
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=8
)
calls = st.lists(
    st.fixed_dictionaries(
        {"type": st.just("function"), "function": st.fixed_dictionaries({"name": texts, "arguments": values})}
    ),
    max_size=2,
)
turns = st.lists(
    st.fixed_dictionaries({"role": texts, "content": texts | st.none()}, optional={"tool_calls": calls, "name": texts}),
    max_size=3,
)
any_row = st.fixed_dictionaries(
    {"id": scalars},
    optional={"messages": turns, "tools": values, "answer": scalars, "score": st.floats(allow_nan=False), "n": values},
)
any_rows = st.lists(any_row, min_size=1, max_size=4)
row_settings = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def lines(rows: list[dict], **options) -> bytes:
    return "".join(json.dumps(row, **options) + "\n" for row in rows).encode()


def in_columns(rows: list[dict]) -> list[dict]:
    """A data set has columns: a key that other rows have is None."""
    columns = dict.fromkeys(key for row in rows for key in row)
    return [{column: row.get(column) for column in columns} for row in rows]


def same(read: list, written: list) -> bool:
    """Equal with types and with the order of keys: 1 is not 1.0, nor True."""
    return repr(read) == repr(written)


@given(any_rows)
@row_settings
@example([{"id": 1, "n": [{"x": 1}, {"y": 2, "x": 1.5}, "5", 5, None, [], {}]}])
@example([{"id": 2**70}, {"id": 0.1 + 0.2}, {"id": "5"}, {"id": 5e-324}, {"id": -0.0}])
def test_rows_are_read_as_written_from_every_container(tmp_path, rows):
    """The old reader made {'x': 1} next to {'y': 2, 'x': 1.5} a {'x': 1.0, 'y': None}."""
    expected = in_columns(rows)
    folder = tmp_path / "hub"
    folder.mkdir(exist_ok=True)
    containers = {
        tmp_path / "a.jsonl": lines(rows),
        tmp_path / "b.jsonl": b"\xef\xbb\xbf" + lines(rows, ensure_ascii=False),
        tmp_path / "c.json": json.dumps(rows, indent=1).encode(),
        tmp_path / "d.json": lines(rows),
        tmp_path / "e.jsonl.gz": gzip.compress(lines(rows)),
        tmp_path / "f.jsonl.bz2": bz2.compress(lines(rows)),
        tmp_path / "g.json.xz": lzma.compress(json.dumps(rows).encode()),
        folder / "train.jsonl": lines(rows),
    }
    hashes = set()
    for path, content in containers.items():
        path.write_bytes(content)
        read = read_rows(str(path if path.parent == tmp_path else folder))
        assert same(list(read), expected), path
        hashes.add(data_sha256(read))
    assert len(hashes) == 1, "one data set has one hash"


@given(any_rows)
@row_settings
def test_rows_stay_as_written_when_a_data_set_is_split_saved_and_mapped(tmp_path_factory, rows):
    """`map` keeps the columns that it does not change: it decodes and encodes them again."""
    folder = tmp_path_factory.mktemp("saved")
    (folder / "a.jsonl").write_bytes(lines(rows))
    read, expected = read_rows(str(folder / "a.jsonl")), in_columns(rows)
    mapped = read.map(lambda row, index: {"index": index}, with_indices=True)
    assert same([{key: row[key] for key in expected[0]} for row in mapped], expected)
    read.save_to_disk(folder / "one")
    DatasetDict({"train": read, "test": read.select([0])}).save_to_disk(folder / "two")
    assert same(list(read_rows(str(folder / "one"))), expected)
    assert same(list(read_rows(str(folder / "two"))), expected)
    assert same(list(read_rows(str(folder / "two"), split="test")), expected[:1])
    assert same(list(read.select(range(len(rows))[::-1])), expected[::-1])


def test_not_a_number_and_infinities_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"x": NaN, "y": [NaN, -Infinity]}\n{"x": Infinity, "y": 1}\n')
    first, second = read_rows(str(tmp_path / "a.jsonl"))
    assert math.isnan(first["x"]) and math.isnan(first["y"][0]) and first["y"][1] == -math.inf
    assert second == {"x": math.inf, "y": 1}


def test_plain_columns_have_plain_types(tmp_path):
    """So that other tools can read them; a column with one number among texts is of any values."""
    rows = [{"prompt": "a", "n": 1, "x": 0.5, "ok": True, "none": None, "mixed": 1, "big": 2**64}]
    rows += [{"prompt": None, "n": None, "x": 1.0, "ok": False, "none": None, "mixed": 1.0, "big": 1}]
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    read = read_rows(str(tmp_path / "a.jsonl"))
    kinds = {name: getattr(feature, "dtype", None) for name, feature in read.features.items()}
    assert kinds == {
        "prompt": "string", "n": "int64", "x": "float64", "ok": "bool", "none": "null", "mixed": "object",
        "big": "object",
    }  # fmt: skip
    assert same(list(read), rows)


def test_the_hash_of_plain_rows_is_what_it_was(tmp_path):
    """Runs are resumed by it. `Dataset.from_list` is how rows were read before; the last digits were computed then."""
    rows = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "ü"}]} for i in range(3)
    ]
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    sums = {data_sha256(read_rows(str(tmp_path / name))) for name in ("a.jsonl", "a.parquet")}
    assert sums == {data_sha256(Dataset.from_list(rows))} == {data_sha256(rows)}
    assert sums.pop().startswith("3582bad6772f842a")


# -- the LM row of rows that were read --------------------------------------------------------------------------------


def tool_row(arguments: dict, properties: dict, answer: str) -> dict:
    """A call with its result, then the answer; `tools` describes the function."""
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    turns = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "f", "content": "3"},
    ]
    schema = {"type": "object", "properties": properties, "required": []}
    tool = {"type": "function", "function": {"name": "f", "description": "Do.", "parameters": schema}}
    return {"prompt": turns, "completion": [{"role": "assistant", "content": answer}], "tools": [tool]}


TOOL_ROWS = [
    tool_row({"x": 1}, {"x": {"type": "integer"}}, "ok"),
    tool_row({"y": 2, "x": 1.5}, {"y": {"type": "integer"}, "x": {"type": "number"}}, "fine"),
    tool_row({"x": "a", "z": [1, None, {"k": True}]}, {"x": {"type": "string"}}, "done"),
]
TOOL_ROWS.append({**TOOL_ROWS[0], "prompt": TOOL_ROWS[0]["prompt"][:1]})  # no call: every template renders this
NEEDS_CONTENT_PARTS = {
    f"{name}{ending}" for name in ("idefics3", "llava_next", "smolvlm") for ending in ("", "_training")
}


@pytest.fixture(scope="module")
def trl(tmp_path_factory):
    """A trainer of TRL, whose tokenisation is called with other tokenizers."""
    tokenizer = copy.deepcopy(base_tokenizer())
    options = {"max_length": None, "bf16": False, "use_cpu": True, "report_to": "none"}
    return SFTTrainer(
        tiny_model(tokenizer),
        SFTConfig(output_dir=str(tmp_path_factory.mktemp("trl")), **options),
        train_dataset=Dataset.from_list([{"prompt": "a", "completion": "b"}]),
        processing_class=tokenizer,
    )


@pytest.fixture(scope="module")
def tool_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tools") / "rows.jsonl"
    path.write_bytes(lines(TOOL_ROWS))
    return str(path), load_dataset("json", data_files=str(path), split="train")


def test_rows_with_tools_are_those_of_the_loader_of_trl(tool_file):
    path, theirs = tool_file
    assert same(list(read_rows(path)), TOOL_ROWS) and list(theirs) == TOOL_ROWS


@pytest.mark.parametrize("name", sorted(path.stem for path in PUBLISHED.glob("*.jinja")))
def test_rows_with_tools_are_trained_as_trl_trains_them(name, trl, tool_file):
    """From the same file to the same token ids, for every template that TRL ships; or both refuse the row.

    Phi-3's template leaves tool turns out, and three others need content parts: TRL trains on what is left of the row,
    and we refuse it.
    """
    path, their_rows = tool_file
    tokenizer = copy.deepcopy(base_tokenizer())
    tokenizer.chat_template = (PUBLISHED / f"{name}.jinja").read_text()
    equal = 0
    for index, row in enumerate(read_rows(path)):
        try:
            prepared = trl._prepare_dataset(their_rows.select([index]), tokenizer, trl.args, False, None, "train")
            theirs = prepared[0]["input_ids"]
        except Exception:  # a template may raise anything
            theirs = None
        try:
            ours = build_views(row, tokenizer).input_ids
        except UserError:
            ours = None
        if ours is None and theirs is not None:
            contents = [turn["content"] for turn in [*row["prompt"], *row["completion"]]]
            text = tokenizer.decode(theirs)
            assert any(content not in text for content in contents), "TRL trains on a row without one of its turns"
        else:
            assert ours == theirs, f"row {index}"
            equal += ours is not None
    assert equal or name in NEEDS_CONTENT_PARTS, "every row was refused: this proves nothing"


# -- CSV --------------------------------------------------------------------------------------------------------------


def test_cells_of_a_csv_are_texts(tmp_path):
    """pandas would read None, NA, and null as missing, and 1 next to 0.5 as 1.0."""
    content = '\ufeffprompt,completion,n\r\nq,None,1\r\n"a\nb, ""c""",NA,0.5\r\n\r\nx,null\r\ny,1,\r\nz,nan,True\r\n'
    expected = [
        {"prompt": "q", "completion": "None", "n": "1"},
        {"prompt": 'a\nb, "c"', "completion": "NA", "n": "0.5"},
        {"prompt": "x", "completion": "null", "n": None},
        {"prompt": "y", "completion": "1", "n": None},
        {"prompt": "z", "completion": "nan", "n": "True"},
    ]
    (tmp_path / "hub").mkdir()
    for path, data in {
        tmp_path / "a.csv": content.encode(),
        tmp_path / "a.tsv": content.replace('"a\nb, ', '"a\nb; ').replace(",", "\t").replace(";", ",").encode(),
        tmp_path / "a.csv.gz": gzip.compress(content.encode()),
        tmp_path / "hub" / "train.csv": content.encode(),
    }.items():
        path.write_bytes(data)
        read = list(read_rows(str(path if path.parent == tmp_path else tmp_path / "hub")))
        assert read == expected, path
    assert [parse_row(row, "row").completion for row in expected] == ["None", "NA", "null", "1", "nan"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"prompt,completion\na,b\nc,d,e\n", "line 3 has 3 cells, the header has 2"),
        (b'prompt,completion\na,"b\nc,d\n', "line 2 is not CSV: unexpected end of data"),
        (b"prompt,prompt\na,b\n", "two columns 'prompt'"),
        (b"prompt,completion\n", "holds no rows"),
        (b"", "is empty"),
        ("prompt,completion\nä,b\n".encode("latin-1"), "is not UTF-8"),
    ],
)
def test_a_csv_that_cannot_be_read_is_named(tmp_path, content, said):
    (tmp_path / "bad.csv").write_bytes(content)
    with pytest.raises(UserError, match=f"bad.csv.*{said}"):
        read_rows(str(tmp_path / "bad.csv"))


def test_a_long_cell_is_read(tmp_path):
    """Python's own limit is 131,072 characters."""
    (tmp_path / "a.csv").write_text("prompt,completion\nq," + "x" * 200_000 + "\n")
    assert len(read_rows(str(tmp_path / "a.csv"))[0]["completion"]) == 200_000


# -- several files, globs, folders ------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Three files of one row each, whose order by name is not the order of writing."""
    for name in ("c", "a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines([{"prompt": name, "completion": 1 if name == "a" else "x"}]))
    return tmp_path


def prompts(source, **options) -> list[str]:
    return [row["prompt"] for row in read_rows(source, **options)]


def test_files_and_globs(folder):
    assert prompts(str(folder / "*.jsonl")) == ["a", "b", "c"], "in the order of their names"
    assert prompts([str(folder / "c.jsonl"), str(folder / "[ab].jsonl")]) == ["c", "a", "b"]
    assert prompts(str(folder / "**" / "*.jsonl")) == ["a", "b", "c"]
    (folder / "d[1].csv").write_text("prompt,completion\nd,5\n")
    assert prompts(str(folder / "d[1].csv")) == ["d"], "a file whose name looks like a pattern"
    assert [row["completion"] for row in read_rows([str(folder / "a.jsonl"), str(folder / "d[1].csv")])] == [1, "5"]


def test_parquet_files(folder):
    for name in "qp":
        Dataset.from_list([{"prompt": name, "completion": "x", "n": 1}]).to_parquet(folder / f"{name}.parquet")
    assert prompts(str(folder / "p.parquet")) == ["p"]
    assert prompts(str(folder / "*.parquet")) == ["p", "q"]
    with pytest.raises(UserError, match="together with files of another kind"):
        read_rows([str(folder / "p.parquet"), str(folder / "a.jsonl")])


def test_folders_of_data_files(folder):
    data = folder / "data"
    data.mkdir()
    (data / "train-0.jsonl").write_bytes(lines([{"prompt": "t0", "completion": "x"}]))
    (data / "train-1.jsonl.gz").write_bytes(gzip.compress(lines([{"prompt": "t1", "completion": "x"}])))
    (data / "validation.jsonl").write_bytes(lines([{"prompt": "v", "completion": "x"}]))
    assert prompts(str(data)) == ["t0", "t1"]
    assert prompts(str(data), split="validation") == ["v"]
    with pytest.raises(UserError, match="has no split 'test'; it has train, validation"):
        read_rows(str(data), split="test")


def test_the_readme_of_a_folder_says_how_it_is_read(folder):
    """A separator of its own: `datasets` reads it then."""
    data = folder / "data"
    data.mkdir()
    (data / "train.csv").write_text("prompt|completion\na|b, c\n")
    (data / "README.md").write_text('---\nconfigs:\n- config_name: default\n  data_files: train.csv\n  sep: "|"\n---\n')
    assert list(read_rows(str(data))) == [{"prompt": "a", "completion": "b, c"}]


def test_a_saved_data_set_is_read_without_its_format(folder):
    Dataset.from_list([{"prompt": "a", "completion": "b", "n": 3}]).with_format("numpy").save_to_disk(folder / "saved")
    (row,) = read_rows(str(folder / "saved"))
    assert type(row["n"]) is int


def test_structures_of_a_parquet_file_are_those_of_datasets(tmp_path):
    """A Parquet file has types of its own; the keys that a structure lacks are None in the file."""
    features = Features({"prompt": Value("string"), "views": {"contexts": List(Value("string"))}})
    data = Dataset.from_list([{"prompt": "a", "views": {"contexts": ["b"]}}], features=features)
    data.to_parquet(tmp_path / "a.parquet")
    theirs = load_dataset("parquet", data_files=str(tmp_path / "a.parquet"), split="train")
    assert list(read_rows(str(tmp_path / "a.parquet"))) == list(theirs)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": ', "line 2 is not JSON in UTF-8"),
        ("a.jsonl", b'{"a": 1}\n\n{"a": "\xff"}', "line 3 is not JSON in UTF-8"),
        ("a.jsonl", b'{"a": 1}\n[2]', "line 2 must hold a JSON object, found list"),
        ("a.jsonl", b'{"a": "\\ud83d"}', "line 1 holds half of a surrogate pair"),
        ("a.jsonl", b'{"a": {"b": 1, "c": 2, "b": 3}}', "line 1 is not JSON.*the key 'b' occurs twice"),
        ("a.jsonl", b'{"a": ' + b"[" * 100_000, "nested too deep"),
        ("a.json", b'[{"a": 1}, 3]', "row 2 of the array must hold a JSON object, found int"),
        ("a.json", b'[{"a": 1}', "a.json is not JSON in UTF-8"),
        ("a.json", b"[]", "holds no rows"),
        ("a.json", b'{\n"a": 1}', "line 1 is not JSON"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), "line 1 is not JSON in UTF-8"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-12], "Cannot read"),
        ("a.parquet", b"PAR1", "Cannot read"),
        ("a.txt", b"text", "is not a .jsonl, .json, .csv or .parquet file"),
        ("a.pkl", b"\x80\x04N.", "is not a .jsonl, .json, .csv or .parquet file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        read_rows(str(tmp_path / name))
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{}/none.jsonl", "No data file at"),
        ("{}/none", "No data file at"),
        ("{}/*.csv", "No file matches"),
        (["{}/a.jsonl", "{}"], "is a folder; name it alone"),
        (["{}/a.jsonl", "owner/name"], "No data file at owner/name"),
    ],
)
def test_a_source_that_does_not_exist_is_named(folder, source, said):
    fill = [one.format(folder) for one in source] if isinstance(source, list) else source.format(folder)
    with pytest.raises(UserError, match=said):
        read_rows(fill)


@pytest.mark.parametrize("name", ["train.tar", "train.h5", "a.png"])
def test_a_folder_of_other_files_is_refused(tmp_path, name):
    """No reader that could run what a stranger wrote, and none that gives no rows."""
    (tmp_path / name).write_bytes(b"\x80\x04N.")
    with pytest.raises(UserError, match=r"holds \w+ files|Cannot load"):
        read_rows(str(tmp_path))


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    import pandas

    monkeypatch.setattr(pandas, "read_pickle", lambda *_: pytest.fail("a pickle was read"))
    (tmp_path / "train.pkl").write_bytes(b"\x80\x04N.")
    with pytest.raises(UserError):
        read_rows(str(tmp_path))


def test_zstandard(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(b'{"prompt": "a"}\n') * 2)
    assert list(read_rows(str(tmp_path / "a.jsonl.zst"))) == [{"prompt": "a"}] * 2


def test_zstandard_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("llm_jepa.core.row_files.zstandard", None)
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(9))
    with pytest.raises(UserError, match="pip install zstandard"):
        read_rows(str(tmp_path / "a.jsonl.zst"))


def test_line_breaks_inside_a_text_do_not_end_a_row(tmp_path):
    """U+2028 and U+0085 are line breaks for `str.splitlines`, not for JSON lines."""
    (tmp_path / "a.jsonl").write_text('{"prompt": "a\u2028b\u0085c"}\r\n', encoding="utf-8", newline="")
    assert Path(tmp_path / "a.jsonl").read_text(encoding="utf-8").count("\u2028") == 1
    assert prompts(str(tmp_path / "a.jsonl")) == ["a\u2028b\u0085c"]
