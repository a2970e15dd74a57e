"""What the models need on this machine: speed, memory, energy (stage measure)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from tasks.reporting import result_charts
from tasks.reporting.section import Plot, Section

if TYPE_CHECKING:
    from tasks.reporting.evidence import Evidence

DRAWN = "Tokens per second on this machine, one sequence and several at once."


def measured(evidence: Evidence) -> dict[str, dict[str, Any]]:
    """host.json of the models that were measured."""
    return {name: found for name, found in evidence.host.items() if found["measured"]}


def context(evidence: Evidence) -> dict[str, Any]:
    """rows, the batch sizes, and what was asked of which machine."""
    rows = measured(evidence)
    first = next(iter(rows.values()), {})
    return {
        "rows": rows,
        "batches": list(first.get("tokens_per_second", ())),
        "engine": first.get("engine"),
        "machine": first.get("host"),
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
        {key: value for key, value in row.items() if key not in ("measured", "host", "workload")}
        for row in measured(evidence).values()
    ]
    return {"host": pd.json_normalize(found, sep="_")}


SECTION = Section("host", "Measured on this machine", context, plots, tables)
