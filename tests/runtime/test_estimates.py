"""estimates: which source tells how long a stage takes, and what a run then says; on a made-up machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from dvc.repo import Repo

from tasks.parameters import durations, preflight, schema, speed
from tasks.parameters.work import Work
from tasks.runtime import code, estimates, lineage, locks, staleness
from tasks.runtime.progress import STATE, Progress
from tests.parameters.test_preflight import CONFIG, with_values

SPEED = {"products": 1e10, "doubles": 1e10, "spectra": 1e8, "bytes": 1e10, "exps": 1e9, "calls": 1e5, "starts": 1.0}
MODEL = preflight.model_shape(CONFIG)


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """A folder of its own; `SPEED` by any number of threads, and how often it was asked for."""
    asked = {"times": 0}

    def of_machine(*_: object) -> dict:
        asked["times"] += 1
        return SPEED

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(speed, "of_machine", of_machine)
    return asked


def stage(address: str) -> SimpleNamespace:
    """As much of DVC's as is asked."""
    repo = SimpleNamespace(root_dir=os.getcwd())
    return SimpleNamespace(addressing=address, repo=repo, frozen=False, meta={}, outs=[], deps=[], name=address)


def ran(address: str, params: schema.Params, took: float, day: int = 1, threads: int | None = 1) -> None:
    """Leave the record of a run on this machine."""
    work = {name: float(f"{amount:.6g}") for name, amount in vars(durations.work(params, MODEL, address)).items()}
    entry = {
        "work": {name: amount for name, amount in work.items() if amount},
        "seconds": took,
        "started": datetime(2026, 11, day, tzinfo=UTC).isoformat(),
        "machine": {"threads": threads},
    }
    folder = lineage.HERE / address
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{day}.json").write_text(json.dumps(entry), encoding="utf-8")


def predicted(address: str, params: schema.Params, threads: int = 1) -> float:
    return estimates.seconds([stage(address)], params, MODEL, threads)[address]


def formula(address: str, params: schema.Params) -> float:
    return durations.work(params, MODEL, address).seconds(SPEED)


def test_without_a_run_it_is_the_formula() -> None:
    assert predicted("lora", with_values({})) == pytest.approx(formula("lora", with_values({})))


def test_the_last_run_with_as_much_to_do_beats_the_formula(machine: dict) -> None:
    params = with_values({})
    ran("lora", params, 11.0, day=1)
    ran("lora", params, 77.0, day=2)
    ran("lora", with_values({"lora.steps": 100}), 5.0, day=3)
    assert predicted("lora", params) == 77.0
    assert machine["times"] == 0  # the machine need not be measured
    assert predicted("wanda", params) == pytest.approx(formula("wanda", params))


def test_a_run_with_more_to_do_is_scaled() -> None:
    few, many = with_values({"lora.steps": 100}), with_values({"lora.steps": 150})
    ran("lora", few, 50.0)
    assert predicted("lora", many) == pytest.approx(50 * formula("lora", many) / formula("lora", few))
    far = with_values({"lora.steps": 5000})
    assert predicted("lora", far) == pytest.approx(formula("lora", far))


def test_a_run_with_other_threads_is_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "of_machine", lambda *asked: {name: rate * asked[2] for name, rate in SPEED.items()})
    ran("lora", with_values({}), 50.0, threads=1)
    assert predicted("lora", with_values({}), threads=2) == pytest.approx(25.0)


def test_records_of_before_and_broken_ones_tell_nothing() -> None:
    folder = lineage.HERE / "lora"
    folder.mkdir(parents=True)
    for name, text in {"old": '{"seconds": 5}', "odd": '{"seconds": "x", "work": {}}', "cut": "{"}.items():
        (folder / f"{name}.json").write_text(text)
    assert predicted("lora", with_values({})) == pytest.approx(formula("lora", with_values({})))


