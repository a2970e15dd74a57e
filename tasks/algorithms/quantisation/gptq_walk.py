"""GPTQ of all linears of a model, block after block: each is calibrated on what the quantised ones before it give.

In a block the linears are quantised in groups that see the same input (`input_groups`), such as (q k v), (o),
(gate up), (down); the quantised block's outputs are the next one's inputs, as in the code of the GPTQ paper (arXiv
2210.17323). A group shares one Hessian, and one inverse of it. Windows run one by one, and their moments are added in
this order, in float32. A linear is packed as soon as it is quantised; what is packed goes to the caller and isn't held.

What is done with one group is `tasks.algorithms.quantisation.masked_gptq`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import checkpoints, layers, matrices
from tasks.algorithms.model.input_groups import InputGroups
from tasks.algorithms.model.matrices import Matrix
from tasks.algorithms.model.shape import shape_of_model
from tasks.algorithms.quantisation import masked_gptq, packed_linear
from tasks.algorithms.quantisation.masked_gptq import PLAIN, Settings

BATCH = 1
"""Windows per forward pass: no effect on the result beyond rounding, and no parameter."""
STRIP = 256
"""Rows of a Hessian that are computed at once; no effect on the result (MKL sums up each value alike)."""


@dataclass(frozen=True)
class Quantised:
    """This is what became of one linear.

    Attributes:
        tensors: packed, by their names in a gptqmodel checkpoint (`packed_linear`).
        error: ||X W^T - X Q^T||_F / ||X W^T||_F on the calibration inputs X, which earlier quantised layers produced.
        damp: share of the Hessian's mean diagonal that was added; above the one asked for where that was too small.
        keep: bool [out_features, in_features], the mask where `Settings.joint` chose one.
    """

    tensors: dict[str, Tensor]
    error: float
    damp: float
    keep: Tensor | None = None


Done = Callable[[str, Quantised], None]
"""Called after each linear, in running order, with its full name."""


def quantise(
    model: nn.Module,
    input_ids: Tensor,
    keep: Mapping[str, Tensor],
    config: Any,
    done: Done,
    settings: Settings = PLAIN,
    saved: checkpoints.Saved = checkpoints.NOTHING,
) -> Tensor:
    """Quantise the linears of a dense model in place; its blocks may be kept elsewhere, and are changed while open.

    Args:
        model: a causal language model of a supported family.
        input_ids: [windows, length]; every token counts, in this order.
        keep: full name -> bool [out_features, in_features], True where kept; linears without one are not pruned.
        config: gptqmodel's QuantizeConfig.
        saved: linears that it holds are taken from it, others are saved to it.

    Returns:
        The last quantised block's outputs [windows, length, hidden], before the final norm.

    Raises:
        InputError: as `masked_gptq.quantise`; a mask of no linear; windows longer than the model's positions; `joint`
            with an order of columns.
    """
    if settings.joint and (config.desc_act or config.act_group_aware):
        raise InputError("gptq.joint counts consecutive inputs, in their own order: set gptq.act_order to none")
    length, limit = input_ids.shape[1], shape_of_model(model).context
    if limit is not None and length > limit:
        raise InputError(f"calibrate.length = {length}, but the model has {limit} positions: choose at most {limit}")
    by_block = matrices.by_block(model)
    unknown = sorted(set(keep) - {name for block in by_block for name in block})
    if unknown:
        raise InputError(f"there is a mask for {unknown[0]}, which the model does not have: run the stage wanda again")
    block_of = _Block(keep, config, settings, saved, done)
    return layers.walk(
        model, input_ids, lambda index, block, inputs: block_of.quantise(by_block[index], block, inputs), BATCH
    )


class _Block:
    """It quantises the linears of one block at a time."""

    def __init__(
        self, keep: Mapping[str, Tensor], config: Any, settings: Settings, saved: checkpoints.Saved, done: Done
    ) -> None:
        self.keep, self.config, self.settings, self.saved, self.done = keep, config, settings, saved, done

    def quantise(self, linears: Mapping[str, Matrix], block: nn.Module, inputs: layers.BlockInputs) -> None:
        """Quantise all in place, and put the block's outputs in the place of its inputs."""
        known = {name: entry for name in linears if (entry := self.saved.load(name))}
        if len(known) == len(linears):  # the walk runs the block
            for name, matrix in linears.items():
                self._recall(name, matrix, known.pop(name))
            return
        groups = InputGroups(linears, block, inputs)
        for number, names in enumerate(groups.names):
            new = {name: linears[name] for name in names if name not in known}
            found = self._solve(new, _hessian(groups, number)) if new else {}
            for name in names:
                if name in found:
                    self._take(name, linears[name], found.pop(name))
                else:
                    self._recall(name, linears[name], known.pop(name))
        groups.carry()

    def _solve(self, linears: Mapping[str, Matrix], hessian: Tensor) -> dict[str, masked_gptq.Answer]:
        weights = {name: matrix.weight for name, matrix in linears.items()}
        keep = {name: self.keep[name] for name in linears if name in self.keep}
        return masked_gptq.quantise(weights, hessian, self.config, self.settings, keep)

    def _take(self, name: str, matrix: Matrix, answer: masked_gptq.Answer) -> None:
        """Put a new answer in the linear's place."""
        matrix.set(answer.quantised)
        bits = masked_gptq.bits(self.config, name)
        tensors = packed_linear.pack(*answer[:4], bits, self.config)
        keep = {} if answer.keep is None else {"keep": answer.keep.cpu()}
        self.saved.save(name, tensors | keep, {"error": answer.error, "damp": answer.damp})
        self.done(name, Quantised(tensors, answer.error, answer.damp, keep.get("keep")))

    def _recall(self, name: str, matrix: Matrix, entry: checkpoints.Entry) -> None:
        """Put in the linear's place what an interrupted run had found."""
        keep = entry.tensors.pop("keep", None)
        matrix.set(packed_linear.unpack(entry.tensors))
        self.done(name, Quantised(entry.tensors, keep=keep, **entry.values))


def _hessian(groups: InputGroups, number: int) -> Tensor:
    """Sum up 2 X^T X / tokens over all windows, of a group's inputs X: float32 [in_features, in_features]."""
    total, tokens = None, 0

    def see(x: Tensor) -> None:
        nonlocal total, tokens
        if total is None:
            total = x.new_zeros(x.shape[-1], x.shape[-1], dtype=torch.float32)
        for window in x.float():  # [length, in_features]
            for rows in _strips(total):  # of its symmetric halves one is computed
                total[rows, rows.start :] += window[:, rows].T @ window[:, rows.start :]
            tokens += len(window)

    groups.observe(number, see)
    for rows in _strips(total):
        total[rows.stop :, rows] = total[rows, rows.stop :].T
    return total.mul_(2.0 / tokens)


def _strips(matrix: Tensor) -> Iterator[slice]:
    """Yield the rows of the matrix in strips."""
    for start in range(0, len(matrix), STRIP):
        yield slice(start, min(start + STRIP, len(matrix)))
