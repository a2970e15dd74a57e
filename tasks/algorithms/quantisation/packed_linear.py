"""One quantised linear as the tensors of a gptqmodel checkpoint, and back, by gptqmodel's own kernel.

The model that they belong to isn't needed; folders are `tasks.models.gptq_folder`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tasks.algorithms.quantisation import gptqmodel_library as library
from tasks.algorithms.quantisation import unpacking

PARTS = ("qweight", "qzeros", "scales", "g_idx")
"""The tensors' names in the checkpoint, after the linear's own."""


def parts(shape: tuple[int, int], bits: int, group_size: int) -> dict[str, Tensor]:
    """The tensors without values, on the meta device, of a linear of this shape (out_features, in_features)."""
    with torch.device("meta"):
        kernel = _kernel(shape, bits, group_size)
    return {part: getattr(kernel, part) for part in PARTS}


def pack(quantised: Tensor, scales: Tensor, zeros: Tensor, index: Tensor, bits: int, config: Any) -> dict[str, Tensor]:
    """Pack codes, scales and zero points, on the CPU.

    Args:
        quantised: [out_features, in_features], on the grid.
        scales, zeros: [out_features, groups].
        index: int32 [in_features], the group of each column.
        config: gptqmodel's QuantizeConfig.
    """
    shape = tuple(quantised.shape)
    kernel = _kernel(shape, bits, config.group_size)
    linear = nn.Linear(shape[1], shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(quantised.detach().cpu(), requires_grad=False)
    with torch.no_grad():
        kernel.pack_original(linear, scales.float().cpu(), zeros.float().cpu(), index.cpu())
        library.to_format_1(kernel, config)
    return {part: getattr(kernel, part).detach() for part in PARTS}


def unpack(tensors: Mapping[str, Tensor]) -> Tensor:
    """The weight of packed tensors, float32 [out_features, in_features]."""
    columns, groups = len(tensors["g_idx"]), len(tensors["scales"])
    shape = tensors["qweight"].shape[1], columns
    kernel = _kernel(shape, width(tensors), columns // groups if groups > 1 else -1).eval()
    for part in PARTS:
        setattr(kernel, part, tensors[part].clone())
    with torch.no_grad():
        library.to_format_2(kernel, kernel.bits, kernel.pack_dtype)
        return unpacking.dequantised(kernel)


def width(tensors: Mapping[str, Tensor]) -> int:
    """The bits of packed tensors' codes."""
    return 32 * len(tensors["qweight"]) // len(tensors["g_idx"])


def _kernel(shape: tuple[int, int], bits: int, group_size: int) -> Any:
    return library.torch_linear.TorchLinear(
        bits=bits, group_size=group_size, sym=True, desc_act=False, in_features=shape[1], out_features=shape[0]
    )
