"""What several sections of the report take from the evaluations: rows of stages and bytes, patterns that hold.

Every function is pure. Rows keep the order of the stages; a table without data is empty.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from tasks.evaluation.comparison import BITS_PER_BYTE, PERPLEXITY, SPLITS
from tasks.reporting import size_charts

MEASURES = [f"{measure}_{split}" for measure in (PERPLEXITY, BITS_PER_BYTE) for split in SPLITS]
COLUMNS = ["stage", "parameters", "zero_fraction", "bytes", *MEASURES, "protocol"]
BYTES_COLUMNS = ["stage", "component", "bytes"]


def stage_rows(metrics: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """One row per stage; the figures of one that was not evaluated are missing."""
    rows = []
    for name, found in metrics.items():
        row = {key: found.get(key) for key in ("parameters", "zero_fraction", "protocol")}
        row |= {"stage": name, "bytes": found.get("bytes", {}).get("total")}
        row |= {
            f"{key}_{split}": found.get(key, {}).get(split) for key in (PERPLEXITY, BITS_PER_BYTE) for split in SPLITS
        }
        rows.append(row)
    table = pd.DataFrame(rows, columns=COLUMNS)
    return table.astype(dict.fromkeys(["zero_fraction", *MEASURES], float) | {"parameters": "Int64", "bytes": "Int64"})


def byte_rows(metrics: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """Bytes of every stage's model by component, the total left out."""
    rows = [
        (name, component, found["bytes"][component])
        for name, found in metrics.items()
        for component in components(found.get("bytes", {}))
    ]
    return pd.DataFrame(rows, columns=BYTES_COLUMNS)


def components(sizes: dict[str, int]) -> list[str]:
    """What a folder's bytes are for, in the order of the charts; the total left out."""
    known = [name for name in size_charts.COMPONENTS if name in sizes]
    return known + sorted(set(sizes) - set(known) - {"total"})


def protocols(metrics: dict[str, dict[str, Any]]) -> list[str]:
    """The protocols by which the models were evaluated."""
    return sorted({found["protocol"] for found in metrics.values() if found.get("protocol")})


def patterns(max_kept: dict[str, int | None]) -> list[str]:
    """The "keep:of" patterns that hold everywhere; one that follows from a shorter one is left out.

    Args:
        max_kept: group length -> largest number of non-zeros in such a group, None where it divides no row.
    """
    holding: list[tuple[int, int]] = []
    for of, keep in sorted((int(key), value) for key, value in max_kept.items()):
        implied = any(of % short == 0 and kept * (of // short) <= (keep or 0) for kept, short in holding)
        if keep is not None and keep < of and not implied:
            holding.append((keep, of))
    return [f"{keep}:{of}" for keep, of in holding]
