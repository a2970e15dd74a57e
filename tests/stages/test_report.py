"""The report and the terminal's table, from synthetic results of the other stages."""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from tasks import report
from tasks.cli import report as summary
from tasks.evaluation import comparison
from tasks.reporting import chart_style, dag, model_rows, size_charts, verdict
from tasks.reporting.sections import task_scores
from tests.support import synthetic_results
from tests.support.synthetic_results import (
    BITS_PER_BYTE,
    EDGES,
    EVIL,
    MODELS,
    PERPLEXITY,
    PIPELINE,
    Out,
    fit,
    fit_on,
    ledger,
    manifest,
    metrics,
    tables,
)


@pytest.fixture
def results(tmp_path):
    """The files that the report reads, by the suffix that it asks for."""
    return synthetic_results.write(tmp_path)


@pytest.fixture
def make(results, tmp_path, monkeypatch):
    monkeypatch.setattr(report.vl_convert, "javascript_bundle", lambda vl_version: bundle())
    monkeypatch.setattr(report.vl_convert, "vegalite_to_svg", lambda spec, vl_version: "<svg/>")  # a third of a second
    return lambda out="out": synthetic_results.report_stage(tmp_path, results, out)


AGAINST, STAGES = 0, 1
"""Which of the page's tables they are."""


def page(stage):
    report.run(stage)
    return stage.output("report.html").read_text(encoding="utf-8")


def sentences(stage):
    report.run(stage)
    return stage.output("verdict.txt").read_text().splitlines()


def cells(text):
    """The rows of every HTML table, as texts of their cells."""

    class Reader(HTMLParser):
        def __init__(self):
            super().__init__()
            self.tables, self.inside = [], False

        def handle_starttag(self, tag, attrs):
            if tag == "table":
                self.tables.append([])
            elif tag == "tr":
                self.tables[-1].append([])
            elif tag in ("td", "th"):
                self.tables[-1][-1].append("")
                self.inside = True
            elif tag in ("small", "br") and self.inside:
                self.tables[-1][-1][-1] += " "

        def handle_endtag(self, tag):
            self.inside = self.inside and tag not in ("td", "th")

        def handle_data(self, data):
            if self.inside:
                self.tables[-1][-1][-1] += data

    reader = Reader()
    reader.feed(re.sub(r"<script.*?</script>", "", text, flags=re.S))
    return reader.tables


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
    assert found["baseline_bits_per_byte_test"] == pytest.approx(0.84)
    assert found["package_violations"] == found["package_revived"] == 0
    assert found["fits"] is True
    assert found["tokens_per_second_bound"] == 6543.21


def test_the_first_line_says_all_in_short(make):
    stage = make()
    text = page(stage)
    first, second = stage.output("verdict.txt").read_text().splitlines()[:2]
    assert first == (  # 4,770,688 / 1,150,072 = 4.148
        "4.1 times smaller than the fetched model (1,150,072 bytes); perplexity 3.810 on test (fetched 3.123); better "
        "than plain quantisation of equal size in domain, worse out of domain (plain 4.200); fits siracusa and "
        "esp32-s3."
    )
    assert re.search(r"<h1>(.*?)</h1>", text)[1] == first
    assert second == (
        "Better than plain quantisation of equal size in domain, worse out of domain: perplexity 3.810 in 1,150,072 "
        "bytes, plain GPTQ 4.200 in 1,148,380 bytes (test, in-domain, ratio 0.9071, 95 % interval 0.9071 to 0.9071; "
        "out of domain 366.8 against 362.0, ratio 1.013, 95 % interval 1.013 to 1.013)."
    )
    assert "The packaged model fits siracusa: 1,992,769 bytes stay free (mram: weights)." in text
    assert "3.810 on test (fetched 3.123, +22.0 %) and 366.750 on test_ood (fetched 310.500, +18.1 %)" in text
    against = {row[0]: row[1:] for row in cells(text)[AGAINST]}
    assert against["bytes"] == ["1,150,072", "1,148,380", "+0.1 %", "–"]
    assert against["perplexity, test_ood"] == ["366.750", "362.000", "+1.3 % +1.3 % to +1.3 %", "worse"]


