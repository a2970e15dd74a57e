"""The tables of the report, from what the stages wrote: evidence in, rows out.

Every function is pure. Rows keep the order of the stages and of the models' linears; a table without data is empty.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pandas as pd

from tasks import charts, comparison
from tasks.comparison import BASE, BITS_PER_BYTE, PACKAGE, PERPLEXITY, PLAIN, SPLITS

if TYPE_CHECKING:
    from tasks.report import Evidence

MEASURES = [f"{measure}_{split}" for measure in (PERPLEXITY, BITS_PER_BYTE) for split in SPLITS]
COLUMNS = ["stage", "parameters", "zero_fraction", "bytes", *MEASURES, "protocol"]
BYTES_COLUMNS = ["stage", "component", "bytes"]
SCORES = ("magnitude", "taylor", "perplexity", "block_influence", "compound")


def stage_rows(metrics: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """One row per stage; the figures of one that was not evaluated are missing."""
    rows = []
    for name, found in metrics.items():
        row = {key: found.get(key) for key in ("parameters", "zero_fraction", "protocol")}
        row |= {"stage": name, "bytes": found.get("bytes", {}).get("total")}
        row |= {
            f"{key}_{split}": found.get(key, {}).get(split) for key in (PERPLEXITY, BITS_PER_BYTE) for split in SPLITS
        }
        rows.append(row)
    table = pd.DataFrame(rows, columns=COLUMNS)
    return table.astype(dict.fromkeys(["zero_fraction", *MEASURES], float) | {"parameters": "Int64", "bytes": "Int64"})


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


def plain_table(evidence: Evidence) -> list[dict[str, Any]]:
    """The package beside the plain model: a row per measure and split; empty where one was not evaluated.

    No row for perplexities of different tokens.
    """
    package, plain = model_of(evidence, PACKAGE), model_of(evidence, PLAIN)
    if not (package.get("evaluated") and plain.get("evaluated")):
        return []
    rows = [{"figure": "bytes", "package": package["bytes"]["total"], "plain": plain["bytes"]["total"], "digits": None}]
    for measure in (PERPLEXITY, BITS_PER_BYTE):
        for split in SPLITS:
            pair = [model.get(measure, {}).get(split) for model in (package, plain)]
            fair = measure == BITS_PER_BYTE or comparison.measure([package, plain], split) == PERPLEXITY
            if fair and None not in pair:
                row = {"figure": f"{measure.replace('_', ' ')}, {split}", "package": pair[0], "plain": pair[1]}
                rows.append(row | {"digits": 3 if measure == PERPLEXITY else 4})
    for row in rows:
        ratio = row["package"] / row["plain"] if row["plain"] else math.nan
        row["ratio"] = ratio if math.isfinite(ratio) else None
    return rows


def bound_table(evidence: Evidence) -> list[dict[str, Any]]:
    """Per component of the package: bytes, the bytes that its information needs, and how far it is over; then the sum.

    A component that holds no information of the model (a bound of 0 or none: metadata) has None and is not in the sum.
    """
    sizes, bound = model_of(evidence, PACKAGE).get("bytes", {}), evidence.manifest.get("bound") or {}
    rows = [(name, sizes[name], bound.get(name) or None) for name in _components(sizes)] if bound else []
    bounded = [(size, least) for _, size, least in rows if least is not None]
    if bounded:
        rows.append(("all that have a bound", sum(size for size, _ in bounded), sum(least for _, least in bounded)))
    return [
        {"component": name, "bytes": size, "bound": least, "ratio": size / least if least else None}
        for name, size, least in rows
    ]


def ledger_table(ledgers: dict[str, pd.DataFrame]) -> list[dict[str, Any]]:
    """Per stage the sums of its ledger, None where it was switched off."""
    rows = []
    for stage, table in ledgers.items():
        sums = {name: int(table[name].sum()) for name in table.columns if name != "linear"} if len(table) else None
        broken = table[(table["violations"] > 0) | (table["revived"] > 0)] if sums else ()
        rows.append({"stage": stage, "linears": len(table), "sums": sums, "broken": len(broken)})
    return rows


def bits_table(evidence: Evidence) -> dict[str, Any]:
    """Linears by bits in the package and in the plain model, and the mean bits of a weight."""
    tables = {name: table for name, table in widths(evidence).items() if not table.empty}
    used = sorted({int(bits) for table in tables.values() for bits in table["bits"]})
    rows = []
    for name, table in tables.items():
        counts = table["bits"].value_counts()
        known = "weights" in table and table["weights"].notna().all()
        mean = float((table["bits"] * table["weights"]).sum() / table["weights"].sum()) if known else None
        rows.append({"model": name, "counts": [int(counts.get(bits, 0)) for bits in used], "mean": mean})
    return {"widths": used, "rows": rows}


def adapter_summary(evidence: Evidence) -> dict[str, Any] | None:
    """The low-rank branches in sum, and the bits per weight of the linears that their bytes would buy instead."""
    table = evidence.compensated
    if table.empty:
        return None
    size, weights = int(table["bytes"].sum()), _weights(evidence, "eora", table["linear"])
    before, after = float(table["error_before"].mean()), float(table["error_after"].mean())
    return {
        "linears": len(table),
        "with_branch": int((table["rank"] > 0).sum()),
        "ranks": (int(table["rank"].min()), int(table["rank"].max())),
        "bytes": size,
        "before": before,
        "after": after,
        "bits": 8 * size / weights.sum() if weights.notna().all() else None,
        "rows": table.to_dict("records"),
    }


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


def widths(evidence: Evidence) -> dict[str, pd.DataFrame]:
    """linear, bits and weights of the package's linears and of the plain model's."""
    found = {"gptq": evidence.quantised, PLAIN: evidence.bits}
    if not evidence.quantised.empty and "weights" not in evidence.quantised:
        weights = _weights(evidence, "gptq", evidence.quantised["linear"])
        found["gptq"] = evidence.quantised.assign(weights=weights)
    return {name: table for name, table in found.items() if "bits" in table}


def _weights(evidence: Evidence, stage: str, linears: pd.Series) -> pd.Series:
    """How many weights each of these linears has, by the stage's ledger; missing where it does not say."""
    ledger = evidence.ledgers[stage]
    return linears.map(dict(zip(ledger["linear"], ledger["weights"], strict=True)) if len(ledger) else {})


