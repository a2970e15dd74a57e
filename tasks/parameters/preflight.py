"""What can be known before any weight is read: does every enabled stage work with this model, on this machine?

From params.yaml and the model's config.json alone, in a fraction of a second, so that a value that would break the
last stage stops the first one. All problems are reported at once. It reads no weights, downloads nothing and imports no
torch.

The needs are estimates, in bytes; fp32 = 4 bytes per parameter, and each dense stage works in fp32:
    memory of a stage = the libraries' own + the models it holds + its activations (`MEMORY`, one row per stage)
    disk = what the stages still to run write, twice: in the workspace and in DVC's cache (`DISK`)
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import families
from tasks.algorithms.scoring import protocols
from tasks.parameters import machine
from tasks.parameters.schema import Params

DEVICES = Path("data/devices")
"""One profile per device, <name>.yaml."""
FETCHED = Path("data/fetch/model")
"""Where fetch puts a hub model; a local one is looked at where it is."""
LARGEST_CONFIG = 2**20
"""Bytes of a config.json that are read; the folder is untrusted."""
PACKED = 32
"""gptqmodel 7.6 packs codes in 32 x 32 tiles, whatever the bits, and refuses other sizes only when it is done."""
LIBRARIES = 700 * 2**20
"""Bytes that a process holds after importing torch, transformers and gptqmodel."""
ACTIVATIONS = (16, 4)
"""Values kept for a backward pass per token and layer, in units of the hidden and of the MLP size."""
PROBE = 128
"""Tokens on which stage vocabulary compares the logits of both models."""
UNLIMITED = 2048
"""Tokens that lm_eval takes for the context of a model without one."""
FOLLOWS = {"baseline_lora": "lora", "baseline": "gptq"}
"""Stages that pass their input on where another one is switched off."""
SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings")


@dataclass(frozen=True)
class Shape:
    """A model's sizes, from its config.json; `linears` are those of one block: name -> (out_features, in_features)."""

    layers: int
    hidden: int
    mlp: int
    vocabulary: int
    context: int | None
    linears: Mapping[str, tuple[int, int]]
    tied: bool
    stored: int
    """Bytes per parameter in the checkpoint."""
    head: int
    """Values of one attention head."""
    window: int | None
    """Tokens that attention reaches back; None: all."""

    @cached_property
    def in_blocks(self) -> int:
        """Parameters of all blocks' linears."""
        return self.layers * sum(rows * columns for rows, columns in self.linears.values())

    @cached_property
    def outside(self) -> int:
        """Parameters of embedding and head."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def dense(self) -> int:
        """Bytes of all weights in fp32."""
        return 4 * (self.in_blocks + self.outside)

    @property
    def widest(self) -> int:
        """The largest in_features."""
        return max(columns for _, columns in self.linears.values())

    def backward(self, tokens: int) -> int:
        """Bytes that a backward pass over `tokens` tokens keeps: activations of each layer, logits, gradient."""
        per_hidden, per_mlp = ACTIVATIONS
        return 4 * tokens * (self.layers * (per_hidden * self.hidden + per_mlp * self.mlp) + 3 * self.vocabulary)


def read_config(folder: Path) -> dict[str, Any]:
    """A model folder's config.json.

    Raises:
        InputError: it is missing, far too large, no valid JSON, or no object.
    """
    path = folder / "config.json"
    try:
        if (size := path.stat().st_size) > LARGEST_CONFIG:
            raise InputError(f"{path} has {size} bytes, no config has above {LARGEST_CONFIG}; take another model")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{folder} has no config.json, so it is no model folder; check fetch.model.path") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); fetch the model again") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} holds {type(config).__name__}, expected an object; fetch the model again")
    return config


def shape(config: Mapping[str, Any]) -> Shape:
    """The sizes that a config.json gives, after refusing what the pipeline doesn't run.

    Raises:
        InputError: code of its own, already quantised, unsupported architecture, a size missing or no whole number.
    """
    for key, value in _entries(config):
        if key == "auto_map":
            raise InputError(
                "the model's config.json has `auto_map`: it wants to run Python code of its own, which is never done;"
                " take a model that transformers supports itself"
            )
        if key.endswith("attn_implementation") and "/" in str(value):
            raise InputError(
                f"the model's config.json asks for attention code from elsewhere ({key} = {value!r}); remove that entry"
            )
    if config.get("quantization_config"):
        raise InputError(
            "the model is quantised already (`quantization_config` in its config.json); take its dense original"
        )
    named = config.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise InputError(f"the model's config.json has architectures = {named!r}, expected a list of names")
    families.family(config)
    for key in (*SIZES, *OPTIONAL_SIZES):
        value = config.get(key)
        if value is None and key in OPTIONAL_SIZES:
            continue
        if type(value) is not int or not 1 <= value < 2**31:
            raise InputError(f"the model's config.json has {key} = {value!r}, expected a whole number above 0")
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return Shape(
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        mlp=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        context=config.get("max_position_embeddings"),
        linears=families.linear_shapes(config),
        tied=bool(config.get("tie_word_embeddings")),
        stored=2 if "16" in dtype else 4,
        head=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        window=config.get("sliding_window") if config.get("use_sliding_window", True) else None,
    )


def check_tokenizer(size: int, vocabulary: int) -> None:
    """Refuse a tokenizer whose ids don't fit the embedding.

    Args:
        size: tokens, added ones included.
        vocabulary: rows of the embedding.

    Raises:
        InputError: it has more.
    """
    if size > vocabulary:
        raise InputError(
            f"the tokenizer has {size} tokens, the model's embedding {vocabulary} rows (vocab_size);"
            " they don't belong together, fetch both from one place"
        )


def tokens_needed(params: Params) -> dict[str, tuple[int, str]]:
    """Per corpus: how many tokens the enabled stages need at least, and the parameters that say so."""
    needs = {}
    if params.calibrate.enabled:
        tokens = params.calibrate.windows * params.calibrate.length
        needs["calibration"] = (tokens, "calibrate.windows or calibrate.length")
    if params.lora.enabled:
        needs["train"] = (params.lora.length, "lora.length")
    if params.evaluate.enabled:
        own = _protocol(params)
        key = "evaluate.length with another evaluate.protocol" if own.fixed else "evaluate.length"
        needs["test"] = needs["test_ood"] = (2 if own.partial else own.length, key)
    if params.kv_cache.enabled:
        needs["test"] = max(needs.get("test", (0, "")), (max(params.kv_cache.contexts), "kv_cache.contexts"))
    return needs


def check(
    params: Params,
    config: Mapping[str, Any],
    *,
    tokenizer_size: int | None = None,
    stage: str | None = None,
    devices: Path | None = None,
) -> None:
    """Check every enabled stage against the model and the machine.

    Args:
        config: the model's config.json.
        tokenizer_size: tokens, where known.
        stage: the stage about to run; memory and disk are counted for it and the ones after it. None: for all.
        devices: folder of the device profiles.

    Raises:
        InputError: one line per problem.
    """
    model = shape(config)
    if tokenizer_size is not None:
        check_tokenizer(tokenizer_size, model.vocabulary)
    problems = [sentence for name, rule in RULES.items() if _enabled(params, name) for sentence in rule(params, model)]
    problems += _device_problems(params, devices or DEVICES)
    todo = [name for name in _from(stage) if _enabled(params, name)]
    problems += _memory_problems(params, model, todo)
    problems += _disk_problems(params, model, todo)
    _raise(problems)


def check_workspace(params: Params, stage: str | None = None) -> None:
    """`check` with the model that params.yaml names, if its config.json is here already; else the device alone.

    Raises:
        InputError: one line per problem.
    """
    source = params.fetch.model
    folder = Path(source.path) if source.hub is None else FETCHED
    fetched = stage is None or _position(stage) > _position("fetch")  # before that, FETCHED may be another model
    if (source.hub is None or fetched) and (folder / "config.json").exists():
        check(params, read_config(folder), stage=stage)
    else:
        _raise(_device_problems(params, DEVICES))


def _calibrate(params: Params, model: Shape) -> Iterator[str]:
    yield from _too_long("calibrate.length", params.calibrate.length, model)


def _evaluate(params: Params, model: Shape) -> Iterator[str]:
    own = _protocol(params)
    if not own.fixed:
        yield from _too_long("evaluate.length", own.length, model)
    elif sentence := protocols.too_long(own, model.context):
        yield f"evaluate.{sentence}"


def _measure(params: Params, model: Shape) -> Iterator[str]:
    tokens = params.measure.prompt_tokens + params.measure.new_tokens
    yield from _too_long("measure.prompt_tokens + measure.new_tokens", tokens, model)


def _depth_prune(params: Params, model: Shape) -> Iterator[str]:
    own = params.depth_prune
    free = max(model.layers - own.protect_first - own.protect_last, 0)
    if own.remove > free:
        yield (
            f"depth_prune.remove = {own.remove} of {model.layers} layers, but {own.protect_first} + {own.protect_last}"
            f" protected ones leave only {free} to choose from; lower depth_prune.remove, protect_first or protect_last"
        )
    elif own.remove >= model.layers:
        yield f"depth_prune.remove = {own.remove} would remove every layer of the model; lower it"


def _wanda(params: Params, model: Shape) -> Iterator[str]:
    own = params.wanda
    if own.pattern == "n_m" and own.of is not None:
        yield from _indivisible("wanda.of", own.of, model)


def _lora(params: Params, model: Shape) -> Iterator[str]:
    within = {"all-linear": "", "attention": "self_attn.", "mlp": "mlp."}[params.lora.targets]
    yield from _rank_too_high("lora.rank", params.lora.rank, model, within)
    yield from _too_long("lora.length", params.lora.length, model)


def _gptq(params: Params, model: Shape) -> Iterator[str]:
    if params.gptq.group_size != -1:
        yield from _indivisible("gptq.group_size", params.gptq.group_size, model)
    odd = [name for name, sizes in model.linears.items() if any(size % PACKED for size in sizes)]
    if odd:
        rows, columns = model.linears[odd[0]]
        yield (
            f"gptq packs {PACKED} rows and columns at a time, but {odd[0]} is {rows} x {columns};"
            " switch gptq and eora off, or take another model"
        )

    if params.gptq.joint:
        yield from _indivisible("gptq.joint.of", params.gptq.joint.of, model)
    table = params.gptq.embedding
    if table.bits < 16 and model.hidden % table.group_size:
        yield (
            f"gptq.embedding.group_size = {table.group_size} does not divide the {model.hidden} values of a"
            f" token's embedding; choose a divisor of {model.hidden}"
        )


def _eora(params: Params, model: Shape) -> Iterator[str]:
    if params.eora.rank is not None:
        yield from _rank_too_high("eora.rank", params.eora.rank, model)


def _kv_cache(params: Params, model: Shape) -> Iterator[str]:
    own = params.kv_cache
    yield from _too_long("kv_cache.contexts", max(own.contexts), model)
    if own.group_size and model.head % own.group_size:
        yield (
            f"kv_cache.group_size = {own.group_size} does not divide the {model.head} values of an attention head;"
            f" choose a divisor of {model.head}, or null for the whole head"
        )
    if model.window:
        yield (
            f"kv_cache can't quantise the cache of a model whose attention has a window (sliding_window ="
            f" {model.window} in its config.json): set kv_cache.enabled to false"
        )


RULES: dict[str, Callable[[Params, Shape], Iterator[str]]] = {
    "calibrate": _calibrate,
    "depth_prune": _depth_prune,
    "wanda": _wanda,
    "lora": _lora,
    "gptq": _gptq,
    "eora": _eora,
    "evaluate": _evaluate,
    "measure": _measure,
    "kv_cache": _kv_cache,
}
"""Per section of params.yaml: the problems that its values have with the model."""


def _boundary(params: Params, model: Shape) -> int:
    """Bytes of the calibration activations at one block boundary, and the next one's."""
    return 2 * 4 * params.calibrate.windows * params.calibrate.length * model.hidden


