"""The two codings of a package's integers, each with its own way there and back."""

from __future__ import annotations

from typing import NamedTuple

from tasks.algorithms import entropy_coding, packing


class Coder(NamedTuple):
    """(digits, base) -> bytes, and (bytes, how many, base) -> digits, which raises InputError for what is damaged."""

    pack: packing.Pack
    unpack: packing.Unpack


CODERS = {
    "fixed": Coder(packing.pack_digits, packing.unpack_digits),
    "entropy": Coder(entropy_coding.encode, entropy_coding.decode),
}
"""By `tasks.packed.description.Description.coding`."""
