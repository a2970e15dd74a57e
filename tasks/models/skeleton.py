"""A model without weights, on the meta device, for weights that come one after another or are only to be named.

All its matrices are linears: transformers' Conv1D keeps its weight as [in, out], in a module and in files. Here such a
module is a linear, and `tasks.models.stored_tensors` turns what comes from a file or goes into one.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import nn

from tasks.algorithms.model import families

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def build(config: PreTrainedConfig) -> PreTrainedModel:
    """The model that transformers makes of a config, in float32: no memory, no random numbers, no code of a folder."""
    from transformers import AutoModelForCausalLM  # here: what checks a folder first must not wait for it

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    return with_linears(model)


def with_linears(model: PreTrainedModel) -> PreTrainedModel:
    """Put a linear in the place of each Conv1D; the model itself, changed. Weights are copied, in [out, in]."""
    for name in turned(model):
        old = model.get_submodule(name.removesuffix(".weight"))
        with torch.device("meta"):
            new = nn.Linear(old.nx, old.nf)
        new.weight = nn.Parameter(old.weight.detach().T.contiguous(), requires_grad=old.weight.requires_grad)
        new.bias = old.bias
        attach(model, name.removesuffix(".weight"), new.train(old.training))
    return model


def turned(model: PreTrainedModel) -> list[str]:
    """Full names of the weights that the files of a model keep as [in, out]."""
    family = families.of_model(model)
    count = len(families.blocks(model))
    return [f"{family.blocks}.{index}.{name}.weight" for index in range(count) for name in family.transposed]


def attach(model: nn.Module, name: str, value: nn.Module | nn.Parameter) -> None:
    """Put a module or a parameter in the place of this full name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, value)


def compute_buffers(model: PreTrainedModel, device: torch.device | str = "cpu") -> None:
    """Compute what no file has, as it follows from the config: frequencies of rotary embeddings, scales, masks.

    transformers (5.23) does so where it initialises a module's weights. So it comes before these.
    """
    for module in model.modules():
        names = [name for name in module._buffers if name in module._non_persistent_buffers_set]
        names = [name for name in names if module._buffers[name] is not None and module._buffers[name].is_meta]
        for name in names:
            module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
        if names:
            model._init_weights(module)
        for name in names:
            module._buffers[name] = module._buffers[name].to(device)


def empty(module: nn.Module) -> None:
    """Drop all values that a file has."""
    for each in module.modules():
        for name, weight in each._parameters.items():
            if weight is not None:
                each._parameters[name] = nn.Parameter(weight.detach().to("meta"), requires_grad=weight.requires_grad)
        for name, value in each._buffers.items():
            if value is not None and name not in each._non_persistent_buffers_set:
                each._buffers[name] = value.to("meta")


def shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Name -> dimensions of all that the model's files hold, matrices as [out, in]; a tied head is listed, too."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def stored_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """The same as the files have it."""
    found, other = shapes(model), set(turned(model))
    return {name: shape[::-1] if name in other else shape for name, shape in found.items()}


def tied(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the embedding's and the head's weight where they are one matrix, else nothing."""
    family = families.of_model(model)
    names = (f"{family.embedding}.weight", f"{family.head}.weight")
    return names if model.config.tie_word_embeddings else ()


def missing(model: nn.Module) -> list[str]:
    """Names of the weights and buffers that are still without values."""
    return [name for name, t in itertools.chain(model.named_parameters(), model.named_buffers()) if t.is_meta]
