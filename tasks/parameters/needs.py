"""How much memory and disk each stage needs: estimated from parameters and a model's sizes.

In bytes; fp32 = 4 bytes per parameter, and each dense stage works in fp32, with a whole model or block by block:
    memory of a stage = the libraries' own + the models it holds + its activations (`MEMORY`, one row per stage)
    disk = what the stages still to run write, twice: in the workspace and in DVC's cache (`DISK`)

`python -m tests.support.stage_memory OUT.json` measures what stages take on three shapes of random models. While one is
loaded its file is mapped beside the weights; gaps that glibc leaves between what is kept for a backward pass (`KEPT`)
were measured.
"""

from __future__ import annotations

import bisect
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tasks.algorithms.model import rows, streaming
from tasks.algorithms.model.shape import ModelShape
from tasks.algorithms.scoring import batches, protocols
from tasks.parameters import machine
from tasks.parameters.schema import Lora, Params, Qad

LIBRARIES = 700 * 2**20
"""Bytes that a process holds after importing torch, transformers and gptqmodel."""
ACTIVATIONS = (9, 4)
"""Values kept for a backward pass per token and layer, in units of the hidden and of the MLP size."""
KEPT = {True: 1.05, False: 1.3}
"""What they take of memory, by whether the adapters are masked: plain ones make more that is dropped."""
SCATTERED, GIVEN_BACK = 0.7, 5 * 2**25
"""Gaps in glibc's heap among what is kept for a backward pass, in units of it, and in bytes at most: of a large heap
what is free is given back after each step (`tasks.algorithms.model.heap`)."""
KEEPING = 0.4
"""Of the free memory: what a recovery may take that keeps the activations of all blocks; two may run side by side."""
AHEAD, TARGETS = 32, 2**28
"""Steps whose targets wait in memory for a training (`tasks.algorithms.recovery.targets`), and their bytes, at most."""
WIDENED = 1.5
"""What a head of a shorter type takes while it is in fp32, and multiplied with (1.6 GiB for 1.0 at 128,256 x 2,048)."""
COPIED = 3
"""Tables in fp32 that quantising the embedding takes beside it (2.2 to 3.2 were measured at 32,768 x 256)."""
GAPS = 0.2
"""Of a block's bytes in fp32: what glibc's heap keeps per block that is computed anew (41 MiB of 232)."""
BATCH = 4
"""Windows of calibration per forward pass."""
HARMED = 1
"""Windows on which sensitivities are measured."""
COMPARED = 128
"""Positions whose predictions are compared at once."""
BYTES_PER_TOKEN = 3
"""Of a text, at least: what the longest document is taken for before it is tokenised."""
PROBE = 128
"""Tokens on which stage vocabulary compares the logits of both models."""
CODED = 2**24
"""Values of an embedding whose codes are packed together, about (1.2 GB at 128,256 x 2,048)."""
LOOKED_AT = 2**22
"""Values that fetch looks at together."""
UNLIMITED = 2048
"""Tokens that lm_eval takes for the context of a model without one."""


def problems(params: Params, model: ModelShape, todo: list[str]) -> Iterator[str]:
    """What this machine lacks for the stages `todo`: a sentence for memory, one for disk, or none."""
    yield from _memory_problems(params, model, todo)
    yield from _disk_problems(params, model, todo)


def _dense(model: ModelShape) -> int:
    """Bytes of all weights in fp32."""
    return 4 * (model.in_blocks + model.outside)


def _stored(model: ModelShape) -> int:
    """Bytes of all weights in their file."""
    return model.stored * (model.in_blocks + model.outside)


def _loaded(model: ModelShape, working: int = 0) -> int:
    """Bytes at the peak of a stage that loads a model, and then needs `working` beside it."""
    return _dense(model) + max(_stored(model), working)


def _block(model: ModelShape) -> int:
    """Bytes of a block's weights in fp32."""
    return 4 * model.in_blocks // model.layers


def _streamed(model: ModelShape, working: int = 0) -> int:
    """Bytes at the peak of a stage that has one block in memory at a time, and needs `working` beside it."""
    return _block(model) + 4 * model.outside + working


def _asked(model: ModelShape, working: int) -> int:
    """Bytes at the peak of a stage that asks a model of any format: one of a packed folder keeps its codes."""
    if _dense(model) <= streaming.WHOLE:
        return _loaded(model, working)
    return _streamed(model, model.in_blocks + working)


def _logits(model: ModelShape, tokens: int, copies: int = 3) -> int:
    """Bytes of the logits that are held at once, and of what is made of them."""
    return copies * 4 * rows.chunks(tokens, model.vocabulary)[0].stop * model.vocabulary


