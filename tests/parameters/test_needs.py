"""needs: the memory that is predicted of each stage, against what it takes on three random models of unlike shapes."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from tasks import calibrate, wanda
from tasks.algorithms.quantisation import sensitivity
from tasks.algorithms.recovery import targets
from tasks.compression import block_quantisation
from tasks.parameters import needs
from tests.support import stage_memory
from tests.support.paths import ROOT

LOW, HIGH = 0.8, 1.5
"""What is predicted, in units of what is measured, both above the libraries."""
ROOM = 24 * 2**20
"""Bytes by which either may be off besides: what allocators hold in gaps, and what is imported late."""
PREDICTED = [address for address in stage_memory.STAGES if address.partition("@")[0] in needs.MEMORY]
CASES = [
    (shape, address)
    for shape in stage_memory.SHAPES
    for address in PREDICTED
    if shape in stage_memory.SLOW.get(address, stage_memory.SHAPES)
]
"""Not stage measure's: three processes for each of three models; `python -m tests.support.stage_memory` has it."""


def test_every_stage_with_a_prediction_is_measured() -> None:
    assert {address.partition("@")[0] for address in PREDICTED} == set(needs.MEMORY)


def test_shapes_differ_in_layers_width_and_vocabulary() -> None:
    for name, key in {"layers": "num_hidden_layers", "width": "hidden_size", "vocabulary": "vocab_size"}.items():
        of = {shape: sizes[key] for shape, sizes in stage_memory.SHAPES.items()}
        assert all(of[name] >= 3 * other for shape, other in of.items() if shape != name)


def test_numbers_that_stand_here_without_torch_are_those_of_the_stages() -> None:
    assert (needs.AHEAD, needs.TARGETS) == (targets.AHEAD, targets.HELD)
    assert (needs.HARMED, needs.COMPARED) == (block_quantisation.MEASURED, sensitivity.POSITIONS)
    assert {calibrate.BATCH, wanda.BATCH, block_quantisation.BATCH} == {needs.BATCH}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, dict[str, float]]]:
    """measured(shape) -> stage -> bytes at its peak and bytes predicted: a process of its own runs all stages."""

    @functools.cache
    def run(shape: str) -> dict[str, dict[str, float]]:
        out = tmp_path_factory.mktemp("memory") / "found.json"
        call = [sys.executable, "-m", "tests.support.stage_memory", str(out), "--shapes", shape]
        call += ["--without", *(name for name in stage_memory.SLOW if (shape, name) not in CASES)]
        subprocess.run(call, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, timeout=1800)
        return json.loads(out.read_text(encoding="utf-8"))[shape]

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "address"), CASES)
def test_what_is_predicted_is_what_is_taken(
    shape: str, address: str, measured: Callable[[str], dict[str, dict[str, float]]]
) -> None:
    found = measured(shape)[address]
    assert LOW * found["bytes"] - ROOM <= found["predicted"] <= HIGH * found["bytes"] + ROOM
