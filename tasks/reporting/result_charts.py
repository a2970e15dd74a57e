"""Charts of what was trained and measured: losses, speeds, devices, task scores, and changes with their intervals."""

from __future__ import annotations

import itertools
import math
from typing import Any

import altair as alt
import pandas as pd

from tasks.evaluation.comparison import title
from tasks.reporting.chart_style import BITS, BLUE, GREEN, GREY, INK, KINDS, ORANGE, RED, finish

VERDICTS = {"fits": GREEN, "fits by streaming": ORANGE, "does not fit": RED}
LOSSES = {"loss": INK, "causal_lm": BLUE, "distillation": ORANGE, "hidden": GREEN}
STEPS = 600
"""At most so many points of a training curve are drawn."""


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
    return finish(chart.properties(width="container", height=240))


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
    return finish(chart.properties(width="container", height=24 * len(rows)))


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
    return finish(chart.properties(width="container", height=14 * len(data)))


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
    return finish(alt.layer(bars, errors).properties(width="container", height=24 * len(rows)))


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
    return finish(alt.layer(zero, errors, points).properties(width="container", height=220))


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
    return finish(alt.layer(errors, points).properties(width="container", height=height))
