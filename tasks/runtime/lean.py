"""What transformers and torch import and nothing here uses, left out: of a start's 7 CPU seconds it would take 3.

transformers 5.23.0 imports hqq, torchao, scipy and torch's sharding over machines wherever they are installed. It asks
functions of its own what there is: they say no here, and so does that of peft (0.21.0), which imports hqq and with it
torch's compiler. transformers imports that (2.13.0), too, and torch does when it makes a model without memory, both for
decorators that matter to compiled code alone: until somebody wants more of the compiler than these, a module stands in
for it whose decorators do nothing. Whoever needs hqq or scipy imports it as ever.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

UNUSED = ("hqq", "scipy", "torchao", "torch_distributed")
"""Of transformers' questions `is_…_available` those that are answered with no."""
COMPILER = "torch._dynamo"
DECORATORS = ("allow_in_graph", "assume_constant_result", "disable")
ALONE = (f"{COMPILER}._trace_wrapped_higher_order_op",)
"""Modules of the compiler that transformers imports and that do without the rest of it."""


def apply() -> None:
    """To be called before transformers is imported; imports nothing itself."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Import within it: Python would look for garbage again and again in all that stays, a fifth of the time it takes.

    What is there at its end counts as never garbage, for later looks, too.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


class _Finder(importlib.abc.MetaPathFinder):
    """Python's own finder, with something to do after some modules."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.startswith(f"{COMPILER}.") and name not in ALONE:
            _whole_compiler()
        after = AFTER.get(name)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if after else None
        if after and spec and spec.loader:
            execute = spec.loader.exec_module

            def execute_and_more(module: ModuleType) -> None:
                execute(module)
                after()

            spec.loader.exec_module = execute_and_more
        return spec


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name in DECORATORS:
            return _unchanged
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(_whole_compiler(), name)


def _whole_compiler() -> ModuleType:
    """The compiler itself, in the place of what stands in for it."""
    if isinstance(sys.modules.get(COMPILER), _StandIn):
        del sys.modules[COMPILER], sys.modules["torch"]._dynamo
    whole = importlib.import_module(COMPILER)
    for name in ALONE:
        if name in sys.modules:
            setattr(whole, name.rpartition(".")[2], sys.modules[name])
    return whole


def _after_torch() -> None:
    torch = sys.modules["torch"]
    if COMPILER not in sys.modules:
        torch._dynamo = sys.modules[COMPILER] = _StandIn(COMPILER)
        torch._dynamo.__path__ = [f"{torch.__path__[0]}/_dynamo"]


def _after_transformers() -> None:
    utils = sys.modules["transformers.utils"]
    for where in (utils, utils.import_utils):
        for name in UNUSED:
            setattr(where, f"is_{name}_available", _no)


def _after_peft_asks() -> None:
    sys.modules["peft.import_utils"].is_hqq_available = _no


def _after_peft_layers() -> None:
    # it looks for a weight spread over machines in a module that it doesn't import itself
    sys.modules["peft.tuners.tuners_utils"]._torch_supports_distributed = False


AFTER: dict[str, Callable[[], None]] = {
    "torch": _after_torch,
    "transformers": _after_transformers,
    "peft.import_utils": _after_peft_asks,
    "peft.tuners.tuners_utils": _after_peft_layers,
}


def _unchanged(function: Any = None, *args: Any, **kwargs: Any) -> Any:
    return _unchanged if function is None else function


def _no(*args: Any, **kwargs: Any) -> bool:
    return False
