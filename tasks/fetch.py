"""Bring model, tokenizer and corpora into data/fetch/: local files, or the Hugging Face hub's at a pinned commit.

A model folder is untrusted input. Cheap questions come first: config, tokenizer, corpora, and only then the weights, so
that a model the pipeline can't take is refused before its weights are read or downloaded. Taken are `SMALL` and
safetensors, never a pickle and never a link that leads out of the folder; no code of a model or data set is run.

The model is copied as it is (no conversion; sharded stays sharded). It is a copy, never a link: DVC makes the files of
its cache read-only, and a later edit of the user's own file must not reach into that cache.
Corpora become JSON lines of exactly {"text": str}, in their order; rows without text are dropped and counted.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import HfApi, snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import families
from tasks.models import dense_folder
from tasks.parameters import preflight
from tasks.parameters.schema import CorpusSource, ModelSource
from tasks.runtime import files
from tasks.sources import hub

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tasks.runtime.stage import Stage

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
"""Of a sharded checkpoint: tensor name -> file."""
SMALL = (
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
"""What is taken of a model folder beside the weights."""
QUANTISED = ("quantize_config.json", "quant_config.json")
"""Files beside the weights of a quantised checkpoint."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES = ("F64", "F32", "F16", "BF16")
NOT_WEIGHTS = "rotary_emb.inv_freq"
"""Old Llama checkpoints store this buffer; transformers computes it."""
CORPORA = ("train", "calibration", "test", "test_ood")


def run(stage: Stage) -> None:
    """Write data/fetch/model, data/fetch/corpora and data/fetch/source.json.

    Raises:
        InputError: the model or a corpus can't be used, or the hub can't be reached.
    """
    source, target = stage.params.fetch.model, stage.output("model")
    target.mkdir(parents=True)
    folder, inside = _model_folder(stage, source)
    config = check_folder(folder, inside)
    _copy(folder, inside, _present(folder, SMALL), target)
    tokenizer = _tokenizer(target)
    size = _tokenizer_size(tokenizer)
    preflight.check_tokenizer(size, config["vocab_size"])
    if source.hub is not None:  # of a local model everything was known before the stage started
        preflight.check(stage.everything, config, tokenizer_size=size, stage="fetch")

    into = stage.output("corpora")
    into.mkdir(parents=True)
    corpora = {name: _corpus(stage, name, into / f"{name}.jsonl") for name in CORPORA}
    for name, (tokens, keys) in preflight.tokens_needed(stage.everything).items():
        _check_length(into / f"{name}.jsonl", tokenizer, tokens, keys)

    weights = _weights(source, folder, inside)
    _copy(folder, inside, weights, target)
    tensors = check_weights(target, stage)
    record = {
        "model": _origin(source) | {"architecture": families.family(config).architecture, "tensors": tensors},
        "files": {file.name: {"bytes": file.stat().st_size, "sha256": files.sha256(file)} for file in target.iterdir()},
        "corpora": corpora,
    }
    files.write_json(stage.output("source.json"), record)


def check_folder(folder: Path, inside: Path | None = None) -> dict[str, Any]:
    """Refuse a model folder by its small files alone; no weight is read.

    Args:
        inside: no link may lead out of this folder; the model folder itself by default.

    Returns:
        The config.

    Raises:
        InputError: no config, code of its own, quantised already, unsupported architecture, a link that leads out, a
            text that is far too large.
    """
    for name in _present(folder, (*SMALL, *QUANTISED, INDEX)):
        _refuse_link(folder / name, inside or folder)
    dense_folder.check_sizes(folder)
    config = preflight.read_config(folder)
    preflight.shape(config)
    for name in _present(folder, QUANTISED):
        raise InputError(f"the model is quantised already ({name} beside its weights); take its dense original")
    if "auto_map" in _json(folder / "tokenizer_config.json"):
        raise InputError("tokenizer_config.json has `auto_map`: it wants to run Python code, which is never done")
    return config


