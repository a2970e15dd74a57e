"""One call to the kernel that fails, or the end of the process there, harms nothing: a sample, call by call.

All of them: `python -m tests.benchmarks.faults`.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.support import fault_cases, faults

SAMPLE = {
    "stage": 50,
    "repro": 2,
    "promotion": 22,
    "update": 120,
    "night": 6,
    "first night": 2,
    "export to gguf": 3,
    "export to onnx": 1,
}
"""Case: how many faults."""


@pytest.mark.parametrize("name", SAMPLE)
def test_a_fault_harms_nothing(name: str, tmp_path: Path) -> None:
    case = fault_cases.CASES[name](tmp_path)
    chosen = fault_cases.sample(case.calls, SAMPLE[name])
    assert len(chosen) == SAMPLE[name]
    assert [sentence for fault, number in chosen for sentence in case.disturb(fault, number)] == []


WRITERS = {
    "Python": (lambda: Path("python").touch(), "openat(python)"),
    "Rust": (lambda: save_file({"x": np.zeros(3)}, "rust"), "renameat(rust)"),
    "git": (lambda: subprocess.run(["git", "init", "-q", "."], check=True), "mkdir(.git)"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_calls_of_all_are_reached(writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write, call = WRITERS[writer]
    ended = faults.run(write, tmp_path)
    assert ended.code == 0 and call in map(str, ended.calls)


@pytest.mark.parametrize("fault", faults.FAULTS)
def test_each_fault_comes_once_where_it_was_asked_for(fault: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)

    def write() -> None:
        handle = os.open("file", os.O_WRONLY | os.O_CREAT)
        for text in (b"first", b"second", b"third"):
            try:
                os.write(handle, text)
            except OSError as error:
                print(error.strerror)

    ended = faults.run(write, tmp_path, fault, 2)
    assert str(ended.hit) == "write(file)"
    lost = {faults.KILL: "first", faults.FULL: "first", "EINTR": "firstsecondthird"}  # Python asks again
    assert Path("file").read_text() == lost.get(fault, "firstthird")
    said = {faults.KILL: 0, faults.FULL: 2, "EINTR": 0}
    assert ended.code == (-9 if fault == faults.KILL else 0) and len(ended.said.splitlines()) == said.get(fault, 1)
