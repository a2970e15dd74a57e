"""What lm-evaluation-harness says of the fetched, the packaged and the plain model on each task."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pandas as pd

from tasks.evaluation import comparison
from tasks.evaluation.comparison import FETCHED, PACKAGE
from tasks.reporting import result_charts
from tasks.reporting.section import Plot, Section

if TYPE_CHECKING:
    from tasks.reporting.evidence import Evidence

CERTAIN = 1.96
"""Standard errors of a difference within which it is none (95 %)."""
DRAWN = "Share of right answers, with two standard errors on both sides."
COLUMNS = ("task", "metric", "model", "value", "stderr", "samples", "limit", "higher_is_better")


def scores(evidence: Evidence) -> pd.DataFrame:
    """One row per task, metric and model, with COLUMNS."""
    rows = [
        {key: record.get(key) for key in ("task", "model", "samples", "limit")} | {"metric": metric, **found}
        for record in evidence.task_scores
        if record["evaluated"]
        for metric, found in record["metrics"].items()
    ]
    table = pd.DataFrame(rows, columns=COLUMNS)
    return table.astype({"value": float, "stderr": float})


def rows(evidence: Evidence) -> list[dict[str, Any]]:
    """Per task and metric: (value, stderr) of every model, and the package against the fetched model in a word."""
    found = []
    for (task, metric), group in scores(evidence).groupby(["task", "metric"], sort=False):
        values = {row.model: (row.value, row.stderr) for row in group.itertuples()}
        first = group.iloc[0]
        judged = judge(values.get(PACKAGE), values.get(FETCHED), first["higher_is_better"])
        found.append({"task": task, "metric": metric, "samples": first["samples"], "values": values, "judged": judged})
    return found


def judge(package: tuple[float, float] | None, base: tuple[float, float] | None, higher: bool | None) -> str | None:
    """ "better", "worse" or "no difference"; None where it can't be told.

    The two models answer the same questions, so their errors are less than independent, and the word is cautious.
    """
    if package is None or base is None or higher is None:
        return None
    error = CERTAIN * math.hypot(package[1], base[1])
    if math.isnan(error):
        return None
    if abs(package[0] - base[0]) <= error:
        return "no difference"
    return "better" if (package[0] > base[0]) == bool(higher) else "worse"


def context(evidence: Evidence) -> dict[str, Any]:
    """rows, models, and whether only the first documents were asked."""
    table = scores(evidence)
    return {
        "rows": rows(evidence),
        "models": list(dict.fromkeys(table["model"])),
        "limits": sorted({int(limit) for limit in table["limit"].dropna()}),
    }


def plots(evidence: Evidence) -> dict[str, Plot]:
    """The shares of right answers."""
    table = scores(evidence)
    shares = table[(table["higher_is_better"] == True) & table["stderr"].notna() & table["value"].between(0, 1)]  # noqa: E712
    named = shares.assign(name=shares["task"] + ", " + shares["metric"], model=shares["model"].map(comparison.title))
    return {"task-scores": Plot(result_charts.task_scores(named[["name", "model", "value", "stderr"]]), DRAWN)}


def tables(evidence: Evidence) -> dict[str, pd.DataFrame]:
    """All scores."""
    return {"task_scores": scores(evidence)}


SECTION = Section("task_scores", "Tasks", context, plots, tables)
