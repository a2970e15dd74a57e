"""Nights on a project of trivial stages: schedule, verdicts, record, promotion, event, retention, workspace untouched.

One Prefect server serves all of them; what a stage computes is of no account here.
"""

from __future__ import annotations

import base64
import contextlib
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from flows import retention
from flows.server import dead_runs
from tasks.algorithms.errors import InputError
from tasks.nightly import records, worktree
from tasks.parameters import schema
from tasks.registry import overview, tags, versions
from tasks.runtime import git
from tests.support.nightly_project import NightlyProject, workspace
from tests.support.paths import ROOT

ONCE = ("-m", "tasks", "night", "--once")
CACHED = "0 of 8 stages ran"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The project, with a server of its own."""
    with NightlyProject(tmp_path_factory.mktemp("nightly")).served() as found:
        yield found


@pytest.fixture
def plain(tmp_path):
    """The project without a server."""
    return NightlyProject(tmp_path)


def ask(project, what, body=None):
    url = (project.path / ".prefect/api-url").read_text().strip()
    data = json.dumps(body or {}).encode()
    request = urllib.request.Request(f"{url}/{what}", data, {"Content-Type": "application/json"}, method="POST")
    while True:
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code != http.HTTPStatus.SERVICE_UNAVAILABLE:  # its database is busy
                raise
            time.sleep(0.5)


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(TimeoutError):  # of one question, to a server that is busy
            if found := condition():
                return found
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.5)


def last(project):
    return records.listing(project.path)[-1]


def version(project):
    return versions.current(project.path).version


def serve_until_it_fires(project):
    """Serve until one night more is recorded, then stop gracefully; returns the night."""
    before = len(records.listing(project.path))
    served = project.start("-m", "tasks", "night")
    threading.Thread(target=served.stdout.read, daemon=True).start()
    try:
        wait_for(lambda: len(records.listing(project.path)) > before or served.poll() is not None, 150)
        wait_for(
            lambda: not ask(project, "flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["RUNNING"]}}}}), 60
        )
    finally:
        served.send_signal(signal.SIGTERM)
        assert served.wait(60) == 0
    return last(project)


@pytest.mark.slow  # two runs by a cron of every minute
def test_the_schedule_fires_and_fires_again_after_a_stop_and_a_restart(project) -> None:
    project.change({"nightly.cron": "* * * * *"})
    project.commit("every minute")
    before = workspace(project)
    first = serve_until_it_fires(project)
    assert (first.record["verdict"], first.record["stages"]) == ("ACCEPT", "8 of 8 stages ran")
    again = serve_until_it_fires(project)
    assert (again.record["verdict"], again.record["stages"]) == ("ACCEPT", CACHED)
    assert workspace(project) == before
    scheduled = ask(project, "flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}})
    assert sum(run["auto_scheduled"] for run in scheduled) >= 2
    assert version(project) == "v0.0.1"


@pytest.mark.slow  # six nights
def test_each_kind_of_night_has_its_verdict_its_event_and_its_exit_code(project) -> None:
    if not records.listing(project.path):
        project.python(*ONCE)
    with webhook() as (url, received):
        project.python("-m", "tasks", "notify", "--webhook", url)
        project.weights(0.001)  # uncommitted: a source is taken as it lies there
        before = workspace(project)
        output = project.python(*ONCE)
        assert "v0.0.2 is promoted" in output and "perplexity by promoted model's, test" in output
        assert workspace(project) == before
        accepted = last(project)
        assert accepted.record["verdict"] == "ACCEPT" and accepted.record["against"] == "v0.0.1"
        told = wait_for(lambda: received, 60)[-1]
        assert told["night"] == accepted.name and told["figures"] == accepted.record["figures"]
        assert told["promotion"] == "v0.0.2 is promoted"
    events = wait_for(
        lambda: ask(project, "events/filter", {"filter": {"event": {"prefix": ["edgepress"]}}})["events"], 30
    )
    assert "edgepress.night.accept" in {event["event"] for event in events}

    project.change({"gptq.bits": 2})
    project.commit("new weights, broken parameters")
    output = project.python(*ONCE, expect=3)
    assert "REGRESSION: perplexity by fetched model's, test: 1.649" in output and "v0.0.2 stays promoted" in output
    project.change({"gptq.bits": 4, "hardware_fit.context": 2000})
    project.commit("oversize")
    output = project.python(*ONCE, expect=5)
    assert "INFEASIBLE: fits the device: DOES_NOT_FIT (toy, ram: kv_cache) by 4,096 bytes, limit FITS" in output
    project.change({"hardware_fit.context": 512})
    (project.path / "source/train.jsonl").write_text('{"text": "leak"}\n', encoding="utf-8")
    project.commit("leaked")
    assert "ANOMALOUS: test text in training text, documents: 1" in project.python(*ONCE, expect=4)
    (project.path / "source/train.jsonl").write_text('{"text": "x"}\n', encoding="utf-8")
    project.change({"fetch.model.path": "source/none"})
    project.commit("no such source")
    before = len(records.listing(project.path))
    assert "source/none" in project.python(*ONCE, expect=1)
    (failed,) = records.listing(project.path)[before:]
    assert failed.record["verdict"] == records.FAILED and "source/none" in failed.record["reason"]
    assert version(project) == "v0.0.2"

    shown = project.python("-m", "tasks", "night", "list")
    assert [word for word in ("ACCEPT", "REGRESSION", "INFEASIBLE", "ANOMALOUS", "FAILED") if word not in shown] == []
    assert "gptq.bits" in shown and "v0.0.2" in shown and failed.name in shown
    project.python("-m", "tasks", "night", "apply", accepted.name)
    assert "up to date" in project.run(sys.executable, "-m", "dvc", "status")
    assert "Running stage" not in project.run(sys.executable, "-m", "dvc", "repro")
    project.python("-m", "tasks", "night", "apply", records.listing(project.path)[0].name)  # from one to the next
    project.run("git", "checkout", "--force", ".")


@pytest.mark.slow  # a server
def test_retention_says_what_would_go_and_keeps_what_is_promoted(project) -> None:
    if version_missing(project):
        project.python(*ONCE)
    project.change({"nightly.retention": {"nights": 1, "days": 1}})
    known = records.listing(project.path)
    project.weights(0.002)
    project.commit("one more")
    said = project.python("-m", "tasks", "retention")
    assert "would go" in said and said.count("\nnight ") + said.startswith("night ") == len(known) - 1
    assert records.listing(project.path) == known
    project.python("-m", "tasks", "retention", "--apply")
    assert [night.name for night in records.listing(project.path)] == [known[-1].name]
    versions.verify(project.path, version(project))
    current = versions.current(project.path)
    project.python("-m", "tasks", "gate", current.revision)  # its figures and its package are still in the cache
    assert "0 things" in project.python("-m", "tasks", "retention")


def version_missing(project):
    return versions.current(project.path) is None


@pytest.mark.slow  # a server
@pytest.mark.parametrize("reaped", [True, False], ids=["gone", "zombie"])
def test_a_run_whose_process_was_killed_does_not_stay_running(project, reaped) -> None:
    script = "from flows.server import dead_runs; from prefect import flow; import os, time\n"
    script += "@flow(name='doomed')\ndef f():\n dead_runs.sign()\n print('signed', flush=True)\n time.sleep(600)\nf()"
    doomed = project.start("-c", f"from flows.server import settings; settings.apply()\n{script}")
    wait_for(lambda: doomed.stdout.readline() == "signed\n", 60)  # the run's name is printed before, and may be a word
    doomed.kill()
    if reaped:
        doomed.wait()
    running = {"flow_runs": {"state": {"type": {"any_": ["RUNNING"]}}}}
    (left,) = [run for run in ask(project, "flow_runs/filter", running)]
    script = "from flows.server import settings; settings.apply()\n"
    script += "from flows.server import dead_runs; print(len(dead_runs.sweep()))"
    assert project.python("-c", script).strip().endswith("1")
    found = flow_run(project, left["id"])
    assert found["state"]["type"] == "CRASHED" and "is gone" in found["state"]["message"]
    doomed.wait()


@pytest.mark.slow  # a server
def test_after_a_kill_of_runner_and_night_those_that_were_asked_for_run(project) -> None:
    sound(project, 0.006, cron="0 3 1 1 *", overlap="queue")
    due = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}
    for missed in ask(project, "flow_runs/filter", due):  # while nobody served: the last of them would be first
        ask(project, f"flow_runs/{missed['id']}/set_state", {"state": {"type": "CANCELLED"}, "force": True})
    with worktree.locked(project.path, wait=False):  # the night waits for it
        served = serve(project)
        doomed = ask_for_night(project)
        wait_for(lambda: dead_runs.PID in flow_run(project, doomed)["labels"], 90)
        os.killpg(served.pid, signal.SIGKILL)
    asked = [ask_for_night(project) for _ in range(2)]
    served.wait()
    served = serve(project)
    try:
        wait_for(lambda: all(flow_run(project, run)["state_type"] == "COMPLETED" for run in asked), 90)
        assert flow_run(project, doomed)["state_type"] == "CRASHED"
    finally:
        served.send_signal(signal.SIGTERM)
        assert served.wait(60) == 0


def serve(project):
    """The runner with its runs, a process group of its own, once it polls."""
    served = project.start("-m", "tasks", "night", group=True)
    wait_for(lambda: "being served" in served.stdout.readline(), 60)
    threading.Thread(target=served.stdout.read, daemon=True).start()
    return served


def ask_for_night(project):
    """Ask the deployment for a run now, as the UI does; returns its id."""
    only = {"deployments": {"name": {"any_": ["nightly"]}}}
    (deployment,) = ask(project, "deployments/filter", only)
    return ask(project, f"deployments/{deployment['id']}/create_flow_run")["id"]


def flow_run(project, run):
    (found,) = ask(project, "flow_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
    return found


@pytest.mark.slow  # a server
def test_an_accepted_model_that_cannot_be_promoted_fails_the_night_and_the_next_one_promotes_it(project) -> None:
    sound(project, 0.003)
    following = f"v0.0.{len(overview.versions(project.path)) + 1}"
    blocked = project.path / f".git/refs/tags/{tags.ARTIFACT}@{following}"  # git makes no tag where a folder has some
    blocked.mkdir(parents=True)
    (blocked / "other").write_text(git.run(project.path, "rev-parse", "HEAD") + "\n", encoding="utf-8")
    before = versions.current(project.path)
    output = project.python(*ONCE, expect=1)
    assert re.search(r"error: night-\S+: ACCEPT, but not promoted: ", output)
    assert last(project).record["verdict"] == "ACCEPT" and versions.current(project.path) == before
    shutil.rmtree(blocked)
    assert f"{following} is promoted" in project.python(*ONCE)


def sound(project, nats, **nightly):
    """Commit parameters that the gate accepts, whatever a test before left, with other weights."""
    project.weights(nats)
    project.change({"fetch.model.path": "source/model", "gptq.bits": 4, "hardware_fit.context": 512})
    project.change({f"nightly.{name}": value for name, value in nightly.items()})
    project.commit("sound")


@pytest.mark.slow  # a server and a worker
def test_the_deployment_of_prefect_yaml_runs_on_a_process_pool(project) -> None:
    sound(project, 0.004)
    before = len(records.listing(project.path))
    prefect = (str(Path(sys.executable).parent / "prefect"), "--no-prompt")
    named = {"PREFECT_API_URL": (project.path / ".prefect/api-url").read_text().strip()}
    named |= {"PREFECT_HOME": str(project.path / ".prefect"), "EDGEPRESS_PROJECT": str(project.path)}
    project.run(*prefect, "work-pool", "create", "edgepress", "--type", "process", env=named)
    project.run(*prefect, "deploy", "--prefect-file", str(ROOT / "flows/prefect.yaml"), "--name", "nightly", env=named)
    project.run(*prefect, "deployment", "run", "night/nightly", env=named)
    project.run(*prefect, "worker", "start", "--pool", "edgepress", "--run-once", env=named)
    (found,) = records.listing(project.path)[before:]
    assert found.record["verdict"] == "ACCEPT"


@pytest.mark.slow  # a server
def test_a_night_a_repro_a_flow_and_a_second_night_at_once(project) -> None:
    sound(project, 0.005, overlap="cancel")
    before = len(records.listing(project.path))
    commands = (ONCE, ONCE, ("-m", "dvc", "repro"), ("-m", "tasks", "run", "package", "hardware_fit"))
    together = [project.start(*command) for command in commands]
    said = [process.communicate(timeout=300)[0] for process in together]
    for process, text in zip(together, said, strict=True):
        assert "Traceback" not in text
        assert process.returncode == 0 or re.search(r"error: .*process \d+ \(.*\), since \d{4}-", text), text
    assert len(records.listing(project.path)) > before
    project.python("-m", "dvc", "repro")  # what was refused or cancelled
    assert "up to date" in project.run(sys.executable, "-m", "dvc", "status")
    versions.verify(project.path, version(project))


def webhook():
    """(URL, what was posted there)."""
    received = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    class Served:
        def __enter__(self):
            return f"http://127.0.0.1:{server.server_port}/", received

        def __exit__(self, *_):
            server.shutdown()

    return Served()


def test_without_a_server_a_night_says_how_to_start_one(plain) -> None:
    for command in (ONCE, ONCE[:3]):
        output = plain.python(*command, expect=1)
        assert output.count("\n") == 1 and "make ui" in output
    assert "There is no night yet" in plain.python("-m", "tasks", "night", "list")
    assert "no night is called x" in plain.python("-m", "tasks", "night", "apply", "x", expect=1)


@pytest.mark.slow  # a server
def test_a_server_with_a_password_serves_those_alone_who_know_it(plain) -> None:
    secret = "name:plantedPassword"
    known = {"PREFECT_API_AUTH_STRING": secret}
    with plain.served(env=known | {"PREFECT_SERVER_API_AUTH_STRING": secret}):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask(plain, "flow_runs/filter")
        refused = plain.python(*ONCE, expect=1)
        assert "PREFECT_API_AUTH_STRING" in refused and "Traceback" not in refused
        assert not records.listing(plain.path)
        wrong = plain.run(sys.executable, *ONCE, expect=1, env={"PREFECT_API_AUTH_STRING": "name:other"})
        assert "PREFECT_API_AUTH_STRING" in wrong and "Traceback" not in wrong
        assert "v0.0.1 is promoted" in plain.run(sys.executable, *ONCE, env=known)
        hidden = [text.encode() for text in (secret, "plantedPassword", base64.b64encode(secret.encode()).decode())]
        written = [path for path in plain.path.rglob("*") if path.is_file()]
        assert len(written) > 50 and not [path for path in written if any(map(path.read_bytes().count, hidden))]


def test_a_second_night_is_told_who_holds_the_lock_and_a_dead_one_holds_none(plain) -> None:
    held = subprocess.Popen(
        [sys.executable, "-c", "import pathlib, sys\nfrom tasks.nightly import worktree\n"
         "with worktree.locked(pathlib.Path.cwd(), wait=False): print('held', flush=True); sys.stdin.read()"],
        cwd=plain.path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert held.stdout.readline().strip() == "held"
    with (
        pytest.raises(InputError, match=rf"(?s)is at work: process {held.pid} .*, since \d{{4}}-.* set nightly"),
        worktree.locked(plain.path, False),
    ):
        pass
    held.kill()
    held.wait()
    with worktree.locked(plain.path, wait=False):
        pass


def test_retention_keeps_what_anybody_s_own_tag_names(plain) -> None:
    plain.python("-m", "dvc", "repro")
    plain.run("git", "add", "-f", "dvc.lock")
    plain.commit("made")
    versions.promote(plain.path, "HEAD", {})
    revision = plain.run("git", "rev-parse", "HEAD").strip()
    plain.change({"gptq.bits": 3})
    plain.python("-m", "dvc", "repro")
    plain.commit("made anew")
    versions.promote(plain.path, "HEAD", {})
    plain.run("git", "tag", "blob", "HEAD:params.yaml")
    own = schema.load(plain.path / "params.yaml")
    own = own.model_copy(update={"registry": own.registry.model_copy(update={"keep": 1})})
    plain.run("git", "checkout", "-q", "--orphan", "new")
    plain.commit("another history")
    plain.run("git", "branch", "-D", *(set(plain.run("git", "branch", "--format=%(refname:short)").split()) - {"new"}))
    assert revision not in retention._named_commits(plain.path, set(), own)
    plain.run("git", "tag", "paper", revision)
    assert revision in retention._named_commits(plain.path, set(), own)
