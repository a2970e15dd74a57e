"""The measured profile: bytes counted right, the schema met, nothing half-written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tasks.device_profiles import profiles, this_machine
from tests.support.command import edgepress


def test_a_kernels_bytes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(this_machine, "_fastest", lambda kernel, seconds: 1.0)
    found = this_machine.bandwidth(12 * 2**20, 0)
    near = pytest.approx(12 * 2**20, rel=0.01)
    assert all(value == near for value in found.values())
    assert this_machine.reading({"sum": 5.0, "dot": 7.0, this_machine.TRIAD: 9.0}) == 7.0


def test_arithmetic_that_is_no_faster_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([1.0, 0.5, 2.0, 0.25])  # fp32, bf16, fp16, int8
    monkeypatch.setattr(this_machine, "_fastest", lambda kernel, _: next(seconds))
    operations = 2 * this_machine._SIZE**3
    assert this_machine.arithmetic(0) == {"fp32": operations, "bf16": 2 * operations, "int8": 4 * operations}


def test_what_is_measured_is_a_profile_and_the_fastest_pass_counts(tmp_path: Path) -> None:
    rates = this_machine.Rates({"sum": 2e9, "triad": 3e9}, {"sum": 9e9, "triad": 8e9}, {"fp32": 1e9, "int8": 4e9})
    written = this_machine.write(this_machine.profile(rates), tmp_path / "host.yaml")
    assert profiles.load_host(tmp_path) == written
    assert [path.name for path in tmp_path.iterdir()] == ["host.yaml"]
    device = written.device()
    assert device.tiers[0].bandwidth == 2_000_000_000
    assert device.unit.formats["bf16"] == "fp32" and device.unit.formats["int4-group"] == "int8"
    if device.cache:
        assert device.cache.bandwidth == 9_000_000_000
    assert 0 < device.tiers[0].reserved < device.tiers[0].bytes


def test_a_machine_that_hides_its_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(this_machine, "_CACHES", tmp_path)
    assert this_machine.cache_bytes() is None
    written = this_machine.profile(this_machine.Rates({"sum": 1e9}, None, {"fp32": 1e9}))
    assert profiles.Profile.model_validate(written).cache is None


def test_the_last_level_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for index, (level, size) in enumerate([("1", "48K"), ("3", "32768K"), ("2", "1024K")]):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}/level").write_text(f"{level}\n", encoding="utf-8")
        (tmp_path / f"index{index}/size").write_text(f"{size}\n", encoding="utf-8")
    monkeypatch.setattr(this_machine, "_CACHES", tmp_path)
    assert this_machine.cache_bytes() == 32 * 2**20


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def quick(seconds: float) -> this_machine.Rates:
        return this_machine.Rates(this_machine.bandwidth(2**20, 0), None, {"fp32": 1e9})

    monkeypatch.setattr(this_machine, "measure", quick)
    threads = str(torch.get_num_threads())
    code, out, _ = edgepress(capsys, "profile", "--threads", threads, "--out", tmp_path / "host.yaml")
    assert code == 0 and "dram.bandwidth" in out
    code, _, errors = edgepress(capsys, "profile", "--threads", threads, "--out", tmp_path / "nowhere/host.yaml")
    assert code == 1 and errors.startswith("error: ") and "--out" in errors
    code, _, errors = edgepress(capsys, "profile", "--threads", "0", "--out", tmp_path / "host.yaml")
    assert code == 1 and "--threads 0 is not possible here: expected 1 to" in errors
