"""Write safetensors files tensor by tensor, with bytes that depend on their content alone.

The library writes a file at once, from tensors that are all in memory, and its metadata in an order that changes from
run to run (0.8). Here the header comes first, as sizes are known, and each tensor goes to its place when it is there.
Both put tensors in the same order. `tensor_headers` reads what files hold.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tasks.models import tensor_headers
from tasks.models.tensor_headers import Entry
from tasks.runtime import files

DTYPES = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' names of the types, in the order in which it lays tensors out; of one type by name."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def entry(tensor: Tensor) -> Entry:
    """What a header says of the tensor; one on the meta device will do."""
    return Entry(_NAMES[tensor.dtype], list(tensor.shape), tensor.numel() * tensor.element_size())


@contextlib.contextmanager
def writing(
    path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]
) -> Iterator[Callable[[str, Tensor], None]]:
    """Within this context (name, tensor) are written, in any order; the file takes its name when all are there.

    Raises:
        RuntimeError: a tensor that isn't as its entry says, or one that has not been given; no file is left.
    """
    laid_out = sorted(entries, key=lambda name: (list(DTYPES).index(entries[name].dtype), name))
    header = tensor_headers.header_bytes({name: entries[name] for name in laid_out}, metadata)
    places, end = {}, len(header)
    for name in laid_out:
        places[name] = end
        end += entries[name].size
    with files.replacing(path) as unfinished:
        with unfinished.open("wb") as file:
            file.write(header)
            file.truncate(end)  # the last tensor in the file may have no bytes, or come first

            def write(name: str, tensor: Tensor) -> None:
                if entry(tensor) != entries[name]:
                    raise RuntimeError(f"{name} is to be {entries[name]} and is {entry(tensor)}")
                file.seek(places.pop(name))
                file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())

            yield write
        if places:
            raise RuntimeError(f"{path} lacks {next(iter(places))}, {len(places)} tensors have not been written")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whose bytes depend on its content alone."""
    with writing(path, {name: entry(tensor) for name, tensor in tensors.items()}, metadata) as write:
        for name, tensor in tensors.items():
            write(name, tensor)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, by name."""
    return load_file(path)
