"""A double of the Hub's HTTP protocol in a thread, for the real client (`huggingface_hub` with HF_ENDPOINT).

It keeps commits, and large files by their SHA-256, in memory. It knows two users, `anna` (whose token may write) and
`bob`. It covers what `llm-jepa push` and `from_pretrained` use: whoami, create, info, validate-yaml, preupload, LFS
batch and upload (in one part or several), commit, resolve with a redirect to large files, and the errors of the Hub.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKENS = {"hf_" + "a" * 34: ("anna", True), "hf_" + "r" * 34: ("anna", False), "hf_" + "b" * 34: ("bob", True)}
WRITE, READ, BOB = TOKENS
PART = 64 * 1024  # larger files are sent in parts of this size


@dataclass
class Repository:
    """commits: id -> name -> content; the last one is `main`."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    def commit(self, files: dict[str, bytes]) -> str:
        names = "".join(f"{name} {hashlib.sha1(content).hexdigest()}" for name, content in sorted(files.items()))
        oid = hashlib.sha1(f"{len(self.commits)} {names}".encode()).hexdigest()
        self.commits[oid] = files
        return oid


class Hub:
    """repositories: by name.  blobs: large files by SHA-256.  requests: (method, path) of all calls.

    break_after: a number of bytes of a large file after which every connection that sends it is closed; None for never.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.break_after: int | None = None
        self.received: Counter[str] = Counter()  # bytes by SHA-256
        self.lock = threading.Lock()
        self.url = ""

    def make(self, name: str, *, private: bool = False, files: dict[str, bytes] | None = None) -> Repository:
        self.repositories[name] = Repository(private)
        self.blobs |= {hashlib.sha256(data).hexdigest(): data for name, data in (files or {}).items() if is_large(name)}
        self.repositories[name].commit({".gitattributes": b"*.safetensors filter=lfs\n", **(files or {})})
        return self.repositories[name]

    def files(self, name: str) -> dict[str, bytes]:
        repository = self.repositories[name]
        return repository.commits[repository.head]


class Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A double that listens on a free port; `url` is its HF_ENDPOINT."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        path = unquote(url.path)
        with self.hub.lock:
            self.hub.requests.append((self.command, path))
        try:
            for method, pattern, function in ROUTES:
                if self.command in method and (match := re.fullmatch(pattern, path)):
                    function(self, *match.groups())
                    return
            raise Refused(501, message=f"the double does not know {self.command} {path}")
        except Refused as refused:
            self.read()
            headers = {"X-Error-Code": refused.code} if refused.code else {}
            self.send(refused.status, json.dumps({"error": refused.message}).encode(), headers)

    # -- plumbing -----------------------------------------------------------------------------------------------------

    def read(self) -> bytes:
        """The body; nothing at a second call."""
        if getattr(self, "is_read", None) is self.headers:
            return b""
        self.is_read = self.headers
        if self.headers.get("Transfer-Encoding") == "chunked":
            blocks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                blocks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(blocks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def send(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def say(self, value: Any) -> None:
        self.send(200, json.dumps(value).encode())

    def user(self, *, writes: bool = False) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise Refused(401, message="Invalid username or password.")
        name, may_write = TOKENS.get(token, (None, False))
        if writes and not name:
            raise Refused(401, message="Invalid username or password.")
        if writes and not may_write:
            raise Refused(403, message="You don't have the rights to do this with this token")
        return name

    def repository(self, name: str, *, writes: bool = False) -> Repository:
        """As the Hub does, it does not tell strangers whether a private repository exists."""
        user, found = self.user(writes=writes), self.hub.repositories.get(name)
        is_owner = name.partition("/")[0] == user
        if found is None or found.private and not is_owner:
            raise Refused(404 if user else 401, "RepoNotFound", "Repository not found")
        if writes and not is_owner:
            raise Refused(403, message="You don't have the rights to write to this repository")
        return found

    def files_at(self, repository: Repository, revision: str) -> tuple[str, dict[str, bytes]]:
        oid = repository.head if revision == "main" else revision
        if oid not in repository.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid, repository.commits[oid]

    # -- routes -------------------------------------------------------------------------------------------------------

    def whoami(self) -> None:
        user = self.user()
        if user is None:
            raise Refused(401, message="Invalid username or password.")
        self.say({"type": "user", "name": user, "orgs": [{"name": "lab"}] if user == "anna" else []})

    def create(self) -> None:
        user, body = self.user(writes=True), json.loads(self.read())
        owner = body.get("organization") or user
        name = f"{owner}/{body['name']}"
        if owner != user:
            raise Refused(403, message=f"You don't have the rights to create a model under the namespace {owner!r}")
        if name in self.hub.repositories:
            raise Refused(409, message="You already created this model repo")
        self.hub.make(name, private=body.get("visibility") == "private" or bool(body.get("private")))
        self.say({"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def info(self, name: str, revision: str | None = None) -> None:
        repository = self.repository(name)
        oid, files = self.files_at(repository, revision or "main")
        siblings = []
        for file, content in sorted(files.items()):
            sibling: dict[str, Any] = {"rfilename": file}
            if "blobs" in self.query:
                sibling |= {"size": len(content), "blobId": hashlib.sha1(content).hexdigest()}
                if is_large(file):
                    sha256 = hashlib.sha256(content).hexdigest()
                    sibling["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 130}
            siblings.append(sibling)
        self.say({"_id": name, "id": name, "modelId": name, "sha": oid, "private": repository.private,
                  "gated": False, "disabled": False, "tags": [], "siblings": siblings})  # fmt: skip

    def tree(self, name: str, revision: str) -> None:
        _, files = self.files_at(self.repository(name), revision)
        rows = []
        for file, content in sorted(files.items()):
            row: dict[str, Any] = {"type": "file", "path": file, "size": len(content)}
            row["oid"] = hashlib.sha1(content).hexdigest()
            if is_large(file):
                row["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            rows.append(row)
        self.say(rows)

    def validate_yaml(self) -> None:
        content = json.loads(self.read())["content"]
        errors = [] if content.startswith("---\n") else [{"message": "empty or missing yaml metadata"}]
        self.send(400 if errors else 200, json.dumps({"errors": errors, "warnings": []}).encode())

    def preupload(self, name: str, revision: str) -> None:
        self.repository(name, writes=True)
        rows = json.loads(self.read())["files"]
        self.say({"files": [
            {"path": row["path"], "uploadMode": "lfs" if is_large(row["path"]) else "regular", "shouldIgnore": False}
            for row in rows
        ]})  # fmt: skip

    def batch(self, name: str) -> None:
        self.repository(name, writes=True)
        objects = []
        for row in json.loads(self.read())["objects"]:
            answer: dict[str, Any] = {"oid": row["oid"], "size": row["size"]}
            if row["oid"] not in self.hub.blobs:  # what is there already needs no upload
                target = f"{self.hub.url}/upload/{row['oid']}"
                upload: dict[str, Any] = {"href": target}
                if row["size"] > PART:
                    count = -(-row["size"] // PART)
                    upload["header"] = {"chunk_size": str(PART)} | {
                        str(part): f"{target}?part={part}" for part in range(1, count + 1)
                    }
                answer["actions"] = {"upload": upload}
            objects.append(answer)
        self.say({"objects": objects, "transfer": "basic"})

    def upload(self, oid: str) -> None:
        length = int(self.headers["Content-Length"])
        limit = self.hub.break_after
        with self.hub.lock:
            self.hub.received[oid] += length
            if limit is not None and self.hub.received[oid] > limit:
                self.close_connection = True
                self.connection.close()  # in the middle
                return
        content = self.read()
        if "part" in self.query:
            self.hub.parts[oid, int(self.query["part"])] = content
        else:
            self.keep(oid, content)
        self.send(200, headers={"ETag": f'"{hashlib.md5(content).hexdigest()}"'})

    def complete(self, oid: str) -> None:
        parts = [part["partNumber"] for part in json.loads(self.read())["parts"]]
        self.keep(oid, b"".join(self.hub.parts[oid, part] for part in sorted(parts)))
        self.say({"ok": True})

    def keep(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refused(422, message="the content has another SHA-256")
        self.hub.blobs[oid] = content

    def commit(self, name: str, revision: str) -> None:
        repository = self.repository(name, writes=True)
        rows = [json.loads(line) for line in self.read().splitlines()]
        files = dict(repository.commits[repository.head])
        for row in rows:
            value = row["value"]
            if row["key"] == "header" and value.get("parentCommit") not in (None, repository.head):
                raise Refused(412, message="A commit has happened since.")
            if row["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif row["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise Refused(422, message=f"LFS object {value['oid']} does not exist")
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif row["key"] == "deletedFile":
                del files[value["path"]]
        oid = repository.commit(files)
        self.say({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"})

    def resolve(self, name: str, revision: str, file: str) -> None:
        oid, files = self.files_at(self.repository(name), revision)
        if file not in files:
            self.send(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid})
            return
        content, headers = files[file], {"X-Repo-Commit": oid}
        if not is_large(file):
            self.send(200, content, headers | {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'})
            return
        sha256 = hashlib.sha256(content).hexdigest()
        # As on the Hub, the large file is on another host: the client does not ask there for its properties.
        headers |= {"X-Linked-ETag": f'"{sha256}"', "X-Linked-Size": str(len(content))}
        self.send(302, b"", headers | {"Location": f"{self.hub.url.replace('127.0.0.1', 'localhost')}/cdn/{sha256}"})

    def cdn(self, sha256: str) -> None:
        content = self.hub.blobs[sha256]
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if start:
            span = f"bytes {start[1]}-{len(content) - 1}/{len(content)}"
            self.send(206, content[int(start[1]) :], {"Content-Range": span})
        else:
            self.send(200, content)


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".gguf"))


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (("GET",), "/api/whoami-v2", Handler.whoami),
    (("POST",), "/api/repos/create", Handler.create),
    (("POST",), "/api/validate-yaml", Handler.validate_yaml),
    (("GET",), f"/api/models/{NAME}", Handler.info),
    (("GET",), f"/api/models/{NAME}/revision/([^/]+)", Handler.info),
    (("GET",), f"/api/models/{NAME}/tree/([^/]+)", Handler.tree),
    (("POST",), f"/api/models/{NAME}/preupload/([^/]+)", Handler.preupload),
    (("POST",), f"/api/models/{NAME}/commit/([^/]+)", Handler.commit),
    (("POST",), rf"/{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    (("PUT",), "/upload/([0-9a-f]{64})", Handler.upload),
    (("POST",), "/upload/([0-9a-f]{64})", Handler.complete),
    (("GET", "HEAD"), f"/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
    (("GET", "HEAD"), "/cdn/([0-9a-f]{64})", Handler.cdn),
]
