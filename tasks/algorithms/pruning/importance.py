"""How important each transformer block is, by five scores; higher means more important for every one of them.

- magnitude: sum of |W| over the block's linears (L1 norm).
- taylor: sum of |dL/dW * W| over the block's linears, L the mean causal-LM loss of the windows (first-order Taylor
  expansion; Kim et al. 2024, arXiv 2402.02834). One backward pass; the gradient is summed over the windows first.
- perplexity: the windows' perplexity without the block minus that of the whole model (ibid.).
- block_influence: 1 - mean cosine similarity of the block's input and output, over tokens (Men et al. 2024, ShortGPT,
  arXiv 2403.03853).
- compound: the mean of the block's ranks by the four scores above, 1 = least important; equal scores share the mean of
  their ranks.

Biases, norms and the embedding don't count. It decides nothing (`tasks.algorithms.pruning.depth_prune`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import backward, checkpoints, families, head, layers, matrices
from tasks.algorithms.model.device import beside
from tasks.algorithms.scoring.perplexity import from_nll

Score = Callable[[nn.Module, Tensor, int, checkpoints.Saved], Tensor]
"""(model, input_ids [windows, length], windows per pass, what an interrupted run had computed) -> float64 [blocks]."""


def magnitude(
    model: nn.Module, input_ids: Tensor, batch: int = 1, saved: checkpoints.Saved = checkpoints.NOTHING
) -> Tensor:
    """Sum |W| over each block's linears, float64 [blocks]; the windows play no part."""
    return torch.tensor(
        [
            _magnitude(block, inside)
            for block, inside in zip(families.blocks(model), matrices.by_block(model), strict=True)
        ],
        dtype=torch.float64,
    )


def _magnitude(block: nn.Module, inside: Mapping[str, matrices.Matrix]) -> float:
    with layers.opened(block):
        return sum(float(matrix.weight.double().abs().sum()) for matrix in inside.values())


def taylor(
    model: nn.Module, input_ids: Tensor, batch: int = 1, saved: checkpoints.Saved = checkpoints.NOTHING
) -> Tensor:
    """Sum |gradient * weight| over each block's linears, float64 [blocks].

    Blocks are gone through backward one by one (`tasks.algorithms.model.backward`): of one there are gradients and
    activations, of all the hidden states between them.
    """
    predictions = input_ids[:, 1:].numel()
    scores: list[float] = []  # from the last block to the first
    begun = saved.load("gradients")
    if begun:
        scores = begun.values
    inside = matrices.by_block(model)

    def loss(ids: Tensor, rows: slice, logits: Tensor) -> Tensor:
        # the batch's share of the mean loss: its sum over the predictions of all windows
        following = nn.functional.pad(ids[:, 1:], (0, 1), value=-1).flatten()  # -1: nothing follows a last token
        summed = nn.functional.cross_entropy(logits.float(), following[rows], ignore_index=-1, reduction="sum")
        return summed / predictions

    def visit(index: int, _: nn.Module, back: backward.Back) -> None:
        gradients = back([matrix.module.weight for matrix in inside[index].values()])
        # |L(W = 0) - L(W)| to first order, weight by weight: |dL/dW * W|.
        scores.append(
            sum(
                float((gradient * matrix.weight).double().abs().sum())
                for gradient, matrix in zip(gradients, inside[index].values(), strict=True)
            )
        )

    def reached(here: backward.Reached) -> None:
        if saved.due():
            saved.save("gradients", {"gradient": here.gradient}, scores)

    came_to = backward.Reached(len(inside) - 1 - len(scores), begun.tensors["gradient"]) if begun else None
    backward.backward(model, input_ids, loss, visit, batch, came_to, reached)
    return torch.tensor(scores[::-1], dtype=torch.float64)


def perplexity(
    model: nn.Module, input_ids: Tensor, batch: int = 1, saved: checkpoints.Saved = checkpoints.NOTHING
) -> Tensor:
    """Measure how much perplexity rises without each block, float64 [blocks]; negative where the model gets better.

    Up to block i, the model without block i is the whole one, so each of the shorter models starts where it differs: L
    blocks take L (L + 1) / 2 passes through a block in the place of L^2. Of one batch of windows at a time, hidden
    states of L + 1 models are held.
    """
    begun = saved.load("nll")
    found = [begun.tensors["nll"]] if begun else []  # [1 + blocks, windows, length - 1] each: the whole one is the last
    done = begun.values if begun else 0
    for ids in beside(model, input_ids).long().split(batch)[done:]:
        found.append(_nll_without_each(model, ids))
        done += 1
        if saved.due():
            saved.save("nll", {"nll": torch.cat(found, dim=1)}, done)
    *without, whole = [from_nll(each, input_ids.shape[1]) for each in torch.cat(found, dim=1)]
    return torch.tensor([each - whole for each in without], dtype=torch.float64)


