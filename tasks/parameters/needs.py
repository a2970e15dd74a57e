"""How much memory and disk each stage needs: estimated from parameters and a model's sizes.

In bytes; fp32 = 4 bytes per parameter, and each dense stage works in fp32, with all of a model or block by block:
    memory of a stage = the libraries' own + the models it holds + its activations (`MEMORY`, one row per stage)
    disk = what the stages still to run write, twice: in the workspace and in DVC's cache (`DISK`)
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator

from tasks.algorithms.model import streaming
from tasks.algorithms.model.shape import ModelShape
from tasks.algorithms.scoring import protocols
from tasks.parameters import machine
from tasks.parameters.schema import Params

LIBRARIES = 700 * 2**20
"""Bytes that a process holds after importing torch, transformers and gptqmodel."""
ACTIVATIONS = (16, 4)
"""Values kept for a backward pass per token and layer, in units of the hidden and of the MLP size."""
PROBE = 128
"""Tokens on which stage vocabulary compares the logits of both models."""
UNLIMITED = 2048
"""Tokens that lm_eval takes for the context of a model without one."""


def problems(params: Params, model: ModelShape, todo: list[str]) -> Iterator[str]:
    """What this machine lacks for the stages `todo`: a sentence for memory, one for disk, or none."""
    yield from _memory_problems(params, model, todo)
    yield from _disk_problems(params, model, todo)


def _dense(model: ModelShape) -> int:
    """Bytes of all weights in fp32."""
    return 4 * (model.in_blocks + model.outside)


def _streamed(model: ModelShape) -> int:
    """Bytes of a model whose blocks are in memory one at a time, in fp32."""
    return 4 * (model.in_blocks // model.layers + model.outside)


def _stored(model: ModelShape) -> int:
    """Bytes of all weights as the checkpoint has them."""
    return model.stored * (model.in_blocks + model.outside)


def _backward(model: ModelShape, tokens: int) -> int:
    """Bytes that a backward pass over `tokens` tokens keeps: activations of each layer, logits, gradient."""
    per_hidden, per_mlp = ACTIVATIONS
    return 4 * tokens * (model.layers * (per_hidden * model.hidden + per_mlp * model.mlp) + 3 * model.vocabulary)


def _boundary(params: Params, model: ModelShape) -> int:
    """Bytes of the calibration activations at one block boundary, and the next one's."""
    return 2 * 4 * params.calibrate.windows * params.calibrate.length * model.hidden


def _lora_memory(params: Params, model: ModelShape) -> int:
    own = params.lora
    taught = own.distillation.weight > 0 or own.distillation.hidden > 0 or own.method == "block_reconstruction"
    models = 2 if taught else 1  # student; teacher
    return models * _dense(model) + 4 * model.in_blocks + models * _backward(model, own.batch * own.length)


def protocol(params: Params) -> protocols.Protocol:
    """The protocol that `evaluate` names, with its lengths."""
    return protocols.protocol(params.evaluate.protocol, params.evaluate.length, params.evaluate.stride)


def _evaluate_memory(params: Params, model: ModelShape) -> int:
    tokens = params.evaluate.batch * protocol(params).length
    whole = _dense(model) <= streaming.WHOLE
    weights = _dense(model) if whole else _streamed(model) + 4 * streaming.STATES
    return weights + 3 * 4 * tokens * model.vocabulary  # logits, their log-softmax, a copy


def _kv_cache_memory(params: Params, model: ModelShape) -> int:
    cached = 2 * 4 * model.layers * model.hidden  # keys and values in fp32, with as many heads as queries
    return _dense(model) + max(params.kv_cache.contexts) * (3 * 4 * model.vocabulary + cached)


def _harness_memory(params: Params, model: ModelShape) -> int:
    tokens = params.harness.batch * (model.context or UNLIMITED)
    return _dense(model) + 3 * 4 * tokens * model.vocabulary  # as in evaluate


def _gptq_memory(params: Params, model: ModelShape) -> int:
    return 2 * _dense(model) + 2 * _boundary(params, model) + 4 * 4 * model.widest**2  # the Hessian and its factors


def _eora_memory(params: Params, model: ModelShape) -> int:
    return 2 * _dense(model) + 2 * _boundary(params, model) + 4 * 8 * model.widest**2  # float64 eigenvectors


