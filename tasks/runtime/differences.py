"""By how much two files differ, in words: figures of JSON and CSV, values of safetensors, lines of texts.

Both have been found to differ in bytes; which one is right is not this module's question.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

TEXTS = (".txt", ".html", ".jsonl", ".svg", ".yaml", ".md", ".py", ".jinja")


def between(committed: Path, found: Path, name: str) -> str:
    """How a file differs from the committed one; by its name's ending it is read as what it should be.

    Args:
        name: of both; the files may lie under others.
    """
    ending = Path(name).suffix
    try:
        if ending == ".json":
            return _json(committed, found)
        if ending == ".csv":
            return _csv(committed, found)
        if ending == ".safetensors":
            return _tensors(committed, found)
        if ending in TEXTS:
            return _lines(committed, found)
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:  # cut off, or no such format
        return f"can't be compared: {' '.join(str(error).split())[:200]}"
    return f"{found.stat().st_size:,} bytes, committed {committed.stat().st_size:,}"


def relative(one: float, other: float) -> float:
    """|one - other| by the larger of the two: 0 where they are equal, infinite where one is no number."""
    if one == other or (math.isnan(one) and math.isnan(other)):
        return 0.0
    if not (math.isfinite(one) and math.isfinite(other)):
        return math.inf
    return abs(one - other) / max(abs(one), abs(other))


def _json(committed: Path, found: Path) -> str:
    old, new = (dict(_flat(json.loads(path.read_text(encoding="utf-8")))) for path in (committed, found))
    pairs = {key: (old[key], new[key]) for key in old.keys() & new.keys()}
    numbers = {key: relative(*pair) for key, pair in pairs.items() if all(map(_is_number, pair))}
    others = [key for key, (one, other) in pairs.items() if key not in numbers and one != other]
    return _told(numbers, others, sorted(old.keys() ^ new.keys()), "entries")


def _csv(committed: Path, found: Path) -> str:
    import pandas as pd

    old, new = (pd.read_csv(path) for path in (committed, found))
    if len(old) != len(new):
        return f"{len(new):,} rows, committed {len(old):,}"
    columns = [column for column in old.columns if column in new.columns]
    numbers, others = {}, []
    for column in columns:
        pairs = enumerate(zip(old[column], new[column], strict=True))
        if all(pd.api.types.is_numeric_dtype(table[column]) for table in (old, new)):
            numbers |= {f"{column}, row {row + 1}": relative(float(a), float(b)) for row, (a, b) in pairs}
        else:
            others += [f"{column}, row {row + 1}" for row, (a, b) in pairs if str(a) != str(b)]
    return _told(numbers, others, sorted(set(old.columns) ^ set(new.columns)), "columns")


def _told(numbers: dict[str, float], others: list[str], lacking: list[str], kind: str) -> str:
    """What differs, the largest first."""
    parts = []
    if differing := {key: value for key, value in numbers.items() if value}:
        where = max(differing, key=lambda key: differing[key])
        parts.append(
            f"{len(differing):,} of {len(numbers):,} figures, by at most {differing[where]:.2g} of their size ({where})"
        )
    if others:
        parts.append(f"{len(others):,} texts ({', '.join(others[:2])})")
    if lacking:
        parts.append(f"other {kind} ({', '.join(lacking[:3])})")
    return "; ".join(parts) or "the same figures, written otherwise"


def _tensors(committed: Path, found: Path) -> str:
    import torch
    from safetensors import safe_open

    values, differing, largest, where, other = 0, 0, 0.0, "", []
    with safe_open(committed, "pt") as old, safe_open(found, "pt") as new:
        lacking = sorted(set(old.keys()) ^ set(new.keys()))
        for name in sorted(set(old.keys()) & set(new.keys())):
            one, two = old.get_tensor(name), new.get_tensor(name)
            if one.shape != two.shape or one.dtype != two.dtype:
                other.append(name)
                continue
            values += one.numel()
            unequal = (one != two) & ~(
                one.isnan() & two.isnan() if one.is_floating_point() else torch.zeros((1,)).bool()
            )
            if count := int(unequal.sum()):
                differing += count
                one, two = one[unequal].double(), two[unequal].double()
                change = float(((one - two).abs() / torch.maximum(one.abs(), two.abs())).nan_to_num(math.inf).max())
                largest, where = max((largest, where), (change, name))
    parts = []
    if differing:
        parts.append(f"{differing:,} of {values:,} values, by at most {largest:.2g} of their size ({where})")
    if other:
        parts.append(f"{len(other)} tensors of another shape or type ({other[0]})")
    if lacking:
        parts.append(f"other tensors ({', '.join(lacking[:3])})")
    return "; ".join(parts) or f"all {values:,} values are the same, the file's header isn't"


def _lines(committed: Path, found: Path) -> str:
    old, new = (path.read_bytes().split(b"\n") for path in (committed, found))
    differing = sum(one != other for one, other in zip(old, new, strict=False)) + abs(len(old) - len(new))
    return f"{differing:,} of {max(len(old), len(new)):,} lines"


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, each in value.items():
            yield from _flat(each, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and value:
        for index, each in enumerate(value):
            yield from _flat(each, f"{path}[{index}]")
    else:
        yield path, value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
