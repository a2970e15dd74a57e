"""ONNX Runtime as this project imports it: nothing is sent home, and nothing is kept to be sent."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT


@pytest.mark.parametrize("user", ["tasks.runners.engines", "tasks.export.onnx_format"])
def test_no_identifier_and_no_events_are_written(tmp_path, user: str) -> None:
    code = f"import {user}, onnxruntime, onnxruntime_genai"
    kept = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=kept | {"HOME": str(tmp_path)}, check=True)
    assert not list(tmp_path.rglob("*onnx*")) and not (tmp_path / ".cache/Microsoft").exists()
