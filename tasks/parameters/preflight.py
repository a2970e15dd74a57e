"""What can be known before any weight is read: does every enabled stage work with this model, on this machine?

From params.yaml and the model's config.json alone, in a fraction of a second, so that a value that would break the
last stage stops the first one. All problems are reported at once. It reads no weights, downloads nothing and, for the
families that are known by heart, imports no torch.
What memory and disk the stages need is estimated by `needs`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tasks.algorithms.errors import InputError
from tasks.algorithms.model.shape import ModelShape, shape_of_config
from tasks.algorithms.quantisation import packable
from tasks.algorithms.scoring import protocols
from tasks.parameters import needs, prompt_file, rules, special_tokens
from tasks.parameters.schema import Params

DEVICES = Path("data/devices")
"""One profile per device, <name>.yaml."""
FETCHED = Path("data/fetch/model")
"""Where fetch puts a hub model; a local one is looked at where it is."""
LARGEST_CONFIG = 2**20
"""Bytes of a config.json that are read; the folder is untrusted."""
FOLLOWS = {"baseline_lora": ("lora",), "sensitivity": ("gptq", "baseline"), "baseline": ("gptq",)}
"""Stages that do nothing where one of others is switched off."""


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


def model_shape(config: Mapping[str, Any]) -> ModelShape:
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
    return shape_of_config(config)


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


def check_special_tokens(params: Params, tokenizer: special_tokens.Known) -> None:
    """Refuse a tokenizer without what an enabled stage asks of it.

    Raises:
        InputError: one line per problem.
    """
    _raise(special_tokens.problems(params, tokenizer))


def tokens_needed(params: Params) -> dict[str, tuple[int, str]]:
    """Per corpus: how many tokens the enabled stages need at least, and the parameters that say so."""
    least = {}
    if params.calibrate.enabled:
        tokens = params.calibrate.windows * params.calibrate.length
        least["calibration"] = (tokens, "calibrate.windows or calibrate.length")
    if params.lora.enabled:
        least["train"] = (params.lora.length, "lora.length")
    if params.evaluate.enabled:
        own = needs.protocol(params)
        key = "evaluate.length with another evaluate.protocol" if own.fixed else "evaluate.length"
        least["test"] = least["test_ood"] = (2 if own.partial else own.length, key)
    if params.kv_cache.enabled:
        least["test"] = max(least.get("test", (0, "")), (max(params.kv_cache.contexts), "kv_cache.contexts"))
    return least


def check(
    params: Params,
    config: Mapping[str, Any],
    *,
    tokenizer_size: int | None = None,
    tokenizer: special_tokens.Known | None = None,
    stage: str | None = None,
    devices: Path | None = None,
    found: Iterable[str] = (),
) -> None:
    """Check every enabled stage against the model and the machine.

    Args:
        config: the model's config.json.
        tokenizer_size: tokens, where known.
        tokenizer: which special tokens there are, where known.
        stage: the stage about to run; memory and disk are counted for it and the ones after it. None: for all.
        devices: folder of the device profiles.
        found: problems that are known already, told with the others.

    Raises:
        InputError: one line per problem.
    """
    model = model_shape(config)
    params = rules.settle_all(params, model)
    if tokenizer_size is not None:
        check_tokenizer(tokenizer_size, model.vocabulary)
    problems = list(found)
    problems += [sentence for name, rule in RULES.items() if enabled(params, name) for sentence in rule(params, model)]
    problems += special_tokens.problems(params, tokenizer) if tokenizer else []
    problems += [*_device_problems(params, devices or DEVICES), *_accelerator_problems(params)]
    todo = [name for name in _from(stage) if enabled(params, name)]
    problems += needs.problems(params, model, todo)
    _raise(problems)


def check_workspace(params: Params, stage: str | None = None) -> None:
    """`check` with the model that params.yaml names, if its config.json is here already; else what needs no model.

    Raises:
        InputError: one line per problem.
    """
    fetched = stage is None or _position(stage) > _position("fetch")  # before that, FETCHED may be another model
    if folder := _model_folder(params, fetched):
        tokenizer = special_tokens.of_files(folder)
        check(params, read_config(folder), tokenizer=tokenizer, stage=stage, found=_prompt_problems(params))
    else:
        _raise([*_prompt_problems(params), *_device_problems(params, DEVICES), *_accelerator_problems(params)])


def _prompt_problems(params: Params) -> Iterator[str]:
    path = Path(params.evaluate.prompts) if params.evaluate.enabled else None
    if path and path.is_file():  # else DVC says that it isn't there
        try:
            prompt_file.read(path)
        except InputError as error:
            yield str(error)


def at_once(params: Params, fetched: bool) -> int | None:
    """How many stages have room in memory side by side, each as large as the largest; at least 1.

    Args:
        fetched: whether stage fetch is done.

    Returns:
        None as long as a hub model's config.json is not here.

    Raises:
        InputError: the model is none that the pipeline runs.
    """
    folder = _model_folder(params, fetched)
    if folder is None:
        return None
    todo = [name for name in _from(None) if enabled(params, name)]
    model = model_shape(read_config(folder))
    needed = needs.memory(rules.settle_all(params, model), model, todo)
    return max(needs.available_memory() // max(needed.values(), default=needs.LIBRARIES), 1)


def model_here(params: Params, stage: str | None = None) -> ModelShape | None:
    """The sizes of the model that params.yaml names; None as long as a hub model's config.json is not here.

    Args:
        stage: the stage about to run; None: fetch is done.

    Raises:
        InputError: the model is none that the pipeline runs.
    """
    folder = _model_folder(params, stage is None or _position(stage) > _position("fetch"))
    return model_shape(read_config(folder)) if folder else None


def _model_folder(params: Params, fetched: bool) -> Path | None:
    """Where the model's config.json is by now; None where it is still in the hub."""
    source = params.fetch.model
    folder = Path(source.path) if source.hub is None else FETCHED
    return folder if (source.hub is None or fetched) and (folder / "config.json").exists() else None


