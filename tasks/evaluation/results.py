"""What stage evaluate wrote of one model, read for those who compare: figures, sums per document, the splits' domains.

`tasks.evaluation.comparison` and the like take such a mapping. It compares nothing, and reads no completions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tasks.algorithms.statistics.bootstrap import Sums

DOCUMENTS, DOMAINS = "documents", "domains"
"""Entries that `read` adds to those of metrics.json."""


def read(folder: Path, overlap: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """metrics.json, with `documents` (split -> Sums; empty without documents.csv), and `domains` where they are known.

    Args:
        overlap: overlap.json of stage overlap.
    """
    found = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    path = folder / "documents.csv"
    found[DOCUMENTS] = sums(pd.read_csv(path)) if path.exists() else {}
    return found | domains(overlap or {})


def sums(table: pd.DataFrame) -> dict[str, Sums]:
    """By split, from the columns of documents.csv."""
    whole = ("document", "predictions", "bytes")
    return {
        split: Sums(*(rows[name].to_numpy(np.int64) for name in whole), rows["nll"].to_numpy(np.float64))
        for split, rows in table.groupby("split", sort=False)
    }


def domains(overlap: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """{"domains": {split: "in-domain" or "out-of-domain"}}; empty where stage overlap was switched off."""
    labels = {split: found["domain"] for split, found in overlap.get("splits", {}).items()}
    return {DOMAINS: labels} if labels else {}
