"""A hub token that is really sent to a hub is found nowhere afterwards: outputs, logs, DVC's and Prefect's state."""

from __future__ import annotations

import http.server
import sys
import threading
from pathlib import Path

import pytest

from tests.support.project import Project

PLANTED = {"HF_TOKEN": "hf_plantedInTheEnvironment", "file": "hf_plantedInTheTokenFile"}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub():
    """A hub that refuses everybody; its URL, and the authorizations that it was sent."""
    sent: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def refuse(self) -> None:
            sent.append(self.headers.get("Authorization", ""))
            self.send_response(401)
            self.end_headers()

        do_GET = do_HEAD = refuse

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", sent
        server.shutdown()


def found(folder: Path) -> list[str]:
    """Files below the folder, databases included, that hold a planted token."""
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [str(path) for path in paths if any(token.encode() in path.read_bytes() for token in PLANTED.values())]


@pytest.mark.slow  # a server of its own
@pytest.mark.parametrize("place", PLANTED)
def test_a_planted_token_is_found_nowhere(tmp_path, tiny_llama, hub, place) -> None:
    url, sent = hub
    project = Project(tmp_path / "project", tiny_llama(tmp_path / "model"))
    home = tmp_path / "hugging face"
    home.mkdir()
    environment = {"HF_ENDPOINT": url, "HF_HOME": str(home)}
    if place == "file":
        (home / "token").write_text(PLANTED["file"], encoding="utf-8")
    else:
        environment[place] = PLANTED[place]
    project.change({"fetch.model.hub": "owner/name", "fetch.model.revision": COMMIT})
    command = ("-m", "tasks", "run", "fetch") if place == "file" else ("-m", "dvc", "repro", "fetch")
    refused = project(sys.executable, *command, check=False, env=environment)
    assert f"Bearer {PLANTED[place]}" in sent  # it was used, and refused
    assert refused.returncode != 0 and "Traceback" not in refused.stdout
    assert f"the hub has no model owner/name at {COMMIT}, or it is private or gated;" in refused.stdout
    project.change({"fetch.model.hub": None, "fetch.model.revision": None})
    project(sys.executable, "-m", "dvc", "repro", "fetch", env=environment)
    assert PLANTED[place] not in refused.stdout and found(project.path) == []
    (project.path / "data/leak").write_bytes(b"x" + PLANTED[place].encode())
    assert found(project.path) == [str(project.path / "data/leak")]