def evaluation(test, ood, size=1000, **given):
    return {
        "evaluated": True,
        "protocol": "p",
        "perplexity": {"test": test, "test_ood": ood},
        "bits_per_byte": {"test": 2.0, "test_ood": 2.01},
        "predictions": {"test": 7, "test_ood": 7},
        "bytes": {"total": size},
    } | given


@pytest.mark.parametrize(
    ("package", "plain", "expected"),
    [
        (
            evaluation(42.3, 278.0, 812_345),
            evaluation(47.1, 301.0, 811_900),
            "Better than plain quantisation of equal size: perplexity 42.30 in 812,345 bytes, plain GPTQ 47.10 in"
            " 811,900 bytes (test; out of domain 278.0 against 301.0).",
        ),
        (
            evaluation(47.1, 301.0, 812_345),
            evaluation(42.3, 278.0, 811_900),
            "Worse than plain quantisation of equal size: perplexity 47.10 in 812,345 bytes, plain GPTQ 42.30 in"
            " 811,900 bytes (test; out of domain 301.0 against 278.0); plain quantisation is better here:"
            " wanda.enabled false, depth_prune.remove 0.",
        ),
        (
            evaluation(100.0, 200.0),
            evaluation(100.4, 199.1),  # 0.4 % and 0.45 %
            "No difference to plain quantisation of equal size: perplexity 100.0 in 1,000 bytes, plain GPTQ 100.4 in"
            " 1,000 bytes (test; out of domain 200.0 against 199.1).",
        ),
        (
            evaluation(100.0, 201.1),  # 0.55 %: the plain one is better there, and nowhere worse
            evaluation(100.4, 200.0),
            "No difference to plain quantisation of equal size in domain, worse out of domain: perplexity 100.0 in"
            " 1,000 bytes, plain GPTQ 100.4 in 1,000 bytes (test; out of domain 201.1 against 200.0); plain"
            " quantisation is better here: wanda.enabled false, depth_prune.remove 0.",
        ),
        (
            evaluation(12_345.6, float("inf")),
            evaluation(0.5, float("inf"), 880),
            "Worse than plain quantisation in 12.0 % fewer bytes: perplexity 12,346 in 1,000 bytes, plain GPTQ 0.5000"
            " in 880 bytes (test); plain quantisation is better here: wanda.enabled false, depth_prune.remove 0.",
        ),
        (
            evaluation(5.0, 5.0),
            evaluation(4.0, 6.0, bits_per_byte={"test": 2.5, "test_ood": 2.02}, predictions={"test": 8, "test_ood": 7}),
            "Better than plain quantisation of equal size: bits per byte 2.000 in 1,000 bytes, plain GPTQ 2.500 in"
            " 1,000 bytes (test; out of domain perplexity 5.000 against 6.000).",
        ),
        (
            evaluation(5.0, 5.0),
            {"evaluated": False},
            "Not compared with a plain model of equal size.",
        ),
        (
            {"evaluated": False},
            {"evaluated": False},
            "Not compared with a plain model (evaluate is switched off).",
        ),
        (
            evaluation(5.0, 5.0),
            evaluation(4.0, 4.0, protocol="another"),
            "Not compared with a plain model (the two have no common measure).",
        ),
    ],
)
def test_the_sentence_names_the_better_one(package, plain, expected):
    assert comparison.sentence(package, plain, ["wanda.enabled false", "depth_prune.remove 0"], True) == expected


def test_a_plain_model_without_the_package_s_recovery_is_named_so():
    text = comparison.sentence(evaluation(4.0, 4.0), evaluation(5.0, 5.0), [], False)
    assert "plain GPTQ without recovery 5.000 in" in text


