"""The report's first lines."""

from __future__ import annotations

import re

import pytest

from tasks import report
from tasks.reporting import verdict
from tests.support import synthetic_results
from tests.support.report_page import AGAINST, cells, page, sentences


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


@pytest.mark.parametrize(("off", "without"), [(["baseline_lora"], True), (["lora", "baseline_lora"], False)])
def test_a_plain_model_without_recovery_is_fair_where_the_package_had_none(make, results, off, without):
    for name in off:
        results[f"{name}/history.csv"].write_text("step,loss\n")
    stage = make()
    report.run(stage)
    assert ("GPTQ without recovery" in stage.output("verdict.txt").read_text()) == without
