"""The start of adapters from what pruning took, by EoRA; a module of its own, as gptqmodel takes long to import."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import LoraModel
from torch import Tensor, nn

from tasks.algorithms.model import layers, matrices
from tasks.algorithms.quantisation import eora, output_error
from tasks.algorithms.recovery.masked_lora import MaskedLinear


def start_from_eora(adapted: LoraModel, teacher: Mapping[str, Tensor], input_ids: Tensor, batch: int) -> None:
    """Initialise the adapters with EoRA's compensation of what the weights lost ("EoRA", arXiv:2410.21271).

    The product times alpha / rank is the rank-r matrix closest to W_teacher - W on the inputs that the linear gets when
    all before it are compensated; a mask acts on it as in training. Where nothing was lost, PEFT's start stays.

    Args:
        adapted: from `attach`, of a supported family; changed in place, in evaluation mode afterwards.
        teacher: full module name -> weight [out, in] before it was pruned, for every target at least.
        input_ids: [windows, length] on the model's device; every token counts.
        batch: windows per forward pass.
    """
    model = adapted.eval().model

    def visit(index: int, block: nn.Module, inputs: layers.BlockInputs) -> None:
        for name, matrix in matrices.by_block(model)[index].items():
            layer = matrix.module
            if not isinstance(layer, MaskedLinear):
                continue
            lost = teacher[name].to(layer.weight.device, torch.float32) - layer.weight.detach()  # [out, in]
            if lost.any():
                moments = output_error.second_moments({name: matrix}, block, inputs)[name]
                # A [rank, in] and B [out, rank]; the layer scales B A by alpha / rank, so each takes 1 / sqrt of it
                a, b = eora.factors(lost, moments, layer.r["default"])
                share = layer.scaling["default"] ** -0.5
                layer.lora_A["default"].weight.data.copy_(a * share)
                layer.lora_B["default"].weight.data.copy_(b * share)

    layers.walk(model, input_ids, visit, batch)
