"""Stage gptq: quantise the linears of all blocks to a few bits with GPTQ; what is pruned stays exactly zero.

Embedding and head are quantised first, so that the linears are calibrated on what the model will compute. Where a
budget of bytes is given, each linear's bits are chosen by what its quantisation does to the model's predictions.
`layers.csv` and `sparsity.csv` are measured on the weights as the saved folder gives them back; a pruned weight that
is not zero there ends the stage with an error if the pattern is enforced. Files of few bytes are packed later, by the
stage package: `model` has gptqmodel's format.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import pandas as pd
from safetensors.torch import load_file
from torch import Tensor

from tasks.algorithms.model import families, layers, matrices
from tasks.compression import block_quantisation, linear_quantisation
from tasks.models import dense_folder, gptq_folder, mask_files, sparsity_ledger, streamed_folder, tensor_files
from tasks.runtime import files

if TYPE_CHECKING:
    from tasks.runtime.stage import Stage

COLUMNS = ["linear", "bits", "error", "zeros", "violations"]
"""error: relative, of the output on calibration inputs; zeros: weights that are 0; violations: pruned weights that are
not, and groups of the pattern that hold too many weights."""


def run(stage: Stage) -> None:
    """lora/model + masks + windows -> model (a gptqmodel checkpoint), masks, embedding.safetensors and two tables.

    Raises:
        InputError: a matrix doesn't pack or doesn't suit the pattern; the budget is too small; masks don't fit.
    """
    chosen = stage.params.gptq
    dense, target, out = stage.model_in, stage.output("model"), stage.output("masks.safetensors")
    stored = mask_files.StoredMasks(stage.input("masks.safetensors"))
    keep, pattern = stored, stored.pattern
    if chosen.joint:
        keep, pattern = {}, f"{chosen.joint.keep}:{chosen.joint.of}"
    windows = load_file(stage.input("windows.safetensors"))["input_ids"]  # [windows, length]
    block_quantisation.check_shapes(dense_folder.config(dense), chosen.group_size)
    model = streamed_folder.open_dense(dense, stage.params.device)
    shapes = block_quantisation.shapes(model)
    coded = block_quantisation.compress_embedding(model, windows, chosen, stage.journal)
    block_quantisation.save_embedding(stage.output("embedding.safetensors"), coded, chosen)
    widths = chosen.bits
    if chosen.budget_bytes:
        held = (keep, pattern) if chosen.masked else ({}, "dense")
        harm = block_quantisation.measure_harm(stage, model, windows, held[0])
        widths = block_quantisation.choices(harm, shapes, *held, chosen).within(chosen.budget_bytes)
    with contextlib.ExitStack() as stack:
        chose = stack.enter_context(mask_files.writing(out, shapes, pattern)) if chosen.joint else None
        saved = stage.journal.part("gptq")
        errors = linear_quantisation.quantise_linears(stage, model, windows, keep, widths, target, saved, chose)
    _write(stage, mask_files.StoredMasks(out) if chosen.joint else stored, errors)


def skip(stage: Stage) -> None:
    """Pass the dense model and its masks on; layers.csv has no rows, embedding.safetensors no tensors."""
    dense = stage.model_in
    stage.pass_on(dense, stage.output("model"))
    stage.pass_on(stage.input("masks.safetensors"), stage.output("masks.safetensors"))
    tensor_files.save_tensors(stage.output("embedding.safetensors"), {}, {"bits": "16", "group_size": "-1"})
    files.write_csv(stage.output("layers.csv"), pd.DataFrame(columns=COLUMNS))
    keep, model, ledgers = (
        mask_files.StoredMasks(stage.input("masks.safetensors")),
        streamed_folder.open_dense(dense, outside=False),
        [],
    )
    for block, inside in zip(families.blocks(model), matrices.by_block(model), strict=True):
        with layers.opened(block):
            ledgers.append(_ledger({name: matrix.weight for name, matrix in inside.items()}, keep))
    found = pd.concat(ledgers, ignore_index=True)
    sparsity_ledger.check(found, "gptq", stage.params.wanda.enforce)
    sparsity_ledger.write(found, stage.output("sparsity.csv"))


def table(weights: Mapping[str, tuple[int, Tensor]], ledger: pd.DataFrame, errors: Mapping[str, float]) -> pd.DataFrame:
    """One row per linear, in running order, with `COLUMNS`.

    Args:
        weights: as saved, full module name -> (bits, [out_features, in_features]).
        ledger: of `tasks.models.sparsity_ledger`, over the same weights.
        errors: of `linear_quantisation.quantise_linears`.
    """
    broken = dict(zip(ledger["linear"], ledger["violations"] + ledger["revived"], strict=True))
    rows = [
        (name, bits, errors[name], int((weight == 0).sum()), broken[name]) for name, (bits, weight) in weights.items()
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def _write(stage: Stage, keep: mask_files.StoredMasks, errors: Mapping[str, float]) -> None:
    """Masks and tables, measured on the saved model."""
    ledgers, tables = [], []
    for block in gptq_folder.stored_linears(stage.output("model")):
        ledgers.append(_ledger({name: weight for name, (_, weight) in block.items()}, keep))
        tables.append(table(block, ledgers[-1], errors))
    found = pd.concat(ledgers, ignore_index=True)
    if not sparsity_ledger.check(found, "gptq", stage.params.wanda.enforce or stage.params.gptq.masked):
        print(f"gptq.masked = false broke the pattern {keep.pattern}: the model is a dense one from here on")
        mask_files.save_masks(stage.output("masks.safetensors"), {}, "dense")
    elif not stage.params.gptq.joint:
        stage.pass_on(stage.input("masks.safetensors"), stage.output("masks.safetensors"))
    sparsity_ledger.write(found, stage.output("sparsity.csv"))
    files.write_csv(stage.output("layers.csv"), pd.concat(tables, ignore_index=True), "%.9g")


def _ledger(weights: Mapping[str, Tensor], keep: mask_files.StoredMasks) -> pd.DataFrame:
    """The ledger of one block."""
    return sparsity_ledger.ledger(weights, {name: keep[name] for name in weights if name in keep}, keep.pattern)
