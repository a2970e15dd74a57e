"""`edgepress attribution`: what each stage did to the model, and the seconds that it took.

The rows are those of `tasks.evaluation.attribution`, from what stages evaluate and measure wrote; seconds, speed and
memory come from the lineage records (outputs hold no time): those of this machine's own runs, where there are any, and
it says whose they are. Stages that make no model have their seconds alone. Which stages there are, in
which order and where their files lie is asked of DVC. It runs nothing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dvc.repo import Repo
from dvc.stage import Stage

from tasks.cli import console, report
from tasks.evaluation import attribution, comparison, measurements, results
from tasks.runtime import lineage

SHOWN = (("bytes", "bytes", "+,.0f"), ("zeros", "zeros", "+,.0f"))
NOTHING = "Nothing is evaluated yet: `dvc repro` does it."


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("--json", action="store_true", help="the rows with all their figures")


def main(given: argparse.Namespace) -> None:
    """Print a row per stage."""
    known, source = rows()
    if given.json:
        console.show_json(known)
    elif known:
        cells = [_shown(row) for row in known]
        lines = [line for line in (source, report.told(known)) if line]
        console.show(console.table(list(cells[0]), [list(row.values()) for row in cells]), *lines)
    else:
        print(NOTHING)


def rows() -> tuple[list[dict[str, Any]], str]:
    """(`tasks.evaluation.attribution.rows` and `report.seconds`, for every stage in the order of dvc.yaml, unknown is
    None; whose speed and memory they are, in a sentence)."""
    with Repo() as repo:
        stages = {_name(stage): [dep.def_path for dep in stage.deps] for stage in repo.index.stages}
        metrics = {path.parent.name: results.read(path.parent) for path in _written(repo, "evaluate", "metrics.json")}
        hosts, source = _hosts(repo)
        order = [name for name in stages if name in metrics]
        metrics = {name: metrics[name] for name in order}
        before = attribution.previous(stages, order)
        found = {row["stage"]: row for row in attribution.rows(metrics, hosts, before)}
        if not found:
            return [], ""
        return [found.get(name, {"stage": name}) | report.seconds(repo, name) for name in stages], source


def _hosts(repo: Repo) -> tuple[dict[str, dict[str, Any]], str]:
    """(Measurements by model, whose they are): this machine's, or else those that the tracked record holds."""
    stage = next((stage for stage in repo.index.stages if stage.addressing == "measure"), None)
    paths = [Path(out.fs_path) / measurements.MODELS for out in stage.outs] if stage else []
    if not paths or not paths[0].exists():
        return {}, ""
    own = lineage.local(stage)
    found = measurements.hosts(_json(paths[0]), own or lineage.find(stage))
    if source := measurements.source(found):
        return found, f"speed and memory: of {f'{report.THIS_MACHINE} ({source})' if own else source}"
    return found, next((f"no speed and memory: {host['why']}" for host in found.values()), "")


def _shown(row: dict[str, Any]) -> dict[str, str]:
    cells = {"stage": comparison.title(row["stage"])}
    for split in comparison.SPLITS:
        cells[f"ppl {split}"] = _quality(row, split)
    cells |= {title: _text(row.get(name), form) for title, name, form in SHOWN}
    latency = row.get("seconds_per_token")
    same = row.get("verdict_latency") == comparison.NO_DIFFERENCE
    cells["ms/token"] = comparison.NO_DIFFERENCE if same else _text(latency and 1e3 * latency, "+.3f")
    peak = row.get("peak_bytes")
    cells["peak MiB"] = _text(None if peak is None else peak / 2**20, "+.1f")
    return cells | {"seconds": _text(row.get("seconds"), ",.1f")}


def _quality(row: dict[str, Any], split: str) -> str:
    """ "-6.730 [-7.512, -5.980]", "no difference [-0.010, 0.020]"; bits per byte are marked "bpb"."""
    change, low, high = (row.get(f"{key}_{split}") for key in ("change", "low", "high"))
    if change is None:
        return "-"
    unit = "" if row[f"measure_{split}"] == comparison.PERPLEXITY else "bpb "
    same = row[f"verdict_{split}"] == comparison.NO_DIFFERENCE
    value = comparison.NO_DIFFERENCE if same else f"{unit}{change:+.3f}"
    return value if low is None else f"{value} [{low:+.3f}, {high:+.3f}]"


def _written(repo: Repo, name: str, file: str) -> list[Path]:
    """data/NAME/MODEL/FILE of every model for which the stage wrote it; its output is that folder, or one above it."""
    outs = [Path(out.fs_path) for stage in repo.index.stages if _name(stage) == name for out in stage.outs]
    return [path for out in outs for path in ([out / file] if (out / file).exists() else sorted(out.glob(f"*/{file}")))]


def _name(stage: Stage) -> str:
    """The stage's name without the item of a matrix; what `dvc add` made has an address alone."""
    return stage.addressing.partition("@")[0]


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _text(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)