def check_weights(folder: Path, stage: Stage) -> int:
    """Compare the tensors of a model folder with its config, and look for values that are no numbers.

    Returns:
        The number of tensors.

    Raises:
        InputError: a tensor is missing, unexpected, of another shape or type, or holds NaN or infinity.
    """
    expected, tied = _expected_tensors(folder)
    shards = _weight_files(folder)
    broken: list[str] = []
    found: dict[str, tuple[int, ...]] = {}
    with stage.progress("weights", len(expected) - len(tied) // 2) as progress:
        for name, tensor in _tensors(folder, shards):
            found[name] = tuple(tensor.shape)
            bad = int((~torch.isfinite(tensor)).sum())
            if bad:
                broken.append(f"{name} ({bad} of {tensor.numel()} values)")
            progress.update(len(found))
    extra = [name for name in found if name not in expected and not name.endswith(NOT_WEIGHTS)]
    stored = any(name in found for name in tied)  # one copy serves both, under either name
    _refuse_names("lack", [name for name in expected if name not in found and not (stored and name in tied)])
    _refuse_names("have unexpected", extra)
    for name, sizes in expected.items():
        if found.get(name, sizes) != sizes:
            raise InputError(
                f"the weights' {name} is {list(found[name])}, config.json makes it {list(sizes)};"
                " weights and config don't belong together"
            )
    if broken:
        raise InputError(f"the weights hold NaN or infinity in {_some(broken)}; fetch or train the model again")
    return len(found)


def _model_folder(stage: Stage, source: ModelSource) -> tuple[Path, Path]:
    """The model's folder without its weights if it is on the hub, and the folder that its links must stay in."""
    if source.hub is None:
        folder = _declared(stage, source.path)
        if not folder.is_dir():
            raise InputError(f"fetch.model.path = {source.path} is no folder; name a folder with a model")
        return folder, folder.resolve()
    folder = _download(source, [*SMALL, *QUANTISED, INDEX])
    return folder, folder.parent.parent.resolve()  # the hub's cache: snapshots/COMMIT/ links to files in blobs/


def _weights(source: ModelSource, folder: Path, inside: Path) -> list[str]:
    """Names of the weight files, the index among them; those of a hub model are downloaded."""
    if source.hub is not None:
        _download(source, [SINGLE] if not (folder / INDEX).exists() else _shards(folder))
    names = _weight_files(folder)
    if not names:
        raise InputError(_no_weights(source, folder))
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise InputError(f"{INDEX} names {_some(missing)}, which is not there; fetch the model again")
    for name in names:
        _refuse_link(folder / name, inside)
    return [*names, INDEX] if names != [SINGLE] else names


def _no_weights(source: ModelSource, folder: Path) -> str:
    if source.hub is not None:
        with hub.failures("model", source):
            names = HfApi().list_repo_files(source.hub, revision=source.revision)
    else:
        names = [path.name for path in folder.iterdir()]
    pickled = sorted(name for name in names if name.endswith(PICKLES))
    where = source.hub or source.path
    if pickled:
        return (
            f"{where} holds only pickled weights ({_some(pickled)}), which can run code when they are read;"
            " take a revision with safetensors"
        )
    return f"{where} holds no {SINGLE} and no {INDEX}; take a model with safetensors weights"


def _weight_files(folder: Path) -> list[str]:
    """The files of the weights: those of the index where there is one (the hub's may hold the same weights twice)."""
    if (folder / INDEX).exists():
        return _shards(folder)
    return [SINGLE] if (folder / SINGLE).exists() else []


def _shards(folder: Path) -> list[str]:
    weight_map = _json(folder / INDEX).get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    if not names or not all(isinstance(name, str) for name in names):
        raise InputError(f"{INDEX} has no `weight_map` of tensor names to file names; fetch the model again")
    for name in sorted(names):
        if Path(name).name != name or not name.endswith(".safetensors") or any(sign in name for sign in "*?["):
            raise InputError(f"{INDEX} names {name!r}, expected safetensors files of the model folder itself")
    return sorted(names)


def _expected_tensors(folder: Path) -> tuple[dict[str, tuple[int, ...]], tuple[str, ...]]:
    """Names and shapes that the config calls for; embedding and head where they are one matrix, else nothing."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):  # sizes alone, no memory
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # any entry of an untrusted config can be wrong in its own way
        raise InputError(f"transformers can't build the model of config.json: {hub.line(error)}") from error
    described = families.of_model(model)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    names = (f"{described.embedding}.weight", f"{described.head}.weight")
    return expected, names if config.tie_word_embeddings else ()


def _tensors(folder: Path, shards: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """One tensor at a time."""
    for shard in shards:
        try:
            with safe_open(folder / shard, framework="pt") as file:
                for name in sorted(file.keys()):
                    dtype = file.get_slice(name).get_dtype()
                    if dtype not in DTYPES:
                        raise InputError(f"the weights' {name} is stored as {dtype}, expected {', '.join(DTYPES)}")
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            why = hub.line(error)
            raise InputError(f"{shard} is no whole safetensors file ({why}); fetch the model again") from error


def _refuse_names(verb: str, names: list[str]) -> None:
    if names:
        raise InputError(f"the weights {verb} {_some(names)}; weights and config.json don't belong together")


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        return dense_folder.load_tokenizer(folder)
    except Exception as error:  # any entry of an untrusted tokenizer can be wrong in its own way
        raise InputError(f"the tokenizer can't be loaded ({hub.line(error)}); take a model folder with one") from error


def _tokenizer_size(tokenizer: PreTrainedTokenizerBase) -> int:
    return max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)  # ids may have gaps


def _check_length(corpus: Path, tokenizer: PreTrainedTokenizerBase, needed: int, keys: str) -> None:
    """Refuse a corpus with fewer tokens than a later stage needs; only as much of it as necessary is tokenised."""
    rows, tokens = 64, 0
    while tokens < needed:
        with open(corpus, encoding="utf-8") as file:
            texts = [json.loads(line)["text"] for line in itertools.islice(file, rows)]
        tokens = len(tokenizer("\n".join(texts), add_special_tokens=False, verbose=False)["input_ids"])
        if tokens < needed and len(texts) < rows:
            raise InputError(
                f"corpus {corpus.stem} has {tokens} tokens, {needed} are needed; name a longer one, or lower {keys}"
            )
        rows *= 4


def _corpus(stage: Stage, name: str, target: Path) -> dict[str, Any]:
    """Write one corpus, and say where it came from."""
    source = getattr(stage.params.fetch.corpora, name)
    rows = empty = 0
    with open(target, "w", encoding="utf-8", newline="\n") as file:
        for text in _texts(stage, name, source):
            if text.strip():
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                rows += 1
            else:
                empty += 1
    if not rows:
        raise InputError(
            f"corpus {name} ({source.hub or source.path}) is empty: {empty} rows, none with text; name another"
        )
    return _origin(source) | {
        "field": source.field,
        "rows": rows,
        "empty_rows_dropped": empty,
        "bytes": target.stat().st_size,
        "sha256": files.sha256(target),
    }


def _texts(stage: Stage, name: str, source: CorpusSource) -> Iterator[str]:
    """The texts of a corpus in their order, empty ones included."""
    if source.hub is None:
        path = _declared(stage, source.path)
        read = READERS.get(path.suffix)
        if read is None or not path.is_file():
            raise InputError(f"fetch.corpora.{name}.path = {source.path} is no {', '.join(READERS)} file; name one")
        values = read(path, source.field)
    else:
        values = _hub_rows(source)
    for row, value in values:
        if value is not None and not isinstance(value, str):
            raise InputError(f"{row} of corpus {name}: `{source.field}` is {type(value).__name__}, expected text")
        text = value or ""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"{row} of corpus {name} is no valid Unicode ({error.reason}); mend the file") from error
        yield text


def _json_lines(path: Path, field: str) -> Iterator[tuple[str, Any]]:
    for row, line in _lines(path):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, {row}: not valid JSON ({error}); a line is one object") from error
        if not isinstance(value, dict):
            raise InputError(f"{path}, {row}: holds {type(value).__name__}, expected an object with `{field}`")
        if field not in value:
            raise InputError(f"{path}, {row}: no column `{field}`, only {', '.join(value) or 'none'}; set `field`")
        yield row, value[field]


def _plain_text(path: Path, field: str) -> Iterator[tuple[str, Any]]:
    """One row per line, as the `text` builder of `datasets` has it; the field is of no account."""
    for row, line in _lines(path):
        yield row, line.rstrip("\n")


def _parquet(path: Path, field: str) -> Iterator[tuple[str, Any]]:
    from pyarrow import ArrowInvalid, parquet

    try:
        file = parquet.ParquetFile(path)
        columns = file.schema_arrow.names
        if field not in columns:
            raise InputError(f"{path}: no column `{field}`, only {', '.join(columns) or 'none'}; set `field`")
        row = 0
        for batch in file.iter_batches(columns=[field]):
            for value in batch.column(0).to_pylist():
                row += 1
                yield f"row {row}", value
    except ArrowInvalid as error:
        raise InputError(f"{path} is no valid parquet file ({hub.line(error)})") from error


READERS = {".jsonl": _json_lines, ".parquet": _parquet, ".txt": _plain_text}
"""By suffix: (path, field) -> (where, value) of each row."""


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    number = 0
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                yield f"line {number}", line
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not valid UTF-8 after line {number}; save it as UTF-8") from error


def _hub_rows(source: CorpusSource) -> Iterator[tuple[str, Any]]:
    import datasets  # slow, and only needed here

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # it would report each use
    with hub.failures("data set", source):
        data = datasets.load_dataset(source.hub, source.config, split=source.split, revision=source.revision)
    if source.field not in data.column_names:
        found = ", ".join(data.column_names)
        raise InputError(f"data set {source.hub}: no column `{source.field}`, only {found}; set `field`")
    for row, value in enumerate(data.select_columns([source.field]), 1):
        yield f"row {row}", value[source.field]


def _download(source: ModelSource, names: list[str]) -> Path:
    """The folder of the hub's cache with these files of the repository, as far as it has them."""
    with hub.failures("model", source):
        return Path(snapshot_download(source.hub, revision=source.revision, allow_patterns=names))


def _declared(stage: Stage, path: str) -> Path:
    return stage.input(os.path.relpath(path))


def _origin(source: ModelSource) -> dict[str, Any]:
    if source.hub is None:
        return {"kind": "local", "path": source.path}
    extra = {"config": source.config, "split": source.split} if isinstance(source, CorpusSource) else {}
    return {"kind": "hub", "hub": source.hub, "revision": source.revision} | extra


def _present(folder: Path, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if os.path.lexists(folder / name)]


def _refuse_link(path: Path, inside: Path) -> None:
    """Only ordinary files of the folder: a link could bring in any file that this user may read."""
    real = path.resolve()
    if inside.resolve() not in real.parents:
        raise InputError(f"{path} is a link out of the model folder; copy the file itself there (`cp -L`)")
    if path.exists() and not real.is_file():
        raise InputError(f"{path} is no ordinary file; fetch the model again")


def _copy(folder: Path, inside: Path, names: list[str], target: Path) -> None:
    for name in sorted(names):
        _refuse_link(folder / name, inside)
        shutil.copyfile(folder / name, target / name)


def _json(path: Path) -> Mapping[str, Any]:
    """A JSON object; empty if there is no such file."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); fetch the model again") from error
    return value if isinstance(value, dict) else {}


def _some(names: list[str], most: int = 3) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
