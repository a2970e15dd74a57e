"""How far the test text is from the text that recovery was trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from tasks.reporting.section import Section

if TYPE_CHECKING:
    from tasks.reporting.evidence import Evidence


def context(evidence: Evidence) -> dict[str, Any]:
    """overlap.json."""
    return {"overlap": evidence.overlap}


def tables(evidence: Evidence) -> dict[str, pd.DataFrame]:
    """A row per split."""
    return {"overlap": pd.DataFrame([{"split": name, **row} for name, row in evidence.overlap["splits"].items()])}


SECTION = Section("domains", "Training and test text", context, tables=tables)
