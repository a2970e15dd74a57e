"""What a packed folder's bytes are for, and how many bits of information each component must hold."""

from __future__ import annotations

from pathlib import Path

from tasks.models import model_files
from tasks.packed.layout import bits_by_component, bytes_by_component
from tasks.packed.packed_folder import PackedFolder


def component_bytes(folder: Path) -> dict[str, int]:
    """Bytes of all files below the folder by what they are for (`tasks.packed.layout.COMPONENTS`).

    Raises:
        InputError: a file is damaged, changed or of another version.
    """
    package = PackedFolder(folder)
    total = model_files.stored_bytes(folder)
    return bytes_by_component(package.sections(), total)


def bound(folder: Path) -> dict[str, float]:
    """Bits that each component must hold.

    log2 C(of, keep) per group, log2 C(count, kept) per unstructured matrix, the bits of kept values, of zero points,
    norms and factors; scales 16 bits, or log2 of how many distinct ones there are and 16 for each of them. Metadata: 0.

    Raises:
        InputError: as `component_bytes`.
    """
    return bits_by_component(PackedFolder(folder).sections())
