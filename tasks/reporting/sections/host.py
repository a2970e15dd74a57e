"""What the models need on the machine that measured them: speed, memory, energy (stage measure)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from tasks.evaluation import measurements
from tasks.reporting import result_charts
from tasks.reporting.section import Plot, Section

if TYPE_CHECKING:
    from tasks.reporting.evidence import Evidence

DRAWN = "Tokens per second on the machine named above, one sequence and several at once."


def measured(evidence: Evidence) -> dict[str, dict[str, Any]]:
    """Of the models that were measured."""
    return {name: found for name, found in evidence.host.items() if found["measured"]}


def context(evidence: Evidence) -> dict[str, Any]:
    """rows, the batch sizes, what was asked of which machine, when; and why there are no rows."""
    rows = measured(evidence)
    first = next(iter(rows.values()), {})
    return {
        "rows": rows,
        "batches": list(first.get("tokens_per_second", ())),
        "engine": first.get("engine"),
        "source": measurements.source(rows),
        "why": next((found["why"] for found in evidence.host.values() if not found["measured"]), measurements.OFF),
        "workload": first.get("workload"),
    }


def plots(evidence: Evidence) -> dict[str, Plot]:
    """Tokens per second of every model by batch size."""
    rows = [
        {"model": name, "batch": int(batch), "tokens_per_second": speed}
        for name, found in measured(evidence).items()
        for batch, speed in found["tokens_per_second"].items()
    ]
    return {"host": Plot(result_charts.speeds(pd.DataFrame(rows)) if rows else {}, DRAWN)}


def tables(evidence: Evidence) -> dict[str, pd.DataFrame]:
    """The figures, flat."""
    found = [
        {key: value for key, value in row.items() if key not in ("measured", "host", "workload", "when")}
        for row in measured(evidence).values()
    ]
    return {"host": pd.json_normalize(found, sep="_")}


SECTION = Section("host", "Measured speed, memory and energy", context, plots, tables)
