"""What each stage changed against the one before it: quality, bytes, zeros, latency and memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from tasks.evaluation import attribution
from tasks.evaluation.comparison import PERPLEXITY, SPLITS
from tasks.reporting import result_charts
from tasks.reporting.section import Plot, Section

if TYPE_CHECKING:
    from tasks.reporting.evidence import Evidence

DRAWN = "Change of perplexity on test by each stage against the one before, with its 95 % interval."


def rows(evidence: Evidence) -> list[dict[str, Any]]:
    """The rows of models that were compared with the one before."""
    before = attribution.previous(evidence.inputs, list(evidence.metrics))
    found = attribution.rows(evidence.metrics, evidence.host, before)
    return [row for row in found if row["bytes"] is not None]


def context(evidence: Evidence) -> dict[str, Any]:
    """rows, splits, and whether latency and memory were measured."""
    found = rows(evidence)
    return {"rows": found, "splits": SPLITS, "measured": any(row["peak_bytes"] is not None for row in found)}


def plots(evidence: Evidence) -> dict[str, Plot]:
    """The changes that are in perplexity and have an interval."""
    keys = [f"{key}_{SPLITS[0]}" for key in ("change", "low", "high", "verdict")]
    table = pd.DataFrame([row for row in rows(evidence) if row[f"measure_{SPLITS[0]}"] == PERPLEXITY])
    if table.empty:
        return {}
    known = table[["stage", *keys]].dropna().rename(columns=lambda name: name.removesuffix(f"_{SPLITS[0]}"))
    return {"attribution": Plot(result_charts.attribution(known) if len(known) else {}, DRAWN)}


def tables(evidence: Evidence) -> dict[str, pd.DataFrame]:
    """The rows."""
    return {"attribution": pd.DataFrame(rows(evidence))}


SECTION = Section("attribution", "What each stage changed", context, plots, tables)
