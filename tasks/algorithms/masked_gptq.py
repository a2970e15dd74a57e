"""GPTQ that keeps pruned weights at exactly zero: gptqmodel's quantiser and looper, led by keep masks.

GPTQ (Frantar et al., arXiv 2210.17323) quantises a matrix column by column and moves each column's error to the columns
that follow; so it also moves pruned weights off zero. Here a pruned weight is quantised to zero whatever it has become,
and the error of that is moved on like any other, which is what SparseGPT (arXiv 2301.00774) does with a fixed mask.

gptqmodel has no such option. This module holds every work-around for it, written against version 7.6.0, each inside a
context manager that puts the library back; `LIBRARY_VERSION` is compared at import. It chooses no mask, writes no file
(`tasks.checkpoint` does) and quantises neither embedding nor head.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tasks.algorithms.errors import InputError

LIBRARY_VERSION = "7.6.0"
"""The work-arounds reach into gptqmodel's internals: another version needs them read again, and the tests run."""

Done = Callable[[str, float], None]
"""Called after each linear with its name and error."""


def _import_library() -> ModuleType:
    """Import gptqmodel without its banner and without the environment variables it sets.

    Its pool wants 2 loader workers and takes (cores + 1) // 2: a ValueError on two cores without GPTQMODEL_CPU_WORKERS.
    """
    installed = importlib.metadata.version("gptqmodel")
    if installed != LIBRARY_VERSION:
        raise InputError(f"gptqmodel {installed} is installed, {LIBRARY_VERSION} is needed: install constraints.txt")
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    before = dict(os.environ)
    level = logging.getLogger().level
    importlib.import_module("logbar").LogBar.shared().setLevel(logging.ERROR)
    library = importlib.import_module("gptqmodel")
    logging.getLogger().setLevel(level)
    for key in set(os.environ) - set(before):
        del os.environ[key]
    os.environ.update(before)
    return library


gptqmodel = _import_library()
_gptq = importlib.import_module("gptqmodel.quantization.gptq")
_logger = importlib.import_module("gptqmodel.utils.logger")
_looper = importlib.import_module("gptqmodel.looper.loop_processor")
_torch_linear = importlib.import_module("gptqmodel.nn_modules.qlinear.torch")
Lora = importlib.import_module("gptqmodel.adapter.adapter").Lora
eora_compute_lora = importlib.import_module("gptqmodel.eora").eora_compute_lora


@dataclass(frozen=True)
class LayerResult:
    """What became of one linear.

    Attributes:
        error: ||X W^T - X Q^T||_F / ||X W^T||_F on the calibration inputs X, which earlier quantised layers produced.
        damp: share of the Hessian's mean diagonal that was added; above the one asked for where that was too small.
    """

    error: float
    damp: float


