"""Run a model over a text through its cache of keys and values, held in 16, 8, 4 or 2 bits.

The caches are transformers': `DynamicCache` for 16 bits, below a cache of `QuantizedLayer`s with HQQ (Badri and Shaji,
Half-Quadratic Quantization, 2023). Keys and values are handed to them in float16, whatever the model computes in, so
that scales, zero points and what isn't quantised take the bytes that they take on a device. Groups are runs of values
of one head of one token.

What is measured is decoding: the text goes in by pieces of `residual` tokens, each attends to the cache of all before
it, and is quantised into it when it is done. That equals decoding token by token with the library's `residual_length`,
in which the newest 0 to `residual` - 1 tokens are float16; there is no prompt that attends to unquantised keys. The
library dequantises and quantises the whole cache anew for each piece, and HQQ searches its zero points, so what it
holds drifts a little: that is measured, too. Bytes are those held between two pieces; a layer's dequantised copy while
it attends is not in them.

It isn't fast: the reference implementation saves memory, no time. Keys get no scales per channel (KIVI, arXiv
2402.02750), which the library doesn't offer.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, QuantizedLayer

from tasks.algorithms.errors import InputError
from tasks.algorithms.model.device import beside
from tasks.algorithms.model.shape import ModelShape, shape_of_model

PARTS = ("codes", "scales", "float16")
"""A cache's bytes are for codes; for scales and zero points; for what isn't quantised."""


class _InHalf:
    """A cache that holds keys and values in float16, and gives them to the model in the type that it computes in."""

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        # new ones in: [1, kv_heads, piece, head_dim]; all held out: [1, kv_heads, tokens, head_dim]
        held = super().update(keys.half(), values.half(), layer_idx, *args, **kwargs)
        return held[0].to(keys.dtype), held[1].to(values.dtype)


class _Plain(_InHalf, DynamicCache):
    pass


class _Quantised(_InHalf, Cache):
    pass


class _Layer(QuantizedLayer):
    """transformers' layer of the backend HQQ, which would import HQQ, and with it torch's compiler, in every stage."""

    def _quantize(self, tensor: Tensor, axis: int) -> tuple[Tensor, dict[str, Any]]:
        from hqq.core.quantize import Quantizer  # 3 CPU seconds

        like = {"device": tensor.device, "compute_dtype": tensor.dtype}
        codes, described = Quantizer.quantize(tensor, self.nbits, group_size=self.q_group_size, axis=axis, **like)
        described["compute_dtype"] = tensor.dtype
        return Quantizer.to_inplace(codes, described, device=tensor.device)  # scales and zero points in that type, too

    def _dequantize(self, quantised: tuple[Tensor, dict[str, Any]]) -> Tensor:
        from hqq.core.quantize import Quantizer

        return Quantizer.dequantize(*quantised)


class Cached:
    """A model that reads a text through a cache, as `tasks.algorithms.model.head` asks one.

    Args:
        model: one of transformers', with full attention.
        bits: width of the cached values: 16, 8, 4 or 2.
        group_size: values of a head that share a scale and a zero point, below 16 bits; None: the whole head.
        residual: tokens per piece, a multiple of 4 (the library packs as many codes into a byte).

    Raises:
        InputError: the groups don't divide a head, or the model's attention has a window.
    """

    def __init__(self, model: nn.Module, bits: int, group_size: int | None, residual: int) -> None:
        self.model, self.bits, self.residual = model, bits, residual
        head = shape_of_model(model).head_dim
        self.group_size = group_size or head
        if head % self.group_size:
            raise InputError(
                f"a group of {self.group_size} values does not divide a head of {head};"
                f" choose a divisor of {head}, or null for the whole head"
            )
        self.cache = self.empty()

    def empty(self) -> Cache:
        """Return a cache with nothing in it."""
        if self.bits == 16:
            return _Plain()
        plain = DynamicCache(config=self.model.config).layers
        if foreign := {type(layer).__name__ for layer in plain} - {DynamicLayer.__name__}:
            raise InputError(
                f"can't quantise this model's cache: it has {sorted(foreign)}, only full attention is known"
            )
        axis = 1  # HQQ sees [groups, group_size]: a scale and a zero point per group
        return _Quantised(layers=[_Layer(self.bits, axis, axis, self.group_size, self.residual) for _ in plain])

    @torch.no_grad()
    def base_model(self, input_ids: Tensor, use_cache: bool = True) -> Any:
        """Return `.last_hidden_state` of a text [1, length], read through an empty cache; `self.cache` then has it."""
        self.cache, states = self.empty(), []
        for piece in beside(self.model, input_ids).split(self.residual, dim=1):  # [1, residual]
            seen = self.model.base_model(input_ids=piece, past_key_values=self.cache, use_cache=True)
            states.append(seen.last_hidden_state)
        return SimpleNamespace(last_hidden_state=torch.cat(states, dim=1))

    def get_output_embeddings(self) -> nn.Module:
        """Return the model's own head."""
        return self.model.get_output_embeddings()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the model's own weights, which say on which device it computes."""
        return self.model.parameters()

    def buffers(self) -> Iterator[Tensor]:
        """Yield the model's own buffers."""
        return self.model.buffers()


def held_bytes(cache: Cache) -> dict[str, int]:
    """Count the bytes of the memory behind every tensor that a cache holds, by `PARTS`."""
    sizes = dict.fromkeys(PARTS, 0)
    for layer in cache.layers:
        sizes["float16"] += sum(_memory(tensor) for tensor in (layer.keys, layer.values))
        pairs = (layer._quantized_keys, layer._quantized_values) if isinstance(layer, QuantizedLayer) else ()
        for codes, described in pairs:
            sizes["codes"] += _memory(codes)
            sizes["scales"] += sum(_memory(entry) for entry in described.values() if isinstance(entry, Tensor))
    return sizes


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def planned_bytes(shape: ModelShape, tokens: int, bits: int, group_size: int | None, residual: int) -> dict[str, int]:
    """Compute what `held_bytes` counts after `tokens` tokens; the last `tokens` modulo `residual` are not quantised."""
    rest = tokens if bits == 16 else tokens % residual
    per_token = 2 * shape.layers * shape.kv_heads * shape.head_dim  # values: K and V, layers, heads, head
    quantised = (tokens - rest) * per_token
    groups = quantised // (group_size or shape.head_dim)  # each with a scale and a zero point of 2 bytes
    return {"codes": quantised * bits // 8, "scales": 2 * 2 * groups, "float16": 2 * rest * per_token}
