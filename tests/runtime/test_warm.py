"""The warm process: a stage that is forked from it does what the same command does by itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tasks.runtime import warm
from tests.support.paths import ROOT

MAIN = """
import sys
sys.path.append({root!r})
from tasks.runtime import warm
code = warm.run("body")
if code is None:
    import body
    code = 0
sys.exit(code)
"""
BODY = """
import os, sys, time
from pathlib import Path
how = sys.argv[1]
print("warm" if "torch" in sys.modules else "cold", __name__, flush=True)
if how == "seen":
    import numpy, torch
    print(os.getcwd() == sys.path[0], sys.argv[1:], os.environ["OMP_NUM_THREADS"], torch.get_num_threads())
    print(sys.stdin.read())
    print([name for name in sys.modules if name.split(".")[0] in ("tasks", "flows")])
    print("bad", file=sys.stderr)
    sys.exit(7)
if how == "wait":
    try:
        Path("started").write_text(str(os.getpid()))
        time.sleep(600)
    except KeyboardInterrupt:
        print("interrupted")
        sys.exit(130)
if how == "killed":
    os.kill(os.getpid(), 9)
if how == "late":
    import atexit, ctypes, tempfile, threading
    made = tempfile.TemporaryDirectory()
    Path("made").write_text(made.name)
    atexit.register(print, "at exit")
    threading.Thread(target=lambda: (time.sleep(0.2), Path("thread").write_text("done"))).start()
    ctypes.CDLL(None).printf(b"of C\\n")
    sys.exit(5)
if how == "unread":
    sys.stdin.read()
    print("into a closed pipe")
    sys.exit(6)
if how == "sentence":
    sys.exit("a sentence")
if how == "raises":
    raise ValueError("boom")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "main.py").write_text(MAIN.format(root=str(ROOT)), encoding="utf-8")
    (tmp_path / "body.py").write_text(BODY, encoding="utf-8")
    return tmp_path


@pytest.fixture(scope="module")
def server() -> Iterator[warm.Server]:
    """A server of this module's own."""
    session = os.environ.pop(warm.SOCKET)
    found = warm.Server()
    found.environment()
    os.environ[warm.SOCKET] = session
    yield found
    found.close()


def start(folder: Path, how: str, server: warm.Server | None, **env: str) -> subprocess.Popen:
    kept = {key: value for key, value in os.environ.items() if key != warm.SOCKET}
    if server:
        kept[warm.SOCKET] = server.path
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "main.py", how], cwd=folder, env=kept | env, text=True, stdin=pipe, stdout=pipe, stderr=pipe
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate("given", timeout=120)
    return process.returncode, out, err


def child(folder: Path) -> psutil.Process:
    deadline = time.monotonic() + 120
    while not (folder / "started").exists() or not (folder / "started").read_text():
        assert time.monotonic() < deadline, "the child did not start"
        time.sleep(0.02)
    return psutil.Process(int((folder / "started").read_text()))


def test_a_stage_sees_what_it_would_see_alone(folder: Path, server: warm.Server) -> None:
    code, out, err = finish(start(folder, "seen", server, OMP_NUM_THREADS="1"))
    assert (code, err) == (7, "bad\n")
    assert out.splitlines() == ["warm __main__", "True ['seen'] 1 1", "given", "[]"]


@pytest.mark.parametrize("threads", ["1", "2"])
def test_the_number_of_threads_is_the_requests(folder: Path, server: warm.Server, threads: str) -> None:
    _, out, _ = finish(start(folder, "seen", server, OMP_NUM_THREADS=threads))
    assert out.splitlines()[:2] == ["warm __main__", f"True ['seen'] {threads} {threads}"]


def test_a_child_that_is_killed_kills_its_client(folder: Path, server: warm.Server) -> None:
    assert finish(start(folder, "killed", server))[0] == -signal.SIGKILL == finish(start(folder, "killed", None))[0]


def test_a_traceback_is_the_childs(folder: Path, server: warm.Server) -> None:
    code, out, err = finish(start(folder, "raises", server))
    assert (code, out) == (1, "warm __main__\n") and err.endswith("ValueError: boom\n")


@pytest.mark.parametrize("how", ["late", "sentence"])
def test_what_is_left_to_do_at_the_end_is_done(folder: Path, server: warm.Server, how: str) -> None:
    alone, forked = (finish(start(folder, how, one)) for one in (None, server))
    lines = sorted(alone[1].replace("cold body", "warm __main__").splitlines())  # C's are written when its buffer is
    assert (forked[0], sorted(forked[1].splitlines()), forked[2]) == (alone[0], lines, alone[2])
    if how == "late":
        assert forked[0] == 5 and set(forked[1].splitlines()[1:]) == {"at exit", "of C"}
        assert (folder / "thread").read_text() == "done" and not Path((folder / "made").read_text()).exists()


def test_an_answer_that_nobody_reads_is_told_as_ever(folder: Path, server: warm.Server) -> None:
    ended = []
    for one, first in ((None, "cold body\n"), (server, "warm __main__\n")):
        process = start(folder, "unread", one)
        assert process.stdout.readline() == first
        process.stdout.close()
        process.stdin.close()
        ended.append((process.wait(120), process.stderr.read().splitlines()[-1]))
    assert ended[0] == ended[1]
    assert ended[0][0] and ended[0][1] == "BrokenPipeError: [Errno 32] Broken pipe"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_the_child(folder: Path, server: warm.Server, number: signal.Signals) -> None:
    process = start(folder, "wait", server)
    running = child(folder)
    process.send_signal(number)
    code, out, _ = finish(process)
    assert not running.is_running()
    if number == signal.SIGINT:
        assert (code, out.splitlines()[1]) == (130, "interrupted")
    else:
        assert code == -signal.SIGTERM


def test_a_child_ends_with_its_client(folder: Path, server: warm.Server) -> None:
    process = start(folder, "wait", server)
    running = child(folder)
    process.kill()
    running.wait(30)
    process.communicate()


def test_a_client_ends_with_the_server_and_the_child_too(folder: Path) -> None:
    session = os.environ.pop(warm.SOCKET)
    own = warm.Server()
    own.environment()
    os.environ[warm.SOCKET] = session
    process = start(folder, "wait", own)
    running = child(folder)
    own.close()
    assert finish(process)[0] == -signal.SIGKILL
    running.wait(30)
    assert finish(start(folder, "x", own))[1] == "cold body\n"  # the socket is gone


@pytest.mark.parametrize("how", [{"HF_HUB_OFFLINE": "1"}, {"PYTHONHASHSEED": "1"}, {"LC_ALL": "C"}])
def test_another_environment_is_refused(folder: Path, server: warm.Server, how: dict[str, str]) -> None:
    assert finish(start(folder, "x", server, **how))[:2] == (0, "cold body\n")
