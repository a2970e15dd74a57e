"""Stage gptq: quantise the linears of all blocks to a few bits with GPTQ; what is pruned stays exactly zero.

Embedding and head stay as they are, in float16. `layers.csv` is measured on the weights as the saved folder gives them
back, and a pruned weight that is not zero there ends the stage with an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pandas as pd
from safetensors.torch import load_file
from torch import Tensor

from tasks import checkpoint, quantised
from tasks.algorithms import families, masked_gptq, masks
from tasks.algorithms.errors import InputError

if TYPE_CHECKING:
    from tasks.stage import Stage

COLUMNS = ["linear", "error", "zeros", "violations"]
"""error: relative, of the output on calibration inputs; zeros: weights that are 0; violations: as counted below."""


def run(stage: Stage) -> None:
    """lora/model + masks + windows -> model (a gptqmodel checkpoint), layers.csv."""
    chosen = stage.params.gptq
    dense, target = stage.input("lora/model"), stage.output("model")
    keep, pattern = checkpoint.load_masks(stage.input("masks.safetensors"))
    windows = load_file(stage.input("windows.safetensors"))["input_ids"]  # [windows, length]
    described = checkpoint.config(dense)
    masked_gptq.check_shapes(families.linear_shapes(described), chosen.bits, chosen.group_size)
    quantisation = masked_gptq.config(chosen.bits, chosen.group_size, chosen.symmetric, chosen.damp, chosen.act_order)
    model = quantised.load_for_quantisation(dense, quantisation)
    finished: list[str] = []
    total = described["num_hidden_layers"] * len(families.family(described).linears)
    with stage.progress("gptq", total) as progress:

        def done(name: str, error: float) -> None:
            finished.append(name)
            progress.update(len(finished), error=error)

        results = masked_gptq.quantise(model, windows, keep, done)
    for name, result in results.items():
        if result.damp > chosen.damp:
            print(f"{name}: the Hessian needed damping {result.damp:.3g} instead of gptq.damp = {chosen.damp:.3g}")
    quantised.save_quantised(model, dense, target)
    weights = quantised.block_weights(quantised.load_quantised(target))
    table(weights, keep, pattern, results).to_csv(
        stage.output("layers.csv"), index=False, lineterminator="\n", float_format="%.9g"
    )


def skip(stage: Stage) -> None:
    """Pass the dense model on; layers.csv has no rows."""
    stage.pass_on(stage.input("lora/model"), stage.output("model"))
    pd.DataFrame(columns=COLUMNS).to_csv(stage.output("layers.csv"), index=False, lineterminator="\n")


def table(
    weights: Mapping[str, Tensor],
    keep: Mapping[str, Tensor],
    pattern: str,
    results: Mapping[str, masked_gptq.LayerResult],
) -> pd.DataFrame:
    """One row per linear, in running order.

    Raises:
        RuntimeError: a pruned weight is not zero, or a group of the pattern holds too many weights.
    """
    rows = []
    for name, weight in weights.items():
        broken = violations(weight, keep[name], pattern) if name in keep else 0
        if broken:
            raise RuntimeError(f"{name}: {broken} violations of its {pattern} mask after quantisation")
        rows.append((name, results[name].error, int((weight == 0).sum()), broken))
    return pd.DataFrame(rows, columns=COLUMNS)


def violations(weight: Tensor, mask: Tensor, pattern: str) -> int:
    """Pruned weights that are not zero, and for a pattern "keep:of" the groups with too many nonzeros besides.

    Raises:
        InputError: unknown pattern.
    """
    alive = int(weight[~mask].count_nonzero())
    if pattern in ("unstructured", "dense"):
        return alive
    kept, _, of = pattern.partition(":")
    if not (kept.isdigit() and of.isdigit()):
        raise InputError(
            f"the masks' pattern is {pattern!r}, not keep:of, unstructured or dense: run stage wanda again"
        )
    return alive + masks.violations(weight, int(kept), int(of))
