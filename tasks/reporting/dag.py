"""The DAG as a drawing: where each stage's box stands, and the paths between them. Pure; it writes no markup."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

NODE, MATRIX, HEIGHT, PITCH = 106, 150, 24, 42
LEFT, GAP, RIGHT, BUS = 70, 56, 26, 12
"""Pixels: widths of a box and of a matrix item's, its height, from row to row; margins, and the bend of long edges."""


def dag(nodes: Iterable[str], edges: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """A drawing of the DAG from top to bottom; a row is the longest way from a source.

    The items of a matrix ("evaluate@gptq") stand in a second column.

    Args:
        nodes: names of stages.
        edges: (from, to).

    Returns:
        width, height, boxes (name, x, y, width, height) and paths (title, d), in pixels.
    """
    nodes, edges = sorted(nodes), sorted(edges)
    level = _levels(nodes, edges)
    boxes: dict[str, dict[str, Any]] = {}
    top = 4
    for depth in range(max(level.values(), default=-1) + 1):
        columns = [[n for n in nodes if level[n] == depth and ("@" in n) == matrix] for matrix in (False, True)]
        for matrix, column in enumerate(columns):
            x, width = (LEFT + NODE + GAP, MATRIX) if matrix else (LEFT, NODE)
            for row, name in enumerate(column):
                boxes[name] = {"name": name, "x": x, "y": top + row * PITCH, "width": width, "height": HEIGHT}
        top += PITCH * max(map(len, columns))
    paths = [{"title": f"{a} → {b}", "d": _path(boxes[a], boxes[b])} for a, b in edges]
    width = LEFT + NODE + GAP + MATRIX + RIGHT if any("@" in name for name in nodes) else LEFT + NODE + 4
    return {"width": width, "height": top, "boxes": list(boxes.values()), "paths": paths}


def _levels(nodes: list[str], edges: list[tuple[str, str]]) -> dict[str, int]:
    level = dict.fromkeys(nodes, 0)
    for _ in nodes:
        for a, b in edges:
            level[b] = max(level[b], level[a] + 1)
    return level


def _path(a: dict[str, Any], b: dict[str, Any]) -> str:
    down, middle_a, middle_b = b["y"] - a["y"], a["y"] + HEIGHT / 2, b["y"] + HEIGHT / 2
    if a["x"] == b["x"]:
        if down <= PITCH:
            return f"M{a['x'] + a['width'] / 2:g},{a['y'] + HEIGHT} V{b['y'] - 1}"
        out = a["x"] - min(LEFT * 1.28, 16 + 8 * down / PITCH)
        return f"M{a['x']},{middle_a:g} C{out:g},{middle_a:g} {out:g},{middle_b:g} {b['x'] - 1},{middle_b:g}"
    right = a["x"] + a["width"]
    if a["x"] < b["x"]:
        if down <= PITCH:
            half = right + GAP / 2
            return f"M{right},{middle_a:g} C{half:g},{middle_a:g} {half:g},{middle_b:g} {b['x'] - 1},{middle_b:g}"
        bus = b["x"] - BUS
        return f"M{right},{middle_a:g} H{bus - 6} q6,0 6,6 V{middle_b - 6:g} q0,6 6,6 H{b['x'] - 1}"
    bus = right + BUS
    return f"M{right},{middle_a:g} H{bus - 6} q6,0 6,6 V{middle_b - 6:g} q0,6 -6,6 H{b['x'] + b['width'] + 1}"


def ordered(nodes: Iterable[str], edges: Iterable[tuple[str, str]]) -> list[str]:
    """The stages so that each follows those that it reads from; names decide where the DAG doesn't."""
    nodes = sorted(nodes)
    level = _levels(nodes, sorted(edges))
    return sorted(nodes, key=lambda name: (level[name], name))
