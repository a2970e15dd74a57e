"""What a stage takes at its peak, measured in a process of its own: `python -m tests.support.peak_memory`.

On standard input it gets JSON: {"stages": [name, …], "params": …, "inputs": …, "folders": [model folder, …]}. It runs
each stage on each model folder, and prints [[bytes of each stage] of each folder]: the highest resident set of the run
above the one before it, as the kernel counts it (VmHWM, which is set back before each run). glibc gives every larger
piece back as soon as it is freed there: what is measured is in use, and what its heap keeps in holes is not.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from tasks.models import tensor_files
from tests.support.paths import ROOT

BLOCK = {"hidden_size": 384, "intermediate_size": 1440, "num_attention_heads": 6, "num_key_value_heads": 6}
BLOCK_BYTES = 4 * (4 * 384 * 384 + 3 * 384 * 1440)
"""Of a Llama's block in float32: it dominates the vocabulary of 96."""


def large_llama(folder: Path, tokenizer: Path, blocks: int) -> Path:
    """Fill the folder with a Llama of equal blocks, never all in memory."""
    config = transformers.LlamaConfig(**BLOCK, num_hidden_layers=blocks, vocab_size=96, tie_word_embeddings=True)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder, state_dict={})
    for path in tokenizer.glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    shapes = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    entries = {name: tensor_files.entry(tensor) for name, tensor in shapes.items()}
    generator = torch.Generator().manual_seed(0)
    with tensor_files.writing(folder / "model.safetensors", entries, {"format": "pt"}) as write:
        for name, tensor in shapes.items():
            write(name, torch.randn(tensor.shape, generator=generator) / 30)
    return folder


def measured(
    stages: list[str], params: dict[str, Any], inputs: dict[str, Path], folders: list[Path]
) -> list[list[int]]:
    """Bytes at the peak of each stage on each folder."""
    asked = {"stages": stages, "params": params, "inputs": inputs, "folders": folders}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.peak_memory"],
        input=json.dumps(asked, default=str),
        stdout=subprocess.PIPE,
        cwd=ROOT,
        text=True,
        check=True,
        timeout=600,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"},
    )
    return json.loads(done.stdout.splitlines()[-1])


def _main() -> None:
    from tests.conftest import FakeStage

    asked, found = json.load(sys.stdin), []
    for folder in asked["folders"]:
        row = []
        for name in asked["stages"]:
            module = importlib.import_module(f"tasks.{name}")
            with tempfile.TemporaryDirectory() as out:
                inputs = asked["inputs"] | {"source/model": folder}
                stage = FakeStage(asked["params"], inputs, Path(out), None, None, None)
                gc.collect()
                ctypes.CDLL(None).malloc_trim(0)  # what an earlier run has freed goes back to the kernel
                Path("/proc/self/clear_refs").write_text("5")  # VmHWM is VmRSS again
                before = _status("VmRSS")
                module.run(stage)
                row.append(_status("VmHWM") - before)
        found.append(row)
    print(json.dumps(found))


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    _main()
