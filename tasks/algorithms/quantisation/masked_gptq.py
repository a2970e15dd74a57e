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
import copy
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import checkpoints, families, masks
from tasks.algorithms.quantisation import descent, output_error, rounding, sparsegpt
from tasks.algorithms.quantisation import gptqmodel_library as library

WIDTHS = (2, 3, 4, 8)
"""Bits per code that gptqmodel packs into 32-bit words."""

ANSWER = ("quantised", "scales", "zeros", "index")
"""The tensors that gptqmodel's `GPTQ.quantize` returns first; numbers follow."""

Done = Callable[[str, float], None]
"""Called after each linear with its name and error."""


@dataclass(frozen=True)
class LayerResult:
    """What became of one linear.

    Attributes:
        error: ||X W^T - X Q^T||_F / ||X W^T||_F on the calibration inputs X, which earlier quantised layers produced.
        damp: share of the Hessian's mean diagonal that was added; above the one asked for where that was too small.
        keep: bool [out_features, in_features], the mask where `joint` chose one.
    """

    error: float
    damp: float
    keep: Tensor | None = None


def config(
    bits: int,
    group_size: int,
    symmetric: bool,
    damp: float,
    act_order: str,
    mse: float = 0.0,
    widths: Mapping[str, int] | None = None,
) -> Any:
    """gptqmodel's QuantizeConfig, with everything off that would make a result depend on more than these seven.

    Args:
        bits: 2, 3, 4 or 8.
        group_size: inputs that share a scale; -1 is the whole row.
        symmetric: zero is the middle code; else each group has its own integer zero point (zero is exact in both).
        damp: share of the Hessian's mean diagonal added to it.
        act_order: which columns are quantised first: "none", the leftmost; "descending", those with the largest
            Hessian diagonal, which adds an index per input to the file; "group_aware", the same, but groups stay
            together (Gafni et al., arXiv 2505.14638), which adds nothing.
        mse: norm of the error that a grid search of each scale minimises; 0 takes the range.
        widths: full module name -> bits, of all linears; `bits` is then without effect.

    Raises:
        InputError: "group_aware" without groups.
    """
    if act_order == "group_aware" and group_size == -1:
        raise InputError("gptq.act_order = group_aware orders groups, and gptq.group_size = -1 has one: choose another")
    dynamic = None
    if widths:
        bits = _most_common(widths.values())
        dynamic = {f"+:^{re.escape(name)}$": {"bits": width} for name, width in widths.items() if width != bits}
    return library.gptqmodel.QuantizeConfig(
        bits=bits,
        dynamic=dynamic or None,
        group_size=group_size,
        sym=symmetric,
        desc_act=act_order == "descending",
        act_group_aware=act_order == "group_aware",  # None would be on
        damp_percent=damp,
        mse=mse,
        device="cpu",  # the bytes must not depend on what accelerator there is
        offload_to_disk=False,
        fallback=None,  # the default answers NaN or few samples with round-to-nearest, silently
        pack_impl="original",  # the default compiles a C++ extension into ~/.cache at first use
    )


def check_shapes(shapes: Mapping[str, tuple[int, int]], bits: int, group_size: int) -> None:
    """Refuse matrices that don't pack.

    Args:
        shapes: name -> (out_features, in_features).

    Raises:
        InputError: inputs that don't divide by the group size, or a side that doesn't fill 32-bit words.
    """
    for name, (rows, cols) in shapes.items():
        if group_size > 0 and cols % group_size:
            raise InputError(
                f"{name} has {cols} inputs, not divisible by gptq.group_size = {group_size}: choose a divisor or -1"
            )
        word = _per_word(bits)
        for side, size in (("outputs", rows), ("inputs", cols)):
            if size % word:
                raise InputError(
                    f"{name} has {size} {side}, not divisible by {word}: gptq.bits = {bits} can't be packed"
                )


def packable(shape: tuple[int, int], widths: Iterable[int] = WIDTHS) -> list[int]:
    """Those of the widths whose codes of a matrix (out_features, in_features) fill 32-bit words."""
    return [bits for bits in widths if not any(size % _per_word(bits) for size in shape)]


