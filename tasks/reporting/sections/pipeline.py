"""The DAG as DVC has it, what each stage wrote, and which stages are switched off."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.evaluation.comparison import PLAINLY_QUANTISED, RECOVERED_DENSE
from tasks.reporting import dag
from tasks.reporting.section import Section

if TYPE_CHECKING:
    from tasks.reporting.evidence import Evidence


def switched_off(evidence: Evidence) -> list[str]:
    """Stages whose section of the manifest's parameters says so, and those that left no result."""
    sections = evidence.lineage.get("parameters", {})
    off = {name for name, section in sections.items() if section.get("enabled") is False}
    tables = {"importance": evidence.scores, "wanda": evidence.masks, "lora": evidence.history}
    tables |= {"gptq": evidence.quantised, "eora": evidence.compensated, PLAINLY_QUANTISED: evidence.bits}
    tables |= {"qad": evidence.trained, RECOVERED_DENSE: evidence.plain_history}
    off |= {name for name, table in tables.items() if table.empty}
    off |= set() if evidence.manifest["files"] else {"package"}
    off |= set() if evidence.fit_checked else {"hardware_fit"}
    return sorted(off | {f"evaluate@{name}" for name, found in evidence.metrics.items() if not found["evaluated"]})


def rows(evidence: Evidence) -> list[dict[str, Any]]:
    """Per stage in the order of the DAG: what it wrote and its record, as links."""
    order = dag.ordered(evidence.nodes, evidence.edges)
    return [{"stage": name, "outs": evidence.outs[name], "record": evidence.records[name]} for name in order]


def context(evidence: Evidence) -> dict[str, Any]:
    """dag, off, and the stages' outputs."""
    drawing = dag.dag(evidence.nodes, evidence.edges)
    return {"dag": drawing, "off": switched_off(evidence), "rows": rows(evidence)}


SECTION = Section("pipeline", "The pipeline", context)
