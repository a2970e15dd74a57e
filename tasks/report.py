"""Stage report: everything the other stages measured, as one page, a verdict, tables, plots and a few figures.

Its first line is the verdict: size, perplexity, against a plain model of its size, and where it fits
(`tasks.reporting.verdict`). What follows are the sections of `SECTIONS`.

`report.html` is one file that needs no network: Vega and the specifications of its plots are inside, and its content
security policy forbids every request and every script but its own. It has no time and no random name in it, so that the
same inputs give the same bytes. What stages wrote (completions, file names) is text, never markup. Its links lead to
artifacts and records of the project that it lies in.

`plots` and `tables` hold the sections' plots as SVG and tables as CSV, for slides and for other programs (Prefect's
artifacts). It measures and judges nothing itself: numbers are those of the stages, and a section whose stage was
switched off says so. The DAG is drawn from DVC's graph.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import pandas as pd
import vl_convert
from markupsafe import Markup

from tasks.reporting import chart_style
from tasks.reporting.evidence import read as read_evidence
from tasks.reporting.figures import figures
from tasks.reporting.format import FILTERS
from tasks.reporting.model_rows import byte_rows, stage_rows
from tasks.reporting.section import Plot, Section
from tasks.reporting.sections import (
    against_plain,
    attribution,
    completions,
    devices,
    domains,
    host,
    importance,
    kv_cache,
    lineage,
    pipeline,
    pruning,
    quantisation,
    recovery,
    size,
    stages,
    task_scores,
)
from tasks.reporting.verdict import verdict
from tasks.runtime import files

if TYPE_CHECKING:
    from tasks.reporting.evidence import Evidence
    from tasks.runtime.stage import Stage

SECTIONS: tuple[Section, ...] = (
    against_plain.SECTION,
    stages.SECTION,
    attribution.SECTION,
    domains.SECTION,
    size.SECTION,
    devices.SECTION,
    task_scores.SECTION,
    kv_cache.SECTION,
    host.SECTION,
    completions.SECTION,
    importance.SECTION,
    pruning.SECTION,
    recovery.SECTION,
    quantisation.SECTION,
    pipeline.SECTION,
    lineage.SECTION,
)
"""What the page shows, in this order."""
TEMPLATES = Path(__file__).parent / "reporting"
STARTER = """
for (const figure of document.querySelectorAll("[data-plot]")) {
  const spec = JSON.parse(document.getElementById(figure.dataset.plot).textContent);
  vegaEmbed(figure, spec, {mode: "vega-lite", ast: true, actions: false, renderer: "svg"}).catch(console.error);
}
const closed = [];
addEventListener("beforeprint", () => {
  for (const each of document.querySelectorAll("details:not([open])")) { closed.push(each); each.open = true; }
});
addEventListener("afterprint", () => { for (const each of closed.splice(0)) each.open = false; });
"""
"""Draws the plots. `ast`: expressions are interpreted, since the page's policy forbids to compile them. Prints all."""


def run(stage: Stage) -> None:
    """Write report.html, verdict.txt, stages.csv, bytes.csv, metrics.json, and the folders plots and tables."""
    evidence = read_evidence(stage)
    found = figures(evidence)
    sentences = verdict(evidence, found)
    drawn = {section.name: _drawn(section.plots(evidence)) for section in SECTIONS}
    page = render(evidence, sentences, drawn)
    stage.output("report.html").write_bytes(page.encode("utf-8", "replace"))
    _write(stage, evidence.metrics, found, sentences)
    _write_plots(stage.output("plots"), {name: plot for plots in drawn.values() for name, plot in plots.items()})
    _write_tables(stage.output("tables"), [section.tables(evidence) for section in SECTIONS])
    print(*sentences, sep="\n")


def skip(stage: Stage) -> None:
    """An empty page, tables without rows, no figures, plots or tables."""
    off = "The report is switched off."
    page = f"<!doctype html>\n<meta charset=utf-8>\n<title>edgepress</title>\n<p>{off}\n"
    stage.output("report.html").write_text(page, encoding="utf-8")
    _write(stage, {}, {}, [off])
    _write_plots(stage.output("plots"), {})
    _write_tables(stage.output("tables"), [])


def render(evidence: Evidence, sentences: list[str], drawn: dict[str, dict[str, Plot]]) -> str:
    """The page.

    Args:
        sentences: the verdict.
        drawn: the plots of every section.

    Raises:
        RuntimeError: Vega's script can't stand inside a page.
    """
    bundle = vl_convert.javascript_bundle(vl_version=chart_style.VEGA_LITE)
    if "</script" in bundle.lower() or "<!--" in bundle:
        raise RuntimeError("Vega's script would end the page's script element; use the pinned vl-convert-python")
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FileSystemLoader(TEMPLATES),
    )
    environment.filters |= FILTERS
    bodies = {
        section.name: Markup(
            environment.get_template(f"sections/{section.name}.html.jinja").render(
                section.context(evidence), plots=drawn[section.name]
            )
        )
        for section in SECTIONS
    }
    return environment.get_template("page.html.jinja").render(
        bundle=Markup(bundle),
        starter=Markup(STARTER),
        integrity=[_integrity(bundle), _integrity(STARTER)],
        verdict=sentences,
        sections=SECTIONS,
        bodies=bodies,
    )


def _drawn(plots: dict[str, Plot]) -> dict[str, Plot]:
    """Those with data, their captions as the names by which a screen reader calls them."""
    named = {name: plot._replace(spec=plot.spec | {"description": plot.caption}) for name, plot in plots.items()}
    return {name: named[name] for name, plot in plots.items() if plot.spec}


def _write(stage: Stage, metrics: dict[str, dict[str, Any]], found: dict[str, Any], sentences: list[str]) -> None:
    rows, components = stage_rows(metrics), byte_rows(metrics)
    stage.output("verdict.txt").write_bytes("".join(f"{line}\n" for line in sentences).encode("utf-8", "replace"))
    files.write_csv(stage.output("stages.csv"), rows, "%.9g")
    files.write_csv(stage.output("bytes.csv"), components)
    files.write_json(stage.output("metrics.json"), found)


def _write_plots(folder: Path, plots: dict[str, Plot]) -> None:
    """One SVG per plot, and captions.json with what stands below them."""
    folder.mkdir()
    for name, plot in plots.items():
        svg = vl_convert.vegalite_to_svg(chart_style.still(plot.spec), vl_version=chart_style.VEGA_LITE)
        (folder / f"{name}.svg").write_text(svg, encoding="utf-8")
    captions = {name: plot.caption for name, plot in plots.items()}
    (folder / "captions.json").write_text(json.dumps(captions, indent=1) + "\n", encoding="utf-8")


def _write_tables(folder: Path, found: list[dict[str, pd.DataFrame]]) -> None:
    """One CSV per table that has rows."""
    folder.mkdir()
    for name, table in {name: table for tables in found for name, table in tables.items()}.items():
        if len(table):
            files.write_csv(folder / f"{name}.csv", table, "%.9g")


def _integrity(script: str) -> str:
    """The name by which the page's policy allows this script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