@contextlib.contextmanager
def keeping_masks(
    keep: Mapping[str, Tensor],
    done: Done | None = None,
    scale_steps: int | None = None,
    joint: tuple[int, int] | None = None,
    descent_cycles: int = 0,
    memory: checkpoints.Memory = checkpoints.NOTHING,
    blocks: Iterable[Collection[str]] = (),
) -> Iterator[dict[str, LayerResult]]:
    """Within this context gptqmodel's GPTQ quantises pruned weights to zero. Yields the results, filled as it runs.

    Args:
        keep: full module name -> bool [out_features, in_features], True where kept. Modules without one are not pruned.
        done: called after each linear.
        scale_steps: scales are powers of 2 ** (1 / scale_steps); None: any float16.
        joint: (keep, of): the masks are chosen in the sweep, `keep` of every `of` consecutive inputs.
        descent_cycles: passes of coordinate descent after the sweep (`tasks.algorithms.quantisation.descent`).
        memory: linears that it holds are taken from it, others are saved to it.
        blocks: full names of each block's linears; of a block that `memory` holds as a whole, no inputs are measured.

    Raises:
        InputError: (in the looper) a mask of another shape, a pruned weight that isn't zero, a Hessian that can't be
            inverted.
    """
    results: dict[str, LayerResult] = {}
    solve, add, invert = library.gptq.GPTQ.quantize, library.gptq.GPTQ.add_batch, library.gptq.GPTQ.hessian_inverse
    finished = _Finished(memory, blocks)

    def create_quantizer(self: Any, name: str) -> _MaskedQuantizer:
        return _MaskedQuantizer(self.qcfg, name, scale_steps)

    def add_batch(self: Any, inp: Tensor, out: Tensor, batch_index: int | None = None) -> None:
        if not finished.whole_block(self._named_module.full_name):
            return add(self, inp, out, batch_index)
        with self.lock:
            self.fwd_counter += 1  # the looper asks whether there were inputs

    def hessian_inverse(self: Any, hessian: Tensor) -> tuple[Tensor | None, float]:
        # In float32 its last bits depend on the number of threads, and with them a code that lies between two.
        factor, damp = invert(self, hessian.double())
        return None if factor is None else factor.float(), damp

    def compute(self: Any, name: str, blocksize: int) -> tuple[tuple[Any, ...], LayerResult]:
        hessian = self.finalize_hessian(target_device=getattr(self.module, "target_device", None)).clone()
        weight = self.module.weight.detach().clone()  # [out, in]
        if name in keep:
            self.quantizer.mask = _checked(name, keep[name], weight)[:, _order(hessian, self.qcfg)]
        answer, chosen = _solve_jointly(self, *joint) if joint else (solve(self, blocksize), None)
        quantised, loss, damp = answer[0], answer[5], answer[6]
        if not isinstance(loss, float) or not np.isfinite(loss) or damp >= 1:
            raise InputError(f"the Hessian of {name} can't be inverted even with more damping: raise gptq.damp")
        if descent_cycles:
            held = chosen if joint else keep.get(name)
            quantised = _descend(weight, answer, hessian, damp, self.qcfg.bits, descent_cycles, held)
            answer = (quantised, *answer[1:])
        return answer, LayerResult(
            output_error.relative_error(weight - quantised, weight, hessian), float(damp), chosen
        )

    def quantize(self: Any, blocksize: int = 128) -> tuple[Any, ...]:
        name = self._named_module.full_name
        if entry := finished.take(name):
            answer, results[name] = _recalled(entry)
        else:
            answer, results[name] = compute(self, name, blocksize)
            memory.save(name, *_noted(answer, results[name]))
        if done:
            done(name, results[name].error)
        return answer

    with (
        library.patched(library.gptq.GPTQ, "create_quantizer", create_quantizer),
        library.patched(library.gptq.GPTQ, "add_batch", add_batch),
        library.patched(library.gptq.GPTQ, "hessian_inverse", hessian_inverse),
        library.patched(library.gptq.GPTQ, "quantize", quantize),
    ):
        yield results


def quantise(
    model: Any,
    input_ids: Tensor,
    keep: Mapping[str, Tensor],
    done: Done | None = None,
    scale_steps: int | None = None,
    joint: tuple[int, int] | None = None,
    descent_cycles: int = 0,
    memory: checkpoints.Memory = checkpoints.NOTHING,
) -> dict[str, LayerResult]:
    """Quantise a model that gptqmodel loaded with `config`, in place.

    Args:
        model: gptqmodel's wrapper of a dense model.
        input_ids: [windows, length]; every token counts, in this order.
        keep: full module name -> bool [out_features, in_features], True where kept.
        done, scale_steps, joint, descent_cycles, memory: as `keeping_masks`.

    Returns:
        name -> result, sorted by name.

    Raises:
        InputError: as `keeping_masks`; windows that gptqmodel would drop or cut; `joint` with an order of columns.
    """
    if joint and (model.quantize_config.desc_act or model.quantize_config.act_group_aware):
        raise InputError("gptq.joint counts consecutive inputs, in their own order: set gptq.act_order to none")
    windows, length = input_ids.shape
    limit = model.model.config.max_position_embeddings
    if not 10 < length <= limit:
        raise InputError(
            f"calibrate.length = {length}, but gptqmodel drops windows of 10 tokens and below and cuts those above the "
            f"model's {limit} positions: choose 11 to {limit}"
        )
    rows = [{"input_ids": ids.tolist(), "attention_mask": [1] * length} for ids in input_ids]
    blocks = families.linears_by_block(model.model)
    with library.contained(), keeping_masks(keep, done, scale_steps, joint, descent_cycles, memory, blocks) as results:
        model.quantize(rows, batch_size=1, calibration_sort=None)
    unknown = sorted(set(keep) - set(results))
    if unknown:
        raise InputError(f"there is a mask for {unknown[0]}, which the model does not have: run the stage wanda again")
    used = {int(row["samples"]) for row in model.quant_log}
    if used != {windows * length}:
        raise RuntimeError(f"gptqmodel used {sorted(used)} of {windows * length} calibration tokens")
    return dict(sorted(results.items()))


