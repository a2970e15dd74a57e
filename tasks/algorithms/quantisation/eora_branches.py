"""A low-rank branch beside every compressed linear of a model, computed block by block, and how it is stored.

Its mathematics is EoRA's (`tasks.algorithms.quantisation.eora`). Factors may be stored in few bits
(`tasks.algorithms.quantisation.rounding`): B is then fitted again to the rounded A.

Nothing is trained, and nothing is merged: B A would fill the pruned zeros, so it stays a branch at run time. The
branch's directions don't know of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tasks.algorithms.model import checkpoints, layers, matrices
from tasks.algorithms.quantisation import eora, output_error, rounding

Done = Callable[[str, float], None]
"""Called after each linear with its name and an error: the one left, or the one that there is."""

GROUP_SIZE = 64
"""Values of a factor's row that share a scale, at most. Of 4 bits, 32 bought less per byte: the scales cost ranks."""
HALF = 16
"""Bits of factors that are not quantised."""


class Size(NamedTuple):
    """This says how large branches are to be.

    Attributes:
        rank: of every branch, or full module name -> rank (`tasks.algorithms.quantisation.eora_ranks`).
        bits: of the stored factors: 16 (float16) or 4 and 8 (groups of `group_size` along the rows of A and of B^T).
    """

    rank: int | Mapping[str, int]
    bits: int = HALF

    def of(self, name: str) -> int:
        """The rank of one linear's branch."""
        return self.rank if isinstance(self.rank, int) else self.rank[name]


class Branch(NamedTuple):
    """This is the branch of one linear, x -> x A^T B^T, and what it is good for.

    Attributes:
        a: float16 [rank, in_features], the values that are computed with. The rank may be 0.
        b: float16 [out_features, rank], likewise.
        coded: the codes of A and of B^T [rank, out_features], whose values a and b are; None at 16 bits or rank 0.
        error_before: ||X (W - W')^T||_F / ||X W^T||_F on the calibration inputs X of the compressed model.
        error_after: the same for W' + B A, with A and B as they are stored.
    """

    a: Tensor
    b: Tensor
    coded: tuple[rounding.Coded, rounding.Coded] | None
    error_before: float
    error_after: float


def compensate(
    model: nn.Module,
    input_ids: Tensor,
    teacher: Mapping[str, Tensor],
    size: Size,
    done: Done | None = None,
    saved: checkpoints.Saved = checkpoints.NOTHING,
    entered: Callable[[], None] | None = None,
) -> dict[str, Branch]:
    """Compute a branch for every linear of the blocks, on the inputs that it gets when all before it are compensated.

    Args:
        model: the compressed model with ordinary float32 linears. Changed: the branches are added to its weights.
        input_ids: [windows, length]; every token counts.
        teacher: full module name (of `model`) -> weight [out_features, in_features] to come close to.
        saved: what it holds of an interrupted run isn't computed again.
        entered: as for `layers.walk`.

    Raises:
        InputError: rank above the smaller side of a linear, or a teacher's weight of another shape.
    """
    branches: dict[str, Branch] = {}

    def visit(index: int, block: nn.Module, inputs: layers.BlockInputs) -> None:
        # Linear by linear, each on inputs that the compensated ones before it in the block produced.
        left = dict(matrices.by_block(model)[index])
        known: dict[str, Tensor] = {}  # moments that are still those of the block as it is
        for name in list(left):
            if before := saved.load(name):
                branches[name] = _recalled(before, left[name].weight.device)
            else:
                # Where no weight changes any more, the pass that measures is the walk's own.
                carry = not inputs.carried and not any(size.of(other) for other in left)
                known = known if name in known else output_error.second_moments(left, block, inputs, carry)
                weights = left[name].weight, teacher[name]
                branches[name] = _branch(name, *weights, known[name], size.of(name), size.bits)
                saved.save(name, *_noted(branches[name]))
            moments, matrix = known.pop(name, None), left.pop(name)
            if len(branches[name].a):
                # Later linears get the inputs of the compensated model; the caller stores the branch, not this sum.
                matrix.weight.add_(branches[name].b.float() @ branches[name].a.float())
                known = {other: each for other, each in known.items() if each is moments}  # of the same inputs
            if done:
                done(name, branches[name].error_after)

    layers.walk(model, input_ids, visit, entered=entered)
    return branches


def rank_bytes(shape: tuple[int, int], bits: int) -> int:
    """Count the bytes of one rank of a linear's branch: codes and float16 scales, or float16 values.

    Args:
        shape: (out_features, in_features).
        bits: 4, 8 or 16; codes of a factor's row fill whole bytes.
    """
    if bits == HALF:
        return 2 * sum(shape)
    # Each rank is a row of A [in_features] and one of B^T [out_features], in whole bytes, and a scale per group.
    return sum(-(-side * bits // 8) + 2 * (side // group_size(side)) for side in shape)


def group_size(length: int) -> int:
    """Find the largest divisor of a row's length that is at most GROUP_SIZE."""
    return max(size for size in range(1, GROUP_SIZE + 1) if length % size == 0)


def _branch(name: str, weight: Tensor, wanted: Tensor, moments: Tensor, rank: int, bits: int) -> Branch:
    """Compute the branch of one linear, and the errors before and after it."""
    delta = eora.lost(name, weight, wanted)  # D, [out_features, in_features]
    if not rank:
        error = output_error.relative_error(delta, wanted, moments)
        return Branch(
            delta.new_empty(0, delta.shape[1]).half(), delta.new_empty(len(delta), 0).half(), None, error, error
        )
    a, b = eora.factors(delta, moments, rank)
    coded = None
    if bits != HALF:
        # First A, along its rows; then B by what A has become, so that only B's own rounding is left uncompensated.
        coded_a = rounding.quantise(a, bits, group_size(a.shape[1]))
        a = rounding.values(coded_a)
        coded_b = rounding.quantise(eora.refit(delta, moments, a).T.contiguous(), bits, group_size(b.shape[0]))
        b, coded = rounding.values(coded_b).T, (coded_a, coded_b)
    a, b = a.half().contiguous(), b.half().contiguous()
    left = delta - b.float() @ a.float()  # what W' + B A still lacks, with B and A as they are stored
    before, after = (output_error.relative_error(error, wanted, moments) for error in (delta, left))
    return Branch(a, b, coded, before, after)


def _noted(branch: Branch) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Make an entry to be saved of a branch: its tensors and its numbers."""
    tensors = {"a": branch.a, "b": branch.b}
    for side, coded in zip("ab", branch.coded or (), strict=False):
        tensors |= {f"{side}.codes": coded.codes, f"{side}.scales": coded.scales}
    coding = [[coded.bits, coded.group_size] for coded in branch.coded or ()]
    return tensors, {"coding": coding, "errors": [branch.error_before, branch.error_after]}


def _recalled(entry: checkpoints.Entry, device: torch.device) -> Branch:
    """Make the branch again that `_noted` made an entry of, on this device."""
    tensors, values = {name: tensor.to(device) for name, tensor in entry.tensors.items()}, entry.values
    sides = zip("ab", values["coding"], strict=False)
    coded = [rounding.Coded(tensors[f"{side}.codes"], tensors[f"{side}.scales"], *coding) for side, coding in sides]
    return Branch(tensors["a"], tensors["b"], tuple(coded) or None, *values["errors"])
