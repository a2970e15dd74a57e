"""The package beside the plain model of its size, figure by figure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pandas as pd

from tasks.evaluation import comparison
from tasks.evaluation.comparison import BITS_PER_BYTE, PACKAGE, PERPLEXITY, PLAINLY_QUANTISED, SPLITS
from tasks.reporting.section import Section
from tasks.reporting.verdict import plain_sentence

if TYPE_CHECKING:
    from tasks.reporting.evidence import Evidence


def rows(evidence: Evidence) -> list[dict[str, Any]]:
    """The package beside the plain model: a row per measure and split; empty where one was not evaluated.

    No row for perplexities of different tokens. `low` and `high`: interval of the ratio; `judged`: its verdict, on
    the row of the measure by which the split is compared.
    """
    package, plain = evidence.model(PACKAGE), evidence.model(PLAINLY_QUANTISED)
    if not (package.get("evaluated") and plain.get("evaluated")):
        return []
    found = [_row("bytes", None, package["bytes"]["total"], plain["bytes"]["total"])]
    compared = comparison.compare(package, plain)
    for measure, digits in ((PERPLEXITY, 3), (BITS_PER_BYTE, 4)):
        for split in SPLITS:
            pair = [model.get(measure, {}).get(split) for model in (package, plain)]
            fair = measure == BITS_PER_BYTE or comparison.measure([package, plain], split) == PERPLEXITY
            if fair and None not in pair:
                judged = compared[split] if split in compared and compared[split].measure == measure else None
                found.append(_row(f"{measure.replace('_', ' ')}, {split}", digits, *pair, judged))
    return found


def _row(
    figure: str, digits: int | None, package: float, plain: float, judged: comparison.Comparison | None = None
) -> dict[str, Any]:
    ratio = package / plain if plain else math.nan
    difference = judged.difference if judged else None
    return {
        "figure": figure,
        "package": package,
        "plain": plain,
        "ratio": ratio if math.isfinite(ratio) else None,
        "low": difference.low if difference else None,
        "high": difference.high if difference else None,
        "judged": judged.outcome if judged else None,
        "digits": digits,
    }


def context(evidence: Evidence) -> dict[str, Any]:
    """rows, and the sentence."""
    return {"rows": rows(evidence), "sentence": plain_sentence(evidence)}


def tables(evidence: Evidence) -> dict[str, pd.DataFrame]:
    """figure, package, plain, ratio."""
    return {"against_plain": pd.DataFrame(rows(evidence)).drop(columns="digits", errors="ignore")}


SECTION = Section("against_plain", "Against plain quantisation", context, tables=tables)
