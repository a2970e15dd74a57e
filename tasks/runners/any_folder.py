"""Any model folder of the pipeline: dense, quantised by gptqmodel, or packed.

Apart from `tasks.models.gptq_folder` because stages before `package` know no packed models and must not change with
their code. gptqmodel takes seconds to import, and only its own folders pay for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from tasks.algorithms.model import families, layers, streaming
from tasks.models import dense_folder, model_files, streamed_folder, tensor_headers
from tasks.packed import packed_folder, reader, sizes
from tasks.packed.packed_linear import PackedLinear


def load_model(folder: Path) -> PreTrainedModel:
    """The model on the CPU, in float32, to be evaluated.

    Raises:
        InputError: a packed file is damaged.
    """
    if packed_folder.is_packed(folder):
        return reader.load_model(folder)
    if model_files.is_quantised(folder):
        from tasks.models import gptq_folder

        return gptq_folder.load_quantised(folder)
    return dense_folder.load_dense(folder)


def load_or_stream(folder: Path, device: str) -> PreTrainedModel:
    """The model as `load_model` gives it, on a device; blocks of a dense one above `streaming.WHOLE` stay on disk.

    Raises:
        InputError: a file is damaged, or a dense model's weights aren't those of its config.
    """
    if not packed_folder.is_packed(folder) and not model_files.is_quantised(folder):
        weights = sum(math.prod(entry.shape) for entry in tensor_headers.entries(folder).values())
        if 4 * weights > streaming.WHOLE:
            return streamed_folder.open_dense(folder, device)
    return load_model(folder).to(device)


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
        for block, inside in zip(families.blocks(model), linears, strict=True):
            with layers.opened(block):
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
