"""What goes before GPTQ in every stage that quantises: settings, embedding and head, what the widths of linears cost.

Settings of `params.gptq` in; embedding and head first, so that the linears are calibrated on what the model will
compute; then bits per linear, where a budget of bytes is given, by what their quantisation does to the model's
predictions. Then comes GPTQ (`tasks.compression.linear_quantisation`). The models' blocks may be kept elsewhere. It
writes no files but the embedding's codes and what the widths cost.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from tasks.algorithms import packing
from tasks.algorithms.model import checkpoints, families, head, layers, masks, matrices
from tasks.algorithms.model.shape import shape_of_config
from tasks.algorithms.quantisation import (
    allocation,
    embedding,
    gptqmodel_settings,
    masked_grid,
    packable,
    rounding,
    sensitivity,
)
from tasks.models import tensor_files
from tasks.runtime import files

if TYPE_CHECKING:
    from pathlib import Path

    from tasks.parameters.schema import Gptq
    from tasks.runtime.stage import Stage

BATCH = 4
"""Windows per forward pass: no effect on the result beyond rounding, and no parameter."""
ROWS = 4096
"""Rows of an embedding that are dequantised at once, to bound the memory."""
MEASURED = 1
"""Calibration windows on which sensitivities are measured, at most."""
MEASURED_WIDTH = 3
"""The width at which they are: those of 2, 4 and 8 bit follow from it (tasks/algorithms/README.md: what that loses)."""
SNAPPED_BITS = 6
"""What a scale of `scale_steps` takes when coded: an estimate, the package's coder sees how they are distributed."""


def settings(chosen: Gptq, widths: int | Mapping[str, int], device: str) -> Any:
    """Make gptqmodel's configuration.

    Args:
        widths: bits of all linears, or full module name -> bits.
    """
    return gptqmodel_settings.config(
        widths, chosen.group_size, chosen.symmetric, chosen.damp, chosen.act_order, chosen.mse, device=device
    )


def check_shapes(described: Mapping[str, Any], group_size: int) -> None:
    """Refuse a model whose linears don't pack.

    Args:
        described: the model's config.json.

    Raises:
        InputError: as `packable.check`.
    """
    packable.check(shape_of_config(described).linears, group_size)


def compress_embedding(
    model: nn.Module, windows: Tensor, chosen: Gptq, saved: checkpoints.Saved = checkpoints.NOTHING
) -> dict[str, rounding.Coded]:
    """Quantise the embedding, and the head where it is a matrix of its own, and put the values in their place.

    Args:
        model: dense; its blocks may be kept elsewhere.
        windows: calibration windows [windows, length].
        saved: what it holds isn't computed again.

    Returns:
        "embedding" (and "head") -> coded [vocabulary, hidden]; nothing at 16 bits.
    """
    wanted = chosen.embedding
    if wanted.bits == 16:
        return {}
    tables = _tables(model)  # [vocabulary, hidden] each
    if before := saved.load("embedding"):
        coded = {name: rounding.Coded(*_sides(before.tensors, name), *before.values[name]) for name in tables}
        place(model, coded)
        return coded
    moments = head_moments(model, windows) if wanted.method == "gptq" else None
    coded = {}
    for name, matrix in tables.items():
        # Where there are two, the moments are the head's: nothing multiplies the embedding with an input.
        compensated = moments is not None and (name == "head" or len(tables) == 1)
        coded[name] = embedding.compress(
            matrix.detach(),
            wanted.bits,
            wanted.group_size,
            "gptq" if compensated else "nearest",
            moments if compensated else None,
            chosen.scale_steps,
        )
    tensors = {f"{name}.{side}": getattr(each, side) for name, each in coded.items() for side in SIDES}
    saved.save("embedding", tensors, {name: [each.bits, each.group_size] for name, each in coded.items()})
    place(model, coded)
    return coded


def _sides(tensors: Mapping[str, Tensor], name: str) -> Iterator[Tensor]:
    return (tensors[f"{name}.{side}"] for side in SIDES)


