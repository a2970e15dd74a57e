"""The package beside the plain model of its size, figure by figure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pandas as pd

from tasks import comparison
from tasks.comparison import BITS_PER_BYTE, PACKAGE, PERPLEXITY, PLAIN, SPLITS
from tasks.report_section import Section
from tasks.report_verdict import plain_sentence

if TYPE_CHECKING:
    from tasks.report_evidence import Evidence


def rows(evidence: Evidence) -> list[dict[str, Any]]:
    """The package beside the plain model: a row per measure and split; empty where one was not evaluated.

    No row for perplexities of different tokens.
    """
    package, plain = evidence.model(PACKAGE), evidence.model(PLAIN)
    if not (package.get("evaluated") and plain.get("evaluated")):
        return []
    found = [
        {"figure": "bytes", "package": package["bytes"]["total"], "plain": plain["bytes"]["total"], "digits": None}
    ]
    for measure in (PERPLEXITY, BITS_PER_BYTE):
        for split in SPLITS:
            pair = [model.get(measure, {}).get(split) for model in (package, plain)]
            fair = measure == BITS_PER_BYTE or comparison.measure([package, plain], split) == PERPLEXITY
            if fair and None not in pair:
                row = {"figure": f"{measure.replace('_', ' ')}, {split}", "package": pair[0], "plain": pair[1]}
                found.append(row | {"digits": 3 if measure == PERPLEXITY else 4})
    for row in found:
        ratio = row["package"] / row["plain"] if row["plain"] else math.nan
        row["ratio"] = ratio if math.isfinite(ratio) else None
    return found


def context(evidence: Evidence) -> dict[str, Any]:
    """rows, and the sentence."""
    return {"rows": rows(evidence), "sentence": plain_sentence(evidence)}


def tables(evidence: Evidence) -> dict[str, pd.DataFrame]:
    """figure, package, plain, ratio."""
    return {"against_plain": pd.DataFrame(rows(evidence)).drop(columns="digits", errors="ignore")}


SECTION = Section("against_plain", "Against plain quantisation", context, tables=tables)
