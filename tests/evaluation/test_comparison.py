"""The package against a plain model: which is better, by how much, and what to change."""

from __future__ import annotations

import pytest

from tasks.evaluation import comparison
from tests.support.report_page import evaluation


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


def test_the_way_out_names_only_what_is_on():
    off = {"wanda": {"enabled": False}, "depth_prune": {"enabled": True, "remove": 0}, "eora": {"enabled": False}}
    assert comparison.way_out(off | {"gptq": {"enabled": True, "budget_bytes": 77, "joint": None}}, 77) == []
    joint = off | {"gptq": {"enabled": True, "budget_bytes": 76, "joint": {"keep": 2, "of": 4}}}
    assert comparison.way_out(joint, 77) == ["gptq.joint null", "gptq.budget_bytes 77"]
    assert comparison.way_out({}, None) == []


def test_recovery_past_the_reference_and_no_gap():
    models = {"wanda": evaluation(10.0, 5.0), "lora": evaluation(6.0, 4.0), "fetch": evaluation(8.0, 5.0)}
    above, none = comparison.recovery(models)
    assert (above.split, above.closed) == ("test", 2.0)
    assert (none.split, none.closed) == ("test_ood", None)
    models["fetch"] = evaluation(8.0, 5.0, predictions={"test": 9, "test_ood": 9})  # another vocabulary
    assert [share.measure for share in comparison.recovery(models)] == ["bits_per_byte"] * 2
    assert comparison.recovery({"lora": evaluation(6.0, 4.0)}) == []
