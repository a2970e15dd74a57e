"""What stages did: differences by hand, verdicts of planted changes, and the order of the models in the DAG."""

from __future__ import annotations

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
    written = [*(f"evaluate/{name}/metrics.json" for name in ("wanda", "fetch")), "measure/fetch/host.json"]
    for name in (*written, "lineage/measure.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    outs = {
        "evaluate@fetch": ["evaluate/fetch/documents.csv", "evaluate/fetch/metrics.json"],
        "evaluate@wanda": ["evaluate/wanda/metrics.json"],
        "evaluate@lora": ["evaluate/lora/metrics.json"],  # not written yet
        "measure": ["measure", "lineage/measure.json"],
        "measure_more": ["evaluate"],
    }
    stages = [
        SimpleNamespace(name=name, outs=[SimpleNamespace(fs_path=str(tmp_path / path)) for path in paths])
        for name, paths in outs.items()
    ]
    repo = SimpleNamespace(index=SimpleNamespace(stages=stages))
    for name, file, models in (("evaluate", "metrics.json", ["fetch", "wanda"]), ("measure", "host.json", ["fetch"])):
        paths = command._written(repo, name, file)
        assert paths == [tmp_path / name / model / file for model in models]