def config(bits: int, group_size: int, symmetric: bool, damp: float, act_order: bool) -> Any:
    """gptqmodel's QuantizeConfig, with everything off that would make a result depend on more than these five.

    Args:
        bits: 2, 3, 4 or 8.
        group_size: inputs that share a scale; -1 is the whole row.
        symmetric: zero is the middle code; else each group has its own integer zero point (zero is exact in both).
        damp: share of the Hessian's mean diagonal added to it.
        act_order: quantise the inputs with the largest Hessian diagonal first; adds an index per input to the file.
    """
    return gptqmodel.QuantizeConfig(
        bits=bits,
        group_size=group_size,
        sym=symmetric,
        desc_act=act_order,
        act_group_aware=False,  # on by default; another order of columns that nobody asked for
        damp_percent=damp,
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
        word = 32 if bits == 3 else 32 // bits  # codes per packed word, or per three words of 3 bit
        for side, size in (("outputs", rows), ("inputs", cols)):
            if size % word:
                raise InputError(
                    f"{name} has {size} {side}, not divisible by {word}: gptq.bits = {bits} can't be packed"
                )


@contextlib.contextmanager
def contained() -> Iterator[None]:
    """Run gptqmodel without its live progress, prints and log files, and put random generators and threads back.

    It draws a random name for a log file in ./logs from Python's global generator, and prints what it saves.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state(), torch.get_num_threads()
    talkers = importlib.import_module("logbar").LogBar.shared(), logging.getLogger("accelerate.utils.modeling")
    levels = [logger.level for logger in talkers]
    with (
        _patched(_logger, "_suppress_live_renderables", lambda: True),
        _patched(_looper.LoopProcessor, "_build_log_file_path", staticmethod(lambda *_: Path(os.devnull))),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        for logger in talkers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(talkers, levels, strict=True):
                logger.setLevel(level)
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])
            torch.set_num_threads(states[3])


@contextlib.contextmanager
def loading_in_float32() -> Iterator[None]:
    """Let gptqmodel load a checkpoint in float32 and without torch.compile.

    Its torch kernel declares half precision only, though its arithmetic follows the input's dtype; and it compiles the
    dequantisation with inductor, which needs a C++ compiler at run time.
    """
    kernel = _torch_linear.TorchLinear
    with (
        contained(),
        _patched(kernel, "SUPPORTS_DTYPES", [*kernel.SUPPORTS_DTYPES, torch.float32]),
        _patched(_torch_linear, "torch_compile", lambda function, **_: function),
    ):
        yield


@contextlib.contextmanager
def keeping_masks(keep: Mapping[str, Tensor], done: Done | None = None) -> Iterator[dict[str, LayerResult]]:
    """Within this context gptqmodel's GPTQ quantises pruned weights to zero. Yields the results, filled as it runs.

    Args:
        keep: full module name -> bool [out_features, in_features], True where kept. Modules without one are not pruned.

    Raises:
        InputError: (in the looper) a mask of another shape, a pruned weight that isn't zero, a Hessian that can't be
            inverted.
    """
    results: dict[str, LayerResult] = {}
    solve = _gptq.GPTQ.quantize

    def create_quantizer(self: Any, name: str) -> _MaskedQuantizer:
        return _MaskedQuantizer(qcfg=self.qcfg, name=name)

    def quantize(self: Any, blocksize: int = 128) -> tuple[Any, ...]:
        name = self._named_module.full_name
        hessian = self.finalize_hessian(target_device=getattr(self.module, "target_device", None)).clone()
        weight = self.module.weight.detach().clone()  # [out, in]
        if name in keep:
            self.quantizer.mask = _checked(name, keep[name], weight)[:, _order(hessian, self.qcfg)]
        answer = solve(self, blocksize)
        quantised, loss, damp = answer[0], answer[5], answer[6]
        if not isinstance(loss, float) or not np.isfinite(loss) or damp >= 1:
            raise InputError(f"the Hessian of {name} can't be inverted even with more damping: raise gptq.damp")
        results[name] = LayerResult(relative_error(weight - quantised, weight, hessian), float(damp))
        if done:
            done(name, results[name].error)
        return answer

    with _patched(_gptq.GPTQ, "create_quantizer", create_quantizer), _patched(_gptq.GPTQ, "quantize", quantize):
        yield results


def quantise(
    model: Any, input_ids: Tensor, keep: Mapping[str, Tensor], done: Done | None = None
) -> dict[str, LayerResult]:
    """Quantise a model that gptqmodel loaded with `config`, in place.

    Args:
        model: gptqmodel's wrapper of a dense model.
        input_ids: [windows, length]; every token counts, in this order.
        keep: full module name -> bool [out_features, in_features], True where kept.

    Returns:
        name -> result, sorted by name.

    Raises:
        InputError: as `keeping_masks`; or windows that gptqmodel would drop or cut.
    """
    windows, length = input_ids.shape
    limit = model.model.config.max_position_embeddings
    if not 10 < length <= limit:
        raise InputError(
            f"calibrate.length = {length}, but gptqmodel drops windows of 10 tokens and below and cuts those above the "
            f"model's {limit} positions: choose 11 to {limit}"
        )
    rows = [{"input_ids": ids.tolist(), "attention_mask": [1] * length} for ids in input_ids]
    with contained(), keeping_masks(keep, done) as results:
        model.quantize(rows, batch_size=1, calibration_sort=None)
    unknown = sorted(set(keep) - set(results))
    if unknown:
        raise InputError(f"there is a mask for {unknown[0]}, which the model does not have: run the stage wanda again")
    used = {int(row["samples"]) for row in model.quant_log}
    if used != {windows * length}:
        raise RuntimeError(f"gptqmodel used {sorted(used)} of {windows * length} calibration tokens")
    return dict(sorted(results.items()))


def quantised_linears(model: nn.Module) -> dict[str, Any]:
    """Full module name -> gptqmodel's quantised linear, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _torch_linear.TorchLinear)}


def dequantised(linear: Any) -> Tensor:
    """float32 [out_features, in_features] of a quantised linear, without its adapter."""
    scales = linear.scales
    linear.scales = scales.float()  # in half precision code x scale would be rounded
    try:
        # The class's function: the instance's own may be a compiled one.
        return type(linear).dequantize_weight(linear).T.float().contiguous()
    finally:
        linear.scales = scales


def unpack_once(model: nn.Module) -> None:
    """Make quantised linears keep their float32 weights instead of unpacking them at every call.

    gptqmodel's own cache of unpacked weights leaves the adapter out of the forward pass.
    """
    for linear in quantised_linears(model).values():
        weight = dequantised(linear).T
        linear.dequantize_weight = lambda num_itr=1, weight=weight: weight


def densify(model: nn.Module) -> None:
    """Replace every quantised linear by an ordinary float32 one with its dequantised weight; adapters are dropped."""
    for name, linear in quantised_linears(model).items():
        dense = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
        dense.weight = nn.Parameter(dequantised(linear), requires_grad=False)
        if linear.bias is not None:
            dense.bias = nn.Parameter(linear.bias.detach().float(), requires_grad=False)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, dense)


