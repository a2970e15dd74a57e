"""The weights inside gptqmodel's quantised linears, as plain float32 matrices.

It reads and replaces linears of a model in memory; folders are `tasks.models.gptq_folder`'s.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tasks.algorithms.quantisation import gptqmodel_library as library

UNPACKED = "unpacked_weight"
"""The buffer with the weight that a linear was unpacked to once."""


def quantised_linears(model: nn.Module) -> dict[str, Any]:
    """List gptqmodel's quantised linears by their full module names, in the model's order."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, library.torch_linear.TorchLinear)
    }


def dequantised(linear: Any) -> Tensor:
    """Unpack the weight of a quantised linear, float32 [out_features, in_features], without its adapter."""
    unpacked = getattr(linear, UNPACKED, None)
    if unpacked is not None:
        return unpacked.T.contiguous()
    scales = linear.scales
    linear.scales = scales.float()  # in half precision code x scale would be rounded
    try:
        # The class's function: the instance's own may be a compiled one.
        return type(linear).dequantize_weight(linear).T.float().contiguous()
    finally:
        linear.scales = scales


def unpack_once(model: nn.Module) -> None:
    """Make quantised linears keep their float32 weights instead of unpacking them at every call.

    gptqmodel's own cache of unpacked weights leaves the adapter out of the forward pass.
    """
    for linear in quantised_linears(model).values():
        # [in_features, out_features], as the kernel multiplies; a buffer, so that it goes where the model goes
        linear.register_buffer(UNPACKED, dequantised(linear).T, persistent=False)
        linear.dequantize_weight = lambda num_itr=1, linear=linear: getattr(linear, UNPACKED)


def densify(model: nn.Module) -> None:
    """Replace every quantised linear by an ordinary float32 one with its dequantised weight; adapters are dropped."""
    for name, linear in quantised_linears(model).items():
        dense = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
        dense.weight = nn.Parameter(dequantised(linear), requires_grad=False)
        if linear.bias is not None:
            dense.bias = nn.Parameter(linear.bias.detach().float(), requires_grad=False)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, dense)
