"""Which matrices gptqmodel can store, in one place: the check before any stage asks, and the quantisation itself.

It imports no torch, because the check is made before a stage is started. The tests ask gptqmodel's packers whether the
rule is theirs.
"""

from __future__ import annotations

from collections.abc import Mapping

from tasks.algorithms.errors import InputError

WIDTHS = (2, 3, 4, 8)
"""Bits per code that gptqmodel packs into 32-bit words."""
SIDE = 32
"""Both sides of a matrix are multiples of it, whatever the bits. gptqmodel 7.6's default packer (`pack_block`) takes
blocks of 32 x 32 codes and refuses other sides at every width. The one in use (`pack_original`, which compiles nothing)
ends in an IndexError at 3 bits, when all linears have been quantised; at 2, 4 and 8 bits it would take them, which one
rule for all widths gives up."""


def refusal(shapes: Mapping[str, tuple[int, int]]) -> str | None:
    """Say what is wrong with the first matrix that can't be stored, and the way out; None where all can.

    Args:
        shapes: name -> (out_features, in_features).
    """
    for name, (rows, columns) in shapes.items():
        if rows % SIDE or columns % SIDE:
            return (
                f"gptq packs {SIDE} rows and columns at a time, but {name} is {rows} x {columns};"
                " switch gptq and eora off, or take another model"
            )
    return None


def check(shapes: Mapping[str, tuple[int, int]], group_size: int) -> None:
    """Refuse matrices that can't be stored, or not in groups of this size.

    Args:
        shapes: name -> (out_features, in_features).
        group_size: inputs that share a scale; -1 is the whole row.

    Raises:
        InputError: inputs that don't divide by the group size, or as `refusal`.
    """
    for name, (_, columns) in shapes.items():
        if group_size > 0 and columns % group_size:
            raise InputError(
                f"{name} has {columns} inputs, not divisible by gptq.group_size = {group_size}: choose a divisor or -1"
            )
    if sentence := refusal(shapes):
        raise InputError(sentence)
