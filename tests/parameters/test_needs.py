"""What preflight counts against what stages take: every computing stage on random models of three shapes.

`baseline` is left out, whose search takes minutes, and `measure`, which measures in processes of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import stage_memory
from tests.support.paths import ROOT

SLACK = 16 * 2**20
"""Bytes that the allocator may hold more or less from run to run; the models' tensors take up to 550 MiB."""


@pytest.mark.slow
def test_what_is_predicted_is_what_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "memory.json"
    command = [sys.executable, "-m", "tests.support.stage_memory", str(out)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text(encoding="utf-8"))
    wrong = []
    for shape in stage_memory.SHAPES:
        for address, figures in found[shape].items():
            measured, predicted = figures["bytes"], figures.get("predicted")
            if predicted is not None and not 0.8 * measured - SLACK <= predicted <= 1.5 * measured + SLACK:
                wrong.append(
                    f"{shape} {address}: predicted {predicted / 2**20:.0f}, measured {measured / 2**20:.0f} MiB"
                )
    assert not wrong, "\n".join(wrong)
