"""GPTQ of all linears of the blocks, with a stage's parameters, progress and journal: for gptq and the plain model.

Apart from `tasks.compression.block_quantisation`, which measures what widths cost and must not change with GPTQ's code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from tasks.algorithms.model import checkpoints, matrices
from tasks.algorithms.quantisation import gptq_walk, masked_gptq
from tasks.compression import block_quantisation
from tasks.models import gptq_folder

if TYPE_CHECKING:
    from pathlib import Path

    from tasks.runtime.stage import Stage

Mask = Callable[[str, Tensor], None]
"""Called with a linear's full name and the mask that was chosen for it, bool [out_features, in_features]."""


def quantise_linears(
    stage: Stage,
    model: nn.Module,
    windows: Tensor,
    keep: Mapping[str, Tensor],
    widths: int | Mapping[str, int],
    folder: Path,
    saved: checkpoints.Saved = checkpoints.NOTHING,
    chose: Mask | None = None,
) -> dict[str, float]:
    """Quantise all linears of the blocks by GPTQ and write them as a gptqmodel checkpoint, block by block.

    It says where more damping was needed.

    Args:
        stage: for its dense model (`model_in`), progress and `gptq` parameters.
        model: the dense model, opened from its folder, with the embedding that it is to have.
        windows: [windows, length].
        keep: full module name -> bool [out_features, in_features]; unused where `gptq.masked` is false.
        widths: bits of all linears, or full module name -> bits.
        folder: to be written.
        saved: linears that it holds aren't quantised again.
        chose: gets the masks where `gptq.joint` is set.

    Returns:
        full module name -> relative error of its outputs, in running order.
    """
    chosen = stage.params.gptq
    config = block_quantisation.settings(chosen, widths, stage.params.device)
    joint = (chosen.joint.keep, chosen.joint.of) if chosen.joint else None
    led = masked_gptq.Settings(chosen.scale_steps, joint, chosen.descent_cycles)
    errors: dict[str, float] = {}
    with (
        stage.progress("gptq", len(matrices.of_model(model))) as progress,
        gptq_folder.writing(model, config, stage.model_in, folder) as write,
    ):

        def done(name: str, found: gptq_walk.Quantised) -> None:
            write(name, found.tensors)
            if chose and found.keep is not None:
                chose(name, found.keep)
            if found.damp > chosen.damp:
                print(f"{name}: the Hessian needed damping {found.damp:.3g} instead of gptq.damp = {chosen.damp:.3g}")
            errors[name] = found.error
            progress.update(len(errors), error=found.error)

        gptq_walk.quantise(model, windows, keep if chosen.masked else {}, config, done, led, saved)
    return errors