def stage_table(evidence: Evidence, rows: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of stages.csv with what is only shown: the pattern that holds, the change against the fetched model."""
    table = rows.to_dict("records")
    for row, found in zip(table, evidence.metrics.values(), strict=True):
        name = row["stage"]
        row["evaluated"] = found["evaluated"]
        row["kind"] = "plain" if name in comparison.PLAIN_MODELS else "final" if name == PACKAGE else ""
        row["pattern"] = _pattern(found, evidence.manifest if name == PACKAGE else {})
        compared = comparison.compare(found, model_of(evidence, BASE)) if name != BASE else {}
        row["perplexity"], row["bits_per_byte"] = (
            [(row[f"{measure}_{split}"], _ratio(compared.get(split), measure)) for split in SPLITS]
            for measure in (PERPLEXITY, BITS_PER_BYTE)
        )
    return table


def _ratio(compared: comparison.Comparison | None, measure: str) -> float | None:
    if not compared or compared.measure != measure:
        return None
    ratio = compared.package / compared.plain
    return ratio if 0 < ratio < math.inf else None


def _pattern(found: dict[str, Any], manifest: dict[str, Any]) -> str:
    """What holds in the weights; of a package that broke what was asked for, its label."""
    if is_broken(manifest):
        return f"{manifest['pattern']} (asked {manifest['asked']})"
    return ", ".join(patterns(found.get("max_kept", {}))) or "none"


def mask_summary(evidence: Evidence) -> dict[str, Any] | None:
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


def placement_rows(fit: dict[str, Any]) -> pd.DataFrame:
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


def _components(sizes: dict[str, int]) -> list[str]:
    known = [name for name in charts.COMPONENTS if name in sizes]
    return known + sorted(set(sizes) - set(known) - {"total"})


def is_broken(manifest: dict[str, Any]) -> bool:
    """Whether the package is labelled otherwise than was asked for."""
    return bool(manifest.get("asked")) and manifest["asked"] != manifest.get("pattern")


def model_of(evidence: Evidence, name: str) -> dict[str, Any]:
    """The evaluation of this model; empty where dvc.yaml names none."""
    return evidence.metrics.get(name, {})
