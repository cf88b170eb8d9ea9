"""A small Hub for tests: the part of the HTTP API that huggingface_hub uses to publish and load models, on 127.0.0.1, in memory.

Faults are injected with :meth:`HubServer.fail`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKENS = {"hf_write": "write", "hf_read": "read", "hf_expired": "expired"}

DROP = "drop"  # close the connection in the middle of a body
LOSE = "lose"  # do what was asked, then close the connection instead of answering


@dataclass
class Fault:
    """What goes wrong, for the next ``times`` requests that fit: an HTTP status, DROP or LOSE."""

    method: str
    path: str
    what: int | str
    times: int

    def fits(self, method: str, path: str) -> bool:
        return self.times > 0 and method == self.method and re.search(self.path, path) is not None


@dataclass
class Repo:
    """Commits by their hash; a commit is the files it holds, by path. ``large`` are the paths kept in the large-file store."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        content = [len(self.commits), *((path, _oid(data)) for path, data in sorted(files.items()))]
        sha = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def sha(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]


class HubServer:
    """Runs from construction to :meth:`close`.

    Attributes:
        repos: by id.
        uploads: "regular", "basic" (large files in one piece) or "multipart" (in pieces of ``part_size``).
        large: contents of large files by their SHA-256; known: those that need not be uploaded again.
        log: method and path of every request.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.known: set[str] = set()
        self.parts: dict[str, dict[int, bytes]] = {}
        self.uploads = "regular"
        self.part_size = 2048
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str]] = []
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        # Large files come from another host, as they do in real life: the client treats such redirects differently.
        self.cdn = self.url.replace("127.0.0.1", "localhost")
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fail(self, method: str, path: str, what: int | str, times: int = 1) -> None:
        """Let the next ``times`` requests fail whose path (with query) fits the regular expression ``path``."""
        self.faults.append(Fault(method, path, what, times))

    def fault(self, method: str, path: str) -> int | str | None:
        with self.lock:
            self.log.append((method, path))
            for fault in self.faults:
                if fault.fits(method, path):
                    fault.times -= 1
                    return fault.what
        return None

    def requests(self, method: str, path: str) -> int:
        """How many requests fitted so far."""
        return sum(m == method and re.search(path, p) is not None for m, p in self.log)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes, and the second would wait for an acknowledgement

    @property
    def hub(self) -> HubServer:
        return self.server.hub  # type: ignore[attr-defined]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _serve(self) -> None:
        self.fate = self.hub.fault(self.command, self.path)
        url = urlsplit(self.path)
        self.path_only, self.query = unquote(url.path), {name: values[0] for name, values in parse_qs(url.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        if self.fate == DROP and length:
            self.rfile.read(length // 2)
            return self._hang_up()
        self.body = self._read(length)
        if isinstance(self.fate, int):
            return self._reply(self.fate, {"error": f"injected {self.fate}"})
        for method, pattern, handle in _ROUTES:
            match = re.fullmatch(pattern, self.path_only)
            if match and method == self.command.replace("HEAD", "GET"):
                with self.hub.lock:
                    return handle(self, *match.groups())
        self._reply(404, {"error": f"no such endpoint: {self.command} {self.path}"})

    def _read(self, length: int) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(length)
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _reply(self, status: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
        if self.fate == LOSE:
            return self._hang_up()
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return None
        if self.fate == DROP:
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            return self._hang_up()
        self.wfile.write(data)
        return None

    # Who asks

    def _right(self) -> str | None:
        """ "write", "read", None for nobody; answers itself, with "refused", where the token is no good."""
        given = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if not given:
            return None
        right = TOKENS.get(given, "unknown")
        if right in ("write", "read"):
            return right
        message = "User Access Token has expired" if right == "expired" else "Invalid credentials in Authorization header"
        self._reply(401, {"error": message}, {"X-Error-Message": message})
        return "refused"

    def _may_write(self) -> bool:
        right = self._right()
        if right == "write":
            return True
        if right != "refused":
            message = "You need write access: pass a token" if right is None else "The token has no write access"
            self._reply(401 if right is None else 403, {"error": message}, {"X-Error-Message": message})
        return False

    def _repo(self, repo_id: str) -> Repo | None:
        """The repository, for a reader who may know of it."""
        right = self._right()
        repo = self.hub.repos.get(repo_id)
        if right == "refused":
            return None
        if repo is None or (repo.private and right is None):
            # As the Hub answers: whoever may not see a repository is not told whether there is one.
            self._reply(401 if right is None else 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        return repo

    def _revision(self, repo_id: str, revision: str) -> tuple[Repo, str] | None:
        repo = self._repo(repo_id)
        if repo is None:
            return None
        sha = repo.sha(revision)
        if sha is None:
            self._reply(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
            return None
        return repo, sha

    # Endpoints

    def create(self) -> None:
        if not self._may_write():
            return
        asked = json.loads(self.body)
        repo_id = f"{asked.get('organization') or 'user'}/{asked['name']}"
        status = 409 if repo_id in self.hub.repos else 200
        if status == 200:
            private = bool(asked.get("private")) or asked.get("visibility") == "private"
            repo = self.hub.repos[repo_id] = Repo(private)
            repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self._reply(status, {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id})

    def validate(self) -> None:
        problems = []
        try:
            yaml.safe_load(json.loads(self.body)["content"].split("---")[1])
        except (yaml.YAMLError, IndexError) as error:
            problems.append({"message": str(error)})
        self._reply(400 if problems else 200, {"errors": problems, "warnings": []})

    def branch(self, repo_id: str, name: str) -> None:
        repo = self._repo(repo_id) if self._may_write() else None
        if repo is not None:
            exists = name in repo.branches
            repo.branches.setdefault(name, repo.branches["main"])
            self._reply(409 if exists else 200, {})

    def info(self, repo_id: str, revision: str | None) -> None:
        if found := self._revision(repo_id, revision or "main"):
            repo, sha = found
            files = [{"rfilename": path} for path in repo.commits[sha]]
            answer = {"id": repo_id, "modelId": repo_id, "sha": sha, "private": repo.private, "tags": [], "siblings": files}
            self._reply(200, answer)

    def tree(self, repo_id: str, revision: str) -> None:
        if found := self._revision(repo_id, revision):
            repo, sha = found
            files = repo.commits[sha].items()
            self._reply(200, [{"type": "file", "path": path, "size": len(data), "oid": _oid(data)} for path, data in files])

    def preupload(self, repo_id: str, revision: str) -> None:
        if not self._may_write() or self._revision(repo_id, revision) is None:
            return
        answers = []
        for file in json.loads(self.body)["files"]:
            large = self.hub.uploads != "regular" and file["path"].endswith(".safetensors")
            answers.append({"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False})
        self._reply(200, {"files": answers})

    def batch(self, repo_id: str) -> None:
        if not self._may_write():
            return
        objects = []
        for item in json.loads(self.body)["objects"]:
            oid, size = item["oid"], item["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.hub.known:
                upload: dict[str, Any] = {"href": f"{self.hub.url}/storage/{oid}"}
                if self.hub.uploads == "multipart":
                    count = -(-size // self.hub.part_size)
                    parts = {str(n + 1): f"{self.hub.url}/storage/{oid}/{n + 1}" for n in range(count)}
                    upload["header"] = {"chunk_size": str(self.hub.part_size), **parts}
                verify = {"href": f"{self.hub.url}/{repo_id}.git/info/lfs/objects/verify"}
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        transfer = "multipart" if self.hub.uploads == "multipart" else "basic"
        self._reply(200, {"transfer": transfer, "objects": objects})

    def put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._reply(400, {"error": "not what was announced"})
        self.hub.large[oid] = self.body
        self.hub.known.add(oid)
        return self._reply(200)

    def put_part(self, oid: str, number: str) -> None:
        self.hub.parts.setdefault(oid, {})[int(number)] = self.body
        self._reply(200, b"", {"ETag": hashlib.md5(self.body).hexdigest()})

    def complete(self, oid: str) -> None:
        parts = self.hub.parts.pop(oid, {})
        asked = [part["partNumber"] for part in json.loads(self.body)["parts"]]
        self.body = b"".join(parts[number] for number in asked)
        self.put(oid)

    def verify(self, repo_id: str) -> None:
        asked = json.loads(self.body)
        stored = self.hub.large.get(asked["oid"])
        self._reply(200 if stored is not None and len(stored) == asked["size"] else 404, {})

    def commit(self, repo_id: str, revision: str) -> None:
        if not self._may_write():
            return
        found = self._revision(repo_id, revision)
        if found is None:
            return
        repo, sha = found
        files = dict(repo.commits[sha])
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header" and value.get("parentCommit", sha) != sha:
                message = "A commit has happened since. Please refresh and try again."
                return self._reply(412, {"error": message}, {"X-Error-Message": message})
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                repo.large.discard(value["path"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.large:
                    return self._reply(400, {"error": f"{value['path']} has not been uploaded"})
                files[value["path"]] = self.hub.large[value["oid"]]
                repo.large.add(value["path"])
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        target = f"refs/pr/{len(repo.commits)}" if self.query.get("create_pr") else revision
        made = repo.commit(target, files)
        answer = {"commitOid": made, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{made}"}
        answer["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/1"
        return self._reply(200, answer)

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        found = self._revision(repo_id, revision)
        if found is None:
            return
        repo, sha = found
        data = repo.commits[sha].get(path)
        headers = {"X-Repo-Commit": sha}
        if data is None:
            return self._reply(404, {"error": "Entry not found"}, {**headers, "X-Error-Code": "EntryNotFound"})
        if path in repo.large:
            oid = hashlib.sha256(data).hexdigest()
            linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data)), "Location": f"{self.hub.cdn}/cdn/{oid}"}
            return self._reply(302, b"", {**headers, **linked})
        return self._send_range(data, {**headers, "ETag": f'"{_oid(data)}"'})

    def cdn(self, oid: str) -> None:
        self._send_range(self.hub.large[oid], {"ETag": f'"{oid}"'})

    def _send_range(self, data: bytes, headers: dict[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return self._reply(200, data, {**headers, "Accept-Ranges": "bytes"})
        first = int(asked[1])
        last = min(int(asked[2] or len(data) - 1), len(data) - 1)
        return self._reply(206, data[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"})


def _oid(data: bytes) -> str:
    """Name of a file's content as git makes it."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


_ID = r"([\w.-]+/[\w.-]+)"
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("POST", rf"/api/models/{_ID}/branch/(.+)", _Handler.branch),
    ("POST", rf"/api/models/{_ID}/preupload/(.+)", _Handler.preupload),
    ("POST", rf"/api/models/{_ID}/commit/(.+)", _Handler.commit),
    ("GET", rf"/api/models/{_ID}/tree/([^/]+)/?", _Handler.tree),
    ("GET", rf"/api/models/{_ID}(?:/revision/(.+))?", _Handler.info),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", _Handler.batch),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/verify", _Handler.verify),
    ("PUT", r"/storage/(\w+)", _Handler.put),
    ("PUT", r"/storage/(\w+)/(\d+)", _Handler.put_part),
    ("POST", r"/storage/(\w+)", _Handler.complete),
    ("GET", rf"/{_ID}/resolve/([^/]+)/(.+)", _Handler.resolve),
    ("GET", r"/cdn/(\w+)", _Handler.cdn),
]
