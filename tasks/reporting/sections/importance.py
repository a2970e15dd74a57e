"""Scores of the fetched model's layers, and which were removed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.reporting import layer_charts
from tasks.reporting.section import Plot, Section

if TYPE_CHECKING:
    from tasks.reporting.evidence import Evidence

SCORES = ("magnitude", "taylor", "perplexity", "block_influence", "compound")


def rows(evidence: Evidence) -> list[dict[str, Any]]:
    """Per layer: whether it was removed, and value and rank (1 = least important) by every score."""
    table, removed = evidence.scores, evidence.removed["removed"]
    names = [name for name in SCORES if name in table]
    ranks = table[names].rank(method="min")
    return [
        {
            "layer": int(table["layer"][index]),
            "removed": int(table["layer"][index]) in removed,
            "scores": {name: (float(table[name][index]), int(ranks[name][index])) for name in names},
        }
        for index in table.index
    ]


def context(evidence: Evidence) -> dict[str, Any]:
    """rows, and what was removed."""
    return {"rows": rows(evidence), "removed": evidence.removed}


def plots(evidence: Evidence) -> dict[str, Plot]:
    """The score that ranked."""
    method = evidence.removed.get("method")
    if evidence.scores.empty or method not in evidence.scores:
        return {}
    spec = layer_charts.importance(evidence.scores, method, evidence.removed["removed"])
    return {"importance": Plot(spec, f"Score by {method} of each layer of the fetched model; removed ones in red.")}


SECTION = Section("importance", "Importance of the layers", context, plots)
