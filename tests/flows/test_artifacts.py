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
    rows = [
        {"stage": "fetch", "state": "Cached", "why": "unchanged", "key": "k"},
        {
            "stage": "wanda",
            "state": "Completed",
            "why": "ran",
            "key": "l",
            "computing": 1.26,
            "record": "file:///w.json",
        },
    ]
    found = [*artifacts.of_run(rows, None), *artifacts.of_report(stage.output("report.html"))]
    assert len({artifact.key for artifact in found}) == len(found)
    return {artifact.key: artifact for artifact in sorted(found, key=lambda artifact: artifact.key)}


def test_few_artifacts_and_the_verdict_first(made, tmp_path):
    assert list(made) == ["1-verdict", "2-stages", "4-models", "5-tables", "6-plots", "7-report"]
    first = (tmp_path / "out/verdict.txt").read_text().splitlines()[0]
    assert made["1-verdict"].description == first
    assert made["1-verdict"].markdown.startswith(f"## {first}\n\n")


def test_one_table_says_what_each_stage_did_and_where_its_record_is(made):
    fetch, wanda = made["2-stages"].table
    assert list(fetch) == list(wanda) == list(artifacts.COLUMNS)
    assert (wanda["why"], wanda["computing"], wanda["record"]) == ("ran", 1.3, "file:///w.json")
    assert (fetch["why"], fetch["computing"], fetch["record"]) == ("unchanged", "", "")


def test_every_table_and_plot_of_the_report_is_there(made, tmp_path):
    tables = made["5-tables"].markdown
    names = [path.stem for path in (tmp_path / "out/tables").glob("*.csv")]
    assert re.findall(r"^## (.+)$", tables, re.MULTILINE) == sorted(name.replace("_", " ") for name in names)
    attribution = tables.partition("## attribution\n\n")[2].partition("\n\n")[0].splitlines()
    assert attribution[0].endswith("| seconds |")
    assert next(line for line in attribution if line.startswith("| wanda |")).endswith("| 1.5 |")
    assert all(line.count(" | ") == attribution[0].count(" | ") for line in attribution[2:])
    plots = re.findall(r"!\[.*?\]\(data:image/svg\+xml;base64,(.+?)\)\n\n(.{20,})", made["6-plots"].markdown)
    assert len(plots) == len(list((tmp_path / "out/plots").glob("*.svg"))) > 10
    for content, _ in plots:
        assert base64.b64decode(content).startswith(b"<svg")


def test_a_failure_takes_the_verdicts_place():
    verdict, stages = artifacts.of_run([], "wanda: no_such *thing*")
    assert verdict.key == "1-verdict" and verdict.markdown == "## Failed\n\nwanda: no\\_such \\*thing\\*"
    assert stages.key == "2-stages"


def test_all_of_it_can_be_sent(made):
    for key, artifact in made.items():
        assert re.fullmatch(r"[a-z0-9-]+", key)
        assert len(json.dumps(artifact.format(), allow_nan=False)) < 1_500_000  # a missing figure is null, never NaN


def test_names_are_text_in_markdown():
    assert artifacts._plain("esp32_s3 *fits* <b>") == "esp32\\_s3 \\*fits\\* \\<b\\>"
