"""Stage report: everything the other stages measured, as one page, a verdict, two tables and a few figures.

Its first line is what the package scores against a plain model of its size (`tasks.comparison`).

`report.html` is one file that needs no network: Vega and the specifications of its plots are inside, and its content
security policy forbids every request and every script but its own. It has no time and no random name in it, so that the
same inputs give the same bytes. What stages wrote (completions, file names) is text, never markup.

It measures and judges nothing itself: numbers are those of the stages, and a section whose stage was switched off says
so. The DAG is drawn from DVC's graph.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import pandas as pd
import vl_convert
from markupsafe import Markup

from tasks import charts, comparison, evaluations, report_tables
from tasks.comparison import BASE, BITS_PER_BYTE, PACKAGE, PERPLEXITY, PLAIN, RECOVERED, SPLITS
from tasks.report_tables import is_broken, model_of

if TYPE_CHECKING:
    from tasks.stage import Stage

TEMPLATE = Path(__file__).with_name("report.html.jinja")
LEDGERS = ("wanda", "lora", "gptq", "eora", "package")
"""Stages that say what is left of the sparsity pattern, in the order of dvc.yaml."""
FP32, BF16 = 4, 2
"""Bytes of a parameter."""
STARTER = """
for (const figure of document.querySelectorAll("[data-plot]")) {
  const spec = JSON.parse(document.getElementById(figure.dataset.plot).textContent);
  vegaEmbed(figure, spec, {mode: "vega-lite", ast: true, actions: false, renderer: "svg"}).catch(console.error);
}
"""
"""Draws the plots. `ast`: expressions are interpreted, since the page's policy forbids to compile them."""


@dataclass(frozen=True)
class Evidence:
    """What the stages wrote.

    Attributes:
        metrics, completions: of the evaluated models by name, in the order of dvc.yaml.
        scores, masks, history, quantised, compensated: tables; without rows where the stage was switched off.
        plain_history: of the recovery of the plain model; without rows where that was switched off.
        ledgers: what each stage left of the sparsity pattern, per linear; without rows where it was switched off.
        bits: of every linear of the plain model; without rows where the baseline was switched off.
    """

    metrics: dict[str, dict[str, Any]]
    completions: dict[str, list[dict[str, str]]]
    scores: pd.DataFrame
    removed: dict[str, Any]
    masks: pd.DataFrame
    history: pd.DataFrame
    quantised: pd.DataFrame
    compensated: pd.DataFrame
    plain_history: pd.DataFrame
    ledgers: dict[str, pd.DataFrame]
    bits: pd.DataFrame
    manifest: dict[str, Any]
    fit: dict[str, Any]
    edges: list[tuple[str, str]]
    nodes: list[str]


def run(stage: Stage) -> None:
    """Write report.html, verdict.txt, stages.csv, bytes.csv and metrics.json."""
    evidence = read(stage)
    rows, components = report_tables.stage_rows(evidence.metrics), report_tables.byte_rows(evidence.metrics)
    found = figures(evidence)
    sentences = verdict(evidence, found)
    page = render(evidence, rows, components, sentences)
    stage.output("report.html").write_bytes(page.encode("utf-8", "replace"))
    _write(stage, rows, components, found, sentences)
    print(*sentences, sep="\n")


def skip(stage: Stage) -> None:
    """An empty page, tables without rows, no figures."""
    off = "The report is switched off."
    page = f"<!doctype html>\n<meta charset=utf-8>\n<title>edgepress</title>\n<p>{off}\n"
    stage.output("report.html").write_text(page, encoding="utf-8")
    _write(stage, report_tables.stage_rows({}), report_tables.byte_rows({}), {}, [off])


def read(stage: Stage) -> Evidence:
    """Load what the declared dependencies hold; the evaluated models are those that dvc.yaml names.

    A plain model that was switched off is one that was not evaluated: its folder holds what the stage passed on.
    """
    folders = stage.inputs_below("evaluate")
    overlap = _json(stage.input("overlap.json"))
    metrics = {folder.name: evaluations.read(folder, overlap) for folder in folders}
    completions = {folder.name: _json(folder / "completions.json") for folder in folders}
    plain = stage.has_input("baseline/bits.csv")
    bits = _table(stage.input("baseline/bits.csv")) if plain else pd.DataFrame()
    plain_history = _table(stage.input("baseline_lora/history.csv"))
    for name, table in ((PLAIN, bits), (RECOVERED, plain_history)):
        if table.empty and name in metrics:
            metrics[name], completions[name] = {"model": name, "evaluated": False}, []
    graph = stage.dvc.repo.index.graph  # an edge leads from a stage to one it depends on
    return Evidence(
        metrics=metrics,
        completions=completions,
        scores=_table(stage.input("importance/scores.csv")),
        removed=_json(stage.input("removed.json")),
        masks=_table(stage.input("wanda/layers.csv")),
        history=_table(stage.input("lora/history.csv")),
        quantised=_table(stage.input("gptq/layers.csv")),
        compensated=_table(stage.input("eora/layers.csv")),
        plain_history=plain_history,
        ledgers={name: _table(stage.input(f"{name}/sparsity.csv")) for name in LEDGERS},
        bits=bits,
        manifest=_json(stage.input("manifest.json")),
        fit=_json(stage.input("fit.json")),
        edges=sorted((dependency.addressing, user.addressing) for user, dependency in graph.edges),
        nodes=sorted(node.addressing for node in graph.nodes),
    )


