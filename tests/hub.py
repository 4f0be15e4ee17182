"""A hub on loopback that takes models: what `huggingface_hub` asks of one to look at, create and fill a repository."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Repository:
    """A model's repository."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    num_commits: int = 0


@dataclass
class Hub:
    """What is there, and whom the hub takes.

    Attributes:
        role: of the one token, `hf_right`.
        refuses: the status with which it answers a request whose path has this in it.
        largest_regular: bytes of a file from which it is asked for as a large one.
    """

    address: str = ""
    role: str = "write"
    refuses: dict[str, int] = field(default_factory=dict)
    largest_regular: int = 20_000
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """Variables under which `huggingface_hub` asks this one (over HTTP: xet's protocol is another)."""
        return {"HF_ENDPOINT": self.address, "HF_TOKEN": "hf_right", "HF_HUB_DISABLE_XET": "1"}

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Return status and JSON."""
        if method == "PUT":
            self.large[path.removeprefix("/large/")] = body
            return 200, {}
        given = json.loads(body) if body and "/commit/" not in path else {}
        if path == "/api/whoami-v2":
            return 200, {"name": "someone", "orgs": [], "auth": {"accessToken": {"role": self.role}}}
        if path == "/api/repos/create":
            name = f"{given['organization']}/{given['name']}"
            if name in self.repositories:
                return 409, {"url": f"{self.address}/{name}"}
            self.repositories[name] = Repository(given.get("visibility") == "private", {".gitattributes": b""})
            return 200, {"url": f"{self.address}/{name}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        name = re.sub(r"^/(api/models/)?|\.git/.*|/(preupload|commit|tree|revision)/.*", "", path)
        if (repository := self.repositories.get(name)) is None:
            return 404, {"error": "Repository not found"}
        if "/preupload/" in path:
            modes = ["lfs" if file["size"] > self.largest_regular else "regular" for file in given["files"]]
            named = zip(given["files"], modes, strict=True)
            return 200, {"files": [{"path": f["path"], "uploadMode": mode, "shouldIgnore": False} for f, mode in named]}
        if path.endswith("/objects/batch"):
            return 200, {"objects": [self._place(one) for one in given["objects"]], "transfer": "basic"}
        if "/commit/" in path:
            self._commit(repository, [json.loads(line) for line in body.splitlines()])
            return 200, {"commitUrl": f"{self.address}/{name}/commit/1", "commitOid": "1" * 40, "success": True}
        if "/tree/" in path:
            return 200, [{"type": "file", "path": file, "size": 1, "oid": "0"} for file in repository.files]
        siblings = [{"rfilename": file} for file in repository.files]
        return 200, {"id": name, "private": repository.private, "siblings": siblings}

    def _place(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {**asked, "actions": {"upload": {"href": f"{self.address}/large/{asked['oid']}"}}}

    def _commit(self, repository: Repository, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.large[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                repository.files[value["path"]] = content
            elif line["key"] == "deletedFile":
                del repository.files[value["path"]]
        repository.num_commits += 1


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Answer on loopback until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _do(self) -> None:
            path = self.path.split("?")[0]
            hub.asked.append(f"{self.command} {path}")
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b"".join(iter(self._chunk, b""))
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            refused = [status for part, status in hub.refuses.items() if part in path]
            if refused:
                status, content = refused[0], {"error": "refused"}
            elif self.headers.get("Authorization") != "Bearer hf_right" and not path.startswith("/large/"):
                status, content = 401, {"error": "Invalid username or password."}
            else:
                status, content = hub.answer(self.command, path, body)
            answer = json.dumps(content).encode()
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST = do_PUT = _do

        def _chunk(self) -> bytes:
            size = int(self.rfile.readline(), 16)
            content = self.rfile.read(size)
            self.rfile.readline()
            return content

        def log_message(self, format: str, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
