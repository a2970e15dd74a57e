"""Bits per linear, the error that quantisation left, what branches gain and cost, and how codes were trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from tasks.evaluation.comparison import PLAINLY_QUANTISED
from tasks.reporting import layer_charts, result_charts
from tasks.reporting.section import Plot, Section

if TYPE_CHECKING:
    from tasks.reporting.evidence import Evidence

ERROR = "GPTQ: relative error of every linear's output on calibration inputs, in running order."
COMPENSATED = "EoRA: the same error against its teacher, before and after the low-rank branch."
TRAINED = "QAD: losses in nats while the codes are trained, by step."
BITS = {"gptq": "Bits of every linear of the package.", PLAINLY_QUANTISED: "Bits of every linear of the plain model."}


def bits_table(evidence: Evidence) -> dict[str, Any]:
    """Linears by bits in the package and in the plain model, and the mean bits of a weight."""
    tables = {name: table for name, table in widths(evidence).items() if not table.empty}
    used = sorted({int(bits) for table in tables.values() for bits in table["bits"]})
    rows = []
    for name, table in tables.items():
        counts = table["bits"].value_counts()
        known = "weights" in table and table["weights"].notna().all()
        mean = float((table["bits"] * table["weights"]).sum() / table["weights"].sum()) if known else None
        rows.append({"model": name, "counts": [int(counts.get(bits, 0)) for bits in used], "mean": mean})
    return {"widths": used, "rows": rows}


def adapter_summary(evidence: Evidence) -> dict[str, Any] | None:
    """The low-rank branches in sum, and the bits per weight of the linears that their bytes would buy instead."""
    table = evidence.compensated
    if table.empty:
        return None
    size, weights = int(table["bytes"].sum()), _weights(evidence, "eora", table["linear"])
    before, after = float(table["error_before"].mean()), float(table["error_after"].mean())
    return {
        "linears": len(table),
        "with_branch": int((table["rank"] > 0).sum()),
        "ranks": (int(table["rank"].min()), int(table["rank"].max())),
        "bytes": size,
        "before": before,
        "after": after,
        "bits": 8 * size / weights.sum() if weights.notna().all() else None,
        "rows": table.to_dict("records"),
    }


def widths(evidence: Evidence) -> dict[str, pd.DataFrame]:
    """linear, bits and weights of the package's linears and of the plain model's."""
    found = {"gptq": evidence.quantised, PLAINLY_QUANTISED: evidence.bits}
    if not evidence.quantised.empty and "weights" not in evidence.quantised:
        weights = _weights(evidence, "gptq", evidence.quantised["linear"])
        found["gptq"] = evidence.quantised.assign(weights=weights)
    return {name: table for name, table in found.items() if "bits" in table}


def context(evidence: Evidence) -> dict[str, Any]:
    """widths, quantised and trained (whether gptq and qad were on), adapter."""
    return {
        "widths": bits_table(evidence),
        "quantised": not evidence.quantised.empty,
        "adapter": adapter_summary(evidence),
        "trained": not evidence.trained.empty,
    }


def plots(evidence: Evidence) -> dict[str, Plot]:
    """Bits where they are mixed, and the errors."""
    mixed = {name: table for name, table in widths(evidence).items() if table["bits"].nunique() > 1}
    found = {f"bits-{name}": Plot(layer_charts.bit_widths(table), BITS[name]) for name, table in mixed.items()}
    if not evidence.quantised.empty:
        found["quantisation"] = Plot(layer_charts.quantisation_error(evidence.quantised), ERROR)
    if not evidence.compensated.empty:
        found["compensation"] = Plot(layer_charts.compensation(evidence.compensated), COMPENSATED)
    if not evidence.trained.empty:
        found["codes"] = Plot(result_charts.training(evidence.trained), TRAINED)
    return found


def _weights(evidence: Evidence, stage: str, linears: pd.Series) -> pd.Series:
    """How many weights each of these linears has, by the stage's ledger; missing where it does not say."""
    ledger = evidence.ledgers[stage]
    return linears.map(dict(zip(ledger["linear"], ledger["weights"], strict=True)) if len(ledger) else {})


SECTION = Section("quantisation", "Quantisation and its compensation", context, plots)