def figures(evidence: Evidence) -> dict[str, float | int | str | bool]:
    """Flat scalars of the fetched, the shipped and the plain models; one that was not measured is left out."""
    base, package = model_of(evidence, BASE), model_of(evidence, PACKAGE)
    found: dict[str, Any] = {"protocol": package.get("protocol"), "base_parameters": base.get("parameters")}
    for who, name in (("base", BASE), ("package", PACKAGE), ("baseline", PLAIN), ("baseline_lora", RECOVERED)):
        model = model_of(evidence, name)
        found[f"{who}_bytes"] = model.get("bytes", {}).get("total")
        for measure in (PERPLEXITY, BITS_PER_BYTE):
            found |= {f"{who}_{measure}_{split}": model.get(measure, {}).get(split) for split in SPLITS}
    found |= {"package_parameters": package.get("parameters"), "package_zero_fraction": package.get("zero_fraction")}
    found |= _ratios(base, package, "perplexity_ratio", "bits_per_byte_ratio")
    found |= _ratios(model_of(evidence, PLAIN), package, "plain_ratio", "plain_bits_per_byte_ratio")
    for share in comparison.recovery(evidence.metrics):
        found[f"recovery_share_{share.reference}_{share.split}"] = share.closed
    found |= _size_figures(found)
    ledger = evidence.ledgers[PACKAGE]
    if not ledger.empty:
        found |= {f"package_{name}": int(ledger[name].sum()) for name in ("violations", "revived")}
    if checked(evidence.fit):
        found["fits"] = fits(evidence.fit)
        found["tokens_per_second_bound"] = evidence.fit["tokens_per_second"]["bound"]
    return {key: value for key, value in found.items() if value is not None and _finite(value)}


def _ratios(reference: dict[str, Any], package: dict[str, Any], name: str, fallback: str) -> dict[str, float]:
    """Package by reference per split, under `fallback` where only bits per byte can be compared."""
    return {
        f"{name if each.measure == PERPLEXITY else fallback}_{split}": each.package / each.plain
        for split, each in comparison.compare(package, reference).items()
    }


def _size_figures(found: dict[str, Any]) -> dict[str, float]:
    stored, shipped, parameters = (found[key] for key in ("base_bytes", "package_bytes", "base_parameters"))
    if not (stored and shipped and parameters):
        return {}
    return {
        "compression_vs_stored": stored / shipped,
        "compression_vs_fp32": FP32 * parameters / shipped,
        "compression_vs_bf16": BF16 * parameters / shipped,
    }


def checked(fit: dict[str, Any]) -> bool:
    """Whether hardware_fit was switched on."""
    return fit["verdict"] in ("FITS", "FITS_STREAMING", "DOES_NOT_FIT")


def fits(fit: dict[str, Any]) -> bool:
    """Whether it fits, be it by streaming weights from storage."""
    return fit["verdict"] in ("FITS", "FITS_STREAMING")


def verdict(evidence: Evidence, found: dict[str, Any]) -> list[str]:
    """The result in plain sentences, the most important first: against a plain model, fit, size, perplexity, speed."""
    fit = evidence.fit
    sentences = [_plain_sentence(evidence), _fit_sentence(fit), _size_sentence(found), _perplexity_sentence(evidence)]
    if checked(fit):
        speed, base = fit["tokens_per_second"], fit.get("fetched")
        bound = f"At most {number(speed['bound'], 0)} tokens per second there, limited by {speed['limited_by']}"
        if base and fits(base):
            bound += "; the fetched model in bf16 would fit, too"
        elif base:
            over, term = base["bytes_over"], base["limiting_term"]
            bound += f"; the fetched model in bf16 would be {number(over)} bytes over ({term})"
        sentences.append(bound + ".")
    if is_broken(evidence.manifest):
        sentences.append(pattern_sentence(evidence.manifest))
    return sentences


