"""Claims about `llm-jepa push`: what leaves this machine, what never does, and what is on the Hub after any failure.

The real client talks to a double of the Hub (`hub_double`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import _http
from safetensors.torch import save_file

from llm_jepa.cli import main
from llm_jepa.core.errors import UserError
from llm_jepa.core.identity import RUN_ID
from llm_jepa.core.publish import published
from llm_jepa.core.publishable import check_file
from llm_jepa.push import Files, check_for_token, read_folder
from tests.conftest import expect_refusal
from tests.hub_double import BOB, PART, READ, WRITE, Hub, running_hub

ROOT = Path(__file__).parent.parent
CARD = "---\nlibrary_name: transformers\nlicense: apache-2.0\n---\n# mine\n\nA model.\n"
CONFIG = {"model_type": "llama", "hidden_size": 8}


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Hub:
    """The double as the client's Hub, with a token of anna that may write, and an empty cache."""
    with running_hub() as hub:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        for key, value in {
            "ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "none"),
        }.items():
            monkeypatch.setattr(constants, key, value)  # fmt: skip
        monkeypatch.setenv("HF_TOKEN", WRITE)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)  # between tries
        huggingface_hub.close_session()
        yield hub
        huggingface_hub.close_session()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """`out`: an exported model of several files, and things that are not of a model."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with published("out") as out:
        generator = torch.Generator().manual_seed(0)
        save_file({"a": torch.randn(2 * PART // 4 + 7, generator=generator)}, out / "model-00001-of-00002.safetensors")
        save_file({"b": torch.randn(100, generator=generator)}, out / "model-00002-of-00002.safetensors")
        index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors",
                                                "b": "model-00002-of-00002.safetensors"}}  # fmt: skip
        (out / "model.safetensors.index.json").write_text(json.dumps(index))
        (out / "config.json").write_text(json.dumps(CONFIG))
        (out / "tokenizer.json").write_text('{"model": {"vocab": {"/home/user": 1, "/root": 2}}}')
        (out / "chat_template.jinja").write_text("The drive at '/mnt/data' can be used. {{ messages }}")
        (out / "README.md").write_text(CARD)
    return tmp_path / "work"


SENT = {
    ".gitattributes", "README.md", "chat_template.jinja", "config.json", "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json",
}  # fmt: skip


def push(*words: str) -> int:
    return main(["push", "out", "anna/mine", "--private", *words])


def content(name: str) -> bytes:
    return (Path("out") / name).read_bytes()


# -- what arrives -----------------------------------------------------------------------------------------------------


def test_a_push_makes_one_private_repository_of_the_very_files(hub, capsys):
    assert push() == 0
    files = hub.files("anna/mine")
    assert files.keys() == SENT and all(files[name] == content(name) for name in SENT - {".gitattributes"})
    repository = hub.repositories["anna/mine"]
    assert repository.private and len(repository.commits) == 2, "the first one is the Hub's own"
    said = capsys.readouterr().out
    assert f'revision="{repository.head}"' in said and WRITE not in said


def test_what_is_not_of_a_model_stays_here(hub, capsys):
    """The folder of a run has its record, states, logs, checkpoints and an adapter."""
    out = Path("out")
    for name in ("training_args.bin", "run.log", "trainer_state.json", "optimizer.pt", "jepa_state.safetensors",
                 "checkpoint-2/model.safetensors", "adapter/adapter_model.safetensors", ".env", "loss.png",
                 "unused.png", "runs/events", "notes.txt", "modeling_mine.py"):  # fmt: skip
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(b"anything")
    (out / "README.md").write_text(CARD + "![loss](loss.png)\n")
    assert push() == 0
    assert hub.files("anna/mine").keys() == SENT | {"loss.png"}
    said = capsys.readouterr().out
    for name in ("training_args.bin", "checkpoint-2/", "adapter/", "modeling_mine.py"):
        assert name in said


def test_the_parts_of_a_vl_model_and_of_an_embedder_are_sent(hub):
    for name in ("y_decoder/config.json", "target_tokenizer/tokenizer.json", "1_Pooling/config.json", "modules.json",
                 "processor_config.json", "additional_chat_templates/x.jinja"):  # fmt: skip
        (Path("out") / name).parent.mkdir(exist_ok=True)
        (Path("out") / name).write_text("{}")
    assert push() == 0
    assert hub.files("anna/mine").keys() > {"y_decoder/config.json", "target_tokenizer/tokenizer.json",
                                            "1_Pooling/config.json", "modules.json"}  # fmt: skip


def test_a_licence_is_written_into_the_card_that_is_sent(hub):
    Path("out/README.md").write_text(CARD.replace("license: apache-2.0\n", ""))
    assert push("--license", "llama3.2") == 0
    sent = hub.files("anna/mine")["README.md"].decode()
    assert "license: llama3.2" in sent and "library_name: transformers" in sent and sent.endswith("A model.\n")
    assert "license" not in Path("out/README.md").read_text()


def test_an_update_is_a_commit_without_the_old_shards(hub, capsys):
    assert push() == 0
    first = hub.repositories["anna/mine"].head
    for path in Path("out").glob("*00002*"):
        path.unlink()
    save_file({"a": torch.ones(3)}, "out/model.safetensors")
    Path("out/manifest.json").unlink()
    expect_refusal(capsys, ["push", "out", "anna/mine", "--private"], "holds 7 file(s) already; write --update")
    assert hub.repositories["anna/mine"].head == first
    assert push("--update") == 0
    repository = hub.repositories["anna/mine"]
    names = {name for name in SENT if "00002" not in name} - {"model.safetensors.index.json"}
    Path("out/model.safetensors.index.json").unlink()
    assert push("--update") == 0
    assert hub.files("anna/mine").keys() == names | {"model.safetensors"}
    assert repository.commits[first].keys() == SENT, "the old version is still there"


def test_a_private_repository_is_hidden_and_a_revision_stays(hub, monkeypatch):
    """The client's own errors, as a reader of the repository gets them."""
    assert push() == 0
    first = hub.repositories["anna/mine"].head
    Path("out/config.json").write_text(json.dumps({**CONFIG, "hidden_size": 16}))
    Path("out/manifest.json").unlink()
    assert push("--update") == 0

    def size(**options) -> int:
        return json.loads(Path(hf_hub_download("anna/mine", "config.json", **options)).read_text())["hidden_size"]

    assert (size(), size(revision=first)) == (16, 8)
    large = hf_hub_download("anna/mine", "model-00001-of-00002.safetensors", revision=first)
    assert Path(large).read_bytes() == content("model-00001-of-00002.safetensors")
    with pytest.raises(RevisionNotFoundError):
        size(revision="0" * 40)
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("anna/mine", "no.json")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "another cache")
    for token in (BOB, False):
        with pytest.raises(RepositoryNotFoundError):
            size(token=token)
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("anna/missing", "config.json")