def _lora_memory(params: Params, model: Shape) -> int:
    own = params.lora
    taught = own.distillation.weight > 0 or own.distillation.hidden > 0 or own.method == "block_reconstruction"
    models = 2 if taught else 1  # student; teacher
    return models * model.dense + 4 * model.in_blocks + models * model.backward(own.batch * own.length)


def _protocol(params: Params) -> protocols.Protocol:
    return protocols.protocol(params.evaluate.protocol, params.evaluate.length, params.evaluate.stride)


def _evaluate_memory(params: Params, model: Shape) -> int:
    tokens = params.evaluate.batch * _protocol(params).length
    return model.dense + 3 * 4 * tokens * model.vocabulary  # logits, their log-softmax, a copy


def _kv_cache_memory(params: Params, model: Shape) -> int:
    cached = 2 * 4 * model.layers * model.hidden  # keys and values in fp32, with as many heads as queries
    return model.dense + max(params.kv_cache.contexts) * (3 * 4 * model.vocabulary + cached)


def _harness_memory(params: Params, model: Shape) -> int:
    tokens = params.harness.batch * (model.context or UNLIMITED)
    return model.dense + 3 * 4 * tokens * model.vocabulary  # as in evaluate


def _gptq_memory(params: Params, model: Shape) -> int:
    return 2 * model.dense + 2 * _boundary(params, model) + 4 * 4 * model.widest**2  # the Hessian and its factors


