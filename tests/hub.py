"""A Hugging Face hub on this machine: as much of its HTTP interface as loading and uploading ask for."""

from __future__ import annotations

import hashlib
import json
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

REVISION = hashlib.sha1(b"the only revision").hexdigest()


@contextmanager
def hub(root: Path) -> Iterator[str]:
    """Serves root/models/OWNER/NAME and root/datasets/OWNER/NAME; gives the URL for HF_ENDPOINT."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            path = urlsplit(self.path).path
            if "Authorization" not in self.headers and path != "/api/validate-yaml" and "paths-info" not in path:
                self.send(401, b'{"error": "Unauthorized"}')
            elif path.endswith("/commit/main"):
                self.commit(body)
            else:
                self.post(path, json.loads(body))

        def post(self, path: str, asked: dict[str, Any]) -> None:
            if path == "/api/repos/create":
                name = f"{asked['organization']}/{asked['name']}"
                (root / "models" / name).mkdir(parents=True, exist_ok=True)
                self.send(200, json.dumps({"url": f"http://{self.headers['Host']}/{name}"}).encode())
            elif path == "/api/validate-yaml":
                self.send(200, b'{"errors": [], "warnings": []}')
            elif path.endswith("/preupload/main"):
                modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked["files"]]
                self.send(200, json.dumps({"files": modes}).encode())
            else:
                self.answer(asked)

        def commit(self, body: bytes) -> None:
            kind, owner, name, *_ = _parts(self.path)
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    (root / kind / owner / name / line["value"]["path"]).write_bytes(
                        b64decode(line["value"]["content"])
                    )
            url = f"http://{self.headers['Host']}/{owner}/{name}/commit/{REVISION}"
            self.send(200, json.dumps({"success": True, "commitUrl": url, "commitOid": REVISION}).encode())

        def answer(self, asked: dict[str, Any] | None = None) -> None:
            kind, owner, name, *rest = _parts(self.path)
            folder = root / kind / owner / name
            if not folder.is_dir():
                self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif rest[:1] == ["resolve"]:
                file = folder.joinpath(*rest[2:])
                if file.is_file():
                    self.send(200, file.read_bytes(), {"ETag": f'"{_digest(file)}"'})
                else:
                    self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
            elif rest[:1] == ["tree"]:
                below = "/".join(rest[2:])
                self.send(200, json.dumps([f for f in _listing(folder) if f["path"].startswith(below)]).encode())
            elif rest[:1] == ["paths-info"]:
                paths = (asked or {}).get("paths", [])
                self.send(200, json.dumps([f for f in _listing(folder) if f["path"] in paths]).encode())
            else:
                names = [{"rfilename": file["path"]} for file in _listing(folder)]
                info = {"id": f"{owner}/{name}", "sha": REVISION, "siblings": names, "tags": [], "private": False}
                self.send(200, json.dumps(info).encode())

        def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in {"X-Repo-Commit": REVISION, "Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing: the tests' output is the tests'."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _parts(path: str) -> list[str]:
    """Kind, owner, name and what follows of /api/datasets/me/reviews/tree/main or /me/tiny/resolve/main/config.json."""
    parts = [unquote(part) for part in urlsplit(path).path.strip("/").split("/")]
    parts = parts[1:] if parts[0] == "api" else parts
    parts = parts if parts[0] in ("models", "datasets") else ["models", *parts]
    return [*parts, "", ""][: max(3, len(parts))]


def _listing(folder: Path) -> list[dict[str, Any]]:
    return [
        {"type": "file", "path": file.relative_to(folder).as_posix(), "size": file.stat().st_size, "oid": _digest(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    ]


def _digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