def test_a_start_that_was_slow_counts() -> None:
    assert lineage.seconds({"seconds": 2.0, "start_up_seconds": 3.0, "computing_seconds": 1.5}) == 4.5
    assert lineage.seconds({"seconds": 9.0, "start_up_seconds": 3.0, "computing_seconds": 1.5}) == 9.0
    assert lineage.seconds({"seconds": 2.0}) == 2.0 and lineage.seconds({}) is None


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        ({"lora": 40.0, "code": 0.5}, "about 40 s on this machine: lora 40, all others 0.5 s"),
        (
            {"lora": 1320.0, "evaluate@gptq": 330.0, "evaluate@lora": 330.0, "gptq": 540.0, "code": 60.0},
            "about 43 min on this machine: lora 22, evaluate 11, gptq 9, all others 1 min",
        ),
        ({"lora": 5400.0}, "about 1.5 h on this machine: lora 1.5 h"),
    ],
)
def test_a_run_in_words(seconds: dict, words: str) -> None:
    assert estimates.Run(seconds, sum(seconds.values())).sentence() == words


def test_a_long_run_names_what_shortens_it_most() -> None:
    run = estimates.Run({"lora": 40000.0}, 40000.0, (), ("lora.steps", 19800.0))
    assert run.sentence().endswith("; half of lora.steps would save about 5.5 h")
    found = durations.shortest(with_values({"lora.steps": 10000}), MODEL, ["lora", "evaluate@lora"], SPEED)
    half = formula("lora", with_values({"lora.steps": 10000})) - formula("lora", with_values({"lora.steps": 5000}))
    assert found == ("lora.steps", pytest.approx(half))
    assert durations.shortest(with_values({}), MODEL, ["code"], SPEED) is None


LIST = """
import json, pathlib
pathlib.Path("data/code").mkdir(parents=True, exist_ok=True)
for name in ("first", "last"):
    pathlib.Path(f"data/code/{name}.json").write_text("{}")
"""
STAGES = {
    "code": {"cmd": f"{sys.executable} list.py", "deps": ["tasks"], "outs": ["data/code"]},
    "first": {"cmd": "cat source > first", "deps": ["source", "data/code/first.json"], "outs": ["first"]},
    "side": {"cmd": "cat source > side", "deps": ["source"], "outs": ["side"]},
    "last": {"cmd": "cat first > last", "deps": ["first", "data/code/last.json"], "outs": ["last"]},
    "kept": {"cmd": "cat last > kept", "deps": ["last"], "outs": ["kept"], "frozen": True},
}


@pytest.fixture
def repo(tmp_path: Path):
    """A project whose stages have all run but `side` and `kept`."""
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": STAGES}, sort_keys=False))
    (tmp_path / "list.py").write_text(LIST)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/first.py").touch()
    (tmp_path / "tasks/last.py").touch()
    (tmp_path / "source").write_text("once")
    Repo.init(str(tmp_path), no_scm=True).close()
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q", "last"], check=True)
    with Repo() as opened:
        yield opened


def stale(repo: Repo) -> dict[str, list[str]]:
    repo._reset()
    rows = [staleness.row(each) for each in repo.index.stages]
    found = staleness.to_run(repo, rows)
    return {each.addressing: [other.addressing for other in above] for each, above in found.items()}


def test_only_what_is_stale_and_what_follows_counts(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "changed_code", lambda *_, **__: [])
    assert stale(repo) == {"side": []}
    Path("tasks/first.py").write_text("more = 1\n")  # code lists anew, and what it lists is as it was
    assert stale(repo) == {"code": [], "side": []}
    Path("source").write_text("twice")
    assert stale(repo) == {"code": [], "first": ["code"], "side": [], "last": ["code", "first"]}
    Path("source").write_text("once")
    Path("last").unlink()
    assert "last" not in stale(repo)  # DVC's cache has it
    subprocess.run(["rm", "-r", ".dvc/cache"], check=True)
    assert "last" in stale(repo)