def _calibrate(params: Params, model: ModelShape) -> Iterator[str]:
    yield from _too_long("calibrate.length", params.calibrate.length, model)


def _evaluate(params: Params, model: ModelShape) -> Iterator[str]:
    own = needs.protocol(params)
    if not own.fixed:
        yield from _too_long("evaluate.length", own.length, model)
    elif sentence := protocols.too_long(own, model.context):
        yield f"evaluate.{sentence}"


def _measure(params: Params, model: ModelShape) -> Iterator[str]:
    tokens = params.measure.prompt_tokens + params.measure.new_tokens
    yield from _too_long("measure.prompt_tokens + measure.new_tokens", tokens, model)


def _depth_prune(params: Params, model: ModelShape) -> Iterator[str]:
    own = params.depth_prune
    free = max(model.layers - own.protect_first - own.protect_last, 0)
    if own.remove > free:
        yield (
            f"depth_prune.remove = {own.remove} of {model.layers} layers, but {own.protect_first} + {own.protect_last}"
            f" protected ones leave only {free} to choose from; lower depth_prune.remove, protect_first or protect_last"
        )
    elif own.remove >= model.layers:
        yield f"depth_prune.remove = {own.remove} would remove every layer of the model; lower it"


def _wanda(params: Params, model: ModelShape) -> Iterator[str]:
    own = params.wanda
    if own.pattern == "n_m" and own.of is not None:
        yield from _indivisible("wanda.of", own.of, model)


def _lora(params: Params, model: ModelShape) -> Iterator[str]:
    yield from _rank_too_high("lora.rank", params.lora.rank, model, params.lora.targets)
    yield from _too_long("lora.length", params.lora.length, model)


