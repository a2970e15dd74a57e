"""Stage report: everything the other stages measured, as one page, two tables and a few figures.

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

from tasks import charts

if TYPE_CHECKING:
    from tasks.stage import Stage

TEMPLATE = Path(__file__).with_name("report.html.jinja")
SPLITS = ("test", "test_ood")
COLUMNS = ["stage", "parameters", "zero_fraction", "bytes", "perplexity_test", "perplexity_test_ood", "protocol"]
BYTES_COLUMNS = ["stage", "component", "bytes"]
SCORES = ("magnitude", "taylor", "perplexity", "block_influence", "compound")
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
    """

    metrics: dict[str, dict[str, Any]]
    completions: dict[str, list[dict[str, str]]]
    scores: pd.DataFrame
    removed: dict[str, Any]
    masks: pd.DataFrame
    history: pd.DataFrame
    quantised: pd.DataFrame
    compensated: pd.DataFrame
    manifest: dict[str, Any]
    fit: dict[str, Any]
    edges: list[tuple[str, str]]
    nodes: list[str]


def run(stage: Stage) -> None:
    """Write report.html, stages.csv, bytes.csv and metrics.json."""
    evidence = read(stage)
    rows, components = stage_rows(evidence.metrics), byte_rows(evidence.metrics)
    found = figures(evidence)
    page = render(evidence, rows, components, found)
    stage.output("report.html").write_bytes(page.encode("utf-8", "replace"))
    _write(stage, rows, components, found)
    for sentence in verdict(found, evidence.fit):
        print(sentence)


def skip(stage: Stage) -> None:
    """An empty page, tables without rows, no figures."""
    page = "<!doctype html>\n<meta charset=utf-8>\n<title>edgepress</title>\n<p>The report is switched off.\n"
    stage.output("report.html").write_text(page, encoding="utf-8")
    _write(stage, pd.DataFrame(columns=COLUMNS), pd.DataFrame(columns=BYTES_COLUMNS), {})


def read(stage: Stage) -> Evidence:
    """Load what the declared dependencies hold; the evaluated models are those that dvc.yaml names."""
    folders = stage.inputs_below("evaluate")
    graph = stage.dvc.repo.index.graph  # an edge leads from a stage to one it depends on
    return Evidence(
        metrics={folder.name: _json(folder / "metrics.json") for folder in folders},
        completions={folder.name: _json(folder / "completions.json") for folder in folders},
        scores=_table(stage.input("importance/scores.csv")),
        removed=_json(stage.input("removed.json")),
        masks=_table(stage.input("wanda/layers.csv")),
        history=_table(stage.input("lora/history.csv")),
        quantised=_table(stage.input("gptq/layers.csv")),
        compensated=_table(stage.input("eora/layers.csv")),
        manifest=_json(stage.input("manifest.json")),
        fit=_json(stage.input("fit.json")),
        edges=sorted((dependency.addressing, user.addressing) for user, dependency in graph.edges),
        nodes=sorted(node.addressing for node in graph.nodes),
    )


