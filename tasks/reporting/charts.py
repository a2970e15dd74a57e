"""The report's charts: Vega-Lite specifications (through Altair).

Every function is pure: tables in, plain data out, the same for the same input. It reads no file and writes no HTML.
Charts take the width of their container; colours keep their meaning from chart to chart.
"""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import altair as alt
import pandas as pd

from tasks.evaluation.comparison import PACKAGE, PLAIN_MODELS, title

VEGA_LITE = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
"""The version of Vega-Lite that the specifications are written for."""
INK, GREY, FAINT, BLUE, RED = "#1d2433", "#8a8f99", "#d5d8dd", "#1f5f99", "#b3361e"
GREEN, ORANGE = "#22683c", "#d98f1f"
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
VERDICTS = {"fits": GREEN, "fits by streaming": ORANGE, "does not fit": RED}
KINDS = ("#1f5f99", "#86b3d9", "#3d8b57", "#9bc7a6", "#d98f1f", "#b3361e", "#6b4e8a", "#a9a294")
LOSSES = {"loss": INK, "causal_lm": BLUE, "distillation": ORANGE, "hidden": GREEN}
MIB = 2**20
MARKS = {
    "pipeline": ("circle", BLUE, 80),
    "package": ("diamond", GREEN, 190),
    "plain model": ("square", ORANGE, 110),
}
"""Shape, colour and area of a point that is a stage's model, the shipped one, or one that it is compared with."""
BITS = {2: "#d5e4f2", 3: "#a3c4e2", 4: "#5b93c4", 8: "#1f5f99", 16: INK}
DARK = 8
"""From so many bits on the cell's text is white."""
STEPS = 600
"""At most so many points of a training curve are drawn."""
NEAR_X, NEAR_Y = 0.3, 0.05
"""Points of the pipeline closer than these shares of the plot have one label together."""
STILL_WIDTH = 640
"""Pixels across a chart that is a picture."""
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
        layers.insert(0, _limit(usable / MIB, f"usable for weights: {usable:,} bytes"))
    return _finish(alt.layer(*layers).properties(width="container", height=280))


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
        layers.append(_limit(usable / MIB, f"usable for weights: {usable:,} bytes"))
    return _finish(alt.layer(*layers).properties(width="container", height=30 * data["stage"].nunique()))


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
    return _finish(chart.properties(width="container", height=220))


def training(history: pd.DataFrame) -> dict[str, Any]:
    """Losses by step. `history`: step, loss, and its parts where there are any."""
    names = [name for name in LOSSES if name in history and history[name].notna().any()]
    shown = history.iloc[:: max(1, math.ceil(len(history) / STEPS))]
    data = shown.melt(id_vars="step", value_vars=names, var_name="part", value_name="value").dropna()
    colours = [LOSSES[name] for name in names]
    legend = alt.Legend(symbolType="stroke", symbolStrokeWidth=2)
    widths = alt.condition("datum.part == 'loss'", alt.value(2.0), alt.value(1.2))
    chart = (
        alt.Chart(data)
        .mark_line(interpolate="linear")
        .encode(
            x=alt.X("step:Q", title="step"),
            y=alt.Y("value:Q", title="loss", scale=alt.Scale(zero=False)),
            color=alt.Color("part:N", scale=alt.Scale(domain=names, range=colours), title=None, legend=legend),
            strokeWidth=widths,
            tooltip=["step", "part", alt.Tooltip("value:Q", format=".5g")],
        )
    )
    return _finish(chart.properties(width="container", height=240))


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
    return _finish(chart.properties(width="container", height=240))


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
    return _finish(alt.layer(lines, points).properties(width="container", height=240))


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
    return _finish(alt.layer(cells, text).properties(width="container", height=24 * len(kinds)))


