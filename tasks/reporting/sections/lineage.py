"""Where the package comes from, as its manifest says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.reporting.format import flatten
from tasks.reporting.section import Section

if TYPE_CHECKING:
    from tasks.reporting.evidence import Evidence


def context(evidence: Evidence) -> dict[str, Any]:
    """files, source, parameters, inputs, and where the manifest and the package's files are."""
    links = {link.path.rpartition("/")[2]: link for link in evidence.outs.get("package", [])}
    return {
        "files": evidence.manifest["files"],
        "source": flatten(evidence.lineage.get("source", {})),
        "parameters": evidence.lineage.get("parameters", {}),
        "inputs": evidence.lineage.get("inputs", {}),
        "package": links.get("package"),
        "record": evidence.records.get("package"),
    }


SECTION = Section("lineage", "Lineage", context)