def _forward(model: ModelShape, tokens: int) -> int:
    """Bytes that a forward pass over `tokens` tokens holds in a block."""
    return 4 * tokens * sum(each * size for each, size in zip(ACTIVATIONS, (model.hidden, model.mlp), strict=True))


def _backward(model: ModelShape, tokens: int) -> int:
    """Bytes that a backward pass over `tokens` tokens keeps of all layers."""
    return model.layers * _forward(model, tokens)


def _boundary(params: Params, model: ModelShape) -> int:
    """Bytes of the calibration activations at one block boundary, and the next one's."""
    return 2 * 4 * params.calibrate.windows * params.calibrate.length * model.hidden


class Recovery(NamedTuple):
    """What a recovery holds at its peak in bytes, and whether it computes each block anew for the backward pass."""

    size: int
    checkpointing: bool


def _teacher(own: Lora | Qad, model: ModelShape, asked: bool = False) -> tuple[int, int]:
    """Bytes that a training holds of its teacher and of what that said, and those while it says it, from the disk.

    Args:
        asked: whatever the losses are.
    """
    if not (asked or own.distillation.weight > 0 or own.distillation.hidden > 0):
        return 0, 0
    tokens, whole = own.batch * own.length, _dense(model) <= streaming.WHOLE
    target = 4 * tokens * model.hidden * (1 + model.layers if own.distillation.hidden > 0 else 1)
    held = (_dense(model) if whole else 0) + max(target, min(AHEAD * target, TARGETS))
    return held, 0 if whole else _block(model) + _forward(model, tokens)


def _kept(size: int, masked: bool) -> int:
    """Bytes that is kept for a backward pass takes, gaps included."""
    return int(KEPT[masked] * size) + min(int(SCATTERED * size), GIVEN_BACK)


