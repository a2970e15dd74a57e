"""What a packed folder holds as a model that computes; a block has its weights while it is open.

Quantised blocks keep their codes from the first time on, a byte per weight, as positions and digits take long to
unpack: in memory, or where `streaming.SPILL` says if they are many. Float32 weights are made anew each time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tasks.algorithms.model import families, heap, layers
from tasks.algorithms.model.shape import shape_of_model
from tasks.algorithms.quantisation import rounding
from tasks.models.skeleton import attach, compute_buffers, missing
from tasks.packed import packed_linear
from tasks.packed.model_config import skeleton
from tasks.packed.stored_model import CHUNK, Linear, Model


def open_model(
    stored: Model, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The model in evaluation mode; its logits are those of the folder that was packed, bit by bit, in float32.

    Raises:
        InputError: a file is damaged.
    """
    model = skeleton(stored.config)
    described, shape = families.of_model(model), shape_of_model(model)
    compute_buffers(model, device)
    outside = {name: tensor.to(dtype) for name, tensor in stored.rest.items()}
    outside[f"{described.embedding}.weight"] = _values(stored.embedding, dtype)
    if stored.head is not None:
        outside[f"{described.head}.weight"] = _values(stored.head, dtype)
    model.load_state_dict({name: each.to(device) for name, each in outside.items()}, strict=False, assign=True)
    model.tie_weights()
    inside = [f"{described.blocks}.{index}.{name}" for index in range(shape.layers) for name in described.linears]
    if left := [name for name in missing(model) if name.rpartition(".")[0] not in inside]:
        raise RuntimeError(f"the packed model has no {left[0]}: its family isn't described fully")
    held = _Held(shape.in_blocks)
    for index, block in enumerate(families.blocks(model)):
        own = _StoredBlock(
            stored.blocks, index, f"{described.blocks}.{index}.", held, lambda each: each.to(device, dtype)
        )
        setattr(block, layers.STORED, own)
    return model.requires_grad_(False).eval()


def load_model(
    stored: Model, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The model with all its weights, as `open_model` otherwise; little more than it is in memory."""
    model = open_model(stored, device, dtype)
    for block in families.blocks(model):
        getattr(block, layers.STORED).stay(block)
        delattr(block, layers.STORED)
    return model


class _StoredBlock:
    """A block's linears; within a call they are in the block."""

    def __init__(
        self,
        stored: Sequence[Mapping[str, Linear]],
        index: int,
        prefix: str,
        held: _Held,
        place: Callable[[nn.Module], nn.Module],
    ) -> None:
        self._stored, self._index, self._prefix, self._held, self._place = stored, index, prefix, held, place
        self._codes: Mapping[str, Linear] | None = None

    @contextlib.contextmanager
    def __call__(self, block: nn.Module) -> Iterator[None]:
        if not missing(block):  # opened already, further out
            yield
            return
        linears = self._codes
        if linears is None:
            linears = self._stored[self._index]
            if all(each.codes is not None for each in linears.values()):
                linears = self._codes = self._held.kept(linears)
        empty = self._fill(block, linears)
        del linears
        try:
            yield
        finally:
            for name, module in empty.items():
                attach(block, name, module)
            heap.return_freed()

    def stay(self, block: nn.Module) -> None:
        """Fill the block for good."""
        self._fill(block, self._stored[self._index])

    def _fill(self, block: nn.Module, linears: Mapping[str, Linear]) -> dict[str, nn.Module]:
        """Put the linears into the block; returns the modules that were there, by their names in it."""
        before = {}
        for full, linear in linears.items():
            name = full.removeprefix(self._prefix)
            before[name] = block.get_submodule(name)
            attach(block, name, self._place(packed_linear.module(linear)))
        return before


class _Held:
    """Room for the codes of all blocks, taken when the first ones come."""

    def __init__(self, size: int) -> None:
        self._size, self._room, self._used = size, None, 0

    def kept(self, linears: Mapping[str, Linear]) -> dict[str, Linear]:
        """The linears, with their codes here, and what only a writer needs left out."""
        found = {}
        for name, linear in linears.items():
            if self._room is None:
                self._room = layers.room((self._size,), linear.codes)
            place = self._room[self._used : self._used + linear.codes.numel()].view(linear.codes.shape)
            self._used += linear.codes.numel()
            place.copy_(linear.codes)
            found[name] = replace(linear, codes=place, keep=None)
        return found


def _values(stored: rounding.Coded | Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix [rows, cols]; of codes by parts, in the memory of the result."""
    if not isinstance(stored, rounding.Coded):
        return stored.to(dtype)
    rows, cols = stored.codes.shape
    values, step = torch.empty(rows, cols, dtype=dtype), max(1, CHUNK // cols)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        values[part] = rounding.values(rounding.Coded(stored.codes[part], stored.scales[part], *stored[2:]))
    return values
