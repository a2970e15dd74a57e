"""Stage gptq: quantise the linears of all blocks to a few bits with GPTQ; what is pruned stays exactly zero.

Embedding and head are quantised first, so that the linears are calibrated on what the model will compute. Where a
budget of bytes is given, each linear's bits are chosen by what its quantisation does to the model's predictions.
`layers.csv` and `sparsity.csv` are measured on the weights as the saved folder gives them back; a pruned weight that
is not zero there ends the stage with an error if the pattern is enforced. Files of few bytes are packed later, by the
stage package: `model` has gptqmodel's format.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tasks import checkpoint, quantised, sparsity
from tasks.algorithms import allocation, embedding, families, layers, masked_gptq, masks, packing, rounding, sensitivity
from tasks.algorithms.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from tasks.params import Gptq
    from tasks.stage import Stage

BATCH = 4
"""Windows per forward pass: no effect on the result beyond rounding, and no parameter."""
MEASURED = 4
"""Calibration windows on which sensitivities are measured, at most."""
SNAPPED_BITS = 6
"""What a scale of `scale_steps` takes when coded: an estimate, the package's coder sees how they are distributed."""
COLUMNS = ["linear", "bits", "error", "zeros", "violations"]
"""error: relative, of the output on calibration inputs; zeros: weights that are 0; violations: pruned weights that are
not, and groups of the pattern that hold too many weights."""


def run(stage: Stage) -> None:
    """lora/model + masks + windows -> model (a gptqmodel checkpoint), masks, embedding.safetensors and two tables.

    Raises:
        InputError: a matrix doesn't pack or doesn't suit the pattern; the budget is too small; masks don't fit.
    """
    chosen = stage.params.gptq
    dense, target = stage.input("lora/model"), stage.output("model")
    keep, pattern = checkpoint.load_masks(stage.input("masks.safetensors"))
    if chosen.joint:
        keep, pattern = {}, f"{chosen.joint.keep}:{chosen.joint.of}"
    windows = load_file(stage.input("windows.safetensors"))["input_ids"]  # [windows, length]
    described = checkpoint.config(dense)
    widths = None if chosen.budget_bytes else chosen.bits
    check_shapes(described, widths, chosen.group_size)
    coded, start = compress_embedding(dense, windows, chosen)
    save_embedding(stage.output("embedding.safetensors"), coded, chosen)
    if widths is None:
        held = (keep, pattern) if chosen.masked else ({}, "dense")
        widths = choose_widths(stage, start, windows, *held, chosen.budget_bytes)
    del start
    model = quantised.load_for_quantisation(dense, settings(chosen, widths))
    place(model.model, coded)
    results = _quantise(stage, model, windows, keep)
    quantised.save_quantised(model, dense, target)
    if chosen.joint:
        keep = {name: result.keep for name, result in results.items()}
    _write(stage, target, keep, pattern, results)


def skip(stage: Stage) -> None:
    """Pass the dense model and its masks on; layers.csv has no rows, embedding.safetensors no tensors."""
    dense = stage.input("lora/model")
    stage.pass_on(dense, stage.output("model"))
    stage.pass_on(stage.input("masks.safetensors"), stage.output("masks.safetensors"))
    checkpoint.save_tensors(stage.output("embedding.safetensors"), {}, {"bits": "16", "group_size": "-1"})
    pd.DataFrame(columns=COLUMNS).to_csv(stage.output("layers.csv"), index=False, lineterminator="\n")
    keep, pattern = checkpoint.load_masks(stage.input("masks.safetensors"))
    table = sparsity.ledger(quantised.block_weights(checkpoint.load_dense(dense)), keep, pattern)
    sparsity.check(table, "gptq", stage.params.wanda.enforce)
    sparsity.write(table, stage.output("sparsity.csv"))


def settings(chosen: Gptq, widths: int | Mapping[str, int]) -> Any:
    """gptqmodel's configuration.

    Args:
        widths: bits of all linears, or full module name -> bits.
    """
    mixed = None if isinstance(widths, int) else widths
    bits = widths if isinstance(widths, int) else chosen.bits
    return masked_gptq.config(
        bits, chosen.group_size, chosen.symmetric, chosen.damp, chosen.act_order, chosen.mse, mixed
    )


def check_shapes(described: Mapping[str, Any], bits: int | None, group_size: int) -> None:
    """Refuse a model whose linears don't pack.

    Args:
        described: the model's config.json.
        bits: of all linears; None if they are yet to be chosen.

    Raises:
        InputError: as `masked_gptq.check_shapes`; or a linear that packs at no width.
    """
    shapes = families.linear_shapes(described)
    for name, shape in shapes.items():
        packable = masked_gptq.packable(shape)
        if not packable and bits is None:
            raise InputError(f"{name} is {shape[0]} x {shape[1]}, which packs at none of {masked_gptq.WIDTHS} bits")
        masked_gptq.check_shapes({name: shape}, bits or packable[-1], group_size)


