"""The report and the terminal's table, from synthetic results of the other stages."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from tasks import report
from tasks.cli import console
from tasks.cli import report as summary
from tasks.evaluation import comparison
from tasks.reporting import model_rows
from tasks.reporting.sections import task_scores
from tests.support import report_page, synthetic_results
from tests.support.report_page import DRAW, ORIGINAL, STAGES, bundle, cells, page, sentences
from tests.support.synthetic_results import (
    BITS_PER_BYTE,
    EDGES,
    EVIL,
    MODELS,
    PERPLEXITY,
    Out,
    fit,
    fit_on,
    metrics,
    tables,
)


@pytest.fixture
def results(tmp_path):
    """The files that the report reads, by the suffix that it asks for."""
    return synthetic_results.write(tmp_path)


@pytest.fixture
def make(results, tmp_path, monkeypatch):
    """make(out="out") -> the stage."""
    return report_page.make(results, tmp_path, monkeypatch)


def test_tables_hold_the_stages_own_numbers(make):
    stage = make()
    shown = {row[0]: row for row in cells(page(stage))[STAGES][1:]}
    written = pd.read_csv(stage.output("stages.csv")).set_index("stage")
    assert list(written.index) == list(MODELS)
    for name in MODELS:
        given = metrics(name)
        assert written.loc[name, "parameters"] == given["parameters"]
        assert written.loc[name, "bytes"] == given["bytes"]["total"]
        assert (written.loc[name, "perplexity_test"], written.loc[name, "perplexity_test_ood"]) == PERPLEXITY[name]
        spread = [written.loc[name, f"bits_per_byte_{split}"] for split in BITS_PER_BYTE]
        assert spread == pytest.approx(list(given["bits_per_byte"].values()))
        row = shown[comparison.title(name)]
        assert row[1] == f"{given['parameters']:,}"
        assert row[4].split()[0] == f"{given['bytes']['total']:,}"
        assert [cell.split()[0] for cell in row[5:7]] == [f"{value:.3f}" for value in PERPLEXITY[name]]
        assert [cell.split()[0] for cell in row[7:9]] == [f"{value:.4f}" for value in spread]
    assert [row for row in shown if row.startswith("plain")] == ["plain: baseline_lora", "plain: baseline"]
    assert shown["wanda"][2:4] == ["50.00 %", "2:4"]
    assert shown["fetch"][2:4] == ["0.00 %", "none"]
    assert shown["package"][5] == "3.810 +22.0 %"  # 3.81 / 3.1234 = 1.2198


def test_bytes_by_component_add_up_to_the_total(make):
    stage = make()
    report.run(stage)
    sums = pd.read_csv(stage.output("bytes.csv")).groupby("stage")["bytes"].sum()
    assert {name: metrics(name)["bytes"]["total"] for name in MODELS} == sums.to_dict()


def test_metrics_are_flat_and_right(make):
    stage = make()
    report.run(stage)
    found = json.loads(stage.output("metrics.json").read_text())
    assert all(isinstance(value, (int, float, str)) for value in found.values())
    stored, shipped = 4_770_688, 1_150_072  # sums of the components above, by hand
    assert found["compression_vs_stored"] == pytest.approx(stored / shipped)
    assert found["compression_vs_fp32"] == pytest.approx(4 * 2_329_728 / shipped)
    assert found["compression_vs_bf16"] == pytest.approx(2 * 2_329_728 / shipped)
    assert found["perplexity_ratio_test_ood"] == pytest.approx(366.75 / 310.5)
    assert (found["baseline_bytes"], found["package_bytes"]) == (1_148_380, 1_150_072)
    assert (found["baseline_perplexity_test"], found["baseline_perplexity_test_ood"]) == (4.2, 362.0)
    assert found["plain_ratio_test"] == pytest.approx(0.9071429)  # 3.81 / 4.2
    assert found["plain_ratio_test_ood"] == pytest.approx(1.0131215)  # 366.75 / 362
    assert found["baseline_bits_per_byte_test"] == pytest.approx(0.85)
    assert found["package_violations"] == found["package_revived"] == 0
    assert found["fits"] is True
    assert found["tokens_per_second_bound"] == 6543.21


def test_a_baseline_that_is_off_has_no_figures(make, results):
    """Its folder holds the model that the stage passed on; evaluate measured that one."""
    results["baseline/bits.csv"].write_text("linear,weights,bits,bytes,sensitivity\n")
    stage = make()
    text = page(stage)
    assert sentences(make("again"))[1] == "Not compared with a plain model of equal size."
    shown = {row[0]: row for row in cells(text)[STAGES - 1]}
    assert shown["plain: baseline"] == ["plain: baseline", "not evaluated (switched off)"]
    assert shown["plain: baseline_lora"][5].startswith("2.950")
    found = json.loads(stage.output("metrics.json").read_text())
    assert not [key for key in found if key.startswith(("plain", "baseline_")) and "lora" not in key]
    assert found["baseline_lora_perplexity_test"] == 2.95
    assert "baseline" not in set(pd.read_csv(stage.output("bytes.csv"))["stage"])


def test_what_models_wrote_is_text(make):
    text = page(make())
    assert "alert(1)" in text
    assert html.escape(EVIL, quote=False).replace('"', "&#34;") in text
    assert "<script>alert" not in text
    assert "<b>" not in text
    # every script of the page is one that its policy names, or data
    scripts = re.findall(r"<script([^>]*)>", text)
    assert [given for given in scripts if "application/json" not in given] == ["", ""]


def test_page_refers_to_nothing_outside_it(make):
    text = page(make())
    own = text.replace(bundle(), "")
    assert re.findall(r"""(?:src|href|action|srcset)\s*=\s*["']?(?:https?:)?//""", own) == []
    assert "url(http" not in text and "@import" not in text
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert policy.startswith("default-src 'none'") and "unsafe-eval" not in policy
    hashes = [hashlib.sha256(script.encode()).digest() for script in (bundle(), report.STARTER)]
    allowed = [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in hashes]
    assert re.search(r"script-src ([^;]*)", policy)[1].split() == allowed


