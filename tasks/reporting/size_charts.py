"""Charts of bytes: perplexity against them, what they are made of, and what lies in which memory of a device."""

from __future__ import annotations

import itertools
import math
from typing import Any

import altair as alt
import pandas as pd

from tasks.evaluation.comparison import PACKAGE, PLAIN_MODELS, title
from tasks.reporting.chart_style import BLUE, FAINT, GREEN, GREY, INK, MIB, ORANGE, finish, limit

COMPONENTS = {
    "blocks": "#1f5f99",
    "positions": "#b0588c",
    "values": "#3f7fbd",
    "scales": "#86b3d9",
    "zeros": "#c3d9ec",
    "embedding": "#d98f1f",
    "norms": "#6b4e8a",
    "adapter": "#3d8b57",
    "metadata": "#a9a294",
}
"""What a model folder's bytes are made of, and its colour: `blocks` of unpacked folders is positions and values of
packed ones, `zeros` are zero points."""
ITEMS = {
    "weights": "#1f5f99",
    "metadata": "#a9a294",
    "kv_cache": "#d98f1f",
    "activations": "#3d8b57",
    "scratch": "#6b4e8a",
}
MARKS = {
    "pipeline": ("circle", BLUE, 80),
    "package": ("diamond", GREEN, 190),
    "plain model": ("square", ORANGE, 110),
}
"""Shape, colour and area of a point that is a stage's model, the shipped one, or one that it is compared with."""
NEAR_X, NEAR_Y = 0.3, 0.05
"""Points of the pipeline closer than these shares of the plot have one label together."""
SHIFTS = {
    "left": {"pipeline": 10, "package": 10, "plain model": -10},
    "right": {"pipeline": 0, "package": 0, "plain model": 10},
}
"""How many pixels the label of a point on this side stands below it: close points keep their own names."""


def perplexity_by_bytes(rows: pd.DataFrame, column: str, usable: int | None) -> dict[str, Any]:
    """One point per model; those of the pipeline are joined in the order of the stages, plain ones stand apart.

    Args:
        rows: stage, bytes, and the perplexity in `column`.
        usable: bytes the device leaves for weights: a dashed line, where it is within the picture.
    """
    data = rows[["stage", "bytes", column]].rename(columns={column: "perplexity"})
    data = data[data["perplexity"].map(math.isfinite).astype(bool)].assign(mib=lambda d: d["bytes"] / MIB)
    if data.empty:
        return {}
    data = data.assign(order=range(len(data)), kind=[_kind(stage) for stage in data["stage"]])
    wide, logarithmic = (data[name].max() > 4 * data[name].min() for name in ("mib", "perplexity"))
    low, high = _padded(data["mib"], 0.15, wide)
    bottom, top = _padded(data["perplexity"], 0.12, logarithmic)
    across = _scale((max(0, low), high), wide)
    axis = alt.Axis(tickCount=6, format=",.3~r", labelOverlap=True)
    x = alt.X("mib:Q", title="MiB in files", scale=across, axis=axis)
    scale = _scale((bottom, top), logarithmic)
    y = alt.Y("perplexity:Q", title="perplexity", scale=scale, axis=alt.Axis(tickCount=6, format=",.4~r"))
    joined = alt.Chart(data[data["kind"] != "plain model"]).mark_line(color=FAINT, strokeWidth=1.5)
    labels = _labels(data, x, y, (max(0, low), high, wide), (bottom, top, logarithmic))
    layers = [joined.encode(x=x, y=y, order="order:O"), *_points(data, x, y), *labels]
    if usable is not None and max(0, low) < usable / MIB < high:
        layers.insert(0, limit(usable / MIB, f"usable for weights: {usable:,} bytes"))
    return finish(alt.layer(*layers).properties(width="container", height=280))


def bytes_by_component(rows: pd.DataFrame, usable: int | None) -> dict[str, Any]:
    """Stacked bars, one per stage. `rows`: stage, component, bytes."""
    if rows.empty:
        return {}
    present = set(rows["component"])
    names = [name for name in COMPONENTS if name in present] + sorted(present - set(COMPONENTS))
    palette = [COMPONENTS.get(name, GREY) for name in names]
    order = [names.index(name) for name in rows["component"]]
    data = rows.assign(stage=rows["stage"].map(title), mib=rows["bytes"] / MIB, order=order)
    bars = (
        alt.Chart(data)
        .mark_bar()
        .encode(
            x=alt.X("mib:Q", title="MiB in files", stack="zero", axis=alt.Axis(tickCount=6)),
            y=alt.Y("stage:N", sort=list(dict.fromkeys(data["stage"])), title=None),
            color=alt.Color("component:N", scale=alt.Scale(domain=names, range=palette), title=None),
            order="order:O",
            tooltip=["stage", "component", alt.Tooltip("bytes:Q", format=",")],
        )
    )
    layers = [bars]
    if usable is not None and usable < 1.5 * data.groupby("stage")["bytes"].sum().max():
        layers.append(limit(usable / MIB, f"usable for weights: {usable:,} bytes"))
    return finish(alt.layer(*layers).properties(width="container", height=30 * data["stage"].nunique()))


