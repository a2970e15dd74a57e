"""The server and the flow in strange homes: proxies, passwords, folders that can't be written, full disks, Ctrl-C."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from flows.server import settings, temporary
from tasks.algorithms.errors import InputError
from tests.support.nightly_project import NightlyProject

DEAD = "http://127.0.0.1:9"
"""A proxy that nobody serves."""


@pytest.fixture
def environment(tmp_path, monkeypatch) -> dict[str, str]:
    """This process's environment without proxies and Prefect's settings, to be changed; an empty working folder."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_") and "proxy" not in k.lower()}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(urllib.request, "_opener", None)  # it keeps the proxies of its first call
    for name in os.environ.keys() - kept.keys():
        monkeypatch.delenv(name)
    yield os.environ
    for name in set(os.environ) - set(kept):
        del os.environ[name]
    os.environ.update(kept)


@pytest.mark.parametrize("said", [{}, {"NO_PROXY": "a.example"}, {"no_proxy": "b.example, a.example"}])
def test_a_proxy_is_not_asked_for_this_machine_s_own_server(environment, said) -> None:
    class Well(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"true")

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Well) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/api"
        environment.update({"HTTP_PROXY": DEAD, "https_proxy": DEAD, "PREFECT_API_URL": url} | said)
        settings.apply()
        assert settings.running_server() == url
        server.shutdown()
    assert environment["no_proxy"] == environment["NO_PROXY"]
    assert set(re.findall(r"[^, ]+", ",".join(said.values()))) <= set(environment["no_proxy"].split(","))
    assert urllib.request.proxy_bypass("127.0.0.1:4200") and not urllib.request.proxy_bypass("hub.example")


def test_no_proxy_is_left_alone_where_there_is_none_or_all_are_passed_by(environment) -> None:
    settings.apply()
    assert "no_proxy" not in environment
    environment.update({"HTTP_PROXY": DEAD, "NO_PROXY": "*"})
    settings.apply()
    assert environment["NO_PROXY"] == "*"


def test_the_server_s_password_is_the_flow_s_too_unless_the_server_is_another(environment) -> None:
    environment["PREFECT_SERVER_API_AUTH_STRING"] = "a:b"
    settings.apply()
    assert environment["PREFECT_API_AUTH_STRING"] == "a:b"
    del environment["PREFECT_API_AUTH_STRING"]
    environment["PREFECT_API_URL"] = "http://elsewhere.example/api"
    settings.apply()
    assert "PREFECT_API_AUTH_STRING" not in environment


@pytest.fixture
def server(tmp_path, monkeypatch):
    """server(text): what `begun` starts is this shell script, and no server."""
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "home"))

    def become(text: str) -> None:
        path = tmp_path / "server.sh"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return become


def start() -> str:
    with temporary.begun() as process:
        return temporary.start_temporary(process)


def test_a_server_that_does_not_start_gives_its_last_words_and_not_its_traceback(server, capfd, tmp_path) -> None:
    server("echo Traceback >&2; echo 'Error: no such thing' >&2; exit 3")
    with pytest.raises(InputError) as error:
        start()
    log = tmp_path / "home/server.log"
    assert str(error.value) == (f"the Prefect server did not start: Error: no such thing; all that it said is in {log}")
    assert log.read_text() == "Traceback\nError: no such thing\n" and capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["home", "tmp"])
def test_a_server_without_room_names_the_disk(server, tmp_path, monkeypatch, name) -> None:
    server("echo 'sqlite3.OperationalError: database or disk is full' >&2; exit 3")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4096 if path.name == name else 2**30))
    with pytest.raises(InputError, match=f"the disk of {tmp_path / name} is full; free some space, then run again"):
        start()


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_checkout_that_may_only_be_read_is_told_before_a_server_starts(server, monkeypatch, number) -> None:
    def refuse(path, *_, **__):
        raise OSError(number, os.strerror(number), str(path))

    server("exit 3")
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(InputError, match=r"cannot write .*home, where Prefect keeps its state: "):
        start()


def test_ctrl_c_while_the_server_starts_ends_it_without_a_word(server, capfd, tmp_path) -> None:
    server(f"echo $$ > {tmp_path}/pid; exec sleep 60")

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1)
        with pytest.raises(KeyboardInterrupt):
            start()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    pid = int((tmp_path / "pid").read_text())
    end = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert capfd.readouterr() == ("", "")


def test_a_stage_that_is_none_is_told_before_a_server_starts(tmp_path) -> None:
    project = NightlyProject(tmp_path)
    output = project.python("-m", "tasks", "run", "nosuch", expect=1)
    assert output == "error: Stage 'nosuch' not found inside 'dvc.yaml' file\n"
    assert not (tmp_path / ".prefect/server.log").read_bytes() and not (tmp_path / ".prefect/prefect.db").exists()


def stranger(project: NightlyProject) -> list[str]:
    """Words before a command that make its user one without an account, who owns the project."""
    if os.geteuid() != 0:
        return []
    subprocess.run(["chown", "-R", "12345:12345", str(project.path)], check=True)
    reads = "+dac_read_search"  # Python and the packages may lie in root's home
    return [
        "setpriv",
        "--reuid=12345",
        "--regid=12345",
        "--clear-groups",
        f"--inh-caps={reads}",
        f"--ambient-caps={reads}",
    ]


@pytest.mark.slow  # a server of its own
def test_a_flow_runs_in_the_strangest_of_homes(tmp_path) -> None:
    """All at once: blanks and umlauts, no account, umask 077, LC_ALL=C, a HOME that isn't there, a proxy, no branch."""
    path = tmp_path / "my project/Größe"
    path.mkdir(parents=True)
    project = NightlyProject(path, tmp_path / "my project")
    project.run("git", "checkout", "-q", "--detach")
    project.run("git", "config", "--unset", "user.name")
    strange = {"LC_ALL": "C", "HTTP_PROXY": DEAD, "HTTPS_PROXY": DEAD, "HOME": "/proc/nowhere", "TMPDIR": str(path)}
    shell = 'umask 077; exec "$0" -m tasks run hardware_fit'
    output = project.run(*stranger(project), "sh", "-c", shell, sys.executable, env=strange)
    assert "3 of 3 stages ran" in output and "Traceback" not in output
    assert (path / "data/hardware_fit/fit.json").stat().st_mode & 0o077 == 0
