"""How much quantising one linear changes the model's answers: the KL divergence it causes alone, per linear and width.

The divergence of the next-token distributions, as HAWQ's perturbation of the loss (Dong et al., arXiv 1905.03696) but
measured instead of approximated by a Hessian. `tasks.algorithms.quantisation.allocation` turns it into bits per linear;
that the divergences of several linears add up is its assumption, and what quantising them together does isn't measured
here.

One width of each linear is measured. A small change of a block's outputs costs a divergence that is quadratic in it, so
the other widths' divergences are that one's, as the squared errors of the block's outputs are to each other (README:
what this loses).

A linear's measurement restarts at its own block, from the activations there: in a model of L blocks linears cost L / 2
blocks on average, and those of the last block one. All linears of a block go through the later blocks side by side, so
that one block is needed at a time and may be kept elsewhere; it is opened once for each block before it. Activations
[windows, length, hidden] are held of each of them: at 8B (hidden 4096, float32) 8 MiB per window of 512 each, and a few
windows are meant. The model needs no gradients and is the same afterwards, bit by bit.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tasks.algorithms.model import checkpoints, families, head, layers, matrices
from tasks.algorithms.model.matrices import Matrix

POSITIONS = 128
"""Positions whose logits are computed at once: float32 over a vocabulary of 128k they are 66 MB."""
COMPARED = 2**17
"""Logits that are compared at once: few enough for a processor's cache (six times as fast as 128 x 49,152 of them)."""

Quantise = Callable[[str, Tensor, int], Tensor]
"""(linear's full name, weight [out, in], bits) -> dequantised weight [out, in]."""
Done = Callable[[int], None]
"""Called after each linear with the number of linears measured so far."""


def measure(
    model: nn.Module,
    input_ids: Tensor,
    quantise: Quantise,
    widths: Sequence[int],
    measured_width: int,
    done: Done | None = None,
    batch: int = 1,
    saved: checkpoints.Saved = checkpoints.NOTHING,
) -> dict[str, dict[int, float]]:
    """Measure KL(original || model with this linear quantised), averaged over all positions, in nats per token.

    Args:
        model: a causal language model of a supported family, in evaluation mode.
        input_ids: [windows, length], all tokens count.
        quantise: must not change the weight it gets.
        widths: the bits to try, the fewest first.
        measured_width: the one of them that is measured; of a linear that it leaves as it is, the fewest bits are.
        batch: windows per forward pass; no effect on the result beyond rounding.
        saved: linears that it holds aren't measured again.

    Returns:
        full module name -> bits -> divergence, in the order in which the linears run.

    Raises:
        InputError: the model's family isn't supported.
    """
    # One walk of the unchanged model, for its outputs and for how each block is called: [windows, length, hidden].
    calls: list[Mapping[int, layers.Call]] = []
    last = layers.walk(model, input_ids, lambda index, block, inputs: calls.append(inputs.calls), batch)
    blocks, by_block = families.blocks(model), matrices.by_block(model)
    before = saved.load("measured")
    measured = {name: dict(found) for name, found in before.values} if before else {}
    reported = 0

    def visit(index: int, block: nn.Module, inputs: layers.BlockInputs) -> None:
        nonlocal reported
        names = list(by_block[index])
        if names[0] not in measured:  # a block's linears are all saved at once
            changes = _changes(block, inputs, by_block[index], quantise, (measured_width, *widths))
            for later, call in zip(blocks[index + 1 :], calls[index + 1 :], strict=True):
                with layers.opened(later):
                    for change in changes:
                        layers.BlockInputs(change.states, call, inputs.batch).carry(later)
            found = _divergences(model, last, [change.states for change in changes], inputs)
            for name, change, divergence in zip(names, changes, found, strict=True):
                measured[name] = {bits: divergence * change.shares[bits] for bits in widths}
            if saved.due():
                saved.save("measured", {}, [(each, list(found.items())) for each, found in measured.items()])
        for _ in names if done else ():
            reported += 1
            done(reported)

    layers.walk(model, input_ids, visit, batch)
    return measured


class _Change(NamedTuple):
    """What quantising one linear does to its block.

    Attributes:
        states: the block's outputs [windows, length, hidden] at the width that is measured.
        shares: width -> squared error of the block's outputs, in units of that width's.
    """

    states: Tensor
    shares: dict[int, float]