def relative_error(delta: Tensor, weight: Tensor, hessian: Tensor) -> float:
    """||X delta^T||_F / ||X weight^T||_F for a Hessian that is any multiple of X^T X; 0 where both are 0.

    Args:
        delta, weight: [out_features, in_features].
        hessian: [in_features, in_features].
    """
    hessian = hessian.double()

    def energy(matrix: Tensor) -> float:
        matrix = matrix.double()
        return float(((matrix @ hessian) * matrix).sum().clamp_min(0))  # trace(M H M^T)

    lost, whole = energy(delta), energy(weight)
    return 0.0 if lost == 0 else float("inf") if whole == 0 else (lost / whole) ** 0.5


class _MaskedQuantizer(_gptq.Quantizer):
    """gptqmodel's quantiser, blind to pruned weights.

    GPTQ calls it with the columns from left to right (after their permutation, if there is one): `find_params` at the
    first column of each group, `quantize` once per column. Hence the count of columns is the place in the mask.

    Attributes:
        mask: bool [out_features, in_features] in the order of the calls, True where kept; None where nothing is pruned.
        column: columns quantised so far.
    """

    mask: Tensor | None = None
    column: int = 0

    def find_params(self, x: Tensor, weight: bool = False) -> None:
        """Scales and zero points of a group of columns [out_features, group], from its kept weights alone."""
        # Pruned weights got errors of earlier columns and would widen the range. With whole rows as groups the range is
        # taken once and before that (they are still zero), and in the order before the permutation.
        if self.mask is not None and self.qcfg.group_size != -1:
            x = x * self.mask[:, self.column : self.column + x.shape[1]]
        if self.qcfg.sym:
            # Where no weight of a group is negative, gptqmodel's symmetric range is [0, max] with the middle code as
            # zero, so that it clips at half the maximum. Few groups of 32 are like that, many with half of it pruned.
            x = torch.cat([x, -x.abs().amax(dim=1, keepdim=True)], dim=1)
        super().find_params(x, weight=weight)

    def quantize(self, x: Tensor) -> Tensor:
        """The nearest grid values of one column [out_features, 1]; zero where pruned."""
        q = super().quantize(x)
        if self.mask is not None:
            q = q * self.mask[:, self.column : self.column + x.shape[1]]
        self.column += x.shape[1]
        return q


def _order(hessian: Tensor, qcfg: Any) -> Tensor:
    """The order in which gptqmodel's GPTQ is going to visit the columns; the same calls as there on the same values."""
    if qcfg.act_group_aware:
        raise NotImplementedError("act_group_aware permutes columns within groups; the mask is not permuted like that")
    if not qcfg.desc_act:
        return torch.arange(len(hessian))
    diagonal = hessian.diagonal().clone()
    diagonal[diagonal == 0] = 1  # gptqmodel's treatment of inputs that are always zero
    return torch.argsort(diagonal, descending=True)


def _checked(name: str, mask: Tensor, weight: Tensor) -> Tensor:
    if mask.shape != weight.shape:
        raise InputError(
            f"the mask of {name} is {tuple(mask.shape)}, its weight {tuple(weight.shape)}: run stage wanda again"
        )
    alive = int(weight[~mask].count_nonzero())
    if alive:
        raise InputError(f"{alive} pruned weights of {name} are not zero before quantisation: run the stage lora again")
    return mask


@contextlib.contextmanager
def _patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
