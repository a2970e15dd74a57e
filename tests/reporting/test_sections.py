"""What the sections of the page say, from synthetic results of the other stages."""

from __future__ import annotations

import json

import pytest

from tasks.reporting.sections import task_scores
from tests.support import synthetic_results
from tests.support.report_page import STAGES, cells, page, table_after
from tests.support.synthetic_results import PERPLEXITY, PIPELINE, ledger, manifest, metrics


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
    results["package/model/manifest.json"].write_text(json.dumps(manifest() | {"pattern": "dense", "asked": "2:4"}))
    dense = metrics("package") | {"max_kept": {"4": 4, "8": 8, "16": 16, "32": 32}}
    (tmp_path / "data/evaluate/package/metrics.json").write_text(json.dumps(dense))
    text = page(make())
    assert {row[0]: row for row in cells(text)[STAGES]}["package"][3] == "dense (asked 2:4)"
    sentence = "2:4 was asked for, but a later stage broke it: the package is labelled and stored as dense."
    assert text.count(sentence) == 2  # in the verdict and with the ledgers
    results["package/model/manifest.json"].write_text(json.dumps(manifest() | {"asked": "2:4"}))
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


def test_the_page_says_who_measured_and_what_it_doesn_t_know(make, results):
    def told(text):
        return text.partition('id="host"')[2].partition("</section>")[0]

    assert "1 threads, measured on A processor, 2 cores, 2026-11-20; 32 tokens" in told(page(make()))
    path = results["lineage/measure.json"]
    path.write_text(path.read_text().replace("digest of package", "digest of another"))
    shown = {row[0] for row in table_after(page(make("one")), 'id="host"')[1:]}
    assert "lora" in shown and "package" not in shown
    path.write_text("{}")
    assert "No speeds: nobody&#39;s speeds of these models are known here" in told(page(make("two")))


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