@pytest.mark.parametrize(
    ("fitting", "expected"),
    [
        (["chosen"], "fits chosen, and none of 5 other devices"),
        ([], "does not fit chosen, and none of 5 other devices"),
        (["chosen", "a"], "fits chosen and a"),
        (["chosen", "a", "b", "c", "d"], "fits chosen and 4 of 5 other devices"),
        (["chosen", "a", "b", "c", "d", "e"], "fits chosen and all 5 other devices"),
        (["a", "b"], "does not fit chosen, but a, b"),
    ],
)
def test_the_first_line_names_few_devices_and_counts_many(fitting, expected):
    rows = [{"device": name, "verdict": "DOES_NOT_FIT"} for name in ("chosen", "a", "b", "c", "d", "e")]
    for row in rows:
        row["verdict"] = "FITS_STREAMING" if row["device"] in fitting else "DOES_NOT_FIT"
    assert verdict.devices(rows[0] | {"all_devices": rows}) == expected


def test_where_plain_wins_the_sentence_says_what_to_change(make, tmp_path):
    synthetic_results.evaluation(tmp_path, "package", (4.3, 370.0))
    first = sentences(make())[1]
    assert first.startswith("Worse than plain quantisation of equal size: perplexity 4.300 in")
    budget = 12 * (6784 + 8832 + 4736 + 17024 + 8832 + 6784)  # bytes of the plain model's linears
    assert first.endswith(
        "; plain quantisation is better here: wanda.enabled false, depth_prune.remove 0, eora.enabled false, "
        f"gptq.budget_bytes {budget}."
    )


def test_the_way_out_names_only_what_is_on():
    off = {"wanda": {"enabled": False}, "depth_prune": {"enabled": True, "remove": 0}, "eora": {"enabled": False}}
    assert comparison.way_out(off | {"gptq": {"enabled": True, "budget_bytes": 77, "joint": None}}, 77) == []
    joint = off | {"gptq": {"enabled": True, "budget_bytes": 76, "joint": {"keep": 2, "of": 4}}}
    assert comparison.way_out(joint, 77) == ["gptq.joint null", "gptq.budget_bytes 77"]
    assert comparison.way_out({}, None) == []


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


@pytest.mark.parametrize(("off", "without"), [(["baseline_lora"], True), (["lora", "baseline_lora"], False)])
def test_a_plain_model_without_recovery_is_fair_where_the_package_had_none(make, results, off, without):
    for name in off:
        results[f"{name}/history.csv"].write_text("step,loss\n")
    stage = make()
    report.run(stage)
    assert ("GPTQ without recovery" in stage.output("verdict.txt").read_text()) == without


def test_recovery_is_measured_against_both_references(make):
    stage = make()
    shares = {tuple(row[:2]): row[2:] for row in table_after(page(stage), 'id="recovery"')[1:]}
    # (9.75 - 3.6789) / (9.75 - 3.1234) and / (9.75 - 2.95); (640.125 - 355.5) / (640.125 - 310.5) and / (… - 300.25)
    assert shares["test", "as fetched"] == ["9.750", "3.679", "3.123", "91.62 %"]
    assert shares["test", "recovered dense"] == ["9.750", "3.679", "2.950", "89.28 %"]
    assert shares["test_ood", "as fetched"][3] == "86.35 %"
    assert shares["test_ood", "recovered dense"][3] == "83.74 %"
    found = json.loads(stage.output("metrics.json").read_text())
    assert found["recovery_share_fetch_test"] == pytest.approx(0.916171, abs=1e-6)
    assert found["recovery_share_baseline_lora_test_ood"] == pytest.approx(0.837440, abs=1e-6)


