"""How far is what `tasks.parameters` predicts of time and memory from what stages take?

    python -m tests.benchmarks.durations [--shapes layers width vocabulary]
    python -m tests.benchmarks.durations --records

The first runs the stages on random Llamas, one after another by one thread in one process, and prints per stage
processor seconds, those predicted, and the ratio; what starting a stage takes is in neither. --records compares what
this folder's own runs took with what is predicted of them: seconds by the clock, processor seconds, starts included,
and memory at the peak, libraries included. Of each stage the last run that is kept in data/lineage/here, else the
tracked record, whichever machine it is of.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from tasks.algorithms.model.shape import ModelShape
from tasks.parameters import durations, needs, preflight, rules, schema, speed
from tasks.runtime import lineage
from tests.support import stage_memory

SHAPES: dict[str, dict[str, int]] = {
    "layers": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 10, "vocab_size": 2048},
    "width": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 2, "vocab_size": 2048},
    "vocabulary": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 32768},
}
CHANGED = {
    "calibrate.windows": 16,
    "importance.windows": 8,
    "importance.method": "compound",
    "lora.steps": 12,
    "gptq.mse": 2.4,
    "gptq.descent_cycles": 4,
    "evaluate.max_windows": 16,
    "evaluate.new_tokens": 16,
}
OWN = 0.3
"""Imports of PyTorch that a stage takes as long as once all is imported: gathering garbage, reading configs."""
STAGES = [name for name in stage_memory.STAGES if name != "measure"]
"""But for the one that does little but start processes of its own."""


def compared(params: schema.Params, model: ModelShape, took: Mapping[str, float], *, started: bool) -> None:
    """Print a table: stage, seconds, predicted ones, ratio, and what most of them are."""
    known = speed.of_machine(model, "cpu", 1)
    print("| stage | CPU s | predicted | ratio | of it |\n|---|---|---|---|---|")
    for address, seconds in took.items():
        work = durations.work(params, model, address)
        if not started:
            work = dataclasses.replace(work, starts=OWN)
        parts = {name: amount / known[name] for name, amount in vars(work).items()}
        most = max(parts, key=lambda name: parts[name])
        predicted = sum(parts.values())
        print(f"| {address} | {seconds:.2f} | {predicted:.2f} | {predicted / seconds:.2f} | {most} {parts[most]:.2f} |")


def of_shape(sizes: dict[str, int]) -> None:
    """Run the stages on a random model, and compare."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        root = Path(folder).resolve()
        with contextlib.redirect_stdout(io.StringIO()):
            found = stage_memory.chain(root, sizes, CHANGED, STAGES)
        params = stage_memory.parameters(CHANGED)
        model = preflight.model_shape(preflight.read_config(root / "source/model"))
        took = {name: each["seconds"] for name, each in found.items() if name != "harness_data@corpus"}
        compared(params, model, took, started=False)


def of_records() -> None:
    """Compare with what stages took in this folder."""
    params, model = schema.load(), preflight.model_here(schema.load())
    took = {path.stem: lineage.read(path) for path in sorted(lineage.RECORDS.glob("*.json"))}
    here = sorted(lineage.computed_here(Path()), key=lambda each: each[1].get("started", ""))
    took |= {path.parent.name: entry for path, entry in here}
    took = {name: entry for name, entry in took.items() if entry and entry.get("cpu_seconds")}
    compared(params, model, {name: entry["cpu_seconds"] for name, entry in took.items()}, started=True)
    print("\n| stage | seconds | peak MiB | predicted | ratio |\n|---|---|---|---|---|")
    settled = rules.settle_all(params, model)
    for address, entry in took.items():
        peak, name = entry["peak_memory_bytes"], address.partition("@")[0]
        row = f"| {address} | {entry['seconds']:.1f} | {peak / 2**20:,.0f} |"
        if name in needs.MEMORY and preflight.enabled(params, name):
            predicted = needs.LIBRARIES + needs.MEMORY[name](settled, model)
            row += f" {predicted / 2**20:,.0f} | {predicted / peak:.2f} |"
        print(row if row.count("|") == 6 else f"{row} | |")


def main() -> None:
    """Compare, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--records", action="store_true")
    given = parser.parse_args()
    if given.records:
        of_records()
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        stage_memory.chain(Path(folder).resolve(), stage_memory.TINY, stages=STAGES)  # pays for what is imported late
    for name in given.shapes:
        print(f"\n{name}: {SHAPES[name]}\n")
        of_shape(SHAPES[name])


if __name__ == "__main__":
    main()
