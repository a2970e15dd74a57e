"""Charts of sizes."""

from __future__ import annotations

from tasks.reporting import model_rows, size_charts
from tests.support.synthetic_results import MODELS, PIPELINE, metrics


def test_plain_models_stand_beside_the_line():
    rows = model_rows.stage_rows({name: metrics(name) for name in MODELS})
    layers = size_charts.perplexity_by_bytes(rows.astype({"bytes": "int64"}), "perplexity_test", None)
    data = [layer["data"]["name"] for layer in layers["layer"]]
    line, *points = (layers["datasets"][name] for name in data[:4])
    assert [row["stage"] for row in line] == list(PIPELINE)
    assert {row["stage"]: row["kind"] for rows in points for row in rows} == dict.fromkeys(PIPELINE, "pipeline") | {
        "package": "package",
        "baseline_lora": "plain model",
        "baseline": "plain model",
    }
