"""Which files of a folder are the model: whatever sizes, copies, checks or loads a model folder asks here.

The model's are its weights (those of the index's `weight_map`, else model.safetensors), an adapter of ours beside them,
and the names of `TEXTS`. A training's state, checkpoints, pickles, a second copy of the weights (`consolidated.*`,
`original/`) and notes are not: no loader opens them. Nothing is read but the index; torch isn't imported.
"""

from __future__ import annotations

import json
from pathlib import Path

from tasks.algorithms.errors import InputError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
"""Of a sharded checkpoint: tensor name -> file."""
CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"
TOKENIZER = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    TOKENIZER_CONFIG,
    "vocab.json",
    "vocab.txt",
)
GENERATION = "generation_config.json"
SMALL = tuple(sorted((CONFIG, GENERATION, *TOKENIZER)))
"""What a dense model has beside its weights."""
QUANTISED = ("quantize_config.json", "quant_config.json")
"""Files beside the weights of a quantised checkpoint; the first is gptqmodel's."""
ARCHIVE = "tokenizer.bz2"
"""In the place of `TOKENIZER` in an entropy coded model (`tasks.models.tokenizer_archive`)."""
PACKED = ("manifest.json", "model.json", ARCHIVE)
"""Files beside the weights of a packed model."""
ADAPTER = "eora"
"""Folder of the low-rank adapter inside a quantised model's folder."""
ADAPTER_CONFIG, ADAPTER_WEIGHTS = f"{ADAPTER}/adapter_config.json", f"{ADAPTER}/adapter_model.safetensors"
TEXTS = (*SMALL, *QUANTISED, *PACKED, INDEX, ADAPTER_CONFIG)
"""Everything but tensors."""
LARGEST = {CONFIG: 2**20, "tokenizer.json": 2**28, INDEX: 2**26}
"""Bytes that a file of a model folder may have: the folder is untrusted, and a JSON text is read into memory whole."""
LARGEST_TEXT = 2**24
"""The same of every other text."""


def weights(folder: Path) -> list[str]:
    """Names of the weight files: those of the index where there is one, else the single file, else none.

    Raises:
        InputError: the index is none, or names what can't be a file of weights in this folder.
    """
    if (folder / INDEX).exists():
        return _shards(folder)
    return [SINGLE] if (folder / SINGLE).exists() else []


def is_quantised(folder: Path) -> bool:
    """Whether gptqmodel wrote the folder."""
    return (folder / QUANTISED[0]).exists()


def tensors(folder: Path) -> list[Path]:
    """The safetensors files of the model, an adapter's too; none where it has no weights.

    Raises:
        InputError: the index is damaged, or names a file that isn't there.
    """
    names = weights(folder)
    for name in names:
        if not (folder / name).exists():
            raise InputError(f"{folder / INDEX} names {name}, which is not there; fetch the model again")
    return sorted(folder / name for name in (*names, ADAPTER_WEIGHTS) if (folder / name).exists())


def texts(folder: Path) -> list[Path]:
    """Every file of the model but tensors."""
    return [folder / name for name in TEXTS if (folder / name).is_file()]


def every(folder: Path) -> list[Path]:
    """All files of the model.

    Raises:
        InputError: the index is damaged, or names a file that isn't there.
    """
    return sorted([*tensors(folder), *texts(folder)])


def stored_bytes(folder: Path) -> int:
    """Bytes of all files of the model, by `stat`.

    Raises:
        InputError: the index is damaged, or names a file that isn't there.
    """
    return sum(path.stat().st_size for path in every(folder))


def check_sizes(folder: Path) -> None:
    """Refuse a model folder with a text that is far larger than any model's; nothing is opened.

    Raises:
        InputError: names the file, its size and the limit.
    """
    for path in texts(folder):
        size, most = path.stat().st_size, LARGEST.get(path.name, LARGEST_TEXT)
        if size > most:
            raise InputError(f"{path} has {size} bytes, at most {most} are read of such a file; take another model")


def check_unambiguous(folder: Path) -> None:
    """Refuse a folder of which transformers would load other weights than the index names: it takes `SINGLE` first.

    Raises:
        InputError: there is an index, and a `SINGLE` that it doesn't name.
    """
    if (folder / INDEX).exists() and (folder / SINGLE).exists() and SINGLE not in weights(folder):
        raise InputError(f"{folder} holds {SINGLE} and shards that {INDEX} names: remove the one or the others")


def _shards(folder: Path) -> list[str]:
    names = _weight_map(folder / INDEX)
    if not names or not all(isinstance(name, str) for name in names):
        raise InputError(f"{INDEX} has no `weight_map` of tensor names to file names; fetch the model again")
    for name in sorted(names):
        if Path(name).name != name or not name.endswith(".safetensors") or any(sign in name for sign in "*?["):
            raise InputError(f"{INDEX} names {name!r}, expected safetensors files of the model folder itself")
    return sorted(names)


def _weight_map(path: Path) -> set[object]:
    try:
        named = json.loads(path.read_text(encoding="utf-8"))
        return set(named["weight_map"].values())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); fetch the model again") from error
    except (KeyError, TypeError, AttributeError):
        return set()
