"""Keep masks as safetensors files: the bits packed, shapes and the pattern in the metadata.

Which weights to keep is `tasks.algorithms.pruning`'s, how bits are packed `tasks.algorithms.model.masks`'s.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import masks
from tasks.models import tensor_files
from tasks.models.tensor_headers import Entry


@contextlib.contextmanager
def writing(path: Path, shapes: Mapping[str, tuple[int, int]], pattern: str) -> Iterator[Callable[[str, Tensor], None]]:
    """Within this context (module name, keep mask) are written as packed bits, in any order; memory: one mask.

    Args:
        shapes: module name -> (rows, cols) of every mask that will be written.
        pattern: "2:4" (kept : of), "unstructured" or "dense".
    """
    sizes = {name: -(-rows * cols // 8) for name, (rows, cols) in shapes.items()}
    entries = {name: Entry("U8", [size], size) for name, size in sizes.items()}
    metadata = {name: f"{rows},{cols}" for name, (rows, cols) in shapes.items()} | {"pattern": pattern}
    with tensor_files.writing(path, entries, metadata) as write:
        yield lambda name, mask: write(name, masks.pack(mask))


def save_masks(path: Path, keep: Mapping[str, Tensor], pattern: str) -> None:
    """Write keep masks as packed bits.

    Args:
        keep: module name -> bool [rows, cols], True where the weight is kept. May be empty: nothing is pruned.
        pattern: "2:4" (kept : of), "unstructured" or "dense".
    """
    with writing(path, {name: tuple(mask.shape) for name, mask in keep.items()}, pattern) as write:
        for name, mask in keep.items():
            write(name, mask)


def load_masks(path: Path) -> tuple[dict[str, Tensor], str]:
    """The masks of `save_masks` (module name -> bool [rows, cols], True = kept) and their pattern.

    Raises:
        InputError: the file has no pattern, or a mask's bytes don't fit its shape.
    """
    stored = StoredMasks(path)
    return dict(stored), stored.pattern


class StoredMasks(Mapping[str, Tensor]):
    """The masks of a file, module name -> bool [rows, cols], True = kept; each is read when it is asked for.

    Attributes:
        pattern: "2:4" (kept : of), "unstructured" or "dense".

    Raises:
        InputError: the file has no pattern; (when a mask is read:) its bytes don't fit its shape.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with safe_open(path, framework="pt") as file:
            metadata, names = file.metadata() or {}, sorted(file.keys())
        if "pattern" not in metadata:
            raise InputError(f"{path} is no mask file: its metadata has no `pattern`; run the stage wanda again")
        self.pattern = metadata["pattern"]
        self._shapes = {name: tuple(map(int, metadata[name].split(","))) for name in names}

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        with safe_open(self._path, framework="pt") as file:
            return masks.unpack(file.get_tensor(name), *shape)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes  # the mapping's own would read the mask

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)
