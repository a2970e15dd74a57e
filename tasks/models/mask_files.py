"""Keep masks as safetensors files: the bits packed, shapes and the pattern in the metadata.

Which weights to keep is `tasks.algorithms.pruning`'s, how bits are packed `tasks.algorithms.model.masks`'s.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import masks
from tasks.models import tensor_files


def save_masks(path: Path, keep: dict[str, Tensor], pattern: str) -> None:
    """Write keep masks as packed bits.

    Args:
        keep: module name -> bool [rows, cols], True where the weight is kept. May be empty: nothing is pruned.
        pattern: "2:4" (kept : of), "unstructured" or "dense".
    """
    shapes = {name: f"{mask.shape[0]},{mask.shape[1]}" for name, mask in keep.items()}
    tensor_files.save_tensors(
        path, {name: masks.pack(mask) for name, mask in keep.items()}, shapes | {"pattern": pattern}
    )


def load_masks(path: Path) -> tuple[dict[str, Tensor], str]:
    """The masks of `save_masks` (module name -> bool [rows, cols], True = kept) and their pattern.

    Raises:
        InputError: the file has no pattern, or a mask's bytes don't fit its shape.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if "pattern" not in metadata:
            raise InputError(f"{path} is no mask file: its metadata has no `pattern`; run the stage wanda again")
        shapes = {name: tuple(map(int, metadata[name].split(","))) for name in sorted(file.keys())}
        keep = {name: masks.unpack(file.get_tensor(name), *shape) for name, shape in shapes.items()}
    return keep, metadata["pattern"]
