"""A stand-in for a GPU, on a machine without one: tensors that say `cuda:0`, compute on the CPU, and don't mix with it.

Inside `installed()` whatever asks for the device `cuda` gets an `OnCard`: an ordinary CPU tensor that is marked. Every
operation that gets a marked and an unmarked one is refused as CUDA refuses it, and what an operation on marked ones
makes is marked. So a stage that ends has brought everything together, and as the CPU computed it, its files are those
of a run on the CPU.

It sees what Python calls; kernels, streams and their rounding it does not have.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

CARD = torch.device("cuda:0")
CPU = torch.device("cpu")
FACTORIES = (
    *("arange", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "ones", "rand", "randint", "randn"),
    *("tensor", "zeros", "empty_like", "full_like", "ones_like", "zeros_like"),
)
GRADIENT = (Tensor.grad.__get__, Tensor._grad.__get__)


class OnCard(Tensor):
    """A tensor on the card."""

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: Mapping | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:
            return CARD
        if func == Tensor.is_cuda.__get__:
            return True
        if func in (Tensor.numpy, Tensor.__array__):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        if func is Tensor.__format__ and not args[0].dim():  # torch formats values of plain tensors alone
            return format(args[0].item(), args[1])
        _refuse_mixing(func, args, kwargs)
        if (device := kwargs.get("device")) is not None and torch.device(device).type == "cuda":
            kwargs["device"] = CPU
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if func in GRADIENT:
            return None if result is None else result.as_subclass(cls)
        return _marked(result)


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Within this context the device `cuda` is the stand-in."""
    torch.utils._device._device_constructors()  # kept from its first call on: by `torch.device` as a context
    with contextlib.ExitStack() as stack:
        for name in FACTORIES:
            stack.enter_context(mock.patch.object(torch, name, _making(getattr(torch, name))))
        stack.enter_context(mock.patch.object(Tensor, "to", _to(Tensor.to), create=True))
        stack.enter_context(mock.patch.object(Tensor, "cpu", lambda self: _moved(self, CPU), create=True))
        stack.enter_context(mock.patch.object(Tensor, "cuda", lambda self: _moved(self, CARD), create=True))
        stack.enter_context(mock.patch.object(nn.Module, "to", _module_to(nn.Module.to)))
        yield


def on_card(module: nn.Module) -> bool:
    """Whether every weight and buffer of a module is on the card."""
    return all(isinstance(tensor, OnCard) for tensor in itertools.chain(module.parameters(), module.buffers()))


def _refuse_mixing(func: Callable, args: tuple, kwargs: Mapping) -> None:
    """Raise CUDA's error where tensors of both devices meet; those without dimensions may come from the CPU."""
    name = getattr(func, "__name__", str(func))
    if name in ("copy_", "__set__", "set_", "to", "_has_compatible_shallow_copy_type"):  # between devices by intent
        return
    if name in ("__getitem__", "__setitem__", "index_put_"):
        # an index may lie on the CPU; what is looked up there can't be found by one on the card
        values = args[2:] if _tensors(args[1]) else ()
        if name == "__setitem__" and not _tensors(args[1]):  # a copy into a slice
            return
        args = args[:1] + values if isinstance(args[0], OnCard) else args
    found = [*_tensors(args), *_tensors(list(kwargs.values()))]
    if any(isinstance(each, OnCard) for each in found):
        plain = [each for each in found if not isinstance(each, OnCard) and Tensor.dim(each) > 0]
        if plain:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
                f" ({name}: {tuple(plain[0].shape)} is on the CPU)"
            )


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [each for item in value for each in _tensors(item)] if isinstance(value, (list, tuple)) else []


def _marked(result: Any) -> Any:
    if isinstance(result, OnCard):
        return result
    if isinstance(result, Tensor):
        return result.as_subclass(OnCard)
    if isinstance(result, tuple) and hasattr(result, "_fields") or type(result).__module__ == "torch.return_types":
        return type(result)([_marked(each) for each in result])
    if isinstance(result, (list, tuple)):
        return type(result)(_marked(each) for each in result)
    return result


def _making(factory: Callable) -> Callable:
    @functools.wraps(factory)
    def made(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is None or torch.device(device).type != "cuda":
            return factory(*args, **kwargs)
        if _tensors(args) and not isinstance(args[0], OnCard):
            args = (_moved(args[0], CARD), *args[1:])
        return _marked(factory(*args, **(kwargs | {"device": CPU})))

    return made


def _to(to: Callable) -> Callable:
    @functools.wraps(to)
    def moved(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device, dtype, others = None, None, {}
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                device, dtype = value.device, value.dtype
            elif isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, (str, torch.device, int)) and not isinstance(value, bool):
                device = torch.device(value)
        if "copy" in kwargs:
            others["copy"] = kwargs["copy"]
        moved = self if device is None else _moved(self, device)
        with torch._C.DisableTorchFunctionSubclass():
            converted = to(moved, **others) if dtype is None else to(moved, dtype, **others)
        return _marked(converted) if isinstance(moved, OnCard) else converted

    return moved


def _module_to(to: Callable) -> Callable:
    @functools.wraps(to)
    def moved(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device = torch._C._nn._parse_to(*args, **kwargs)[0]
        if device is not None and device.type == "meta":
            return to(self, *args, **kwargs)
        were = {id(each) for each in self.parameters() if isinstance(each, OnCard)}
        for each in self.parameters():
            each.__class__ = nn.Parameter
        buffers = {name: isinstance(each, OnCard) for name, each in self.named_buffers()}
        for name in buffers:
            _put(self, name, _moved(self.get_buffer(name), CPU))
        arguments = [CPU if _is_device(value) else value for value in args]
        to(self, *arguments, **{key: CPU if _is_device(value) else value for key, value in kwargs.items()})
        for each in self.parameters():
            if device.type == "cuda" if device else id(each) in were:
                each.__class__, each._is_param = OnCard, True  # in place, as CUDA's own parameters stay themselves
        for name, was in buffers.items():
            if device.type == "cuda" if device else was:
                _put(self, name, _moved(self.get_buffer(name), CARD))
        return self

    return moved


def _put(module: nn.Module, name: str, buffer: Tensor) -> None:
    parent, _, child = name.rpartition(".")
    module.get_submodule(parent)._buffers[child] = buffer


def _is_device(value: Any) -> bool:
    return isinstance(value, (str, torch.device))


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on another device, as a copy; itself where it is there."""
    if (device.type == "cuda") == isinstance(tensor, OnCard) or device.type == "meta":
        if device.type != "meta":
            return tensor
        with torch._C.DisableTorchFunctionSubclass():
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    with torch._C.DisableTorchFunctionSubclass():
        copy = tensor.clone().as_subclass(OnCard if device.type == "cuda" else Tensor)
    return copy
