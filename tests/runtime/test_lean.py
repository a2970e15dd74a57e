"""transformers without what nothing here uses: it loads and computes the same, and what is left out can be had."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import torch

from tasks.models import dense_folder
from tasks.runtime import lean
from tests.support.paths import ROOT

CODE = """
import sys
from pathlib import Path

from tasks.runtime import lean
lean.apply()
lean.apply()
import torch
import peft
from tasks.models import dense_folder
model = dense_folder.load_dense(Path(sys.argv[1]))
with torch.no_grad():
    logits = model(input_ids=torch.arange(12).unsqueeze(0)).logits
from tasks.algorithms.recovery import masked_lora
masked_lora.attach(model, ["model.layers.0.mlp.up_proj"], {}, rank=2, alpha=2.0, dropout=0.0, seed=0)
left_out = ("gptqmodel", "hqq", "scipy", "torchao", "torch.distributed.tensor", "torch._dynamo.convert_frame")
print([name for name in left_out if name in sys.modules])
import torch._dynamo.config
import hqq.core.quantize, scipy.optimize
print(torch._dynamo.config.__name__, torch.compile(lambda x: x.cos(), backend="eager")(torch.zeros(1)).item())
Path(sys.argv[2]).write_bytes(logits.numpy().tobytes())
"""


def test_it_computes_the_same_without_them_and_gives_them_to_who_asks(model_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", CODE, str(model_folder), str(tmp_path / "logits")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.splitlines() == ["[]", "torch._dynamo.config 1.0"], done.stderr
    with torch.no_grad():
        logits = dense_folder.load_dense(model_folder)(input_ids=torch.arange(12).unsqueeze(0)).logits
    assert (tmp_path / "logits").read_bytes() == logits.numpy().tobytes()


def test_imports_collect_no_garbage_and_later_looks_leave_them_out() -> None:
    before, looks = gc.get_freeze_count(), []
    gc.callbacks.append(lambda phase, _: looks.append(phase))
    try:
        with lean.uncollected():
            kept = [[] for _ in range(100_000)]
        assert not looks and gc.isenabled()
        assert gc.get_freeze_count() - before >= len(kept)
        gc.disable()
        with lean.uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.callbacks.pop()
        gc.enable()