def nearest(
    weight: Tensor, keep: Tensor | None, quantisation: Any, bits: int, scale_steps: int | None = None
) -> Tensor:
    """Round to nearest on the grid that GPTQ would have at its start: no Hessian, nothing compensated.

    Args:
        weight: [out_features, in_features], 0 where pruned.
        keep: bool of the same shape, or None.
        quantisation: of `config`; group size, symmetry and mse are taken from it.
        bits: 2, 3, 4 or 8.

    Returns:
        float32 [out_features, in_features].
    """
    weight = weight.detach().float()
    size = weight.shape[1] if quantisation.group_size == -1 else quantisation.group_size
    settings = copy.copy(quantisation)
    settings.bits = bits
    quantiser = _MaskedQuantizer(settings, "", scale_steps)
    quantiser.mask = keep
    quantiser.configure(perchannel=True)
    parts = []
    for group in weight.split(size, dim=1):
        quantiser.find_params(group, weight=True)
        parts.append(quantiser.quantize(group))
    return torch.cat(parts, dim=1)


class _MaskedQuantizer(library.gptq.Quantizer):
    """gptqmodel's quantiser, blind to pruned weights, with scales as they are stored.

    GPTQ calls it with the columns from left to right (after their permutation, if there is one): `find_params` at the
    first column of each group, `quantize` once per column. Hence the count of columns is the place in the mask.

    Attributes:
        steps: scales are powers of 2 ** (1 / steps); None: any float16.
        mask: bool [out_features, in_features] in the order of the calls, True where kept; None where nothing is pruned.
        column: columns quantised so far.
    """

    def __init__(self, qcfg: Any, name: str, steps: int | None) -> None:
        super().__init__(qcfg=qcfg, name=name)
        self.steps = steps
        self.mask: Tensor | None = None
        self.column = 0

    def find_params(self, x: Tensor, weight: bool = False) -> None:
        """Scales and zero points of a group of columns [out_features, group], from its kept weights alone.

        The scale is rounded here, so that GPTQ makes up for that too, and what it computes with is what is stored.
        """
        # Pruned weights got errors of earlier columns and would widen the range. With whole rows as groups the range is
        # taken once and before that (they are still zero), and in the order before the permutation.
        if self.mask is not None and self.qcfg.group_size != -1:
            x = x * self.mask[:, self.column : self.column + x.shape[1]]
        if self.qcfg.sym:
            # Where no weight of a group is negative, gptqmodel's symmetric range is [0, max] with the middle code as
            # zero, so that it clips at half the maximum. Few groups of 32 are like that, many with half of it pruned.
            # Anything below zero makes it [-max, max]; so small that it counts for nothing in the search by `mse`.
            x = torch.cat([x, -1e-30 * x.any(dim=1, keepdim=True)], dim=1)
        super().find_params(x, weight=weight)
        found = self.scale  # [out_features, 1]
        self.scale = (rounding.snap(found, self.steps) if self.steps else found.half()).float().clamp(min=2.0**-24)
        if not self.qcfg.sym:  # the lower end of the range stays nearly where it was
            self.zero = torch.round(self.zero * found / self.scale).clamp(0, self.maxq)

    def quantize(self, x: Tensor) -> Tensor:
        """The nearest grid values of columns [out_features, columns]; zero where pruned."""
        q = super().quantize(x)
        if self.mask is not None:
            q = q * self.mask[:, self.column : self.column + x.shape[1]]
        self.column += x.shape[1]
        return q


class _Finished:
    """The linears that an interrupted run had quantised. One block's are held at a time."""

    def __init__(self, memory: checkpoints.Memory, blocks: Iterable[Collection[str]]) -> None:
        self.memory, self.lock = memory, threading.Lock()
        self.block = {name: tuple(block) for block in blocks for name in block}
        self.names: tuple[str, ...] = ()
        self.held: dict[str, checkpoints.Entry] = {}

    def whole_block(self, name: str) -> bool:
        """Whether all linears of this one's block were quantised, and their entries can be read."""
        with self.lock:
            if name not in self.names and name in self.block:
                self.names = self.block[name]
                found = {each: self.memory.load(each) for each in self.names}
                self.held = found if all(found.values()) else {}
            return bool(self.held)

    def take(self, name: str) -> checkpoints.Entry | None:
        """The entry of a linear."""
        return self.held[name] if name in self.held else self.memory.load(name)