def _eora_memory(params: Params, model: Shape) -> int:
    return 2 * model.dense + 2 * _boundary(params, model) + 4 * 8 * model.widest**2  # float64 eigenvectors


def _wanda_memory(params: Params, model: Shape) -> int:
    return model.dense + _boundary(params, model) + 24 * model.hidden * model.mlp  # scores, sorted, their indices


MEMORY: dict[str, Callable[[Params, Shape], int]] = {
    "fetch": lambda params, model: model.stored * model.vocabulary * model.hidden,  # one tensor at a time
    "vocabulary": lambda params, model: model.dense + 3 * 4 * PROBE * model.vocabulary,
    "calibrate": lambda params, model: model.dense + _boundary(params, model),
    "importance": lambda params, model: 2 * model.dense + model.backward(params.calibrate.length),  # and gradients
    "depth_prune": lambda params, model: model.dense + model.backward(params.calibrate.length),
    "wanda": _wanda_memory,
    "lora": _lora_memory,
    "gptq": _gptq_memory,
    "eora": _eora_memory,
    "package": lambda params, model: 4 * model.in_blocks // model.layers + 4 * model.outside,  # block by block
    "baseline_lora": _lora_memory,
    "baseline": _gptq_memory,
    "evaluate": _evaluate_memory,
    "measure": lambda params, model: model.dense,  # its few tokens at batch 4 hardly count
    "kv_cache": _kv_cache_memory,
    "harness": _harness_memory,
}
"""Bytes that a stage holds at its peak, without the libraries."""


