"""Stage gptq: quantise the linears of all blocks to a few bits with GPTQ; what is pruned stays exactly zero.

Embedding and head are quantised first, so that the linears are calibrated on what the model will compute. Where a
budget of bytes is given, each linear's bits are chosen by what its quantisation does to the model's predictions.
`layers.csv` and `sparsity.csv` are measured on the weights as the saved folder gives them back; a pruned weight that
is not zero there ends the stage with an error if the pattern is enforced. Files of few bytes are packed later, by the
stage package: `model` has gptqmodel's format.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pandas as pd
from safetensors.torch import load_file
from torch import Tensor

from tasks.algorithms.model import layers
from tasks.algorithms.quantisation import unpacking
from tasks.compression import block_quantisation, linear_quantisation
from tasks.models import dense_folder, gptq_folder, mask_files, sparsity_ledger, streamed_folder, tensor_files
from tasks.runtime import files

if TYPE_CHECKING:
    from pathlib import Path

    from tasks.algorithms.quantisation import masked_gptq
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
    dense, target = stage.model_in, stage.output("model")
    keep, pattern = mask_files.load_masks(stage.input("masks.safetensors"))
    if chosen.joint:
        keep, pattern = {}, f"{chosen.joint.keep}:{chosen.joint.of}"
    windows = load_file(stage.input("windows.safetensors"))["input_ids"]  # [windows, length]
    described = dense_folder.config(dense)
    widths = None if chosen.budget_bytes else chosen.bits
    block_quantisation.check_shapes(described, chosen.group_size)
    coded, start = block_quantisation.compress_embedding(dense, windows, chosen, stage.params.device, stage.journal)
    block_quantisation.save_embedding(stage.output("embedding.safetensors"), coded, chosen)
    if widths is None:
        held = (keep, pattern) if chosen.masked else ({}, "dense")
        harm = block_quantisation.measure_harm(stage, start, windows, held[0])
        widths = block_quantisation.choices(harm, start, *held, chosen).within(chosen.budget_bytes)
    del start
    model = gptq_folder.load_for_quantisation(dense, block_quantisation.settings(chosen, widths, stage.params.device))
    block_quantisation.place(model.model, coded)
    results = linear_quantisation.quantise_linears(stage, model, windows, keep, stage.journal.part("gptq"))
    gptq_folder.save_quantised(model, dense, target)
    if chosen.joint:
        keep = {name: result.keep for name, result in results.items()}
    _write(stage, target, keep, pattern, results)


def skip(stage: Stage) -> None:
    """Pass the dense model and its masks on; layers.csv has no rows, embedding.safetensors no tensors."""
    dense = stage.model_in
    stage.pass_on(dense, stage.output("model"))
    stage.pass_on(stage.input("masks.safetensors"), stage.output("masks.safetensors"))
    tensor_files.save_tensors(stage.output("embedding.safetensors"), {}, {"bits": "16", "group_size": "-1"})
    files.write_csv(stage.output("layers.csv"), pd.DataFrame(columns=COLUMNS))
    keep, pattern = mask_files.load_masks(stage.input("masks.safetensors"))
    table = sparsity_ledger.ledger_of_blocks(
        layers.weights(streamed_folder.open_dense(dense, outside=False)), keep, pattern
    )
    sparsity_ledger.check(table, "gptq", stage.params.wanda.enforce)
    sparsity_ledger.write(table, stage.output("sparsity.csv"))


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
        ledger: of `tasks.models.sparsity_ledger`, over the same weights.
    """
    broken = dict(zip(ledger["linear"], ledger["violations"] + ledger["revived"], strict=True))
    rows = [
        (name, bits[name], results[name].error, int((weight == 0).sum()), broken[name])
        for name, weight in weights.items()
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def _write(
    stage: Stage,
    target: Path,
    keep: Mapping[str, Tensor],
    pattern: str,
    results: Mapping[str, masked_gptq.LayerResult],
) -> None:
    """Masks and tables, measured on the saved model."""
    model = gptq_folder.load_quantised(target)
    weights = gptq_folder.block_weights(model)
    bits = {name: linear.bits for name, linear in unpacking.quantised_linears(model).items()}
    ledger = sparsity_ledger.ledger(weights, keep, pattern)
    if sparsity_ledger.check(ledger, "gptq", stage.params.wanda.enforce or stage.params.gptq.masked):
        mask_files.save_masks(stage.output("masks.safetensors"), dict(keep), pattern)
    else:
        print(f"gptq.masked = false broke the pattern {pattern}: the model is a dense one from here on")
        mask_files.save_masks(stage.output("masks.safetensors"), {}, "dense")
    sparsity_ledger.write(ledger, stage.output("sparsity.csv"))
    files.write_csv(stage.output("layers.csv"), table(weights, bits, ledger, results), "%.9g")
