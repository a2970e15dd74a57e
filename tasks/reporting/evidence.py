"""What the other stages wrote, read once for the whole report.

Only declared dependencies are opened. What a stage that is switched off left behind (an empty table, a model that was
passed on) is told apart here, so that sections need not ask twice. It computes no figure.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from tasks.evaluation import measurements, results
from tasks.evaluation.comparison import PLAINLY_QUANTISED, RECOVERED_DENSE

if TYPE_CHECKING:
    from tasks.runtime.stage import Stage

CODE = "code"
"""The stage that lists the code of every other: an edge to each would tell nothing."""
LEDGERS = ("wanda", "lora", "gptq", "eora", "qad", "package")
"""Stages that say what is left of the sparsity pattern, in the order of dvc.yaml."""


class Link(NamedTuple):
    """An output of a stage, and its place as seen from the report."""

    path: str
    href: str


@dataclass(frozen=True)
class Evidence:
    """What the stages wrote.

    Attributes:
        metrics, completions: of the evaluated models by name, in the order of dvc.yaml
        (`tasks.evaluation.results.read`).
        overlap: how the splits relate to the training text; `measured` is false where stage overlap was switched off.
        scores, masks, history, quantised, compensated, trained: tables; without rows where the stage was switched off.
        plain_history: of the recovery of the plain model; without rows where that was switched off.
        ledgers: what each stage left of the sparsity pattern, per linear; without rows where it was switched off.
        bits: of every linear of the plain model; without rows where the baseline was switched off.
        task_scores: what lm-evaluation-harness says of a model on a task, a record per item of stage harness.
        devices: the packaged model on every device; without rows where hardware_fit was switched off.
        host: what stage measure measured of a model (`tasks.evaluation.measurements`); `measured` is false where
        that was switched off, or nobody's figures of this model are known.
        kv_cache: perplexity and bytes by context and bits; without rows where the stage was switched off.
        inputs: paths of what every stage depends on, in the order of dvc.yaml, without matrix items.
        edges, nodes: of DVC's graph without stage code, by address.
        outs: what every stage writes, by address.
        records: the lineage record of every stage, by address.
    """

    metrics: dict[str, dict[str, Any]]
    overlap: dict[str, Any]
    completions: dict[str, list[dict[str, str]]]
    scores: pd.DataFrame
    removed: dict[str, Any]
    masks: pd.DataFrame
    history: pd.DataFrame
    quantised: pd.DataFrame
    compensated: pd.DataFrame
    trained: pd.DataFrame
    plain_history: pd.DataFrame
    ledgers: dict[str, pd.DataFrame]
    bits: pd.DataFrame
    manifest: dict[str, Any]
    fit: dict[str, Any]
    task_scores: list[dict[str, Any]]
    devices: pd.DataFrame
    host: dict[str, dict[str, Any]]
    kv_cache: pd.DataFrame
    inputs: dict[str, list[str]]
    edges: list[tuple[str, str]]
    nodes: list[str]
    outs: dict[str, list[Link]]
    records: dict[str, Link]

    def model(self, name: str) -> dict[str, Any]:
        """The evaluation of this model; empty where dvc.yaml names none."""
        return self.metrics.get(name, {})

    @property
    def fit_checked(self) -> bool:
        """Whether hardware_fit was switched on."""
        return self.fit["verdict"] != "NOT_CHECKED"

    @property
    def pattern_broken(self) -> bool:
        """Whether the package is labelled otherwise than was asked for."""
        return bool(self.manifest.get("asked")) and self.manifest["asked"] != self.manifest.get("pattern")

    @property
    def lineage(self) -> dict[str, Any]:
        """What the package's manifest says of source, parameters and inputs; empty without a package."""
        return self.manifest.get("lineage", {})