def pattern_sentence(manifest: dict[str, Any]) -> str | None:
    """What the package's sparsity is labelled as; None without a package."""
    pattern = manifest.get("pattern")
    if not pattern:
        return None
    if is_broken(manifest):
        asked = manifest["asked"]
        return f"{asked} was asked for, but a later stage broke it: the package is labelled and stored as {pattern}."
    return (
        "The package is dense." if pattern == "dense" else f"The package's sparsity pattern is {pattern}, and it holds."
    )


def _plain_sentence(evidence: Evidence) -> str:
    parameters = evidence.manifest.get("lineage", {}).get("parameters", {})
    size = int(evidence.bits["bytes"].sum()) if not evidence.bits.empty else None
    same = evidence.history.empty or not evidence.plain_history.empty
    changes = comparison.way_out(parameters, size)
    return comparison.sentence(model_of(evidence, PACKAGE), model_of(evidence, PLAIN), changes, same)


def _fit_sentence(fit: dict[str, Any]) -> str:
    if not checked(fit):
        return "The packaged model was not checked against a device (hardware_fit is switched off)."
    term = fit["limiting_term"]
    if fits(fit):
        how = " with weights streamed from storage" if fit["verdict"] == "FITS_STREAMING" else ""
        free = number(fit["headroom_bytes"])
        return f"The packaged model fits {fit['device']}{how}: {free} bytes stay free ({term})."
    return f"The packaged model does not fit {fit['device']}: {number(fit['bytes_over'])} bytes over ({term})."


def _size_sentence(found: dict[str, Any]) -> str:
    if "compression_vs_stored" not in found:
        return "Its size was not measured (evaluate is switched off)."
    ratios = {key: f"{found[f'compression_vs_{key}']:.2f}" for key in ("stored", "fp32", "bf16")}
    return (
        f"It takes {number(found['package_bytes'])} bytes ({mebibytes(found['package_bytes'])}): {ratios['stored']} "
        f"times smaller than the fetched model as stored ({number(found['base_bytes'])} bytes), {ratios['fp32']} times "
        f"smaller than that model's parameters in fp32, {ratios['bf16']} times in bf16."
    )


def _perplexity_sentence(evidence: Evidence) -> str:
    compared = comparison.compare(model_of(evidence, PACKAGE), model_of(evidence, BASE))
    if not compared:
        return "Its perplexity was not measured, or not under the fetched model's protocol."
    parts = []
    for split, each in compared.items():
        after, before = number(each.package, 3), number(each.plain, 3)
        ratio = each.package / each.plain
        rise = f", {change(ratio)}" if 0 < ratio < math.inf else ""
        parts.append(f"{after} on {split} (fetched {before}{rise})")
    measures = sorted({each.measure.replace("_", " ") for each in compared.values()})
    protocol = model_of(evidence, PACKAGE)["protocol"]
    return f"Its {' and '.join(measures)} is {' and '.join(parts)}, by protocol {protocol}."


def render(evidence: Evidence, rows: pd.DataFrame, components: pd.DataFrame, sentences: list[str]) -> str:
    """The page.

    Raises:
        RuntimeError: Vega's script can't stand inside a page.
    """
    bundle = vl_convert.javascript_bundle(vl_version=charts.VEGA_LITE)
    if "</script" in bundle.lower() or "<!--" in bundle:
        raise RuntimeError("Vega's script would end the page's script element; use the pinned vl-convert-python")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "mebibytes": mebibytes, "change": change, "percent": percent}
    environment.filters |= {"label": comparison.title, "over": over}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        bundle=Markup(bundle),
        starter=Markup(STARTER),
        integrity=[_integrity(bundle), _integrity(STARTER)],
        verdict=sentences,
        stages=report_tables.stage_table(evidence, rows),
        protocols=sorted({value for value in rows["protocol"] if isinstance(value, str)}),
        plots=plots(evidence, rows, components),
        dag=charts.dag(evidence.nodes, evidence.edges),
        off=switched_off(evidence),
        plain=report_tables.plain_table(evidence),
        bounds=report_tables.bound_table(evidence),
        scores=report_tables.score_table(evidence),
        removed=evidence.removed,
        masks=report_tables.mask_summary(evidence),
        pattern=pattern_sentence(evidence.manifest),
        ledgers=report_tables.ledger_table(evidence.ledgers),
        linears={name: table.to_dict("records") for name, table in evidence.ledgers.items() if not table.empty},
        recovered=not evidence.history.empty,
        shares=comparison.recovery(evidence.metrics),
        widths=report_tables.bits_table(evidence),
        quantised=not evidence.quantised.empty,
        adapter=report_tables.adapter_summary(evidence),
        fit=evidence.fit if checked(evidence.fit) else None,
        completions=report_tables.completion_table(evidence),
        models=list(evidence.metrics),
        manifest=evidence.manifest,
        source=flatten(evidence.manifest.get("lineage", {}).get("source", {})),
        parameters=evidence.manifest.get("lineage", {}).get("parameters", {}),
        inputs=evidence.manifest.get("lineage", {}).get("inputs", {}),
        flatten=flatten,
    )


