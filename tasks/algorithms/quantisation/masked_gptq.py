"""GPTQ that keeps pruned weights at exactly zero: gptqmodel's quantiser and looper, led by keep masks.

GPTQ (Frantar et al., arXiv 2210.17323) quantises a matrix column by column and moves each column's error to the columns
that follow; so it also moves pruned weights off zero. Here a pruned weight is quantised to zero whatever it has become,
and the error of that is moved on like any other, which is what SparseGPT (arXiv 2301.00774) does with a fixed mask.
On request the mask is chosen in the same sweep (`tasks.algorithms.quantisation.sparsegpt`), and scales are powers of a
root of two.

Each linear's calibration inputs have gone through the quantised linears that run before it: gptqmodel quantises a
block in the order (q k v), (o), (gate up), (down), runs the block again after each, and hands the quantised block's
outputs to the next one.

gptqmodel knows no masks: they come in by patches of its GPTQ (those of the rest are
`tasks.algorithms.quantisation.gptqmodel_library`'s), inside a context manager that puts it back. It writes no file
(`tasks.models.gptq_folder` does) and quantises neither embedding nor head (`tasks.algorithms.quantisation.embedding`
does).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import checkpoints, families, masks
from tasks.algorithms.quantisation import descent, masked_grid, output_error, sparsegpt
from tasks.algorithms.quantisation import gptqmodel_library as library

Done = Callable[[str, float], None]
"""Called after each linear with its name and error."""


@dataclass(frozen=True)
class Settings:
    """These settings are what this project adds to gptqmodel's GPTQ; `config` makes gptqmodel's own.

    Attributes:
        scale_steps: scales are powers of 2 ** (1 / scale_steps); None: any float16.
        joint: (keep, of): the masks are chosen in the sweep, `keep` of every `of` consecutive inputs.
        descent_cycles: passes of coordinate descent after the sweep (`tasks.algorithms.quantisation.descent`).
    """

    scale_steps: int | None = None
    joint: tuple[int, int] | None = None
    descent_cycles: int = 0


@dataclass(frozen=True)
class LayerResult:
    """This is what became of one linear.

    Attributes:
        error: ||X W^T - X Q^T||_F / ||X W^T||_F on the calibration inputs X, which earlier quantised layers produced.
        damp: share of the Hessian's mean diagonal that was added; above the one asked for where that was too small.
        keep: bool [out_features, in_features], the mask where `joint` chose one.
    """

    error: float
    damp: float
    keep: Tensor | None = None


class Answer(NamedTuple):
    """This is what gptqmodel's `GPTQ.quantize` returns, in its order.

    Attributes:
        quantised: [out_features, in_features], of the weight's type.
        scales, zeros: [out_features, groups].
        index: int32 [in_features], the group of each column.
        seconds: spent.
        loss: sum of squared errors over 2 [H^-1]_jj, per sample; NaN where it failed.
        damp: share of the Hessian's mean diagonal that was added; 1 where none was enough.
        samples: calibration tokens.
    """

    quantised: Tensor
    scales: Tensor
    zeros: Tensor
    index: Tensor
    seconds: float
    loss: float
    damp: float
    samples: int


TENSORS = ("quantised", "scales", "zeros", "index")
"""The fields of an `Answer` that are tensors; they are its first ones."""


def quantise(
    model: Any,
    input_ids: Tensor,
    keep: Mapping[str, Tensor],
    settings: Settings = Settings(),
    done: Done | None = None,
    saved: checkpoints.Saved = checkpoints.NOTHING,
) -> dict[str, LayerResult]:
    """Quantise a model that gptqmodel loaded with `config`, in place.

    Args:
        model: gptqmodel's wrapper of a dense model.
        input_ids: [windows, length]; every token counts, in this order.
        keep, settings, done, saved: as for `MaskedGptq`.

    Returns:
        name -> result, sorted by name.

    Raises:
        InputError: as `MaskedGptq`; windows that gptqmodel would drop or cut; `joint` with an order of columns.
    """
    if settings.joint and (model.quantize_config.desc_act or model.quantize_config.act_group_aware):
        raise InputError("gptq.joint counts consecutive inputs, in their own order: set gptq.act_order to none")
    windows, length = input_ids.shape
    limit = model.model.config.max_position_embeddings
    if not 10 < length <= limit:
        raise InputError(
            f"calibrate.length = {length}, but gptqmodel drops windows of 10 tokens and below and cuts those above the "
            f"model's {limit} positions: choose 11 to {limit}"
        )
    # No token is masked out; the rows stay in this order and by themselves: neither sorted by length nor joined.
    rows = [{"input_ids": ids.tolist(), "attention_mask": [1] * length} for ids in input_ids]
    led = MaskedGptq(keep, settings, done, saved, families.linears_by_block(model.model))
    with library.contained(), led.in_place():
        model.quantize(rows, batch_size=1, calibration_sort=None)
    unknown = sorted(set(keep) - set(led.results))
    if unknown:
        raise InputError(f"there is a mask for {unknown[0]}, which the model does not have: run the stage wanda again")
    # The looper could have left rows out without a word; its own log says how many tokens each Hessian is of.
    used = {int(row["samples"]) for row in model.quant_log}
    if used != {windows * length}:
        raise RuntimeError(f"gptqmodel used {sorted(used)} of {windows * length} calibration tokens")
    return dict(sorted(led.results.items()))


class MaskedGptq:
    """It leads gptqmodel's GPTQ by keep masks: one method per function of its class `GPTQ` that is replaced.

    The replaced functions are those of gptqmodel.quantization.gptq, version 7.6.0. Each gets the instance of `GPTQ`,
    which quantises one linear, as `gptq`. The looper calls them from several threads, for several linears at once.

    Attributes:
        results: full module name -> what became of the linear, filled as it runs.
    """

    def __init__(
        self,
        keep: Mapping[str, Tensor],
        settings: Settings = Settings(),
        done: Done | None = None,
        saved: checkpoints.Saved = checkpoints.NOTHING,
        blocks: Iterable[Collection[str]] = (),
    ) -> None:
        """Note what leads; nothing is replaced yet, `in_place` does it.

        Args:
            keep: full module name -> bool [out_features, in_features], True where kept. Modules without one are not
                pruned.
            done: called after each linear.
            saved: linears that it holds are taken from it, others are saved to it.
            blocks: full names of each block's linears; of a block that `saved` holds as a whole, no inputs are
                measured.
        """
        self.results: dict[str, LayerResult] = {}
        self._keep, self._settings, self._done, self._saved = keep, settings, done, saved
        self._finished = _Finished(saved, blocks)
        upstream = library.gptq.GPTQ
        self._solve, self._add, self._invert = upstream.quantize, upstream.add_batch, upstream.hessian_inverse

    @contextlib.contextmanager
    def in_place(self) -> Iterator[dict[str, LayerResult]]:
        """Within this context gptqmodel's GPTQ quantises pruned weights to zero. Yields `results`.

        Raises:
            InputError: (in the looper) a mask of another shape, a pruned weight that isn't zero, a Hessian that can't
                be inverted.
        """
        upstream = library.gptq.GPTQ
        with (
            library.patched(upstream, "create_quantizer", _method(self.create_quantizer)),
            library.patched(upstream, "add_batch", _method(self.add_batch)),
            library.patched(upstream, "hessian_inverse", _method(self.hessian_inverse)),
            library.patched(upstream, "quantize", _method(self.quantize)),
        ):
            yield self.results

    def create_quantizer(self, gptq: Any, name: str) -> masked_grid.MaskedQuantizer:
        """Replace `GPTQ.create_quantizer`, which makes a `Quantizer`: here one that can be given a mask."""
        return masked_grid.MaskedQuantizer(gptq.qcfg, name, self._settings.scale_steps)

    def add_batch(self, gptq: Any, inp: Tensor, out: Tensor, batch_index: int | None = None) -> None:
        """Replace `GPTQ.add_batch`, which adds X^T X of a batch to the sum: not in a block that is finished."""
        if not self._finished.whole_block(gptq._named_module.full_name):
            return self._add(gptq, inp, out, batch_index)
        with gptq.lock:
            gptq.fwd_counter += 1  # the looper asks whether there were inputs

    def hessian_inverse(self, gptq: Any, hessian: Tensor) -> tuple[Tensor | None, float]:
        """Replace `GPTQ.hessian_inverse`, which gives the upper Cholesky factor of the damped Hessian's inverse.

        This is the first line of GPTQ's Algorithm 1, H^-1 <- Cholesky(H^-1)^T; the damping is lambda there.
        """
        # In float32 its last bits depend on the number of threads, and with them a code that lies between two.
        factor, damp = self._invert(gptq, hessian.double())  # [in, in]
        return None if factor is None else factor.float(), damp

    def quantize(self, gptq: Any, blocksize: int = 128) -> Answer:
        """Replace `GPTQ.quantize`, the sweep over the columns of a linear (GPTQ's Algorithm 1)."""
        name = gptq._named_module.full_name
        if entry := self._finished.take(name):
            answer, result = _recalled(entry, gptq.module.weight.device)
        else:
            answer, result = self._solved(gptq, name, blocksize)
            self._saved.save(name, *_noted(answer, result))
        self.results[name] = result
        if self._done:
            self._done(name, result.error)
        return answer

    def _solved(self, gptq: Any, name: str, blocksize: int) -> tuple[Answer, LayerResult]:
        """Quantise a linear, and measure its error on the Hessian that gptqmodel summed up."""
        # gptqmodel's sweep permutes, damps and drops both, and the error is measured afterwards.
        hessian = gptq.finalize_hessian(target_device=getattr(gptq.module, "target_device", None)).clone()  # [in, in]
        weight = gptq.module.weight.detach().clone()  # [out, in]
        mask = self._keep.get(name)
        if mask is not None:
            mask = _checked(name, mask, weight).to(hessian.device)
            # The sweep visits columns in this order, and asks the quantiser for one after the other.
            gptq.quantizer.mask = mask[:, _order(hessian, gptq.qcfg)]
        if self._settings.joint:
            answer, mask = _solve_jointly(gptq, *self._settings.joint)
        else:
            answer = Answer(*self._solve(gptq, blocksize))
        if not isinstance(answer.loss, float) or not np.isfinite(answer.loss) or answer.damp >= 1:
            raise InputError(f"the Hessian of {name} can't be inverted even with more damping: raise gptq.damp")
        if self._settings.descent_cycles:
            answer = _descended(weight, answer, hessian, gptq.qcfg.bits, self._settings.descent_cycles, mask)
        # GPTQ's objective (eq. 1), over the same of W: the root of tr(D H D^T) for D = W - Q.
        error = output_error.relative_error(weight - answer.quantised, weight, hessian)
        return answer, LayerResult(error, float(answer.damp), mask if self._settings.joint else None)


def _method(replacement: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function that, as a method of gptqmodel's class, hands its instance on: bound methods don't."""

    def method(gptq: Any, *arguments: Any, **named: Any) -> Any:
        return replacement(gptq, *arguments, **named)

    return method


class _Finished:
    """It holds linears that an interrupted run had quantised, those of one block at a time."""

    def __init__(self, saved: checkpoints.Saved, blocks: Iterable[Collection[str]]) -> None:
        self.saved, self.lock = saved, threading.Lock()
        self.block = {name: tuple(block) for block in blocks for name in block}
        self.names: tuple[str, ...] = ()
        self.held: dict[str, checkpoints.Entry] = {}

    def whole_block(self, name: str) -> bool:
        """Tell whether all linears of this one's block were quantised, and their entries can be read."""
        with self.lock:
            if name not in self.names and name in self.block:
                self.names = self.block[name]
                entries = {linear: self.saved.load(linear) for linear in self.names}
                self.held = entries if all(entries.values()) else {}
            return bool(self.held)

    def take(self, name: str) -> checkpoints.Entry | None:
        """Get the entry of a linear, or None."""
        return self.held[name] if name in self.held else self.saved.load(name)


def _noted(answer: Answer, result: LayerResult) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Make an entry to be saved of an answer and its result."""
    tensors = {name: getattr(answer, name) for name in TENSORS}
    if result.keep is not None:
        tensors["keep"] = result.keep
    return tensors, {"answer": list(answer[len(TENSORS) :]), "error": result.error, "damp": result.damp}


def _recalled(entry: checkpoints.Entry, device: torch.device) -> tuple[Answer, LayerResult]:
    """Make the answer and the result again that `_noted` made an entry of, on this device."""
    tensors, values = {name: tensor.to(device) for name, tensor in entry.tensors.items()}, entry.values
    answer = Answer(*(tensors[name] for name in TENSORS), *values["answer"])
    return answer, LayerResult(values["error"], values["damp"], tensors.get("keep"))


@torch.inference_mode()
def _solve_jointly(gptq: Any, keep: int, of: int) -> tuple[Answer, Tensor]:
    """Answer as `GPTQ.quantize` does, by the joint sweep; and the mask, bool [out_features, in_features]."""
    started = time.monotonic()
    weight = gptq.module.weight.detach().float()  # [out, in]
    hessian = gptq.H  # [in, in], finalised by the caller
    dead = hessian.diagonal() == 0  # inputs that are always zero, as gptqmodel treats them
    hessian[dead, dead] = 1
    weight = weight * ~dead  # what meets only zeros changes no output
    factor, damp = gptq.hessian_inverse(hessian)  # U with U^T U = (H + damping)^-1
    gptq.H = None
    if factor is None:
        nothing = torch.empty(0)
        return Answer(nothing, nothing, nothing, nothing, 0.0, float("nan"), 1.0, gptq.nsamples), nothing
    group_size = gptq.qcfg.group_size
    swept = sparsegpt.sweep(weight, factor, keep, of, group_size, gptq.quantizer)
    size = weight.shape[1] if group_size == -1 else group_size
    index = torch.arange(weight.shape[1], dtype=torch.int32, device=weight.device) // size  # [in], in their own order
    quantised = swept.quantised.to(gptq.module.weight.dtype)
    spent = time.monotonic() - started
    loss = swept.loss / gptq.nsamples
    return Answer(quantised, swept.scales, swept.zeros, index, spent, loss, damp, gptq.nsamples), swept.keep


def _descended(weight: Tensor, answer: Answer, hessian: Tensor, bits: int, cycles: int, keep: Tensor | None) -> Answer:
    """Improve an answer's codes on the Hessian that it was found with; `hessian` is damped in place."""
    # gptqmodel sums in float32, so that this is no copy: the linear's stated error is one on the damped Hessian.
    damped = hessian.float()
    diagonal = damped.diagonal()  # a view: H + lambda I, as the sweep inverted it
    diagonal[diagonal == 0] = 1  # as gptqmodel treats inputs that are always zero
    diagonal += answer.damp * diagonal.mean()
    grid = descent.Grid(answer.scales, answer.zeros, answer.index, bits)
    quantised = descent.descend(weight, answer.quantised, damped, grid, cycles, keep)
    return answer._replace(quantised=quantised.to(answer.quantised.dtype))


def _order(hessian: Tensor, qcfg: Any) -> Tensor:
    """Tell in which order gptqmodel's GPTQ will visit the columns, by the same calls as there on the same values."""
    diagonal = hessian.diagonal().clone()
    diagonal[diagonal == 0] = 1  # gptqmodel's treatment of inputs that are always zero
    if qcfg.desc_act:
        return torch.argsort(diagonal, descending=True)  # act-order: the inputs with the most energy first
    if not qcfg.act_group_aware:
        return torch.arange(len(hessian), device=hessian.device)
    # Groups by their largest diagonal, and columns within each by their own: no group is torn apart.
    within, largest = library.gar.compute_local_perms(diagonal, qcfg.group_size, return_values=True)
    between = library.gar.compute_global_perm(diagonal, qcfg.group_size, precomputed_values=largest)
    order = library.gar.compose_final_perm(within, between, qcfg.group_size)
    return library.gar.extend_perm_with_tail(order, len(hessian))


def _checked(name: str, mask: Tensor, weight: Tensor) -> Tensor:
    """Refuse a mask of another shape than the weight's, or one that prunes a weight that is not zero."""
    if mask.shape != weight.shape:
        raise InputError(
            f"the mask of {name} is {tuple(mask.shape)}, its weight {tuple(weight.shape)}: run stage wanda again"
        )
    alive = masks.revived(weight, mask)
    if alive:
        raise InputError(f"{alive} pruned weights of {name} are not zero before quantisation: run the stage lora again")
    return mask
