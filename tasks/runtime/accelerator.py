"""The GPU that `device: cuda` means: PyTorch is made to repeat itself there, and a full memory becomes a sentence.

What computes where is in `tasks.algorithms`' README. The CPU needs nothing of this.
"""

from __future__ import annotations

import os
import re

GPU = "cuda"
TOTAL = re.compile(r"total capacity of ([\d.]+ \w+)")
"""How PyTorch says what a card has."""
FULL = re.compile(r"(CUDA|HIP) out of memory|CUBLAS_STATUS_ALLOC_FAILED")
"""How PyTorch says that the card's memory is full."""
LOWER = {
    "baseline": "calibrate.length",
    "baseline_lora": "lora.batch or lora.length",
    "calibrate": "calibrate.windows or calibrate.length",
    "depth_prune": "importance.windows or calibrate.length",
    "eora": "calibrate.windows or calibrate.length",
    "evaluate": "evaluate.batch or evaluate.length",
    "gptq": "calibrate.windows or calibrate.length",
    "harness": "harness.batch",
    "importance": "calibrate.length",
    "kv_cache": "kv_cache.contexts",
    "lora": "lora.batch or lora.length",
    "qad": "qad.batch or qad.length",
    "sensitivity": "calibrate.length",
    "wanda": "calibrate.windows or calibrate.length",
}
"""Per stage that computes on the card: the parameters that its memory follows."""


def prepare(device: str) -> None:
    """Make what this process will compute on a device repeat to the byte; called before it first uses the card.

    On the card it is an error from then on to ask for what can't be repeated. Products of float32 are of float32, not
    of TF32, as on the CPU.

    Args:
        device: of params.yaml.
    """
    if device != GPU:
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    import torch

    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it costs time, and nothing here reads such memory
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.cudnn.fp32_precision = "ieee"


def sentence(error: BaseException, address: str) -> str | None:
    """What fills the card's memory and what to lower; None where the error is another one.

    Args:
        address: the stage's, `evaluate@gptq` for one item of a matrix.
    """
    if not FULL.search(str(error)):
        return None
    found = TOTAL.search(str(error))
    has = f", which has {found[1]}" if found else ""
    lower = LOWER.get(address.partition("@")[0])
    return (
        f"stage {address} ran out of memory on the GPU{has}; "
        f"{f'lower {lower}, or ' if lower else ''}set device to cpu, or take a smaller model"
    )
