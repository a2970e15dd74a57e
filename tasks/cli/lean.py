"""What transformers imports and nothing here uses, left out: of a start's 7 CPU seconds it would take 3.

transformers 5.23.0 imports hqq, torchao, scipy and torch's sharding over machines wherever they are installed. It asks
functions of its own what there is: they say no here. Some of its modules import torch's compiler for decorators that
matter to compiled code alone: they get decorators that do nothing. Whoever needs one of these imports it as ever.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

LIBRARY = "transformers"
UNUSED = ("hqq", "scipy", "torchao", "torch_distributed")
"""The library's questions `is_…_available` that are answered with no."""
DECORATED = tuple(
    f"{LIBRARY}.{name}"
    for name in (
        "generation.continuous_batching.cache",
        "integrations.deepgemm",
        "integrations.eager_paged",
        "integrations.finegrained_fp8",
        "integrations.flex_attention",
        "integrations.sonicmoe",
        "masking_utils",
        "modeling_utils",
    )
)
COMPILER = "torch._dynamo"


def apply() -> None:
    """To be called before transformers is imported; imports nothing itself."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        around = AROUND.get(name)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if around else None
        if spec and spec.loader:
            spec.loader.exec_module = functools.partial(_execute, around, spec.loader.exec_module)
        return spec


def _execute(around: Any, execute: Any, module: ModuleType) -> None:
    with around(module):
        execute(module)


@contextlib.contextmanager
def _answered(module: ModuleType) -> Iterator[None]:
    yield
    utils = sys.modules[f"{LIBRARY}.utils"]
    for where in (utils, utils.import_utils):
        for name in UNUSED:
            setattr(where, f"is_{name}_available", _no)


@contextlib.contextmanager
def _without_compiler(module: ModuleType) -> Iterator[None]:
    torch = sys.modules.get("torch")
    if torch is None or COMPILER in sys.modules:
        yield
        return
    torch._dynamo = sys.modules[COMPILER] = _NoCompiler(COMPILER)
    torch._dynamo.__path__ = [f"{torch.__path__[0]}/_dynamo"]
    try:
        yield
    finally:
        del torch._dynamo, sys.modules[COMPILER]


@contextlib.contextmanager
def _with_parts(module: ModuleType) -> Iterator[None]:
    """The compiler itself, imported after all: it gets the parts that were imported without it."""
    for name in [name for name in sys.modules if name.rpartition(".")[0] == COMPILER]:
        setattr(module, name.rpartition(".")[2], sys.modules[name])
    yield


AROUND = {LIBRARY: _answered, COMPILER: _with_parts, **dict.fromkeys(DECORATED, _without_compiler)}


class _NoCompiler(ModuleType):
    __path__: list[str]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _unchanged


def _unchanged(function: Any = None, *args: Any, **kwargs: Any) -> Any:
    return _unchanged if function is None else function


def _no(*args: Any, **kwargs: Any) -> bool:
    return False
