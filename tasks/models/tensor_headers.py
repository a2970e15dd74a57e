"""What safetensors files hold, from their headers alone: no weights are read and torch isn't imported."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tasks.algorithms.errors import InputError
from tasks.models import model_files

LARGEST_HEADER = 100_000_000
"""Bytes; safetensors' own limit."""
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16}
BITS |= {"F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4, "C64": 64}
BITS |= {"I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64}
"""Per value, by safetensors' name of the dtype."""


class Entry(NamedTuple):
    """A stored tensor: safetensors' name of its dtype, its dimensions, and the bytes of its values."""

    dtype: str
    shape: list[int]
    size: int


def header_bytes(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    """The start of a safetensors file up to its tensors, which lie in this order; as the library writes it."""
    described: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    start = 0
    for name, entry in entries.items():
        described[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [start, start + entry.size]}
        start += entry.size
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # tensors begin at a multiple of 8
    return struct.pack("<Q", len(text)) + text


def header_text(path: Path, largest: int = LARGEST_HEADER) -> bytes:
    """The JSON of a safetensors file's header, unchecked (8 bytes little-endian length, then JSON).

    Raises:
        ValueError: by its length it goes on behind the file, or has more than `largest` bytes.
        struct.error: the file is shorter than a length.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(largest, size - 8):
            raise ValueError(f"the header is longer than the file or than {largest} bytes")
        return file.read(length)


def header(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Metadata and tensor entries of a safetensors file.

    Raises:
        InputError: it is no safetensors file, cut off, or its entries lie outside of it or over each other.
    """
    try:
        text = header_text(path)
        entries = json.loads(text)
        metadata = entries.pop("__metadata__", {})
        _check(entries, path.stat().st_size - 8 - len(text))
    except (struct.error, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is no safetensors file or is cut off: {error}; write it again") from error
    return metadata, entries


def _check(entries: dict[str, Any], size: int) -> None:
    """Every tensor's bytes are as many as dtype and shape call for, and together they fill the file without a gap."""
    places = sorted((*entry["data_offsets"], name) for name, entry in entries.items())
    end = 0
    for begin, after, name in places:
        entry = entries[name]
        if begin != end or any(type(side) is not int or side < 0 for side in entry["shape"]):
            raise ValueError(f"{name} has a wrong place or shape")
        if (after - begin) * 8 != BITS[entry["dtype"]] * math.prod(entry["shape"]):
            raise ValueError(f"{name} has {after - begin} bytes, which its dtype and shape don't")
        end = after
    if end != size:
        raise ValueError(f"{size} bytes of tensors, its header describes {end}")


def entries(folder: Path) -> dict[str, Entry]:
    """Every tensor of the model in the folder, an adapter's too, by name.

    Raises:
        InputError: there are no weights as safetensors, or a file is damaged.
    """
    paths = model_files.tensors(folder)
    if not paths:
        raise InputError(
            f"{folder} holds no {model_files.SINGLE} and no {model_files.INDEX}; only safetensors are read"
        )
    found = {}
    for path in paths:
        for name, entry in header(path)[1].items():
            begin, end = entry["data_offsets"]
            found[name] = Entry(entry["dtype"], entry["shape"], end - begin)
    return found


COMPONENTS = ("blocks", "scales", "embedding", "norms", "adapter", "metadata")
_QUANTISATION = (".scales", ".qzeros", ".g_idx")


def component_bytes(folder: Path) -> dict[str, int]:
    """Bytes of a model folder by component; their sum is `model_files.stored_bytes`.

    blocks: the matrices of the blocks (packed codes of a quantised one) and their biases; scales: scales, zero points
    and group indices; embedding: embedding and an untied head; adapter: low-rank factors; metadata: all else.
    """
    sizes = dict.fromkeys(COMPONENTS, 0)
    for name, entry in entries(folder).items():
        sizes[_component(name)] += entry.size
    sizes["metadata"] = model_files.stored_bytes(folder) - sum(sizes.values())
    return sizes


def _component(name: str) -> str:
    if ".lora_" in name:
        return "adapter"
    if name.endswith(_QUANTISATION):
        return "scales"
    if "embed" in name or name.startswith("lm_head"):
        return "embedding"
    return "norms" if "norm" in name else "blocks"
