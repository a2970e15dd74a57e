"""Any model folder of the pipeline: dense, quantised by gptqmodel, or packed.

Apart from `tasks.models.gptq_folder` because stages before `package` know no packed models and must not change with
their code. gptqmodel takes seconds to import, and only its own folders pay for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tasks.algorithms.model import families, layers, streaming
from tasks.algorithms.model.shape import shape_of_config
from tasks.models import dense_folder, model_files, streamed_folder, tensor_headers
from tasks.packed import packed_folder, reader, sizes, source_folder, streamed_model
from tasks.packed.packed_linear import PackedLinear


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model on the CPU, all of it in memory, in evaluation mode.

    Raises:
        InputError: a packed file is damaged.
    """
    if packed_folder.is_packed(folder):
        return reader.load_model(folder, dtype)
    if model_files.is_quantised(folder):
        if dtype != torch.float32 or families.known(config(folder)) is None:
            return _with_generation(streamed_model.load_model(source_folder.read(folder), dtype=dtype), folder)
        from tasks.models import gptq_folder

        return gptq_folder.load_quantised(folder)
    return dense_folder.load_dense(folder, dtype)


def load_or_stream(folder: Path, device: str) -> PreTrainedModel:
    """The model in float32 on a device, as `load_model` gives it; above `streaming.WHOLE` its blocks have to be opened.

    What it computes is the same, bit by bit.

    Raises:
        InputError: a file is damaged, or a dense model's weights aren't those of its config.
    """
    if float32_bytes(folder) <= streaming.WHOLE:
        return load_model(folder).to(device)
    if packed_folder.is_packed(folder):
        return reader.open_model(folder, device)
    if model_files.is_quantised(folder):
        return _with_generation(streamed_model.open_model(source_folder.read(folder), device), folder)
    return streamed_folder.open_dense(folder, device)


def _with_generation(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    model.generation_config = streamed_folder.generation(folder)
    return model


def float32_bytes(folder: Path) -> int:
    """Bytes of a model's weights in float32, by its config."""
    shape = shape_of_config(config(folder))
    return 4 * (shape.in_blocks + shape.outside)


def config(folder: Path) -> dict[str, Any]:
    """The model's config.json, wherever the folder has it.

    Raises:
        InputError: there is none, or it can't be read.
    """
    return packed_folder.config(folder) if packed_folder.is_packed(folder) else dense_folder.config(folder)


def block_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(full module name, float32 [out_features, in_features]) of the blocks' linears, dequantised, without adapter."""
    linears = families.linears_by_block(model)
    if all(isinstance(linear, (nn.Linear, PackedLinear)) for block in linears for linear in block.values()):
        for index, block in enumerate(families.blocks(model)):
            with layers.opened(block):  # a packed one has other modules then
                inside = families.linears_by_block(model)[index]
                yield from ((name, linear.weight.detach().float()) for name, linear in inside.items())
        return
    from tasks.models import gptq_folder

    yield from gptq_folder.block_weights(model).items()


def component_bytes(folder: Path) -> dict[str, int]:
    """Bytes of all files below the folder by what they are for, with the names of the folder's own format.

    Raises:
        InputError: a file of tensors is damaged.
    """
    return sizes.component_bytes(folder) if packed_folder.is_packed(folder) else tensor_headers.component_bytes(folder)
