"""The sparsity ledger: per linear, what a stage left of the pruned pattern; and the end of a stage that broke it.

A pattern is broken where a weight outside the mask is not exactly zero, or where a group holds more weights than the
pattern allows. Every stage that changes pruned weights writes the ledger beside its model. It repairs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import masks
from tasks.runtime import files

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    from torch import Tensor

COLUMNS = ["linear", "weights", "zeros", "groups", "violations", "revived"]
NAMED = 5
"""How many broken linears an error names."""


def ledger(weights: Mapping[str, Tensor], keep: Mapping[str, Tensor], pattern: str) -> pd.DataFrame:
    """One row per linear, in the order of `weights`.

    Columns: weights; zeros (weights that are 0); groups of the N:M pattern (0 where there is none); violations (groups
    with more nonzeros than the pattern allows); revived (weights outside the mask that are not 0).

    Args:
        weights: full module name -> [out_features, in_features], as a runtime would compute with them.
        keep: full module name -> bool of the same shape, True where kept; a linear without one was not pruned.
        pattern: "2:4" (kept : of), "unstructured" or "dense".

    Raises:
        InputError: a mask of another shape, or of a linear that is not there.
    """
    import pandas as pd

    _refuse_foreign(keep, weights)
    return pd.DataFrame(
        [_row(name, w, keep.get(name), masks.parse(pattern)) for name, w in weights.items()], columns=COLUMNS
    )


def ledger_of_blocks(blocks: Iterable[Mapping[str, Tensor]], keep: Mapping[str, Tensor], pattern: str) -> pd.DataFrame:
    """`ledger` of weights that come block by block; those of one and their masks are looked at together."""
    import pandas as pd

    tables, known = [], set()
    for weights in blocks:
        known |= set(weights)
        tables.append(ledger(weights, {name: keep[name] for name in weights if name in keep}, pattern))
    _refuse_foreign(keep, known)
    return pd.concat(tables, ignore_index=True)


def check(table: pd.DataFrame, where: str, enforce: bool) -> bool:
    """Whether the pattern holds in every linear of a ledger.

    Raises:
        InputError: it does not, and `enforce` says that it must; the linears are named.
    """
    broken = table[(table["violations"] > 0) | (table["revived"] > 0)]
    if broken.empty:
        return True
    if enforce:
        rows = [
            f"{row.linear} ({row.violations} of {row.groups} groups, {row.revived} pruned weights not zero)"
            for row in broken.head(NAMED).itertuples()
        ]
        more = f" and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
        raise InputError(
            f"{where} broke the sparsity pattern of {', '.join(rows)}{more}: run the stage again, or set wanda.enforce "
            "to false to have the result as a dense one"
        )
    return False


def write(table: pd.DataFrame, path: Path) -> None:
    """Write a ledger as CSV."""
    files.write_csv(path, table)


def write_empty(path: Path) -> None:
    """Write a ledger of no linear."""
    files.write_header(path, COLUMNS)


def _refuse_foreign(keep: Iterable[str], known: Iterable[str]) -> None:
    foreign = sorted(set(keep) - set(known))
    if foreign:
        raise InputError(f"there is a mask for {foreign[0]}, which the model does not have: run stage wanda again")


def _row(name: str, weight: Tensor, keep: Tensor | None, pattern: tuple[int, int] | None) -> tuple:
    zeros = int((weight == 0).sum())
    if keep is None:
        return name, weight.numel(), zeros, 0, 0, 0
    if keep.shape != weight.shape:
        raise InputError(
            f"the mask of {name} is {tuple(keep.shape)}, its weight {tuple(weight.shape)}: run stage wanda again"
        )
    groups = weight.numel() // pattern[1] if pattern else 0
    violations = masks.violations(weight, *pattern) if pattern else 0
    return name, weight.numel(), zeros, groups, violations, masks.revived(weight, keep)
