"""The flow on a toy project of two trivial stages: states and reasons, the server, the settings.

The toy's commands need no model, so that what is tested is how DVC and Prefect share the work.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
import yaml
from dvc.repo import Repo

from flows.server import settings
from tests.support.paths import ROOT
from tests.support.project import clean_environment

os.environ.setdefault("PREFECT_HOME", str(ROOT / settings.HOME))  # else importing Prefect makes a folder in ~

from flows import following  # noqa: E402
from flows.server import temporary

STAGES = {
    "first": {
        "cmd": "echo first talks >> $EDGEPRESS_LOG && cat value.yaml > first.txt",
        "params": [{"value.yaml": ["value"]}],
        "outs": ["first.txt"],
    },
    "last": {"cmd": "cat first.txt > last.txt", "deps": ["first.txt"], "outs": ["last.txt"]},
}
FLOW = """
import json, sys
from flows.server import settings
settings.apply()
from prefect import flow
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed, Failed
from flows.server import temporary
from flows.reproduction import Reproduction
from pathlib import Path
runs = []

@flow(name="toy", persist_result=False)
def toy():
    reproduction = Reproduction()
    failure = reproduction.run(None, False)
    last = Path("last.txt").read_text() if Path("last.txt").exists() else None
    runs.append({"rows": reproduction.rows, "failure": failure, "last": last})
    return Failed(message=failure) if failure else Completed()

import contextlib, os
url = os.environ.get("PREFECT_API_URL")
with contextlib.nullcontext() if url else temporary.begun() as server:
    url = url or temporary.start_temporary(server) + "/api"
with temporary_settings({PREFECT_API_URL: url}):
    for text in json.loads(sys.argv[1]):
        Path("value.yaml").write_text(text)
        toy(return_state=True)
Path("runs.json").write_text(json.dumps(runs))
"""


@pytest.fixture
def toy(tmp_path):
    """A DVC project of two stages, beside this project's packages."""
    for name in ("flows", "tasks"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": STAGES}), encoding="utf-8")
    (tmp_path / "value.yaml").write_text("value: 1\n", encoding="utf-8")
    Repo.init(str(tmp_path), no_scm=True).close()
    return tmp_path


def environment(folder):
    """A user's, with an empty home directory."""
    (folder / "home").mkdir(exist_ok=True)
    return {**clean_environment(), "HOME": str(folder / "home")}


def run(folder, *command, check=True):
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment(folder),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=600,
    )
    assert not check or done.returncode == 0, done.stdout
    return done.stdout


def summary(run):
    return [(row["stage"], row["state"], row["why"]) for row in run["rows"]]


@pytest.mark.slow  # a server of its own
def test_every_stage_is_a_task_run_that_says_why_it_ran_or_not(toy) -> None:
    output = run(toy, "-c", FLOW, json.dumps(["value: 1\n", "value: 1\n", "value: 2\n", "value: 1\n", "other: 1\n"]))
    first, again, changed, back, broken = json.loads((toy / "runs.json").read_text())
    assert summary(first) == [("first", "Completed", "ran"), ("last", "Completed", "ran")]
    assert summary(again) == [("first", "Cached", "unchanged"), ("last", "Cached", "unchanged")]
    assert summary(changed) == [("first", "Completed", "ran"), ("last", "Completed", "ran")]
    assert summary(back) == [("first", "Cached", "restored"), ("last", "Cached", "restored")]
    assert [run["last"] for run in (first, again, changed, back)] == ["value: 1\n"] * 2 + ["value: 2\n", "value: 1\n"]
    keys = [[row["key"] for row in run["rows"]] for run in (first, again, changed, back)]
    assert keys[0] == keys[1] == keys[3] and not set(keys[0]) & set(keys[2]) and all(map(all, keys))
    assert broken["failure"] and "value" in broken["failure"]  # the parameter is gone
    assert "first talks" in output and "Traceback" not in output
    assert (toy / ".prefect/prefect.db").exists() and not list((toy / "home").rglob("*prefect*"))
    (toy / "value.yaml").write_text("value: 2\n", encoding="utf-8")
    assert "Running stage" not in run(toy, "-m", "dvc", "repro")  # what the flow made is DVC's, too


