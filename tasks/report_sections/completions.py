"""What the model wrote after each stage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.report_section import Section

if TYPE_CHECKING:
    from tasks.report_evidence import Evidence


def rows(evidence: Evidence) -> list[dict[str, Any]]:
    """Per prompt the completion of every model, None where there is none."""
    by_model = {name: {row["prompt"]: row["completion"] for row in rows} for name, rows in evidence.completions.items()}
    prompts = dict.fromkeys(prompt for rows in by_model.values() for prompt in rows)
    return [{"prompt": prompt, "texts": [rows.get(prompt) for rows in by_model.values()]} for prompt in prompts]


def context(evidence: Evidence) -> dict[str, Any]:
    """rows and models."""
    return {"rows": rows(evidence), "models": list(evidence.metrics)}


SECTION = Section("completions", "Completions", context)