def head_moments(model: nn.Module, windows: Tensor) -> Tensor:
    """Average X^T X over tokens, X the head's inputs (final norm included): float64 [hidden, hidden]."""
    hidden = layers.walk(model, windows, lambda *_: None, BATCH)  # [windows, length, hidden]
    total = torch.zeros(hidden.shape[-1], hidden.shape[-1], dtype=torch.float64, device=hidden.device)
    with torch.no_grad():
        for part in hidden.split(BATCH):
            x = head.finished(model, part).flatten(0, 1).double()  # [tokens, hidden]
            total += x.T @ x
    return total / hidden[..., 0].numel()


def place(model: nn.Module, coded: Mapping[str, rounding.Coded]) -> None:
    """Put dequantised values in the place of the embedding's (and head's) weights; tied ones stay tied."""
    tables = _tables(model)
    for name, each in coded.items():
        rows = zip(*(whole.split(ROWS) for whole in (tables[name].data, each.codes, each.scales)), strict=True)
        for values, codes, scales in rows:
            values.copy_(rounding.values(each._replace(codes=codes, scales=scales)))


def save_embedding(path: Path, coded: Mapping[str, rounding.Coded], chosen: Gptq) -> None:
    """Write codes and scales of the embedding (and of an untied head); no tensors at 16 bits."""
    tensors = {}
    for name, each in coded.items():
        tensors |= {f"{name}.codes": each.codes, f"{name}.scales": each.scales}
    described = {"bits": str(chosen.embedding.bits), "group_size": str(chosen.embedding.group_size)}
    tensor_files.save_tensors(path, tensors, described)


SIDES = ("codes", "scales")
"""The tensors of a coded matrix."""


class Choices(NamedTuple):
    """It says what each width of each linear costs: full module name -> bits -> cost.

    Attributes:
        harm: divergence of the model's predictions, in nats per token, with this linear alone rounded to the nearest.
            GPTQ afterwards does better at every width; of several linears it is taken to add up.
        sizes: bytes when packed (`linear_bytes`).
    """

    harm: dict[str, dict[int, float]]
    sizes: dict[str, dict[int, int]]

    def within(self, budget: int) -> dict[str, int]:
        """Choose bits per linear with the least harm in at most this many bytes.

        Raises:
            InputError: the smallest widths don't fit.
        """
        return allocation.allocate(self.harm, self.sizes, budget)


def measure_harm(
    stage: Stage, model: nn.Module, windows: Tensor, keep: Mapping[str, Tensor]
) -> dict[str, dict[int, float]]:
    """Measure what every width of every linear does to the predictions: `Choices.harm`.

    Args:
        stage: for its progress, journal and `gptq` parameters.
        model: dense, 0 where pruned; its blocks may be kept elsewhere.
        windows: [windows, length]; the first `MEASURED` are used.
        keep: full module name -> bool [out_features, in_features]; of all linears, or of none.
    """
    chosen = stage.params.gptq
    config = settings(chosen, chosen.bits, stage.params.device)

    def quantise(name: str, weight: Tensor, bits: int) -> Tensor:
        return masked_grid.nearest(weight, keep.get(name), config, bits, chosen.scale_steps)

    with stage.progress("sensitivity", len(matrices.of_model(model))) as progress:
        saved = stage.journal.part("sensitivity")
        return sensitivity.measure(
            model, windows[:MEASURED], quantise, packable.WIDTHS, MEASURED_WIDTH, progress.update, BATCH, saved
        )


def write_harm(path: Path, harm: Mapping[str, Mapping[int, float]]) -> None:
    """Write a row per linear and width, with every digit: what is chosen by it is what was measured."""
    rows = [(name, bits, value) for name, values in harm.items() for bits, value in values.items()]
    files.write_csv(path, pd.DataFrame(rows, columns=["linear", "bits", "sensitivity"]))