def plots(evidence: Evidence, rows: pd.DataFrame, components: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Specifications by name; one without data is left out."""
    usable = _usable_for_weights(evidence.fit)
    measured = rows[rows["bytes"].notna()].astype({"bytes": "int64"})
    made = {
        f"perplexity-{split.replace('_', '-')}": charts.perplexity_by_bytes(measured, f"perplexity_{split}", usable)
        for split in SPLITS
    }
    made["bytes"] = charts.bytes_by_component(components, usable)
    method = evidence.removed.get("method")
    if not evidence.scores.empty and method in evidence.scores:
        made["importance"] = charts.importance(evidence.scores, method, evidence.removed["removed"])
    for name, table in report_tables.widths(evidence).items():
        if table["bits"].nunique() > 1:
            made[f"bits-{name}"] = charts.bit_widths(table)
    for name, draw, table in (
        ("training", charts.training, evidence.history),
        ("quantisation", charts.quantisation_error, evidence.quantised),
        ("compensation", charts.compensation, evidence.compensated),
        ("placement", charts.placement, report_tables.placement_rows(evidence.fit)),
    ):
        made[name] = draw(table) if not table.empty else {}
    return {name: spec for name, spec in made.items() if spec}


def switched_off(evidence: Evidence) -> list[str]:
    """Stages whose section of the manifest's parameters says so, and those that left no result."""
    sections = evidence.manifest.get("lineage", {}).get("parameters", {})
    off = {name for name, section in sections.items() if section.get("enabled") is False}
    tables = {"importance": evidence.scores, "wanda": evidence.masks, "lora": evidence.history}
    tables |= {"gptq": evidence.quantised, "eora": evidence.compensated, PLAIN: evidence.bits}
    tables |= {RECOVERED: evidence.plain_history}
    off |= {name for name, table in tables.items() if table.empty}
    off |= set() if evidence.manifest["files"] else {"package"}
    off |= set() if checked(evidence.fit) else {"hardware_fit"}
    return sorted(off | {f"evaluate@{name}" for name, found in evidence.metrics.items() if not found["evaluated"]})


def flatten(value: Any, path: str = "") -> list[tuple[str, str]]:
    """Nested data as (dotted path, text) pairs."""
    if isinstance(value, dict) and value:
        return [pair for key in sorted(value) for pair in flatten(value[key], f"{path}.{key}" if path else key)]
    return [(path, value if isinstance(value, str) else json.dumps(value))]


def number(value: float | None, digits: int | None = None) -> str:
    """ "1,234,567", "3.142" with `digits` after the point, or "–" for a missing one."""
    if value is None or value is pd.NA or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "infinite"
    return f"{value:,.{digits}f}" if digits is not None else f"{value:,}"


def mebibytes(value: int | None) -> str:
    """ "1.31 MiB"."""
    return "–" if value is None or value is pd.NA else f"{value / charts.MIB:.2f} MiB"


def change(ratio: float) -> str:
    """ "+23.1 %"."""
    return f"{100 * (ratio - 1):+.1f} %"


def over(ratio: float) -> str:
    """ "0.13 %" of a ratio of 1.0013."""
    return f"{100 * (ratio - 1):.2f} %"


def percent(share: float | None) -> str:
    """ "50.00 %"."""
    return "–" if share is None or math.isnan(share) else f"{100 * share:.2f} %"


def _usable_for_weights(fit: dict[str, Any]) -> int | None:
    return next((place["usable"] for place in fit.get("placement", []) if "weights" in place["items"]), None)


def _write(
    stage: Stage, rows: pd.DataFrame, components: pd.DataFrame, found: dict[str, Any], sentences: list[str]
) -> None:
    stage.output("verdict.txt").write_bytes("".join(f"{line}\n" for line in sentences).encode("utf-8", "replace"))
    rows.to_csv(stage.output("stages.csv"), index=False, lineterminator="\n", float_format="%.9g")
    components.to_csv(stage.output("bytes.csv"), index=False, lineterminator="\n")
    stage.output("metrics.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _integrity(script: str) -> str:
    """The name by which the page's policy allows this script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")


def _finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _table(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path)
    except pd.errors.EmptyDataError:
        return pd.DataFrame()