def test_recovery_past_the_reference_and_no_gap():
    models = {"wanda": evaluation(10.0, 5.0), "lora": evaluation(6.0, 4.0), "fetch": evaluation(8.0, 5.0)}
    above, none = comparison.recovery(models)
    assert (above.split, above.closed) == ("test", 2.0)
    assert (none.split, none.closed) == ("test_ood", None)
    models["fetch"] = evaluation(8.0, 5.0, predictions={"test": 9, "test_ood": 9})  # another vocabulary
    assert [share.measure for share in comparison.recovery(models)] == ["bits_per_byte"] * 2
    assert comparison.recovery({"lora": evaluation(6.0, 4.0)}) == []


def test_ledgers_are_summed_per_stage_and_listed_per_linear(make, results):
    ledger(zeros=8000, revived=37, violations=21).to_csv(results["gptq/sparsity.csv"], index=False)
    ledger(violations=1).to_csv(results["lora/sparsity.csv"], index=False)
    ledger(revived=1).to_csv(results["eora/sparsity.csv"], index=False)
    text = page(make())
    shown = {row[0]: row[1:] for row in table_after(text, "What each stage left of the pattern")}
    assert shown["wanda"] == ["983,040", "491,520 50.00 %", "245,760", "0", "0", "unbroken"]
    assert shown["gptq"] == ["983,040", "480,000 48.83 %", "245,760", "21", "37", "broken in 1 of 60 linears"]
    assert [shown[name][5] for name in ("lora", "eora")] == ["broken in 1 of 60 linears"] * 2
    assert shown["package"][5] == "unbroken"
    linears_of_gptq = table_after(text, "<summary>gptq: every linear</summary>")
    assert len(linears_of_gptq) == 61
    assert linears_of_gptq[2] == ["model.layers.0.self_attn.k_proj", "16,384", "8,000", "4,096", "21", "37"]


def test_a_pattern_that_was_asked_for_and_broken_is_labelled_dense(make, results, tmp_path):
    results["manifest.json"].write_text(json.dumps(manifest() | {"pattern": "dense", "asked": "2:4"}))
    dense = metrics("package") | {"max_kept": {"4": 4, "8": 8, "16": 16, "32": 32}}
    (tmp_path / "data/evaluate/package/metrics.json").write_text(json.dumps(dense))
    text = page(make())
    assert {row[0]: row for row in cells(text)[STAGES]}["package"][3] == "dense (asked 2:4)"
    sentence = "2:4 was asked for, but a later stage broke it: the package is labelled and stored as dense."
    assert text.count(sentence) == 2  # in the verdict and with the ledgers
    results["manifest.json"].write_text(json.dumps(manifest() | {"asked": "2:4"}))
    assert "was asked for" not in page(make("again"))


def test_bytes_stand_beside_what_they_must_hold(make):
    shown = {row[0]: row[1:] for row in table_after(page(make()), "The package against what it must hold")}
    assert shown["positions"] == ["281,000", "277,971.5", "1.09 %"]
    assert shown["values"] == ["430,000", "430,000.0", "0.00 %"]
    assert shown["metadata"] == ["36,000", "–", "–"]
    assert shown["all that have a bound"] == ["1,080,664", "1,077,635.5", "0.28 %"]


def test_bits_per_linear_where_they_are_mixed(make):
    text = page(make())
    shown = {row[0]: row[1:] for row in table_after(text, 'id="quantisation"')}
    assert shown["gptq"] == ["0", "0", "60", "0", "4.000"]
    assert shown["plain: baseline"] == ["12", "24", "24", "12", "4.000"]  # (3 + 4 + 2 + 8 + 4 + 3) / 6
    assert 'id="spec-bits-baseline"' in text and 'id="spec-bits-gptq"' not in text


def test_branches_are_priced_in_bits_per_weight(make):
    text = page(make())
    # 60 branches of 512 bytes over 60 x 16384 weights
    assert "30,720 bytes, which would buy 0.250 bits more per weight" in text
    assert table_after(text, "What the low-rank branches cost")[1][1:] == [
        "2",
        "0.05",
        "0.035",
        "512",
        "0.250",
    ]


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


def table_after(text, mark):
    return cells(text[text.index(mark) :])[0]


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


