"""The report as Prefect artifacts, from synthetic results, without a server."""

from __future__ import annotations

import base64
import json
import os
import re

import pytest

from flows.server import settings
from tasks import report
from tasks.cli import report as summary
from tests.support import synthetic_results
from tests.support.paths import ROOT

os.environ.setdefault("PREFECT_HOME", str(ROOT / settings.HOME))  # else importing Prefect makes a folder in ~

from flows import artifacts  # noqa: E402


@pytest.fixture
def made(tmp_path, monkeypatch):
    """The artifacts by key."""
    stage = synthetic_results.report_stage(tmp_path, synthetic_results.write(tmp_path))
    report.run(stage)
    monkeypatch.setattr(
        summary, "rows", lambda: [{"stage": "fetch", "seconds": None}, {"stage": "wanda", "seconds": 1.5}]
    )
    return {artifact.key: artifact for artifact in artifacts.made(stage.output("report.html"))}


def test_verdict_tables_and_plots_become_artifacts(made, tmp_path):
    first = (tmp_path / "out/verdict.txt").read_text().splitlines()[0]
    assert made["verdict"].markdown.startswith(f"## {first}\n\n")
    assert {"report", "stages", "attribution", "devices", "task-scores", "kv-cache", "host"} <= set(made)
    assert made["attribution"].table[0]["stage"] == "vocabulary"
    assert {row["stage"]: row["seconds"] for row in made["attribution"].table}["wanda"] == 1.5
    plots = [key for key in made if key.startswith("plot-")]
    assert len(plots) == len(list((tmp_path / "out/plots").glob("*.svg"))) > 10
    for key in plots:
        kind, _, content = made[key].image_url.partition(",")
        assert kind == "data:image/svg+xml;base64" and base64.b64decode(content).startswith(b"<svg")
        assert len(made[key].description) > 20


def test_all_of_it_can_be_sent(made):
    for key, artifact in made.items():
        assert re.fullmatch(r"[a-z0-9-]+", key)
        assert len(json.dumps(artifact.format(), allow_nan=False)) < 500_000  # a missing figure is null, never NaN


def test_names_are_text_in_markdown():
    assert artifacts._plain("esp32_s3 *fits* <b>") == "esp32\\_s3 \\*fits\\* \\<b\\>"