def read(stage: Stage) -> Evidence:
    """Load what the declared dependencies hold; the evaluated models are those that dvc.yaml names.

    A plain model that was switched off is one that was not evaluated: its folder holds what the stage passed on.
    """
    folders = _items(stage, "evaluate")
    overlap = _json(stage.input("overlap.json"))
    metrics = {folder.name: results.read(folder, overlap) for folder in folders}
    completions = {folder.name: _json(folder / "completions.json") for folder in folders}
    plain = stage.has_input("baseline/bits.csv")
    bits = _table(stage.input("baseline/bits.csv")) if plain else pd.DataFrame()
    plain_history = _table(stage.input("baseline_lora/history.csv"))
    for name, table in ((PLAINLY_QUANTISED, bits), (RECOVERED_DENSE, plain_history)):
        if table.empty and name in metrics:
            metrics[name], completions[name] = {"model": name, "evaluated": False}, []
    graph = stage.dvc.repo.index.graph  # an edge leads from a stage to one it depends on
    graph = graph.subgraph(node for node in graph.nodes if node.addressing != CODE)
    return Evidence(
        metrics=metrics,
        overlap=overlap,
        completions=completions,
        scores=_table(stage.input("importance/scores.csv")),
        removed=_json(stage.input("removed.json")),
        masks=_table(stage.input("wanda/layers.csv")),
        history=_table(stage.input("lora/history.csv")),
        quantised=_table(stage.input("gptq/layers.csv")),
        compensated=_table(stage.input("eora/layers.csv")),
        trained=_table(stage.input("qad/history.csv")),
        plain_history=plain_history,
        ledgers={name: _table(stage.input(f"{name}/sparsity.csv")) for name in LEDGERS},
        bits=bits,
        manifest=_json(stage.input("package/model/manifest.json")),
        fit=_json(stage.input("hardware_fit/fit.json")),
        task_scores=_task_scores(stage, measured=metrics),
        devices=_table(stage.input("hardware_fit/devices.csv")),
        host=_host(stage, metrics),
        kv_cache=_table(stage.input("kv_cache.csv")),
        inputs={
            node.addressing: [dep.def_path for dep in node.deps] for node in graph.nodes if "@" not in node.addressing
        },
        edges=sorted((dependency.addressing, user.addressing) for user, dependency in graph.edges),
        nodes=sorted(node.addressing for node in graph.nodes),
        outs={
            node.addressing: [_link(stage, Path(os.path.relpath(out.fs_path))) for out in node.outs]
            for node in graph.nodes
        },
        records={node.addressing: _link(stage, _record(stage, node.addressing)) for node in graph.nodes},
    )


def _task_scores(stage: Stage, measured: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Scores of models that are what their name says, by task, models in the order of dvc.yaml."""
    records = [_json(folder / "scores.json") for folder in _items(stage, "harness")]
    order = list(measured)
    known = [record for record in records if measured.get(record["model"], {}).get("evaluated")]
    return sorted(known, key=lambda record: (record["task"], order.index(record["model"])))


def _host(stage: Stage, measured: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Measurements of models that are what their name says, in the order of dvc.yaml."""
    models = _json(stage.input("data/measure") / measurements.MODELS)
    found = measurements.hosts(models, _json(stage.input("lineage/measure.json")))
    return {name: found[name] for name, metrics in measured.items() if metrics["evaluated"]}


def _items(stage: Stage, name: str) -> list[Path]:
    """The folder of each item of a matrix that dvc.yaml has now, in its order: older ones may lie beside them."""
    folder = stage.input(f"data/{name}")
    addresses = [node.addressing.partition("@") for node in stage.dvc.repo.index.graph.nodes]
    return [folder / item for stem, _, item in addresses if stem == name]


def _record(stage: Stage, address: str) -> Path:
    """The lineage record of a stage, which lies beside the one that the report reads."""
    return Path(os.path.relpath(stage.input("lineage/measure.json").with_name(f"{address}.json")))


def _link(stage: Stage, path: Path) -> Link:
    return Link(path.as_posix(), Path(os.path.relpath(path.resolve(), stage.folder.resolve())).as_posix())


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _table(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path)
    except pd.errors.EmptyDataError:
        return pd.DataFrame()