ORIGINAL = report.vl_convert.javascript_bundle
DRAW = report.vl_convert.vegalite_to_svg


@functools.cache
def bundle():
    """Vega's script, once for many pages: it takes most of their time."""
    return ORIGINAL(vl_version=chart_style.VEGA_LITE)


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
    results["fit.json"].write_text(json.dumps({"verdict": "NOT_CHECKED"}))
    results["manifest.json"].write_text(json.dumps({"files": {}, "pattern": None, "lineage": {}}))
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
    results["fit.json"].write_text(json.dumps(fit() | fit_on("siracusa", "DOES_NOT_FIT", 4_000_000)))
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


@pytest.mark.parametrize(
    ("max_kept", "expected"),
    [
        ({"4": 2, "8": 4, "16": 8, "32": 16}, ["2:4"]),
        ({"4": 4, "8": 7, "16": 14, "32": 28}, ["7:8"]),
        ({"4": 3, "8": 4, "16": 8, "32": None}, ["3:4", "4:8"]),
        ({"4": 4, "8": 8, "16": 16, "32": 32}, []),
        ({}, []),
    ],
)
def test_patterns_name_the_shortest(max_kept, expected):
    assert model_rows.patterns(max_kept) == expected


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
    records = tmp_path / "data/lineage"
    records.mkdir(parents=True)
    (records / "wanda.json").write_text(json.dumps({"seconds": 12.345}))
    outs = {"wanda": [records / "wanda.json"], "lora": [records / "lora.json"]}
    outs["report"] = [stage.output("stages.csv"), stage.output("verdict.txt")]
    monkeypatch.setattr(summary, "Repo", repo_with(outs, tmp_path))
    rows = {row["stage"]: row for row in summary.rows()}
    assert list(rows) == list(MODELS)
    assert rows["wanda"]["seconds"] == 12.345 and rows["lora"]["seconds"] is None and rows["gptq"]["seconds"] is None
    assert rows["package"]["perplexity_test"] == 3.81
    lines = summary.table().splitlines()
    assert lines[0].split() == [
        *("stage", "parameters", "zeros", "bytes", "ppl", "test", "ppl", "ood", "bpb", "test", "bpb", "ood", "seconds")
    ]
    figures = ["1,985,664", "50.0%", "4,770,688", "9.750", "640.125", "0.7800", "2.2800", "12.3"]
    assert lines[4].split() == ["wanda", *figures]
    assert [line.split("  ")[0].strip() for line in lines[8:12]] == [
        "package",
        "-" * len(lines[0]),
        "plain: baseline_lora",
        "plain: baseline",
    ]
    assert lines[-2].endswith("joined-512-512-nobos-fp32")
    assert lines[-1] == stage.output("verdict.txt").read_text().splitlines()[0]


def test_summary_without_a_report_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(summary, "Repo", repo_with({"report": [tmp_path / "stages.csv"]}, tmp_path))
    assert summary.rows() == []
    assert summary.table() == summary.NOTHING
    assert summary.verdict() == ""


def test_tasks_are_judged_by_their_standard_errors(make):
    text = page(make())
    shown = {tuple(row[:2]): row[2:] for row in table_after(text, 'id="task-scores"')[1:]}
    # 0.33 - 0.30 is within 1.96 x 0.0224
    assert shown["hellaswag", "acc"] == ["40", "0.3 ± 0.02", "0.33 ± 0.01", "0.22 ± 0.021", "no difference"]
    assert shown["corpus", "bits_per_byte"] == ["40", "1.5", "1.51", "1.52", "–"]
    assert len(shown) == 2 and "At most the first 40 documents of a task" in text


