"""The model as each stage left it: parameters, zeros, pattern, bytes, perplexity and bits per byte."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from tasks.evaluation import comparison
from tasks.evaluation.comparison import BITS_PER_BYTE, FETCHED, PACKAGE, PERPLEXITY, SPLITS
from tasks.reporting import model_rows
from tasks.reporting.section import Section

if TYPE_CHECKING:
    from tasks.reporting.evidence import Evidence


def rows(evidence: Evidence) -> list[dict[str, Any]]:
    """The rows of stages.csv with what is only shown: the pattern that holds, the change against the fetched model."""
    table = model_rows.stage_rows(evidence.metrics).to_dict("records")
    for row, found in zip(table, evidence.metrics.values(), strict=True):
        name = row["stage"]
        row["evaluated"] = found["evaluated"]
        row["kind"] = "plain" if name in comparison.PLAIN_MODELS else "final" if name == PACKAGE else ""
        row["pattern"] = _pattern(found, evidence, name)
        compared = comparison.compare(found, evidence.model(FETCHED)) if name != FETCHED else {}
        row["perplexity"], row["bits_per_byte"] = (
            [(row[f"{measure}_{split}"], _ratio(compared.get(split), measure)) for split in SPLITS]
            for measure in (PERPLEXITY, BITS_PER_BYTE)
        )
    return table


def context(evidence: Evidence) -> dict[str, Any]:
    """rows, splits with their domains, and the protocols."""
    known = evidence.overlap["splits"]
    domains = {split: known.get(split, {}).get("domain") for split in SPLITS}
    return {"rows": rows(evidence), "domains": domains, "protocols": model_rows.protocols(evidence.metrics)}


def _ratio(compared: comparison.Comparison | None, measure: str) -> float | None:
    if not compared or compared.measure != measure:
        return None
    ratio = compared.package / compared.plain
    return ratio if 0 < ratio < math.inf else None


def _pattern(found: dict[str, Any], evidence: Evidence, name: str) -> str:
    """What holds in the weights; of a package that broke what was asked for, its label."""
    if name == PACKAGE and evidence.pattern_broken:
        return f"{evidence.manifest['pattern']} (asked {evidence.manifest['asked']})"
    return ", ".join(model_rows.patterns(found.get("max_kept", {}))) or "none"


SECTION = Section("stages", "Stage by stage", context)
