"""Stage sensitivity: what each width of each linear costs the recovered dense model, for stage baseline to choose from.

The embedding is quantised first, as everywhere, and the linears are measured on the model with it. Nothing here depends
on the package, so it is done while that is still being made, and stays when the package gets another size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from safetensors.torch import load_file

from tasks.compression import block_quantisation
from tasks.models import dense_folder, streamed_folder

if TYPE_CHECKING:
    from tasks.runtime.stage import Stage


def run(stage: Stage) -> None:
    """Write sensitivity.csv, and the embedding's codes.

    Raises:
        InputError: the model's linears don't pack.
    """
    chosen = stage.params.gptq
    if not (chosen.enabled and stage.params.baseline.enabled):
        return skip(stage)
    dense = stage.model_in
    windows = load_file(stage.input("windows.safetensors"))["input_ids"]  # [windows, length]
    block_quantisation.check_shapes(dense_folder.config(dense), chosen.group_size)
    model = streamed_folder.open_dense(dense, stage.params.device)
    coded = block_quantisation.compress_embedding(model, windows, chosen, stage.journal)
    block_quantisation.write_harm(
        stage.output("sensitivity.csv"), block_quantisation.measure_harm(stage, model, windows, {})
    )
    block_quantisation.save_embedding(stage.output("embedding.safetensors"), coded, chosen)


def skip(stage: Stage) -> None:
    """Write a table without rows, and no codes."""
    block_quantisation.write_harm(stage.output("sensitivity.csv"), {})
    block_quantisation.save_embedding(stage.output("embedding.safetensors"), {}, stage.params.gptq)