@pytest.mark.parametrize(
    ("package", "base", "higher", "word"),
    [
        ((0.40, 0.01), (0.30, 0.02), True, "better"),
        ((0.40, 0.01), (0.30, 0.02), False, "worse"),
        ((0.25, 0.01), (0.30, 0.02), True, "worse"),
        ((0.40, float("nan")), (0.30, 0.02), True, None),
        ((0.40, 0.01), None, True, None),
        ((0.40, 0.01), (0.30, 0.02), None, None),
    ],
)
def test_a_task_is_better_or_worse_beyond_the_error(package, base, higher, word):
    assert task_scores.judge(package, base, higher) == word


def test_the_cache_loses_only_beyond_its_error(make):
    shown = {tuple(row[:2]): row[2:] for row in table_after(page(make()), 'id="kv-cache"')[1:]}
    assert [shown["512", bits][3] for bits in ("16", "8", "4")] == ["reference", "no difference", "worse"]
    assert shown["128", "4"][2] == "+0.02000 ± 0.00100" and shown["128", "4"][4:] == ["40,960", "320.0", "4.00×"]


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
    known = {os.path.relpath(path, folder) for path in written}
    assert "../lineage/evaluate@gptq.json" in links and "../package/model/model.safetensors" in links
    assert known - {"model"} == set(links) - {"../package/model/model.safetensors"}  # model: beside the report


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


def test_each_stage_is_compared_with_the_model_that_it_was_given(make, tmp_path):
    synthetic_results.evaluation(tmp_path, "eora", PERPLEXITY["gptq"])  # which changes nothing
    shown = {row[0]: row[1:] for row in table_after(page(make()), 'id="attribution"')[1:]}
    # 9.75 - 4.2 and 640.125 - 402.25; every document deviates by as much in both, so the interval is the ratio's alone
    assert shown["wanda"][0] == "depth_prune"
    assert shown["wanda"][1].split()[0] == "+5.550" and shown["wanda"][2].split()[0] == "+237.875"
    assert shown["eora"][1].startswith("no difference")
    assert shown["wanda"][3:] == ["0", "+860,160", "no difference", "0.0 MiB"]  # half of 1,720,320 weights
    assert shown["gptq"][3] == "−3,050,024"  # 1,720,664 - 4,770,688
    assert list(shown) == list(PIPELINE[1:])


def test_speed_and_memory_are_those_of_the_measurement(make):
    shown = {row[0]: row[1:] for row in table_after(page(make()), 'id="host"')[1:]}
    assert shown["lora"] == [
        "0.25",
        "0.062",
        "24.0",
        "72.0",
        "50.00",
        "512.00 MiB",
        "24.00 MiB",
        "4,770,688",
        "not available",
    ]


def test_failures_of_generation_are_counted_per_stage(make):
    shown = {row[0]: row[1:] for row in table_after(page(make()), 'id="completions"')[1:]}
    assert shown["wanda"] == ["2", "1", "0", "2", "0.250", "0.00 %"] and shown["lora"][1] == "0"


def test_devices_say_what_would_make_it_fit(make):
    rows = table_after(page(make()), "<h3>All devices</h3>")
    shown = {row[0]: row[1:] for row in rows[1:]}
    assert (
        shown["esp32-s3"][0].startswith("does not fit") and shown["esp32-s3"][-1] == "-2 layers, or 1.9 bits per weight"
    )
    assert shown["phone"][0].startswith("fits by streaming") and shown["siracusa"][-1] == "–"


def test_splits_are_named_by_their_measured_domain(make, results):
    text = page(make())
    assert cells(text)[STAGES][0][5] == "perplexity test in-domain"
    shown = {row[0]: row[1:] for row in table_after(text, 'id="domains"')[1:]}
    assert shown["test_ood"] == [
        "out-of-domain",
        "0.010",
        "60",
        "0 0.00 %",
        "3 5.00 %",
        "similarity 0.010, limit 0.075",
    ]
    results["overlap.json"].write_text(json.dumps({"measured": False, "splits": {}}))
    text = page(make("again"))
    assert "which split is in-domain was not measured" in text and "in-domain" not in cells(text)[STAGES][0][5]
