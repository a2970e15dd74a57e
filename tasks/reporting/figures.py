"""The report's figures as flat scalars: what `dvc metrics` shows and compares. Pure; it measures nothing itself."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from tasks.evaluation import comparison
from tasks.evaluation.comparison import (
    BITS_PER_BYTE,
    FETCHED,
    PACKAGE,
    PERPLEXITY,
    PLAINLY_QUANTISED,
    RECOVERED_DENSE,
    SPLITS,
)

if TYPE_CHECKING:
    from tasks.reporting.evidence import Evidence

FP32, BF16 = 4, 2
"""Bytes of a parameter."""
FITTING = ("FITS", "FITS_STREAMING")


def figures(evidence: Evidence) -> dict[str, float | int | str | bool]:
    """Flat scalars of the fetched, the shipped and the plain models, their scores on tasks; no unmeasured one."""
    base, package = evidence.model(FETCHED), evidence.model(PACKAGE)
    found: dict[str, Any] = {"protocol": package.get("protocol"), "base_parameters": base.get("parameters")}
    for who, name in (
        ("base", FETCHED),
        ("package", PACKAGE),
        ("baseline", PLAINLY_QUANTISED),
        ("baseline_lora", RECOVERED_DENSE),
    ):
        model = evidence.model(name)
        found[f"{who}_bytes"] = model.get("bytes", {}).get("total")
        for measure in (PERPLEXITY, BITS_PER_BYTE):
            found |= {f"{who}_{measure}_{split}": model.get(measure, {}).get(split) for split in SPLITS}
    found |= {"package_parameters": package.get("parameters"), "package_zero_fraction": package.get("zero_fraction")}
    found |= _ratios(base, package, "perplexity_ratio", "bits_per_byte_ratio")
    found |= _ratios(evidence.model(PLAINLY_QUANTISED), package, "plain_ratio", "plain_bits_per_byte_ratio")
    for share in comparison.recovery(evidence.metrics):
        found[f"recovery_share_{share.reference}_{share.split}"] = share.closed
    found |= _size_figures(found)
    ledger = evidence.ledgers[PACKAGE]
    if not ledger.empty:
        found |= {f"package_{name}": int(ledger[name].sum()) for name in ("violations", "revived")}
    for scores in evidence.task_scores:
        task = f"{scores['model']}_{scores['task']}"
        found |= {f"{task}_{name}": score["value"] for name, score in scores.get("metrics", {}).items()}
    if evidence.fit_checked:
        found["fits"] = evidence.fit["verdict"] in FITTING
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


def _finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
