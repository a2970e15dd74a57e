"""How much quantising one linear changes the model's answers: the KL divergence it causes alone, per linear and width.

The divergence of the next-token distributions, as HAWQ's perturbation of the loss (Dong et al., arXiv 1905.03696) but
measured instead of approximated by a Hessian. `tasks.algorithms.quantisation.allocation` turns it into bits per linear;
that the divergences of several linears add up is its assumption, and what quantising them together does isn't measured
here.

A linear's measurement restarts at its own block, from the activations there: in a model of L blocks linears cost L / 2
blocks on average, and those of the last block one. Two activations [windows, length, hidden] are held besides the one
that is computed, at 8B (hidden 4096, float32) 8 MiB per window of 512 each: a few windows are meant. The model needs no
gradients and is the same afterwards, bit by bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from tasks.algorithms.model import checkpoints, families, layers, matrices
from tasks.algorithms.model.matrices import Matrix

POSITIONS = 128
"""Positions whose distributions are compared at once: float64 over a vocabulary of 128k they are 131 MB."""

Quantise = Callable[[str, Tensor, int], Tensor]
"""(linear's full name, weight [out, in], bits) -> dequantised weight [out, in]."""
Done = Callable[[int], None]
"""Called after each linear with the number of linears measured so far."""


def measure(
    model: nn.Module,
    input_ids: Tensor,
    quantise: Quantise,
    widths: Sequence[int],
    done: Done | None = None,
    batch: int = 1,
    saved: checkpoints.Saved = checkpoints.NOTHING,
) -> dict[str, dict[int, float]]:
    """Measure KL(original || model with this linear quantised), averaged over all positions, in nats per token.

    Args:
        model: a causal language model of a supported family, in evaluation mode.
        input_ids: [windows, length], all tokens count.
        quantise: must not change the weight it gets.
        widths: the bits to try.
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
    known = {name: dict(found) for name, found in before.values} if before else {}
    measured: dict[str, dict[int, float]] = {}

    def visit(index: int, block: nn.Module, inputs: layers.BlockInputs) -> None:
        for name, matrix in by_block[index].items():
            original = matrix.weight
            measured[name] = known.get(name, {})
            for bits in widths if name not in known else ():
                # `inputs` are the unchanged model's, so that no other linear's error is in what is measured.
                with _replaced(matrix, quantise(name, original, bits)):
                    changed = _continued(blocks[index:], calls[index:], inputs)
                    measured[name][bits] = _divergence(model, last, changed)
            if name not in known and saved.due():
                saved.save("measured", {}, [(each, list(found.items())) for each, found in measured.items()])
            if done:
                done(len(measured))

    layers.walk(model, input_ids, visit, batch)
    return measured


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


def _continued(
    blocks: Sequence[nn.Module], calls: Sequence[Mapping[int, layers.Call]], inputs: layers.BlockInputs
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (windows of the batch, last block's outputs [batch, length, hidden]); `inputs.hidden` stays as it is."""
    for start in range(0, len(inputs.hidden), inputs.batch):
        where = slice(start, min(start + inputs.batch, len(inputs.hidden)))
        hidden = inputs.hidden[where]
        for block, by_batch in zip(blocks, calls, strict=True):
            ((_, hidden),) = layers.BlockInputs(hidden, by_batch, inputs.batch).outputs(block)
        yield where, hidden


def _divergence(model: nn.Module, last: Tensor, changed: Iterator[tuple[slice, Tensor]]) -> float:
    """Average KL per position between the distributions after the last block's outputs `last` and `changed`."""
    described = families.of_model(model)
    norm, head = model.get_submodule(described.final_norm), model.get_submodule(described.head)
    total = 0.0
    with torch.no_grad():
        for where, outputs in changed:
            pairs = zip(last[where].flatten(0, 1).split(POSITIONS), outputs.flatten(0, 1).split(POSITIONS), strict=True)
            for before, after in pairs:  # [positions, hidden]
                # float64: divergences of 8 bit are of the order of float32's rounding of a log-probability.
                p = head(norm(before)).double().log_softmax(dim=-1)  # [positions, vocabulary]
                q = head(norm(after)).double().log_softmax(dim=-1)
                total += float((p.exp() * (p - q)).sum())  # KL(P || Q) = sum of P (log P - log Q), over all positions
    return max(0.0, total / last[..., 0].numel())  # rounding can make a divergence of nothing negative
