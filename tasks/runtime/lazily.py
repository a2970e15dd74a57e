"""This project's modules, imported when they are first used: a switched-off stage uses hardly any that it names.

Python's own `LazyLoader` does it (3.11). `from room import module` waits until the module is used, and `from module
import name` uses it at once. Libraries don't wait: torch does not load that way (2.13.0). So a stage's module imports
torch and pandas in its functions, and every room at its top.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType


@contextlib.contextmanager
def imported() -> Iterator[None]:
    """Within it modules wait for their first use."""
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _Waiting(importlib.util._LazyModule):
    def __getattribute__(self, name: str) -> object:
        """Wait on, where only the module's own description is asked for: torch looks at all modules' when it starts."""
        return object.__getattribute__(self, name) if name.startswith("__") else super().__getattribute__(name)


class _Loader(importlib.util.LazyLoader):
    def exec_module(self, module: ModuleType) -> None:
        """Leave the module waiting."""
        super().exec_module(module)
        module.__class__ = _Waiting


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if name.startswith("tasks.") else None
        if spec and spec.loader and spec.submodule_search_locations is None:  # a room's own module is its docstring
            spec.loader = _Loader(spec.loader)
        return spec
