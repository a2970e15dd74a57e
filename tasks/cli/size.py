"""`edgepress size`: what a packed model's bytes are for, and the least that they could be.

Of a folder they are counted, of a config alone planned, but for unstructured patterns to the byte:

    edgepress size FOLDER
    edgepress size CONFIG --bits 4 --pattern 2:4 --group-size 32
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.algorithms.errors import InputError
from tasks.cli import console

if TYPE_CHECKING:
    from tasks.packed.plan import Plan

MATRIX_BITS = (4, 8, 16)
"""As `tasks.packed.plan` has them, whose import takes seconds, which --help needn't; a test compares them."""
_OCTAVES = 8
"""Over which a model's scales spread, about: for plans of scales on a grid."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("path", type=Path, help="a packed folder, a folder with a config.json, or a config.json")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--pattern", default="dense", help="keep:of, unstructured or dense")
    parser.add_argument("--sparsity", type=float, default=0.5, help="of unstructured patterns")
    parser.add_argument("--group-size", type=int, default=32, help="-1: the whole row")
    parser.add_argument("--asymmetric", action="store_true", help="store zero points")
    parser.add_argument("--embedding-bits", type=int, choices=MATRIX_BITS, default=16)
    parser.add_argument("--embedding-group", type=int, default=32)
    parser.add_argument("--rank", type=int, default=0, help="of the adapters")
    parser.add_argument("--adapter-bits", type=int, choices=MATRIX_BITS, default=16)
    parser.add_argument(
        "--scale-steps", type=int, help=f"scales are powers of 2 ** (1 / steps); assumes {_OCTAVES} octaves of them"
    )
    parser.add_argument("--json", action="store_true", help="component -> bytes and their bound, as JSON")


def main(given: argparse.Namespace) -> None:
    """Print a table of bytes, of a packed folder or planned from a config.

    Raises:
        InputError: the path holds neither, a file is damaged, or the plan doesn't fit the config.
    """
    _check(given)
    from tasks.device_profiles.contents import config_of
    from tasks.packed.packed_folder import is_packed
    from tasks.packed.plan import planned
    from tasks.packed.sizes import bound, component_bytes

    if given.path.is_dir() and is_packed(given.path):
        sizes, bits = component_bytes(given.path), bound(given.path)
    else:
        config = config_of(given.path, "name a packed folder or a config.json")
        _, sizes, bits = planned(config, _plan(given))
    content = {name: {"bytes": sizes[name], "bound": bits[name] / 8 if bits[name] else None} for name in sizes}
    console.answer(given, content, "\n".join(_table(sizes, bits)))


def _check(given: argparse.Namespace) -> None:
    """Refuse numbers that no plan can have.

    Raises:
        InputError: names the option and what was expected.
    """
    if not 0 <= given.sparsity < 1:
        raise InputError(f"--sparsity {given.sparsity:g} is no share of zeros: expected 0 to below 1")
    if given.scale_steps is not None and given.scale_steps < 1:
        raise InputError(f"--scale-steps {given.scale_steps} is no number of steps: expected 1 or more")
    from tasks.algorithms.model import masks

    try:
        masks.parse(given.pattern)
    except InputError:  # which speaks of a stage's masks
        expected = "expected keep:of as 2:4, unstructured or dense"
        raise InputError(f"--pattern {given.pattern} is no pattern: {expected}") from None


def _plan(given: argparse.Namespace) -> Plan:
    from tasks.packed.plan import Plan

    return Plan(
        bits=given.bits,
        pattern=given.pattern,
        group_size=given.group_size,
        embedding_bits=given.embedding_bits,
        embedding_group=given.embedding_group,
        zeros=given.asymmetric,
        rank=given.rank,
        adapter_bits=given.adapter_bits,
        distinct_scales=given.scale_steps and given.scale_steps * _OCTAVES,
        sparsity=given.sparsity,
    )


def _table(sizes: Mapping[str, int], bits: Mapping[str, float]) -> list[str]:
    """A line per component: bytes, the bytes that it must have at least, and their ratio."""
    lines = [f"{'component':<11}{'bytes':>14}{'bound':>17}{'ratio':>9}"]
    for name in sizes:
        ratio = f"{8 * sizes[name] / bits[name]:>9.4f}" if bits[name] else ""
        lines.append(f"{name:<11}{sizes[name]:>14}{bits[name] / 8:>17.1f}{ratio}")
    content, least = sum(sizes[name] for name in sizes if bits[name]), sum(bits.values()) / 8
    lines.append(f"{'content':<11}{content:>14}{least:>17.1f}{content / least:>9.4f}")
    return [*lines, f"{'total':<11}{sum(sizes.values()):>14}"]