def test_same_inputs_give_the_same_bytes(make, monkeypatch):
    one, other = make("one"), make("other")
    monkeypatch.setattr(report.vl_convert, "javascript_bundle", ORIGINAL)
    monkeypatch.setattr(report.vl_convert, "vegalite_to_svg", DRAW)
    report.run(one)
    report.run(other)
    for name in ("report.html", "verdict.txt", "stages.csv", "bytes.csv", "metrics.json"):
        assert one.output(name).read_bytes() == other.output(name).read_bytes()
    for folder, least in (("plots", 9), ("tables", 4)):
        files = sorted(one.output(folder).iterdir())
        assert len(files) >= least and [file.name for file in files] == sorted(os.listdir(other.output(folder)))
        assert all(file.read_bytes() == (other.output(folder) / file.name).read_bytes() for file in files)
    assert one.output("report.html").stat().st_size < 2_000_000


@pytest.mark.parametrize("empty", ["header", "nothing"])
def test_switched_off_stages_are_named(make, results, empty):
    for name, table in tables().items():
        results[name].write_text("" if empty == "nothing" else ",".join(table.columns) + "\n")
    results["removed.json"].write_text(
        json.dumps({"removed": [], "kept": list(range(12)), "method": "taylor", "schedule": "greedy"})
    )
    results["hardware_fit/fit.json"].write_text(json.dumps({"verdict": "NOT_CHECKED"}))
    results["package/model/manifest.json"].write_text(json.dumps({"files": {}, "pattern": None, "lineage": {}}))
    stage = make()
    for folder in (stage.input("data/evaluate") / name for name in MODELS):
        (folder / "metrics.json").write_text(json.dumps({"model": folder.name, "evaluated": False}))
        (folder / "completions.json").write_text("[]")
    text = page(stage)
    for name in ("importance", "wanda", "lora", "gptq", "eora", "hardware_fit", "package"):
        assert f"Stage {name} is switched off" in text
    assert text.count("not evaluated (switched off)") == len(MODELS)
    assert json.loads(stage.output("metrics.json").read_text()) == {}
    assert len(pd.read_csv(stage.output("stages.csv"))) == len(MODELS)
    assert 'data-plot="spec' not in text


def test_a_model_that_does_not_fit_and_an_infinite_perplexity(make, results, tmp_path):
    results["hardware_fit/fit.json"].write_text(json.dumps(fit() | fit_on("siracusa", "DOES_NOT_FIT", 4_000_000)))
    worst = metrics("wanda")
    worst["perplexity"]["test"] = float("inf")
    (tmp_path / "data/evaluate/wanda/metrics.json").write_text(json.dumps(worst))
    stage = make()
    text = page(stage)
    assert "does not fit siracusa: 225,127 bytes over (mram: weights)." in text
    assert {row[0]: row for row in cells(text)[STAGES]}["wanda"][5] == "infinite"
    assert json.loads(stage.output("metrics.json").read_text())["fits"] is False


def test_skip_writes_empty_outputs(make):
    stage = make()
    report.skip(stage)
    assert "switched off" in stage.output("report.html").read_text()
    assert list(pd.read_csv(stage.output("stages.csv"))) == model_rows.COLUMNS
    assert stage.output("verdict.txt").read_text() == "The report is switched off.\n"
    assert json.loads(stage.output("metrics.json").read_text()) == {}


