"""The packaged model on the chosen device, and on every other one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from tasks.reporting import result_charts, size_charts
from tasks.reporting.section import Plot, Section
from tasks.reporting.verdict import fit_sentence

if TYPE_CHECKING:
    from tasks.reporting.evidence import Evidence

WORDS = {"FITS": "fits", "FITS_STREAMING": "fits by streaming", "DOES_NOT_FIT": "does not fit"}
LISTS = ("placement", "ways_to_fit", "notes")
BOUNDS = "At most so many tokens per second on each device; logarithmic. Where the model doesn't fit, this is no speed."
PLACED = "What each memory holds, as a share of the bytes usable there; the dashed line is all of them."


def placement_rows(fit: dict[str, Any]) -> pd.DataFrame:
    """What the packaged and the fetched model put into each memory that they use."""
    results = [("packaged", fit), ("fetched, bf16", fit.get("fetched") or {})]
    results = [(who, result) for who, result in results if "placement" in result]
    rows = [
        (f"{place['tier']}: {who}", item, size, place["usable"])
        for places in zip(*[result["placement"] for _, result in results], strict=True)
        for (who, _), place in zip(results, places, strict=True)
        for item, size in place["items"].items()
        if place["usable"] > 0
    ]
    return pd.DataFrame(rows, columns=["place", "item", "bytes", "usable"])


def rows(evidence: Evidence) -> list[dict[str, Any]]:
    """The rows of devices.csv; ways_to_fit, notes and placement as lists, empty cells as empty text."""
    found = evidence.devices.fillna("").to_dict("records")
    return [row | {name: [text for text in row[name].split("; ") if text] for name in LISTS} for row in found]


def context(evidence: Evidence) -> dict[str, Any]:
    """fit (None where hardware_fit was switched off), rows, the sentence, and the verdicts in words."""
    fit = evidence.fit if evidence.fit_checked else None
    return {"fit": fit, "rows": rows(evidence), "sentence": fit_sentence(evidence), "words": WORDS}


def plots(evidence: Evidence) -> dict[str, Plot]:
    """What lies where on the chosen device, and the bound on speed of all."""
    places = placement_rows(evidence.fit)
    found = {"placement": Plot(size_charts.placement(places) if len(places) else {}, PLACED)}
    if len(evidence.devices):
        table = evidence.devices.assign(verdict=evidence.devices["verdict"].map(WORDS))
        found["devices"] = Plot(result_charts.devices(table), BOUNDS)
    return found


def tables(evidence: Evidence) -> dict[str, pd.DataFrame]:
    """The stage's own."""
    return {"devices": evidence.devices}


SECTION = Section("devices", "On devices", context, plots, tables)
