"""What the report's charts share: colours that keep their meaning, type, the mark of a limit, and the last touches.

Charts are Vega-Lite specifications (through Altair) that take the width of their container. A function that makes one
is pure: tables in, plain data out, the same for the same input. None reads a file or writes HTML.
"""

from __future__ import annotations

from typing import Any

import altair as alt
import pandas as pd

VEGA_LITE = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
"""The version of Vega-Lite that the specifications are written for."""
INK, GREY, FAINT, BLUE, RED = "#1d2433", "#8a8f99", "#d5d8dd", "#1f5f99", "#b3361e"
GREEN, ORANGE = "#22683c", "#d98f1f"
KINDS = ("#1f5f99", "#86b3d9", "#3d8b57", "#9bc7a6", "#d98f1f", "#b3361e", "#6b4e8a", "#a9a294")
BITS = {2: "#d5e4f2", 3: "#a3c4e2", 4: "#5b93c4", 8: "#1f5f99", 16: INK}
MIB = 2**20
STILL_WIDTH = 640
"""Pixels across a chart that is a picture."""


def limit(at: float, text: str) -> alt.Chart:
    """A dashed line across the chart, which says `text` where it is pointed at."""
    data = pd.DataFrame({"at": [at], "text": [text]})
    rule = alt.Chart(data).mark_rule(color=RED, strokeDash=[5, 3], strokeWidth=1.5)
    return rule.encode(x=alt.X("at:Q"), tooltip=[alt.Tooltip("text:N", title="limit")])


def finish(chart: Any) -> dict[str, Any]:
    """The specification with the report's type and colours, without the address of the schema."""
    quiet = {"labelColor": INK, "titleColor": INK, "titleFontWeight": "normal", "labelFontSize": 11}
    legend = {"orient": "bottom", "columns": 3, "labelColor": INK, "symbolType": "square", "labelLimit": 140}
    spec = (
        chart.configure(font="system-ui, sans-serif", background="transparent")
        .configure_view(stroke=None)
        .configure_axis(gridColor="#e6e8ec", domainColor=GREY, tickColor=GREY, **quiet)
        .configure_legend(**legend)
        .to_dict()
    )
    spec.pop("$schema")
    return spec


def still(spec: dict[str, Any]) -> dict[str, Any]:
    """The same chart for a picture: of a fixed width, on white."""
    return spec | {"width": STILL_WIDTH, "background": "white"}
