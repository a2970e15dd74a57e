"""What a packed folder's bytes are for, and how many bits of information each component must hold."""

from __future__ import annotations

import itertools
from pathlib import Path

from tasks.algorithms import entropy_coding
from tasks.models import model_files
from tasks.packed.digits import CODERS
from tasks.packed.layout import bits_by_component, bytes_by_component
from tasks.packed.packed_folder import PackedFolder


def component_bytes(folder: Path) -> dict[str, int]:
    """Bytes of all files below the folder by what they are for (`tasks.packed.layout.COMPONENTS`).

    Raises:
        InputError: a file is damaged, changed or of another version.
    """
    package = PackedFolder(folder)
    sections = itertools.chain.from_iterable(package.sections(blob) for blob in package.layout.names)
    return bytes_by_component(sections, model_files.stored_bytes(folder))


def bound(folder: Path) -> dict[str, float]:
    """Bits that each component must hold, by how often each of its values occurs.

    The order-0 entropy of each section: of the codes of a linear, of the cases of its N:M groups, of its scales, …;
    log2 C(count, kept) of an unstructured mask; of what isn't quantised that of its bytes, each place in a value for
    itself. Metadata: 0. Reads everything.

    Raises:
        InputError: as `component_bytes`; a blob's content is damaged.
    """
    package = PackedFolder(folder)
    unpack = CODERS[package.description.coding].unpack
    sections = []
    for section, data in itertools.chain.from_iterable(map(package.contents, package.layout.names)):
        bits = section.bits
        if section.base:
            digits = unpack(data, section.count, section.base)
            bits = entropy_coding.information(digits, section.base)
        sections.append(section._replace(bits=bits))
    return bits_by_component(sections)