@pytest.mark.parametrize("text", ["", "schema: '2.0'\nsta", "schema: '2.0'\nstages:\n  first:\n    cm"])
def test_half_a_dvc_lock_hinders_no_run_which_mends_it(toy, text) -> None:
    (toy / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    (toy / "dvc.lock").write_text(text, encoding="utf-8")
    asked = "from flows.compress import problem; print([problem(['first']), problem(['nosuch'])])"
    assert run(toy, "-c", asked).startswith("[None, ")
    (toy / "dvc.lock").unlink()
    assert "nosuch" in run(toy, "-c", asked)


@pytest.mark.slow  # a server of its own
def test_what_dvc_add_made_is_a_stage_of_the_flow(toy) -> None:
    (toy / "source").mkdir()
    (toy / "source/model").write_text("1\n", encoding="utf-8")
    run(toy, "-m", "dvc", "add", "-q", "source/model")
    stages = yaml.safe_load((toy / "dvc.yaml").read_text())
    stages["stages"]["first"]["deps"] = ["source/model"]
    (toy / "dvc.yaml").write_text(yaml.safe_dump(stages), encoding="utf-8")
    run(toy, "-c", FLOW, json.dumps(["value: 1\n"]))
    (only,) = json.loads((toy / "runs.json").read_text())
    assert only["failure"] is None
    added = ("source/model.dvc", "Cached", "unchanged")
    assert sorted(summary(only)) == [("first", "Completed", "ran"), ("last", "Completed", "ran"), added]


@pytest.mark.slow  # a server of its own
def test_a_stage_that_fails_gives_its_own_sentence_to_the_task_run_and_the_flow_run(toy) -> None:
    stages = yaml.safe_load((toy / "dvc.yaml").read_text())
    stages["stages"]["first"]["cmd"] = "echo 'error: first: no such thing' >> $EDGEPRESS_LOG; exit 1"
    (toy / "dvc.yaml").write_text(yaml.safe_dump(stages), encoding="utf-8")
    output = run(toy, "-c", FLOW, json.dumps(["value: 1\n"]))
    (failed,) = json.loads((toy / "runs.json").read_text())
    assert summary(failed) == [("first", "Failed", "first: no such thing")]
    assert failed["failure"] == "first: no such thing"
    assert "Traceback" not in output and "NoneType" not in output
    stages["stages"]["first"]["cmd"] = "exit 1"
    (toy / "dvc.yaml").write_text(yaml.safe_dump(stages), encoding="utf-8")
    run(toy, "-c", FLOW, json.dumps(["value: 1\n"]))
    assert "exited with 1" in json.loads((toy / "runs.json").read_text())[0]["failure"]


@pytest.mark.slow  # a server of its own
def test_the_ui_serves_what_ran_on_any_port_and_leaves_nothing_behind(toy) -> None:
    address = toy / ".prefect/api-url"
    (toy / ".prefect").mkdir()
    address.write_text("http://127.0.0.1:9/api\n", encoding="utf-8")  # a server that was killed
    ui = subprocess.Popen(
        [sys.executable, "-m", "tasks", "ui", "0"], cwd=toy, env=environment(toy), text=True, stdout=subprocess.PIPE
    )
    try:
        announced = [ui.stdout.readline(), ui.stdout.readline()][1]
        url = re.search(r"http://127\.0\.0\.1:\d+", announced)[0]
        assert address.read_text().strip() == f"{url}/api"
        assert "already runs" in run(toy, "-m", "tasks", "ui")
        with urllib.request.urlopen(f"{url}/ui-settings", timeout=10) as answer:
            assert json.load(answer)["api_url"] == f"{url}/api"
        run(toy, "-c", FLOW, json.dumps(["value: 1\n"]))
        ended = ask(url, "flow_runs/filter")
        assert [(entry["flow_id"] is not None, entry["state"]["name"]) for entry in ended] == [(True, "Completed")]
        logged = [line["message"] for line in ask(url, "logs/filter")]
        assert "first talks" in logged
        (progress,) = ask(url, "artifacts/filter")
        assert (progress["key"], progress["type"], progress["data"]) == ("3-progress", "progress", 100.0)
        assert progress["description"] == "all 2 stages are done"
        steps = {step["name"]: step for step in ask(url, "task_runs/filter")}
        assert parents(steps["first"]) == [] and parents(steps["last"]) == [steps["first"]["id"]]
    finally:
        ui.send_signal(signal.SIGTERM)
        assert ui.wait(30) == 0
    assert not address.exists()


def parents(step):
    return [each["id"] for inputs in step["task_inputs"].values() for each in inputs]


def ask(url, what, patience=10.0):
    """What the API lists, as soon as there is any: events reach its database a little later."""
    end = time.monotonic() + patience
    while True:
        request = urllib.request.Request(
            f"{url}/api/{what}", data=b"{}", headers={"Content-Type": "application/json"}, method="POST"
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            found = json.load(answer)
        if found or time.monotonic() > end:
            return found
        time.sleep(0.5)


DAMAGE = {
    "cut off": lambda data: data[: len(data) // 2],
    "no database": lambda data: b"no database" * 500,
    "a page of zeros": lambda data: data[:4096] + bytes(4096) + data[8192:],
    "nothing": lambda data: data,
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_database_is_moved_aside_and_a_good_one_stays(tmp_path, monkeypatch, capsys, what) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    temporary.mend_database()  # there is none
    path = tmp_path / "prefect.db"
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE runs (name TEXT)")
        database.executemany("INSERT INTO runs VALUES (?)", [("x" * 1000,)] * 50)
        database.commit()
    path.write_bytes(damaged := DAMAGE[what](path.read_bytes()))
    temporary.mend_database()
    moved = tmp_path / "prefect.db.damaged"
    if what == "nothing":
        assert path.read_bytes() == damaged and not moved.exists() and not capsys.readouterr().err
    else:
        assert not path.exists() and moved.read_bytes() == damaged
        assert "is damaged" in capsys.readouterr().err


def test_a_taken_port_is_a_sentence(tmp_path) -> None:
    (tmp_path / "flows").symlink_to(ROOT / "flows")
    (tmp_path / "tasks").symlink_to(ROOT / "tasks")
    (tmp_path / "dvc.yaml").write_text("stages: {}\n", encoding="utf-8")
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as other:
        output = run(tmp_path, "-m", "tasks", "ui", str(other.server_port), check=False)
    assert output.count("\n") == 1 and "error: cannot serve on port" in output
    output = run(tmp_path, "-m", "tasks", "ui", "99999", check=False)
    assert "error: cannot serve on port 99999: it must be 0 to 65535" in output


def test_state_stays_in_the_project_and_the_environment_wins(tmp_path, monkeypatch) -> None:
    for name in [name for name in os.environ if name.startswith("PREFECT_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", {"PREFECT_SERVER_ANALYTICS_ENABLED": "true", "DO_NOT_TRACK": "0"})
    settings.apply()
    assert os.environ["PREFECT_HOME"] == str(tmp_path / ".prefect")
    assert os.environ["PREFECT_LOCAL_STORAGE_PATH"].startswith(str(tmp_path / ".prefect"))
    assert os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] == "true" and os.environ["DO_NOT_TRACK"] == "0"
    assert os.environ["DVC_NO_ANALYTICS"] == os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert "PREFECT_API_URL" not in os.environ
    assert not list(tmp_path.iterdir())


def test_every_setting_is_one_that_prefect_knows(monkeypatch) -> None:
    from prefect.settings import Settings
    from prefect.settings.legacy import _get_settings_fields

    monkeypatch.setattr(os, "environ", {})
    settings.apply()
    ours = {name for name in os.environ if name.startswith("PREFECT_")}
    assert ours and ours <= set(_get_settings_fields(Settings))


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A server that answers as Prefect does; its folder of state can be set."""

    class Handler(http.server.BaseHTTPRequestHandler):
        home = str(tmp_path / ".prefect")

        def do_GET(self):
            answers = {"/api/health": True, "/api/admin/settings": {"home": self.home}}
            self.send_response(200 if self.path in answers else 404)
            self.end_headers()
            self.wfile.write(json.dumps(answers.get(self.path)).encode())

        def log_message(self, *_):
            pass

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / ".prefect"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/api", Handler
        server.shutdown()


def test_a_running_server_is_found_and_a_stale_or_foreign_one_is_not(stand_in, monkeypatch) -> None:
    url, handler = stand_in
    assert settings.running_server() is None
    settings.SERVER_URL.parent.mkdir()
    settings.SERVER_URL.write_text(f"{url}\n", encoding="utf-8")
    assert settings.running_server() == url
    handler.home = "/another/project/.prefect"  # the port went to another project
    assert settings.running_server() is None
    for stale in ("http://127.0.0.1:9/api\n", "", "nonsense", "\x00"):
        settings.SERVER_URL.write_text(stale, encoding="utf-8")
        assert settings.running_server() is None
    monkeypatch.setenv("PREFECT_API_URL", url)  # the user's choice: any that answers
    assert settings.running_server() == url
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    assert settings.running_server() is None


def test_a_line_of_progress_is_read_as_tasks_write_it(capsys) -> None:
    from tasks.runtime.progress import Progress

    with Progress("base model", 8) as progress:
        progress.update(2, loss=0.5)
    found = following.PROGRESS.search(capsys.readouterr().err.strip())
    assert (found["what"], found["done"], found["total"]) == ("base model", "2", "8")
    assert not following.PROGRESS.search("[progress] nothing 0/0 eta=0s")
    assert not following.PROGRESS.search("progress 1/2")


def test_the_sentence_of_a_failure_is_the_stages_own(tmp_path) -> None:
    log = tmp_path / "stage.log"
    log.write_text("RuntimeError: 3\nan error: of a library\nerror: wanda: a\nerror: wanda: b\n", encoding="utf-8")
    assert following.sentence(log) == "wanda: a; wanda: b"
    log.write_text("ValueError: oops\n", encoding="utf-8")
    assert following.sentence(log) is None


def test_a_growing_log_becomes_lines_without_redrawn_bars(tmp_path, monkeypatch) -> None:
    lines, shown = [], []

    class Logger:
        info = staticmethod(lines.append)

    monkeypatch.setattr(following, "get_run_logger", lambda: Logger)
    log = tmp_path / "log"
    log.write_bytes(b"")
    with following.followed(log, shown.append), log.open("ab", buffering=0) as file:
        file.write("half of é".encode()[:-1])
        time.sleep(0.5)
        assert lines == []
        file.write("é".encode()[1:] + b"\n\rbar 1%\rbar 100%\n[progress] lora 1/4 loss=2 eta=3s\n")
        time.sleep(0.7)
        assert lines == ["half of é", "bar 100%", "[progress] lora 1/4 loss=2 eta=3s"]
        file.write(b"[progress] lora 4/4 eta=0s\nno end of line")
    assert lines[-1] == "no end of line"
    assert shown == [0.25, 1.0]
