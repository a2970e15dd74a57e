"""What share of this machine's rate of matrix products does a step of recovery reach?

    OMP_NUM_THREADS=1 python -m tests.benchmarks.gemm_share [--model FOLDER] [--steps 3] [--batch 8] [--length 256]

A step of masked LoRA with distillation, teacher's pass included, on a 2:4 pruned copy of the model, without and with
its blocks computed anew (`--only`). Seconds are the processor's, of the fastest step; operations are those of linears,
head and their gradients, attention's own products and the adapters' left out. The rate is that of `torch.mm` on the
shapes of the model's linears and head, each at its best, weighted by their operations.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tasks.algorithms.model import families, rows, stored_type
from tasks.algorithms.model.shape import ModelShape, shape_of_model
from tasks.algorithms.recovery import masked_lora, training
from tasks.models import dense_folder, streamed_folder
from tests.support.paths import ROOT

ROUNDS = 3
"""Tries of each product, of which the fastest counts."""


def rate(shape: ModelShape, tokens: int) -> float:
    """Operations per processor second of the model's matrix products."""
    sides = [(tokens, *sides) for sides in shape.linears.values()] * shape.layers
    sides += [
        (each.stop - each.start, shape.vocabulary, shape.hidden) for each in rows.chunks(tokens, shape.vocabulary)
    ]
    fastest = {each: _fastest(*each) for each in set(sides)}
    return sum(2 * m * n * k for m, n, k in sides) / sum(fastest[each] for each in sides)


def _fastest(m: int, n: int, k: int) -> float:
    x, weight, found = torch.randn(m, k), torch.randn(n, k), []
    for _ in range(ROUNDS):
        began = time.process_time()
        torch.mm(x, weight.T)
        found.append(time.process_time() - began)
    return min(found)


def operations(shape: ModelShape, tokens: int, checkpointing: bool) -> int:
    """Of a step: a pass of the teacher, one of the student or two, gradients of inputs and of masked weights."""
    passes = 5 if checkpointing else 4
    return 2 * tokens * (passes * shape.in_blocks + 3 * shape.vocabulary * shape.hidden)


def seconds(folder: Path, recipe: training.Recipe, checkpointing: bool) -> float:
    """Processor seconds of the fastest step of a training."""
    model, teacher = streamed_folder.load_stored(folder), dense_folder.load_dense(folder)
    stored_type.share(teacher, model)
    keep = _pruned(model)
    adapted = masked_lora.attach(model, list(keep), keep, rank=16, alpha=32.0, dropout=0.0, seed=0)
    tokens = torch.randint(model.config.vocab_size, (100_000,), generator=torch.Generator().manual_seed(0))
    ends = [time.process_time()]
    training.train(
        adapted,
        tokens,
        recipe,
        teacher=teacher,
        report=lambda *_: ends.append(time.process_time()),
        checkpointing=checkpointing,
    )
    return min(after - before for before, after in zip(ends, ends[1:], strict=False))


def _pruned(model: torch.nn.Module) -> Mapping[str, Tensor]:
    """Zero the last two weights of each group of four; returns the masks."""
    keep = {}
    for name, linear in families.block_linears(model).items():
        keep[name] = (torch.arange(linear.weight.shape[1]) % 4 < 2).expand(linear.weight.shape)
        linear.weight.data *= keep[name]
    return keep


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "data/base_model/model")
    parser.add_argument("--only", choices=["kept", "anew"])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    given = parser.parse_args()
    recipe = training.Recipe(given.steps, given.batch, given.length, 0.001, 0.0, 0.5, 2.0, 0)
    shape = shape_of_model(streamed_folder.open_dense(given.model, stored=True))
    tokens = given.batch * given.length
    reached = rate(shape, tokens)
    print(f"{torch.get_num_threads()} threads; products alone: {reached / 1e9:.1f} GFLOP per processor second")
    print("| blocks | seconds | GFLOP | share |\n|---|---|---|---|")
    for name, checkpointing in (("kept", False), ("anew", True)):
        if given.only in (None, name):
            took, counted = seconds(given.model, recipe, checkpointing), operations(shape, tokens, checkpointing)
            print(f"| {name} | {took:.2f} | {counted / 1e9:.0f} | {counted / took / reached:.0%} |", flush=True)


if __name__ == "__main__":
    main()
