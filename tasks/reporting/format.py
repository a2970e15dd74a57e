"""Numbers as the report writes them. Pure; a missing value is a dash."""

from __future__ import annotations

import json
import math
from typing import Any

import pandas as pd

from tasks.evaluation import comparison
from tasks.reporting.chart_style import MIB

MISSING = "–"


def number(value: float | None, digits: int | None = None) -> str:
    """ "1,234,567", "3.142" with `digits` after the point, or "–" for a missing one."""
    if missing(value):
        return MISSING
    if math.isinf(value):
        return "infinite"
    return f"{value:,.{digits}f}" if digits is not None else f"{value:,}"


def mebibytes(value: int | None) -> str:
    """ "1.31 MiB"."""
    return MISSING if missing(value) else f"{value / MIB:.2f} MiB"


def change(ratio: float) -> str:
    """ "+23.1 %"."""
    return f"{100 * (ratio - 1):+.1f} %"


def over(ratio: float) -> str:
    """ "0.13 %" of a ratio of 1.0013."""
    return f"{100 * (ratio - 1):.2f} %"


def percent(share: float | None) -> str:
    """ "50.00 %"."""
    return MISSING if missing(share) else f"{100 * share:.2f} %"


def signed(value: float | None, digits: int | None = None) -> str:
    """ "+1,234" or "−1,234": a difference."""
    if missing(value):
        return MISSING
    sign = "−" if value < 0 else "+" if value > 0 else ""
    return sign + number(abs(value), digits)


def significant(value: float | None) -> str:
    """Four significant digits, and never less than the whole number: "42.38", "0.001234", "123,456"."""
    if missing(value):
        return MISSING
    return f"{value:,.0f}" if math.isfinite(value) and abs(value) >= 1000 else f"{value:.4g}"


def missing(value: Any) -> bool:
    """None, NaN, and what pandas calls missing."""
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))


def flatten(value: Any, path: str = "") -> list[tuple[str, str]]:
    """Nested data as (dotted path, text) pairs."""
    if isinstance(value, dict) and value:
        return [pair for key in sorted(value) for pair in flatten(value[key], f"{path}.{key}" if path else key)]
    return [(path, value if isinstance(value, str) else json.dumps(value))]


FILTERS = {
    "number": number,
    "mebibytes": mebibytes,
    "change": change,
    "over": over,
    "percent": percent,
    "signed": signed,
    "significant": significant,
    "flatten": flatten,
    "label": comparison.title,
}
"""What templates call these."""
