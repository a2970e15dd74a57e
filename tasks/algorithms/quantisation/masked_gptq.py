"""GPTQ that keeps pruned weights at exactly zero, of linears that see the same input: gptqmodel's, led by keep masks.

GPTQ (Frantar et al., arXiv 2210.17323) quantises a matrix column by column and moves each column's error to the columns
that follow; so it also moves pruned weights off zero. Here a pruned weight is quantised to zero whatever it has become,
and the error of that is moved on like any other, which is what SparseGPT (arXiv 2301.00774) does with a fixed mask.
On request the mask is chosen in the same sweep (`tasks.algorithms.quantisation.sparsegpt`), and scales are powers of a
root of two.

gptqmodel's class `GPTQ` quantises one linear; here it is given the Hessian and a quantiser that knows the mask, and its
looper over a model is not used. It sums no Hessian and walks over no model (`tasks.algorithms.quantisation.gptq_walk`
does), and quantises neither embedding nor head (`tasks.algorithms.quantisation.embedding` does).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import masks
from tasks.algorithms.quantisation import descent, masked_grid, output_error, sparsegpt
from tasks.algorithms.quantisation import gptqmodel_library as library


@dataclass(frozen=True)
class Settings:
    """These settings are what this project adds to gptqmodel's GPTQ; `gptqmodel_settings.config` makes gptqmodel's own.

    Attributes:
        scale_steps: scales are powers of 2 ** (1 / scale_steps); None: any float16.
        joint: (keep, of): the masks are chosen in the sweep, `keep` of every `of` consecutive inputs.
        descent_cycles: passes of coordinate descent after the sweep (`tasks.algorithms.quantisation.descent`).
    """

    scale_steps: int | None = None
    joint: tuple[int, int] | None = None
    descent_cycles: int = 0


PLAIN = Settings()
"""Nothing of it."""


class Answer(NamedTuple):
    """This is what became of one linear.

    Attributes:
        quantised: [out_features, in_features], of the weight's type.
        scales, zeros: [out_features, groups].
        index: int32 [in_features], the group of each column.
        keep: bool [out_features, in_features], the mask where `joint` chose one.
        error: ||X W^T - X Q^T||_F / ||X W^T||_F on the calibration inputs X, with the damping where there is descent.
        damp: share of the Hessian's mean diagonal that was added; above the one asked for where that was too small.
    """

    quantised: Tensor
    scales: Tensor
    zeros: Tensor
    index: Tensor
    keep: Tensor | None = None
    error: float = 0.0
    damp: float = 0.0


def quantise(
    weights: Mapping[str, Tensor],
    hessian: Tensor,
    config: Any,
    settings: Settings = PLAIN,
    keep: Mapping[str, Tensor] | None = None,
) -> dict[str, Answer]:
    """Quantise linears with one and the same input.

    Args:
        weights: full name -> [out_features, in_features], 0 where pruned.
        hessian: 2 X^T X / tokens, float32 [in_features, in_features]; it is used up.
        config: gptqmodel's QuantizeConfig.
        keep: full name -> bool [out_features, in_features], True where kept; linears without one are not pruned.

    Raises:
        InputError: a mask of another shape, a pruned weight that isn't zero, a Hessian that can't be inverted.
    """
    order, factors = _order(hessian, config), _Factors()
    checked = {name: _checked(name, keep[name], weights[name]) for name in weights if name in (keep or {})}
    swept = {}
    with library.contained():
        for name, weight in weights.items():
            own = copy.copy(config)
            own.bits = bits(config, name)
            swept[name] = _swept(name, weight, hessian, own, settings, checked.get(name), order, factors)
    if settings.descent_cycles:
        # The sweeps are over, so that this is no copy: the linears' stated errors are those on the damped Hessian.
        diagonal = hessian.diagonal()  # a view: H + lambda I, as the sweeps inverted it
        diagonal[diagonal == 0] = 1  # as gptqmodel treats inputs that are always zero
        diagonal += next(iter(swept.values())).damp * diagonal.mean()
    return {
        name: _finished(weights[name], answer, hessian, bits(config, name), settings, checked.get(name, answer.keep))
        for name, answer in swept.items()
    }


class _Factors:
    """It holds the inverse factor of a group's Hessian, which its linears share, and how much was damped for it."""

    found: tuple[Tensor | None, float] | None = None


class _Gptq(library.gptq.GPTQ):
    """It is gptqmodel's GPTQ of one linear, with a quantiser that can be given a mask, and a factor that is shared."""

    def __init__(self, weight: Tensor, hessian: Tensor, config: Any, settings: Settings, factors: _Factors) -> None:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        self._settings, self._factors = settings, factors
        super().__init__(linear, config)
        self.quantizer.configure(perchannel=True)
        self.H, self.nsamples = hessian.clone(), 1

    def create_quantizer(self, name: str) -> masked_grid.MaskedQuantizer:
        return masked_grid.MaskedQuantizer(
            self.qcfg, name, self._settings.scale_steps, whole_first=self._settings.joint is None
        )

    def hessian_inverse(self, H: Tensor) -> tuple[Tensor | None, float]:  # noqa: N803  as there
        """Give the upper Cholesky factor of the damped Hessian's inverse, and the damping.

        This is the first line of GPTQ's Algorithm 1, H^-1 <- Cholesky(H^-1)^T; the damping is lambda there.
        """
        if self._factors.found is None:
            # In float32 its last bits depend on the number of threads, and with them a code that lies between two.
            factor, damp = super().hessian_inverse(H.double())  # [in, in]
            self._factors.found = None if factor is None else factor.float(), float(damp)
        return self._factors.found


