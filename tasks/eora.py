"""Stage eora: add a low-rank branch to every quantised linear that brings its output closer to a dense teacher's.

The teacher is the recovered model (`lora`: it makes up for quantisation) or the fetched one (`fetch`: for pruning too;
its blocks are found through the record of what depth pruning kept). The folder is the quantised one with the adapter in
a subfolder, which gptqmodel loads: `GPTQModel.load(folder, adapter=Lora(rank=…, path=folder/eora))`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from safetensors.torch import load_file
from torch import Tensor

from tasks import checkpoint, quantised
from tasks.algorithms import eora, families
from tasks.algorithms.errors import InputError

if TYPE_CHECKING:
    from tasks.stage import Stage

COLUMNS = ["linear", "error_before", "error_after", "rank", "bytes"]
"""Errors are relative, of the linear's output on calibration inputs against the teacher's; bytes of both factors."""


def run(stage: Stage) -> None:
    """gptq/model + a teacher + windows -> model (with an adapter), layers.csv."""
    chosen = stage.params.eora
    source, target = stage.input("gptq/model"), stage.output("model")
    described = checkpoint.config(source)
    check_rank(families.linear_shapes(described), chosen.rank)
    blocks = described["num_hidden_layers"]
    if chosen.teacher == "lora":
        teacher = teacher_weights(stage.input("lora/model"), range(blocks))
    else:
        kept = json.loads(stage.input("removed.json").read_text(encoding="utf-8"))["kept"]
        teacher = teacher_weights(stage.input("fetch/model"), kept)
    if len(teacher) != blocks * len(families.family(described).linears):
        raise InputError(f"the teacher has {len(teacher)} linears for {blocks} blocks: run stage depth_prune again")
    windows = load_file(stage.input("windows.safetensors"))["input_ids"]  # [windows, length]
    finished: list[str] = []
    with stage.progress("eora", len(teacher)) as progress:

        def done(name: str, error: float) -> None:
            finished.append(name)
            progress.update(len(finished), error=error)

        model = quantised.load_dequantised(source)
        branches = eora.compensate(model, windows, teacher, chosen.rank, done=done)
    stage.pass_on(source, target)
    quantised.save_adapter(target, {name: (branch.a, branch.b) for name, branch in branches.items()})
    table(branches).to_csv(stage.output("layers.csv"), index=False, lineterminator="\n", float_format="%.9g")


def skip(stage: Stage) -> None:
    """Pass the quantised model on; layers.csv has no rows."""
    stage.pass_on(stage.input("gptq/model"), stage.output("model"))
    pd.DataFrame(columns=COLUMNS).to_csv(stage.output("layers.csv"), index=False, lineterminator="\n")


def check_rank(shapes: Mapping[str, tuple[int, int]], rank: int) -> None:
    """Refuse a rank that a linear can't have, before anything is loaded.

    Raises:
        InputError: rank above the smaller side of a linear.
    """
    name, shape = min(shapes.items(), key=lambda item: min(item[1]))
    if rank > min(shape):
        raise InputError(f"eora.rank = {rank} is above {min(shape)}, the smaller side of {name}: choose at most that")


def teacher_weights(folder: Path, kept: list[int] | range) -> dict[str, Tensor]:
    """The dense weights of the blocks `kept`, under the names that they have in a model of these blocks alone.

    Raises:
        InputError: the model has no such block.
    """
    model = checkpoint.load_dense(folder)
    blocks = families.linears_by_block(model)
    if max(kept) >= len(blocks):
        raise InputError(f"block {max(kept)} is wanted of a teacher with {len(blocks)}: run stage depth_prune again")
    names = [list(block) for block in blocks]
    return {
        name: linear.weight.detach()
        for place, block in enumerate(kept)
        for name, linear in zip(names[place], blocks[block].values(), strict=True)
    }


def table(branches: Mapping[str, eora.Branch]) -> pd.DataFrame:
    """One row per linear, in running order."""
    rows = [(name, b.error_before, b.error_after, len(b.a), b.a.nbytes + b.b.nbytes) for name, b in branches.items()]
    return pd.DataFrame(rows, columns=COLUMNS)