def compress_embedding(
    dense: Path, windows: Tensor, chosen: Gptq
) -> tuple[dict[str, rounding.Coded], nn.Module | None]:
    """Quantise the embedding, and the head where it is a matrix of its own.

    Args:
        dense: folder of the model.
        windows: calibration windows [windows, length].

    Returns:
        "embedding" (and "head") -> coded [vocabulary, hidden], nothing at 16 bits; and the dense model with these
        values in place, or None where nobody needs it.
    """
    wanted = chosen.embedding
    if wanted.bits == 16 and not chosen.budget_bytes:
        return {}, None
    model = checkpoint.load_dense(dense)
    if wanted.bits == 16:
        return {}, model
    matrices = _tables(model)
    moments = head_moments(model, windows) if wanted.method == "gptq" else None
    coded = {}
    for name, matrix in matrices.items():
        # Where there are two, the moments are the head's: nothing multiplies the embedding with an input.
        compensated = moments is not None and (name == "head" or len(matrices) == 1)
        coded[name] = embedding.compress(
            matrix.detach(),
            wanted.bits,
            wanted.group_size,
            "gptq" if compensated else "nearest",
            moments if compensated else None,
            chosen.scale_steps,
        )
    place(model, coded)
    return coded, model


def head_moments(model: nn.Module, windows: Tensor) -> Tensor:
    """Second moments of the head's inputs (final norm included), float64 [hidden, hidden]: X^T X / tokens."""
    hidden = layers.walk(model, windows, lambda *_: None, BATCH)  # [windows, length, hidden]
    norm = model.get_submodule(families.of_model(model).final_norm)
    total = torch.zeros(hidden.shape[-1], hidden.shape[-1], dtype=torch.float64)
    with torch.no_grad():
        for part in hidden.split(BATCH):
            x = norm(part).flatten(0, 1).double()
            total += x.T @ x
    return total / hidden[..., 0].numel()


def place(model: nn.Module, coded: Mapping[str, rounding.Coded]) -> None:
    """Put dequantised values in the place of the embedding's (and head's) weights; tied ones stay tied."""
    matrices = _tables(model)
    for name, each in coded.items():
        matrices[name].data.copy_(rounding.values(each))


def save_embedding(path: Path, coded: Mapping[str, rounding.Coded], chosen: Gptq) -> None:
    """Write codes and scales of the embedding (and of an untied head); no tensors at 16 bits."""
    tensors = {}
    for name, each in coded.items():
        tensors |= {f"{name}.codes": each.codes, f"{name}.scales": each.scales}
    described = {"bits": str(chosen.embedding.bits), "group_size": str(chosen.embedding.group_size)}
    checkpoint.save_tensors(path, tensors, described)


def choose_widths(
    stage: Stage, model: nn.Module, windows: Tensor, keep: Mapping[str, Tensor], pattern: str, budget: int
) -> dict[str, int]:
    """Bits per linear with the least measured harm whose packed sizes sum to at most a budget.

    Each linear alone is rounded to the nearest at each width and the divergence of the model's predictions is measured;
    GPTQ afterwards does better at every width. Divergences of several linears are taken to add up.

    Args:
        stage: for its progress and `gptq` parameters.
        model: dense, 0 where pruned.
        windows: [windows, length]; the first `MEASURED` are used.
        keep: full module name -> bool [out_features, in_features]; of all linears, or of none.
        pattern: of the masks.
        budget: bytes of all linears of the blocks.

    Raises:
        InputError: the smallest widths don't fit the budget.
    """
    chosen = stage.params.gptq
    config = settings(chosen, chosen.bits)
    linears = families.block_linears(model)
    choices = {name: masked_gptq.packable(tuple(linear.weight.shape)) for name, linear in linears.items()}

    def quantise(name: str, weight: Tensor, bits: int) -> Tensor:
        return masked_gptq.nearest(weight, keep.get(name), config, bits, chosen.scale_steps)

    costs = _sensitivities(stage, model, windows[:MEASURED], quantise, choices)
    sizes = {
        name: {
            bits: linear_bytes(linears[name].weight, keep.get(name), pattern, bits, chosen) for bits in choices[name]
        }
        for name in choices
    }
    return allocation.allocate(costs, sizes, budget)


