"""EoRA: a low-rank branch beside a compressed linear that gives back most of what compression took from its output.

Liu et al., "EoRA: Fine-tuning-free Compensation for Compressed LLM with Eigenspace Low-Rank Approximation"
(arXiv 2410.21271). With the inputs' second moments C = Q L Q^T and the lost weights D = W - W', the rank-r matrix P
that minimises ||X (D - P)^T||_F is the truncated SVD of D Q L^(1/2), projected back with L^(-1/2) Q^T. The mathematics
is gptqmodel's `eora_compute_lora`; its own loop around it is not used, because it takes its teacher from a folder of
the same depth in half precision, and writes files that differ from run to run.

The squared singular values are what each further rank removes of the squared output error. `allocate` spends a budget
of bytes on them across linears; to be comparable they are weighted by what an output error of each linear costs the
prediction (`gains`). Factors may be stored in few bits (`rounding`): B is then fitted again to the rounded A.

Nothing is trained, and nothing is merged: B A would fill the pruned zeros, so it stays a branch at run time. The
branch's directions don't know of the loss, only the budget does.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import checkpoints, families, layers
from tasks.algorithms.quantisation import masked_gptq, rounding

Done = Callable[[str, float], None]
"""Called after each linear with its name and an error: the one left, or the one that there is."""

GROUP_SIZE = 64
"""Values of a factor's row that share a scale, at most. Of 4 bits, 32 bought less per byte: the scales cost ranks."""
HALF = 16
"""Bits of factors that are not quantised."""


class Branch(NamedTuple):
    """The branch of one linear, x -> x A^T B^T, and what it is good for.

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


def factors(delta: Tensor, moments: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The rank-r matrix B A that is closest to `delta` on inputs with these second moments.

    Args:
        delta: [out_features, in_features], teacher's weight minus the compressed one.
        moments: [in_features, in_features], any multiple of X^T X. Directions in which the inputs have no energy
            (eigenvalues below in_features * 1.2e-7 of the largest) get nothing.

    Returns:
        A [rank, in_features] and B [out_features, rank], float32. Of the many pairs with this product it is the one
        where a row of A and its column of B have the same largest magnitude (neither leaves the range of float16), and
        where that of A is positive.

    Raises:
        InputError: rank above the smaller side of the matrix.
    """
    if rank > min(delta.shape):
        raise InputError(
            f"eora.rank = {rank} is above {min(delta.shape)}, the matrix's smaller side: choose a smaller one"
        )
    a, b = masked_gptq.eora_compute_lora(
        w_wq_delta=delta.float(),
        name="",
        eigen_scaling_diag_matrix=moments.double(),
        rank=rank,
        dtype=torch.float32,
        device=delta.device,
    )
    largest = a.gather(1, a.abs().argmax(dim=1, keepdim=True))  # [rank, 1]
    share = (b.abs().amax(dim=0)[:, None] / largest.abs()).sqrt().nan_to_num(1.0, 1.0, 1.0)  # 0 / 0 beyond delta's rank
    share = torch.where(share > 0, share, 1.0) * torch.where(largest < 0, -1.0, 1.0)
    return a * share, b / share.T


def refit(delta: Tensor, moments: Tensor, a: Tensor) -> Tensor:
    """The B [out_features, rank] for which B A is closest to `delta`, given an A that is no longer the best one.

    Weighted least squares, B = D C A^T (A C A^T)^+; float32. At worst it is 0, so a rounded A can't add error.

    Args:
        delta, moments: as for `factors`.
        a: [rank, in_features].
    """
    a, moments = a.double(), moments.double()
    seen = a @ moments  # [rank, in_features]
    return (delta.double() @ seen.T @ torch.linalg.pinv(seen @ a.T, hermitian=True)).float()


def spectrum(delta: Tensor, moments: Tensor) -> Tensor:
    """What each further rank of `factors` removes of ||X delta^T||_F^2: float64 [smaller side], falling.

    Their sum is all of it, where `moments` is X^T X.
    """
    eigenvalues, vectors = torch.linalg.eigh(moments.double())
    return torch.linalg.svdvals(delta.double() @ (vectors * eigenvalues.clamp_min(0).sqrt())).square()