def devices(rows: pd.DataFrame) -> dict[str, Any]:
    """Bound on tokens per second by device, coloured by verdict. `rows`: of devices.csv, verdict in words."""
    known = [(name, colour) for name, colour in VERDICTS.items() if name in set(rows["verdict"])]
    names, colours = ([pair[part] for pair in known] for part in range(2))
    chart = (
        alt.Chart(rows[["device", "verdict", "tokens_per_second_bound", "limited_by", "total_bytes", "capacity_bytes"]])
        .mark_circle(size=110, opacity=1)
        .encode(
            x=alt.X(
                "tokens_per_second_bound:Q",
                title="tokens per second at most",
                scale=alt.Scale(type="log"),
                axis=alt.Axis(format=",.4~r", tickCount=6, labelOverlap=True),
            ),
            y=alt.Y("device:N", sort="-x", title=None, axis=alt.Axis(grid=True)),
            color=alt.Color("verdict:N", scale=alt.Scale(domain=names, range=colours), title=None),
            tooltip=[
                "device",
                "verdict",
                alt.Tooltip("tokens_per_second_bound:Q", format=",.4r"),
                "limited_by",
                alt.Tooltip("total_bytes:Q", format=","),
                alt.Tooltip("capacity_bytes:Q", format=","),
            ],
        )
    )
    return _finish(chart.properties(width="container", height=24 * len(rows)))


def speeds(rows: pd.DataFrame) -> dict[str, Any]:
    """Bars of tokens per second by model, one per batch size. `rows`: model, batch, tokens_per_second."""
    batches = sorted(set(rows["batch"]))
    names = [f"batch {batch}" for batch in batches]
    data = rows.assign(model=rows["model"].map(title), together=[f"batch {batch}" for batch in rows["batch"]])
    chart = (
        alt.Chart(data)
        .mark_bar()
        .encode(
            x=alt.X("tokens_per_second:Q", title="tokens per second", axis=alt.Axis(tickCount=6)),
            y=alt.Y("model:N", sort=list(dict.fromkeys(data["model"])), title=None),
            yOffset=alt.YOffset("together:N", sort=names),
            color=alt.Color("together:N", scale=alt.Scale(domain=names, range=list(KINDS[: len(names)])), title=None),
            tooltip=["model", "batch", alt.Tooltip("tokens_per_second:Q", format=",.1f")],
        )
    )
    return _finish(chart.properties(width="container", height=14 * len(data)))


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
    chart = alt.layer(bars, _limit(1.0, "all that is usable"))
    return _finish(chart.properties(width="container", height=30 * data["place"].nunique()))


def attribution(rows: pd.DataFrame) -> dict[str, Any]:
    """Change of perplexity by stage with its interval; none is grey. `rows`: stage, change, low, high, verdict."""
    verdicts = {"better": GREEN, "worse": RED, "no difference": GREY}
    known = [name for name in verdicts if name in set(rows["verdict"])]
    scale = alt.Scale(domain=known, range=[verdicts[name] for name in known])
    base = alt.Chart(rows).encode(y=alt.Y("stage:N", sort=list(rows["stage"]), title=None))
    figures = [alt.Tooltip(f"{name}:Q", format="+.4f") for name in ("change", "low", "high")]
    bars = base.mark_bar().encode(
        x=alt.X("change:Q", title="change of perplexity on test", axis=alt.Axis(tickCount=6)),
        color=alt.Color("verdict:N", scale=scale, title=None),
        tooltip=["stage", "verdict", *figures],
    )
    errors = base.mark_rule(strokeWidth=2, color=INK).encode(x=alt.X("low:Q"), x2="high:Q")
    return _finish(alt.layer(bars, errors).properties(width="container", height=24 * len(rows)))


