"""How long each stage takes: estimated from parameters, a model's sizes, and how fast this machine is.

A stage is a row of work (`WORK`): operations of matrix products, bytes moved, small calls and so on. Divided by what a
second of this machine brings of each kind (`speed`), that makes seconds. An estimate is meant to be right within a
factor of two; what a stage took when it last ran here is better (`tasks.runtime.estimates`), and the row then says by
how much more or less there is to do now.

`python -m tests.benchmarks.durations` prints predicted against measured seconds. Factors that are no count of
operations (`SEARCHED`, `PACKED` and such) were measured with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from tasks.algorithms.model.shape import ModelShape
from tasks.parameters import needs, preflight, rules
from tasks.parameters.schema import Lora, Params, Qad
from tasks.parameters.work import Work

BATCH = 4
"""Windows of calibration per forward pass."""
BLOCK_CALLS = 75
"""Small calls of a block's forward pass."""
PASSES = 6
"""How often what a block makes of a token (`needs.ACTIVATIONS`) is read or written in a forward pass."""
BACKWARD = 2.5
"""Attention's backward pass in forward passes: it computes them again."""
LOSSES = 16
"""Exponential functions, or what takes as long, per logit of a training with distillation."""
SEARCHED = 40
"""Scales that are tried for a group with `gptq.mse`, on average."""
ROUNDS = 1.1
"""How often stage baseline quantises the model, on average."""
MODELS = 10
"""That stage measure asks; those that equal another one are asked once."""
EMBEDDED = 200
"""Exponential functions that rounding a value of the embedding takes as long as, its scale included."""
DIVERGED = 5
"""Exponential functions that a logit takes as long as in a divergence, which is summed in float64."""
SWEPT = 400
"""Bytes that GPTQ's sweep moves per weight and row of its blocks."""
COLUMN_CALLS = 20
"""Small calls of a column in GPTQ's sweep, and of one in a cycle of coordinate descent."""
PACKED = 400
"""Exponential functions that packing and reading back a weight takes as long as."""
TEXT = 8
"""Bytes of text that are tokenised in the time of a small call."""
FORWARDS = 1.2
"""Forward passes of a block in GPTQ's walk: one, window by window."""
FIRST, SHORT = 1.5, 0.5
"""Imports of PyTorch that a stage's start takes as long as: of one that uses it, of one that doesn't. With a warm
process (`tasks.runtime.warm`) it is half of that."""
DOCUMENTS = {
    "hellaswag": (10042, 4 * 100),
    "arc_easy": (2376, 4 * 40),
    "arc_challenge": (1172, 4 * 45),
    "piqa": (1838, 2 * 45),
    "winogrande": (1267, 2 * 30),
    "triviaqa_closed": (17944, 60),
    "triviaqa_open": (17944, 2000),
    "wikitext": (62, 5500),
}
"""Of a task of the harness: its documents, and tokens per document in all answers, about."""


def _forward(model: ModelShape, tokens: float, length: int, batch: int = 1, layers: float | None = None) -> Work:
    """A forward pass through blocks, without the head.

    Args:
        tokens: in all.
        length: of a window, whose tokens attend to each other.
        batch: windows at once.
        layers: blocks; None: all of the model.
    """
    layers = model.layers if layers is None else layers
    products = tokens * (2 * model.in_blocks / model.layers + 4 * length * model.heads * model.head_dim)
    values = sum(each * size for each, size in zip(needs.ACTIVATIONS, (model.hidden, model.mlp), strict=True))
    moved = 4 * PASSES * values * tokens
    return layers * Work(products=products, bytes=moved, calls=BLOCK_CALLS * tokens / (batch * length))


def _head(model: ModelShape, tokens: float) -> Work:
    """Logits, and the softmax over them."""
    return Work(products=2 * tokens * model.vocabulary * model.hidden, exps=tokens * model.vocabulary)


def _read(model: ModelShape, times: float = 2.0) -> Work:
    """Reading (and writing) a model's weights."""
    return Work(bytes=4 * times * (model.in_blocks + model.outside))


def _tokenised(size: float) -> Work:
    return Work(calls=size / TEXT)