def curvature(
    model: nn.Module, input_ids: Tensor, memory: checkpoints.Memory = checkpoints.NOTHING
) -> dict[str, float]:
    """How much a linear's output errors change the prediction: the trace of its outputs' Fisher information per output.

    An error e [tokens, out_features] whose directions are random changes the predicted distributions by about
    curvature * ||e||_F^2 / 2 (KL divergence, nats, summed over tokens). The gradients are those of labels that the
    model draws itself, which makes it the true Fisher information and not the empirical one of the corpus.

    Args:
        model: with ordinary linears in its blocks, in evaluation mode; left as it was.
        input_ids: [windows, length]; windows run one by one, so that one's activations are held.
        memory: what it holds of an interrupted run isn't computed again.

    Returns:
        Full module name -> squared gradient of the summed loss, averaged over outputs and tokens.
    """
    squares = dict.fromkeys(families.block_linears(model), 0.0)
    generator = torch.Generator().manual_seed(0)  # the labels are part of the method: the same in every run
    first = 0
    if begun := memory.load("curvature"):
        first, squares = begun.values
        generator.set_state(begun.tensors["generator"])

    def watch(name: str) -> Callable[..., None]:
        def add(gradient: Tensor) -> None:
            squares[name] += float(gradient.double().square().mean(dim=-1).sum())

        def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            output.register_hook(add)

        return hook

    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)  # gradients of outputs alone
    handles = [model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_())]
    handles += [linear.register_forward_hook(watch(name)) for name, linear in families.block_linears(model).items()]
    try:
        with torch.enable_grad():
            for done, ids in enumerate(input_ids.split(1)[first:], start=first + 1):
                logits = model(input_ids=ids, use_cache=False).logits.float().flatten(0, 1)  # [length, vocabulary]
                labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(1)
                nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
                if memory.due():
                    memory.save("curvature", {"generator": generator.get_state()}, [done, squares])
    finally:
        for handle in handles:
            handle.remove()
        for parameter, required in before.items():
            parameter.requires_grad_(required)
    return {name: square / input_ids.numel() for name, square in squares.items()}


def gains(
    model: nn.Module,
    input_ids: Tensor,
    teacher: Mapping[str, Tensor],
    done: Done | None = None,
    memory: checkpoints.Memory = checkpoints.NOTHING,
) -> dict[str, Tensor]:
    """What each rank of each linear's branch is expected to be worth: KL divergence that it removes, nats per token.

    It is the squared output error that the rank removes (exact and additive within a linear), times half the linear's
    `curvature` (an estimate: to second order, errors in random directions, no interaction between linears). Relative
    output errors would not do: they give ranks to linears whose output hardly matters.

    Inputs are those of the compressed model without any branch. Branches are computed in order afterwards, each on
    inputs that the ones before it changed, so that their errors differ a little from what the ranks were chosen by.

    Args:
        model: the compressed model with ordinary float32 linears; left as it was.
        input_ids, teacher, memory: as for `compensate`.

    Returns:
        Full module name -> float64 [smaller side], falling; ranks that remove nothing are 0.

    Raises:
        InputError: a teacher's weight of another shape.
    """
    weights = curvature(model, input_ids, memory)
    found: dict[str, Tensor] = {}

    def visit(index: int, block: nn.Module, inputs: layers.BlockInputs) -> None:
        linears = families.linears_by_block(model)[index]
        if before := memory.load(f"gains{index}"):
            found.update(before.tensors)
            for name, error in before.values.items() if done else ():
                done(name, error)
            return
        errors = {}
        for name, moments in _second_moments(linears, block, inputs).items():
            delta = _delta(name, linears[name].weight, teacher[name])
            found[name] = spectrum(delta, moments) * weights[name] / (2 * input_ids.numel())
            errors[name] = masked_gptq.relative_error(delta, teacher[name], moments)
            if done:
                done(name, errors[name])
        memory.save(f"gains{index}", {name: found[name] for name in linears}, errors)

    layers.walk(model, input_ids, visit)
    return {name: found[name] for name in teacher}


def allocate(worth: Mapping[str, Tensor], sizes: Mapping[str, int], budget: int) -> dict[str, int]:
    """Ranks that fit a budget, by what they are worth per byte; a linear's rank may be 0.

    The next rank is always the one that is worth most per byte among those that still fit. As a linear's ranks are
    worth less and less, that is optimal where all sizes are equal, and else short of it by less than one rank.

    Args:
        worth: name -> [ranks], falling (`gains`); a rank that is worth nothing is not bought.
        sizes: name -> bytes of one rank (`rank_bytes`).
        budget: bytes.

    Returns:
        name -> rank, in the order of `worth`.
    """
    ranks = dict.fromkeys(worth, 0)
    values = {name: gain.tolist() for name, gain in worth.items()}
    places = {name: place for place, name in enumerate(worth)}  # settles ties
    heap = [(-value[0] / sizes[name], places[name], name) for name, value in values.items()]
    heapq.heapify(heap)
    while heap:
        _, _, name = heapq.heappop(heap)
        rank = ranks[name]
        if values[name][rank] <= 0 or sizes[name] > budget:
            continue
        ranks[name], budget = rank + 1, budget - sizes[name]
        if rank + 1 < len(values[name]):
            heapq.heappush(heap, (-values[name][rank + 1] / sizes[name], places[name], name))
    return ranks


