"""A Hub on loopback: the part of the Hub's HTTP protocol that its own client speaks.

Git and storage are dictionaries. Uploads, commits and downloads are checked as the Hub checks them:
tokens, sizes, hashes, parents of commits, metadata of cards. Every request is noted in ``log``, and
``faults`` breaks a chosen one.
"""

import base64
import hashlib
import json
import os
import re
import socket
import struct
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

from fastdraft_hf.hub.folder import gather

TOKEN = "hf_" + "LoopbackTokenOfTests" + "0123456789"
READ_TOKEN = "hf_" + "ReadOnlyTokenOfTests" + "0123456789"
LFS_SUFFIXES = (".safetensors", ".bin", ".parquet")
ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


def git_oid(content: bytes) -> str:
    """Return the id that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Entry:
    """A file of a commit: its bytes, and the sha256 when it is stored as a large one."""

    content: bytes
    lfs: str | None = None

    @property
    def oid(self) -> str:
        return self.lfs or git_oid(self.content)


@dataclass
class Commit:
    oid: str
    title: str
    files: dict[str, Entry]
    parent: str | None


@dataclass
class Repo:
    """Branches, commits and the large files that were uploaded, each under its sha256."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    storage: dict[str, bytes] = field(default_factory=dict)

    def add(self, branch: str, title: str, files: dict[str, Entry]) -> Commit:
        parent = self.branches.get(branch)
        seed = json.dumps([title, parent, sorted((k, e.oid) for k, e in files.items())])
        commit = Commit(hashlib.sha1(seed.encode()).hexdigest(), title, files, parent)
        self.commits[commit.oid] = commit
        self.branches[branch] = commit.oid
        return commit

    def at(self, revision: str) -> Commit | None:
        return self.commits.get(self.branches.get(revision, revision))

    def history(self, branch: str = "main") -> list[Commit]:
        found, oid = [], self.branches.get(branch)
        while oid is not None:
            found.append(self.commits[oid])
            oid = self.commits[oid].parent
        return found


class HubServer:
    """The server and what it holds; ``with hub_server() as hub: …``."""

    def __init__(self) -> None:
        self.models: dict[str, Repo] = {}
        self.log: list[tuple[str, str]] = []
        self.uploaded: list[str] = []  # sha256 of every large file that was received whole
        self.fault: tuple[str, range] | None = None
        self.lock = threading.RLock()
        self._count = 0
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def break_at(self, kind: str, number: int, times: int = 1) -> None:
        """Break the ``number``-th request from now on, and ``times - 1`` after it.

        Kinds: ``500``, ``reset`` (before anything is done), ``lost`` (done, but the answer is cut
        off), ``truncated`` (half of the answer's body), ``silent`` (no answer at all) and ``echo``
        (an error whose text quotes the request's Authorization).
        """
        self.fault, self._count = (kind, range(number, number + times)), 0

    def heal(self) -> None:
        self.fault = None

    def next_fault(self) -> str | None:
        with self.lock:
            number, self._count = self._count, self._count + 1
            return self.fault[0] if self.fault and number in self.fault[1] else None