def _gptq(params: Params, model: ModelShape) -> Iterator[str]:
    if params.gptq.group_size != -1:
        yield from _indivisible("gptq.group_size", params.gptq.group_size, model)
    if sentence := packable.refusal(model.linears):
        yield sentence
    if params.gptq.joint:
        yield from _indivisible("gptq.joint.of", params.gptq.joint.of, model)
    table = params.gptq.embedding
    if table.bits < 16 and model.hidden % table.group_size:
        yield (
            f"gptq.embedding.group_size = {table.group_size} does not divide the {model.hidden} values of a"
            f" token's embedding; choose a divisor of {model.hidden}"
        )


def _eora(params: Params, model: ModelShape) -> Iterator[str]:
    if params.eora.rank is not None:
        yield from _rank_too_high("eora.rank", params.eora.rank, model)


def _kv_cache(params: Params, model: ModelShape) -> Iterator[str]:
    own = params.kv_cache
    yield from _too_long("kv_cache.contexts", max(own.contexts), model)
    if own.group_size and model.head_dim % own.group_size:
        yield (
            f"kv_cache.group_size = {own.group_size} does not divide the {model.head_dim} values of an attention head;"
            f" choose a divisor of {model.head_dim}, or null for the whole head"
        )
    if model.window or model.mixed:
        size = model.window or "of some layers"
        yield (
            f"kv_cache can't quantise the cache of a model whose attention has a window (sliding_window ="
            f" {size} in its config.json): set kv_cache.enabled to false"
        )


RULES: dict[str, Callable[[Params, ModelShape], Iterator[str]]] = {
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


def _device_problems(params: Params, devices: Path) -> Iterator[str]:
    name = params.hardware_fit.device
    profiles = sorted(path.stem for path in devices.glob("*.yaml") if path.stem != "host")  # measured, no source
    if params.hardware_fit.enabled and name not in profiles:
        known = ", ".join(profiles) or "none"
        yield f"hardware_fit.device = {name} has no profile {devices / name}.yaml; known are {known}"


def _accelerator_problems(params: Params) -> Iterator[str]:
    if params.device == "cuda":
        import torch  # seconds, which a run on the CPU doesn't pay

        if not torch.cuda.is_available():
            yield (
                f"device = cuda, but PyTorch {torch.__version__} sees no GPU that it can use; set device to cpu, or"
                " install PyTorch's CUDA build of that version and check `nvidia-smi`"
            )


def _too_long(key: str, length: int, model: ModelShape) -> Iterator[str]:
    if model.context is not None and length > model.context:
        yield f"{key} = {length} is above the model's context of {model.context} tokens; lower it"


def _indivisible(key: str, divisor: int, model: ModelShape) -> Iterator[str]:
    odd = {name: columns for name, (_, columns) in model.linears.items() if columns % divisor}
    if odd:
        name, columns = next(iter(odd.items()))
        yield f"{key} = {divisor} does not divide the {columns} inputs of {name}; choose a divisor of {columns}"


def _rank_too_high(key: str, rank: int, model: ModelShape, targets: str = "all-linear") -> Iterator[str]:
    chosen = {name: min(model.linears[name]) for name in model.family.chosen(targets)}
    name = min(chosen, key=lambda linear: chosen[linear])
    if rank > chosen[name]:
        rows, columns = model.linears[name]
        yield f"{key} = {rank} is above the smallest side of {name} ({rows} x {columns}); lower it to {chosen[name]}"


def enabled(params: Params, name: str) -> bool:
    """Whether a stage with a section computes; the plain model has only what the compressed one has (`FOLLOWS`)."""
    names = (name, *FOLLOWS.get(name, ()))
    return all(getattr(getattr(params, each), "enabled", True) for each in names)


def _position(stage: str) -> int:
    """Where params.yaml has its section; one without comes before all."""
    name, known = stage.partition("@")[0], list(Params.model_fields)
    return known.index(name) if name in known else 0


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


def _raise(problems: Iterator[str] | list[str]) -> None:
    found = list(problems)
    if found:
        raise InputError("\n".join(found))
