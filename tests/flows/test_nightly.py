"""Nights on a project of trivial stages: schedule, verdicts, record, promotion, event, retention, workspace untouched.

One Prefect server serves all of them; what a stage computes is of no account here.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml

from flows import retention
from flows.server import dead_runs
from tasks.algorithms.errors import InputError
from tasks.nightly import records, worktree
from tasks.parameters import schema
from tasks.registry import overview, tags, versions
from tasks.runtime import git
from tests.support.nightly_project import NightlyProject
from tests.support.paths import ROOT

ONCE = ("-m", "flows.schedule", "--once")
CACHED = "0 of 7 stages ran"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The project, with a server of its own."""
    found = NightlyProject(tmp_path_factory.mktemp("nightly"))
    ui = found.start("-m", "flows.server.ui", "0")
    try:
        assert ui.stdout.readline() and "Prefect UI" in ui.stdout.readline()
        yield found
    finally:
        ui.send_signal(signal.SIGTERM)
        ui.wait(30)


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
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.5)
    return found


def workspace(project):
    """git's state, and the hash of every file but those of server and registry."""
    state = project.run("git", "status", "--porcelain"), project.run("git", "log", "--format=%H", "--branches")
    own = (".git", ".prefect", ".dvc", "home")
    files = [
        path for path in project.path.rglob("*") if path.is_file() and path.parts[len(project.path.parts)] not in own
    ]
    kept = [path for path in files if "registry" not in path.parts and "__pycache__" not in path.parts]
    return state, {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


def last(project):
    return records.listing(project.path)[-1]


def version(project):
    return versions.current(project.path).version


def serve_until_it_fires(project):
    """Serve until one night more is recorded, then stop gracefully; returns the night."""
    before = len(records.listing(project.path))
    served = project.start("-m", "flows.schedule")
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
    assert (first.record["verdict"], first.record["stages"]) == ("ACCEPT", "7 of 7 stages ran")
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
        project.python("-m", "flows.notification", "--webhook", url)
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
    assert "source/none" in project.python(*ONCE, expect=1) and last(project).record["verdict"] == records.FAILED
    assert version(project) == "v0.0.2"

    shown = project.python("-m", "flows.schedule", "list")
    assert [word for word in ("ACCEPT", "REGRESSION", "INFEASIBLE", "ANOMALOUS", "FAILED") if word not in shown] == []
    assert "gptq.bits" in shown and "v0.0.2" in shown
    project.python("-m", "flows.schedule", "apply", accepted.name)
    assert "up to date" in project.run(sys.executable, "-m", "dvc", "status")
    assert "Running stage" not in project.run(sys.executable, "-m", "dvc", "repro")
    project.python("-m", "flows.schedule", "apply", records.listing(project.path)[0].name)  # from one to the next
    project.run("git", "checkout", "--force", ".")


@pytest.mark.slow  # a server
def test_retention_says_what_would_go_and_keeps_what_is_promoted(project) -> None:
    if version_missing(project):
        project.python(*ONCE)
    project.change({"nightly.retention": {"nights": 1, "days": 1}})
    known = records.listing(project.path)
    project.weights(0.002)
    project.commit("one more")
    said = project.python("-m", "flows.retention")
    assert "would go" in said and said.count("\nnight ") + said.startswith("night ") == len(known) - 1
    assert records.listing(project.path) == known
    project.python("-m", "flows.retention", "--apply")
    assert [night.name for night in records.listing(project.path)] == [known[-1].name]
    versions.verify(project.path, version(project))
    current = versions.current(project.path)
    project.python(
        "-m", "tasks.nightly.judgement", current.revision
    )  # its figures and its package are still in the cache
    assert "0 things" in project.python("-m", "flows.retention")


def version_missing(project):
    return versions.current(project.path) is None


@pytest.mark.slow  # a server
@pytest.mark.parametrize("reaped", [True, False], ids=["gone", "zombie"])
def test_a_run_whose_process_was_killed_does_not_stay_running(project, reaped) -> None:
    script = "from flows import processes; from prefect import flow; import os, time\n@flow(name='doomed')\ndef f():\n"
    script += " processes.sign()\n print('signed', flush=True)\n time.sleep(600)\nf()"
    doomed = project.start("-c", f"from flows import settings; settings.apply()\n{script}")
    wait_for(lambda: doomed.stdout.readline() == "signed\n", 60)  # the run's name is printed before, and may be a word
    doomed.kill()
    if reaped:
        doomed.wait()
    running = {"flow_runs": {"state": {"type": {"any_": ["RUNNING"]}}}}
    (left,) = [run for run in ask(project, "flow_runs/filter", running)]
    script = "from flows import settings; settings.apply()\nfrom flows import processes; print(len(processes.sweep()))"
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
    served = project.start("-m", "flows.schedule", group=True)
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
    blocked = project.path / f".git/refs/tags/{tags.ARTIFACT}@{following}.lock"  # as of a git that was killed
    blocked.parent.mkdir(parents=True, exist_ok=True)
    blocked.touch()
    before = versions.current(project.path)
    output = project.python(*ONCE, expect=1)
    assert re.search(r"error: night-\S+: ACCEPT, but not promoted: ", output)
    assert last(project).record["verdict"] == "ACCEPT" and versions.current(project.path) == before
    blocked.unlink()
    assert f"{following} is promoted" in project.python(*ONCE)


def sound(project, nats, **nightly):
    """Commit parameters that the gate accepts, whatever a test before left, with other weights."""
    project.weights(nats)
    project.change({"fetch.model.path": "source/model", "gptq.bits": 4, "hardware_fit.context": 512})
    project.change({f"nightly.{name}": value for name, value in nightly.items()})
    project.commit("sound")


@pytest.mark.slow  # a server
def test_a_night_without_its_source_is_recorded_as_failed(project) -> None:
    sound(project, 0.007)
    project.change({"fetch.model.path": "source/nowhere"})
    project.commit("no source")
    before = len(records.listing(project.path))
    assert "source/nowhere" in project.python(*ONCE, expect=1)
    (found,) = records.listing(project.path)[before:]
    assert found.record["verdict"] == "FAILED" and "source/nowhere" in found.record["reason"]
    assert found.name in project.python("-m", "flows.schedule", "list")


@pytest.mark.slow  # a server and a worker
def test_the_deployment_of_prefect_yaml_runs_on_a_process_pool(project) -> None:
    sound(project, 0.004)
    before = len(records.listing(project.path))
    prefect = (str(Path(sys.executable).parent / "prefect"), "--no-prompt")
    named = {"PREFECT_API_URL": (project.path / ".prefect/api-url").read_text().strip()}
    named |= {"PREFECT_HOME": str(project.path / ".prefect"), "EDGEPRESS_PROJECT": str(project.path)}
    project.run(*prefect, "work-pool", "create", "edgepress", "--type", "process", env=named)
    project.run(*prefect, "deploy", "--prefect-file", str(ROOT / "prefect.yaml"), "--name", "nightly", env=named)
    project.run(*prefect, "deployment", "run", "night/nightly", env=named)
    project.run(*prefect, "worker", "start", "--pool", "edgepress", "--run-once", env=named)
    (found,) = records.listing(project.path)[before:]
    assert found.record["verdict"] == "ACCEPT"


@pytest.mark.slow  # a server
def test_a_night_a_repro_a_flow_and_a_second_night_at_once(project) -> None:
    sound(project, 0.005, overlap="cancel")
    before = len(records.listing(project.path))
    commands = (ONCE, ONCE, ("-m", "dvc", "repro"), ("-m", "flows.compress", "package", "hardware_fit"))
    together = [project.start(*command) for command in commands]
    said = [process.communicate(timeout=300)[0] for process in together]
    for process, text in zip(together, said, strict=True):
        assert "Traceback" not in text
        assert process.returncode == 0 or re.search(r"error: .*process \d+ \(.*\), since \d{4}-", text), text
    assert len(records.listing(project.path)) > before
    assert "up to date" in project.run(sys.executable, "-m", "dvc", "status") or project.python("-m", "dvc", "repro")
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
    for command in (ONCE, ONCE[:2]):
        output = plain.python(*command, expect=1)
        assert output.count("\n") == 1 and "make ui" in output
    assert "There is no night yet" in plain.python("-m", "flows.schedule", "list")
    assert "no night is called x" in plain.python("-m", "flows.schedule", "apply", "x", expect=1)


@pytest.mark.slow  # a server
def test_a_server_with_a_password_serves_those_alone_who_know_it(plain) -> None:
    secret = "name:plantedPassword"
    known = {"PREFECT_API_AUTH_STRING": secret}
    ui = plain.start("-m", "flows.server.ui", "0", env=known | {"PREFECT_SERVER_API_AUTH_STRING": secret})
    try:
        assert ui.stdout.readline() and "Prefect UI" in ui.stdout.readline()
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
    finally:
        ui.send_signal(signal.SIGTERM)
        ui.wait(30)


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


def test_the_worktree_shares_the_cache_and_leaves_the_workspace_alone(plain) -> None:
    before = workspace(plain)
    (plain.path / "params.yaml").write_text("broken: [", encoding="utf-8")
    folder = worktree.prepare(plain.path)
    assert yaml.safe_load((folder / "params.yaml").read_text())["gptq"]["bits"] == 4  # HEAD's
    (folder / "dvc.lock").write_text("schema: '2.0'\n", encoding="utf-8")
    (folder / "params.yaml").write_text("left behind", encoding="utf-8")
    index = Path(git.run(folder, "rev-parse", "--path-format=absolute", "--git-path", "index"))
    assert index.exists() and index.parent.name == "worktree"
    index.with_name("index.lock").touch()  # of a git that was killed
    assert worktree.prepare(plain.path) == folder
    assert (folder / "dvc.lock").exists() and "gptq" in (folder / "params.yaml").read_text()
    candidate = worktree.snapshot(folder)
    found = records.save(folder, "night-1", candidate, {"verdict": "ACCEPT"})
    assert [night.name for night in records.listing(plain.path)] == ["night-1"]
    assert records.find(plain.path, "night").commit == found.commit
    plain.run("git", "checkout", "--", "params.yaml")
    assert workspace(plain) == before
    (folder / ".git").unlink()  # a worktree that somebody broke is made anew
    assert (worktree.prepare(plain.path) / ".git").exists()


@pytest.mark.parametrize("gitdir", ["{folder}/.git\n", ""])
def test_a_kill_in_git_worktree_add_does_not_block_the_next_night(plain, gitdir) -> None:
    folder = plain.path / worktree.WORKTREE
    known = plain.path / ".git/worktrees/worktree"  # as git leaves it
    known.mkdir(parents=True)
    (known / "locked").write_text("initializing\n")
    (known / "gitdir").write_text(gitdir.format(folder=folder))
    assert worktree.prepare(plain.path) == folder
    assert (folder / "params.yaml").exists() and "locked" not in plain.run("git", "worktree", "list")


def test_a_source_that_is_a_link_is_followed_every_night(plain) -> None:
    from tasks.nightly import newer_sources

    for name in ("one", "two"):
        (plain.path / f"data/{name}").mkdir(parents=True)
        (plain.path / f"data/{name}/weights.json").write_text(name)
    plain.change({"fetch.model.path": "data/current"})
    plain.commit("a source that git ignores")
    folder, found = worktree.prepare(plain.path), []
    for name in ("one", "two"):
        (plain.path / "data/current").unlink(missing_ok=True)
        (plain.path / "data/current").symlink_to(name)
        found.append(newer_sources.digest(newer_sources.bring(plain.path, folder)))
        assert (folder / "data/current/weights.json").read_text() == name
    assert found[0] != found[1]


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


def test_sources_are_taken_as_they_lie_in_the_workspace(plain, tmp_path_factory) -> None:
    from tasks.nightly import newer_sources

    outside = tmp_path_factory.mktemp("outside")
    (plain.path.parent / "beside").mkdir(exist_ok=True)
    (plain.path.parent / "beside/test.jsonl").write_text("{}\n")
    (outside / "ood.jsonl").write_text("{}\n")
    raw = yaml.safe_load((plain.path / "params.yaml").read_text())
    raw["fetch"]["corpora"]["test"]["path"] = "../beside/test.jsonl"
    raw["fetch"]["corpora"]["test_ood"]["path"] = str(outside / "ood.jsonl")
    (plain.path / "params.yaml").write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    plain.commit("sources elsewhere")
    folder = worktree.prepare(plain.path)
    first = newer_sources.bring(plain.path, folder)
    assert (folder / "../beside/test.jsonl").exists()
    assert {source.name for source in first} == {"model", "corpora.train"}  # the toy's fetch depends on these
    plain.weights(1.0)
    changed = newer_sources.bring(plain.path, worktree.prepare(plain.path))
    assert json.loads((folder / "source/model/weights.json").read_text()) == {"nats": 1.0}
    assert newer_sources.digest(first) != newer_sources.digest(changed)
    plain.weights(0.0)
    assert newer_sources.bring(plain.path, worktree.prepare(plain.path)) == first


def test_a_night_pins_the_followed_branch_and_keeps_the_comments(plain, monkeypatch) -> None:
    import huggingface_hub

    from tasks.nightly import newer_sources

    text = (plain.path / "params.yaml").read_text()
    raw = yaml.safe_load(text)
    raw["fetch"]["model"] |= {"hub": "a/b", "revision": "0" * 40}
    raw["nightly"]["upstream"]["model"] = "main"
    (plain.path / "params.yaml").write_text("# kept\n" + yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    plain.commit("hub")
    asked = []

    class Api:
        def repo_info(self, repo, revision, repo_type):
            asked.append((repo, revision, repo_type))
            return type("Info", (), {"sha": "a" * 40})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    folder = worktree.prepare(plain.path)
    sources = newer_sources.bring(plain.path, folder)
    assert asked == [("a/b", "main", "model")]
    assert next(source for source in sources if source.name == "model") == ("model", "a/b", "a" * 40)
    written = (folder / "params.yaml").read_text()
    assert "# kept" in written and yaml.safe_load(written)["fetch"]["model"]["revision"] == "a" * 40


def test_the_deployment_for_work_pools_is_valid_and_has_the_schedule_of_the_parameters() -> None:
    from prefect.cli.deploy._models import PrefectYamlModel
    from prefect.utilities.importtools import import_object

    raw = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))
    (deployment,) = PrefectYamlModel.model_validate(raw).deployments
    own = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["nightly"]
    (schedule,) = raw["deployments"][0]["schedules"]
    assert (schedule["cron"], schedule["timezone"]) == (own["cron"], own["timezone"])
    strategy = {"cancel": "CANCEL_NEW", "queue": "ENQUEUE"}[own["overlap"]]
    assert raw["deployments"][0]["concurrency_limit"] == {"limit": 1, "collision_strategy": strategy}
    assert deployment.name == "nightly"
    path, _, name = deployment.entrypoint.partition(":")
    assert import_object(f"{path.removesuffix('.py').replace('/', '.')}.{name}").name == "night"


def test_templates_of_notifications_are_valid_for_prefect() -> None:
    from uuid import uuid4

    from prefect.blocks.notifications import SendgridEmail
    from prefect.server.events.schemas.automations import AutomationCreate
    from prefect.server.utilities.user_templates import validate_user_template

    from flows import notification

    for is_webhook in (True, False):
        automation = notification.template(["accept", "failed"], uuid4(), is_webhook)
        AutomationCreate.model_validate(automation.model_dump(mode="json", exclude={"id"}))
        assert automation.trigger.expect == {"edgepress.night.accept", "edgepress.night.failed"}
    for text in (notification.SUBJECT, notification.BODY, notification.PAYLOAD):
        validate_user_template(text)
    SendgridEmail(api_key="x", sender_email="a@example.org", to_emails=["b@example.org"])
    assert re.fullmatch(r"[a-z.]+", notification.EVENT)