def _noted(answer: tuple[Any, ...], result: LayerResult) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What gptqmodel's `GPTQ.quantize` returns, and the result, as an entry of a memory."""
    tensors = dict(zip(ANSWER, answer[:4], strict=True))
    if result.keep is not None:
        tensors["keep"] = result.keep
    return tensors, {"answer": list(answer[4:]), "error": result.error, "damp": result.damp}


def _recalled(entry: checkpoints.Entry) -> tuple[tuple[Any, ...], LayerResult]:
    """What `_noted` got."""
    tensors, values = entry
    answer = (*(tensors[name] for name in ANSWER), *values["answer"])
    return answer, LayerResult(values["error"], values["damp"], tensors.get("keep"))


@torch.inference_mode()
def _solve_jointly(gptq: Any, keep: int, of: int) -> tuple[tuple[Any, ...], Tensor]:
    """What gptqmodel's `GPTQ.quantize` returns, by the joint sweep, and the mask bool [out_features, in_features]."""
    started = time.monotonic()
    weight = gptq.module.weight.detach().float()
    hessian = gptq.H  # finalised by the caller
    dead = hessian.diagonal() == 0  # inputs that are always zero, as gptqmodel treats them
    hessian[dead, dead] = 1
    weight = weight * ~dead
    factor, damp = gptq.hessian_inverse(hessian)
    gptq.H = None
    if factor is None:
        return (None, None, None, None, 0.0, float("nan"), 1.0, gptq.nsamples), torch.empty(0)
    group_size = gptq.qcfg.group_size
    found = sparsegpt.sweep(weight, factor, keep, of, group_size, gptq.quantizer)
    size = weight.shape[1] if group_size == -1 else group_size
    index = torch.arange(weight.shape[1], dtype=torch.int32) // size
    quantised = found.quantised.to(gptq.module.weight.dtype)
    spent = time.monotonic() - started
    answer = (quantised, found.scales, found.zeros, index, spent, found.loss / gptq.nsamples, damp, gptq.nsamples)
    return answer, found.keep


def _descend(
    weight: Tensor,
    answer: tuple[Any, ...],
    hessian: Tensor,
    damp: float,
    bits: int,
    cycles: int,
    keep: Tensor | None,
) -> Tensor:
    """What `GPTQ.quantize` answered, its codes improved on the Hessian that it used; of the weight's type."""
    quantised, scales, zeros, index = answer[:4]
    damped = hessian.float()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1  # as gptqmodel treats inputs that are always zero
    diagonal += damp * diagonal.mean()
    found = descent.descend(weight, quantised, damped, scales, zeros, index, bits, cycles, keep)
    return found.to(quantised.dtype)


def _per_word(bits: int) -> int:
    """Codes per packed 32-bit word, or per three words of 3 bit."""
    return 32 if bits == 3 else 32 // bits


def _most_common(widths: Iterable[int]) -> int:
    """Of equally common ones the smallest."""
    counts = Counter(widths)
    return min(counts, key=lambda bits: (-counts[bits], bits))


def _order(hessian: Tensor, qcfg: Any) -> Tensor:
    """The order in which gptqmodel's GPTQ is going to visit the columns; the same calls as there on the same values."""
    diagonal = hessian.diagonal().clone()
    diagonal[diagonal == 0] = 1  # gptqmodel's treatment of inputs that are always zero
    if qcfg.desc_act:
        return torch.argsort(diagonal, descending=True)
    if not qcfg.act_group_aware:
        return torch.arange(len(hessian))
    within, largest = library.gar.compute_local_perms(diagonal, qcfg.group_size, return_values=True)
    between = library.gar.compute_global_perm(diagonal, qcfg.group_size, precomputed_values=largest)
    order = library.gar.compose_final_perm(within, between, qcfg.group_size)
    return library.gar.extend_perm_with_tail(order, len(hessian))


def _checked(name: str, mask: Tensor, weight: Tensor) -> Tensor:
    if mask.shape != weight.shape:
        raise InputError(
            f"the mask of {name} is {tuple(mask.shape)}, its weight {tuple(weight.shape)}: run stage wanda again"
        )
    alive = masks.revived(weight, mask)
    if alive:
        raise InputError(f"{alive} pruned weights of {name} are not zero before quantisation: run the stage lora again")
    return mask
