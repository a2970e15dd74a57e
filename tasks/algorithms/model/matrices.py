"""A model's prunable matrices, each seen as [out, in], whatever module holds it.

A `Matrix` is a view: it shares memory with the module's weight, so an algorithm reads and writes it in place and never
asks whether the module is a linear, keeps its weight transposed (transformers' Conv1D) or holds several projections in
one (a fused qkv). Where the matrices of a family lie is `families`' data.
It holds no copy and quantises nothing; modules of quantised models have no weight to see.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from tasks.algorithms.model import families
from tasks.algorithms.model.shape import ModelShape, shape_of_model


@dataclass(frozen=True)
class Matrix:
    """One matrix [out, in].

    Attributes:
        name: its full name, such as "model.layers.0.self_attn.q_proj".
        module: what holds its weight; several matrices may share one.
        rows: those of the module's outputs that are the matrix's; None: all.
        transposed: the module keeps [in, out].
    """

    name: str
    module: nn.Module
    rows: slice | None = None
    transposed: bool = False

    @property
    def weight(self) -> Tensor:
        """The weight [out, in] without gradient, in the module's memory: writing into it changes the model."""
        return self.seen(self.module.weight.detach())

    def seen(self, tensor: Tensor) -> Tensor:
        """Return the matrix's [out, in] of a tensor that lies as the module's weight does, such as its gradient."""
        tensor = tensor.T if self.transposed else tensor  # [out, in]
        return tensor if self.rows is None else tensor[self.rows]

    @property
    def bias(self) -> Tensor | None:
        """The bias [out], sharing memory with the module; None where the module has none."""
        bias = getattr(self.module, "bias", None)
        return None if bias is None else bias.detach()[self.rows or slice(None)]

    @property
    def shape(self) -> tuple[int, int]:
        """The sides (out, in)."""
        return tuple(self.weight.shape)

    def set(self, weight: Tensor) -> None:
        """Replace all of it by `weight` [out, in], in the module's data type and on its device."""
        self.weight.copy_(weight)


def by_block(model: nn.Module) -> list[dict[str, Matrix]]:
    """Return, per block, full name -> matrix in running order.

    Raises:
        InputError: the model's family isn't supported.
    """
    family = families.of_model(model)
    shape = shape_of_model(model) if family.projections else None
    return [
        dict(_matrices(block, f"{family.blocks}.{index}", family, shape))
        for index, block in enumerate(families.blocks(model))
    ]


def of_model(model: nn.Module) -> dict[str, Matrix]:
    """Return full name -> matrix over all blocks, in running order; neither embedding nor head.

    Raises:
        InputError: the model's family isn't supported.
    """
    return {name: matrix for block in by_block(model) for name, matrix in block.items()}


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return full name -> weight [out, in] of every matrix, sharing memory with the model."""
    return {name: matrix.weight for name, matrix in of_model(model).items()}


def _matrices(
    block: nn.Module, prefix: str, family: families.Family, shape: ModelShape | None
) -> Iterator[tuple[str, Matrix]]:
    for short in family.linears:
        place = family.projection(short)
        rows = None
        if place.parts is not None:
            # a fused weight stacks its parts along the outputs: [sum of sides, in]
            sides = [shape.sides[name] for name in place.parts]
            start = sum(sides[: place.part])
            rows = slice(start, start + sides[place.part])
        name = f"{prefix}.{short}"
        yield name, Matrix(name, block.get_submodule(place.module), rows, place.transposed)
