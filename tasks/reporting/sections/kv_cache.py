"""What the package loses, and a device saves, with the KV cache in few bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from tasks.reporting import result_charts
from tasks.reporting.section import Plot, Section

if TYPE_CHECKING:
    from tasks.reporting.evidence import Evidence

CERTAIN = 1.96
"""Standard errors from zero within which a difference is none (95 %)."""
DRAWN = "What the package loses by keys and values of so many bits, with its 95 % interval; zero is 16 bit."


def rows(evidence: Evidence) -> list[dict[str, Any]]:
    """The rows of kv_cache.csv with what is only shown: whether a loss is more than its error."""
    return [
        row | {"differs": row["bits"] != 16 and abs(row["nats"]) > CERTAIN * row["nats_error"]}
        for row in evidence.kv_cache.to_dict("records")
    ]


def context(evidence: Evidence) -> dict[str, Any]:
    """rows, and the protocols by which they were scored."""
    return {"rows": rows(evidence), "protocols": sorted(set(evidence.kv_cache.get("protocol", ())))}


def plots(evidence: Evidence) -> dict[str, Plot]:
    """The loss by context and bits."""
    if evidence.kv_cache.empty:
        return {}
    fewer = evidence.kv_cache[evidence.kv_cache["bits"] < 16]
    error = CERTAIN * fewer["nats_error"]
    return {
        "kv-cache": Plot(
            result_charts.kv_cache(fewer.assign(low=fewer["nats"] - error, high=fewer["nats"] + error)), DRAWN
        )
    }


def tables(evidence: Evidence) -> dict[str, pd.DataFrame]:
    """The stage's own."""
    return {"kv_cache": evidence.kv_cache}


SECTION = Section("kv_cache", "KV cache", context, plots, tables)