def _nll_without_each(model: nn.Module, ids: Tensor) -> Tensor:
    """Negative log-likelihoods of one batch: without each block, and at last of the whole model, as `perplexity`."""
    shorter: list[Tensor] = []  # of the models without a block before this one: [batch, length, hidden] each

    def visit(_: int, block: nn.Module, inputs: layers.BlockInputs) -> None:
        bypassed = inputs.hidden.clone()
        for hidden in (*shorter, inputs.hidden):
            layers.BlockInputs(hidden, inputs.calls, inputs.batch).carry(block)
        inputs.carried = True
        shorter.append(bypassed)

    whole, following = layers.walk(model, ids, visit, len(ids)), ids.roll(-1, dims=1)
    every = [head.nats_after(model, hidden, following)[:, :-1].double().cpu() for hidden in (*shorter, whole)]
    return torch.stack(every)


def block_influence(
    model: nn.Module, input_ids: Tensor, batch: int = 1, saved: checkpoints.Saved = checkpoints.NOTHING
) -> Tensor:
    """Compute 1 - the mean cosine of a token's input and output, float64 [blocks], from 0 to 2: ShortGPT's BI.

    It takes one forward pass.
    """
    begun = saved.load("scores")
    scores: list[float] = begun.values if begun else []

    def visit(index: int, block: nn.Module, inputs: layers.BlockInputs) -> None:
        if index < len(scores):
            return
        similarities: list[float] = []

        def see(before: Tensor, after: Tensor) -> None:
            # [batch, length]: 1 where the block only scales what the residual stream carries.
            similarities.append(float(torch.cosine_similarity(before.double(), after.double(), dim=-1).sum()))

        inputs.carry(block, see)
        scores.append(1 - sum(similarities) / inputs.hidden[..., 0].numel())
        if saved.due():
            saved.save("scores", {}, scores)

    layers.walk(model, input_ids, visit, batch)
    return torch.tensor(scores, dtype=torch.float64)


def ranks(scores: Tensor) -> Tensor:
    """Rank scores from 1 = lowest, float64 [n]; equal scores share the mean of their ranks."""
    # Equal ones take the ranks below + 1 to below + equal, whose mean is this.
    below = (scores[None, :] < scores[:, None]).sum(dim=1)
    equal = (scores[None, :] == scores[:, None]).sum(dim=1)
    return below.double() + (equal.double() + 1) / 2


def combine(scores: dict[str, Tensor]) -> Tensor:
    """Make `compound` of the other scores: the mean of their ranks, float64 [blocks]."""
    return torch.stack([ranks(scores[name]) for name in SCORES]).mean(dim=0)


SCORES: dict[str, Score] = {
    "magnitude": magnitude,
    "taylor": taylor,
    "perplexity": perplexity,
    "block_influence": block_influence,
}
COMPOUND = "compound"


def parts(method: str) -> tuple[str, ...]:
    """The scores that a method is made of: itself, or all of them for `compound`."""
    return tuple(SCORES) if method == COMPOUND else (method,)


def score(
    model: nn.Module, input_ids: Tensor, method: str, batch: int = 1, saved: checkpoints.Saved = checkpoints.NOTHING
) -> Tensor:
    """Score the blocks by one of the methods, float64 [blocks].

    Args:
        input_ids: [windows, length].
        method: a key of `SCORES`, or `compound`.
        saved: what it holds of an interrupted run isn't computed again.

    Raises:
        InputError: a score isn't finite.
    """
    if method == COMPOUND:
        return combine({name: score(model, input_ids, name, batch, saved) for name in SCORES})
    saved = saved.part(method)
    if before := saved.load("score"):
        return before.tensors["score"]
    values = SCORES[method](model, input_ids, batch, saved)
    if not values.isfinite().all():
        broken = (~values.isfinite()).nonzero().flatten().tolist()
        raise InputError(f"the {method} score of layers {broken} is not finite: mend the model or take another method")
    saved.save("score", {"score": values})
    return values
