"""What safetensors files hold, from their headers alone: no weights are read and torch isn't imported."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, NamedTuple

from tasks.algorithms.errors import InputError


class Entry(NamedTuple):
    """A stored tensor: safetensors' name of its dtype, its dimensions, and the bytes of its values."""

    dtype: str
    shape: list[int]
    size: int


def header(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Metadata and tensor entries of a safetensors file (8 bytes little-endian length, then JSON).

    Raises:
        InputError: it is no safetensors file, or cut off.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError("the header is longer than the file")
            entries = json.loads(file.read(length))
    except (struct.error, ValueError) as error:
        raise InputError(f"{path} is no safetensors file or is cut off: {error}; write it again") from error
    return entries.pop("__metadata__", {}), entries


def entries(folder: Path) -> dict[str, Entry]:
    """Every tensor in the folder's safetensors files (those of subfolders too), by name.

    Raises:
        InputError: there is no safetensors file, or one is damaged.
    """
    paths = sorted(folder.rglob("*.safetensors"))
    if not paths:
        raise InputError(f"{folder} holds no *.safetensors file; only safetensors are read")
    found = {}
    for path in paths:
        for name, entry in header(path)[1].items():
            begin, end = entry["data_offsets"]
            found[name] = Entry(entry["dtype"], entry["shape"], end - begin)
    return found


def stored_bytes(folder: Path) -> int:
    """Bytes of every file in the folder, by `stat`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


COMPONENTS = ("blocks", "scales", "embedding", "norms", "adapter", "metadata")
_QUANTISATION = (".scales", ".qzeros", ".g_idx")


def component_bytes(folder: Path) -> dict[str, int]:
    """Bytes of a model folder by component; their sum is `stored_bytes`.

    blocks: the matrices of the blocks (packed codes of a quantised one) and their biases; scales: scales, zero points
    and group indices; embedding: embedding and an untied head; adapter: low-rank factors; metadata: all else.
    """
    sizes = dict.fromkeys(COMPONENTS, 0)
    for name, entry in entries(folder).items():
        sizes[_component(name)] += entry.size
    sizes["metadata"] = stored_bytes(folder) - sum(sizes.values())
    return sizes


def _component(name: str) -> str:
    if ".lora_" in name:
        return "adapter"
    if name.endswith(_QUANTISATION):
        return "scales"
    if "embed" in name or name.startswith("lm_head"):
        return "embedding"
    return "norms" if "norm" in name else "blocks"