@contextmanager
def hub_server() -> Iterator[HubServer]:
    hub = HubServer()
    thread = threading.Thread(target=hub.server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()


class _Answer(Exception):
    """An answer other than the ordinary one."""

    def __init__(self, status: int, error: str = "", code: str = "", **more: Any) -> None:
        super().__init__(error)
        self.status, self.error, self.code, self.more = status, error, code, more


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    # Head and body in one packet at once; else every answer waits 40 ms for an acknowledgement.
    disable_nagle_algorithm = True
    wbufsize = 1 << 16

    ROUTES: tuple[tuple[str, str, str], ...] = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", "branch"),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
        ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/.*)?", "tree"),
        ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", "info"),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/storage/([^/]+/[^/]+)/(\w{64})", "upload"),
        ("POST", r"/storage/([^/]+/[^/]+)/(\w{64})/verify", "verify"),
        ("HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
        ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    )

    # -------------------------------------------------------------------------------- transport

    def log_message(self, *words: Any) -> None:
        pass

    def _handle(self) -> None:
        fault = self.hub.next_fault()
        if fault == "reset":
            self._reset()
            return
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = b"".join(self._chunks())
        else:
            self.body = self.rfile.read(length)
        url = urlsplit(self.path)
        path = unquote(url.path)
        with self.hub.lock:
            self.hub.log.append((self.command, path))
        if fault == "silent":
            self.close_connection = True
            threading.Event().wait(3)
            return
        if fault == "500":
            self._send(500, b"<html>something is wrong</html>", {"Content-Type": "text/html"})
            return
        if fault == "echo":
            said = f"bad request with {self.headers.get('Authorization')}"
            payload = json.dumps({"error": f"{'x' * 120} {said}"}).encode()
            self._send(400, payload, {"Content-Type": "application/json", "X-Error-Message": said})
            return
        if len(self.body) < length:  # the client broke off
            self.close_connection = True
            return
        try:
            with self.hub.lock:
                status, payload, headers = self._route(path)
        except _Answer as answer:
            status, payload, headers = self._of_answer(answer)
        if fault == "lost":
            self._reset()
            return
        self._send(status, payload, headers, truncated=fault == "truncated")

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = _handle

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _reset(self) -> None:
        """End the connection as a network that drops does: with RST, without an answer."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def _send(
        self, status: int, payload: bytes, headers: dict[str, str], truncated: bool = False
    ) -> None:
        self.send_response(status)
        headers.setdefault("Content-Length", str(len(payload)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(payload[: len(payload) // 2] if truncated else payload)
        if truncated:
            self.close_connection = True

    def finish(self) -> None:
        if self.connection.fileno() != -1:  # not after a reset
            super().finish()

    def _of_answer(self, answer: _Answer) -> tuple[int, bytes, dict[str, str]]:
        headers = {"Content-Type": "application/json"}
        if answer.code:
            headers["X-Error-Code"] = answer.code
        if answer.error:
            headers["X-Error-Message"] = answer.error
        return answer.status, json.dumps({"error": answer.error, **answer.more}).encode(), headers

    def _route(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        for method, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == self.command:
                # `Any` for the answer: a value for JSON, or (status, bytes, headers).
                answer = getattr(self, name)(*match.groups())
                if isinstance(answer, tuple):
                    return answer
                body = json.dumps(answer).encode()
                return 200, body, {"Content-Type": "application/json"}
        raise _Answer(404, f"no such route: {self.command} {path}")

    # --------------------------------------------------------------------------------- accounts

    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _user(self) -> str:
        token = self._token()
        if token not in (TOKEN, READ_TOKEN):
            raise _Answer(401, "Invalid credentials in Authorization header")
        return "user"

    def _writer(self, repo: str) -> None:
        if self._user() != repo.split("/")[0] or self._token() != TOKEN:
            raise _Answer(403, f"You don't have the rights to create or write {repo}")

    def whoami(self) -> Any:
        return {"type": "user", "name": self._user(), "auth": {"type": "access_token"}, "orgs": []}

    # ------------------------------------------------------------------------------ repositories

    def _repo(self, name: str) -> Repo:
        repo = self.hub.models.get(name)
        if repo is None or (repo.private and self._token() not in (TOKEN, READ_TOKEN)):
            raise _Answer(404, "Repository not found", "RepoNotFound")
        return repo

    def _at(self, repo: Repo, revision: str | None) -> Commit:
        commit = repo.at(revision or "main")
        if commit is None:
            raise _Answer(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def create(self) -> Any:
        asked = json.loads(self.body)
        owner = asked.get("organization") or self._user()
        name = f"{owner}/{asked['name']}"
        self._writer(name)
        url = f"{self.hub.url}/{name}"
        if name in self.hub.models:
            raise _Answer(409, "You already created this repo", url=url)
        private = asked.get("private") or asked.get("visibility") == "private"
        repo = self.hub.models[name] = Repo(bool(private))
        repo.add("main", "initial commit", {".gitattributes": Entry(ATTRIBUTES)})
        return {"url": url, "name": name, "id": "0" * 24}

    def branch(self, name: str, branch: str) -> Any:
        self._writer(name)
        repo = self._repo(name)
        if branch in repo.branches:
            raise _Answer(409, "Reference already exists")
        repo.branches[branch] = repo.branches["main"]
        return {}

    def _card(self, files: dict[str, Entry]) -> dict[str, Any] | None:
        if "README.md" not in files:
            return None
        return read_metadata(files["README.md"].content.decode())

    def info(self, name: str, revision: str | None) -> Any:
        repo = self._repo(name)
        commit = self._at(repo, revision)
        card = self._card(commit.files)
        found: dict[str, Any] = {
            "id": name,
            "sha": commit.oid,
            "private": repo.private,
            "tags": (card or {}).get("tags", []),
            "siblings": [{"rfilename": path} for path in sorted(commit.files)],
        }
        if card is not None:
            found["cardData"] = card
        return found

    def tree(self, name: str, revision: str) -> Any:
        commit = self._at(self._repo(name), revision)
        return [_tree_file(p, e) for p, e in sorted(commit.files.items())]

    # -------------------------------------------------------------------------------- uploading

    def validate_yaml(self) -> Any:
        asked = json.loads(self.body)
        try:
            data = read_metadata(asked["content"]) or {}
            errors = metadata_errors(data)
        except yaml.YAMLError as error:
            errors = [str(error)]
        if errors:
            listed = [{"message": one} for one in errors]
            raise _Answer(400, "Invalid metadata", errors=listed, warnings=[])
        return {"errors": [], "warnings": []}

    def preupload(self, name: str, revision: str) -> Any:
        self._writer(name)
        commit = self._at(self._repo(name), revision)
        files = []
        for file in json.loads(self.body)["files"]:
            base64.b64decode(file["sample"], validate=True)
            old = commit.files.get(file["path"])
            files.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                    "shouldIgnore": False,
                    "oid": old.oid if old else None,
                }
            )
        return {"files": files}

    def lfs_batch(self, name: str) -> Any:
        self._writer(name)
        repo, asked = self._repo(name), json.loads(self.body)
        assert asked["operation"] == "upload"
        assert asked["hash_algo"] == "sha256"
        objects = []
        for wanted in asked["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            found: dict[str, Any] = {"oid": oid, "size": size}
            href = f"{self.hub.url}/storage/{name}/{oid}"
            if oid not in repo.storage:
                found["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            objects.append(found)
        return {"transfer": "basic", "objects": objects}

    def upload(self, name: str, oid: str) -> Any:
        # Storage is reached by signed addresses: a token must not be sent there.
        if self._token() is not None:
            raise _Answer(400, "a token was sent to the storage")
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Answer(400, "the content is not that of its hash")
        self.hub.models[name].storage[oid] = self.body
        self.hub.uploaded.append(oid)
        return 200, b"", {}

    def verify(self, name: str, oid: str) -> Any:
        asked = json.loads(self.body)
        content = self.hub.models[name].storage.get(oid)
        if content is None or len(content) != asked["size"]:
            raise _Answer(422, "the file is not there")
        return {}

    def commit(self, name: str, revision: str) -> Any:
        self._writer(name)
        repo = self._repo(name)
        head = self._at(repo, revision)
        lines = [json.loads(line) for line in self.body.splitlines() if line]
        header = lines[0]["value"]
        assert lines[0]["key"] == "header"
        if header.get("parentCommit") not in (None, head.oid):
            raise _Answer(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = Entry(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                if value["oid"] not in repo.storage:
                    raise _Answer(400, f"the content of {value['path']} was not uploaded")
                files[value["path"]] = Entry(repo.storage[value["oid"]], value["oid"])
            elif line["key"] == "deletedFile":
                if value["path"] not in files:
                    raise _Answer(404, "A file with this name doesn't exist", "EntryNotFound")
                del files[value["path"]]
            else:
                raise _Answer(400, f"unknown operation {line['key']}")
        card = self._card(files)
        errors = metadata_errors(card) if card else []
        if errors:
            raise _Answer(400, "; ".join(errors))
        commit = repo.add(revision, header["summary"], files)
        url = f"{self.hub.url}/{name}/commit/{commit.oid}"
        return {"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""}

    # ------------------------------------------------------------------------------ downloading

    def resolve(self, name: str, revision: str, path: str) -> Any:
        commit = self._at(self._repo(name), revision)
        entry = commit.files.get(path)
        if entry is None:
            raise _Answer(404, "Entry not found", "EntryNotFound")
        content, status = entry.content, 200
        headers = {
            "X-Repo-Commit": commit.oid,
            "ETag": f'"{entry.oid}"',
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        if entry.lfs:
            headers |= {"X-Linked-Etag": f'"{entry.lfs}"', "X-Linked-Size": str(len(content))}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked:
            start, total = int(asked[1]), len(content)
            content = content[start : int(asked[2]) + 1 if asked[2] else None]
            headers["Content-Range"] = f"bytes {start}-{start + len(content) - 1}/{total}"
            status = 206
        headers["Content-Length"] = str(len(content))
        return status, content, headers


def _tree_file(path: str, entry: Entry) -> dict[str, Any]:
    size = len(entry.content)
    found: dict[str, Any] = {"type": "file", "path": path, "size": size}
    found["oid"] = git_oid(entry.content)
    if entry.lfs:
        found["lfs"] = {"oid": entry.lfs, "size": size, "pointerSize": 134}
    return found


def read_metadata(text: str) -> dict[str, Any] | None:
    """Return the YAML block of a card."""
    match = re.match(r"---\n(.*?)\n---\n", text, flags=re.DOTALL)
    return yaml.safe_load(match[1]) if match else None


def metadata_errors(data: dict[str, Any]) -> list[str]:
    """The Hub's own checks, as far as its messages are known; written apart from ours."""
    errors = []
    license = data.get("license")
    if license is not None and not re.fullmatch(r"[a-z0-9.+-]+", str(license)):
        errors.append('"license" must be one of [apache-2.0, mit, …]')
    tags = data.get("tags")
    if tags is not None and not all(isinstance(tag, str) for tag in tags):
        errors.append('"tags" must be an array of strings')
    return errors


def gathered(folder: Path, repo_id: str = "user/draft", **given: Any) -> Path:
    """Return a new folder, beside ``folder``, with what a push of it sends."""
    files = Path(tempfile.mkdtemp(prefix="gathered-", dir=folder.parent))
    gather(folder, repo_id, files, **given)
    return files


def client_environment(server: HubServer, home: Path, **more: str) -> dict[str, str]:
    """Return the environment of a process that talks to the server."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    package = str(Path(__file__).parents[2])
    return {
        **kept,
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([package, *filter(None, [kept.get("PYTHONPATH")])]),
        **more,
    }