# -- a connection that breaks -----------------------------------------------------------------------------------------


def test_a_broken_connection_publishes_nothing_and_the_next_push_sends_the_rest(hub, capsys):
    """The second, small file arrives; the large one breaks off in its second part, at every try."""
    hub.break_after = PART + PART // 2
    expect_refusal(capsys, ["push", "out", "anna/mine", "--private"], "broke", "Nothing is published yet")
    assert hub.files("anna/mine").keys() == {".gitattributes"}
    assert len(hub.blobs) == 1
    hub.break_after = None
    hub.requests.clear()
    assert push() == 0
    assert hub.files("anna/mine").keys() == SENT
    sent = {path for method, path in hub.requests if method == "PUT"}
    assert len(sent) == 1 and len(hub.blobs) == 2, "what had arrived was sent again"


def test_a_connection_that_is_not_there_is_one_line(hub, capsys, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    expect_refusal(capsys, ["push", "out", "anna/mine", "--private"], "The connection to http://127.0.0.1:9 broke")


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "repository", "said"),
    [
        (None, "anna/mine", "No access token: run `hf auth login`"),
        ("hf_" + "x" * 34, "anna/mine", "does not accept your access token"),
        (READ, "anna/mine", "your access token may only read"),
        (BOB, "anna/mine", "belongs to anna, and your access token to bob; write bob/mine"),
        (WRITE, "bob/theirs", "belongs to bob"),
        (WRITE, "lab/mine", "does not let you write to lab/mine"),
        (WRITE, "mine", "write USER/NAME"),
        (WRITE, "anna/../mine", "write USER/NAME"),
        (WRITE, "anna/mine--x", "write USER/NAME"),
        (WRITE, "anna/open", "is public, which --private does not change"),
    ],
)
def test_who_may_not_write_there_gets_one_line(token, repository, said, hub, capsys, monkeypatch):
    hub.make("bob/theirs", files={"config.json": b"{}"})
    hub.make("anna/open")
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    expect_refusal(capsys, ["push", "out", repository, "--private"], said)
    assert hub.repositories.keys() == {"bob/theirs", "anna/open"} and not hub.blobs
    assert all(len(repository.commits) == 1 for repository in hub.repositories.values())


