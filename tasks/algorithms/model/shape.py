"""A model's sizes, read from its config.json through the key names of its family.

Every estimate and every check that comes before the weights (memory, disk, footprint on a device, divisibility) asks a
`ModelShape`. It reads no file and imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import families

if TYPE_CHECKING:
    from torch import nn

LARGEST = 2**31
"""Every size is below this one: what would overflow an int32 is no model."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a causal decoder.

    Attributes:
        layers: transformer blocks.
        hidden: values of the residual stream.
        mlp: values between the MLP's up and down projections.
        heads, kv_heads: query heads, and heads of keys (and of values).
        head_dim: values of one head.
        vocabulary: rows of the embedding.
        context: positions that the model was made for; None where the config names no limit.
        window: tokens that attention reaches back; None: all.
        tied: whether the head is the embedding.
        stored: bytes per weight in the checkpoint, by the config's dtype.
        family: where the matrices are.
        sides: what the family's names of a matrix's sides ("hidden", "mlp", "query", "key_value") stand for.
        linears: the matrices of one block in running order, name within the block -> (out, in).
    """

    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int | None
    window: int | None
    tied: bool
    stored: int
    family: families.Family
    sides: Mapping[str, int]
    linears: Mapping[str, tuple[int, int]]

    @cached_property
    def in_blocks(self) -> int:
        """The number of weights of all blocks' linears."""
        return self.layers * self.in_block

    @property
    def in_block(self) -> int:
        """The number of weights of one block's linears."""
        return sum(rows * columns for rows, columns in self.linears.values())

    @cached_property
    def outside(self) -> int:
        """The number of weights of embedding and head, each [vocabulary, hidden]; a tied head is the embedding."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def widest(self) -> int:
        """The inputs of the block linear that has most."""
        return max(columns for _, columns in self.linears.values())


def shape_of_config(config: Mapping[str, Any]) -> ModelShape:
    """Read the sizes that a config.json gives.

    Raises:
        InputError: the architecture isn't supported, or a size is missing or no whole number above 0.
    """
    family = families.family(config)
    keys = family.keys
    layers, hidden, mlp, heads, vocabulary = (
        _size(config, key) for key in (keys.layers, keys.hidden, keys.mlp, keys.heads, keys.vocabulary)
    )
    # without the key every query head has its own keys and values; fewer is grouped-query attention
    kv_heads = _size(config, keys.kv_heads, optional=True) or heads
    head_dim = _size(config, keys.head_dim, optional=True) or hidden // heads
    sides = {"hidden": hidden, "mlp": mlp, "query": heads * head_dim, "key_value": kv_heads * head_dim}
    return ModelShape(
        layers=layers,
        hidden=hidden,
        mlp=mlp,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=vocabulary,
        context=_size(config, keys.context, optional=True),
        window=_size(config, keys.window, optional=True) if config.get(keys.windowed, True) else None,
        tied=bool(config.get(keys.tied)),
        stored=2 if "16" in str(config.get("dtype") or config.get("torch_dtype") or "float32") else 4,
        family=family,
        sides=sides,
        linears={name: (sides[out], sides[inputs]) for name, (out, inputs) in family.sizes.items()},
    )


def shape_of_model(model: nn.Module) -> ModelShape:
    """Read the sizes of an instantiated model from its own config.

    Raises:
        InputError: its class isn't supported, or a size is missing.
    """
    return shape_of_config({**model.config.to_dict(), "architectures": [type(model).__name__]})


def _size(config: Mapping[str, Any], key: str, optional: bool = False) -> int | None:
    value = config.get(key)
    if value is None and optional:
        return None
    if type(value) is not int or not 1 <= value < LARGEST:
        raise InputError(f"the model's config.json has {key} = {value!r}, expected a whole number above 0")
    return value
