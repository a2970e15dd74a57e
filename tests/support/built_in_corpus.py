"""The built-in grammar's data, its parts and some of their documents, each made once per process."""

from __future__ import annotations

import functools
from typing import Any

from tasks.built_in_model import documents, splits
from tests.support.paths import ROOT

FOLDER = ROOT / "data" / "grammar"


@functools.cache
def load(name: str) -> Any:
    """The parsed domains.yaml or frames.yaml."""
    return splits.load(FOLDER / name)


@functools.cache
def parts() -> dict[str, splits.Split]:
    """The splits of seed 7."""
    return splits.split(load("domains.yaml"), load("frames.yaml"), 7)


@functools.cache
def sample(name: str, count: int = 200) -> tuple[str, ...]:
    """The first documents of a split."""
    stream = documents.documents(parts()[name], 10**9, 3)
    return tuple(next(stream)["text"] for _ in range(count))