def linear_bytes(weight: Tensor, keep: Tensor | None, pattern: str, bits: int, chosen: Gptq) -> int:
    """Bytes that a linear's positions, codes, scales, zero points and order of columns take when packed.

    Unstructured positions count as the information that they hold, scales on a coarse grid as `SNAPPED_BITS`.

    Args:
        weight: [out_features, in_features].
        keep: bool of the same shape, or None where nothing is pruned or `joint` will choose.
        pattern: of the masks.
    """
    total, cols = weight.numel(), weight.shape[1]
    groups = cols // (cols if chosen.group_size == -1 else chosen.group_size)  # per row
    shape = masks.parse(pattern)
    if shape:
        kept, positions = total // shape[1] * shape[0], packing.positions_bytes(total, *shape)
    else:
        kept = total if keep is None else int(keep.sum())
        positions = math.ceil(packing.log2_combinations(total, kept) / 8)
    scales = math.ceil(len(weight) * groups * (SNAPPED_BITS if chosen.scale_steps else 16) / 8)
    zeros = 0 if chosen.symmetric else packing.digits_bytes(len(weight) * groups, 2**bits)
    order = packing.digits_bytes(cols, groups) if chosen.act_order == "descending" else 0
    return positions + packing.digits_bytes(kept, 2**bits) + scales + zeros + order


def table(
    weights: Mapping[str, Tensor],
    bits: Mapping[str, int],
    ledger: pd.DataFrame,
    results: Mapping[str, masked_gptq.LayerResult],
) -> pd.DataFrame:
    """One row per linear, in running order, with `COLUMNS`.

    Args:
        weights: as saved, full module name -> [out_features, in_features].
        bits: of their codes.
        ledger: of `tasks.sparsity`, over the same weights.
    """
    broken = dict(zip(ledger["linear"], ledger["violations"] + ledger["revived"], strict=True))
    rows = [
        (name, bits[name], results[name].error, int((weight == 0).sum()), broken[name])
        for name, weight in weights.items()
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def _quantise(
    stage: Stage, model: Any, windows: Tensor, keep: Mapping[str, Tensor]
) -> dict[str, masked_gptq.LayerResult]:
    chosen = stage.params.gptq
    finished: list[str] = []
    with stage.progress("gptq", len(families.block_linears(model.model))) as progress:

        def done(name: str, error: float) -> None:
            finished.append(name)
            progress.update(len(finished), error=error)

        joint = (chosen.joint.keep, chosen.joint.of) if chosen.joint else None
        results = masked_gptq.quantise(model, windows, keep if chosen.masked else {}, done, chosen.scale_steps, joint)
    for name, result in results.items():
        if result.damp > chosen.damp:
            print(f"{name}: the Hessian needed damping {result.damp:.3g} instead of gptq.damp = {chosen.damp:.3g}")
    return results


def _sensitivities(
    stage: Stage,
    model: nn.Module,
    windows: Tensor,
    quantise: sensitivity.Quantise,
    choices: Mapping[str, list[int]],
) -> dict[str, dict[int, float]]:
    widths = sorted({bits for packable in choices.values() for bits in packable})
    with stage.progress("sensitivity", len(choices)) as progress:
        costs = sensitivity.measure(model, windows, quantise, widths, progress.update, BATCH)
    return {name: {bits: costs[name][bits] for bits in packable} for name, packable in choices.items()}


def _write(
    stage: Stage,
    target: Path,
    keep: Mapping[str, Tensor],
    pattern: str,
    results: Mapping[str, masked_gptq.LayerResult],
) -> None:
    """Masks and tables, measured on the saved model."""
    model = quantised.load_quantised(target)
    weights = quantised.block_weights(model)
    bits = {name: linear.bits for name, linear in masked_gptq.quantised_linears(model).items()}
    ledger = sparsity.ledger(weights, keep, pattern)
    if sparsity.check(ledger, "gptq", stage.params.wanda.enforce or stage.params.gptq.masked):
        checkpoint.save_masks(stage.output("masks.safetensors"), dict(keep), pattern)
    else:
        print(f"gptq.masked = false broke the pattern {pattern}: the model is a dense one from here on")
        checkpoint.save_masks(stage.output("masks.safetensors"), {}, "dense")
    sparsity.write(ledger, stage.output("sparsity.csv"))
    table(weights, bits, ledger, results).to_csv(
        stage.output("layers.csv"), index=False, lineterminator="\n", float_format="%.9g"
    )


def _tables(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of embedding and, where it is not the same parameter, head: [vocabulary, hidden] each."""
    family = families.of_model(model)
    weight, head = (model.get_submodule(name).weight for name in (family.embedding, family.head))
    return {"embedding": weight} if head is weight else {"embedding": weight, "head": head}
