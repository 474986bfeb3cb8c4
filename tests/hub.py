"""A hub on 127.0.0.1: the calls of huggingface_hub's upload without Xet, keeping what was sent."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_secretsecretsecret"


class FakeHub(ThreadingHTTPServer):
    """Takes commits; `files` is what they made of the repositories.

    Attributes:
        repos: `{"owner/name": {"visibility": ..., "branches": {...}}}`.
        files: bytes by (repository, branch, name).
        answer_with: an HTTP status by the beginning of a path, instead of an answer.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, Any]] = {}
        self.files: dict[tuple[str, str, str], bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.answer_with: dict[str, int] = {}
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, document: Any = None, status: int = 200) -> None:
        data = b"" if document is None else json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _refused(self) -> bool:
        for start, status in self.server.answer_with.items():
            if self.path.startswith(start):
                self._answer({"error": f"no, {TOKEN}"}, status)
                return True
        return False

    def do_PUT(self) -> None:
        data = self._body()
        if self._refused():
            return
        digest = self.path.rpartition("/")[2].partition("?")[0]
        assert hashlib.sha256(data).hexdigest() == digest
        with self.server.lock:
            self.server.objects[digest] = data
        self._answer()

    def do_POST(self) -> None:
        data = self._body()
        with self.server.lock:
            self.server.tokens.add(self.headers.get("Authorization"))
        if self._refused():
            return
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            self._create(json.loads(data))
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif path.endswith("/info/lfs/objects/batch"):
            self._batch(json.loads(data))
        elif "/preupload/" in path:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(data)["files"]
            ]
            self._answer({"files": modes})
        elif "/branch/" in path:
            repo, _, branch = path.removeprefix("/api/models/").partition("/branch/")
            self.server.repos[repo]["branches"].add(branch)
            self._answer({})
        elif "/commit/" in path:
            self._commit(path, data)
        else:
            self._answer({"error": f"the fake hub has no {path}"}, 404)

    def _create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked['organization']}/{asked['name']}"
        known = repo in self.server.repos
        url = f"{self.server.url}/{repo}"
        if not known:
            asked["branches"] = {"main"}
            self.server.repos[repo] = asked
        self._answer({"url": url}, 409 if known else 200)

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = [
            entry | {"actions": {"upload": {"href": f"{self.server.url}/lfs/{entry['oid']}"}}}
            for entry in asked["objects"]
        ]
        self._answer({"transfer": "basic", "objects": objects})

    def _commit(self, path: str, data: bytes) -> None:
        repo, _, branch = path.removeprefix("/api/models/").partition("/commit/")
        if repo not in self.server.repos or branch not in self.server.repos[repo]["branches"]:
            self._answer({"error": "no such branch"}, 404)
            return
        for line in data.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                content = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                content = self.server.objects[value["oid"]]
                assert len(content) == value["size"]
            else:
                continue
            self.server.files[repo, branch, value["path"]] = content
        url = f"{self.server.url}/{repo}/commit/abc"
        self._answer({"commitUrl": url, "commitOid": "abc"})
