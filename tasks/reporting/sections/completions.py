"""What the model wrote after each stage, and how often that failed (`tasks.algorithms.scoring.generation_failures`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from tasks.reporting.section import Section

if TYPE_CHECKING:
    from tasks.reporting.evidence import Evidence


def rows(evidence: Evidence) -> list[dict[str, Any]]:
    """Per prompt the completion of every model, None where there is none."""
    by_model = {name: {row["prompt"]: row["completion"] for row in rows} for name, rows in evidence.completions.items()}
    prompts = dict.fromkeys(prompt for rows in by_model.values() for prompt in rows)
    return [{"prompt": prompt, "texts": [rows.get(prompt) for rows in by_model.values()]} for prompt in prompts]


def failures(evidence: Evidence) -> pd.DataFrame:
    """Failures of every evaluated model's completions, counted."""
    counted = {name: found["failures"] for name, found in evidence.metrics.items() if found.get("failures")}
    return pd.DataFrame([{"stage": name, **found} for name, found in counted.items()])


def context(evidence: Evidence) -> dict[str, Any]:
    """rows, models, failures."""
    counted = failures(evidence).astype(object)
    records = counted.where(counted.notna(), None).to_dict("records")
    return {"rows": rows(evidence), "models": list(evidence.metrics), "failures": records}


def tables(evidence: Evidence) -> dict[str, pd.DataFrame]:
    """The failures."""
    return {"failures": failures(evidence)}


SECTION = Section("completions", "Completions", context, tables=tables)
