"""GPTQ of all linears of the blocks, with a stage's parameters, progress and journal: for gptq and the plain model.

Apart from `tasks.compression.block_quantisation`, which measures what widths cost and must not change with GPTQ's code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tasks.algorithms.model import checkpoints, matrices
from tasks.algorithms.quantisation import masked_gptq

if TYPE_CHECKING:
    from tasks.runtime.stage import Stage


def quantise_linears(
    stage: Stage,
    model: Any,
    windows: Tensor,
    keep: Mapping[str, Tensor],
    saved: checkpoints.Saved = checkpoints.NOTHING,
) -> dict[str, masked_gptq.LayerResult]:
    """Quantise all linears of the blocks by GPTQ, with the stage's progress; say where more damping was needed.

    Args:
        model: gptqmodel's wrapper of the dense model (`gptq_folder.load_for_quantisation`); it is changed.
        windows: [windows, length].
        keep: full module name -> bool [out_features, in_features]; unused where `gptq.masked` is false.
        saved: linears that it holds aren't quantised again.
    """
    chosen = stage.params.gptq
    finished: list[str] = []
    with stage.progress("gptq", len(matrices.of_model(model.model))) as progress:

        def done(name: str, error: float) -> None:
            finished.append(name)
            progress.update(len(finished), error=error)

        joint = (chosen.joint.keep, chosen.joint.of) if chosen.joint else None
        led = masked_gptq.Settings(chosen.scale_steps, joint, chosen.descent_cycles)
        results = masked_gptq.quantise(model, windows, keep if chosen.masked else {}, led, done, saved)
    for name, result in results.items():
        if result.damp > chosen.damp:
            print(f"{name}: the Hessian needed damping {result.damp:.3g} instead of gptq.damp = {chosen.damp:.3g}")
    return results
