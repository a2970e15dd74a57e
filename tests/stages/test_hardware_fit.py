"""The stage hardware_fit: what it writes, and that it agrees with the command."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from tasks import hardware_fit
from tasks.algorithms.errors import InputError
from tasks.device_profiles import profiles, tables
from tests.device_profiles.test_profiles import NAMES, PROFILES
from tests.support.folder_of_zeros import add, folder_of_zeros

PARAMS = {"device": "siracusa", "context": 16, "batch": 1, "kv_bits": 16, "activation_bits": 16}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_stage_writes_its_verdict(make_stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = folder_of_zeros(tmp_path / "package" / "model", quantised=True)
    fetched = folder_of_zeros(tmp_path / "fetch" / "model")
    inputs = {"devices": PROFILES, "package/model": package, "fetch/model": fetched}
    hardware_fit.run(make_stage({"hardware_fit": PARAMS}, inputs))
    capsys.readouterr()
    text = (tmp_path / "out/fit.json").read_text(encoding="utf-8")
    result = json.loads(text)
    assert (result["device"], result["verdict"], result["bytes_over"]) == ("siracusa", "FITS", 0)
    assert [row["device"] for row in result["all_devices"]] == NAMES
    own = next(row for row in result["all_devices"] if row["device"] == "siracusa")
    assert all(own[key] == result[key] for key in ("verdict", "limiting_term", "headroom_bytes", "tokens_per_second"))
    assert result["stored_bytes"] == sum(path.stat().st_size for path in package.rglob("*.*"))
    assert result["fetched"]["placement"][0]["items"]["weights"] == (20 * 8 + 12 * 8) * 2
    assert str(tmp_path) not in text
    table = rows(tmp_path / "out/devices.csv")
    assert [row["device"] for row in table] == NAMES and tuple(table[0]) == tables.COLUMNS
    for row, whole in zip(table, result["all_devices"], strict=True):
        assert (row["verdict"], int(row["total_bytes"])) == (whole["verdict"], whole["total_bytes"])
        assert row["fetched_verdict"] == whole["fetched_verdict"]
        assert float(row["tokens_per_second_bound"]) == whole["tokens_per_second"]["bound"]
    hardware_fit.run(make_stage({"hardware_fit": PARAMS}, inputs, out="again"))
    for name in ("fit.json", "devices.csv"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_does_not_fit_is_a_result(make_stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = folder_of_zeros(tmp_path / "package" / "model")
    add(package, {"padding": torch.zeros(2**10, 2**10, dtype=torch.float32)})
    hardware_fit.run(make_stage({"hardware_fit": PARAMS}, {"devices": PROFILES, "package/model": package}))
    result = json.loads((tmp_path / "out/fit.json").read_text(encoding="utf-8"))
    assert (result["verdict"], result["limiting_term"]) == ("DOES_NOT_FIT", "mram: weights")
    used = result["weights_bytes"] + result["metadata_bytes"]
    assert result["bytes_over"] == used - 4 * 2**20 * 9 // 10
    assert "fetched" not in result and "DOES_NOT_FIT" in capsys.readouterr().out
    assert {row["fetched_verdict"] for row in rows(tmp_path / "out/devices.csv")} == {""}


def test_switched_off(make_stage, tmp_path: Path) -> None:
    hardware_fit.skip(make_stage({"hardware_fit": PARAMS}, {}))
    assert json.loads((tmp_path / "out/fit.json").read_text(encoding="utf-8")) == {"verdict": "NOT_CHECKED"}
    assert (tmp_path / "out/devices.csv").read_text(encoding="utf-8") == ",".join(tables.COLUMNS) + "\n"


def test_the_dag_never_judges_this_machine(make_stage) -> None:
    with pytest.raises(InputError, match="hardware_fit.device = host is this machine"):
        hardware_fit.run(make_stage({"hardware_fit": PARAMS | {"device": profiles.HOST}}, {"devices": PROFILES}))
