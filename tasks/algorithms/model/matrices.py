"""A model's prunable matrices, each seen as [out, in], in the module that holds it.

A `Matrix` is a view: it shares memory with the module's weight, so an algorithm reads and writes it in place. Modules
that keep their weight as [in, out] (transformers' Conv1D) are linears by the time that a model comes here
(`tasks.models.skeleton`), and a fused qkv is one matrix: its parts have the same inputs. It holds no copy and quantises
nothing; modules of quantised models have no weight to see.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from tasks.algorithms.model import families


@dataclass(frozen=True)
class Matrix:
    """One matrix [out, in].

    Attributes:
        name: its full name, such as "model.layers.0.self_attn.q_proj".
        module: what holds its weight.
    """

    name: str
    module: nn.Module

    @property
    def weight(self) -> Tensor:
        """The weight [out, in] without gradient, in the module's memory: writing into it changes the model."""
        return self.module.weight.detach()

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
    return [
        {name: Matrix(name, module) for name, module in block.items()} for block in families.linears_by_block(model)
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