def placement(rows: pd.DataFrame) -> dict[str, Any]:
    """What lies in each memory as a share of what is usable there. `rows`: place, item, bytes, usable."""
    if rows.empty:
        return {}
    names = [name for name in ITEMS if name in set(rows["item"])]
    data = rows.assign(share=rows["bytes"] / rows["usable"], order=[list(ITEMS).index(i) for i in rows["item"]])
    bars = (
        alt.Chart(data)
        .mark_bar()
        .encode(
            x=alt.X(
                "share:Q",
                title="share of the usable bytes",
                axis=alt.Axis(format="%", tickCount=6, labelOverlap=True),
                stack="zero",
            ),
            y=alt.Y("place:N", sort=list(dict.fromkeys(data["place"])), title=None, axis=alt.Axis(labelLimit=170)),
            color=alt.Color("item:N", scale=alt.Scale(domain=names, range=[ITEMS[n] for n in names]), title=None),
            order="order:O",
            tooltip=[
                "place",
                "item",
                alt.Tooltip("bytes:Q", format=","),
                alt.Tooltip("usable:Q", format=","),
                alt.Tooltip("share:Q", format=".2%"),
            ],
        )
    )
    chart = alt.layer(bars, limit(1.0, "all that is usable"))
    return finish(chart.properties(width="container", height=30 * data["place"].nunique()))


def _kind(stage: str) -> str:
    return "plain model" if stage in PLAIN_MODELS else "package" if stage == PACKAGE else "pipeline"


def _scale(ends: tuple[float, float], logarithmic: bool) -> alt.Scale:
    kind = {"type": "log"} if logarithmic else {"type": "linear", "zero": False}
    return alt.Scale(domain=ends, nice=False, **kind)


def _points(data: pd.DataFrame, x: alt.X, y: alt.Y) -> list[alt.Chart]:
    kinds = [kind for kind in MARKS if kind in set(data["kind"])]
    shapes, colours = ([MARKS[kind][part] for kind in kinds] for part in range(2))
    legend = alt.Legend(symbolType=alt.Undefined, symbolOpacity=1)
    shape = alt.Shape("kind:N", scale=alt.Scale(domain=kinds, range=shapes), title=None, legend=legend)
    colour = alt.Color("kind:N", scale=alt.Scale(domain=kinds, range=colours), title=None, legend=legend)
    tooltip = ["stage", alt.Tooltip("bytes:Q", format=","), alt.Tooltip("perplexity:Q", format=",.4f")]
    return [
        alt.Chart(data[data["kind"] == kind])
        .mark_point(filled=True, opacity=1, size=MARKS[kind][2])
        .encode(x=x, y=y, shape=shape, color=colour, tooltip=tooltip)
        for kind in kinds
    ]


Axis = tuple[float, float, bool]
"""Ends of an axis, and whether it is logarithmic."""


def _labels(data: pd.DataFrame, x: alt.X, y: alt.Y, across: Axis, up: Axis) -> list[alt.Chart]:
    """Names beside the points, towards the middle of the plot; points of the pipeline that lie together share one."""
    groups, charts = _named_together(data, across, up), []
    for (align, dx, end), kind in itertools.product((("left", 9, max), ("right", -9, min)), MARKS):
        side = [
            group | {"mib": end(group["mib"])}
            for group in groups
            if group["kind"] == kind and (group["at"][0] > 0.5) == (align == "right")
        ]
        if side:
            table = alt.Chart(pd.DataFrame(side)[["text", "mib", "perplexity"]])
            mark = {"align": align, "dx": dx, "dy": SHIFTS[align][kind], "baseline": "middle", "fontSize": 11}
            halo = table.mark_text(**mark, stroke="white", strokeWidth=4, strokeJoin="round")
            charts += [each.encode(x=x, y=y, text="text:N") for each in (halo, table.mark_text(**mark, color=INK))]
    return charts


def _named_together(data: pd.DataFrame, across: Axis, up: Axis) -> list[dict[str, Any]]:
    """Points as groups with one text each; `mib` has those of all its points."""
    groups: list[dict[str, Any]] = []
    passed_on = data[["mib", "perplexity", "kind"]].eq(data[["mib", "perplexity", "kind"]].shift()).all(axis=1)
    for row in data[~passed_on].itertuples():  # a stage that is off has its input's place
        place = _share(row.mib, *across), _share(row.perplexity, *up)
        near = [group for group in groups if group["kind"] == row.kind == "pipeline" and _near(group["at"], place)]
        if near:
            near[0]["text"] += f", {row.stage}"
            near[0]["mib"].append(row.mib)
        else:
            group = {"text": row.stage, "mib": [row.mib], "perplexity": row.perplexity, "at": place, "kind": row.kind}
            groups.append(group)
    return groups


def _near(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return abs(one[0] - other[0]) < NEAR_X and abs(one[1] - other[1]) < NEAR_Y


def _padded(values: pd.Series, share: float, logarithmic: bool = False) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    if logarithmic:
        low, high = math.log(low), math.log(high)
    room = share * (high - low) or 0.1 * abs(high) or 1.0
    low, high = low - room, high + room
    return (math.exp(low), math.exp(high)) if logarithmic else (low, high)


def _share(value: float, low: float, high: float, logarithmic: bool) -> float:
    if logarithmic:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return (value - low) / (high - low)