def repo_with(outs, root):
    stages = [SimpleNamespace(addressing=name, outs=[Out(str(path)) for path in paths]) for name, paths in outs.items()]

    class Repo:
        root_dir = str(root)
        index = SimpleNamespace(stages=stages)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    return Repo


def test_summary_joins_seconds_from_the_records(make, tmp_path, monkeypatch):
    stage = make()
    report.run(stage)
    outs = {"wanda": [], "lora": [], "gptq": [], "report": [stage.output("stages.csv").parent]}
    monkeypatch.setattr(summary, "Repo", repo_with(outs, tmp_path))
    first = {"seconds": 99.0, "machine": {"platform": "Elsewhere-1", "cpus": 64}}
    here = {"wanda": first | {"seconds": 12.345}}
    monkeypatch.setattr(summary.lineage, "local", lambda stage: here.get(stage.addressing))
    monkeypatch.setattr(summary.lineage, "find", lambda stage: None if stage.addressing == "lora" else first)
    rows = {row["stage"]: row for row in summary.rows()}
    assert list(rows) == list(MODELS)
    assert rows["wanda"]["seconds"] == 12.345 and rows["wanda"]["seconds_by"] == "this machine"
    assert rows["gptq"]["seconds"] == 99.0 and rows["gptq"]["seconds_by"] == "Elsewhere-1, 64 cores"
    assert rows["lora"]["seconds"] is None and rows["eora"]["seconds"] is None
    assert rows["package"]["perplexity_test"] == 3.81
    lines = "\n".join(map(console.text, summary.shown())).splitlines()
    assert lines[0].split() == [
        *("stage", "parameters", "zeros", "bytes", "ppl", "test", "ppl", "ood", "bpb", "test", "bpb", "ood", "seconds")
    ]
    figures = ["1,985,664", "50.0%", "4,770,688", "9.750", "640.125", "0.7800", "2.2800", "12.3"]
    assert lines[5].split() == ["wanda", *figures]
    assert [line.split("  ")[0].strip() for line in lines[10:14]] == [
        "package",
        "-" * max(map(len, lines[:-3])),
        "plain: baseline_lora",
        "plain: baseline",
    ]
    assert lines[-3].endswith("joined-512-512-nobos-fp32")
    assert lines[-2] == "seconds: of this machine (1 stages), Elsewhere-1, 64 cores (1 stages)"
    assert lines[-1] == stage.output("verdict.txt").read_text().splitlines()[0]


def test_summary_without_a_report_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(summary, "Repo", repo_with({"report": [tmp_path / "stages.csv"]}, tmp_path))
    assert summary.rows() == []
    assert summary.shown() == [summary.NOTHING]
    assert summary.verdict() == ""


def test_every_section_has_a_heading_a_link_and_its_tables_a_caption(make):
    text = page(make())
    for section in report.SECTIONS:
        assert f'<section id="{section.anchor}"' in text and f'<a href="#{section.anchor}">' in text
    own = re.sub(r"<script.*?</script>", "", text, flags=re.S)
    assert own.count("<table>") == own.count("<caption>") > 15
    assert len(set(re.findall(r"<caption>(.*?)</caption>", own))) == own.count("<caption>")
    assert "<th>" not in own.replace('<th scope="', "")


def test_links_lead_to_what_dvc_yaml_names(make, tmp_path):
    text = page(make())
    links = re.findall(r'href="(\.\./[^"]*)"', text)
    folder = tmp_path / "data/report"
    names = {name for edge in EDGES for name in edge}
    written = [Path(out.fs_path) for name in names for out in synthetic_results.node(tmp_path, name).outs]
    known = {os.path.relpath(path, folder) for path in written} | {f"../lineage/{name}.json" for name in names}
    assert "../lineage/evaluate@gptq.json" in links and "../package/model/model.safetensors" in links
    assert known - {"."} == set(links) - {"../package/model/model.safetensors"}  # model: beside the report


def test_plots_and_tables_are_files_too(make, monkeypatch):
    monkeypatch.setattr(report.vl_convert, "vegalite_to_svg", DRAW)
    stage = make()
    text = page(stage)
    drawn = set(re.findall(r'data-plot="spec-([^"]*)"', text))
    captions = json.loads((stage.output("plots") / "captions.json").read_text())
    assert drawn == set(captions) == {path.stem for path in stage.output("plots").glob("*.svg")} and len(drawn) > 10
    for path in stage.output("plots").glob("*.svg"):
        svg = path.read_text()
        assert svg.startswith("<svg") and svg.count("<path") > 5
    table = pd.read_csv(stage.output("tables") / "task_scores.csv")
    assert list(table.columns) == list(task_scores.COLUMNS) and len(table) == 6