def read_harm(path: Path) -> dict[str, dict[int, float]]:
    """What `write_harm` wrote, in its order."""
    found: dict[str, dict[int, float]] = {}
    for row in pd.read_csv(path, float_precision="round_trip").itertuples():
        found.setdefault(row.linear, {})[row.bits] = row.sensitivity
    return found


def choices(
    harm: Mapping[str, dict[int, float]],
    shapes: Mapping[str, tuple[int, int]],
    keep: Mapping[str, Tensor],
    pattern: str,
    chosen: Gptq,
) -> Choices:
    """Count what every width of every linear takes, beside the harm that it does.

    Args:
        shapes: full module name -> (out_features, in_features).
        keep: as `measure_harm` had it.
        pattern: of the masks.
    """
    sizes = {}
    for name, shape in shapes.items():
        kept = int(keep[name].sum()) if name in keep else shape[0] * shape[1]
        sizes[name] = {bits: linear_bytes(shape, kept, pattern, bits, chosen) for bits in packable.WIDTHS}
    return Choices(dict(harm), sizes)


def shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Full module name -> (out_features, in_features) of the linears of all blocks, in running order."""
    return {name: matrix.shape for name, matrix in matrices.of_model(model).items()}


def distinct_scales(
    model: nn.Module, widths: Mapping[str, int], coded: Mapping[str, rounding.Coded], chosen: Gptq, device: str
) -> int | None:
    """Count the scales that a model with nothing pruned has, all matrices together, each linear rounded to the nearest.

    Scales on a coarse grid are packed as indices into a table of those that occur, so their number is their size. GPTQ
    finds nearly the same ones. None where scales are any float16, and are stored as they are.

    Args:
        model: dense; its blocks may be kept elsewhere.
        widths: full module name -> bits.
        coded: the embedding (and head), as quantised.
    """
    if not chosen.scale_steps:
        return None
    config = settings(chosen, chosen.bits, device)
    found = {float(scale) for each in coded.values() for scale in each.scales.unique()}
    for block, linears in zip(families.blocks(model), matrices.by_block(model), strict=True):
        with layers.opened(block):
            for name, matrix in linears.items():
                scales = masked_grid.scales(matrix.weight, None, config, widths[name], chosen.scale_steps)
                found.update(scales.unique().tolist())
    return len(found)


def linear_bytes(shape: tuple[int, int], kept: int, pattern: str, bits: int, chosen: Gptq) -> int:
    """Count the bytes that a linear's positions, codes, scales, zero points and order of columns take when packed.

    Unstructured positions count as the information that they hold, scales on a coarse grid as `SNAPPED_BITS`.

    Args:
        shape: (out_features, in_features).
        kept: weights that aren't pruned; of an N:M pattern they are counted by it.
        pattern: of the masks.
    """
    # The reader's layout (`tasks.packed`): where the kept weights are, their codes, then what each group needs.
    (rows, cols), total = shape, shape[0] * shape[1]
    groups = cols // (cols if chosen.group_size == -1 else chosen.group_size)  # per row
    parsed = masks.parse(pattern)
    if parsed:
        # Each group of `of` weights is one of (of choose keep) cases.
        kept, positions = total // parsed[1] * parsed[0], packing.positions_bytes(total, *parsed)
    else:
        positions = math.ceil(packing.log2_combinations(total, kept) / 8)
    scales = math.ceil(rows * groups * (SNAPPED_BITS if chosen.scale_steps else 16) / 8)
    zeros = 0 if chosen.symmetric else packing.digits_bytes(rows * groups, 2**bits)
    order = packing.digits_bytes(cols, groups) if chosen.act_order == "descending" else 0
    return positions + packing.digits_bytes(kept, 2**bits) + scales + zeros + order


def _tables(model: nn.Module) -> dict[str, nn.Parameter]:
    """Find the weights of embedding and, where it is not the same parameter, head: [vocabulary, hidden] each."""
    family = families.of_model(model)
    weight, head = (model.get_submodule(name).weight for name in (family.embedding, family.head))
    return {"embedding": weight} if head is weight else {"embedding": weight, "head": head}
