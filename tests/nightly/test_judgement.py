"""The gate: each verdict from hand-made figures, noise, precedence, and the margins that are shown."""

from __future__ import annotations

import dataclasses
import math

import pytest

from tasks.algorithms.statistics import gate
from tasks.algorithms.statistics.gate import Comparison, Figures, Interval
from tasks.nightly import judgement as gathered
from tasks.parameters import schema
from tests.support.paths import ROOT

LIMITS = gate.Limits(
    perplexity_ratio={"test": 1.02},
    fetched_ratio={"test": 1.1},
    dense_ratio={"test": 0.95},
    task_drop=0.02,
    bytes_ratio=1.02,
    max_bytes=None,
    latency_ratio=1.2,
    streaming=False,
    overlap={"documents": 0.01},
)
GOOD = Figures(
    perplexity={"test": 40.0},
    tokens="a",
    bytes=1000,
    least_bytes=900.0,
    fit="FITS",
    tasks={"quiz": 0.5},
    seconds_per_token=0.01,
    files={"model.safetensors": "1"},
    overlap={"documents": 0.0},
)
PROMOTED = dataclasses.replace(GOOD, perplexity={"test": 40.1}, files={"model.safetensors": "0"})
ONE = Interval(1.0, 0.995, 1.005)


def judge(candidate=GOOD, promoted=PROMOTED, ratio=ONE, base=ONE, dense=ONE, limits=LIMITS, **against) -> gate.Verdict:
    def of(interval, **more):
        return Comparison({"test": interval} if interval else {}, **more)

    return gate.judge(candidate, promoted, limits, of(ratio, **against), of(base), of(dense))


def changed(**values) -> Figures:
    return dataclasses.replace(GOOD, **values)


def test_other_files_beside_the_same_weights_may_have_the_same_figures() -> None:
    files = {**PROMOTED.files, "chat_template.jinja": "1"}
    assert judge(changed(perplexity=PROMOTED.perplexity, files=files)).verdict == gate.ACCEPT


def test_figures_within_every_limit_are_accepted() -> None:
    verdict = judge(task_drop={"quiz": Interval.exact(0.0)}, latency=Interval.exact(1.0))
    assert verdict.verdict == gate.ACCEPT
    assert {check.outcome for check in verdict.checks} == {gate.HOLDS}
    assert verdict.reason == f"all of {len(verdict.checks)} measured limits hold"


@pytest.mark.parametrize(
    ("given", "verdict", "word"),
    [
        ({"ratio": Interval(1.05, 1.03, 1.07)}, gate.REGRESSION, "perplexity by promoted model's, test: 1.05"),
        ({"base": Interval(1.2, 1.15, 1.3)}, gate.REGRESSION, "fetched"),
        ({"candidate": changed(bytes=1100)}, gate.REGRESSION, "bytes by promoted"),
        ({"task_drop": {"quiz": Interval(0.1, 0.05, 0.15)}}, gate.REGRESSION, "accuracy lost, quiz"),
        ({"latency": Interval(1.5, 1.4, 1.6)}, gate.REGRESSION, "seconds per token"),
        ({"candidate": changed(fit="DOES_NOT_FIT")}, gate.INFEASIBLE, "fits the device: DOES_NOT_FIT"),
        ({"candidate": changed(fit="FITS_STREAMING")}, gate.INFEASIBLE, "FITS_STREAMING"),
        (
            {"candidate": changed(fit="DOES_NOT_FIT", fit_term="siracusa, mram: weights", fit_margin=-5_197_770)},
            gate.INFEASIBLE,
            "fits the device: DOES_NOT_FIT (siracusa, mram: weights) by 5,197,770 bytes, limit FITS",
        ),
        ({"limits": dataclasses.replace(LIMITS, max_bytes=999)}, gate.INFEASIBLE, "bytes: 1,000, limit 999"),
        ({"dense": Interval(0.8, 0.78, 0.82)}, gate.ANOMALOUS, "dense"),
        ({"candidate": changed(overlap={"documents": 0.5})}, gate.ANOMALOUS, "training text, documents: 0.5"),
        ({"candidate": changed(perplexity={"test": 40.1})}, gate.ANOMALOUS, "identical figures"),
        ({"candidate": changed(files=PROMOTED.files)}, gate.ANOMALOUS, "same files, other figures"),
        ({"candidate": changed(altered=("model.safetensors",))}, gate.ANOMALOUS, "files: model.safetensors"),
        ({"candidate": changed(perplexity={"test": 0.5})}, gate.ANOMALOUS, "possible"),
        ({"candidate": changed(perplexity={"test": math.nan})}, gate.ANOMALOUS, "possible"),
        ({"candidate": changed(least_bytes=1001.0)}, gate.ANOMALOUS, "content"),
        ({"ratio": Interval(math.inf, math.nan, math.nan)}, gate.REGRESSION, "promoted"),
    ],
)
def test_a_broken_limit_has_its_verdict_and_names_itself(given, verdict, word) -> None:
    found = judge(**given)
    assert found.verdict == verdict
    assert word in found.reason
    assert all(check.leads_to == verdict for check in found.checks if check.outcome == gate.FAILS)


