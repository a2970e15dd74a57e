"""How near two runs of a stage are: their files compared, tensors value by value, tables and JSON number by number."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

SAME = "same bytes"
"""The note of two files that are equal."""


def of_folders(one: Path, other: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each file's name in two runs' folders, and how the two agree.

    `values`: how many were compared; `equal`: the share that is the same; `largest`: the largest difference; `note`.
    """
    for path in sorted(one.rglob("*")):
        name, twin = path.relative_to(one).as_posix(), other / path.relative_to(one)
        if not path.is_file():
            continue
        if not twin.exists():
            yield name, {"note": "missing"}
        elif path.read_bytes() == twin.read_bytes():
            yield name, {"equal": 1.0, "largest": 0.0, "note": SAME}
        elif path.suffix == ".safetensors":
            yield name, _tensors(path, twin)
        elif path.suffix in (".csv", ".json"):
            yield name, _numbers(path, twin)
        else:
            yield name, {"note": "differs"}


def _tensors(one: Path, other: Path) -> dict[str, Any]:
    """How the tensors of two files agree; packed masks bit by bit."""
    ours, theirs = load_file(one), load_file(other)
    values = equal = 0
    largest, note = 0.0, ""
    for name, tensor in ours.items():
        twin = theirs.get(name)
        if twin is None or twin.shape != tensor.shape:
            note = f"{name} has another shape"
            continue
        if tensor.dtype in (torch.uint8, torch.int32) and tensor.numel():  # packed bits: masks, codes
            bits = np.unpackbits(tensor.numpy().view(np.uint8) ^ twin.numpy().view(np.uint8))
            values, equal = values + bits.size, equal + int(bits.size - bits.sum())
            continue
        values, equal = values + tensor.numel(), equal + int((tensor == twin).sum())
        largest = max(largest, float((tensor.double() - twin.double()).abs().max()) if tensor.numel() else 0.0)
    return {"values": values, "equal": equal / values if values else None, "largest": largest, "note": note}


def _numbers(one: Path, other: Path) -> dict[str, Any]:
    """How the numbers of two tables or JSON files agree; `largest` is relative."""
    pairs = list(zip(_leaves(one), _leaves(other), strict=False))
    same = sum(a == b for a, b in pairs)
    apart = [
        abs(a - b) / max(abs(a), abs(b)) for a, b in pairs if isinstance(a, float) and isinstance(b, float) and a != b
    ]
    return {
        "values": len(pairs),
        "equal": same / len(pairs) if pairs else None,
        "largest": max(apart, default=0.0),
        "note": "largest is relative",
    }


def _leaves(path: Path) -> Iterator[float | str]:
    text = path.read_text(encoding="utf-8")
    cells = text.replace(",", " ").replace("{", " ").replace("}", " ").replace("[", " ").replace("]", " ").split()
    for cell in cells:
        try:
            yield float(cell)
        except ValueError:
            yield cell
