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
        linears: the matrices of one block in running order, name within the block -> (out, in).
        mixed: some blocks' attention has a window, others' has none.
        elsewhere: weights of matrices that are neither in blocks nor embedding or head: learned positions.
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
    linears: Mapping[str, tuple[int, int]]
    mixed: bool = False
    elsewhere: int = 0

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
        """The number of weights of the matrices outside of blocks: embedding, an untied head, learned positions."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.elsewhere

    @property
    def widest(self) -> int:
        """The inputs of the block linear that has most."""
        return max(columns for _, columns in self.linears.values())


def shape_of_config(config: Mapping[str, Any]) -> ModelShape:
    """Read the sizes that a config.json gives.

    Raises:
        InputError: the architecture isn't supported, or a size is missing or no whole number above 0.
    """
    family = families.known(config)
    if family is None:
        from tasks.algorithms.model import inspection  # here, as it imports torch and transformers

        found = inspection.inspect(config)
        return ModelShape(family=found.family, stored=_stored(config), linears=found.linears, **found.sizes)
    keys = family.keys
    layers, hidden, mlp, heads, vocabulary = (
        _size(config, key) for key in (keys.layers, keys.hidden, keys.mlp, keys.heads, keys.vocabulary)
    )
    # without the key every query head has its own keys and values; fewer is grouped-query attention
    kv_heads = _size(config, keys.kv_heads, optional=True) or heads
    head_dim = _size(config, keys.head_dim, optional=True) or hidden // heads
    query, key_value = heads * head_dim, kv_heads * head_dim
    sides = ((query, hidden), *((key_value, hidden),) * 2, (hidden, query), *((mlp, hidden),) * 2, (hidden, mlp))
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
        stored=_stored(config),
        family=family,
        linears=dict(zip(family.linears, sides, strict=True)),
    )


def shape_of_model(model: nn.Module) -> ModelShape:
    """Read the sizes of an instantiated model from its own config.

    Raises:
        InputError: its class isn't supported, or a size is missing.
    """
    return shape_of_config(families.described(model))


def _stored(config: Mapping[str, Any]) -> int:
    return 2 if "16" in str(config.get("dtype") or config.get("torch_dtype") or "float32") else 4


def _size(config: Mapping[str, Any], key: str, optional: bool = False) -> int | None:
    value = config.get(key)
    if value is None and optional:
        return None
    if type(value) is not int or not 1 <= value < LARGEST:
        raise InputError(f"the model's config.json has {key} = {value!r}, expected a whole number above 0")
    return value