def _changes(
    block: nn.Module,
    inputs: layers.BlockInputs,
    linears: Mapping[str, Matrix],
    quantise: Quantise,
    widths: Sequence[int],
) -> list[_Change]:
    """What quantising each linear alone does; carries the inputs, which are the unchanged model's, to the outputs."""
    unchanged = _outputs(block, inputs)  # [windows, length, hidden], as each of the states
    found = [
        _change(block, inputs, unchanged, matrix, functools.partial(quantise, name), widths)
        for name, matrix in linears.items()
    ]
    inputs.hidden.copy_(unchanged)
    inputs.carried = True
    return found


def _change(
    block: nn.Module,
    inputs: layers.BlockInputs,
    unchanged: Tensor,
    matrix: Matrix,
    quantise: Callable[[Tensor, int], Tensor],
    widths: Sequence[int],
) -> _Change:
    """What each width of one of the block's matrices does to the block's outputs; `inputs.hidden` stays.

    Args:
        unchanged: the outputs with all weights as they are, [windows, length, hidden].
        widths: the one to measure before all others; if it changes nothing, the next is measured.
    """
    errors: dict[int, float] = {}
    first, states = 0.0, unchanged
    for bits in widths:
        if bits in errors:
            continue
        with _replaced(matrix, quantise(matrix.weight, bits)):
            outputs = _outputs(block, inputs)
        errors[bits] = float((outputs - unchanged).double().square().sum())
        if not first:
            first, states = errors[bits], outputs
    return _Change(states, {bits: error / first if first else 0.0 for bits, error in errors.items()})


def _outputs(block: nn.Module, inputs: layers.BlockInputs) -> Tensor:
    """The block's outputs as its weights are now, [windows, length, hidden]."""
    outputs = torch.empty_like(inputs.hidden)
    for where, output in inputs.outputs(block):
        outputs[where] = output
    return outputs


@contextlib.contextmanager
def _replaced(matrix: Matrix, weight: Tensor) -> Iterator[None]:
    """Within this context the matrix has another weight [out, in]."""
    if tuple(weight.shape) != matrix.shape:
        raise ValueError(f"quantise returned {tuple(weight.shape)} for a weight of {matrix.shape}")
    original = matrix.weight.clone()
    matrix.set(weight)
    try:
        yield
    finally:
        matrix.set(original)


def _divergences(model: nn.Module, last: Tensor, changed: Sequence[Tensor], inputs: layers.BlockInputs) -> list[float]:
    """Average KL per position between the distributions after the last block's outputs `last` and each of `changed`."""
    said = head.of(model)
    totals = [0.0] * len(changed)
    with torch.no_grad():
        for where in inputs.batches():
            parts = [tensor[where].flatten(0, 1).split(POSITIONS) for tensor in (last, *changed)]
            for before, *after in zip(*parts, strict=True):  # [positions, hidden] each
                logits = said(head.finished(model, before))  # [positions, vocabulary]
                p = logits.softmax(dim=-1)
                for index, hidden in enumerate(after):
                    totals[index] += _summed_divergence(p, said(head.finished(model, hidden)).sub_(logits))
    # rounding can make a divergence of nothing negative
    return [max(0.0, total / last[..., 0].numel()) for total in totals]


def _summed_divergence(p: Tensor, moved: Tensor) -> float:
    """Sum KL(P || Q) over positions, of P [positions, vocabulary] and logits that moved by so much; `moved` is used up.

    With z_q = z_p + d and c = sum of p d, KL = log(sum of p exp(d - c)): sum of P (log P - log Q) would be a difference
    of logarithms, which float32 rounds by as much as 8 bits change them.
    """
    total, rows = 0.0, max(1, COMPARED // p.shape[1])
    for part, d in zip(p.split(rows), moved.split(rows), strict=True):
        d -= (part * d).sum(dim=-1, keepdim=True, dtype=torch.float64)
        # exp(x) - 1 - x instead of exp(x) - 1: the p-weighted mean of x is 0, but for its rounding
        total += float((part * d.expm1().sub_(d)).sum(dim=-1, dtype=torch.float64).log1p().sum())
    return total
