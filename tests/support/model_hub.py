"""A model hub of this machine's own; its fixture is known to every test by tests/conftest.py."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.support.fetch_stage import REVISION


class Hub(ThreadingHTTPServer):
    """As much of the hub's protocol as a snapshot needs: the tree of a commit, and its files."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder, self.status, self.gated = folder, 200, False
        self.asked: list[str] = []
        self.sent: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        self.server.sent.append(self.headers.get("user-agent"))
        if self.server.status != 200:
            self.reply(b"{}", self.server.status, {"X-Error-Code": "GatedRepo"} if self.server.gated else {})
        elif path == f"/api/models/a/model/tree/{REVISION}":
            self.reply(
                json.dumps([self.entry(file) for file in sorted(self.server.folder.iterdir())]).encode(), 200, {}
            )
        elif path == f"/api/models/a/model/revision/{REVISION}":
            names = [{"rfilename": file.name} for file in sorted(self.server.folder.iterdir())]
            self.reply(json.dumps({"id": "a/model", "sha": REVISION, "siblings": names}).encode(), 200, {})
        elif path.startswith(f"/a/model/resolve/{REVISION}/"):
            content = (self.server.folder / Path(path).name).read_bytes()
            self.reply(content, 200, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": REVISION})
        else:
            self.reply(b"{}", 404, {"X-Error-Code": "RevisionNotFound"})

    def entry(self, file: Path) -> dict:
        oid = hashlib.sha1(file.read_bytes()).hexdigest()
        return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": oid}

    def reply(self, body: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def hub(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The hub, which has model_folder as a/model."""
    server = Hub(model_folder)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield server
    server.shutdown()
    server.server_close()