def recovery(own: Lora, model: ModelShape, masked: bool, free: int) -> Recovery:
    """What a recovery does with so much free memory: the activations of all blocks are kept where `KEEPING` is enough.

    Args:
        free: bytes, of the device that it runs on.
    """
    tokens, block = own.batch * own.length, model.in_blocks // model.layers
    states = 4 * tokens * model.hidden
    adapters = 16 * own.rank * model.layers * sum(map(sum, model.linears.values()))  # gradient, two moments
    held = _stored(model) + adapters + (model.in_blocks // 8 if masked else 0)  # masks are bits
    taught, opened = _teacher(own, model, own.method == "block_reconstruction")
    held += taught
    if own.method == "block_reconstruction":  # the student's and the teacher's states of all windows at one depth
        held += 2 * own.steps * states
    head = _logits(model, tokens, 4) + (int(WIDENED * _table(model)) if model.stored < 4 else 0)  # while it is asked
    summed = 4 * model.in_blocks if masked or model.stored < 4 else 0  # each weight with its adapter, or in fp32
    kept = held + max(opened, head + _kept(summed + _backward(model, tokens), masked))
    if kept <= KEEPING * free:
        return Recovery(kept, False)
    anew = int(KEPT[masked] * (8 * block + _forward(model, tokens)))  # a block's weights, and those with adapters
    held += model.layers * states + int(GAPS * 4 * model.in_blocks)
    return Recovery(held + max(opened, head, anew), True)


def _lora_memory(params: Params, model: ModelShape, masked: bool = True) -> int:
    return recovery(params.lora, model, masked, available_memory()).size


def qad(own: Qad, model: ModelShape, free: int) -> Recovery:
    """What training the codes of all linears does with so much free memory, as `recovery`."""
    tokens = own.batch * own.length
    states = 4 * tokens * model.hidden
    # latent codes, gradient, two moments; codes and masks as they are; scales; what is outside in fp16
    taught, opened = _teacher(own, model)
    held = (16 + 2) * model.in_blocks + model.in_blocks // 8 + 2 * model.outside + taught
    head = _logits(model, tokens, 4) + int(WIDENED * _table(model))
    kept = held + max(opened, head + _kept(4 * model.in_blocks + _backward(model, tokens), True))
    if kept <= KEEPING * free:
        return Recovery(kept, False)
    anew = int(KEPT[True] * (2 * _block(model) + _forward(model, tokens)))
    return Recovery(held + model.layers * states + max(opened, head, anew), True)


def protocol(params: Params) -> protocols.Protocol:
    """The protocol that `evaluate` names, with its lengths."""
    return protocols.protocol(params.evaluate.protocol, params.evaluate.length, params.evaluate.stride)


def _evaluate_memory(params: Params, model: ModelShape) -> int:
    tokens = params.evaluate.batch * protocol(params).length
    working = _logits(model, tokens) + _forward(model, tokens)
    return _asked(model, working + (4 * streaming.STATES if _dense(model) > streaming.WHOLE else 0))


def _kv_cache_memory(params: Params, model: ModelShape) -> int:
    context = max(params.kv_cache.contexts)
    cached = 2 * 4 * model.layers * model.kv_heads * model.head_dim * context  # keys and values, once dequantised
    return _asked(model, _logits(model, context) + 2 * cached)


def _harness_memory(params: Params, model: ModelShape) -> int:
    tokens = batches.most_tokens(min(longest_document(params), model.context or UNLIMITED), params.harness.batch)
    return _asked(model, _logits(model, tokens, 4) + _forward(model, tokens))


def longest_document(params: Params) -> int:
    """Tokens of the longest document that the harness asks, of those that are here by now; by its bytes.

    Where none is here yet it is taken for what a batch may have.
    """
    found = [Path(f"data/harness_data/{task}/documents.jsonl") for task in params.harness.tasks]
    found = [path for path in found if path.is_file()]
    if not found and params.harness.tasks == ["corpus"] and params.fetch.corpora.test.hub is None:
        found = [path for path in [Path(params.fetch.corpora.test.path)] if path.is_file()]
    longest = 0
    for path in found:
        with path.open("rb") as lines:
            longest = max(longest, max(map(len, lines), default=0))
    return -(-longest // BYTES_PER_TOKEN) if longest else batches.TOKENS


def _walk(params: Params, model: ModelShape) -> int:
    """Bytes that the walk over the blocks holds beside the model."""
    return _boundary(params, model) + 2 * _forward(model, BATCH * params.calibrate.length)


def _table(model: ModelShape) -> int:
    """Bytes of the embedding in fp32."""
    return 4 * model.vocabulary * model.hidden


def _embedding_memory(params: Params, model: ModelShape) -> int:
    """Bytes beside the model while its embedding is quantised: hidden states of the calibration, then its copies."""
    if params.gptq.embedding.bits == 16:
        return 0
    return max(_walk(params, model), int(COPIED * _table(model)))


def _sensitivity_memory(params: Params, model: ModelShape) -> int:
    length = params.calibrate.length
    kept = len(model.linears) + 4  # of each linear; before, as unchanged, as it ends, of the width that is tried
    states = 4 * HARMED * length * model.hidden * kept
    measured = states + 2 * _forward(model, HARMED * length) + 4 * 4 * COMPARED * model.vocabulary
    return _streamed(model, max(_embedding_memory(params, model), measured))


def _linears_memory(params: Params, model: ModelShape) -> int:
    """Bytes at the peak of GPTQ of all linears, block by block."""
    tokens = params.calibrate.windows * params.calibrate.length
    kept = 4 * tokens * (model.hidden + model.heads * model.head_dim + model.mlp)  # at the block's entry and inside
    hessians = 10 * 4 * model.widest**2  # of the widest linear, its factors, in float64 where they are inverted
    swept = 6 * 4 * model.hidden * model.mlp  # what is left to quantise, the answer, losses; packed
    return _streamed(model, kept + max(hessians, swept) + 2 * _forward(model, params.calibrate.length))


def _gptq_memory(params: Params, model: ModelShape) -> int:
    found = max(_linears_memory(params, model), _streamed(model, _embedding_memory(params, model)))
    return found if params.gptq.budget_bytes is None else max(found, _sensitivity_memory(params, model))


def _package_memory(params: Params, model: ModelShape) -> int:
    # the embedding, and what is coded of it at once; a block's codes, masks and values, as given and as read back
    return max(4 * model.outside + 12 * min(model.outside, CODED), 24 * (model.in_blocks // model.layers))


def _eora_memory(params: Params, model: ModelShape) -> int:
    # branches are computed without embedding and head: student's and teacher's block, float64 moments, eigenvectors and
    # what finds them; ranks are weighed with these in memory
    needed = _block(model) + _walk(params, model) + 5 * 8 * model.widest**2
    if params.eora.budget_bytes is not None:
        weighed = 4 * model.outside + 2 * 8 * model.widest**2 + _logits(model, params.calibrate.length, 5)
        needed = max(needed, weighed)
    return _block(model) + needed


def _fetch_memory(params: Params, model: ModelShape) -> int:
    largest = max(model.vocabulary * model.hidden, *(rows * columns for rows, columns in model.linears.values()))
    # the file, mapped; its largest matrix, and what looks at a piece of it
    return _stored(model) + model.stored * largest + 12 * min(largest, LOOKED_AT)


def _copied(model: ModelShape) -> int:
    """Bytes at the peak of copying a model: embedding and head in fp32, as they are read, and as they are written."""
    return 4 * model.outside + model.stored * (2 * model.outside + model.in_blocks // model.layers)


def _wanda_memory(params: Params, model: ModelShape) -> int:
    tokens = BATCH * params.calibrate.length
    scores = 24 * model.hidden * model.mlp  # in float64, and their order; a pass is over by then
    seen = _forward(model, tokens) + 2 * 8 * tokens * model.mlp  # the widest inputs in float64, and their squares
    return _streamed(model, _boundary(params, model) + max(seen, scores))


def _importance_memory(params: Params, model: ModelShape) -> int:
    tokens = params.calibrate.length  # windows run one by one
    if params.importance.method in ("taylor", "compound"):  # a block's gradients; hidden states between all blocks
        states = 4 * params.importance.windows * tokens * model.hidden * (model.layers + 2)
        working = max(
            _block(model) + 2 * 8 * model.hidden * model.mlp + _forward(model, tokens), _logits(model, tokens, 5)
        )
        return _streamed(model, states + working)
    if params.importance.method == "perplexity":  # hidden states of the model without each block
        return _streamed(model, 4 * tokens * model.hidden * (model.layers + 2) + _logits(model, tokens))
    return _streamed(model, 4 * params.importance.windows * tokens * model.hidden + 2 * _forward(model, tokens))


MEMORY: dict[str, Callable[[Params, ModelShape], int]] = {
    "fetch": _fetch_memory,
    "vocabulary": lambda params, model: _streamed(model, 3 * 4 * PROBE * model.vocabulary),
    "calibrate": lambda params, model: _streamed(model, _walk(params, model)),
    "importance": _importance_memory,
    "depth_prune": lambda params, model: (
        _importance_memory(params, model) if params.depth_prune.schedule == "greedy" else _copied(model)
    ),
    "wanda": _wanda_memory,
    "lora": _lora_memory,
    "gptq": _gptq_memory,
    "eora": _eora_memory,
    "qad": lambda params, model: qad(params.qad, model, available_memory()).size,
    "package": _package_memory,
    "baseline_lora": lambda params, model: _lora_memory(params, model, masked=False),
    "sensitivity": _sensitivity_memory,
    "baseline": lambda params, model: max(
        _linears_memory(params, model),
        _package_memory(params, model),
        qad(params.qad, model, available_memory()).size if params.qad.enabled else 0,
    ),
    "evaluate": _evaluate_memory,
    # whole, above a size in bfloat16; its few tokens at batch 4 hardly count
    "measure": lambda params, model: _loaded(model) if _dense(model) <= streaming.WHOLE else _dense(model) // 2,
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
    "qad": _quantised,
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
    needs, available = memory(params, model, todo), available_memory()
    said: set[str | None] = set()  # what helps one stage helps those that need less of the same
    for name in sorted(needs, key=lambda name: -needs[name]):
        if needs[name] <= available or REMEDIES.get(name) in said:
            continue
        said.add(REMEDIES.get(name))
        yield (
            f"{name} needs about {_size(needs[name])} of memory, {_size(available)} are available;"
            f" {_remedy(params, model, REMEDIES.get(name), todo, available)}end other programs, or take a smaller model"
        )


REMEDIES = {
    "calibrate": "calibrate.windows",
    "importance": "calibrate.length",
    "wanda": "calibrate.windows",
    "lora": "lora.batch",
    "gptq": "calibrate.windows",
    "eora": "calibrate.windows",
    "qad": "qad.batch",
    "baseline_lora": "lora.batch",
    "sensitivity": "calibrate.windows",
    "baseline": "calibrate.windows",
    "evaluate": "evaluate.batch",
    "harness": "harness.batch",
}
"""The parameter with which a stage's memory falls most, where there is one."""


def _remedy(params: Params, model: ModelShape, parameter: str | None, todo: list[str], available: int) -> str:
    """The largest value with which all stages of this parameter fit, to begin a sentence; empty where none does."""
    if parameter is None:
        return ""
    section, _, key = parameter.partition(".")
    own, stages = getattr(params, section), [name for name in todo if REMEDIES.get(name) == parameter]

    def fits(value: int) -> bool:
        tried = params.model_copy(update={section: own.model_copy(update={key: value})})
        return max(memory(tried, model, stages).values()) <= available

    at = bisect.bisect_left(range(1, getattr(own, key)), True, key=lambda value: not fits(value))
    return f"lower {parameter} to {at}, " if at else ""


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