def kv_cache(rows: pd.DataFrame) -> dict[str, Any]:
    """Loss by context, a point per number of bits with its interval. `rows`: context, bits, nats, low, high, bytes."""
    widths = sorted(set(rows["bits"]), reverse=True)
    names = [f"{bits} bit" for bits in widths]
    colours = [BITS.get(bits, GREY) for bits in widths]
    base = alt.Chart(rows.assign(held=[f"{bits} bit" for bits in rows["bits"]])).encode(
        x=alt.X("context:O", title="context, tokens", axis=alt.Axis(labelAngle=0)),
        xOffset=alt.XOffset("held:N", sort=names),
        color=alt.Color("held:N", scale=alt.Scale(domain=names, range=colours), title=None),
    )
    loss = alt.Y("nats:Q", title="loss in nats per token")
    tooltip = ["context", "held", alt.Tooltip("nats:Q", format="+.5f"), alt.Tooltip("perplexity:Q", format=".4f")]
    points = base.mark_circle(size=70, opacity=1).encode(y=loss, tooltip=[*tooltip, alt.Tooltip("bytes:Q", format=",")])
    errors = base.mark_rule(strokeWidth=1.5).encode(y=alt.Y("low:Q"), y2="high:Q")
    zero = alt.Chart(pd.DataFrame({"at": [0.0]})).mark_rule(color=GREY, strokeDash=[5, 3]).encode(y="at:Q")
    return _finish(alt.layer(zero, errors, points).properties(width="container", height=220))


def task_scores(rows: pd.DataFrame) -> dict[str, Any]:
    """A point per model with twice its standard error on both sides. `rows`: name, model, value, stderr."""
    if rows.empty:
        return {}
    models = list(dict.fromkeys(rows["model"]))
    data = rows.assign(low=rows["value"] - 2 * rows["stderr"], high=rows["value"] + 2 * rows["stderr"])
    colours = list(itertools.islice(itertools.cycle((GREY, GREEN, ORANGE, *KINDS)), len(models)))
    base = alt.Chart(data).encode(
        y=alt.Y("name:N", sort=list(dict.fromkeys(data["name"])), title=None, axis=alt.Axis(labelLimit=190)),
        yOffset=alt.YOffset("model:N", sort=models),
        color=alt.Color("model:N", scale=alt.Scale(domain=models, range=colours), title=None),
    )
    tooltip = ["name", "model", alt.Tooltip("value:Q", format=".4f"), alt.Tooltip("stderr:Q", format=".4f")]
    x = alt.X("value:Q", title="score", scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=6))
    points = base.mark_circle(size=60, opacity=1).encode(x=x, tooltip=tooltip)
    errors = base.mark_rule(strokeWidth=1.5).encode(x=alt.X("low:Q"), x2="high:Q")
    height = 16 * len(models) * data["name"].nunique()
    return _finish(alt.layer(errors, points).properties(width="container", height=height))


def _limit(at: float, text: str) -> alt.Chart:
    data = pd.DataFrame({"at": [at], "text": [text]})
    rule = alt.Chart(data).mark_rule(color=RED, strokeDash=[5, 3], strokeWidth=1.5)
    return rule.encode(x=alt.X("at:Q"), tooltip=[alt.Tooltip("text:N", title="limit")])


def _labels(
    data: pd.DataFrame,
    x: alt.X,
    y: alt.Y,
    across: tuple[float, float, bool],
    up: tuple[float, float, bool],
) -> list[alt.Chart]:
    """Names beside the points, towards the middle of the plot; points of the pipeline that lie together share one.

    Args:
        across, up: ends of the axis, and whether it is logarithmic.
    """
    groups: list[dict[str, Any]] = []
    passed_on = data[["mib", "perplexity", "kind"]].eq(data[["mib", "perplexity", "kind"]].shift()).all(axis=1)
    for row in data[~passed_on].itertuples():  # a stage that is off has its input's place
        place = _share(row.mib, *across), _share(row.perplexity, *up)
        near = [g for g in groups if g["kind"] == row.kind == "pipeline" and _near(g["at"], place)]
        if near:
            near[0]["text"] += f", {row.stage}"
            near[0]["mib"].append(row.mib)
        else:
            group = {"text": row.stage, "mib": [row.mib], "perplexity": row.perplexity, "at": place, "kind": row.kind}
            groups.append(group)
    charts = []
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


def _finish(chart: Any) -> dict[str, Any]:
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
