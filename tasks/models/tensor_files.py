"""Write safetensors files whose bytes depend on their content alone; `tensor_headers` reads what they hold."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file whose bytes depend on its content alone."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
    sort_header(path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, by name."""
    return load_file(path)


def sort_header(path: Path) -> None:
    """Sort a safetensors file's metadata in place: the library writes it in an order that changes from run to run."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > size:
            raise ValueError(f"the header of {path} does not fit its {size} bytes when sorted")
        file.seek(8)
        file.write(text.ljust(size))
