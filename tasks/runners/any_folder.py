"""Any model folder of the pipeline: dense, quantised by gptqmodel, or packed.

Apart from `tasks.models.gptq_folder` because stages before `package` know no packed models and must not change with
their code. gptqmodel takes seconds to import, and only its own folders pay for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from tasks.algorithms.model import families
from tasks.models import dense_folder, model_files, tensor_headers
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


def config(folder: Path) -> dict[str, Any]:
    """The model's config.json, wherever the folder has it.

    Raises:
        InputError: there is none, or it can't be read.
    """
    return packed_folder.config(folder) if packed_folder.is_packed(folder) else dense_folder.config(folder)


def block_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Full module name -> float32 [out_features, in_features], dequantised, of the blocks; without adapter."""
    linears = families.block_linears(model)
    if all(isinstance(linear, (nn.Linear, PackedLinear)) for linear in linears.values()):
        return {name: linear.weight.detach().float() for name, linear in linears.items()}
    from tasks.models import gptq_folder

    return gptq_folder.block_weights(model)


def component_bytes(folder: Path) -> dict[str, int]:
    """Bytes of all files below the folder by what they are for, with the names of the folder's own format.

    Raises:
        InputError: a file of tensors is damaged.
    """
    return sizes.component_bytes(folder) if packed_folder.is_packed(folder) else tensor_headers.component_bytes(folder)
