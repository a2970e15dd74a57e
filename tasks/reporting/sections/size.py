"""Perplexity against size, what the bytes are, and how near the package is to the least that it could take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from tasks.evaluation.comparison import PACKAGE, SPLITS
from tasks.reporting import model_rows, size_charts
from tasks.reporting.section import Plot, Section

if TYPE_CHECKING:
    from tasks.reporting.evidence import Evidence


def bounds(evidence: Evidence) -> list[dict[str, Any]]:
    """Per component of the package: bytes, the bytes that its information needs, and how far it is over; then the sum.

    A component that holds no information of the model (a bound of 0 or none: metadata) has None and is not in the sum.
    """
    sizes, bound = evidence.model(PACKAGE).get("bytes", {}), evidence.manifest.get("bound") or {}
    rows = [(name, sizes[name], bound.get(name) or None) for name in model_rows.components(sizes)] if bound else []
    bounded = [(size, least) for _, size, least in rows if least is not None]
    if bounded:
        rows.append(("all that have a bound", sum(size for size, _ in bounded), sum(least for _, least in bounded)))
    return [
        {"component": name, "bytes": size, "bound": least, "ratio": size / least if least else None}
        for name, size, least in rows
    ]


def context(evidence: Evidence) -> dict[str, Any]:
    """bounds."""
    return {"bounds": bounds(evidence)}


def plots(evidence: Evidence) -> dict[str, Plot]:
    """Perplexity by bytes on each split, and bytes by component."""
    rows, usable = model_rows.stage_rows(evidence.metrics), _usable_for_weights(evidence.fit)
    measured = rows[rows["bytes"].notna()].astype({"bytes": "int64"})
    protocols = ", ".join(model_rows.protocols(evidence.metrics))
    found = {}
    for split in SPLITS:
        spec = size_charts.perplexity_by_bytes(measured, f"perplexity_{split}", usable)
        caption = f"Perplexity on {split} against bytes, protocol {protocols}. "
        found[f"perplexity-{split.replace('_', '-')}"] = Plot(spec, caption + "The line follows the stages.")
    limit = "A dashed red line is what the device leaves for weights; there is none where it is far off."
    components = size_charts.bytes_by_component(model_rows.byte_rows(evidence.metrics), usable)
    return found | {"bytes": Plot(components, f"Bytes by component. {limit}")}


def tables(evidence: Evidence) -> dict[str, pd.DataFrame]:
    """The package's bytes against their bound."""
    return {"bounds": pd.DataFrame(bounds(evidence))}


def _usable_for_weights(fit: dict[str, Any]) -> int | None:
    return next((place["usable"] for place in fit.get("placement", []) if "weights" in place["items"]), None)


SECTION = Section("size", "Perplexity against size", context, plots, tables)