def text_bytes(params: Params, name: str) -> int:
    """Bytes of a corpus; where it isn't here by now, it is taken for as long as the built-in one."""
    source = getattr(params.fetch.corpora, name)
    path = Path(f"data/fetch/corpora/{name}.jsonl") if source.hub else Path(source.path)
    own = params.corpus
    usual = {"train": own.train_bytes, "calibration": own.calibration_bytes}
    return path.stat().st_size if path.is_file() else usual.get(name, own.test_bytes)


def pruned(params: Params, model: ModelShape) -> ModelShape:
    """The model without the layers that depth_prune removes."""
    gone = params.depth_prune.remove if params.depth_prune.enabled else 0
    return dataclasses.replace(model, layers=max(model.layers - gone, 1))


def _windows(params: Params) -> tuple[int, int]:
    """Tokens of all calibration windows, and of one."""
    return params.calibrate.windows * params.calibrate.length, params.calibrate.length


def _calibrate(params: Params, model: ModelShape) -> Work:
    tokens, length = _windows(params)
    return _forward(model, tokens, length, BATCH) + _tokenised(text_bytes(params, "calibration")) + _read(model)


def _importance(params: Params, model: ModelShape) -> Work:
    tokens, length = params.importance.windows * params.calibrate.length, params.calibrate.length
    forward, head = _forward(model, tokens, length), _head(model, tokens)
    rows = {
        "magnitude": _read(model),
        "block_influence": forward + _read(model),
        # blocks 1 to L of the models without each block before; a head for each
        "perplexity": (model.layers + 1) / 2 * forward + (model.layers + 1) * head,
        "taylor": 3 * forward + 2 * head + _read(model, 4),
    }
    method = params.importance.method
    return sum(rows.values(), Work()) if method == "compound" else rows[method]


def _depth_prune(params: Params, model: ModelShape) -> Work:
    own = params.depth_prune
    again = own.remove - 1 if own.schedule == "greedy" else 0
    return again * _importance(params, model) + _read(model, 40)  # hashes what it writes


def _wanda(params: Params, model: ModelShape) -> Work:
    model = pruned(params, model)
    tokens, length = _windows(params)
    choice = Work(exps=PACKED / 10 * model.in_blocks)  # scores sorted, masks packed, the ledger
    return 2 * _forward(model, tokens, length, BATCH) + choice + _read(model)


def _teacher(own: Lora | Qad, whole: ModelShape) -> Work:
    """What a step of a training asks of its teacher."""
    return _forward(whole, own.batch * own.length, own.length, own.batch)


def _losses(own: Lora | Qad, model: ModelShape, whole: ModelShape) -> Work:
    """The teacher where one is asked, and the head with what is made of its logits, forward and backward."""
    taught = own.distillation.weight > 0 or own.distillation.hidden > 0
    tokens, heads = own.batch * own.length, 3 if taught else 2
    head = Work(products=heads * _head(model, tokens).products, exps=LOSSES / 3 * heads * tokens * model.vocabulary)
    return head + _teacher(own, whole) if taught else head


def _recovery(params: Params, model: ModelShape, whole: ModelShape, masked: bool) -> Work:
    """Training of adapters on `model` with `whole` as the teacher; masked: every weight has a gradient."""
    own = params.lora
    tokens, thin = own.batch * own.length, 2 * own.rank * (model.in_blocks / model.layers)
    forward = _forward(model, tokens, own.length, own.batch)
    block = 2 * tokens * model.in_blocks
    attention = forward.products - block
    sides = sum(sum(shape) for shape in model.linears.values()) * model.layers
    adapters = 3 * model.layers * thin if masked else 3 * 2 * tokens * own.rank * sides
    backward = Work(
        products=block * (2 if masked else 1) + BACKWARD * attention + adapters,
        bytes=2 * forward.bytes + (16 * 4 * model.in_blocks if masked else 6 * 4 * tokens * sides),
        calls=2 * forward.calls + 100 * model.layers * len(model.linears),
    )
    blockwise = own.method == "block_reconstruction"
    step = forward + backward + (_teacher(own, whole) if blockwise else _losses(own, model, whole))
    start = _eora(params, model) if own.start == "eora" else Work()
    return own.steps * step + start + _tokenised(text_bytes(params, "train")) + _read(model, 6)


