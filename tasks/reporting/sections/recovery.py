"""How much of the damage of pruning recovery made up for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from tasks.evaluation import comparison
from tasks.reporting import result_charts
from tasks.reporting.section import Plot, Section

if TYPE_CHECKING:
    from tasks.reporting.evidence import Evidence


def context(evidence: Evidence) -> dict[str, Any]:
    """recovered (whether lora was on), and the shares of the gap that it closed."""
    return {"recovered": not evidence.history.empty, "shares": comparison.recovery(evidence.metrics)}


def plots(evidence: Evidence) -> dict[str, Plot]:
    """The training curve."""
    spec = result_charts.training(evidence.history) if not evidence.history.empty else {}
    return {"training": Plot(spec, "Loss of every training step, before its update.")}


def tables(evidence: Evidence) -> dict[str, pd.DataFrame]:
    """The shares, where lora was on."""
    shares = comparison.recovery(evidence.metrics) if not evidence.history.empty else []
    return {"recovery": pd.DataFrame(shares)}


SECTION = Section("recovery", "Recovery", context, plots, tables)
