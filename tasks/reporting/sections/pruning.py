"""What was pruned, and what each later stage left of the pattern."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from tasks.reporting.section import Section
from tasks.reporting.verdict import pattern_sentence

if TYPE_CHECKING:
    from tasks.reporting.evidence import Evidence


def ledger_rows(ledgers: dict[str, pd.DataFrame]) -> list[dict[str, Any]]:
    """Per stage the sums of its ledger, None where it was switched off."""
    rows = []
    for stage, table in ledgers.items():
        sums = {name: int(table[name].sum()) for name in table.columns if name != "linear"} if len(table) else None
        broken = table[(table["violations"] > 0) | (table["revived"] > 0)] if sums else ()
        rows.append({"stage": stage, "linears": len(table), "sums": sums, "broken": len(broken)})
    return rows


def masks(evidence: Evidence) -> dict[str, Any] | None:
    """The masks in sum; None where wanda was switched off."""
    table = evidence.masks
    if table.empty:
        return None
    weights, alphas = int((table["rows"] * table["cols"]).sum()), table["alpha"].dropna()
    return {
        "linears": len(table),
        "zeros": int(table["zeros"].sum()),
        "share": float(table["zeros"].sum() / weights),
        "alpha": (float(alphas.min()), float(alphas.max())) if len(alphas) else None,
    }


def context(evidence: Evidence) -> dict[str, Any]:
    """pattern, masks, ledgers in sum and per linear."""
    return {
        "pattern": pattern_sentence(evidence),
        "masks": masks(evidence),
        "ledgers": ledger_rows(evidence.ledgers),
        "linears": {name: table.to_dict("records") for name, table in evidence.ledgers.items() if not table.empty},
    }


def tables(evidence: Evidence) -> dict[str, pd.DataFrame]:
    """The ledgers in sum."""
    rows = [{"stage": row["stage"], **row["sums"]} for row in ledger_rows(evidence.ledgers) if row["sums"]]
    return {"sparsity": pd.DataFrame(rows)}


SECTION = Section("pruning", "Pruning", context, tables=tables)
