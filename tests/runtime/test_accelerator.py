"""What a full card is told as, and that a run on one is asked to repeat itself before it begins."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tasks.runtime import accelerator
from tests.benchmarks.chain import Chain, declared
from tests.support.paths import ROOT

FULL = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.05 GiB is free."
    " Process 7 has 78.06 GiB memory in use."
)


def test_a_full_card_names_stage_card_and_parameter() -> None:
    assert accelerator.sentence(RuntimeError(FULL), "evaluate@gptq") == (
        "stage evaluate@gptq ran out of memory on the GPU, which has 79.11 GiB; lower evaluate.batch or"
        " evaluate.length, or set device to cpu, or take a smaller model"
    )
    assert accelerator.sentence(RuntimeError("can't allocate memory"), "lora") is None


def test_every_stage_on_the_card_has_parameters_to_lower_and_they_exist() -> None:
    stages, values = declared(ROOT / "dvc.yaml", Chain().values), Chain().values
    asking = {each.name for each in stages.values() if "device" in each.params}
    assert set(accelerator.LOWER) == asking - {"package"}  # which only notes what the rules made of it
    for said in accelerator.LOWER.values():
        for key in said.split(" or "):
            section, name = key.split(".")
            assert name in values[section]


@pytest.mark.parametrize(("device", "asked"), [("cuda", "True :4096:8 ieee"), ("cpu", "False None")])
def test_a_run_on_the_card_repeats_itself(device: str, asked: str) -> None:
    code = (
        "import os; os.environ.pop('CUBLAS_WORKSPACE_CONFIG', None); from tasks.runtime import accelerator;"
        f" accelerator.prepare({device!r}); import torch;"
        " print(torch.are_deterministic_algorithms_enabled(), os.environ.get('CUBLAS_WORKSPACE_CONFIG'),"
        " torch.backends.cuda.matmul.fp32_precision)"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True)
    assert found.stdout.startswith(asked)