@pytest.mark.parametrize(
    ("interval", "outcome"),
    [
        (Interval(1.00, 0.99, 1.02), gate.HOLDS),
        (Interval(1.00, 0.97, 1.03), gate.OPEN),
        (Interval(1.03, 1.01, 1.05), gate.OPEN),
        (Interval(1.03, 1.02, 1.05), gate.OPEN),
        (Interval(1.03, 1.0201, 1.05), gate.FAILS),
        (Interval(1.00, math.nan, math.nan), gate.OPEN),
    ],
)
def test_noise_alone_neither_promotes_nor_rejects(interval, outcome) -> None:
    verdicts = {gate.HOLDS: gate.ACCEPT, gate.OPEN: gate.UNDECIDED, gate.FAILS: gate.REGRESSION}
    assert judge(ratio=interval).verdict == verdicts[outcome]


def test_of_several_broken_limits_the_least_trustworthy_wins() -> None:
    bad = {"ratio": Interval.exact(2.0), "candidate": changed(fit="DOES_NOT_FIT")}
    assert judge(**bad).verdict == gate.INFEASIBLE
    assert judge(**bad, dense=Interval.exact(0.1)).verdict == gate.ANOMALOUS
    assert judge(ratio=Interval.exact(2.0), base=Interval(1.1, 1.0, 1.2)).verdict == gate.REGRESSION


def test_without_perplexity_nothing_is_accepted_and_the_rest_may_be_missing() -> None:
    bare = Figures(perplexity={"test": 40.0}, bytes=1000)
    found = judge(candidate=bare, promoted=dataclasses.replace(PROMOTED, tasks={"quiz": 0.5}))
    assert found.verdict == gate.ACCEPT
    missing = {check.name for check in found.checks if check.outcome == gate.NOT_MEASURED}
    assert {"files", "fits the device", "accuracy lost, quiz", "seconds per token by promoted model's"} <= missing
    assert judge(ratio=None).verdict == gate.UNDECIDED
    assert judge(promoted=None, ratio=None).verdict == gate.ACCEPT
    assert judge(promoted=None, base=None).verdict == gate.UNDECIDED


def test_the_same_files_with_the_same_figures_are_no_anomaly() -> None:
    assert judge(candidate=PROMOTED).verdict == gate.ACCEPT
    other_text = dataclasses.replace(PROMOTED, tokens="b", perplexity={"test": 50.0})
    (check,) = (c for c in judge(candidate=other_text).checks if c.name == "figures belong to the weights")
    assert check.outcome == gate.NOT_MEASURED


def test_streaming_counts_as_fitting_only_where_it_is_allowed() -> None:
    limits = dataclasses.replace(LIMITS, streaming=True)
    assert judge(candidate=changed(fit="FITS_STREAMING"), limits=limits).verdict == gate.ACCEPT


def test_every_limit_is_shown_with_value_and_margin() -> None:
    free = changed(fit_term="siracusa, mram: weights", fit_margin=1_454_373)
    rows = {check.name: check.row() for check in judge(candidate=free, ratio=Interval(1.01, 1.0, 1.015)).checks}
    fits = rows["fits the device"]
    assert (fits["value"], fits["margin"]) == ("FITS (siracusa, mram: weights)", 1_454_373)
    row = rows["perplexity by promoted model's, test"]
    assert (row["value"], row["limit"], row["low"], row["high"]) == (1.01, 1.02, 1.0, 1.015)
    assert row["margin"] == pytest.approx(0.01)
    assert rows["perplexity by dense model's, test"]["margin"] == pytest.approx(0.05)
    assert all(set(row) == set(rows["files"]) for row in rows.values())


def timed(package: float, fetch: float, **more) -> gathered.Evidence:
    """Seconds per token of both models in one run; the least is 1 % below the median."""
    hosts = {
        name: {"host": "h", "workload": "w", "bytes": 9, "seconds_per_token": {"median": one, "least": 0.99 * one}}
        | more
        for name, one in (("package", package), ("fetch", fetch))
    }
    return gathered.Evidence(GOOD, {}, {}, hosts, None)


def test_a_busy_host_alone_makes_no_regression_of_latency() -> None:
    """The first two pairs were measured: packages of one shape, idle and beside other programs, milliseconds."""

    def check(own, promoted) -> gate.Check:
        (found,) = (
            c
            for c in gathered.judge(own, promoted, schema.load(ROOT / "params.yaml").gate).checks
            if c.name.startswith("seconds per token")
        )
        return found

    idle = timed(2.183, 1.768)
    assert check(timed(2.855, 2.565), idle).outcome == gate.OPEN
    assert check(timed(3.0, 1.8), idle).outcome == gate.FAILS
    assert check(timed(2.2, 1.8), idle).outcome == gate.HOLDS
    slower = check(timed(2.855, 2.565, bytes=8), idle)  # another fetched model says nothing
    assert (slower.outcome, slower.low) == (gate.FAILS, pytest.approx(2.855 / 2.183))
    assert check(timed(2.855, 2.565, host="other"), idle).outcome == gate.NOT_MEASURED