def rank_bytes(shape: tuple[int, int], bits: int) -> int:
    """Bytes of one rank of a linear's branch: codes of `bits` bits and float16 scales, or float16 values.

    Args:
        shape: (out_features, in_features).
        bits: 4, 8 or 16; codes of a factor's row fill whole bytes.
    """
    if bits == HALF:
        return 2 * sum(shape)
    return sum(-(-side * bits // 8) + 2 * (side // group_size(side)) for side in shape)


def group_size(length: int) -> int:
    """The largest divisor of a row's length that is at most GROUP_SIZE."""
    return max(size for size in range(1, GROUP_SIZE + 1) if length % size == 0)


def compensate(
    model: nn.Module,
    input_ids: Tensor,
    teacher: Mapping[str, Tensor],
    rank: int | Mapping[str, int],
    bits: int = HALF,
    done: Done | None = None,
    memory: checkpoints.Memory = checkpoints.NOTHING,
) -> dict[str, Branch]:
    """Compute a branch for every linear of the blocks, on the inputs that it gets when all before it are compensated.

    Args:
        model: the compressed model with ordinary float32 linears. Changed: the branches are added to its weights.
        input_ids: [windows, length]; every token counts.
        teacher: full module name (of `model`) -> weight [out_features, in_features] to come close to.
        rank: of every branch, or full module name -> rank (`allocate`).
        bits: of the stored factors: 16 (float16) or 4 and 8 (groups of `group_size` along the rows of A and of B^T).
        memory: what it holds of an interrupted run isn't computed again.

    Raises:
        InputError: rank above the smaller side of a linear, or a teacher's weight of another shape.
    """
    branches: dict[str, Branch] = {}

    def visit(index: int, block: nn.Module, inputs: layers.BlockInputs) -> None:
        # Linear by linear, each on inputs that the compensated ones before it in the block produced.
        for name, linear in families.linears_by_block(model)[index].items():
            if before := memory.load(name):
                branches[name] = _recalled(before)
            else:
                moments = _second_moments({name: linear}, block, inputs)[name]
                wanted = rank if isinstance(rank, int) else rank[name]
                branches[name] = _branch(name, linear.weight, teacher[name], moments, wanted, bits)
                memory.save(name, *_noted(branches[name]))
            linear.weight.data += branches[name].b.float() @ branches[name].a.float()
            if done:
                done(name, branches[name].error_after)

    layers.walk(model, input_ids, visit)
    return branches


def _branch(name: str, weight: Tensor, wanted: Tensor, moments: Tensor, rank: int, bits: int) -> Branch:
    delta = _delta(name, weight, wanted)
    a, b = factors(delta, moments, rank)
    coded = None
    if rank and bits != HALF:
        coded_a = rounding.quantise(a, bits, group_size(a.shape[1]))
        a = rounding.values(coded_a)
        coded_b = rounding.quantise(refit(delta, moments, a).T.contiguous(), bits, group_size(b.shape[0]))
        b, coded = rounding.values(coded_b).T, (coded_a, coded_b)
    a, b = a.half().contiguous(), b.half().contiguous()
    left = delta - b.float() @ a.float()
    before, after = (masked_gptq.relative_error(error, wanted, moments) for error in (delta, left))
    return Branch(a, b, coded, before, after)


def _noted(branch: Branch) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A branch as an entry of a memory."""
    tensors = {"a": branch.a, "b": branch.b}
    for side, coded in zip("ab", branch.coded or (), strict=False):
        tensors |= {f"{side}.codes": coded.codes, f"{side}.scales": coded.scales}
    coding = [[coded.bits, coded.group_size] for coded in branch.coded or ()]
    return tensors, {"coding": coding, "errors": [branch.error_before, branch.error_after]}


def _recalled(entry: checkpoints.Entry) -> Branch:
    """What `_noted` got."""
    tensors, values = entry
    sides = zip("ab", values["coding"], strict=False)
    coded = [rounding.Coded(tensors[f"{side}.codes"], tensors[f"{side}.scales"], *coding) for side, coding in sides]
    return Branch(tensors["a"], tensors["b"], tuple(coded) or None, *values["errors"])


def _delta(name: str, weight: Tensor, wanted: Tensor) -> Tensor:
    """What compression took, float32 [out_features, in_features]."""
    if wanted.shape != weight.shape:
        raise InputError(
            f"{name} is {tuple(weight.shape)}, in the teacher {tuple(wanted.shape)}: it is another model's"
        )
    return wanted.float() - weight.detach()


def _second_moments(
    linears: Mapping[str, nn.Module], block: nn.Module, inputs: layers.BlockInputs
) -> dict[str, Tensor]:
    """X^T X of each linear's inputs X, float64 [in_features, in_features], from one pass through the block."""
    moments = {
        name: torch.zeros(linear.in_features, linear.in_features, dtype=torch.float64)
        for name, linear in linears.items()
    }

    def see(name: str, x: Tensor) -> None:
        x = x.double()
        moments[name].addmm_(x.T, x)

    layers.observe(linears, block, inputs, see)
    return moments