def graph() -> dict[SimpleNamespace, list[SimpleNamespace]]:
    made = {address: stage(address) for address in ("lora", "gptq", "evaluate@gptq")}

    class Hashed(SimpleNamespace):
        __hash__ = object.__hash__

    made = {address: Hashed(**vars(each)) for address, each in made.items()}
    return {made["lora"]: [], made["gptq"]: [made["lora"]], made["evaluate@gptq"]: [made["gptq"]]}


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Three stages that have run here, and a valid params.yaml."""
    took = {"lora": 100.0, "gptq": 60.0, "evaluate@gptq": 20.0}
    params = with_values({})
    for address, seconds in took.items():
        ran(address, params, seconds)
    monkeypatch.setattr(schema, "load", lambda: params)
    monkeypatch.setattr(preflight, "model_here", lambda *_: MODEL)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return took


def test_the_time_left_falls_as_stages_end(known: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    stages = graph()
    assert estimates.of_run(None, stages, flow=False).left == 180.0
    (lora, gptq, evaluate) = stages
    assert estimates.of_run(None, {gptq: [], evaluate: [gptq]}, flow=False).left == 80.0
    assert estimates.of_run(None, {evaluate: []}, flow=False).left == 20.0


def test_of_a_running_stage_its_own_progress_tells(known: dict[str, float]) -> None:
    lock = staleness.lock(Path(), "lora")
    with locks.held(lock, ""):
        os.utime(lock, (time.time() - 30, time.time() - 30))
        run = estimates.of_run(None, graph(), flow=False)
        assert run.running == ("lora",) and run.left == pytest.approx(150, abs=2)  # by the clock
        os.utime(lock, (time.time() - 500, time.time() - 500))
        assert estimates.of_run(None, graph(), flow=False).left == pytest.approx(85)  # never over
        lock.with_name(STATE.format("lora")).write_text('{"done": 1, "total": 4, "left": 33.0}')
        assert estimates.of_run(None, graph(), flow=False).left == pytest.approx(113, abs=1)
        lock.with_name(STATE.format("lora")).write_text("{")
        assert estimates.of_run(None, graph(), flow=False).left == pytest.approx(85)


def test_stages_of_a_flow_run_side_by_side(known: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "workers", lambda *_: 2)
    lora, gptq, evaluate = graph()
    assert estimates.of_run(None, {lora: [], gptq: [], evaluate: [gptq]}, flow=True).left == 100.0
    assert estimates.of_run(None, {lora: [], gptq: [], evaluate: [gptq]}, flow=False).left == 180.0


def test_in_another_project_nothing_is_told() -> None:
    Path("params.yaml").write_text("words: 1\n")
    assert estimates.of_run(None, graph(), flow=False) is None


def test_a_stage_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now = [100.0]
    monkeypatch.setattr("tasks.runtime.progress.time.monotonic", lambda: now[0])
    kept = tmp_path / "lora.progress"
    kept.write_text('{"done": 3, "total": 4, "left": 1.0}')  # of a killed run
    with Progress("recovery", 4, kept) as bar:
        assert not kept.exists()
        now[0] += 10
        bar.update(1)
        assert json.loads(kept.read_text()) == {"done": 1, "total": 4, "left": 30.0}
        now[0] += 1
        bar.update(2)
        assert json.loads(kept.read_text())["done"] == 1  # not too often
    assert not kept.exists()


def noted(**given: object) -> dict:
    """What `note_work` leaves in a stage's record."""
    facts: dict = {}
    params = with_values({})
    stage = SimpleNamespace(everything=params, name="lora", address="lora", note=lambda **each: facts.update(each))
    vars(stage).update(given)
    estimates.note_work(stage)
    return facts


def test_a_run_leaves_what_it_had_to_do_but_not_one_that_went_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "model_here", lambda *_: MODEL)
    work = noted()["work"]
    assert Work(**work).seconds(SPEED) == pytest.approx(formula("lora", with_values({})), rel=1e-4)
    assert noted(journal=SimpleNamespace(goes_on=False)) == {"work": work}
    assert noted(journal=SimpleNamespace(goes_on=True)) == {} == noted(answers=SimpleNamespace(goes_on=True))
    monkeypatch.setattr(preflight, "model_here", lambda *_: None)
    assert noted() == {}
