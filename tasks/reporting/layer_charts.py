"""Charts of a model's layers: their importance, and error, bits and compensation of the linears in running order."""

from __future__ import annotations

import itertools
import re
from typing import Any

import altair as alt
import pandas as pd

from tasks.reporting.chart_style import BITS, BLUE, FAINT, GREY, INK, KINDS, RED, finish

DARK = 8
"""From so many bits on the cell's text is white."""


def importance(scores: pd.DataFrame, method: str, removed: list[int]) -> dict[str, Any]:
    """The score that ranked, per layer; removed layers in red."""
    state = ["removed" if layer in removed else "kept" for layer in scores["layer"]]
    data = pd.DataFrame({"layer": scores["layer"], "score": scores[method], "state": state})
    chart = (
        alt.Chart(data)
        .mark_bar()
        .encode(
            x=alt.X("layer:O", title="layer of the fetched model", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
            y=alt.Y("score:Q", title=method),
            color=alt.Color("state:N", scale=alt.Scale(domain=["kept", "removed"], range=[BLUE, RED]), title=None),
            tooltip=["layer", alt.Tooltip("score:Q", format=".6g", title=method), "state"],
        )
    )
    return finish(chart.properties(width="container", height=220))


def quantisation_error(layers: pd.DataFrame) -> dict[str, Any]:
    """One point per linear in running order. `layers`: linear, error, zeros."""
    data = pd.concat([layers, _running(layers["linear"])], axis=1)
    kinds = list(dict.fromkeys(data["kind"]))
    colours = list(itertools.islice(itertools.cycle(KINDS), len(kinds)))
    chart = (
        alt.Chart(data)
        .mark_circle(size=55, opacity=1)
        .encode(
            x=_block_axis(data),
            y=alt.Y("error:Q", title="relative output error"),
            color=alt.Color("kind:N", scale=alt.Scale(domain=kinds, range=colours), title=None),
            tooltip=["linear", alt.Tooltip("error:Q", format=".4g"), alt.Tooltip("zeros:Q", format=",")],
        )
    )
    return finish(chart.properties(width="container", height=240))


def compensation(layers: pd.DataFrame) -> dict[str, Any]:
    """Before and after the low-rank branch, one line per linear. `layers`: linear, error_before, error_after, rank."""
    data = pd.concat([layers, _running(layers["linear"])], axis=1)
    both = data.melt(
        id_vars=["linear", "position", "rank"],
        value_vars=["error_before", "error_after"],
        var_name="when",
        value_name="error",
    )
    both["when"] = both["when"].str.removeprefix("error_")
    x, y = _block_axis(data), alt.Y("error_before:Q", title="relative output error")
    lines = alt.Chart(data).mark_rule(color=FAINT, strokeWidth=1.5).encode(x=x, y=y, y2="error_after:Q")
    points = (
        alt.Chart(both)
        .mark_circle(size=40, opacity=1)
        .encode(
            x=x,
            y=alt.Y("error:Q", title="relative output error"),
            color=alt.Color("when:N", scale=alt.Scale(domain=["before", "after"], range=[GREY, BLUE]), title=None),
            tooltip=["linear", "when", alt.Tooltip("error:Q", format=".4g"), "rank"],
        )
    )
    return finish(alt.layer(lines, points).properties(width="container", height=240))


def bit_widths(layers: pd.DataFrame) -> dict[str, Any]:
    """Bits of every linear: blocks across, kinds down. `layers`: linear, bits, and if known sensitivity and bytes."""
    data = pd.concat([layers, _running(layers["linear"])], axis=1)
    widths, kinds = sorted(set(data["bits"].astype(int))), list(dict.fromkeys(data["kind"]))
    scale = alt.Scale(domain=widths, range=[BITS.get(bits, GREY) for bits in widths])
    tooltip = ["linear", "bits"] + [name for name in ("sensitivity", "bytes") if name in data]
    base = alt.Chart(data).encode(
        x=alt.X("block:O", title="layer", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
        y=alt.Y("kind:N", sort=kinds, title=None),
    )
    cells = base.mark_rect(stroke="white").encode(color=alt.Color("bits:O", scale=scale, legend=None), tooltip=tooltip)
    colour = alt.condition(f"datum.bits >= {DARK}", alt.value("white"), alt.value(INK))
    text = base.mark_text(fontSize=10).encode(text="bits:Q", color=colour)
    return finish(alt.layer(cells, text).properties(width="container", height=24 * len(kinds)))


def _running(linears: pd.Series) -> pd.DataFrame:
    """kind ("q_proj"), block, and position: the block's number plus the share of it that runs before the linear."""
    parsed = [re.search(r"\.(\d+)\.(?:.+\.)?([^.]+)$", str(name)) for name in linears]
    blocks = [int(match[1]) if match else 0 for match in parsed]
    kinds = [match[2] if match else str(name) for match, name in zip(parsed, linears, strict=True)]
    order = list(dict.fromkeys(kinds))
    positions = [block + order.index(kind) / len(order) for block, kind in zip(blocks, kinds, strict=True)]
    return pd.DataFrame({"kind": kinds, "block": blocks, "position": positions}, index=linears.index)


def _block_axis(data: pd.DataFrame) -> alt.X:
    ends = list(range(int(data["position"].max()) + 2))
    axis = alt.Axis(values=ends[:-1], format="d", grid=True, labelOverlap=True)
    title = "layer of the compressed model"
    return alt.X("position:Q", title=title, axis=axis, scale=alt.Scale(domain=[-0.1, ends[-1]], nice=False))
