"""What each stage did to the model: the difference to the stage before, in perplexity, bytes, zeros, latency, memory.

Pure: evaluations (`tasks.evaluation.results.read`) and measurements (`tasks.evaluation.measurements`) in, rows out.
Each row compares a model with the one that went into its stage, not with the fetched one, so the rows of the chain add
up. Perplexities are compared document by document (`tasks.evaluation.comparison.difference`); inside the interval there
is no difference. Times are compared by their spread over the repetitions: where the ranges overlap there is none. It
explains nothing: a stage that recovers what another one broke gets the gain, and the other one the loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.algorithms.statistics.bootstrap import BETTER, NO_DIFFERENCE, WORSE
from tasks.evaluation import comparison
from tasks.evaluation.comparison import SPLITS

Figures = Mapping[str, Mapping[str, Any]]


def previous(stages: Mapping[str, list[str]], models: list[str]) -> dict[str, str | None]:
    """Model -> the model that went into its stage: the first declared one among the evaluated ones.

    Args:
        stages: name of a stage -> paths of its dependencies, in the order of dvc.yaml.
        models: names of the evaluated models, each the stage that made it.
    """
    found: dict[str, str | None] = {}
    for name in models:
        paths = [Path(path) for path in stages.get(name, [])]
        inputs = [path.parent.name for path in paths if path.name == "model"]
        found[name] = next((each for each in inputs if each in models), None)
    return found


def rows(metrics: Figures, hosts: Figures, before: Mapping[str, str | None]) -> list[dict[str, Any]]:
    """A row per evaluated model, in the order of `metrics`; None where a figure isn't known.

    Columns:
        stage, before: the model and the one it is compared with.
        measure_SPLIT, change_SPLIT, low_SPLIT, high_SPLIT, verdict_SPLIT: "perplexity" or "bits_per_byte"; the
            difference, its 95 % interval, and "better", "worse" or "no difference".
        bytes, zeros: differences, of the folder by `stat` and of the weights in the blocks that are 0.
        seconds_per_token, verdict_latency: the difference of the medians at batch 1, and whether the ranges overlap.
        peak_bytes: the difference of the memory above the libraries.
    """
    return [_row(name, before.get(name), metrics, hosts) for name in metrics]


def _row(name: str, reference: str | None, metrics: Figures, hosts: Figures) -> dict[str, Any]:
    own, other = metrics[name], metrics.get(reference or "", {})
    row: dict[str, Any] = {"stage": name, "before": reference}
    for split in SPLITS:
        row |= {f"{key}_{split}": value for key, value in _quality(own, other, split).items()}
    row["bytes"] = _change(own.get("bytes", {}).get("total"), other.get("bytes", {}).get("total"))
    row["zeros"] = _change(own.get("zeros"), other.get("zeros"))
    return row | _speed(hosts.get(name, {}), hosts.get(reference or "", {}))


def _quality(own: Mapping[str, Any], other: Mapping[str, Any], split: str) -> dict[str, Any]:
    """Change of the better measure, with its interval where documents give one."""
    compared = comparison.compare(own, other).get(split)
    if compared is None:
        return dict.fromkeys(("measure", "change", "low", "high", "verdict"))
    found = compared.difference
    change = found.change if found else compared.package - compared.plain
    return {
        "measure": compared.measure,
        "change": change,
        "low": found.change_low if found else None,
        "high": found.change_high if found else None,
        "verdict": compared.outcome,
    }


def _speed(own: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    if not (own.get("measured") and other.get("measured")):
        return dict.fromkeys(("seconds_per_token", "verdict_latency", "peak_bytes"))
    times, others = own["seconds_per_token"], other["seconds_per_token"]
    verdict = NO_DIFFERENCE
    if times["largest"] < others["least"]:
        verdict = BETTER
    elif times["least"] > others["largest"]:
        verdict = WORSE
    return {
        "seconds_per_token": times["median"] - others["median"],
        "verdict_latency": verdict,
        "peak_bytes": own["above_libraries_bytes"] - other["above_libraries_bytes"],
    }


def _change(own: int | None, other: int | None) -> int | None:
    return None if own is None or other is None else own - other
