"""What stages did: differences by hand, verdicts of planted changes, and the order of the models in the DAG."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tasks.algorithms.statistics.bootstrap import Sums
from tasks.cli import attribution as command
from tasks.evaluation import attribution

SPLITS = ("test", "test_ood")


def evaluation(nats: float, size: int, zeros: int, noise: float = 0.001, seed: int = 0) -> dict:
    draw = np.random.default_rng(seed)
    hard = np.random.default_rng(99).uniform(2, 4, 40)
    predictions = np.full(40, 100)
    nll = predictions * (hard + nats + noise * draw.standard_normal(40))
    sums = Sums(np.arange(40), predictions, 4 * predictions, nll)
    perplexity = float(np.exp(nll.sum() / 4000))
    return {
        "evaluated": True,
        "protocol": "p",
        "perplexity": dict.fromkeys(SPLITS, perplexity),
        "bits_per_byte": dict.fromkeys(SPLITS, 1.0),
        "predictions": dict.fromkeys(SPLITS, 4000),
        "bytes": {"total": size},
        "zeros": zeros,
        "documents": dict.fromkeys(SPLITS, sums),
    }


def host(least: float, largest: float, peak: int) -> dict:
    spread = {"least": least, "median": (least + largest) / 2, "largest": largest}
    return {"measured": True, "seconds_per_token": spread, "above_libraries_bytes": peak}


@pytest.fixture
def rows() -> dict[str, dict]:
    metrics = {
        "fetch": evaluation(0.0, 1000, 0),
        "wanda": evaluation(0.5, 1000, 600, seed=1),
        "lora": evaluation(0.5, 900, 600, noise=0.01, seed=2),  # the same model, but for noise
        "off": {"evaluated": False},
    }
    hosts = {"fetch": host(1.0, 2.0, 50), "wanda": host(2.1, 3.0, 70), "lora": host(2.9, 4.0, 60)}
    before = {"fetch": None, "wanda": "fetch", "lora": "wanda", "off": "lora"}
    return {row["stage"]: row for row in attribution.rows(metrics, hosts, before)}


def test_a_change_is_that_to_the_stage_before(rows) -> None:
    found = rows["wanda"]
    assert (found["before"], found["bytes"], found["zeros"], found["peak_bytes"]) == ("fetch", 0, 600, 20)
    assert found["seconds_per_token"] == pytest.approx(2.55 - 1.5)
    assert (found["verdict_test"], found["verdict_latency"]) == ("worse", "worse")
    base = np.exp(np.random.default_rng(99).uniform(2, 4, 40).mean())
    assert found["change_test"] == pytest.approx(base * (np.exp(0.5) - 1), rel=0.01)
    assert found["low_test"] < found["change_test"] < found["high_test"]


def test_noise_is_no_difference(rows) -> None:
    found = rows["lora"]
    assert (found["verdict_test_ood"], found["verdict_latency"], found["bytes"]) == ("no difference",) * 2 + (-100,)
    assert found["low_test_ood"] < 0 < found["high_test_ood"]


def test_what_is_not_known_is_none(rows) -> None:
    for name in ("fetch", "off"):
        assert {value for key, value in rows[name].items() if key not in ("stage", "before")} == {None}
    assert set(rows["off"]) == set(rows["wanda"])


def test_the_model_before_is_the_first_one_that_a_stage_declares() -> None:
    stages = {
        "fetch": ["data/base_model/model", "tasks/fetch.py"],
        "lora": ["data/wanda/model", "data/wanda/masks.safetensors", "data/fetch/model"],
        "wanda": ["data/fetch/model"],
    }
    models = ["fetch", "wanda", "lora"]
    assert attribution.previous(stages, models) == {"fetch": None, "wanda": "fetch", "lora": "wanda"}


def test_a_row_in_words(rows) -> None:
    shown = command._shown(rows["lora"] | {"seconds": 12.34})
    assert shown["ppl test"].startswith("no difference [-")
    assert (shown["ms/token"], shown["bytes"], shown["zeros"], shown["seconds"]) == (
        "no difference",
        "-100",
        "+0",
        "12.3",
    )
    shown = command._shown(rows["wanda"] | {"seconds": None})
    assert (shown["ms/token"], shown["seconds"]) == ("+1050.000", "-")
    assert command._shown({"stage": "calibrate", "seconds": 1.0})["ppl test"] == "-"


def test_files_are_found_beside_each_other_and_below_a_stage_s_one_output(tmp_path: Path) -> None:
    written = [*(f"evaluate/{name}/metrics.json" for name in ("wanda", "fetch")), "evaluate_more/fetch/metrics.json"]
    for name in written:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    outs = {
        "evaluate@fetch": ["evaluate/fetch"],
        "evaluate@wanda": ["evaluate/wanda"],
        "evaluate@lora": ["evaluate/lora"],  # not written yet
        "evaluate_more": ["evaluate_more"],
    }
    stages = [
        SimpleNamespace(addressing=name, outs=[SimpleNamespace(fs_path=str(tmp_path / path)) for path in paths])
        for name, paths in outs.items()
    ]
    repo = SimpleNamespace(index=SimpleNamespace(stages=stages))
    for name, models in (("evaluate", ["fetch", "wanda"]), ("evaluate_more", ["fetch"])):
        paths = command._written(repo, name, "metrics.json")
        assert paths == [tmp_path / name / model / "metrics.json" for model in models]


@pytest.mark.parametrize("computed_here", [True, False])
def test_speed_is_this_machine_s_where_it_measured_and_says_whose(tmp_path: Path, monkeypatch, computed_here) -> None:
    models = {"measured": True, "workload": "w", "models": {"fetch": {"bytes": 1, "files": "f"}}}
    (tmp_path / "models.json").write_text(json.dumps(models))
    first, own = (
        {"started": f"2026-11-{day}T10:00", "host": {"processor": name, "cores": 2}, "workload": "w"}
        | {"measured": {"fetch": {"files": "f", "speed": day}}}
        for day, name in ((10, "Theirs"), (20, "Ours"))
    )
    monkeypatch.setattr(command.lineage, "find", lambda _: first)
    monkeypatch.setattr(command.lineage, "local", lambda _: own if computed_here else None)
    stage = SimpleNamespace(addressing="measure", outs=[SimpleNamespace(fs_path=str(tmp_path))])
    found, told = command._hosts(SimpleNamespace(index=SimpleNamespace(stages=[stage])))
    assert found["fetch"]["speed"] == (20 if computed_here else 10)
    whose = "this machine (Ours, 2 cores, 2026-11-20)" if computed_here else "Theirs, 2 cores, 2026-11-10"
    assert told == f"speed and memory: of {whose}"
    monkeypatch.setattr(command.lineage, "find", lambda _: None)
    monkeypatch.setattr(command.lineage, "local", lambda _: None)
    assert command._hosts(SimpleNamespace(index=SimpleNamespace(stages=[stage])))[1].startswith("no speed and memory: ")