def stage_rows(metrics: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """One row per stage; the figures of one that was not evaluated are missing."""
    rows = []
    for name, found in metrics.items():
        row = {key: found.get(key) for key in ("parameters", "zero_fraction", "protocol")}
        row |= {"stage": name, "bytes": found.get("bytes", {}).get("total")}
        row |= {f"perplexity_{split}": found.get("perplexity", {}).get(split) for split in SPLITS}
        rows.append(row)
    table = pd.DataFrame(rows, columns=COLUMNS)
    numbers = {name: float for name in ("zero_fraction", "perplexity_test", "perplexity_test_ood")}
    return table.astype(numbers | {"parameters": "Int64", "bytes": "Int64"})


def byte_rows(metrics: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """Bytes of every stage's model by component, the total left out."""
    rows = [
        (name, component, found["bytes"][component])
        for name, found in metrics.items()
        for component in _components(found.get("bytes", {}))
    ]
    return pd.DataFrame(rows, columns=BYTES_COLUMNS)


def patterns(max_kept: dict[str, int | None]) -> list[str]:
    """The "keep:of" patterns that hold everywhere; one that follows from a shorter one is left out.

    Args:
        max_kept: group length -> largest number of non-zeros in such a group, None where it divides no row.
    """
    holding: list[tuple[int, int]] = []
    for of, keep in sorted((int(key), value) for key, value in max_kept.items()):
        implied = any(of % short == 0 and kept * (of // short) <= (keep or 0) for kept, short in holding)
        if keep is not None and keep < of and not implied:
            holding.append((keep, of))
    return [f"{keep}:{of}" for keep, of in holding]


def figures(evidence: Evidence) -> dict[str, float | int | str | bool]:
    """Flat scalars of the first and the last model; one that was not measured is left out."""
    names = list(evidence.metrics)
    base, final = evidence.metrics[names[0]], evidence.metrics[names[-1]]
    found: dict[str, Any] = {"protocol": final.get("protocol")}
    for split in SPLITS:
        before, after = (side.get("perplexity", {}).get(split) for side in (base, final))
        found |= {f"base_perplexity_{split}": before, f"package_perplexity_{split}": after}
        if before and after and base["protocol"] == final["protocol"]:
            found[f"perplexity_ratio_{split}"] = after / before
    stored, shipped = (side.get("bytes", {}).get("total") for side in (base, final))
    parameters = base.get("parameters")
    found |= {"base_bytes": stored, "package_bytes": shipped}
    found |= {"base_parameters": parameters, "package_parameters": final.get("parameters")}
    found["package_zero_fraction"] = final.get("zero_fraction")
    if stored and shipped and parameters:
        found["compression_vs_stored"] = stored / shipped
        found["compression_vs_fp32"] = FP32 * parameters / shipped
        found["compression_vs_bf16"] = BF16 * parameters / shipped
    if checked(evidence.fit):
        found["fits"] = evidence.fit["verdict"] == "FITS"
        found["tokens_per_second_bound"] = evidence.fit["tokens_per_second"]["bound"]
    return {key: value for key, value in found.items() if value is not None and _finite(value)}


def checked(fit: dict[str, Any]) -> bool:
    """Whether hardware_fit was switched on."""
    return fit["verdict"] in ("FITS", "DOES_NOT_FIT")


def verdict(found: dict[str, Any], fit: dict[str, Any]) -> list[str]:
    """The result in plain sentences, the most important first: fit, size, perplexity, speed."""
    sentences = [_fit_sentence(fit), _size_sentence(found), _perplexity_sentence(found)]
    if checked(fit):
        speed, base = fit["tokens_per_second"], fit.get("fetched")
        bound = f"At most {number(speed['bound'], 0)} tokens per second there, limited by {speed['limited_by']}"
        if base and base["verdict"] == "FITS":
            bound += "; the fetched model in bf16 would fit, too"
        elif base:
            over, term = base["bytes_over"], base["limiting_term"]
            bound += f"; the fetched model in bf16 would be {number(over)} bytes over ({term})"
        sentences.append(bound + ".")
    return sentences


def _fit_sentence(fit: dict[str, Any]) -> str:
    if not checked(fit):
        return "The packaged model was not checked against a device (hardware_fit is switched off)."
    term = fit["limiting_term"]
    if fit["verdict"] == "FITS":
        return f"The packaged model fits {fit['device']}: {number(fit['headroom_bytes'])} bytes stay free ({term})."
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


def _perplexity_sentence(found: dict[str, Any]) -> str:
    parts = []
    for split in SPLITS:
        if f"perplexity_ratio_{split}" in found:
            after, before = (number(found[f"{side}_perplexity_{split}"], 3) for side in ("package", "base"))
            parts.append(f"{after} on {split} (fetched {before}, {change(found[f'perplexity_ratio_{split}'])})")
    if not parts:
        return "Its perplexity was not measured, or not under the fetched model's protocol."
    return f"Its perplexity is {' and '.join(parts)}, by protocol {found['protocol']}."


def render(evidence: Evidence, rows: pd.DataFrame, components: pd.DataFrame, found: dict[str, Any]) -> str:
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
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        bundle=Markup(bundle),
        starter=Markup(STARTER),
        integrity=[_integrity(bundle), _integrity(STARTER)],
        verdict=verdict(found, evidence.fit),
        stages=_stage_table(evidence, rows),
        protocols=sorted({value for value in rows["protocol"] if isinstance(value, str)}),
        plots=plots(evidence, rows, components),
        dag=charts.dag(evidence.nodes, evidence.edges),
        off=switched_off(evidence),
        scores=score_table(evidence),
        removed=evidence.removed,
        masks=_mask_summary(evidence),
        recovered=not evidence.history.empty,
        violations=int(evidence.quantised["violations"].sum()) if not evidence.quantised.empty else None,
        adapter=int(evidence.compensated["bytes"].sum()) if not evidence.compensated.empty else None,
        fit=evidence.fit if checked(evidence.fit) else None,
        completions=completion_table(evidence),
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
    for name, draw, table in (
        ("training", charts.training, evidence.history),
        ("quantisation", charts.quantisation_error, evidence.quantised),
        ("compensation", charts.compensation, evidence.compensated),
        ("placement", charts.placement, _placement_rows(evidence.fit)),
    ):
        made[name] = draw(table) if not table.empty else {}
    return {name: spec for name, spec in made.items() if spec}


def switched_off(evidence: Evidence) -> list[str]:
    """Stages whose section of the manifest's parameters says so, and those that left no result."""
    sections = evidence.manifest.get("lineage", {}).get("parameters", {})
    off = {name for name, section in sections.items() if section.get("enabled") is False}
    tables = {"importance": evidence.scores, "wanda": evidence.masks, "lora": evidence.history}
    tables |= {"gptq": evidence.quantised, "eora": evidence.compensated}
    off |= {name for name, table in tables.items() if table.empty}
    off |= set() if evidence.manifest["files"] else {"package"}
    off |= set() if checked(evidence.fit) else {"hardware_fit"}
    return sorted(off | {f"evaluate@{name}" for name, found in evidence.metrics.items() if not found["evaluated"]})


def score_table(evidence: Evidence) -> list[dict[str, Any]]:
    """Per layer: whether it was removed, and value and rank (1 = least important) by every score."""
    table, removed = evidence.scores, evidence.removed["removed"]
    names = [name for name in SCORES if name in table]
    ranks = table[names].rank(method="min")
    return [
        {
            "layer": int(table["layer"][index]),
            "removed": int(table["layer"][index]) in removed,
            "scores": {name: (float(table[name][index]), int(ranks[name][index])) for name in names},
        }
        for index in table.index
    ]


def completion_table(evidence: Evidence) -> list[dict[str, Any]]:
    """Per prompt the completion of every model, None where there is none."""
    by_model = {name: {row["prompt"]: row["completion"] for row in rows} for name, rows in evidence.completions.items()}
    prompts = dict.fromkeys(prompt for rows in by_model.values() for prompt in rows)
    return [{"prompt": prompt, "texts": [rows.get(prompt) for rows in by_model.values()]} for prompt in prompts]


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


def percent(share: float | None) -> str:
    """ "50.00 %"."""
    return "–" if share is None or math.isnan(share) else f"{100 * share:.2f} %"


def _stage_table(evidence: Evidence, rows: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of stages.csv with what is only shown: the pattern that holds, and the change against the first row."""
    table = rows.to_dict("records")
    for row, found in zip(table, evidence.metrics.values(), strict=True):
        row["evaluated"] = found["evaluated"]
        row["patterns"] = patterns(found.get("max_kept", {}))
        row["splits"] = []
        for split in SPLITS:
            value, first = row[f"perplexity_{split}"], table[0][f"perplexity_{split}"]
            same = row["protocol"] == table[0]["protocol"] and row is not table[0] and first and not math.isnan(first)
            row["splits"].append((value, value / first if same else None))
    return table


def _mask_summary(evidence: Evidence) -> dict[str, Any] | None:
    masks = evidence.masks
    if masks.empty:
        return None
    weights, alphas = int((masks["rows"] * masks["cols"]).sum()), masks["alpha"].dropna()
    return {
        "linears": len(masks),
        "zeros": int(masks["zeros"].sum()),
        "share": float(masks["zeros"].sum() / weights),
        "alpha": (float(alphas.min()), float(alphas.max())) if len(alphas) else None,
    }


def _placement_rows(fit: dict[str, Any]) -> pd.DataFrame:
    """What the packaged and the fetched model put into each memory that they use."""
    results = [("packaged", fit), ("fetched, bf16", fit.get("fetched") or {})]
    results = [(who, result) for who, result in results if "placement" in result]
    rows = [
        (f"{place['tier']}: {who}", item, size, place["usable"])
        for places in zip(*[result["placement"] for _, result in results], strict=True)
        for (who, _), place in zip(results, places, strict=True)
        for item, size in place["items"].items()
        if place["usable"] > 0
    ]
    return pd.DataFrame(rows, columns=["place", "item", "bytes", "usable"])


def _usable_for_weights(fit: dict[str, Any]) -> int | None:
    return next((place["usable"] for place in fit.get("placement", []) if "weights" in place["items"]), None)


def _components(sizes: dict[str, int]) -> list[str]:
    known = [name for name in charts.COMPONENTS if name in sizes]
    return known + sorted(set(sizes) - set(known) - {"total"})


def _write(stage: Stage, rows: pd.DataFrame, components: pd.DataFrame, found: dict[str, Any]) -> None:
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
    return pd.read_csv(path) if path.stat().st_size else pd.DataFrame()
