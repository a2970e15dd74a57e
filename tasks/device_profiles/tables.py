"""A verdict on a device as a row of devices.csv, and in sentences: for stage hardware_fit and for `edgepress fit`."""

from __future__ import annotations

from typing import Any

from tasks.algorithms.device_fit.footprint import Workload
from tasks.algorithms.device_fit.verdict import FITS, Fit

COLUMNS = (
    "device",
    "verdict",
    "weights_bytes",
    "kv_bytes",
    "activation_bytes",
    "total_bytes",
    "capacity_bytes",
    "headroom_bytes",
    "bytes_over",
    "limiting_term",
    "placement",
    "streamed_bytes_per_token",
    "bandwidth_seconds",
    "compute_seconds",
    "tokens_per_second_bound",
    "limited_by",
    "ways_to_fit",
    "notes",
    "fetched_verdict",
)
"""The columns of devices.csv. Bytes are those in the device's memories; `total_bytes` includes metadata."""


def row(name: str, found: Fit, fetched: str = "") -> dict[str, Any]:
    """A device's row of devices.csv, by `COLUMNS`; fetched: the verdict of the fetched model, where it was judged."""
    known = {
        "device": name,
        "placement": "; ".join(_placed(found)),
        "bandwidth_seconds": found.seconds["bandwidth"],
        "compute_seconds": found.seconds["compute"],
        "tokens_per_second_bound": found.tokens_per_second.bound,
        "limited_by": limited_by(found),
        "ways_to_fit": "; ".join(way.text for way in found.ways_to_fit),
        "notes": "; ".join(found.notes),
        "fetched_verdict": fetched,
    }
    return {column: known[column] if column in known else getattr(found, column) for column in COLUMNS}


def limited_by(found: Fit) -> str:
    """The term of the roofline: "compute", or "bandwidth of" a memory."""
    speed = found.tokens_per_second
    return speed.limited_by if speed.limited_by == "compute" else f"bandwidth of {speed.tier}"


def summary(name: str, found: Fit, workload: Workload) -> list[str]:
    """A verdict for the terminal."""
    speed = found.tokens_per_second
    room = f"{found.bytes_over:,} bytes over" if found.bytes_over else f"{found.headroom_bytes:,} bytes free"
    lines = [
        f"{name}: {found.verdict}, limited by {found.limiting_term} ({room}), context {workload.context} x "
        f"{workload.batch}",
        f"in memory: weights {found.weights_bytes:,}, metadata {found.metadata_bytes:,}, KV cache {found.kv_bytes:,}, "
        f"activations and scratch {found.activation_bytes:,}, together {found.total_bytes:,} bytes",
        *(f"  {placed}" for placed in _placed(found)),
        f"at most {speed.bound:,.1f} tokens/s, limited by {limited_by(found)} (bandwidth "
        f"{1000 * found.seconds['bandwidth']:,.3f} ms, compute {1000 * found.seconds['compute']:,.3f} ms a step)",
    ]
    if found.streamed_bytes_per_token:
        lines.append(f"{found.streamed_bytes_per_token:,} bytes are streamed from storage in each step")
    if found.verdict != FITS:
        changes = ", or ".join(way.text for way in found.ways_to_fit)
        lines.append(f"what would make it fit: {changes or 'no single change'}")
    return lines + [f"note: {note}" for note in found.notes]


def _placed(found: Fit) -> list[str]:
    """Per memory in use what lies there: "dram 1,234 of 5,678: weights (layers.0 to layers.9), kv_cache"."""
    lines = []
    for place in found.placement:
        if place.items:
            names = [f"weights ({place.parts})" if n == "weights" else n for n in place.items if n != "metadata"]
            lines.append(f"{place.tier} {place.used:,} of {place.usable:,}: {', '.join(names) or 'metadata'}")
    return lines