def _lora(params: Params, model: ModelShape) -> Work:
    masked = params.wanda.enabled and params.lora.method != "remasked"
    return _recovery(params, pruned(params, model), model, masked)


def _qad(params: Params, model: ModelShape, whole: ModelShape) -> Work:
    """Training of the codes of `model` with `whole` as the teacher."""
    own = params.qad
    tokens = own.batch * own.length
    forward = _forward(model, tokens, own.length, own.batch)
    block = 2 * tokens * model.in_blocks
    # codes to values, twice the gradient, AdamW: of each weight
    backward = Work(
        products=2 * block + BACKWARD * (forward.products - block),
        bytes=2 * forward.bytes + 25 * 4 * model.in_blocks,
        calls=2 * forward.calls + 60 * model.layers * len(model.linears),
    )
    return (
        own.steps * (forward + backward + _losses(own, model, whole))
        + _tokenised(text_bytes(params, "train"))
        + _read(model, 6)
    )


def _search(params: Params, weights: float) -> Work:
    """Choosing the scales of so many weights."""
    return Work(exps=(SEARCHED if params.gptq.mse else 1) * weights)


def _sweep(params: Params, rows: int, columns: int, cycles: int) -> Work:
    """GPTQ on a matrix, from its second moments on."""
    return Work(
        products=2 * rows * columns**2 * (1 / 2 + cycles),
        doubles=4 * columns**3,
        bytes=rows * columns * SWEPT * (1 + cycles / 2),
        calls=COLUMN_CALLS * columns * (1 + cycles),
    )


def _embedding(params: Params, model: ModelShape) -> Work:
    """Quantising the embedding on the head's inputs."""
    own, (tokens, length) = params.gptq.embedding, _windows(params)
    if own.bits == 16:
        return Work()
    tables = model.outside // model.hidden
    nearest = Work(exps=EMBEDDED * model.outside)
    if own.method == "nearest":
        return nearest
    moments = _forward(model, tokens, length, BATCH) + Work(doubles=2 * tokens * model.hidden**2)
    return nearest + moments + _sweep(params, tables, model.hidden, 0) + _read(model)


def _linears(params: Params, model: ModelShape) -> Work:
    """GPTQ's walk over all blocks, and saving."""
    tokens, length = _windows(params)
    work = FORWARDS * _forward(model, tokens, length) + _search(params, model.in_blocks) + _read(model, 8)
    for rows, columns in model.linears.values():
        moments = Work(products=2 * tokens * columns**2)
        work += model.layers * (moments + _sweep(params, rows, columns, params.gptq.descent_cycles))
    return work + Work(exps=PACKED / 5 * model.in_blocks)


def _harm(params: Params, model: ModelShape) -> Work:
    """What fewer bits cost each linear: four widths in its block, one through the blocks behind it, its divergence."""
    tokens, widths = params.calibrate.length, 4
    linears = model.layers * len(model.linears)
    blocks = _forward(model, tokens, tokens, layers=linears * (widths + (model.layers - 1) / 2))
    heads = (linears + model.layers) * _head(model, tokens)
    compared = linears * DIVERGED * tokens * model.vocabulary
    return blocks + heads + Work(exps=compared) + widths * _search(params, model.in_blocks)


def _gptq(params: Params, model: ModelShape) -> Work:
    model = pruned(params, model)
    harm = _harm(params, model) if params.gptq.budget_bytes else Work()
    return _embedding(params, model) + harm + _linears(params, model)


def _baseline(params: Params, model: ModelShape) -> Work:
    trained = _qad(params, model, model) if params.qad.enabled else Work()
    return ROUNDS * (_linears(params, model) + _packing(model)) + 2 * _search(params, model.in_blocks) + trained


