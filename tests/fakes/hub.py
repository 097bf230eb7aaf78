"""A hub on loopback that speaks what huggingface_hub asks: model info, the tree of files, and each file with ranges."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


class Hub(http.server.ThreadingHTTPServer):
    """Serves one model's folder under one commit, as any branch."""

    daemon_threads = True

    def __init__(self, repository: str, folder: Path, commit: str = "c" * 40) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repository, self.folder, self.commit = repository, folder, commit
        self.error: tuple[int, str] | None = None
        """A status and X-Error-Code that every question about the model gets."""
        self.cut_after: dict[str, int] = {}
        """By file: how many bytes come before the connection breaks, once."""
        self.asked: list[tuple[str, str, str | None, str | None]] = []
        """Method, path, Range and Authorization of each request."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self) -> dict[str, Path]:
        return {path.relative_to(self.folder).as_posix(): path for path in self.folder.rglob("*") if path.is_file()}

    def got(self, name: str) -> list[str | None]:
        """The ranges in which a file's content was asked."""
        return [found for method, path, found, _ in self.asked if method == "GET" and path.endswith(f"/{name}")]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        headers = self.headers
        self.server.asked.append((self.command, path, headers.get("Range"), headers.get("Authorization")))
        repository = self.server.repository
        if path.startswith(f"api/models/{repository}/revision/") or path == f"api/models/{repository}":
            self._about(path)
        elif path.startswith(f"api/models/{repository}/tree/"):
            self._json([self._entry(name, file) for name, file in sorted(self.server.files().items())])
        elif path.startswith(f"{repository}/resolve/"):
            self._file(path.split("/", 4)[4], body)
        else:
            self._error(404, "RepoNotFound")

    def _about(self, path: str) -> None:
        revision = path.rsplit("/", 1)[-1]
        if self.server.error:
            self._error(*self.server.error)
        elif revision in ("main", "v2", self.server.commit):
            self._json({"id": self.server.repository, "sha": self.server.commit, "siblings": [], "tags": []})
        else:
            self._error(404, "RevisionNotFound")

    def _entry(self, name: str, file: Path) -> dict[str, Any]:
        content = file.read_bytes()
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def _file(self, name: str, body: bool) -> None:
        file = self.server.files().get(name)
        if file is None:
            self._error(404, "EntryNotFound")
            return
        content = file.read_bytes()
        begin = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if begin else 200)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.server.commit)
        self.send_header("Accept-Ranges", "bytes")
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        if body:
            cut = self.server.cut_after.pop(name, None)
            self.wfile.write(content[begin : None if cut is None else begin + cut])
            self.close_connection = cut is not None

    def _json(self, value: Any) -> None:
        text = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _error(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """While the block runs, the hub answers."""
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
