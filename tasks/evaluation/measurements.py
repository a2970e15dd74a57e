"""What stage measure wrote, put together again: which models there are (its output), how fast they were (its record).

Speeds are no function of a stage's inputs, so DVC hashes none: data/measure holds what is, and the record of the run
that measured holds the figures. They are taken for a model only where they are of the same files and workload.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MODELS = "models.json"
"""Below data/measure: `measured`, `engine`, `workload`, and of every model `bytes`, `files`, `same_as`."""
OFF = "stage measure is switched off"
UNKNOWN = (
    "nobody's speeds of these models are known here: DVC's cache had the stage's output, and it keeps no records;"
    " `dvc repro -s -f measure` and then `edgepress run` measure them on this machine"
)


def hosts(models: Mapping[str, Any], record: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Model -> its figures with `measured`, `engine`, `bytes`, `host`, `workload`, `when`; or `measured` false, `why`.

    Args:
        models: what `MODELS` holds.
        record: of the run that measured; None where none is known.
    """
    known = record or {}
    figures = known.get("measured", {}) if known.get("workload") == models.get("workload") else {}
    common = {key: models.get(key) for key in ("engine", "workload")}
    common |= {"host": known.get("host"), "when": known.get("started")}
    found = {}
    for name, model in models.get("models", {}).items():
        own = figures.get(name, {})
        if models["measured"] and own.get("files") == model["files"]:
            found[name] = {"model": name, "measured": True, "bytes": model["bytes"]} | common | own
            del found[name]["files"]
        else:
            found[name] = {"model": name, "measured": False, "why": UNKNOWN if models["measured"] else OFF}
    return found


def source(hosts: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Where and when the figures are from: "Xeon, 2 cores, 2026-11-27"; None where there are none."""
    one = next((host for host in hosts.values() if host["measured"]), None)
    if one is None:
        return None
    machine = one.get("host") or {}
    name = machine.get("processor") or "an unnamed processor"
    return f"{name}, {machine.get('cores', '?')} cores, {str(one.get('when'))[:10]}"
