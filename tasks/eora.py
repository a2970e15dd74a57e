"""Stage eora: add a low-rank branch to quantised linears that brings their output closer to a dense teacher's.

The teacher is the recovered model (`lora`: it makes up for quantisation) or the fetched one (`fetch`, with the trimmed
vocabulary, if it is trimmed: for pruning too; its blocks are found through the record of what depth pruning kept).
The folder is the quantised one with the adapter in a subfolder, which gptqmodel loads:
`GPTQModel.load(folder, adapter=Lora(rank=…, path=folder/eora))`. The factors' codes are beside it in
`adapter.safetensors`, for the stage package; the adapter holds their values.

The branch is never merged, so the pattern of pruned weights is that of the quantised model; it is checked all the same.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from safetensors.torch import load_file
from torch import nn

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import layers
from tasks.algorithms.model.shape import shape_of_config
from tasks.algorithms.quantisation import eora_branches, eora_ranks
from tasks.models import (
    dense_folder,
    gptq_folder,
    gptq_tensors,
    mask_files,
    sparsity_ledger,
    streamed_folder,
    tensor_files,
)
from tasks.parameters import rules
from tasks.runtime import files

if TYPE_CHECKING:
    from tasks.parameters.schema import Eora
    from tasks.runtime.stage import Stage

COLUMNS = ["linear", "error_before", "error_after", "rank", "bytes", "bits_per_weight_equivalent"]
"""Errors are relative, of the linear's output on calibration inputs against the teacher's; bytes of both factors (codes
and scales, or float16); the last is by how many bits each weight of the linear, pruned or not, could be longer instead.
"""


def run(stage: Stage) -> None:
    """gptq/model + masks + a teacher + windows -> model (with an adapter), adapter.safetensors, two tables.

    Raises:
        InputError: a rank that a linear can't have, a budget below one rank, a teacher of other blocks; the quantised
            weights break the pattern of the masks and it is enforced.
    """
    source, target = stage.model_in, stage.output("model")
    described = dense_folder.config(source)
    shape = shape_of_config(described)
    chosen, shapes = rules.settle(stage.params.eora, shape, stage.params.device), shape.linears
    if chosen.budget_bytes is None:
        check_rank(shapes, chosen.rank)
    else:
        check_budget(shapes, chosen.budget_bytes, chosen.bits)
    teacher = read_teacher(stage, described)
    windows = load_file(stage.input("windows.safetensors"))["input_ids"]  # [windows, length]
    model = streamed_folder.open_dense(source, stage.params.device, gptq_tensors.Dequantised(source))
    write_ledger(stage, model)
    with stage.progress("eora", len(teacher) * (1 if chosen.budget_bytes is None else 2)) as progress:
        finished: list[str] = []

        def done(name: str, error: float) -> None:
            finished.append(name)
            progress.update(len(finished), error=error)

        ranks = chosen.rank
        if chosen.budget_bytes is not None:
            sizes = {name: eora_branches.rank_bytes(teacher.shapes[name], chosen.bits) for name in teacher}
            worth = eora_ranks.gains(model, windows, teacher, done, stage.journal)
            ranks = eora_ranks.allocate(worth, sizes, chosen.budget_bytes)
        size = eora_branches.Size(ranks, chosen.bits)
        # a walk ends before the head, and of nothing else is there as much beside a block
        entered = functools.partial(streamed_folder.drop_outside, model)
        branches = eora_branches.compensate(model, windows, teacher, size, done, stage.journal, entered)
    stage.pass_on(source, target)
    gptq_folder.save_adapter(target, {name: (branch.a, branch.b) for name, branch in branches.items()})
    save_codes(stage.output("adapter.safetensors"), branches, chosen.bits)
    rows = table(branches, chosen.bits)
    files.write_csv(stage.output("layers.csv"), rows, "%.9g")
    print(summary(rows, sum(rows * cols for rows, cols in teacher.shapes.values()), chosen))


def skip(stage: Stage) -> None:
    """Pass the quantised model on; the tables have no rows, adapter.safetensors no tensors."""
    stage.pass_on(stage.model_in, stage.output("model"))
    save_codes(stage.output("adapter.safetensors"), {}, eora_branches.HALF)
    files.write_header(stage.output("layers.csv"), COLUMNS)
    sparsity_ledger.write_empty(stage.output("sparsity.csv"))


def check_rank(shapes: Mapping[str, tuple[int, int]], rank: int) -> None:
    """Refuse a rank that a linear can't have, before anything is loaded.

    Raises:
        InputError: rank above the smaller side of a linear.
    """
    name, shape = min(shapes.items(), key=lambda item: min(item[1]))
    if rank > min(shape):
        raise InputError(f"eora.rank = {rank} is above {min(shape)}, the smaller side of {name}: choose at most that")


def check_budget(shapes: Mapping[str, tuple[int, int]], budget: int, bits: int) -> None:
    """Refuse a budget that buys nothing, before anything is loaded.

    Raises:
        InputError: not even one rank of one linear fits.
    """
    sizes = {name: eora_branches.rank_bytes(shape, bits) for name, shape in shapes.items()}
    name = min(sizes, key=sizes.__getitem__)
    if budget < sizes[name]:
        raise InputError(
            f"eora.budget_bytes = {budget} is below {sizes[name]}, one rank of {name} at eora.bits = {bits}: raise it, "
            "or switch eora off"
        )


def read_teacher(stage: Stage, described: Mapping) -> streamed_folder.Weights:
    """The teacher that eora.teacher names, for a model with this config.json.

    Raises:
        InputError: it hasn't the blocks of the model.
    """
    shape = shape_of_config(described)
    blocks = shape.layers
    if stage.params.eora.teacher == "lora":
        teacher = streamed_folder.Weights(stage.input("lora/model"), range(blocks))
    else:
        kept = json.loads(stage.input("removed.json").read_text(encoding="utf-8"))["kept"]
        teacher = streamed_folder.Weights(stage.input("vocabulary/model"), kept)
    if len(teacher) != blocks * len(shape.linears):
        raise InputError(f"the teacher has {len(teacher)} linears for {blocks} blocks: run stage depth_prune again")
    return teacher


def write_ledger(stage: Stage, model: nn.Module) -> None:
    """sparsity.csv of the quantised weights, the branches apart.

    Raises:
        InputError: they break the pattern, and wanda.enforce says that they must not.
    """
    keep = mask_files.StoredMasks(stage.input("masks.safetensors"))
    found = sparsity_ledger.ledger_of_blocks(layers.weights(model), keep, keep.pattern)
    sparsity_ledger.write(found, stage.output("sparsity.csv"))
    sparsity_ledger.check(found, "gptq", stage.params.wanda.enforce)


def save_codes(path: Path, branches: Mapping[str, eora_branches.Branch], bits: int) -> None:
    """The factors as they are to be packed; no tensors at 16 bits, where the adapter itself has all there is.

    Per linear with a branch: `<name>.a.codes` int8 [rank, in_features] and `<name>.b.codes` int8 [rank, out_features]
    (B is stored transposed, so that groups run along the longer side), and `.a.scales`, `.b.scales`, float16
    [rank, groups]. A group is the row's length divided by the number of scales.
    """
    tensors = {}
    for name, branch in branches.items():
        for side, coded in zip("ab", branch.coded or (), strict=False):
            tensors |= {f"{name}.{side}.codes": coded.codes, f"{name}.{side}.scales": coded.scales}
    tensor_files.save_tensors(path, tensors, {"bits": str(bits), "group_size": str(eora_branches.GROUP_SIZE)})


def table(branches: Mapping[str, eora_branches.Branch], bits: int) -> pd.DataFrame:
    """One row per linear, in running order."""
    rows = []
    for name, branch in branches.items():
        rank, shape = len(branch.a), (len(branch.b), branch.a.shape[1])
        size = rank * eora_branches.rank_bytes(shape, bits)
        rows.append((name, branch.error_before, branch.error_after, rank, size, 8 * size / (shape[0] * shape[1])))
    return pd.DataFrame(rows, columns=COLUMNS)


def summary(rows: pd.DataFrame, weights: int, chosen: Eora) -> str:
    """One line: what the branches cost and removed, and what their bytes are as bits of every weight.

    What more bits would have left is a rule of thumb, printed where quantisation alone is compensated: a uniform
    quantiser's error halves with each bit.
    """
    before, after = (float(rows[side].pow(2).mean() ** 0.5) for side in ("error_before", "error_after"))
    size, ranks = int(rows["bytes"].sum()), rows["rank"]
    extra = 8 * size / weights
    of = "" if chosen.budget_bytes is None else f" of {chosen.budget_bytes}"
    rule = f", which by rule would leave {before * 2**-extra:.4g}" if chosen.teacher == "lora" else ""
    return (
        f"ranks {ranks.min()} to {ranks.max()}, {size} bytes{of}: relative output error {before:.4g} -> {after:.4g} "
        f"(root mean square over {len(rows)} linears); the same bytes are {extra:.3g} more bits per weight{rule}"
    )