def _eora(params: Params, model: ModelShape) -> Work:
    model = pruned(params, model)
    tokens, length = _windows(params)
    moments, spectra = 0.0, 0.0
    for rows, columns in model.linears.values():
        moments += 2 * tokens * columns**2
        spectra += columns**3 + SINGULAR * min(rows, columns) ** 2 * max(rows, columns)
    run = 4 * _forward(model, tokens, length) + model.layers * Work(doubles=moments, spectra=spectra)
    if params.eora.budget_bytes is None:
        return run + _read(model, 6)
    measured = min(EORA_WINDOWS, params.calibrate.windows) * length
    worth = 3 * _forward(model, measured, length) + 3 * _head(model, measured)
    share = measured / tokens
    return run + worth + model.layers * Work(doubles=share * moments, spectra=spectra / 2) + _read(model, 6)


SINGULAR = 5
"""Singular values and vectors, in eigenvalues and vectors of a matrix of the smaller side."""
EORA_WINDOWS = 8
"""Calibration windows on which stage eora measures what ranks are worth, at most."""


def _packing(model: ModelShape) -> Work:
    return Work(exps=PACKED * model.in_blocks + 8 * model.outside) + _read(model)


def _generation(model: ModelShape, tokens: float, together: int = 1) -> Work:
    """So many tokens one after another; each reads all weights once."""
    weights = 4 * (model.in_blocks + model.vocabulary * model.hidden)
    spent = 2 * (model.in_blocks + model.vocabulary * model.hidden) * (together if together > 1 else 0)
    return tokens * Work(products=spent, bytes=weights, calls=BLOCK_CALLS * model.layers + 200)


PROMPTS = 8
"""Prompts that are continued together."""