def test_offline_is_said(hub, capsys, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    expect_refusal(capsys, ["push", "out", "anna/mine", "--private"], "HF_HUB_OFFLINE is set")


def test_visibility_must_be_said(hub, capsys):
    expect_refusal(capsys, ["push", "out", "anna/mine"], "--private --public is required")
    expect_refusal(capsys, ["push", "out", "anna/mine", "--private", "--public"], "not allowed with")


def spoil(name: str) -> None:
    """Make `out` unfit to be published in one way."""
    out = Path("out")
    texts = {
        "token": ("config.json", '{"model_type": "llama", "auth": "hf_' + "Q" * 34 + '"}'),
        "token in the card": ("README.md", CARD + "\nexport HF_TOKEN=hf_" + "Q" * 34 + "\n"),
        "key": ("NOTICE", "-----BEGIN OPENSSH PRIVATE KEY-----\n"),
        "cloud key": ("NOTICE", "AKIA" + "A" * 16),
        "path": ("README.md", CARD + "\nmodel = load('/home/anna/runs/mine')\n"),
        "windows path": ("README.md", CARD + "\nC:\\Users\\anna\\x\n"),
        "own path": ("tokenizer.json", json.dumps({"model": {}, "source": str(Path.cwd())})),
        "torn json": ("config.json", '{"model_type": '),
        "no licence": ("README.md", CARD.replace("license: apache-2.0\n", "")),
        "no head": ("README.md", "# mine\n"),
        "bad head": ("README.md", "---\na: [\n---\n"),
        "bytes": ("NOTICE", ""),
    }
    if name in texts:
        (out / texts[name][0]).write_text(texts[name][1])
    (out / "manifest.json").unlink()
    if name == "bytes":
        (out / "NOTICE").write_bytes(b"\xff\xfe\x00")
    elif name == "pickle":
        (out / "model-00002-of-00002.safetensors").write_bytes(b"\x80\x04\x95" + b"x" * 100)
    elif name == "appended":
        with open(out / "model-00002-of-00002.safetensors", "ab") as file:
            file.write(b"more")
    elif name == "path in the header":
        path = out / "model-00002-of-00002.safetensors"
        save_file({"b": torch.ones(3)}, path, metadata={"source": "/home/anna/base"})
    elif name == "own token in the weights":
        path = out / "model-00002-of-00002.safetensors"
        save_file({"b": torch.tensor(list(("x" * 50 + WRITE).encode()), dtype=torch.uint8)}, path)
    elif name == "link":
        (out / "LICENSE").symlink_to("/etc/hostname")
    elif name == "no weights":
        for path in out.glob("*.safetensors"):
            path.unlink()
    elif name == "no card":
        (out / "README.md").unlink()
    elif name == "damaged":
        with published("out") as again:
            for path in filter(Path.is_file, list(out.iterdir())):
                (again / path.name).write_bytes(path.read_bytes())
        (out / "config.json").write_text('{"model_type": "other"}')
    elif name == "unfinished run":
        (out / "run.json").write_text(json.dumps({RUN_ID: "x"}))
    elif name == "cut run":
        (out / "run.json").write_text("{}")
        (out / "config.json").unlink()


@pytest.mark.parametrize(
    ("spoiled", "said"),
    [
        ("token", "config.json, line 1, holds what looks like an access token"),
        ("token in the card", "README.md, line 9, holds what looks like an access token"),
        ("own token in the weights", "model-00002-of-00002.safetensors holds your access token"),
        ("key", "NOTICE, line 1, holds what looks like an access token or a private key"),
        ("cloud key", "NOTICE, line 1"),
        ("path", "README.md, line 9, names a path of some machine, /home/anna"),
        ("windows path", "C:"),
        ("own path", "names a folder of this machine"),
        ("path in the header", "model-00002-of-00002.safetensors, line 1, names a path of some machine"),
        ("torn json", "config.json"),
        ("bytes", "NOTICE is not UTF-8"),
        ("pickle", "model-00002-of-00002.safetensors is not a whole safetensors file"),
        ("appended", "model-00002-of-00002.safetensors is not a whole safetensors file"),
        ("link", "LICENSE is a link"),
        ("no licence", "names no licence; write --license NAME"),
        ("no head", "names no licence"),
        ("bad head", "not valid YAML"),
        ("no weights", "holds no weights"),
        ("no card", "has no README.md"),
        ("damaged", "out is not complete: config.json is damaged"),
        ("unfinished run", "is not finished; resume it"),
        ("cut run", "is not finished; resume it"),
    ],
)
def test_what_must_not_be_published_never_leaves(spoiled, said, hub, capsys):
    """Not one byte of a file was sent; the name of the token's owner is all that may have been asked."""
    spoil(spoiled)
    expect_refusal(capsys, ["push", "out", "anna/mine", "--private"], said)
    assert not hub.repositories and not hub.blobs and {method for method, _ in hub.requests} <= {"GET"}


def test_no_message_shows_a_token(hub, capsys):
    spoil("token")
    assert push() == 2
    captured = capsys.readouterr()
    assert "QQQQ" not in captured.out + captured.err


def test_a_token_on_the_border_of_two_blocks_is_found(tmp_path):
    """Weights are searched in blocks of 4 MiB."""
    (tmp_path / "x").write_bytes(b"x" * ((1 << 22) - 10) + WRITE.encode() + b"x")
    with pytest.raises(UserError, match="x holds your access token"):
        check_for_token(Files(tmp_path, {"x": tmp_path / "x"}, "", []), WRITE)


def test_no_folder_and_a_wrong_licence(hub, capsys):
    expect_refusal(capsys, ["push", "none", "anna/mine", "--private"], "No folder none")
    expect_refusal(capsys, ["push", "out", "anna/mine", "--private", "--license", "mit"], "says apache-2.0")
    expect_refusal(capsys, ["push", "out", "anna/mine", "--private", "--license", "My Own"], "no licence of the Hub")


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/home/anna/x", "runs/home/anna", "~/home/x", "a/tmp/b", "hf_model", "sk-learn",
        "rate 1e-5/2e-5", "docs: https://x.org/tmp/y", "./tmp/x",
    ],
)  # fmt: skip
def test_harmless_texts_pass(text, tmp_path):
    (tmp_path / "README.md").write_text(text)
    check_file(tmp_path / "README.md", "README.md", tmp_path)


def test_a_card_may_be_edited_after_the_save():
    Path("out/README.md").write_text(CARD + "More.\n")
    assert "README.md" in read_folder(Path("out")).paths


# -- the command itself -----------------------------------------------------------------------------------------------


def test_the_command_in_a_process_of_its_own():
    """With HF_ENDPOINT and HF_TOKEN alone; it loads no torch."""
    with running_hub() as hub:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub.url, "HF_TOKEN": WRITE,
                       "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}  # fmt: skip
        code = (
            "import sys\nfrom llm_jepa.cli import main\n"
            "code = main(['push', 'out', 'anna/mine', '--public'])\nprint('torch' in sys.modules)\nsys.exit(code)"
        )
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert run.stdout.splitlines()[-1] == "False"
        assert hub.files("anna/mine").keys() == SENT and not hub.repositories["anna/mine"].private