def _quantised(params: Params, model: Shape) -> int:
    widest = 8 if params.gptq.budget_bytes is not None else params.gptq.bits
    codes = model.in_blocks * widest // 8 if params.gptq.enabled else 4 * model.in_blocks
    adapter = params.eora.budget_bytes or 0
    return codes * 5 // 4 + adapter + 4 * model.outside  # scales and adapter: a quarter at most; embedding in fp32


DISK: dict[str, Callable[[Params, Shape], int]] = {
    "fetch": lambda params, model: model.stored * (model.in_blocks + model.outside),
    "vocabulary": lambda params, model: model.stored * (model.in_blocks + model.outside),
    "depth_prune": lambda params, model: model.dense,
    "wanda": lambda params, model: model.dense,
    "lora": lambda params, model: model.dense,
    "gptq": _quantised,
    "eora": _quantised,
    "package": _quantised,
    "baseline_lora": lambda params, model: model.dense,
    "baseline": _quantised,
}
"""Bytes that a stage writes, at most; a stage that is switched off links its input."""


def _memory_problems(params: Params, model: Shape, todo: list[str]) -> Iterator[str]:
    needs = {name: LIBRARIES + MEMORY[name](params, model) for name in todo if name in MEMORY}
    if not needs:
        return
    greedy = max(needs, key=lambda name: needs[name])
    available = available_memory()
    if needs[greedy] > available:
        yield (
            f"{greedy} needs about {_size(needs[greedy])} of memory, {_size(available)} are available;"
            f" end other programs, lower its batch, length or windows, or take a smaller model"
        )


def _disk_problems(params: Params, model: Shape, todo: list[str]) -> Iterator[str]:
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


def _device_problems(params: Params, devices: Path) -> Iterator[str]:
    name = params.hardware_fit.device
    profiles = sorted(path.stem for path in devices.glob("*.yaml") if path.stem != "host")  # measured, no source
    if params.hardware_fit.enabled and name not in profiles:
        known = ", ".join(profiles) or "none"
        yield f"hardware_fit.device = {name} has no profile {devices / name}.yaml; known are {known}"


def _too_long(key: str, length: int, model: Shape) -> Iterator[str]:
    if model.context is not None and length > model.context:
        yield f"{key} = {length} is above the model's context of {model.context} tokens; lower it"


def _indivisible(key: str, divisor: int, model: Shape) -> Iterator[str]:
    odd = {name: columns for name, (_, columns) in model.linears.items() if columns % divisor}
    if odd:
        name, columns = next(iter(odd.items()))
        yield f"{key} = {divisor} does not divide the {columns} inputs of {name}; choose a divisor of {columns}"


def _rank_too_high(key: str, rank: int, model: Shape, within: str = "") -> Iterator[str]:
    chosen = {name: min(sizes) for name, sizes in model.linears.items() if name.startswith(within)}
    name = min(chosen, key=lambda linear: chosen[linear])
    if rank > chosen[name]:
        rows, columns = model.linears[name]
        yield f"{key} = {rank} is above the smallest side of {name} ({rows} x {columns}); lower it to {chosen[name]}"


def _enabled(params: Params, name: str) -> bool:
    """Whether a stage computes; the plain model has only what the compressed one has (`FOLLOWS`)."""
    names = (name, FOLLOWS[name]) if name in FOLLOWS else (name,)
    return all(getattr(getattr(params, each), "enabled", True) for each in names)


def _position(stage: str) -> int:
    return list(Params.model_fields).index(stage.partition("@")[0])


def _from(stage: str | None) -> list[str]:
    """The stages from this one on; params.yaml lists them in their order."""
    return list(Params.model_fields)[_position(stage) if stage else 0 :]


def _entries(config: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value, at any depth."""
    waiting = [config]
    while waiting:
        item = waiting.pop()
        if isinstance(item, Mapping):
            yield from ((str(key), value) for key, value in item.items())
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)


def _size(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _raise(problems: Iterator[str] | list[str]) -> None:
    found = list(problems)
    if found:
        raise InputError("\n".join(found))
