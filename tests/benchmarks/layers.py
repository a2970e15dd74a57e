"""What do the stages that go from block to block cost by the number of blocks?

    python -m tests.benchmarks.layers [--layers 4 8 16 32]

Random Llamas of one small width and more and more layers, one after another in one process, without DVC. It prints
processor seconds, peak memory above what was held before the stage, and of the columns' ends the exponent of the
seconds (1: linear) and the growth of the memory. The first, tiny model pays for what is imported late.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import tempfile
import time
from importlib import import_module
from pathlib import Path

import torch

from tasks.runtime import processes
from tests.support import stage_memory

SIZES = {"hidden_size": 256, "intermediate_size": 768, "vocab_size": 1024}
CHAIN = ("fetch", "vocabulary", "calibrate", "importance", "depth_prune", "wanda", "lora", "gptq", "eora")
MEASURED = ("calibrate", "importance", "wanda", "gptq", "eora")
PASSED_ON = ("vocabulary", "depth_prune", "lora")
CHANGED = {
    "importance.windows": 8,
    "gptq.descent_cycles": 4,
    "gptq.mse": 2.4,
    "eora.rank": None,
    "eora.budget_bytes": 8000,
}


def measure(layers: int, sizes: dict[str, int]) -> dict[str, tuple[float, float]]:
    """Stage -> processor seconds and MiB at the peak, of a model of so many layers."""
    found = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        root = Path(folder).resolve()
        sizes = sizes | {"num_hidden_layers": layers}
        stage_memory.make_source(root, sizes)
        params = stage_memory.parameters(CHANGED)
        for name in CHAIN:
            stage, module = stage_memory.MeasuredStage(name, root, params), import_module(f"tasks.{name}")
            before, began = stage_memory.fresh(), time.process_time()
            with contextlib.redirect_stdout(io.StringIO()):
                (module.skip if name in PASSED_ON else module.run)(stage)
            found[name] = time.process_time() - began, (processes.peak() - before) / 2**20
    return {name: found[name] for name in MEASURED}


def main() -> None:
    """Measure all, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32])
    given = parser.parse_args()
    torch.set_num_threads(1)
    measure(2, stage_memory.TINY)
    rows = {layers: measure(layers, SIZES) for layers in given.layers}
    few, many = min(rows), max(rows)
    print("| layers | " + " | ".join(f"{name}, s | MiB" for name in MEASURED) + " |")
    print("|---|" + "---|" * 2 * len(MEASURED))
    for layers, row in rows.items():
        print(f"| {layers} | " + " | ".join(f"{seconds:.1f} | {size:.0f}" for seconds, size in row.values()) + " |")
    ends = [(*rows[few][name], *rows[many][name]) for name in MEASURED]
    grown = [
        f"{math.log(after / before) / math.log(many / few):.2f} | {large / small:.2f}"
        for before, small, after, large in ends
    ]
    print("| exponent, growth | " + " | ".join(grown) + " |")


if __name__ == "__main__":
    main()