def _swept(
    name: str,
    weight: Tensor,
    hessian: Tensor,
    config: Any,
    settings: Settings,
    mask: Tensor | None,
    order: Tensor,
    factors: _Factors,
) -> Answer:
    """Go over the columns of a linear once (GPTQ's Algorithm 1); the error isn't measured yet."""
    gptq = _Gptq(weight, hessian, config, settings, factors)
    if mask is not None:
        # The sweep visits columns in this order, and asks the quantiser for one after the other.
        gptq.quantizer.mask = mask[:, order]
    if settings.joint:
        answer, loss = _solve_jointly(gptq, *settings.joint)
    else:
        *found, _, loss, damp, _ = gptq.quantize()
        answer = Answer(*found, damp=float(damp))
    if not isinstance(loss, float) or not np.isfinite(loss) or answer.damp >= 1:
        raise InputError(f"the Hessian of {name} can't be inverted even with more damping: raise gptq.damp")
    return answer


def _finished(
    weight: Tensor, answer: Answer, hessian: Tensor, width: int, settings: Settings, mask: Tensor | None
) -> Answer:
    """Improve an answer's codes by descent where that is asked for, and measure the error on the Hessian."""
    if settings.descent_cycles:
        grid = descent.Grid(answer.scales, answer.zeros, answer.index, width)
        quantised = descent.descend(weight, answer.quantised, hessian, grid, settings.descent_cycles, mask)
        answer = answer._replace(quantised=quantised.to(answer.quantised.dtype))
    # GPTQ's objective (eq. 1), over the same of W: the root of tr(D H D^T) for D = W - Q.
    return answer._replace(error=output_error.relative_error(weight - answer.quantised, weight, hessian))


@torch.inference_mode()
def _solve_jointly(gptq: _Gptq, keep: int, of: int) -> tuple[Answer, float]:
    """Answer as `GPTQ.quantize` does, by the joint sweep; and the loss, NaN where it failed."""
    weight = gptq.module.weight.detach().float()  # [out, in]
    hessian = gptq.H  # [in, in]
    dead = hessian.diagonal() == 0  # inputs that are always zero, as gptqmodel treats them
    hessian[dead, dead] = 1
    weight = weight * ~dead  # what meets only zeros changes no output
    factor, damp = gptq.hessian_inverse(hessian)  # U with U^T U = (H + damping)^-1
    gptq.H = None
    if factor is None:
        nothing = torch.empty(0)
        return Answer(nothing, nothing, nothing, nothing, damp=damp), float("nan")
    group_size = gptq.qcfg.group_size
    swept = sparsegpt.sweep(weight, factor, keep, of, group_size, gptq.quantizer)
    size = weight.shape[1] if group_size == -1 else group_size
    index = torch.arange(weight.shape[1], dtype=torch.int32, device=weight.device) // size  # [in], in their own order
    quantised = swept.quantised.to(gptq.module.weight.dtype)
    return Answer(quantised, swept.scales, swept.zeros, index, swept.keep, damp=damp), swept.loss


def _order(hessian: Tensor, config: Any) -> Tensor:
    """Tell in which order gptqmodel's GPTQ will visit the columns, by the same calls as there on the same values."""
    diagonal = hessian.diagonal().clone()
    diagonal[diagonal == 0] = 1  # gptqmodel's treatment of inputs that are always zero
    if config.desc_act:
        return torch.argsort(diagonal, descending=True)  # act-order: the inputs with the most energy first
    if not config.act_group_aware:
        return torch.arange(len(hessian), device=hessian.device)
    # Groups by their largest diagonal, and columns within each by their own: no group is torn apart.
    within, largest = library.gar.compute_local_perms(diagonal, config.group_size, return_values=True)
    between = library.gar.compute_global_perm(diagonal, config.group_size, precomputed_values=largest)
    order = library.gar.compose_final_perm(within, between, config.group_size)
    return library.gar.extend_perm_with_tail(order, len(hessian))


def bits(config: Any, name: str) -> int:
    """The bits of a linear's codes."""
    return config.dynamic_get(name, "bits", config.bits)


def _checked(name: str, mask: Tensor, weight: Tensor) -> Tensor:
    """Refuse a mask of another shape than the weight's, or one that prunes a weight that is not zero."""
    if mask.shape != weight.shape:
        raise InputError(
            f"the mask of {name} is {tuple(mask.shape)}, its weight {tuple(weight.shape)}: run stage wanda again"
        )
    alive = masks.revived(weight, mask)
    if alive:
        raise InputError(f"{alive} pruned weights of {name} are not zero before quantisation: run the stage lora again")
    return mask.to(weight.device)