def _evaluate(params: Params, model: ModelShape, item: str) -> Work:
    own, protocol = params.evaluate, needs.protocol(params)
    windows = []
    for split in ("test", "test_ood"):
        found = max(text_bytes(params, split) // needs.BYTES_PER_TOKEN // max(protocol.stride, 1), 1)
        windows.append(min(found, own.max_windows or found))
    tokens = sum(windows) * protocol.length
    passes = _forward(model, tokens, protocol.length, own.batch) + 2 * _head(model, tokens)
    return passes + _generation(model, own.new_tokens, PROMPTS) + _read(model, 3)


def _measure(params: Params, model: ModelShape) -> Work:
    own = params.measure
    each = _generation(model, (own.generations + 1) * own.new_tokens) + _generation(model, 2 * own.new_tokens, 4)
    return MODELS * own.rounds * (each + _read(model, 4) + Work(starts=2.5))


def _kv_cache(params: Params, model: ModelShape) -> Work:
    own, work = params.kv_cache, _read(model) + Work(starts=1.0)  # HQQ
    for context in own.contexts:
        tokens = max(own.tokens // context, 1) * context
        pieces = tokens / own.residual
        held = 2 * 4 * model.kv_heads * model.head_dim * context / 2  # of a layer, on average
        quantised = model.layers * pieces * Work(bytes=8 * held, calls=QUANTISE_CALLS)
        once = _forward(model, tokens, own.residual) + _head(model, tokens)
        work += (1 + len(own.bits)) * once + len(own.bits) * quantised
    return work


QUANTISE_CALLS = 900
"""Small calls of quantising the keys and values of a piece in a layer, and of reading them back."""


def _harness(params: Params, model: ModelShape, item: str) -> Work:
    task = item.partition("-")[2]
    documents, each = DOCUMENTS.get(task, (0, 0))
    path = Path(f"data/harness_data/{task}/documents.jsonl")
    if task == "corpus" or not documents:
        size = path.stat().st_size if path.is_file() else text_bytes(params, "test")
        documents = path.read_bytes().count(b"\n") or 1 if path.is_file() else 100
        each = size / needs.BYTES_PER_TOKEN / documents
    share = min(params.harness.limit or documents, documents) / documents
    tokens = documents * each * share
    length = int(min(max(each, 32), model.context or needs.UNLIMITED))
    passes = _forward(model, tokens, length, params.harness.batch) + 2 * _head(model, tokens)
    return passes + _tokenised(2 * tokens * needs.BYTES_PER_TOKEN) + _read(model) + Work(starts=2.0)  # lm_eval


SHORTENING = (
    "calibrate.windows",
    "importance.windows",
    "lora.steps",
    "gptq.descent_cycles",
    "evaluate.max_windows",
    "evaluate.new_tokens",
    "measure.generations",
    "kv_cache.tokens",
    "harness.limit",
)
"""Parameters that can be halved without another one having to change."""
Row = Callable[[Params, ModelShape], Work]
WORK: dict[str, Row] = {
    "corpus": lambda params, model: _tokenised(params.corpus.train_bytes / 4),
    "fetch": lambda params, model: _read(model, 20),  # hashes and looks at all of it
    "overlap": lambda params, model: _tokenised(text_bytes(params, "train") / 4),
    "vocabulary": lambda params, model: _tokenised(text_bytes(params, params.vocabulary.corpus)) + _read(model),
    "calibrate": _calibrate,
    "importance": _importance,
    "depth_prune": _depth_prune,
    "wanda": _wanda,
    "lora": _lora,
    "gptq": _gptq,
    "eora": _eora,
    "package": lambda params, model: _packing(pruned(params, model)),
    "baseline_lora": lambda params, model: _recovery(params, model, model, masked=False),
    "sensitivity": lambda params, model: _embedding(params, model) + _harm(params, model),
    "qad": lambda params, model: _qad(params, pruned(params, model), model),
    "baseline": _baseline,
    "measure": _measure,
    "kv_cache": lambda params, model: _kv_cache(params, pruned(params, model)),
    "report": lambda params, model: Work(starts=3.0),
}
"""What a stage has to do, without its start."""
MATRIX: dict[str, Callable[[Params, ModelShape, str], Work]] = {"evaluate": _evaluate, "harness": _harness}
"""The same for one item of a stage with a matrix; the item begins with the model's name."""
PRUNED = ("depth_prune", "wanda", "lora", "gptq", "eora", "qad", "package")
"""Models without the layers that depth_prune removes."""
LIGHT = ("code", "corpus", "overlap", "harness_data", "hardware_fit", "report")
"""Stages that import no PyTorch."""


def _passed_on(params: Params, model: str) -> bool:
    """Whether the model of this name is the one before it, whose figures evaluate takes."""
    nothing = model == "depth_prune" and params.depth_prune.remove == 0
    return nothing or (model != "package" and not preflight.enabled(params, model))


def work(params: Params, model: ModelShape, address: str) -> Work:
    """What a stage of dvc.yaml has to do, its start included.

    Args:
        address: a stage, or one item of a matrix: "evaluate@gptq".
    """
    params = rules.settle_all(params, model)
    name, _, item = address.partition("@")
    enabled = name not in Params.model_fields or preflight.enabled(params, name)
    start = Work(starts=FIRST if enabled and name not in LIGHT else SHORT)
    if not enabled:
        return start
    if name == "evaluate" and _passed_on(params, item):
        return start
    if name in MATRIX:
        smaller = item.partition("-")[0] in PRUNED
        return start + MATRIX[name](params, pruned(params, model) if smaller else model, item)
    return start + (WORK[name](params, model) if name in WORK else Work())


def shortest(
    params: Params, model: ModelShape, addresses: Collection[str], speed: Mapping[str, float]
) -> tuple[str, float] | None:
    """The parameter that shortens these stages most when it is halved, and the seconds that this saves, one by one."""

    def whole(tried: Params) -> float:
        return sum(work(tried, model, address).seconds(speed) for address in addresses)

    params = rules.settle_all(params, model)
    saved, now = {}, whole(params)
    for name in SHORTENING:
        section, _, key = name.partition(".")
        own = getattr(params, section)
        value = getattr(own, key)
        if value is None and name == "harness.limit":  # none: all of them
            value = max([DOCUMENTS[task][0] for task in own.tasks if task in DOCUMENTS], default=None)
        if value is not None and value > 1:
            tried = params.model_copy(update={section: own.model_copy(update={key: value // 2})})
            saved[name] = now - whole(tried)
    name = max(saved, key=lambda name: saved[name], default=None)
    return (name, saved[name]) if name and saved[name] > 0 else None
