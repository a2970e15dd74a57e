"""The drawing of the DAG."""

from __future__ import annotations

from tasks.reporting import dag
from tests.support.synthetic_results import EDGES


def test_dag_draws_every_stage_once_and_every_edge_downwards():
    edges = [(dependency, user) for user, dependency in EDGES]
    nodes = sorted({name for edge in edges for name in edge})
    drawn = dag.dag(nodes, edges)
    boxes = {box["name"]: box for box in drawn["boxes"]}
    assert sorted(boxes) == nodes and len(drawn["boxes"]) == len(nodes)
    assert len(drawn["paths"]) == len(set(edges))
    assert all(boxes[a]["y"] < boxes[b]["y"] for a, b in edges)
    corners = [(box["x"], box["y"]) for box in drawn["boxes"]]
    assert len(set(corners)) == len(corners)