def _depth_prune_memory(params: Params, model: ModelShape) -> int:
    if params.depth_prune.schedule == "one_shot":
        return _streamed(model)
    return _dense(model) + _backward(model, params.calibrate.length)  # at most: some scores go block by block


def _wanda_memory(params: Params, model: ModelShape) -> int:
    return _streamed(model) + _boundary(params, model) + 24 * model.hidden * model.mlp  # scores, sorted, their indices


MEMORY: dict[str, Callable[[Params, ModelShape], int]] = {
    "fetch": lambda params, model: 2 * model.stored * model.vocabulary * model.hidden,  # the embedding and a head
    "vocabulary": lambda params, model: _dense(model) + 3 * 4 * PROBE * model.vocabulary,
    "calibrate": lambda params, model: _streamed(model) + _boundary(params, model),
    "importance": lambda params, model: 2 * _dense(model) + _backward(model, params.calibrate.length),  # and gradients
    "depth_prune": _depth_prune_memory,
    "wanda": _wanda_memory,
    "lora": _lora_memory,
    "gptq": _gptq_memory,
    "eora": _eora_memory,
    "package": lambda params, model: _streamed(model),
    "baseline_lora": _lora_memory,
    "sensitivity": lambda params, model: _dense(model) + _boundary(params, model),
    "baseline": _gptq_memory,
    "evaluate": _evaluate_memory,
    "measure": lambda params, model: _dense(model),  # its few tokens at batch 4 hardly count
    "kv_cache": _kv_cache_memory,
    "harness": _harness_memory,
}
"""Bytes that a stage holds at its peak, without the libraries."""


def _quantised(params: Params, model: ModelShape) -> int:
    widest = 8 if params.gptq.budget_bytes is not None else params.gptq.bits
    codes = model.in_blocks * widest // 8 if params.gptq.enabled else 4 * model.in_blocks
    adapter = params.eora.budget_bytes or 0
    return codes * 5 // 4 + adapter + 4 * model.outside  # scales and adapter: a quarter at most; embedding in fp32


DISK: dict[str, Callable[[Params, ModelShape], int]] = {
    "fetch": lambda params, model: _stored(model),
    "vocabulary": lambda params, model: _stored(model),
    "depth_prune": lambda params, model: _stored(model),
    "wanda": lambda params, model: _stored(model),
    "lora": lambda params, model: _dense(model),
    "gptq": _quantised,
    "eora": _quantised,
    "package": _quantised,
    "baseline_lora": lambda params, model: _dense(model),
    "sensitivity": lambda params, model: 2 * model.vocabulary * model.hidden,  # codes of embedding and head
    "baseline": _quantised,
}
"""Bytes that a stage writes, at most; a stage that is switched off links its input."""


def memory(params: Params, model: ModelShape, todo: list[str]) -> dict[str, int]:
    """Bytes that each of the stages holds at its peak, libraries included; stages that hold little are left out."""
    return {name: LIBRARIES + MEMORY[name](params, model) for name in todo if name in MEMORY}


def _memory_problems(params: Params, model: ModelShape, todo: list[str]) -> Iterator[str]:
    needs = memory(params, model, todo)
    if not needs:
        return
    greedy = max(needs, key=lambda name: needs[name])
    available = available_memory()
    if needs[greedy] > available:
        yield (
            f"{greedy} needs about {_size(needs[greedy])} of memory, {_size(available)} are available;"
            f" end other programs, lower its batch, length or windows, or take a smaller model"
        )


def _disk_problems(params: Params, model: ModelShape, todo: list[str]) -> Iterator[str]:
    needed = 2 * sum(DISK[name](params, model) for name in todo if name in DISK)
    free = shutil.disk_usage(".").free
    if needed > free:
        yield (
            f"the stages still to run write about {_size(needed)} (the workspace and DVC's cache), {_size(free)}"
            " are free on this folder's disk; free some, or take a smaller model"
        )


def available_memory() -> int:
    """Bytes that this process may still get: the machine's, or its control group's limit if that is lower."""
    import psutil

    available, limit = psutil.virtual_memory().available, machine.memory_limit()
    return available if limit is None else min(available, limit)


def _size(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
