"""A model without weights, on the meta device, for weights that come one after another or are only to be named."""

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
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)


def attach(model: nn.Module, name: str, value: nn.Module | nn.Parameter) -> None:
    """Put a module or a parameter in the place of this full name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, value)


def compute_positions(model: PreTrainedModel, device: torch.device | str = "cpu") -> None:
    """Replace the rotary embedding, whose frequencies no file has: they follow from the config."""
    rotary = families.of_model(model).rotary
    if rotary:
        attach(model, rotary, type(model.get_submodule(rotary))(config=model.config).to(device))


def shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Name -> dimensions of all that the model's files hold; a tied head is listed, too."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def tied(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the embedding's and the head's weight where they are one matrix, else nothing."""
    family = families.of_model(model)
    names = (f"{family.embedding}.weight", f"{family.head}.weight")
    return names if model.config.tie_word_embeddings else ()


def missing(model: nn.Module) -> list[str]:
    """Names of the weights and buffers that are still without values."""
    return [name for name, t in itertools.chain(model.named_parameters(), model.named_buffers()) if t.is_meta]
